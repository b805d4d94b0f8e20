"""The average of the weights: its decay, which warms up, and what a short run is evaluated by."""

import functools

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from divflow.callbacks import WeightAverage


class Counting(L.LightningModule):
    """A weight that is the number of steps."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return -self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def averaged(tmp_path, steps, **settings):
    callback, module = WeightAverage(**settings), Counting()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet)
    trainer.fit(module, DataLoader(torch.zeros(steps, 1)))
    return module.weight.item()


def expected(steps, decay):
    # The first update copies the weights.
    follow = lambda average, n: decay(n) * average + (1 - decay(n)) * (n + 1)  # noqa: E731
    return functools.reduce(follow, range(1, steps), 1.0)


@pytest.mark.parametrize("decay", [0.99, 0.3])
def test_the_decay_warms_up(tmp_path, decay):
    warm = expected(30, lambda n: min(decay, (1 + n) / (10 + n)))
    np.testing.assert_allclose(averaged(tmp_path, 30, decay=decay, use_buffers=False), warm, rtol=1e-6)
    cold = averaged(tmp_path, 30, decay=decay, warm_up=False, use_buffers=False)
    np.testing.assert_allclose(cold, expected(30, lambda n: decay), rtol=1e-6)


def test_training_leaves_what_it_is_asked_to(tmp_path):
    assert averaged(tmp_path, 30, leaves="current", use_buffers=False) == 30
    assert 25 < averaged(tmp_path, 30, use_buffers=False) < 30
