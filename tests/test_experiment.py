"""Whole runs of the real configs, for a few steps."""

import math
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from covering import thinned
from PIL import Image
from run import DRAWN, FAST, SMALL_TOY, config

import divflow
from divflow.runs.experiment import train
from divflow.saved.build import ConfigError
from divflow.saved.checkpoint import CheckpointError


def run(tmp_path, *overrides, toy=True, drawn=False):
    return train(config(*(DRAWN if drawn else FAST), *(SMALL_TOY if toy else []), f"output_dir={tmp_path}", *overrides))


# Figures of all kinds of data and densities are drawn in `test_devices.py`, too.
FIGURES = pytest.mark.parametrize(
    "drawn", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["no figures", "figures"]
)
VARIANTS = {
    "exact": ["estimator=exact"],
    "autograd": ["estimator=autograd"],
    "hutchinson": ["estimator=hutchinson", "estimator.num_probes=4"],
    "augmented adjoint": ["likelihood=augmented", "solver=rk4", "solver.gradient=adjoint"],
    "quadrature adjoint": ["solver.gradient=adjoint"],
    "stochastic evaluation": ["estimator@evaluation.estimator=hutchinson", "evaluation.estimator.num_probes=2"],
    "bf16-mixed": ["device.precision=bf16-mixed"],
    "concat squash": ["network=concat_squash"],
    "opposite time": ["t_base=1.0", "t_data=0.0"],
    "ffjord": ["experiment=ffjord"],
    "smoke": ["experiment=smoke"],
    "sketched": ["estimator=hutch_plus_plus", "estimator.num_products=3", "estimator@evaluation.estimator=xtrace"],
    "regularized": ["task.regularization.kinetic_energy=0.1", "task.regularization.jacobian_norm=0.1"],
    "no average": ["callbacks.average=null"],
    "no schedule": ["task.scheduler=null"],
    "tensorboard": ["logger=tensorboard"],
}


@FIGURES
@thinned(variant=VARIANTS)
def test_variants_run(tmp_path, variant, drawn):
    results = run(tmp_path, *VARIANTS[variant], drawn=drawn)
    assert all(math.isfinite(value) for value in results.values())
    assert results["test/gap"] > 0
    assert ("test/estimator_error" in results and results["test/estimator_error"] > 0) == (
        variant == "stochastic evaluation"
    )


SCORED = {
    "implicit": ["objective=implicit", "estimator=exact"],
    "implicit hutchinson": ["objective=implicit", "estimator=hutchinson"],
    "sliced": ["objective=sliced", "objective.num_slices=2"],
    "sliced vr": ["objective=sliced_vr", "sde=ve"],
    "finite difference": ["objective=finite_difference", "sde=subvp"],
    "denoising": ["objective=denoising", "sde=vp", "times.weighting=sigma2"],
    "reverse sde": ["sampler=reverse_sde", "sampler.num_steps=5"],
    "plain scaling": ["data_std=null"],
    "embedded time": ["+network.time_embedding={_target_: divflow.networks.SinusoidalEmbedding, features: 8}"],
    "bf16-mixed": ["device.precision=bf16-mixed", "objective=implicit"],
}


@FIGURES
@thinned(variant=SCORED)
def test_score_matching_over_an_sde(tmp_path, variant, drawn):
    results = run(tmp_path, "task=score", *SCORED[variant], drawn=drawn)
    assert all(math.isfinite(value) for value in results.values())
    assert results["test/gap"] > 0
    assert results["test/fisher_divergence"] > 0
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["train/loss"].notna().sum() == 4
    for name in ("val/loss", "val/nll", "val/fisher_divergence", "val/quadrature_error"):
        assert table[name].notna().sum() == 2
    density = divflow.load(tmp_path / "checkpoints" / "best.ckpt")
    points = torch.randn(3, 2)
    assert density.sample(3).shape == density.score(points).shape == (3, 2)
    assert density.log_prob(points).shape == (3,)


