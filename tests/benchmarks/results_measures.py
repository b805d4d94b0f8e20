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
from divflow.divergence import Exact, Hutchinson
from divflow.flow import ContinuousFlow
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
    x, flows = estimates(trained)
    flows["exact"] = flows["orthogonal"].replace(estimator=Exact())
    seconds = medians({name: functools.partial(flow.log_prob, x) for name, flow in flows.items()}, 3.0)
    metrics, truth = {f"{name}_seconds": value for name, value in seconds.items()}, flows["exact"].log_prob(x)
    for name, values in drawn(trained).items():
        metrics[f"{name}_error"] = (values - truth).square().mean().sqrt().item()
    return metrics


@torch.no_grad()
def spread(trained: Trained) -> dict[str, float]:
    """As `probes`, of fields whose exact divergence is out of reach: errors are the spread of draws, which have no bias."""
    if not isinstance(trained, Ours):
        return {}
    x, flows = estimates(trained)
    seconds = medians({"orthogonal": functools.partial(flows["orthogonal"].log_prob, x)}, 3.0)["orthogonal"]
    errors = {f"{name}_error": values.var(dim=0).mean().sqrt().item() for name, values in drawn(trained).items()}
    return {"orthogonal_seconds": seconds} | errors


def estimates(trained: Ours) -> tuple[Tensor, dict[str, ContinuousFlow]]:
    """Rows as the flow takes them, and flows by one product a node; the fixed probe is drawn anew with every call of this."""
    density = trained.model
    x = density.transform(trained.data.test.rows[:ROWS])[0].to(density.dtype)
    flow = density.flow.replace(estimator=Hutchinson(), likelihood=Quadrature(NODES))
    fixed = Hutchinson().freeze(x)  # one draw for all nodes, as one solve of FFJORD has it
    return x, {"orthogonal": flow, "fixed": flow.replace(estimator=fixed)}


def drawn(trained: Ours) -> dict[str, Tensor]:
    """Log p by each way of `estimates`, `(REPEATS, ROWS)`."""
    draws: dict[str, list[Tensor]] = {"orthogonal": [], "fixed": []}
    for _ in range(REPEATS):
        x, flows = estimates(trained)
        for name, flow in flows.items():
            draws[name].append(flow.log_prob(x))
    return {name: torch.stack(values) for name, values in draws.items()}


MEASURES: dict[str, Callable[[Trained], dict[str, float]]] = {
    "posterior": posterior,
    "probes": probes,
    "spread": spread,
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
