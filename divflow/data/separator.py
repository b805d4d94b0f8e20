"""What separates the columns of a text file."""

import itertools
import re
from pathlib import Path

from divflow.data.module import DataError

__all__ = ["apparent_separator", "checked_separator"]

_SEPARATORS = (",", ";", "\t", "|", " ")
_LINES = 50


def checked_separator(separator: str) -> str:
    r"""One character; `\t`, as a command writes it, is the tab.

    Raises:
        DataError: more characters or none.
    """
    separator = "\t" if separator == "\\t" else separator
    if len(separator) != 1 or separator in '"\n\r':
        raise DataError(f"separator must be one character, such as ',' or ';', but is {separator!r}")
    return separator


def apparent_separator(path: Path, separator: str) -> str | None:
    """The separator by which the first lines have one number of columns, at least 2, if by `separator` they have not."""
    with path.open(errors="replace") as file:
        lines = [line for line in itertools.islice(file, _LINES) if line.strip()]
    if _columns(lines, separator) > 1:
        return None
    counts = {other: _columns(lines, other) for other in _SEPARATORS if other != separator}
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] > 1 else None


def _columns(lines: list[str], separator: str) -> int:
    """The number of columns, the same in each line; 0 if it is not."""
    numbers = {re.sub('"[^"]*"', "", line.strip(" \r\n")).count(separator) + 1 for line in lines}
    return numbers.pop() if len(numbers) == 1 else 0
