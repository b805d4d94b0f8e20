"""What the reader of a page starts, in forks of one process that has imported what each would take seconds for.

Run with the Python of an environment that has divflow from a wheel. Each line that it reads is a request in JSON, and is
answered by one: None, or what went wrong. The output of all goes to the file that is named first.
"""

import importlib
import json
import multiprocessing
import os
import sys
import traceback
import types
from multiprocessing.connection import Connection

IMPORTED = ("matplotlib.pyplot", "divflow.runs.experiment", "divflow.callbacks.plots", "divflow.cli.application")
IMPORTED += tuple(f"divflow.cli.{name}" for name in ("train", "evaluate", "sample", "compare"))
FORKED = multiprocessing.get_context("fork")
SECONDS = 300


def arrive(folder: str, log: str) -> types.ModuleType:
    """In a fork: be in the folder, write to the log, and be a program of one's own."""
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (1, 2):
        os.dup2(file, output)
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    return program


def command(words: list[str], folder: str, log: str) -> None:
    """`divflow WORDS`."""
    arrive(folder, log)
    print("$ divflow", *words, flush=True)
    sys.argv = [os.path.join(os.path.dirname(sys.executable), "divflow"), *words]
    importlib.import_module("divflow.cli").main()


def session(blocks: Connection, folder: str, log: str) -> None:
    """An interactive Python: each block after the other, with the names of those before."""
    names = vars(arrive(folder, log))
    sys.path.insert(0, "")
    while True:
        try:
            exec(compile(blocks.recv(), "<block>", "exec"), names)
        except EOFError:
            return
        except BaseException:
            blocks.send(traceback.format_exc())
        else:
            blocks.send(None)


class Reader:
    """Of a page: in its folder, with one session."""

    def __init__(self, folder: str, log: str) -> None:
        self.place = (folder, log)
        self.blocks, theirs = FORKED.Pipe()
        self.session = FORKED.Process(target=self._session, args=(theirs,))
        self.session.start()
        theirs.close()

    def _session(self, blocks: Connection) -> None:
        self.blocks.close()  # the end of the other side is seen once nobody has it
        session(blocks, *self.place)

    def python(self, code: str) -> str | None:
        try:
            self.blocks.send(code)
            return self.blocks.recv() if self.blocks.poll(SECONDS) else f"no answer in {SECONDS} s"
        except (EOFError, OSError):
            return "the session has ended"

    def command(self, words: list[str]) -> str | None:
        process = FORKED.Process(target=command, args=(words, *self.place))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            return f"not done in {SECONDS} s"
        return f"ended with {process.exitcode}" if process.exitcode else None

    def close(self) -> None:
        self.blocks.close()
        self.session.kill()
        self.session.join()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in IMPORTED:
        importlib.import_module(name)
    reader = None
    for line in sys.stdin:
        request, given = json.loads(line)
        if request == "open":
            if reader is not None:
                reader.close()
            reader, answer = Reader(**given), None
        else:
            answer = getattr(reader, request)(**given)
        print(json.dumps(answer), file=answers, flush=True)
    if reader is not None:
        reader.close()


if __name__ == "__main__":
    main()