@FIGURES
@pytest.mark.parametrize("objective", ["implicit", "sliced_vr", "finite_difference", "denoising"])
def test_score_matching_of_the_data(tmp_path, objective, drawn):
    settings = [f"objective={objective}", "sde=none", "sampler.steps_per_level=5"]
    results = run(tmp_path, "task=score", *settings, drawn=drawn)
    assert set(results) == {
        f"test/{name}{error}" for name in ("loss", "fisher_divergence") for error in ("", "_standard_error")
    } | {"val/loss", "val/loss_current_weights"}
    density = divflow.load(tmp_path / "checkpoints" / "best.ckpt")
    assert density.sample(3).shape == density.score(torch.randn(3, 2)).shape == (3, 2)
    assert (tmp_path / "figures" / "final.png").is_file() == drawn


def test_score_matching_of_several_levels(tmp_path):
    levels = ["noise_levels=[1.0,0.3,0.1]", "sampler.sigmas=[1.0,0.3,0.1]", "sampler.steps_per_level=5"]
    results = run(tmp_path, "task=score", "sde=none", *levels)
    assert math.isfinite(results["test/loss"])
    assert divflow.load(tmp_path / "checkpoints" / "best.ckpt").levels == (1.0, 0.3, 0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sde=none", "noise_levels=[1.0,0.2]"], r"levels \(1\.0, 0\.2\), but the sampler takes \(0\.5"),
        (["sde=none", "objective=implicit", "noise_levels=[0.5,0.3,0.2,0.1]"], "noise_levels=.*objective=denoising"),
        (["sde=none", "objective.sigma=[0.5,0.1]"], "noise_levels=0.1 are for objective=denoising"),
        (["noise_levels=0.1"], "noise_levels=0.1 are for sde=none"),
        (["times.weighting=g"], "weighting must be one of.*'g'"),
    ],
)
def test_settings_of_scores_that_do_not_fit_are_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, "task=score", *overrides)


def test_the_fisher_divergence_is_that_of_what_is_loaded_back(tmp_path):
    cfg = config(*FAST, *SMALL_TOY, f"output_dir={tmp_path}", "task=score")
    results = train(cfg)
    from hydra.utils import instantiate

    x = instantiate(cfg.data, _convert_="all").test.rows
    density = divflow.load(tmp_path / "checkpoints" / "best.ckpt")
    truth = instantiate(cfg.data.density).score(x)
    expected = (density.score(x) - truth).square().sum(dim=1).mean() / 2
    np.testing.assert_allclose(results["test/fisher_divergence"], expected.item(), rtol=1e-4)


@pytest.mark.parametrize("network", ["mlp", "conv", pytest.param("unet", marks=pytest.mark.slow)])
def test_scores_of_digits_report_bits_per_dimension(tmp_path, network):
    settings = [] if network == "mlp" else ["data.event_shape=[1,8,8]", "estimator@evaluation.estimator=hutchinson"]
    settings += ["network.hidden=[8,8]"] if network == "conv" else []
    settings += ["network.channels=[4,4]", "solver@evaluation.solver=euler"] if network == "unet" else []
    fast = [override for override in FAST if not override.startswith(("network", "solver@"))]
    settings = settings if network == "unet" else [*settings, "solver@evaluation.solver=rk4"]
    cfg = config(*fast, f"output_dir={tmp_path}", "task=score", "data=digits", f"network={network}", *settings)
    results = train(cfg)
    bits = results["test/nll"] / (64 * math.log(2)) + math.log2(17)
    np.testing.assert_allclose(results["test/bits_per_dim"], bits, rtol=1e-5)
    assert 2 < bits < 4.5
    assert divflow.load(tmp_path / "checkpoints" / "last.ckpt").sample(2).shape[1:] == cfg.data.event_shape


def test_resuming_score_matching(tmp_path):
    run(tmp_path, "task=score", "trainer.max_steps=2", "task.scheduler=null")
    last = tmp_path / "checkpoints" / "last.ckpt"
    run(tmp_path, "task=score", f"ckpt_path={last}", "task.scheduler=null")
    assert torch.load(last, weights_only=True)["global_step"] == 4


