"""Tables as people and programs write them: what is read as it is, what by a setting, and what each refusal says to do."""

import bz2
import gzip

import numpy as np
import pytest
import torch

from divflow.data import DataError, Table
from divflow.data.table import read_table
from divflow.data.text_format import TextFormat

VALUES = np.random.default_rng(0).normal([3.0, -2000.0], [2.0, 1500.0], (40, 2)).round(3)


def text(number="{!r}", separator=",", header="a,b\n", change=lambda x: x):
    return header.replace(",", separator) + "".join(
        separator.join(change(number.format(x)) for x in row) + "\n" for row in VALUES.tolist()
    )


def german(number):
    return number.translate(str.maketrans(",.", ".,"))


def same(path, **settings):
    rows, names = read_table(path, None, TextFormat(**settings))
    np.testing.assert_array_equal(rows.numpy(), VALUES)
    assert names == ["a", "b"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_with_a_mark_are_read(tmp_path, encoding):
    (tmp_path / "t.csv").write_bytes(text().encode(encoding))
    same(tmp_path / "t.csv")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "latin-1"])
def test_encodings_without_a_mark_are_set(tmp_path, encoding):
    header = "a,b\n" if "16" in encoding else "größe,b\n"
    (tmp_path / "t.csv").write_bytes(text(header=header).encode(encoding))
    with pytest.raises(DataError, match=r"data\.encoding="):
        Table(tmp_path / "t.csv")
    rows, _ = read_table(tmp_path / "t.csv", None, TextFormat(encoding=encoding))
    np.testing.assert_array_equal(rows.numpy(), VALUES)


def test_a_letter_far_below_is_reported_too(tmp_path):
    (tmp_path / "t.csv").write_bytes((text(header="a,b\n") * 1 + "größe,1\n").encode("latin-1"))
    with pytest.raises(DataError, match=r"not encoded as.*data\.encoding=latin-1"):
        Table(tmp_path / "t.csv")


@pytest.mark.parametrize(("suffix", "pack"), [(".csv.gz", gzip.compress), (".csv.bz2", bz2.compress), (".CSV", bytes)])
def test_packed_files_and_capitals_are_read(tmp_path, suffix, pack):
    (tmp_path / f"t{suffix}").write_bytes(pack(text().encode()))
    same(tmp_path / f"t{suffix}")


def test_a_broken_packed_file(tmp_path):
    (tmp_path / "t.csv.gz").write_text(text())
    with pytest.raises(DataError, match="could not be read as"):
        Table(tmp_path / "t.csv.gz")


@pytest.mark.parametrize("kind", [">f8", ">f4", ">i4"])
def test_arrays_of_the_other_byte_order_are_read(tmp_path, kind):
    np.save(tmp_path / "t.npy", VALUES.astype(kind))
    rows, _ = read_table(tmp_path / "t.npy")
    np.testing.assert_array_equal(rows.numpy(), VALUES.astype(kind))


def test_decimal_commas(tmp_path):
    (tmp_path / "t.csv").write_text(text(separator=";", change=german))
    with pytest.raises(
        DataError, match=r"""separated by ';'.*"data\.separator=';'", and the decimal comma by "data\.decimal=','"""
    ):
        Table(tmp_path / "t.csv")
    with pytest.raises(DataError, match=r"""not numbers: a .*set "data\.decimal=','" """):
        Table(tmp_path / "t.csv", separator=";")
    same(tmp_path / "t.csv", separator=";", decimal=",")


def test_digits_in_groups(tmp_path):
    (tmp_path / "t.csv").write_text(text('"{:,.3f}"'))
    with pytest.raises(DataError, match=r"""not numbers: b .*set "data\.thousands=','" """):
        Table(tmp_path / "t.csv")
    same(tmp_path / "t.csv", thousands=",")
    (tmp_path / "t.csv").write_text(text("{:,.3f}", ";", change=german))
    same(tmp_path / "t.csv", separator=";", decimal=",", thousands=".")
    with pytest.raises(DataError, match=r"""not numbers: a.*set "data\.decimal=','" "data\.thousands='\.'" \("""):
        Table(tmp_path / "t.csv", separator=";", thousands=" ")


