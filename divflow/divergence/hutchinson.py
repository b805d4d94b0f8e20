"""Hutchinson's estimator of the divergence: the mean of v^T J v over random vectors v, the probes."""

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
    """Estimate the divergence from a few random vectors (probes) per sample; unbiased at any dimension.

        div g = E[v^T J v],    E[v v^T] = I

    The estimate is the mean over `num_probes` independent probes v. Its variance falls as 1 / num_probes. With
    S = (J + J^T) / 2 one probe has (Hutchinson 1990; Avron & Toledo 2011)

    - "rademacher": `2 * sum_{i != j} S_ij^2`
    - "gaussian": `2 * |S|_F^2`
    - "sphere" (uniform, of norm sqrt(D)): `2 D / (D + 2) * (|S|_F^2 - tr(S)^2 / D)`

    The standard error is estimated from num_probes values, so two of it cover as much as Student's t with num_probes - 1
    degrees of freedom: 71, 86 and 94 % of draws with 2, 4 and 16 probes (measured: 68 to 76, 83 to 90, 92 to 95).

    Args:
        num_probes: vector-Jacobian products per call, at least 1.
        distribution: "rademacher" (the least variance if J has a heavy diagonal), "gaussian" or "sphere".

    Raises:
        ValueError: fewer than one probe, or an unknown distribution.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> Hutchinson()(lambda t, x: t * x**2, 0.5, x).divergence  # a diagonal Jacobian: Rademacher probes are exact
        tensor([3., 7.])
        >>> estimate = Hutchinson(num_probes=8).estimate(lambda t, x: x.flip(1), 0.0, x)
        >>> estimate.divergence.shape, estimate.standard_error.shape
        (torch.Size([2]), torch.Size([2]))
    """

    num_probes: int = 1
    distribution: str = "rademacher"
    stochastic = True

    def __post_init__(self) -> None:
        check_count("num_probes", self.num_probes)
        if self.distribution not in list(DISTRIBUTIONS):
            raise ValueError(f"distribution must be one of {sorted(DISTRIBUTIONS)}, but is {self.distribution!r}")

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """Return the value, the mean over probes, and the standard error of that mean (None for one probe)."""
        return self.freeze(x, generator).estimate(g, t, x)

    def freeze(self, x: Tensor, generator: Generator | None = None) -> "FixedProbes":
        """Draw the probes for batches of x's shape once; a solver then sees a deterministic right-hand side."""
        return FixedProbes(draw_probes(self.distribution, self.num_probes, checked_state(x), generator))

    def along(self, x: Tensor, bundles: Sequence[int], generator: Generator | None = None) -> "list[FixedProbes]":
        """Draw probes that are mutually orthogonal, sample by sample, at all times (in groups of D if there are more).

        If the Jacobian changes slowly in time, the errors of v^T J v cancel in part, as they would at a single time: over D
        orthogonal probes v of norm sqrt(D), the mean of v^T J v is the trace.
        """
        probes = draw_orthogonal_probes(self.distribution, self.num_probes, sum(bundles), x, generator)
        return [FixedProbes(part.flatten(1, 2)) for part in probes.split(list(bundles), dim=1)]


@dataclass(frozen=True, eq=False)
class FixedProbes(FrozenProbes):
    """Hutchinson's estimator with given probes.

    Args:
        probes: `(num_probes, k, *event)`.
    """

    probes: Tensor

    def check(self, x: Tensor) -> None:
        """Refuse an x of another shape than that for which the probes were drawn."""
        if checked_state(x).shape != self.probes.shape[1:]:
            raise FieldError(
                f"the probes were drawn for x of shape {tuple(self.probes.shape[1:])}, but x has shape "
                f"{tuple(x.shape)}. Freeze the estimator for this batch."
            )

    def from_products(self, field: Products, x: Tensor) -> Estimate:
        """Return the value, the mean over the probes, and its standard error."""
        chunks = self.probes.split(products_per_pass(x))
        products = torch.cat([field.pullback(chunk) for chunk in chunks])
        samples = _quadratic_form(products, self.probes)
        return Estimate(field.value, samples.mean(dim=0), standard_error_of_mean(samples), samples, products)


def standard_error_of_mean(samples: Float[Tensor, "samples batch"]) -> Float[Tensor, " batch"] | None:
    """Estimate the standard error of the mean of independent samples; None for one sample.

    Args:
        samples: `(m, k)`.
    """
    count = len(samples)
    if count < 2:
        return None
    deviations = (samples - samples.mean(dim=0)).detach()
    return (deviations.square().sum(dim=0) / (count * (count - 1))).sqrt()


def _quadratic_form(
    products: Float[Tensor, "probes batch *event"], probes: Float[Tensor, "probes batch *event"]
) -> Float[Tensor, "probes batch"]:
    return flatten_event(products * probes, 2).sum(dim=2, dtype=accumulation_dtype(probes))