def test_what_a_run_leaves_and_logs(tmp_path):
    figures = ["every_n_steps=2", "share=1e9", "num_samples=50"]
    results = run(tmp_path, *(f"callbacks.figures.{setting}" for setting in figures), drawn=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {
        "config.yaml",
        "metrics.csv",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "figures/step_000002.png",
        "figures/step_000004.png",
        "figures/final.png",
        "figures/curve.png",
        "results.json",
        "samples.npy",
    }
    assert np.load(tmp_path / "samples.npy").shape == (50, 2)
    table = pd.read_csv(tmp_path / "metrics.csv")
    for name in ("train/nll", "train/nfe", "train/nfe_backward", "train/nfe_divergence", "train/quadrature_error"):
        assert table[name].notna().sum() == 4
    for name in ("val/nll", "val/gap", "val/nfe", "val/quadrature_error"):
        assert table[name].notna().sum() == 2
    for name in ("test/nll", "test/nll_standard_error", "test/gap", "test/gap_standard_error", "test/nfe"):
        assert table[name].notna().sum() == 1
        np.testing.assert_allclose(table[name].dropna().iloc[0], results[name], rtol=1e-6)


def test_loads_back_as_the_density_that_was_tested(tmp_path):
    cfg = config(*FAST, *SMALL_TOY, f"output_dir={tmp_path}", "callbacks.average.decay=0.5")
    results = train(cfg)
    density = divflow.load(tmp_path / "checkpoints" / "best.ckpt")
    from hydra.utils import instantiate

    data = instantiate(cfg.data, _convert_="all")
    with torch.no_grad():
        x = data.test.rows
        nll = -density.log_prob(x)
    np.testing.assert_allclose(nll.mean().item(), results["test/nll"], rtol=1e-6)
    np.testing.assert_allclose(nll.std().item() / math.sqrt(30), results["test/nll_standard_error"], rtol=1e-3)
    gap = (data.log_prob(x) + nll).mean().item()
    np.testing.assert_allclose(gap, results["test/gap"], rtol=1e-3)
    assert density.sample(5).shape == (5, 2)
    assert not density.training


def test_digits_report_bits_per_dimension_of_the_discrete_data(tmp_path):
    results = run(tmp_path, "data=digits", toy=False)
    bits = results["test/nll"] / (64 * math.log(2)) + math.log2(17)
    np.testing.assert_allclose(results["test/bits_per_dim"], bits, rtol=1e-5)
    error = results["test/nll_standard_error"] / (64 * math.log(2))
    np.testing.assert_allclose(results["test/bits_per_dim_standard_error"], error, rtol=1e-3)
    assert 2 < bits < 4.1  # log2(17) = 4.09 is the uniform distribution


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_a_folder_of_images_of_ones_own(tmp_path, estimator):
    """The bits per dimension are those of the file's own bytes, however the noise was drawn."""
    (tmp_path / "photos").mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    settings = ["dequantization=truncated_normal", "data.num_draws=3", f"estimator@evaluation.estimator={estimator}"]
    settings += ["evaluation.estimator.num_probes=2"] if estimator == "hutchinson" else []
    warned = pytest.warns(UserWarning, match="importance-weighted") if estimator == "hutchinson" else nullcontext()
    with warned:
        images = ["data=images", f"data.path={tmp_path}/photos"]
        results = run(tmp_path / "run", *images, *settings, toy=False, drawn=estimator == "exact")
    assert 7.9 < results["test/bits_per_dim"] < 11  # of noise: 8, and what is lost to the bound and to four rows
    assert ("test/bits_per_dim_importance_weighted" in results) == (estimator == "exact")
    if estimator == "exact":
        assert 7.9 < results["test/bits_per_dim_importance_weighted"] < results["test/bits_per_dim"]
    else:
        assert results["test/bits_per_dim_estimator_error"] > 0
    assert 0 < results["test/bits_per_dim_dequantization_error"] < results["test/bits_per_dim_standard_error"] * 3
    density = divflow.load(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert density.sample(2).shape == (2, 3, 4, 6)
    assert (tmp_path / "run" / "figures" / "final.png").is_file() == (estimator == "exact")


def test_images_through_a_convolutional_network(tmp_path):
    results = run(
        tmp_path,
        "data=digits",
        "network=conv",
        "network.hidden=[4]",
        "data.event_shape=[1,8,8]",
        "estimator@evaluation.estimator=hutchinson",
        toy=False,
    )
    assert 2 < results["test/bits_per_dim"] < 4.2
    images = divflow.load(tmp_path / "checkpoints" / "last.ckpt").sample(3)
    assert images.shape == (3, 1, 8, 8)


def test_a_table_of_ones_own(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"height": rng.normal(170, 10, 400), "weight": rng.normal(70, 8, 400), "name": "x"})
    frame.to_csv(tmp_path / "people.csv", index=False)
    table = ["data=table", f"data.path={tmp_path}/people.csv", "data.columns=[height,weight]"]
    results = run(tmp_path / "run", *table, toy=False, drawn=True)
    # In units of the file: two independent normals of standard deviations 10 and 8, before much training.
    entropy = math.log(10 * 8) + 1 + math.log(2 * math.pi)
    assert abs(results["test/nll"] - entropy) < 0.6
    samples = divflow.load(tmp_path / "run" / "checkpoints" / "best.ckpt").sample(2_000)
    assert abs(samples[:, 0].mean() - 170) < 10
    assert (tmp_path / "run" / "figures" / "final.png").is_file()


def test_seed_zero_is_a_seed(tmp_path):
    a, b, c = (run(tmp_path / name, f"seed={seed}")["test/nll"] for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert a == b
    assert a != c


def test_resuming_goes_on_where_it_stopped(tmp_path):
    straight = run(tmp_path / "straight", "data.num_train=16", "task.scheduler=null")
    run(tmp_path / "half", "data.num_train=16", "trainer.max_steps=2", "task.scheduler=null")
    last = tmp_path / "half" / "checkpoints" / "last.ckpt"
    resumed = run(tmp_path / "half", "data.num_train=16", f"ckpt_path={last}", "task.scheduler=null")
    # Every step sees all 16 rows, so the two runs are the same but for their order in a sum.
    np.testing.assert_allclose(resumed["test/nll"], straight["test/nll"], rtol=1e-5)
    weights = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("straight", "half")
    ]
    for key, value in weights[0]["current_model_state"].items():
        torch.testing.assert_close(value, weights[1]["current_model_state"][key], rtol=1e-4, atol=1e-5)
    assert weights[1]["global_step"] == 4
    tables = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("straight", "half")]
    assert len(tables[0]) == len(tables[1])  # those of the first half are kept


