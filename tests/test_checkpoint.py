"""Loading runs no code from the file and builds only what is allowed."""

import pickle
import sys
import types

import pytest
import torch

import divflow
from divflow.runs.settings import check_paths
from divflow.saved.build import ConfigError
from divflow.saved.checkpoint import CheckpointError, check_targets, named_classes


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


def test_a_folder_in_place_of_a_checkpoint(tmp_path):
    """By either door its checkpoints are named, those of several runs shortly."""
    with pytest.raises(CheckpointError, match=f"^{tmp_path} is a folder, without any checkpoint"):
        divflow.load(tmp_path)
    for number in range(3):
        folder = tmp_path / str(number) / "checkpoints"
        folder.mkdir(parents=True)
        for name in ("best", "last"):
            (folder / f"{name}.ckpt").touch()
    with pytest.raises(
        CheckpointError, match=r"is a folder; its checkpoints are checkpoints/best\.ckpt, checkpoints/last\.ckpt\. N"
    ):
        divflow.load(tmp_path / "0")
    said = r"1/checkpoints/best\.ckpt, .* and 1 more\. Name one of them, such as " + f"{tmp_path}/0/checkpoints/best"
    with pytest.raises(CheckpointError, match=said):
        divflow.load(tmp_path)
    for name in ("ckpt_path", "init_from"):
        with pytest.raises(
            ConfigError, match=f"^{name}={tmp_path}/0 is a folder; its checkpoints are checkpoints/best"
        ):
            check_paths({name: f"{tmp_path}/0"})


def test_why_a_file_is_no_checkpoint_is_said_without_advice_to_run_it(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    torch.save({"divflow": Attack()}, tmp_path / "evil.ckpt")
    for name, why in (("rows.csv", "torch.save did not write it"), ("evil.ckpt", "it holds objects of other classes")):
        with pytest.raises(CheckpointError, match=f"plain tensors and values: {why}") as refused:
            divflow.load(tmp_path / name)
        assert "weights_only" not in str(refused.value)
        assert "trust" not in str(refused.value)


def test_classes_that_are_allowed_may_be_named(tmp_path, monkeypatch):
    (tmp_path / "mine_allowed.py").write_text("class Net: ...\n\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    for given in (["mine_allowed.Net"], "mine_allowed.Net"):
        (cls,) = named_classes(given).values()
        assert (cls.__module__, cls.__name__) == ("mine_allowed", "Net")
    assert named_classes([cls]) == named_classes(cls) == {"mine_allowed.Net": cls}
    for given, message in (
        (sys.modules["mine_allowed"], "allow takes classes, such as .*given the module mine_allowed"),
        (["mine_allowed.number"], "is given 3. Give the class itself"),
        (["mine_allowed.Nett"], r"allow=mine_allowed.Nett can't be found: .*did you mean Net\?"),
    ):
        with pytest.raises(ConfigError, match=message):
            named_classes(given)


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
