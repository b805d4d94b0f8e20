"""Each task at its smallest, its data and a quiet trainer."""

from collections.abc import Iterable

import lightning as L
import pytest

from divflow.data import Toy
from divflow.data.toy import two_moons
from divflow.flow import ContinuousFlow
from divflow.flow.transforms import Affine
from divflow.likelihood import Quadrature
from divflow.networks import MLP
from divflow.score import ScaledScore, ScoreDensity, VariancePreserving, probability_flow
from divflow.score.objectives import ImplicitScoreMatching, TimeConditionalScoreMatching
from divflow.solver import Solver
from divflow.tasks import FlowMatchingTask, FlowTask, ScoreTask

COARSE = {"solver": Solver("rk4", options={"step_size": 0.5}), "likelihood": Quadrature(7)}
SDE = VariancePreserving(event_shape=2)


def network():
    return MLP(2, hidden=[8])


def flow():
    return ContinuousFlow(network(), 2, **COARSE)


def score_over_sde(**settings):
    density = ScoreDensity(probability_flow(ScaledScore(network(), SDE), SDE, **COARSE), Affine())
    return ScoreTask(density, TimeConditionalScoreMatching(SDE), **settings)


TASKS = {
    "flow": lambda **settings: FlowTask(flow(), **settings),
    "flow matching": lambda **settings: FlowMatchingTask(flow(), **settings),
    "score over an SDE": score_over_sde,
    "score": lambda **settings: ScoreTask(network(), ImplicitScoreMatching(), **settings),
}
DENSITIES = [name for name in TASKS if name != "score"]


def quick(*names, of: Iterable = TASKS):
    """Parameters of which these alone are not slow."""
    return [pytest.param(it, marks=() if it in names else pytest.mark.slow) for it in of]


def moons(**settings):
    return Toy(two_moons(), **{"num_train": 48, "num_val": 16, "num_test": 20, "batch_size": 16, **settings})


def trainer(folder, **settings):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(**{"max_steps": 3, "accelerator": "cpu", "default_root_dir": folder, **quiet, **settings})
