"""Code blocks of a document in Markdown, and the commands in them."""

import re
import shlex
from pathlib import Path


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and code of each fenced block; a block without a language has an empty one."""
    return re.findall(r"^```([^\n`]*)\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(code: list[tuple[str, str]]) -> list[str]:
    """The lines of shell blocks that train, from the command on; a script's are not single commands."""
    found = (re.search(r"(train\.py|divflow train)\b.*", line) for line in _lines(code))
    return [match.group() for match in found if match]


def unknown(code: list[tuple[str, str]], root: Path) -> list[str]:
    """The lines of shell blocks that start none of our commands, or a file of `tests/` that is not there."""
    ours = ("python train.py", "divflow ", "torchrun ", "pip install ", "python tests/")
    return [
        line
        for line in _lines(code)
        if not line.startswith(ours)
        or not all((root / word).is_file() for word in line.split() if word.startswith("tests/"))
    ]


def judgements(code: list[tuple[str, str]]) -> list[str]:
    """The lines of shell blocks that judge, sample or compare."""
    return [line for line in _lines(code) if line.startswith(("divflow evaluate", "divflow sample", "divflow compare"))]


def _lines(code: list[tuple[str, str]]) -> list[str]:
    return [line for language, text in code if language == "bash" and text[:2] != "#!" for line in text.splitlines()]


def overrides(command: str) -> list[str]:
    """The settings in a command; comments are none."""
    return [part for part in shlex.split(command, comments=True)[1:] if "=" in part]


def run_python(path: Path) -> dict:
    """Run all blocks of Python in order, as one script; returns its names."""
    namespace: dict = {"__name__": path.stem}
    for language, code in blocks(path):
        if language == "python":
            exec(compile(code, path.name, "exec"), namespace)
    return namespace
