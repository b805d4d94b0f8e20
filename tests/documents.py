"""Code blocks of a document in Markdown, and the commands in them."""

import re
import shlex
from pathlib import Path


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and code of each fenced block; a block without a language has an empty one."""
    return _blocks(path.read_text())


def _blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```([^\n`]*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def sections(path: Path) -> dict[str, list[str]]:
    """The Python blocks of each section, by its title."""
    parts = re.split(r"^## ", path.read_text(), flags=re.MULTILINE)[1:]
    return {part.splitlines()[0]: [code for language, code in _blocks(part) if language == "python"] for part in parts}


def commands(code: list[tuple[str, str]]) -> list[str]:
    """The lines of shell blocks that run train.py, from there on; a script's are not single commands."""
    return [line[line.index("train.py") :] for line in _lines(code) if "train.py" in line]


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
    return run_blocks([code for language, code in blocks(path) if language == "python"], path.stem)


def run_blocks(codes: list[str], name: str, namespace: dict | None = None) -> dict:
    """Run blocks in order, in these names or in new ones; returns the names."""
    namespace = {"__name__": name} if namespace is None else namespace
    for code in codes:
        exec(compile(code, name, "exec"), namespace)
    return namespace
