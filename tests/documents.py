"""Code blocks of a document in Markdown, what they print, and the commands in them.

python tests/documents.py docs/start.md    # run the page's blocks in an empty folder, and write what they print anew
"""

import io
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

from run import ROOT

# What pages use and not every installation has: blocks that import it are left out where it is missing.
OPTIONAL = {"diffusers", "flow_matching", "torchcfm"}
_BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"-?\d+(?:\.\d*)?(?:e[+-]?\d+)?")
_ERROR = re.compile(r" ± (\d+(?:\.\d+)?)")
# Of a run's table, what another machine may have otherwise.
_COSTS = re.compile(r"evaluations|quadrature.error|│\s+│|┃\s+┃")


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and code of each fenced block; a block without a language has an empty one."""
    return _BLOCK.findall(path.read_text())


def sections(path: Path) -> dict[str, list[str]]:
    """The Python blocks of each section, by its title."""
    parts = re.split(r"^## ", path.read_text(), flags=re.MULTILINE)[1:]
    return {part.splitlines()[0]: [code for lang, code in _BLOCK.findall(part) if lang == "python"] for part in parts}


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


def evaluations(code: list[tuple[str, str]]) -> list[str]:
    """The lines of shell blocks that evaluate, sample or compare."""
    return [line for line in _lines(code) if line.startswith(("divflow evaluate", "divflow sample", "divflow compare"))]


def _lines(code: list[tuple[str, str]]) -> list[str]:
    return [line for language, text in code if language == "bash" and text[:2] != "#!" for line in text.splitlines()]


def overrides(command: str) -> list[str]:
    """The settings in a command; comments are none."""
    return [part for part in shlex.split(command, comments=True)[1:] if "=" in part]


def played(path: Path, shell: bool, names: dict) -> Iterator[tuple[str, str, str | None]]:
    """Run a page's blocks in order, as one script: each one's code, what it printed, and the block of text that follows it.

    Python blocks share `names` and commands the current folder. Commands run with `shell`, and those alone whose output is
    shown. A block that imports a library of `OPTIONAL` that is not installed is left out, and `names["missing"]` has it.
    """
    names |= {"__name__": path.stem, "missing": set()}
    for (language, code), (after, shown) in pairwise([*blocks(path), ("", "")]):
        if language == "python" or (language == "bash" and after == "text" and shell):
            printed = _python(code, path.name, names) if language == "python" else _shell(code)
            if printed is not None:
                yield code, printed, shown if after == "text" else None


def _python(code: str, name: str, names: dict) -> str | None:
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            exec(compile(code, name, "exec"), names)
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        if library not in OPTIONAL:
            raise
        names["missing"].add(library)
        return None
    return printed.getvalue()


def _shell(code: str) -> str:
    """Standard output of its commands, by this tree and this Python; nothing is installed."""
    printed = ""
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        started = {"python": [str(ROOT / "train.py"), *words[2:]], "divflow": ["-m", "divflow", *words[1:]]}.get(
            words[0]
        )
        if started is not None:
            ended = subprocess.run([sys.executable, *started], capture_output=True, text=True, timeout=600, check=False)
            assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
            printed += ended.stdout
    return printed


def run_python(path: Path) -> dict:
    """Run all blocks of Python in order, as one script, and compare what they print with what the page shows; returns its names.

    Of a block that reads `outputs/`, which another training may have written, only the words are compared.
    """
    names: dict = {}
    for code, printed, shown in played(path, False, names):
        if shown is not None:
            check_printed(printed, shown, numbers="outputs/" not in code)
    return names


def run_blocks(codes: list[str], name: str, namespace: dict | None = None) -> dict:
    """Run blocks in order, in these names or in new ones; returns the names."""
    namespace = {"__name__": name} if namespace is None else namespace
    for code in codes:
        exec(compile(code, name, "exec"), namespace)
    return namespace


def check_printed(printed: str, shown: str, numbers: bool = True) -> None:
    """The same lines: the same words, and numbers within a hundredth or one unit of their last place."""
    lines, expected = printed.rstrip().splitlines(), shown.rstrip().splitlines()
    assert [_words(line) for line in lines] == [_words(line) for line in expected], (
        f"printed:\n{printed}\nshown:\n{shown}"
    )
    for line, other in zip(lines, expected, strict=True):
        for number, known in zip(_NUMBER.findall(line), _NUMBER.findall(other), strict=True):
            close = math.isclose(float(number), float(known), rel_tol=1e-2, abs_tol=1.01 * _last_place(known))
            assert close or not numbers, f"{number} is shown as {known}: {line!r}, {other!r}"


def check_table(printed: str, shown: str) -> None:
    """Each line that is shown was printed, in this order: the same words, and decimal numbers within their errors.

    Those with an error ± e may differ by 4 e, others by a twentieth. Whole numbers, which are counts and dates, and what a
    result cost are another machine's own.
    """
    lines = iter(printed.splitlines())
    for expected in filter(None, shown.splitlines()):
        line = next((line for line in lines if _words(line) == _words(expected)), None)
        assert line is not None, f"not printed, or not in this place: {expected!r}\nprinted:\n{printed}"
        if not _COSTS.search(expected):
            errors = [4 * float(error) for error in _ERROR.findall(expected)]
            found, known = (_NUMBER.findall(_ERROR.sub("", it)) for it in (line, expected))
            decimals = [(a, b) for a, b in zip(found, known, strict=True) if "." in b]
            for i, (number, value) in enumerate(decimals):
                allowed = errors[i] if errors else 0.05 * abs(float(value))
                assert abs(float(number) - float(value)) <= allowed, f"{number} is shown as {value}: {expected!r}"


def _words(line: str) -> list[str]:
    """Without what the numbers are, and how wide."""
    return re.sub(r"[━─\s]+", " ", _NUMBER.sub("#", line)).replace("[ ", "[").split()


def _last_place(number: str) -> float:
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def rewrite(path: Path) -> None:
    """Put what each block prints into the block of text after it: of commands the end, from the line on that it begins with now.

    Folders and times of this machine are left out.
    """
    text, place = path.read_text(), 0
    for code, printed, shown in played(path, True, {}):
        if shown is not None:
            lines = [line.rstrip() for line in printed.rstrip().splitlines()]
            if f"```bash\n{code}```" in text:
                begin = max(i for i, line in enumerate(lines) if _words(line) == _words(shown.splitlines()[0]))
                lines = [line for line in lines[begin:] if not line.startswith("In ") and "seconds" not in line]
            place = text.index(f"```text\n{shown}```", text.index(code, place)) + len("```text\n")
            text = text[:place] + "\n".join(lines) + "\n" + text[place + len(shown) :]
    path.write_text(text)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    page = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rewrite(page)
