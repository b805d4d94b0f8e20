"""Processes of a test, which end with it in any case."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path


@contextlib.contextmanager
def process_group(command, log, env=None):
    """The command in a process group of its own, its output in `log`; whatever is left of the group is killed.

    Ctrl-C reaches it, which the background of a script and what is started there ignore.
    """

    def heard():
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True, preexec_fn=heard
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def members(group):
    """Numbers of the living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
