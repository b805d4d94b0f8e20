"""Every block of docs/works_with.md runs with the partner that it is about, and what it promises holds."""

import functools
import os
import subprocess
import sys

import joblib
import pytest
import torch
from documents import run_blocks, sections
from run import DRAWN, FAST, ROOT, SMALL_TOY, config, run_here

import divflow
from divflow.divergence import Exact, FieldError, Hutchinson, divergence
from divflow.flow import ContinuousFlow
from divflow.runs.experiment import train

SECTIONS = sections(ROOT / "docs" / "works_with.md")
NEEDED = {
    "Pyro": "pyro",
    "zuko": "zuko",
    "schedulefree": "schedulefree",
    "Optuna": "optuna",
    "accelerate": "accelerate",
}
TESTED_HERE = {*NEEDED, "torch.func", "torch.compile", "Lightning", "Weight averages", "joblib", "W&B and TensorBoard"}
SMALL = [*FAST, *SMALL_TOY, "network=mlp", "times=uniform"]


def section(title):
    if title in NEEDED:
        pytest.importorskip(NEEDED[title], reason="of the extra partners or peers, which .ci/run installs")
    return run_blocks(SECTIONS[title], "works_with")


def test_every_section_is_tested():
    assert set(SECTIONS) == TESTED_HERE


def close(found, expected, **tolerances):
    torch.testing.assert_close(found, expected, **tolerances)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_pyro(without_validation):
    names = section("Pyro")
    assert names["mcmc"].get_samples()["z"].shape == (3, 2)
    assert names["losses"][-1] < names["losses"][0]
    loss = names["svi"].evaluate_loss(names["data"])
    assert loss == pytest.approx(-names["flow"].log_prob(names["data"]).sum().item(), rel=1e-4)


@pytest.mark.slow
def test_zuko(without_validation):
    names = section("zuko")
    zuko, x, flow, trained = (names[name] for name in ("zuko", "x", "flow", "trained"))
    close(flow.base.log_prob(x), trained().log_prob(x))
    assert all(p.grad is not None for p in (*names["nsf"].transform.parameters(), *names["velocity"].parameters()))
    moved = ContinuousFlow(names["velocity"], 2, base=trained()).double()
    close(moved.log_prob(x.double()).float(), names["log_prob"], rtol=0, atol=1e-3)
    assert any("hyper" in key for key in flow.base.state_dict())
    with pytest.raises(divflow.errors.DivflowError, match="require grad"):
        ContinuousFlow(names["velocity"], 2, base=names["nsf"]())
    for normalize, norm in ((True, zuko.nn.LayerNorm), (False, None)):
        net = zuko.nn.MLP(6, 6, hidden_features=(16,), activation=torch.nn.ELU, normalize=normalize)
        assert norm is None or any(isinstance(layer, norm) for layer in net)
        assert Exact().explain(lambda t, z, net=net: net(z), 0.0, torch.randn(4, 6)).method == "layered"


