"""Variance of log p on flows trained on images, at equal numbers of vector-Jacobian products."""

from pathlib import Path

import torch
from run import config
from torch import Generator, Tensor

import divflow
from divflow.divergence import ControlVariate, Estimator, Hutchinson, HutchPlusPlus, XTrace
from divflow.flow import ContinuousFlow
from divflow.likelihood import Quadrature
from divflow.runs.experiment import train
from divflow.solver import Solver

Row = tuple[str, str, str, str]
NODES, DRAWS, SAMPLES, REFERENCES = 15, 60, 64, 64


class Independent(Hutchinson):
    """Probes that are independent from node to node."""

    def along(self, x: Tensor, bundles: list[int], generator: Generator | None = None) -> list[Estimator]:
        """No probes drawn together."""
        return [self] * len(bundles)


def trained_flow(folder: Path, what: str = "data=digits") -> tuple[ContinuousFlow, Tensor, Tensor]:
    """The flow of `python train.py WHAT`, and test and training images as it sees them."""
    checkpoint = folder / "checkpoints" / "best.ckpt"
    settings = config(what, "callbacks.figures=null", "device=cpu", f"output_dir={folder}")
    if not checkpoint.is_file():
        train(settings)
    density = divflow.load(checkpoint)
    train_images, test_images = images(settings)
    x, _ = density.transform(test_images[:SAMPLES])
    references, _ = density.transform(train_images[:REFERENCES])
    flow = density.flow.replace(likelihood=Quadrature(NODES), solver=Solver("dopri5", 1e-4, 1e-4))
    return flow, x.to(density.dtype), references.to(density.dtype)


def images(settings: object) -> tuple[Tensor, Tensor]:
    """The training and the test split."""
    from hydra.utils import instantiate

    data = instantiate(settings.data, _convert_="all")
    return torch.cat(list(data.train_dataloader())), torch.cat(list(data.test_dataloader()))


@torch.no_grad()
def variance_of(flow: ContinuousFlow, x: Tensor, estimator: Estimator, fixed: bool = False) -> float:
    """The variance of log p over draws of the probes, averaged over samples; `fixed` keeps one draw for all nodes."""
    draws = []
    for _ in range(DRAWS):
        drawn = estimator.freeze(x) if fixed else estimator
        draws.append(flow.replace(estimator=drawn).evaluate(x, diagnostics=False).log_prob)
    return torch.stack(draws).var(dim=0).mean().item()


def against_products(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Products and variances of each way."""
    flow, x, references = trained_flow(folder)
    ways = {
        "one Rademacher probe for all nodes": (lambda m: Hutchinson(m), (1, 2, 4, 8), True),
        "one Gaussian probe for all nodes": (lambda m: Hutchinson(m, "gaussian"), (1, 2, 4, 8), True),
        "independent at each node": (Independent, (1, 2, 4, 8), False),
        "orthogonal along the nodes (divflow)": (Hutchinson, (1, 2, 4, 8), False),
        "with a control variate": (lambda m: ControlVariate(Hutchinson(m), references), (1, 2, 4, 8), False),
        "Hutch++ at each node": (HutchPlusPlus, (3, 6, 12, 24), False),
        "XTrace at each node": (XTrace, (4, 6, 12, 24), False),
    }
    found = {}
    for name, (make, counts, fixed) in ways.items():
        found[name] = (
            [NODES * count for count in counts],
            [variance_of(flow, x, make(count), fixed) for count in counts],
        )
    return found


def reduction(folder: Path) -> list[Row]:
    """One probe at each node, alone and with a control variate, against one for all of them."""
    return [
        *of_one_product(folder, "data=digits", "digits, D = 64"),
        *of_one_product(folder / "mnist", "experiment=mnist_likelihood", "MNIST, D = 784"),
    ]


def of_one_product(folder: Path, what: str, name: str) -> list[Row]:
    """For one flow."""
    flow, x, references = trained_flow(folder, what)
    fixed = variance_of(flow, x, Hutchinson(), fixed=True)
    orthogonal, independent = variance_of(flow, x, Hutchinson()), variance_of(flow, x, Independent())
    controlled = {rank: variance_of(flow, x, ControlVariate(Hutchinson(), references, rank)) for rank in (None, 32)}
    return [
        (
            f"variance of log p, {name}, {NODES} products",
            "one fixed Rademacher probe",
            "10 times lower",
            f"**{fixed / orthogonal:.1f}** ({orthogonal:.2f} against {fixed:.1f}; independent probes {independent:.2f})",
        ),
        (
            f"the same with the mean Jacobian of {REFERENCES} training images as a control variate",
            "one fixed Rademacher probe",
            "45 times lower",
            f"**{fixed / controlled[None]:.1f}** ({controlled[None]:.2f} against {fixed:.1f}; "
            f"of rank 32 {fixed / controlled[32]:.1f})",
        ),
    ]