def test_a_checkpoint_of_another_architecture_is_refused_before_anything_is_lost(tmp_path):
    run(tmp_path / "a")
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    with pytest.raises(CheckpointError, match=r"another architecture.*\(16, 3\) there and \(8, 3\) here"):
        run(tmp_path / "a", "network.hidden=[8]", f"ckpt_path={last}")
    assert last.read_bytes() == before
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run(tmp_path / "b", "ckpt_path=nowhere.ckpt")


def test_missing_packages_of_loggers_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(ConfigError, match="pip install wandb"):
        run(tmp_path, "logger=wandb")
    with pytest.raises(ConfigError, match="pip install mlflow"):
        run(tmp_path, "logger=mlflow")


def test_a_velocity_of_ones_own(tmp_path, monkeypatch):
    module = tmp_path / "my_velocity.py"
    module.write_text(
        "from torch import nn\nimport torch\n\n"
        "class Velocity(nn.Module):\n"
        "    def __init__(self, width):\n"
        "        super().__init__()\n"
        "        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))\n\n"
        "    def forward(self, t, x):\n"
        "        return self.net(x) * t.reshape(-1, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fast = [override for override in FAST if not override.startswith("network")]
    own = ["network=custom", "network._target_=my_velocity.Velocity", "+network.width=5"]
    train(config(*fast, *SMALL_TOY, f"output_dir={tmp_path}/run", *own))
    from my_velocity import Velocity

    with pytest.raises(CheckpointError, match=r"my_velocity\.Velocity.*allow"):
        divflow.load(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert divflow.load(tmp_path / "run" / "checkpoints" / "best.ckpt", allow=[Velocity]).sample(3).shape == (3, 2)


def test_a_run_of_no_step_says_that_it_leaves_no_checkpoint(tmp_path, capsys):
    run(tmp_path, "trainer.max_steps=0", "task.scheduler.T_max=4", "callbacks.average=null")
    assert not list(tmp_path.rglob("*.ckpt"))
    assert "No step was trained, so there is no checkpoint. Set trainer.max_steps" in capsys.readouterr().out
    run(tmp_path / "some", "trainer.max_steps=1", "trainer.val_check_interval=1", "callbacks.average=null")
    assert "No step was trained" not in capsys.readouterr().out
