"""`import divflow.divergence` costs no more than torch itself."""

import importlib
import subprocess
import sys
import tomllib

import pytest
from run import ROOT


def loaded_by(*modules):
    code = f"import {', '.join(modules)}, sys; print(sorted(m for m in sys.modules if '.' not in m))"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_heart_imports_no_framework():
    loaded = loaded_by("divflow.divergence", "divflow.operators", "divflow")
    for heavy in (
        "lightning",
        "pytorch_lightning",
        "hydra",
        "omegaconf",
        "matplotlib",
        "sklearn",
        "torchdiffeq",
        "pyarrow",
        "networkx",
    ):
        assert f"'{heavy}'" not in loaded


def test_top_level_names():
    import divflow

    for name in divflow.__all__:
        assert getattr(divflow, name) is not None
    with pytest.raises(AttributeError, match="ContinuousFlow"):
        divflow.Flow  # noqa: B018


def test_score_and_flow_matching_import_no_training_framework():
    loaded = loaded_by("divflow.score.sampling", "divflow.matching")
    for heavy in ("lightning", "pytorch_lightning", "hydra", "matplotlib", "sklearn", "diffusers"):
        assert f"'{heavy}'" not in loaded


# Public names of modules that stood loose, before there were rooms.
MOVED = {
    "divflow.adjoint": "Adjoint",
    "divflow.arguments": "check_count check_generator check_numbers check_positive checked_event_shape checked_range listed_rows on_copies",
    "divflow.base_density": "BaseDensity",
    "divflow.bases": "BaseError MeanFreeNormal",
    "divflow.build": "ConfigError build_density build_network build_objective build_ways check_paths check_settings",
    "divflow.captured": "Dependences is_differentiated substituted",
    "divflow.checkpoint": "CheckpointError check_state check_targets init_weights load load_state read_checkpoint rebuild which_weights",
    "divflow.dense_output": "Steps",
    "divflow.density": "FlowDensity ScoreDensity UnnormalizedDensity in_units",
    "divflow.distribution": "KL_SAMPLES FlowDistribution MonteCarloKL estimate_kl",
    "divflow.experiment": "train",
    "divflow.figures": "plot_curves plot_energies plot_images plot_pairs plot_plane",
    "divflow.folder": "claim earlier_metrics link_latest save_config save_results take_along",
    "divflow.importance": "ImportanceError ImportanceWarning ImportanceWeights importance_weights",
    "divflow.loggers": "build_loggers log_figure log_settings",
    "divflow.processes": "ProcessError Watch",
    "divflow.report": "metrics_table print_results",
    "divflow.rows": "check_broadcast check_finite_rows check_range checked_rows",
    "divflow.step_control": "ADAPTIVE COARSELY_INTERPOLATED DEFAULT_STEPS FIXED METHODS METHOD_ORDERS StepTimes Tolerances adaptive_options adjoint_options after_jump check_options fixed_options limit_step steps_for_one worst_sample",
    "divflow.support": "log_density without_volume",
    "divflow.sweeps": "swept",
    "divflow.transform": "Transform at_least_float32",
    "divflow.transforms": "Affine Bounded Compose Logit MeanFreeScale Transform",
    "divflow.units": "UnitsWarning warn_of_far_data warn_of_range",
}


@pytest.mark.parametrize("module", MOVED)
def test_names_of_before_are_the_very_objects_of_now(module):
    before = importlib.import_module(module)
    for name in MOVED[module].split():
        found = getattr(before, name)
        home = getattr(found, "__module__", None)  # constants have none
        assert home not in MOVED
        assert home is None or not home.startswith("divflow") or getattr(sys.modules[home], name) is found


SLOWLY = [pytest.param(code, marks=pytest.mark.slow) for code in ("import divflow.bases", "import divflow.flow")]


@pytest.mark.parametrize("code", ["import divflow", *SLOWLY])
def test_modules_of_before_are_attributes_too(code):
    code += "; print(divflow.bases.MeanFreeNormal.__module__)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded == "divflow.distributions.mean_free\n"


def test_shapes_are_checked_wherever_networks_and_likelihoods_state_them():
    """By the modules that the settings of the tests name."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    (checked,) = (option for option in options if option.startswith("--jaxtyping-packages="))
    modules = checked.partition("=")[2].split(",")
    for package in ("networks", "likelihood"):
        for path in (ROOT / "divflow" / package).rglob("*.py"):
            if "from jaxtyping import" in path.read_text():
                assert ".".join(path.relative_to(ROOT).with_suffix("").parts) in modules
