import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from run import FAST, config
from scipy.stats import kstest

import divflow
from divflow.data import DataError, Table
from divflow.data.columns import Columns
from divflow.data.table import read_table
from divflow.runs.experiment import train

VALUES = np.random.default_rng(0).normal([3.0, -2.0], [2.0, 0.5], (100, 2))


def write(folder, kind, values=VALUES, columns=("a", "b")):
    path, frame = folder / f"data.{kind}", pd.DataFrame(values, columns=list(columns))
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        np.save(path, values)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet", "npy"])
def test_reads_standardizes_and_splits_by_seed(tmp_path, kind):
    data = Table(write(tmp_path, kind))
    rows = torch.cat([data.train.rows, data.val.rows, data.test.rows])
    assert [len(split.rows) for split in (data.train, data.val, data.test)] == [80, 10, 10]
    np.testing.assert_allclose(np.sort(rows.numpy(), axis=0), np.sort(VALUES, axis=0))
    y, log_det = data.transform(data.train.rows)
    torch.testing.assert_close(y.mean(dim=0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(y.std(dim=0), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(log_det, -data.train.rows.std(dim=0).log().sum().expand(80))
    same, other = Table(tmp_path / f"data.{kind}"), Table(tmp_path / f"data.{kind}", seed=1)
    assert torch.equal(same.test.rows, data.test.rows)
    assert not torch.equal(other.test.rows, data.test.rows)


def test_chosen_columns_and_integers(tmp_path):
    frame = pd.DataFrame({"name": "x", "n": [i**3 for i in range(50)], "y": np.linspace(0, 1, 50) ** 2})
    frame.to_csv(tmp_path / "t.csv", index=False)
    data = Table(tmp_path / "t.csv", columns=["y", "n"])
    assert data.columns == ["y", "n"]
    assert data.event_shape == (2,)
    assert data.train.rows[:, 1].max() > 1


def test_a_csv_without_a_header_keeps_its_first_row(tmp_path):
    pd.DataFrame(VALUES).to_csv(tmp_path / "t.csv", index=False, header=False)
    data = Table(tmp_path / "t.csv")
    assert sum(len(split.rows) for split in (data.train, data.val, data.test)) == 100
    pd.DataFrame(VALUES).to_csv(tmp_path / "t.csv", index=False)
    with pytest.warns(UserWarning, match=r"first row of t\.csv, 0, 1, is read as data.*header=False"):
        Table(tmp_path / "t.csv")


def bad(values=VALUES, **changes):
    frame = pd.DataFrame(values, columns=["a", "b"])
    return frame.assign(**changes)


BAD = {
    "NaN": (
        bad(a=[np.nan if i in (3, 7) else i for i in range(100)]),
        "2 of 100 rows are not finite: row 3, 7 .*column a",
    ),
    "infinite": (bad(b=[np.inf if i > 80 else i for i in range(100)]), "19 of 100 rows.*81, 82, .*, [.]{3}"),
    "text": (bad(b="red"), r"not numbers: b \(.*string, such as 'red'\).*columns="),
    "constant": (bad(b=3.0), "column b is constant"),
    "few rows": (bad()[:10], r"10 rows are too few.*\(8, 1 and 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_tables_name_what_is_wrong(tmp_path, kind):
    frame, message = BAD[kind]
    frame.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=message):
        Table(tmp_path / "t.csv")


def test_bad_files(tmp_path):
    path = write(tmp_path, "csv")
    with pytest.raises(DataError, match="no column c. Choose from a, b"):
        Table(path, columns=["a", "c"])
    with pytest.raises(DataError, match="no file"):
        Table(tmp_path / "nowhere.csv")
    (tmp_path / "t.txt").write_text("1")
    with pytest.raises(DataError, match=r"\.csv.*'\.txt'"):
        Table(tmp_path / "t.txt")
    for kind in ("csv", "parquet", "npy"):
        (tmp_path / f"broken.{kind}").write_bytes(b"")
        with pytest.raises(DataError, match="could not be read"):
            Table(tmp_path / f"broken.{kind}")
    np.save(tmp_path / "cube.npy", np.zeros((3, 3, 3)))
    with pytest.raises(DataError, match=r"\(3, 3, 3\)"):
        Table(tmp_path / "cube.npy")
    with open(tmp_path / "several.npy", "wb") as file:
        np.savez(file, a=VALUES)
    with pytest.raises(DataError, match=r"several\.npy holds several arrays"):
        Table(tmp_path / "several.npy")
    (tmp_path / "twice.csv").write_text("a,b,a\n" + "1,2,3\n" * 30)
    for columns in (None, ["a"]):
        with pytest.raises(DataError, match=r"columns of the same name: a, b, a\. Rename"):
            Table(tmp_path / "twice.csv", columns=columns)
    np.save(tmp_path / "objects.npy", np.array([[object()]]), allow_pickle=True)
    with pytest.raises(DataError, match="could not be read"):
        Table(tmp_path / "objects.npy")


def test_booleans_are_taken_as_zero_and_one(tmp_path):
    kinds = {
        "csv": lambda frame, path: frame.to_csv(path, index=False),
        "parquet": lambda frame, path: frame.to_parquet(path),
    }
    for kind, save in kinds.items():
        save(bad(flag=np.arange(100) % 3 == 0), tmp_path / f"t.{kind}")
        rows, names = read_table(tmp_path / f"t.{kind}")
        assert names == ["a", "b", "flag"]
        assert torch.equal(rows[:, 2], (torch.arange(100) % 3 == 0).double())


@pytest.mark.parametrize("separator", [";", "\t", "|", " "])
def test_a_separator_is_taken_and_a_missing_one_is_reported(tmp_path, separator):
    bad().to_csv(tmp_path / "t.csv", index=False, sep=separator)
    given = "\\t" if separator == "\t" else separator  # as on a command line
    data = Table(tmp_path / "t.csv", separator=given)
    assert data.columns == ["a", "b"]
    with pytest.raises(DataError, match=re.escape(f"seem to be separated by {separator!r}, not by ','")):
        Table(tmp_path / "t.csv")


def test_commas_within_quotes_separate_nothing(tmp_path):
    (tmp_path / "t.csv").write_text('"a, in cm";"b, in kg"\n' + "".join(f"{a};{b}\n" for a, b in VALUES))
    assert Table(tmp_path / "t.csv", separator=";").columns == ["a, in cm", "b, in kg"]
    with pytest.raises(DataError, match="seem to be separated by ';'"):
        Table(tmp_path / "t.csv")


def test_separators_that_are_none_are_refused(tmp_path):
    path = write(tmp_path, "csv")
    for separator in ("", ";;", '"'):
        with pytest.raises(DataError, match="separator must be one character"):
            Table(path, separator=separator)
    with pytest.raises(DataError, match="data.npy is none"):
        Table(write(tmp_path, "npy"), separator=";")


def test_columns_that_are_linear_functions_of_others_are_warned_of(tmp_path):
    frame = bad()
    frame["sum"] = 2 * frame.a - 3 * frame.b + 1
    frame["c"] = np.random.default_rng(1).normal(size=100)
    frame.to_csv(tmp_path / "t.csv", index=False)
    with pytest.warns(UserWarning, match=r"linear functions of others.*: sum \(of a, b\)\. .*columns=\[a,b,c\]"):
        Table(tmp_path / "t.csv")
    Table(tmp_path / "t.csv", columns=["a", "b", "c"])
    frame["sum"] += 1e-3 * np.random.default_rng(2).normal(size=100)  # nearly is not
    frame.to_csv(tmp_path / "t.csv", index=False)
    Table(tmp_path / "t.csv")


def test_a_whole_one_hot_code_is_warned_of(tmp_path):
    kind = np.arange(100) % 3
    bad(red=kind == 0, green=kind == 1, blue=kind == 2).to_csv(tmp_path / "t.csv", index=False)
    with (
        pytest.warns(UserWarning, match=r"blue \(of red, green\).*columns=\[a,b,red,green\]"),
        pytest.warns(UserWarning, match=r"red, green, blue of t\.csv repeats whole numbers"),
    ):
        Table(tmp_path / "t.csv")


def test_bounded_columns_become_those_of_the_whole_line(tmp_path):
    values = np.random.default_rng(0).uniform([-2.0, 0.0, -1.0], [5.0, 1.0, 1.0], (2_000, 3))
    values[:, 1] = np.exp(values[:, 2])
    path = write(tmp_path, "csv", values, ("u", "positive", "free"))
    data = Table(path, bounds={"positive": [0, None], "u": [-2, 5]})
    y, log_det = data.transform(data.train.rows)
    shape = y[:, 0] * math.pi / math.sqrt(3)
    assert kstest(shape.numpy(), "logistic").pvalue > 1e-3
    torch.testing.assert_close(y[:, 1], y[:, 2])  # log exp
    torch.testing.assert_close(data.transform.inverse(y), data.train.rows)
    slopes = torch.autograd.functional.jacobian(lambda x: data.transform(x)[0].sum(dim=0), data.train.rows)
    torch.testing.assert_close(log_det, slopes.diagonal(dim1=0, dim2=2).log().sum(dim=1))
    assert Table(path, bounds={}).transform.config() == Table(path).transform.config()


def test_columns_of_an_array_are_bounded_by_number(tmp_path):
    path = write(tmp_path, "npy", np.random.default_rng(0).random((50, 2)))
    bounded = Table(path, bounds={1: [0, 1]}).transform.config()["parts"][0]
    assert (bounded["low"], bounded["high"]) == ([None, 0.0], [None, 1.0])


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"c": [0, 1]}, r"bounds are given for column c, but the columns are a, b"),
        ({"a": [-100, 3]}, r"column a has .* in \d+ of 100 rows at or beyond its bounds \[-100, 3\]"),
        ({"a": [VALUES[:, 0].min(), None]}, r"in 1 of 100 rows at or beyond"),
        ({"a": [3, 3]}, r"bounds of column a must be \[low, high\].*\[3, 3\]"),
        ({"a": [3]}, r"must be \[low, high\].*\[3\]"),
        ({"a": 3}, r"must be \[low, high\].*but are 3"),
        ({"a": ["low", 3]}, r"must be \[low, high\].*'low'"),
        ({"a": [float("nan"), 3]}, r"must be \[low, high\].*nan"),
    ],
)
def test_bounds_that_are_none_or_of_other_columns(tmp_path, bounds, message):
    with pytest.raises(DataError, match=message):
        Table(write(tmp_path, "csv"), bounds=bounds)