def test_groups_that_are_none_are_no_numbers(tmp_path):
    (tmp_path / "t.csv").write_text("a;b\n" + "1;2,5\n" * 30)
    with pytest.raises(DataError, match=r"not numbers: b .*'2,5'"):  # not 25
        Table(tmp_path / "t.csv", separator=";", thousands=",")


def test_a_first_row_of_decimal_commas_is_data(tmp_path):
    (tmp_path / "t.csv").write_text(text(separator=";", header="", change=german))
    rows, _ = read_table(tmp_path / "t.csv", None, TextFormat(separator=";", decimal=","))
    np.testing.assert_array_equal(rows.numpy(), VALUES)


def test_a_mark_among_numbers_is_what_is_named(tmp_path):
    (tmp_path / "t.csv").write_text(text() + "?,3\n1,2\n")
    with pytest.raises(
        DataError, match=r"'\?' among the numbers of column 'a', and 1 of its 42 .*row 40 \(counted from 0\)"
    ):
        Table(tmp_path / "t.csv")


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "t.csv").write_text(text() + "NA,3\n,2\n")
    with pytest.raises(
        DataError, match=r"2 of 42 rows are not finite: row 40, 41 .*column a\. Missing values.*data\.columns="
    ):
        Table(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("a,b\n" + "1.5,\n" * 30)
    with pytest.raises(DataError, match=r"no values in column 'b'"):
        Table(tmp_path / "t.csv")


def test_categories_are_reported_with_what_they_can_be(tmp_path):
    (tmp_path / "t.csv").write_text("a,kind\n" + "".join(f"{a},{'red' if a > 3 else 'blue'}\n" for a, _ in VALUES))
    with pytest.raises(DataError, match=r"such as '(red|blue)'\).*columns=\[a\].*2 here.*get_dummies.*data\.context="):
        Table(tmp_path / "t.csv")


@pytest.mark.parametrize("kind", ["csv", "npy"])
def test_no_rows(tmp_path, kind):
    (tmp_path / "t.csv").write_text("a,b\n")
    np.save(tmp_path / "t.npy", np.zeros((0, 2)))
    with pytest.raises(DataError, match=r"has the columns ., ., but no rows"):
        Table(tmp_path / f"t.{kind}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decimal": ",,"}, "decimal must be one character.*',,'"),
        ({"thousands": "5"}, "thousands must be one character.*'5'"),
        ({"decimal": ",", "thousands": ","}, "both are ','"),
        ({"encoding": "utf-9"}, "no encoding 'utf-9'"),
    ],
)
def test_settings_that_are_none(tmp_path, settings, message):
    (tmp_path / "t.csv").write_text(text())
    with pytest.raises(DataError, match=message):
        Table(tmp_path / "t.csv", **settings)


WARNED = {
    "index": (
        lambda n: {"": np.arange(n) + 7},
        r"column '' \(without a name\) of t\.csv counts its rows.*data\.columns=\[a,b\]",
    ),
    "shuffled index": (
        lambda n: {"": np.random.default_rng(0).permutation(3 * n)[:n]},
        r"column '' \(without a name\) of t\.csv counts its rows, as the index that pandas writes.*data\.columns=\[a,b\]",
    ),
    "shuffled, with a name": (
        lambda n: {"row": np.random.default_rng(0).permutation(n)},
        r"column row of t\.csv counts its rows.*data\.columns=\[a,b\]",
    ),
    "whole numbers": (lambda n: {"visits": np.arange(n) % 7}, r"column visits .*data\.discrete=\[visits\]"),
    "ids": (
        lambda n: {"id": [12345678901234567890 + 10_007 * i for i in range(n)]},
        r"column id .*more than the 15 digits.*\[a,b\]",
    ),
}


