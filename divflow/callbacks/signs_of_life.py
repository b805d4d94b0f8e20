"""Several processes of one run: each gives signs of life beside the collectives, and ends when another one is gone.

A collective waits for every process, and a process that was killed never comes: the others would hang until its timeout
of half an hour. So a thread of each process writes a counter to a store of rank 0's every second; rank 0 decides, the
others read its decision, and a thread can end a process whose main thread waits in C++.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed

from divflow.errors import DivflowError

__all__ = ["ProcessError", "Watch"]

_GRACE = 3.0  # seconds for the others to read the decision, and for the main thread to end by itself


class ProcessError(DivflowError, RuntimeError):
    """Another process of the run is gone; the message names it and the checkpoint to go on with."""


class Watch:
    """Watch the signs of life of all processes of a run, and end this process when another one is gone.

    - A process that dies on the machine of rank 0 is noticed within two intervals, because its number is gone.
    - One that fails is noticed within two intervals anywhere, because it reports its error.
    - A machine that is lost is noticed after `limit`.
    - Polls are counted, not seconds: a run that is suspended as a whole and continues later has missed none.

    Args:
        rank: of this process.
        world_size: number of processes.
        share: function of rank 0's address (a host and a port; None elsewhere) that returns it in every process.
        hint: returns what to do, for the message.
        release: called before this process is ended, for example to kill its children.
        interval: seconds between signs of life.
        limit: seconds without one after which a process counts as gone.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        share: Callable[[Any], Any],
        hint: Callable[[], str],
        release: Callable[[], None],
        interval: float = 1.0,
        limit: float = 30.0,
    ) -> None:
        self.rank, self.world_size, self.interval, self.limit = rank, world_size, interval, limit
        self.step = 0
        self._hint, self._release = hint, release
        self._record: dict[str, Any] = {
            "state": "alive",
            "beat": 0,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "space": _space(),
        }
        self._seen: dict[int, tuple[int, int]] = {}  # beat and polls since it changed, by rank
        self._pids: dict[int, int] = {}  # of those whose numbers mean something here, by rank
        self._first: dict[str, Any] = {"pid": "unknown", "host": "an unknown host", "state": "alive"}  # rank 0
        self._decision = ""
        self._known, self._taken, self._closed, self._alone = (threading.Event() for _ in range(4))
        self._answers = 0  # of the store
        self._store = self._connect(share)
        self._asking = threading.Thread(target=self._ask, daemon=True, name="divflow-signs-of-life")

    def start(self) -> None:
        """Begin to watch; call it when every process has made its watch."""
        self._asking.start()
        threading.Thread(target=self._run, daemon=True, name="divflow-watch").start()
        atexit.register(self.close)

    def failed(self, error: BaseException) -> None:
        """Handle an error that ends this process.

        If the error is its own, this reports it to the other processes and returns.

        Raises:
            ProcessError: the error follows from another process being gone.
        """
        if _of_a_collective(error) and self._known.wait(2 * self.limit):
            self._taken.set()
            if self.rank == 0:
                time.sleep(_GRACE)  # the store ends with this process
            raise ProcessError(self._decision) from error
        if self._closed.is_set():
            return
        self._closed.set()
        text = str(error).splitlines()
        self._write(f"ended by {type(error).__name__}{f': {text[0]}' if text else ''}")
        if self.rank == 0:
            self._publish(0, self._record)
            time.sleep(_GRACE)

    def close(self) -> None:
        """End the watch: this process is done, and the others need not wait for it."""
        if self._closed.is_set() or self._known.is_set():
            return
        if self.rank == 0:  # whose store the others still use
            self._record["state"] = "left"
            self._alone.wait(self.limit)
        self._closed.set()
        self._write("left")

    def _connect(self, share: Callable[[tuple[str, int] | None], tuple[str, int]]) -> distributed.TCPStore:
        patience = timedelta(seconds=self.limit)
        if self.rank == 0:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            store = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            store.set("decision", "")
            self._store = store
            self._write("alive")
            share((host, store.port))
            return store
        host, port = share(None)
        self._store = distributed.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
        self._write("alive")
        return self._store

    def _ask(self) -> None:
        """Thread that gives signs of life; a store on a machine that is lost may never answer it."""
        while not self._closed.wait(self.interval):
            try:
                self._decision = self._poll()
            except RuntimeError:  # of the store, whose process is gone
                if self._first["state"] != "left":
                    self._decision = self._message(0, self._first, "died")
                return
            finally:
                self._answers += 1

    def _run(self) -> None:
        """Thread that ends this process once rank 0 has decided that another one is gone."""
        answers, polls = 0, 0
        while not self._closed.wait(self.interval):
            answers, polls = self._answers, polls + 1 if answers == self._answers else 0
            if polls * self.interval > self.limit and self._asking.is_alive():
                self._decision = self._message(0, self._first, self._silence)
            if self._decision:
                self._end()

    def _poll(self) -> str:
        self._record |= {"beat": self._record["beat"] + 1, "step": self.step}
        self._store.set(str(self.rank), json.dumps(self._record))
        if self.rank == 0:
            return self._decide()
        first, decision = self._store.multi_get(["0", "decision"])
        self._first = json.loads(first)
        if not decision and self._first["state"] == "alive" and self._silent(0, self._first):
            return self._message(0, self._first, self._silence)
        return decision.decode()

    def _decide(self) -> str:
        """Rank 0's decision about the others: empty while all is well."""
        others = range(1, self.world_size)
        # Checked before the records are read: a process that leaves writes its record before its number is gone.
        gone = {rank for rank, known in self._pids.items() if _is_gone(known)}
        records = [json.loads(value) for value in self._store.multi_get([str(rank) for rank in others])]
        for rank, record in zip(others, records, strict=True):
            if record["space"] and record["space"] == self._record["space"]:
                self._pids[rank] = record["pid"]
            if record["state"] == "left":
                continue
            if record["state"] != "alive":
                return self._publish(rank, record)
            if rank in gone:
                return self._publish(rank, record | {"state": "died"})
            if self._silent(rank, record):
                return self._publish(rank, record | {"state": self._silence})
        if all(record["state"] != "alive" for record in records):
            self._alone.set()
        return ""

    @property
    def _silence(self) -> str:
        return f"gave no sign of life for {self.limit:g} seconds"

    def _silent(self, rank: int, record: dict[str, Any]) -> bool:
        beat, polls = self._seen.get(rank, (-1, 0))
        self._seen[rank] = (record["beat"], polls + 1 if record["beat"] == beat else 0)
        return self._seen[rank][1] * self.interval > self.limit

    def _publish(self, rank: int, record: dict[str, Any]) -> str:
        decision = self._message(rank, record, record["state"])
        with contextlib.suppress(RuntimeError):
            self._store.set("decision", decision)
        return decision

    def _message(self, rank: int, record: dict[str, Any], state: str) -> str:
        who = f"rank {rank} of {self.world_size} (process {record['pid']} on {record['host']})"
        return f"{who} {state} at step {record.get('step', 0)}, so the run ends. {self._hint()}"

    def _write(self, state: str) -> None:
        self._record |= {"state": state, "step": self.step}
        with contextlib.suppress(RuntimeError):  # rank 0 has gone first
            self._store.set(str(self.rank), json.dumps(self._record))

    def _end(self) -> None:
        self._known.set()
        if not self._taken.wait(_GRACE):  # the main thread still computes, or waits in a collective
            print(f"error: {self._decision}", file=sys.stderr, flush=True)
        else:
            time.sleep(3 * _GRACE)  # it has raised ProcessError and is on its way out
        self._release()
        os._exit(1)


def _space() -> str:
    """Where this process's number means something: the same machine, the same container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_gone(pid: int) -> bool:
    """Whether a process of this machine has ended; one that its parent has not asked for yet is there as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _of_a_collective(error: BaseException) -> bool:
    if isinstance(error, DivflowError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))
