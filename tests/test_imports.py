"""`import divflow.divergence` costs no more than torch itself."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["divflow.divergence", "divflow.operators", "divflow"])
def test_heart_imports_no_framework(module):
    code = f"import {module}, sys; print(sorted(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
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


@pytest.mark.parametrize("module", ["divflow.score.sampling", "divflow.matching"])
def test_score_and_flow_matching_import_no_training_framework(module):
    code = f"import {module}, sys; print(sorted(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for heavy in ("lightning", "pytorch_lightning", "hydra", "matplotlib", "sklearn", "diffusers"):
        assert f"'{heavy}'" not in loaded