def test_a_flow_of_bounded_columns_stays_within(tmp_path):
    """Its density integrates to one over the box, and is zero beyond."""
    path = write(tmp_path, "csv", np.random.default_rng(0).random((400, 2)))
    bounds = "data.bounds={a:[0,1],b:[0,1.5]}"
    train(config("data=table", f"data.path={path}", bounds, *FAST, f"output_dir={tmp_path / 'run'}"))
    density = divflow.load(tmp_path / "run" / "checkpoints" / "best.ckpt")
    samples = density.sample(1_000)
    assert ((samples > 0) & (samples < torch.tensor([1.0, 1.5]))).all()
    centres = (torch.arange(120) + 0.5) / 120
    grid = torch.cartesian_prod(centres, 1.5 * centres)
    with torch.no_grad():
        assert density.log_prob(grid).exp().mean() * 1.5 == pytest.approx(1, abs=0.01)
        assert density.log_prob(torch.tensor([[0.5, 1.6]])).isneginf()


@pytest.mark.parametrize(
    "rows",
    [torch.arange(40).view(20, 2), torch.rand(20), torch.ones(20, 2, dtype=torch.complex128), torch.rand(20, 2, 1)],
    ids=lambda rows: f"{rows.dtype} {tuple(rows.shape)}",
)
def test_rows_that_are_none(rows):
    with pytest.raises(DataError, match=r"rows must be a floating-point tensor \(n, 2\), but are torch\."):
        Columns(rows, ["a", "b"])


@pytest.mark.parametrize("scale", [1e-300, 1e200, 1e300])
def test_columns_of_any_scale_are_standardized(scale):
    """Whose squares are beyond float64, or nothing."""
    rows = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, scaled = (
        Columns(rows, ["a", "b"]),
        Columns(rows * torch.tensor([1.0, scale], dtype=torch.float64), ["a", "b"]),
    )
    y, log_det = scaled.transform(scaled.train.rows)
    torch.testing.assert_close(y, plain.transform(plain.train.rows)[0])
    torch.testing.assert_close(log_det + math.log(scale), plain.transform(plain.train.rows)[1])


@pytest.mark.parametrize("value", [1e300, 1e25])
@pytest.mark.parametrize("row", range(0, 100, 9))
def test_one_value_that_hides_all_others_is_refused(value, row):
    rows = torch.from_numpy(VALUES.copy())
    rows[row, 1] = value
    with pytest.raises(DataError, match=rf"column b has 1e\+{math.log10(value):.0f} in row {row} \(counted from 0\)"):
        Columns(rows, ["a", "b"])
