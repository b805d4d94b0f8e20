"""What a run's own results do not say, of it or of a peer: python results_measures.py RUN OUT [MEASURE], for a run of divflow."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from results_particles import particles
from results_trained import Ours, Trained, parameters
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from timing import medians
from torch import Tensor

from divflow.data import Simulations
from divflow.divergence import Estimator, Exact, Hutchinson
from divflow.likelihood import Quadrature

OBSERVATIONS, DRAWS = range(1, 11), 500
ROWS, NODES, REPEATS = 64, 15, 20


def c2st(x: Tensor, y: Tensor) -> float:
    """Accuracy by which a classifier tells two samples `(n, D)` apart, 1/2 if it can't, as sbibm sets it (Lueckmann et al. 2021).

    Two hidden layers of 10 D, five folds, standardized by x; the published numbers are of 10,000 samples.
    """
    mean, std = x.mean(dim=0), x.std(dim=0)
    rows = ((torch.cat([x, y]) - mean) / std).numpy()
    labels = np.repeat([0, 1], [len(x), len(y)])
    width = 10 * x.shape[1]
    classifier = MLPClassifier((width, width), max_iter=10_000, random_state=1)
    folds = KFold(5, shuffle=True, random_state=1)
    return float(cross_val_score(classifier, rows, labels, cv=folds).mean())


@torch.no_grad()
def posterior(trained: Trained) -> dict[str, float]:
    """C2ST against sbibm's posteriors, mean and standard error over its observations; log-probabilities a second."""
    data = trained.data
    assert isinstance(data, Simulations)
    found = []
    for number in OBSERVATIONS:
        context = data.observation(number).expand(DRAWS, -1)
        reference = data.reference(number)[:DRAWS]
        found.append(c2st(reference, trained.sample(DRAWS, context)))
    x, context = data.reference(1)[:DRAWS], data.observation(1).expand(DRAWS, -1)
    time = medians({"log_prob": lambda: trained.log_prob(x, context)}, 2.0)["log_prob"]
    return {
        "c2st": float(np.mean(found)),
        "c2st_standard_error": float(np.std(found, ddof=1) / np.sqrt(len(found))),
        "log_prob_per_second": DRAWS / time,
    }


@torch.no_grad()
def probes(trained: Trained) -> dict[str, float]:
    """The likelihood's cost, exact and by one product a node, and the error of one log p by such estimates.

    Fifteen products each: probes that are orthogonal along the nodes, and one fixed probe for all of them. Of ours alone: a
    peer's likelihood takes no divergence.
    """
    if not isinstance(trained, Ours):
        return {}
    density = trained.model
    x, _ = density.transform(trained.data.test.rows[:ROWS])
    x = x.to(density.dtype)
    exact = density.flow.replace(estimator=Exact(), likelihood=Quadrature(NODES))
    ways: dict[str, Callable[[], Estimator]] = {
        "exact": Exact,
        "orthogonal": Hutchinson,
        "fixed": lambda: Hutchinson().freeze(x),  # one draw for all nodes, as one solve of FFJORD has it
    }
    flows = {name: exact.replace(estimator=make()) for name, make in ways.items()}
    seconds = medians({name: functools.partial(flow.log_prob, x) for name, flow in flows.items()}, 3.0)
    metrics, truth = {f"{name}_seconds": value for name, value in seconds.items()}, exact.log_prob(x)
    for name in ("orthogonal", "fixed"):
        draws = [exact.replace(estimator=ways[name]()).log_prob(x) for _ in range(REPEATS)]
        metrics[f"{name}_error"] = (torch.stack(draws) - truth).square().mean().sqrt().item()
    return metrics


MEASURES: dict[str, Callable[[Trained], dict[str, float]]] = {
    "posterior": posterior,
    "probes": probes,
    "particles": particles,
}


def main(folder: str, out: str, measure: str = "") -> None:
    """Count the parameters of the density in a run's folder, and measure it."""
    torch.manual_seed(0)
    ours = Ours(Path(folder))
    metrics = MEASURES[measure](ours) if measure else {}
    Path(out).write_text(json.dumps({"metrics": metrics, "parameters": parameters(ours.model)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