@pytest.mark.parametrize("kind", WARNED)
def test_what_is_probably_no_datum_is_warned_of(tmp_path, kind):
    make, message = WARNED[kind]
    ((name, column),) = make(len(VALUES)).items()
    lines = [f"{name},a,b"] + [f"{it},{a},{b}" for it, (a, b) in zip(column, VALUES, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match=message):
        Table(tmp_path / "t.csv")
    Table(tmp_path / "t.csv", columns=["a", "b"])  # without a word


def test_text_is_left_out_by_the_setting_of_that_name(tmp_path):
    (tmp_path / "t.csv").write_text("a,kind\n" + "".join(f"{i}.5,k{i}\n" for i in range(30)))
    with pytest.raises(DataError, match=r"not numbers: kind .*by data\.columns=\[a\]"):
        Table(tmp_path / "t.csv")


def test_repeated_rows_are_warned_of(tmp_path):
    (tmp_path / "t.csv").write_text(text() + "".join(text().splitlines(keepends=True)[1:4]))
    with pytest.warns(UserWarning, match=r"3 of the 43 rows of t\.csv repeat another"):
        Table(tmp_path / "t.csv")
    values = np.random.default_rng(1).normal(size=(200, 2)).tolist()
    (tmp_path / "t.csv").write_text("a,b\n" + "".join(f"{a},{b}\n" for a, b in [*values, values[0]]))
    Table(tmp_path / "t.csv")  # one of 201 is chance


def test_a_string_is_one_column(tmp_path):
    (tmp_path / "t.csv").write_text("h,w,hw\n" + "".join(f"{a},{b},{a * b}\n" for a, b in VALUES))
    data = Table(tmp_path / "t.csv", columns="hw", context="w")
    assert (data.columns, data.context_columns) == (["hw"], ["w"])
    torch.testing.assert_close(data.test.rows[:, 0], torch.from_numpy(VALUES.prod(axis=1))[data.test.numbers])
    np.save(tmp_path / "t.npy", VALUES)
    assert Table(tmp_path / "t.npy", columns=1).columns == ["1"]
    for wrong, message in ((3.5, "must be names of columns"), (["h", "h"], "each column once")):
        with pytest.raises(DataError, match=message):
            Table(tmp_path / "t.csv", columns=wrong)


@pytest.mark.parametrize(
    ("lines", "names", "count"),
    [
        (["# https://a.b/?c=1", "a,b"], ["a", "b"], 40),
        (["# one", "# two", "#three", "a,b"], ["a", "b"], 40),
        (["# in metres, above the sea", "a,b"], ["a", "b"], 40),
        (["# without a header"], ["f0", "f1"], 40),
        (["# a,b"], ["# a", "b"], 40),  # of numpy.savetxt
        (["# one", "# a,b"], ["# a", "b"], 40),
    ],
)
def test_lines_of_comments_come_before_the_table(tmp_path, lines, names, count):
    rows = text(header="")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n" + rows)
    found, of_columns = read_table(tmp_path / "t.csv")
    np.testing.assert_array_equal(found.numpy(), VALUES)
    assert of_columns == names


def test_names_behind_a_mark_of_a_table_with_text_are_no_comment(tmp_path):
    (tmp_path / "t.csv").write_text("#who,a\n" + "".join(f"name{i},{i}.5\n" for i in range(4)))
    rows, _ = read_table(tmp_path / "t.csv", ["a"])
    assert rows[:, 0].tolist() == [0.5, 1.5, 2.5, 3.5]


def test_another_separator_is_found_after_comments(tmp_path):
    (tmp_path / "t.csv").write_text("# a comment\n" + text(separator=";"))
    with pytest.raises(DataError, match="separated by ';'"):
        Table(tmp_path / "t.csv")
