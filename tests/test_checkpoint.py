"""Loading runs no code from the file and builds only what is allowed."""

import pickle
import sys
import types

import pytest
import torch

import divflow
from divflow.saved.checkpoint import CheckpointError, check_targets


class Attack:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({"divflow": Attack()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="plain tensors"):
        divflow.load(tmp_path / "evil.ckpt")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match="plain tensors"):
        divflow.load(tmp_path / "raw.ckpt")


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"a,b\n1,2\n", b"Gap\n", b"\xff", b"PK\x03\x04"], ids=repr
)
def test_files_that_are_no_checkpoints(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.ckpt is not a checkpoint"):
        divflow.load(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        divflow.load(tmp_path / "missing.ckpt")


def test_checkpoints_of_others(tmp_path):
    torch.save({"state_dict": {}, "global_step": 3}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="no description of a density"):
        divflow.load(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.load",
        "torch.hub.load",
        "torch.nn.init.os.system",
        "torch.nn.functional.relu",
        "torch.nn.modules.module.warnings.warn",
        "divflow.saved.checkpoint.importlib.import_module",
        "divflow.saved.checkpoint.load",
        "divflow.nowhere.Thing",
        "hydra.utils.get_method",
        "mymodule.Net",
        None,
        3,
    ],
)
def test_other_targets_are_refused_wherever_they_stand(target):
    for config in ({"_target_": target}, {"network": {"hidden": [1, {"_target_": target}]}}):
        with pytest.raises(CheckpointError, match="neither a class of divflow"):
            check_targets(config, {})


def test_interpolations_are_refused():
    with pytest.raises(CheckpointError, match="interpolation"):
        check_targets({"a": "${oc.env:HOME}"}, {})


def test_allowed_targets():
    check_targets(
        {
            "network": {
                "_target_": "divflow.networks.MLP",
                "activation": {"_target_": "torch.nn.SiLU", "_partial_": True},
            },
            "estimator": {"_target_": "divflow.divergence.Exact"},
        },
        {},
    )
    check_targets({"_target_": "mymodule.Net"}, {"mymodule.Net": object})


def test_all_classes_that_are_lacking_are_named_at_once(monkeypatch):
    config = {
        "network": {"_target_": "mine.Net", "activation": {"_target_": "mine.Act"}},
        "base": {"_target_": "mine.Base"},
    }
    with pytest.raises(
        CheckpointError, match=r"'mine.Net' \(at divflow.network\).*allow=\[mine.Net, mine.Act, mine.Base\]"
    ):
        check_targets(config, {})
    with pytest.raises(CheckpointError, match=r"allow=\[mine.Act\]"):
        check_targets(config, {"mine.Net": object, "mine.Base": object})
    # A class has a home, and may be named by a module that has it, too, if that is there.
    package = types.ModuleType("mine")
    package.Net = Net
    home = {f"{Net.__module__}.{Net.__qualname__}": Net}
    with pytest.raises(CheckpointError, match="mine.Net"):
        check_targets({"_target_": "mine.Net"}, home)
    monkeypatch.setitem(sys.modules, "mine", package)
    check_targets({"_target_": "mine.Net"}, home)


class Net:
    """A class of a user's own."""
