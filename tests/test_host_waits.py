"""A training step waits for its device no more than the solver's step control has to, and once more."""

import pytest
import torch
from watched_step import watched_step

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
pytestmark = [
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]
FLOWS = {"exact": [], "an estimate": ["estimator=hutchinson"], "an augmented solve": ["likelihood=augmented"]}
SCORES = {
    "denoising": ["objective=denoising", "sde=vp"],
    "implicit": ["objective=implicit", "sde=vp"],
    "sliced, without an SDE": ["objective=sliced_vr", "sde=none"],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overrides", FLOWS.values(), ids=FLOWS)
def test_a_flow_waits_for_its_solver_and_once_more(device, overrides, tmp_path):
    waits = watched_step(device, 6, f"output_dir={tmp_path}", *overrides).waits
    ours = {place: count for place, count in waits.items() if not place.startswith("torchdiffeq")}
    solver = [count for place, count in ours.items() if place.startswith("divflow/solver/solver.py")]
    assert solver == [1]  # is the solution finite?
    assert sum(ours.values()) == 2, ours


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overrides", SCORES.values(), ids=SCORES)
def test_a_score_waits_once(device, overrides, tmp_path):
    waits = watched_step(device, 6, f"output_dir={tmp_path}", "task=score", *overrides).waits
    assert sum(waits.values()) == 1, waits


@pytest.mark.parametrize("device", DEVICES)
def test_flow_matching_waits_once(device, tmp_path):
    waits = watched_step(device, 6, f"output_dir={tmp_path}", "task=flow_matching").waits
    assert sum(waits.values()) == 1, waits
