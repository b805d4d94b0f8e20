"""Penalties of a regularized flow along its trajectories, besides the divergence (Finlay et al. 2020, RNODE)."""

from collections.abc import Callable

from torch import Generator, Tensor

from divflow.divergence import Estimate, Field, Hutchinson
from divflow.operators.field import accumulation_dtype, flatten_event

__all__ = ["PENALTIES"]


def _kinetic_energy(estimate: Estimate, field: Field, t: Tensor, x: Tensor, generator: Generator | None) -> Tensor:
    """|v|^2, `(k,)`: exact."""
    return flatten_event(estimate.value).square().sum(dim=1, dtype=accumulation_dtype(x))


def _jacobian_norm(estimate: Estimate, field: Field, t: Tensor, x: Tensor, generator: Generator | None) -> Tensor:
    """|dv/dx|_F^2, `(k,)`: the mean of |e^T J|^2 over probes e with E[e e^T] = I, which is unbiased.

    The products are those of the divergence's estimate. An exact divergence has none, so one probe is added, at the cost of
    an evaluation.
    """
    products = estimate.products
    if products is None:
        products = Hutchinson().estimate(field, t, x, generator).products
        assert products is not None  # a probe's
    return flatten_event(products, 2).square().sum(dim=2, dtype=accumulation_dtype(x)).mean(dim=0)


PENALTIES: dict[str, Callable[[Estimate, Field, Tensor, Tensor, Generator | None], Tensor]] = {
    "kinetic_energy": _kinetic_energy,
    "jacobian_norm": _jacobian_norm,
}