def test_torch_func():
    names = section("torch.func")
    close(names["of_samples"], divergence(names["net"], 0.5, names["x"]))
    close(names["ensemble"], torch.stack([divergence(net, 0.5, names["x"]) for net in names["nets"]]))
    of_all = torch.autograd.grad(
        divergence(names["net"], 0.5, names["x"]).square().sum(), names["net"].layers[0].weight
    )
    close(names["of_each_sample"]["layers.0.weight"].sum(dim=0), of_all[0])
    x, net = names["x"].clone().requires_grad_(), names["net"]
    adaptive = ContinuousFlow(net, 2)
    close(names["slope"], torch.autograd.grad(names["flow"].log_prob(x).sum(), x)[0])
    for refused in (
        lambda: torch.vmap(lambda row: names["flow"].log_prob(row[None])[0])(x),
        lambda: torch.func.grad(lambda z: adaptive.log_prob(z).sum())(x),
        lambda: torch.vmap(lambda row: divergence(net, 0.5, row[None], Hutchinson())[0])(x),
        lambda: torch.func.linearize(lambda z: divergence(net, 0.5, z), x),
    ):
        with pytest.raises(FieldError):
            refused()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_compile(monkeypatch):
    """Without the compiler's back end, which takes a minute."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    names = section("torch.compile")
    close(names["loss"], divergence(names["net"], 0.5, 2 * names["x"]).square().mean())
    plain = names["Net"]()
    plain.load_state_dict(names["compiled"].state_dict())
    close(names["log_prob"], ContinuousFlow(plain, 2).log_prob(names["x"]), rtol=0, atol=1e-4)


def test_a_lightning_module_of_ones_own():
    names = section("Lightning")
    assert torch.isfinite(names["trainer"].callback_metrics["val/nll"])


def test_schedulefree():
    names = section("schedulefree")
    names["optimizer"].train()
    assert not torch.allclose(names["flow"].log_prob(names["x"]), names["log_prob"])


def test_weight_averages():
    names = section("Weight averages")
    assert not torch.allclose(names["flow"].log_prob(names["x"]), names["log_prob"])


@pytest.mark.slow
def test_optuna(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("divflow.cli.main", lambda words: run_here(*words[1:], *SMALL))
    names = section("Optuna")
    assert len(names["study"].trials) == len(names["runs"].trials) == 2
    losses = [trial.value for trial in names["runs"].trials]
    assert losses[0] != losses[1]
    assert all((tmp_path / "study" / str(i) / "config.yaml").is_file() for i in range(2))


@pytest.mark.slow
def test_joblib(tmp_path, monkeypatch):
    """In processes, and in threads."""
    train(config(*FAST, *SMALL_TOY, f"output_dir={tmp_path}/outputs/latest"))
    monkeypatch.chdir(tmp_path)
    for backend in ("loky", "threading"):
        with joblib.parallel_config(backend):
            names = section("joblib")
        close(names["log_prob"], names["density"].log_prob(names["x"]), rtol=0, atol=1e-5)


def test_a_run_of_wandb_ends_with_a_run(monkeypatch):
    """The next one of a sweep begins another; one that was there before goes on."""
    from divflow.runs.loggers import own_wandb_run

    class Run:
        def finish(self, exit_code):
            self.exit_code, wandb.run = exit_code, None

    wandb = type(sys)("wandb")
    wandb.run = None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for error, code in ((None, 0), (RuntimeError, 1)):
        started = Run()
        try:
            with own_wandb_run():
                wandb.run = started
                if error is not None:
                    raise error
        except RuntimeError:
            assert error is not None
        assert started.exit_code == code
        assert wandb.run is None
    wandb.run = Run()
    with own_wandb_run():
        pass
    assert wandb.run is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb(tmp_path, monkeypatch):
    """Offline; each of two runs in one process is a run of its own."""
    pytest.importorskip("wandb", reason="of the extra partners, which .ci/run installs")
    monkeypatch.setenv("WANDB_SILENT", "true")
    small = [*DRAWN, *SMALL_TOY, "callbacks.figures.num_samples=50", "logger=wandb", "logger.offline=true"]
    for seed in (0, 1):
        train(config(*small, f"seed={seed}", f"output_dir={tmp_path}/{seed}"))
        assert len(list((tmp_path / str(seed) / "wandb").glob("offline-run-*"))) == 1
        assert (tmp_path / str(seed) / "metrics.csv").is_file()
        pictures = {path.name.split("_")[0] for path in (tmp_path / str(seed) / "wandb").rglob("*.png")}
        assert pictures == {"final", "curve"}


WHOLE = """
exec(open("block.py").read())
if accelerator.is_main_process:
    torch.save(flow.state_dict(), "trained.pt")
assert accelerator.num_processes == 2
torch.distributed.destroy_process_group()
"""


def test_accelerate():
    names = section("accelerate")
    assert names["log_prob"].shape == (4,)
    assert names["flow"] is names["loss"].flow


@pytest.mark.slow
def test_accelerate_in_two_processes(tmp_path):
    """They end with the weights of one process."""
    pytest.importorskip("accelerate", reason="of the extra partners, which .ci/run installs")
    (tmp_path / "block.py").write_text("\n".join(SECTIONS["accelerate"]))
    (tmp_path / "whole.py").write_text(WHOLE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "whole.py"]
    done = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    close(torch.load(tmp_path / "trained.pt"), dict(section("accelerate")["flow"].state_dict()), rtol=1e-4, atol=1e-6)
