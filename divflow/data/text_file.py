"""Columns of a text file as numbers, with advice for those that are not."""

import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from divflow.data.module import DataError, listed
from divflow.data.text_format import TextFormat, apparent_format, check_apparent, is_number

__all__ = ["check_numbers", "is_numeric", "read_text"]

_FEW_KINDS = 20


def read_text(path: Path, written: TextFormat) -> pa.Table:
    """Read a `.csv` with or without a header, after lines that begin with #; a first row that holds only numbers is data.

    Raises:
        DataError: the file seems to have another format.
        ArrowException: it can't be read.
    """
    written = apparent_format(path, written)
    comments = check_apparent(path, written)
    parsing = pa.csv.ParseOptions(delimiter=written.separator)
    converting = pa.csv.ConvertOptions(decimal_point=written.decimal)

    def read(**options: bool) -> pa.Table:
        reading = pa.csv.ReadOptions(encoding=written.encoding, skip_rows=comments, **options)
        table = pa.csv.read_csv(path, reading, parsing, converting)
        return table if written.thousands is None else _ungrouped(table, written)

    table = read()
    names = table.column_names
    if not all(is_number(name, written) for name in names):
        return table
    if len(names) > 1 and names == [str(i) for i in range(len(names))]:
        warnings.warn(
            f"the first row of {path.name}, {listed(names)}, is read as data, because it holds only numbers. If it is the header "
            "that pandas gives to columns without names, rename them, or write the file by to_csv(header=False)",
            stacklevel=5,
        )
    return read(autogenerate_column_names=True)


def _ungrouped(table: pa.Table, written: TextFormat) -> pa.Table:
    """Convert columns of text that are numbers with grouped digits."""
    for i, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if not pa.types.is_string(column.type) or not pc.all(_match(column, written.number)).as_py():
            continue
        plain = pc.replace_substring(pc.utf8_trim_whitespace(column), written.thousands, "")
        plain = pc.replace_substring(plain, written.decimal, ".")
        table = table.set_column(i, name, pc.cast(pc.replace_substring_regex(plain, r"^\+", ""), pa.float64()))
    return table


def _match(column: pa.ChunkedArray, pattern: str) -> pa.ChunkedArray:
    return pc.match_substring_regex(column, pattern)


def is_numeric(kind: pa.DataType) -> bool:
    """Whether columns of this type are numbers."""
    types = pa.types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)


def check_numbers(table: pa.Table, file: str, written: TextFormat) -> None:
    """Refuse columns that are not numbers.

    Raises:
        DataError: naming the columns, or the rows that are not numbers, and what to do.
    """
    columns = zip(table.column_names, table.columns, strict=True)
    others = {name: column for name, column in columns if not is_numeric(column.type) and len(column)}
    if not others:
        return
    texts = []
    for name, column in others.items():
        if pa.types.is_binary(column.type):
            raise DataError(
                f"{file} is not encoded as UTF-8. Set its encoding, such as data.encoding=latin-1, or utf-16"
            )
        if pa.types.is_null(column.type):
            raise DataError(f"{file} has no values in column {name!r}. Leave it out, by data.columns=[...]")
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            _check_marks(name, column, file, written)
            texts.append(column)
    rest = ",".join(name for name in table.column_names if name not in others) or "..."
    described = [f"{name} ({column.type}, such as {column[0].as_py()!r})" for name, column in others.items()]
    raise DataError(
        f"{file} has columns that are not numbers: {listed(described)}. Leave them out, by data.columns=[{rest}], or encode them"
        f"{_remedy(texts, written)}"
    )


def _check_marks(name: str, column: pa.ChunkedArray, file: str, written: TextFormat) -> None:
    """Refuse a column of numbers that has a few other values, such as '?' for a missing one."""
    numbers = pc.or_(_match(column, written.number), _match(column, r"^\s*$|^(NA|N/A|#N/A|NaN|nan|null|NULL|-?inf)$"))
    others = pc.indices_nonzero(pc.invert(numbers)).to_pylist()
    if not others or len(others) > len(column) / 2:
        return
    rows = f"{', '.join(map(str, others[:10]))}{', ...' if len(others) > 10 else ''}"
    raise DataError(
        f"{file} has {column[others[0]].as_py()!r} among the numbers of column {name!r}, and {len(others)} of its {len(column)} rows "
        f"are not numbers: row {rows} (counted from 0). Drop these rows, write numbers there, or leave the column out, by "
        "data.columns=[...]"
    )


def _remedy(columns: list[pa.ChunkedArray], written: TextFormat) -> str:
    """Advice for columns of text: numbers in another format, the same for all if there is one, or categories."""
    if not columns:
        return ""
    fitting: list[set[str]] = []
    for column in columns:
        filled = column.filter(pc.invert(_match(column, r"^\s*$")))
        fitting.append(
            {way for way, it in _other_formats(written).items() if pc.all(_match(filled, it.number)).as_py()}
        )
    ways = set.intersection(*fitting) or set.union(*fitting)
    if ways:
        shown = [way for way in _other_formats(written) if way in ways]
        return f". If they are numbers in another format, set {' or '.join(shown[:2])} (with both quotes)"
    kinds = max(pc.count_distinct(column).as_py() for column in columns)
    if kinds > min(_FEW_KINDS, len(columns[0]) / 2):
        return ""
    return (
        f". Categories ({kinds} here) become columns of 0 and 1 by pandas.get_dummies; for a density conditional on them, use "
        "data.context=[...]"
    )


def _other_formats(written: TextFormat) -> dict[str, TextFormat]:
    """Other formats of numbers, by the settings that choose them on a command line."""
    ways = {}
    for decimal, thousands in ((",", None), (".", ","), (",", "."), (".", " "), (",", " "), (".", "'")):
        settings = [f"\"data.decimal='{decimal}'\""] if decimal != written.decimal else []
        settings += [f'"data.thousands={thousands!r}"'] if thousands is not None else []
        ways[" ".join(settings)] = TextFormat(written.separator, decimal, thousands)
    return {settings: way for settings, way in ways.items() if settings}
