"""Hutchinson's estimator of the divergence: the mean of v^T J v over random probes v."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from divflow.divergence.estimator import Estimate, Estimator, FrozenProbes, Products
from divflow.divergence.probes import DISTRIBUTIONS, draw_orthogonal_probes, draw_probes
from divflow.errors import FieldError, check_count
from divflow.operators.dense import products_per_pass
from divflow.operators.field import Field, accumulation_dtype, checked_state, flatten_event

__all__ = ["FixedProbes", "Hutchinson", "standard_error_of_mean"]


@dataclass(frozen=True)
class Hutchinson(Estimator):
    """The mean of v^T J v over `num_probes` independent probes a sample; unbiased.

    Variance of one probe, with S = (J + J^T) / 2 (Hutchinson 1990; Avron & Toledo 2011):
    Rademacher `2 * sum_{i != j} S_ij^2`, Gaussian `2 * |S|_F^2`; the sphere's probes (uniform, of norm
    sqrt(D)) have `2 D / (D + 2) * (|S|_F^2 - tr(S)^2 / D)`. It falls as 1 / num_probes.

    The standard error is known from num_probes values: two of it hold the error for 71, 86 and 94 % of draws with 2, 4 and
    16 probes (measured: 68 to 76, 83 to 90, 92 to 95), as Student's t does with num_probes - 1 degrees of freedom.

    Args:
        num_probes: vector-Jacobian products a call, at least 1.
        distribution: "rademacher" (the least variance where J has a heavy diagonal), "gaussian" or "sphere".

    Raises:
        ValueError: fewer than one probe, or an unknown distribution.
    """

    num_probes: int = 1
    distribution: str = "rademacher"
    stochastic = True

    def __post_init__(self) -> None:
        check_count("num_probes", self.num_probes)
        if self.distribution not in list(DISTRIBUTIONS):
            raise ValueError(f"distribution must be one of {sorted(DISTRIBUTIONS)}, but is {self.distribution!r}")

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """The value, the mean over probes, and the standard error of that mean (None for one probe)."""
        return self.freeze(x, generator).estimate(g, t, x)

    def freeze(self, x: Tensor, generator: Generator | None = None) -> "FixedProbes":
        """Draw the probes for batches of x's shape once; a solver then sees a deterministic right-hand side."""
        return FixedProbes(draw_probes(self.distribution, self.num_probes, checked_state(x), generator))

    def along(self, x: Tensor, bundles: Sequence[int], generator: Generator | None = None) -> "list[FixedProbes]":
        """Probes that are mutually orthogonal, sample by sample, at all times (in groups of D, if there are more).

        Where the Jacobian changes slowly in time, the errors of v^T J v cancel in part, as they would within
        one time: over D orthogonal probes v of norm sqrt(D), the mean of v^T J v is the trace.
        """
        probes = draw_orthogonal_probes(self.distribution, self.num_probes, sum(bundles), x, generator)
        return [FixedProbes(part.flatten(1, 2)) for part in probes.split(list(bundles), dim=1)]


@dataclass(frozen=True, eq=False)
class FixedProbes(FrozenProbes):
    """Hutchinson's estimator with given probes, `(num_probes, k, *event)`."""

    probes: Tensor

    def check(self, x: Tensor) -> None:
        """Refuse an x of another shape than the probes were drawn for."""
        if checked_state(x).shape != self.probes.shape[1:]:
            raise FieldError(
                f"the probes were drawn for x of shape {tuple(self.probes.shape[1:])}, but x has shape "
                f"{tuple(x.shape)}; freeze the estimator for this batch"
            )

    def from_products(self, field: Products, x: Tensor) -> Estimate:
        """The value, the mean over the probes, and its standard error."""
        chunks = self.probes.split(products_per_pass(x))
        products = torch.cat([field.pullback(chunk) for chunk in chunks])
        samples = _quadratic_form(products, self.probes)
        return Estimate(field.value, samples.mean(dim=0), standard_error_of_mean(samples), samples, products)


def standard_error_of_mean(samples: Float[Tensor, "samples batch"]) -> Float[Tensor, " batch"] | None:
    """That of the mean of independent samples; None for one sample."""
    count = len(samples)
    if count < 2:
        return None
    deviations = (samples - samples.mean(dim=0)).detach()
    return (deviations.square().sum(dim=0) / (count * (count - 1))).sqrt()


def _quadratic_form(
    products: Float[Tensor, "probes batch *event"], probes: Float[Tensor, "probes batch *event"]
) -> Float[Tensor, "probes batch"]:
    return flatten_event(products * probes, 2).sum(dim=2, dtype=accumulation_dtype(probes))
