"""Figures show what they say, and take no more than their share of the time."""

import time

import numpy as np
import pytest
import torch
from matplotlib.patches import Polygon
from run import FAST, SMALL_TOY, config

from divflow.callbacks import Figures
from divflow.callbacks.plots import plot_curves, plot_pairs
from divflow.runs.experiment import train


def test_pairs_name_the_columns_that_are_left_out():
    data, samples = torch.randn(40, 8), torch.randn(500, 8)
    figure = plot_pairs(data, samples, list("abcdefgh"))
    assert len(figure.axes) == 36
    assert "not shown: g, h" in figure.get_suptitle()
    offsets = [figure.axes[i].collections[0].get_offsets() for i in (1, 6)]  # above and below the diagonal
    assert [len(points) for points in offsets] == [500, 40]
    np.testing.assert_allclose(offsets[0], samples[:, [1, 0]])
    np.testing.assert_allclose(offsets[1], data[:, [0, 1]])
    assert "not shown" not in plot_pairs(data[:, :3], samples[:, :3], "abc").get_suptitle()


def test_bins_suit_the_number_of_rows():
    def bins(rows):
        axis = plot_pairs(torch.randn(rows, 1), torch.randn(10, 1), "a").axes[0]
        return len(axis.patches) - 1  # the samples' outline is one

    torch.manual_seed(0)
    assert 4 <= bins(40) <= 15
    assert 20 <= bins(2_000) <= 60


def test_a_constant_column_is_drawn():
    assert plot_pairs(torch.ones(10, 2), torch.randn(10, 2), "ab").axes


def test_the_curve_marks_the_best_step(tmp_path):
    table = tmp_path / "metrics.csv"
    table.write_text("step,train/nll,val/nll\n9,3.0,\n19,,2.5\n39,,1.5\n59,1.0,2.0\n")
    axis = plot_curves({"": table}).axes[0]
    star = next(line for line in axis.lines if line.get_marker() == "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (40, 1.5)
    assert any("step 40" in text.get_text() for text in axis.get_legend().get_texts())
    table.write_text("step,train/nll,val/nll\n")
    assert plot_curves({"": table}) is None


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_figures_take_no_more_than_their_share(tmp_path, monkeypatch, share):
    """On a clock of which each look takes a second and each figure ten."""
    now = 0.0

    def clock():
        nonlocal now
        now += 1.0
        return now

    def draw(self, trainer, task, name):
        nonlocal now
        drawn.append(name)
        now += 10.0 * name.startswith("step")

    drawn = []
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(Figures, "_save", draw)
    own = ["callbacks.figures.every_n_steps=1", f"callbacks.figures.share={share}", "trainer.max_steps=60"]
    fast = [override for override in FAST if not override.startswith(("trainer", "callbacks.figures"))]
    train(config(*fast, *SMALL_TOY, *own, "trainer.val_check_interval=60", f"output_dir={tmp_path}"))
    taken = 10.0 * (len(drawn) - 1)
    assert drawn[-1] == "final"
    assert taken <= share * now
    assert (taken > 0) == (share > 0)


def test_samples_outside_of_the_data_are_missing_from_the_histogram():
    data = torch.linspace(0, 1, 101)[:, None]
    samples = torch.cat([data[1:-1], torch.full((99, 1), 50.0)])
    for given, inside in ((samples, 0.5), (torch.full((3, 1), 50.0), 0.0)):
        axis = plot_pairs(data, given, "a").axes[0]
        (outline,) = [patch for patch in axis.patches if isinstance(patch, Polygon)]
        x, y = outline.get_xy().T
        area = abs((np.roll(x, -1) - x) @ (np.roll(y, -1) + y)) / 2
        assert area == pytest.approx(inside, abs=0.02)
