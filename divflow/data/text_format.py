"""Format of columns and numbers in a text file: as the user gives it, and as its first lines show it."""

import codecs
import io
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from divflow.data.module import DataError

__all__ = ["TextFormat", "apparent_format", "check_apparent", "is_number"]

_SEPARATORS = (",", ";", "\t", "|", " ")
_LINES = 50
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig"}


@dataclass(frozen=True)
class TextFormat:
    r"""Format of a `.csv`.

    Args:
        separator: separator of columns, one character; `\t`, as a command writes it, is the tab.
        decimal: decimal mark of a number, one character.
        thousands: character that groups the digits of a number; None for none.
        encoding: encoding such as "latin-1"; None for UTF-8, or UTF-16 if the file begins with its mark.

    Raises:
        DataError: not single characters, or two of them are equal; there is no such encoding.
    """

    separator: str = ","
    decimal: str = "."
    thousands: str | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "separator", "\t" if self.separator == "\\t" else self.separator)
        if not _is_character(self.separator) or self.separator in '"\n\r':
            raise DataError(f"separator must be one character, such as ',' or ';', but is {self.separator!r}")
        for name, sign in {"decimal": self.decimal, "thousands": self.thousands}.items():
            if sign is not None and not (_is_character(sign) and not sign.isalnum() and sign not in '"\n\r+-'):
                raise DataError(f"{name} must be one character, such as ',' or '.', but is {sign!r}")
        if self.decimal == self.thousands:
            raise DataError(f"decimal and thousands must differ, but both are {self.decimal!r}")
        try:
            codecs.lookup(self.encoding or "utf-8")
        except (LookupError, TypeError) as error:
            raise DataError(
                f"there is no encoding {self.encoding!r}. Use utf-8, utf-16 or latin-1, for example"
            ) from error

    @property
    def number(self) -> str:
        """Regular expression of numbers, for pyarrow."""
        grouped = "" if self.thousands is None else rf"[0-9]{{1,3}}(?:{re.escape(self.thousands)}[0-9]{{3}})+|"
        fraction = rf"{re.escape(self.decimal)}[0-9]*"
        whole = rf"(?:{grouped}[0-9]+)(?:{fraction})?|{re.escape(self.decimal)}[0-9]+"
        return rf"^\s*[+-]?(?:{whole})(?:[eE][+-]?[0-9]+)?\s*$"


def _is_character(sign: object) -> bool:
    return isinstance(sign, str) and len(sign) == 1


def is_number(text: str, written: TextFormat) -> bool:
    """Whether this is a number, as numbers are written there."""
    return re.match(written.number, text) is not None or text.strip().lower() in ("nan", "inf", "-inf")


def apparent_format(path: Path, written: TextFormat) -> TextFormat:
    """The same format, its encoding that of the file's mark if it has one and none was given."""
    with pa.input_stream(str(path)) as file:
        start = file.read(4)
    found = next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), "utf-8")
    return TextFormat(written.separator, written.decimal, written.thousands, written.encoding or found)


def check_apparent(path: Path, written: TextFormat) -> int:
    """Refuse a file whose first lines show another format.

    Returns:
        How many lines before the table are comments, which begin with #. Names of columns behind a #, as `numpy.savetxt` writes them,
        are no comment.

    Raises:
        DataError: they have another encoding, or the same number of columns, at least 2, by another separator but not by this one.
    """
    try:
        with pa.input_stream(str(path)) as file, io.TextIOWrapper(file, written.encoding) as text:
            lines = list(itertools.islice(text, _LINES))
    except UnicodeError as error:
        raise DataError(
            f"{path.name} is not encoded as {written.encoding} ({error}). Set its encoding, such as data.encoding=latin-1, or "
            "utf-16"
        ) from error
    if any("\0" in line for line in lines):
        raise DataError(f"{path.name} holds zero bytes, as UTF-16 without its mark does. Set data.encoding=utf-16-le")
    comments = _comments(lines, written)
    lines = [line for line in lines[comments:] if line.strip()]
    if _columns(lines, written.separator) > 1:
        return comments
    lines = [line for line in lines if not line.startswith("#")]
    counts = {other: _columns(lines, other) for other in _SEPARATORS if other != written.separator}
    best = max(counts, key=counts.__getitem__)
    if counts[best] > 1:
        commas = best != "," and written.decimal == "." and any(re.search(r"\d,\d", line) for line in lines[1:])
        decimal = ", and the decimal comma by \"data.decimal=','\"" if commas else ""
        raise DataError(
            f"the columns of {path.name} seem to be separated by {best!r}, not by {written.separator!r}. Set it by "
            f'"data.separator={best!r}"{decimal} (with both quotes)'
        )
    return comments


def _comments(lines: list[str], written: TextFormat) -> int:
    """The number of lines that begin with # before the first that does not."""
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), 0)
    if count:
        last, *rows = (line.strip("\r\n").split(written.separator) for line in lines[count - 1 : count + 2])
        numbers = [any(is_number(cell, written) for cell in row) for row in rows]
        if len(last) == len(rows[0]) and numbers != [False, True]:  # which are a header and a row
            return count - 1
    return count


def _columns(lines: list[str], separator: str) -> int:
    """The number of columns, the same in each line; 0 if it is not."""
    numbers = {re.sub('"[^"]*"', "", line.strip(" \r\n")).count(separator) + 1 for line in lines}
    return numbers.pop() if len(numbers) == 1 else 0
