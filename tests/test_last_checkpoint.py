"""last.ckpt is replaced whole or not at all."""

import errno

import pytest
import torch
from run import FAST, SMALL_TOY, config

from divflow.callbacks.atomic_files import WriteError
from divflow.runs.experiment import train
from divflow.saved.checkpoint import CheckpointError, read_checkpoint


def run(folder, *more):
    return train(config(*FAST, *SMALL_TOY, f"output_dir={folder}", "callbacks.last.every_n_steps=2", *more))


def test_a_full_disk_leaves_the_checkpoint_of_before(tmp_path, monkeypatch):
    run(tmp_path)
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = last.read_bytes()

    def full(value, file, *args, **kwargs):
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        WriteError, match=r"could not be written \(No space left on device\); the previous file is kept"
    ):
        run(tmp_path, f"ckpt_path={last}", "trainer.max_steps=8", "task.scheduler.T_max=4")
    assert last.read_bytes() == before
    assert not list(last.parent.glob("*.part"))


def test_a_checkpoint_that_cannot_be_read_points_to_the_other(tmp_path):
    run(tmp_path)
    last, best = (tmp_path / "checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{last} is not a checkpoint.*beside it is {best}"):
        read_checkpoint(last)
