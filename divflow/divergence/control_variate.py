"""A control variate: what the Jacobians of many samples have in common is known, and only the rest is estimated."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from divflow.arguments import check_count
from divflow.divergence.estimator import Estimate, Estimator, FrozenProbes
from divflow.divergence.exact import Exact
from divflow.divergence.field import (
    Field,
    FieldError,
    Linearization,
    as_time,
    checked_state,
    event_size,
    linearize_field,
)
from divflow.divergence.mean_jacobian import Matrices, MeanJacobianCurve, of_batch, of_states
from divflow.divergence.plan import Plans
from divflow.divergence.state import state_of

__all__ = ["ControlVariate"]

# Dimensions up to which a matrix for every time fits in memory.
_MOST_DIMENSIONS = 4096
_CURVES: Plans[MeanJacobianCurve] = Plans(size=8)

References = int | Tensor | MeanJacobianCurve


@dataclass(frozen=True, eq=False)
class ControlVariate(Estimator):
    """Another estimator, of what a matrix C of known trace leaves of the Jacobian; unbiased for any C.

        tr J = tr C + E[v^T (J - C) v]

    C(t) is the mean Jacobian of reference samples at time t, so that the variance counts only how a sample differs from
    them: for Rademacher probes it is `2 * sum_{i != j} S_ij^2` with S the symmetric part of J - C. The probes are
    independent of C, which may therefore depend on the very samples that are estimated: that is no bias. Standard errors
    are those of the rest, all that is estimated.

    **References of the batch** (a number) cost `references * D / k` products a sample and no evaluation of the field:
    each sample gives a few rows of its own Jacobian, the next sample the next rows, so that every row of C is the mean
    over `references` samples at least. Where they are the whole batch the exact divergence costs no more, and is what
    is returned.

    **Given references** (a tensor) cost one matrix product a sample, once C is known. A flow carries them along its
    trajectories, takes C at 15 times, again only after its parameters have changed, and interpolates linearly between
    them.

    **Gradients** are unbiased, and as noisy as the wrapped estimator's, since C is a constant: it is for evaluation. (With
    its graph, at equal numbers of products, it lowered their variance 3.9 times against two probes on a fresh network,
    and raised it 1.5 times on a trained one: digits, D = 64, batches of 256.)

    Args:
        estimator: `Hutchinson`, `HutchPlusPlus`, `XTrace`, or another whose `freeze` returns a `FrozenProbes`.
        references: how many samples of each batch to take; or samples `(r, *event)` of a flow's data (where there is no
            flow, states at the time of the call).

    Raises:
        ValueError: an estimator that is not stochastic, or less than one reference.
        FieldError: references of another event shape; by a call, states of more than 4,096 dimensions.

    Example:
        >>> from divflow.divergence import Hutchinson, divergence
        >>> matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> estimator = ControlVariate(Hutchinson(), references=torch.zeros(1, 2))
        >>> divergence(lambda t, x: x @ matrix.T, 0.0, torch.ones(3, 2), estimator)  # J = C: nothing is left
        tensor([5., 5., 5.])
    """

    estimator: Estimator
    references: References = 16
    stochastic = True

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, Estimator) or not self.estimator.stochastic:
            raise ValueError(
                f"a control variate is for a stochastic estimator, such as Hutchinson(), but got {self.estimator!r}"
            )
        if isinstance(self.references, Tensor):
            if checked_state(self.references).numel() == 0:
                raise FieldError(
                    f"references must hold one sample at least, but have shape {tuple(self.references.shape)}"
                )
        elif not isinstance(self.references, MeanJacobianCurve):
            check_count("references, unless they are samples,", self.references)
            object.__setattr__(self, "references", int(self.references))

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """The value, the estimate, and its standard error (None where the wrapped estimator can't tell)."""
        return self.freeze(x, generator).estimate(g, t, x)

    def freeze(self, x: Tensor, generator: Generator | None = None) -> Estimator:
        """Draw the probes for batches of x's shape once; C is that of the field, time and batch of each call."""
        self._check(x)
        return _Controlled(self.estimator.freeze(x, generator), self.references, 1)

    def along(self, x: Tensor, bundles: Sequence[int], generator: Generator | None = None) -> Sequence[Estimator]:
        """The wrapped estimator's, with a matrix C for each time of a bundle."""
        self._check(x)
        parts = self.estimator.along(x, bundles, generator)
        return [_Controlled(part, self.references, times) for part, times in zip(parts, bundles, strict=True)]

    def prepare(self, g: Field, x: Tensor, trajectories: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Estimator:
        """With the mean Jacobian of given references along a flow, which is kept until the field's parameters change."""
        if not isinstance(self.references, Tensor):
            return self
        self._check(x)
        circumstances = self, x.dtype, x.device, _version(g)
        curve = _CURVES.get(g, *circumstances)
        if curve is None:
            with torch.no_grad():
                times, states = trajectories(self.references.detach().to(x))
                curve = MeanJacobianCurve(
                    times, torch.stack([of_states(g, t, part) for t, part in zip(times, states, strict=True)])
                )
            _CURVES.keep(curve, g, *circumstances)
        return replace(self, references=curve)

    def _check(self, x: Tensor) -> None:
        size = event_size(checked_state(x))
        if size > _MOST_DIMENSIONS:
            raise FieldError(
                f"a control variate keeps a matrix of D x D numbers for each time, for D up to {_MOST_DIMENSIONS:,}, but "
                f"x has D = {size:,}; use {self.estimator!r} by itself"
            )
        if isinstance(self.references, Tensor) and self.references.shape[1:] != x.shape[1:]:
            raise FieldError(
                f"references are samples of x's event shape {tuple(x.shape[1:])}, one a row, but have shape "
                f"{tuple(self.references.shape)}; pass (r, *event), or the number of samples of each batch to take"
            )


@dataclass(frozen=True, eq=False)
class _Controlled(Estimator):
    """The estimator for one bundle of times: `estimator` was drawn for it, unless it draws for each call."""

    estimator: Estimator
    references: References
    times: int
    frozen = True

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """The value, the estimate and its standard error; `generator` is for what was not drawn before."""
        x = checked_state(x)
        t = as_time(t, x)
        drawn = self.estimator if self.estimator.frozen else self.estimator.freeze(x, generator)
        if isinstance(self.references, int) and len(x) <= self.references * self.times:
            return Exact().estimate(g, t, x)
        if not isinstance(drawn, FrozenProbes):
            return drawn.estimate(g, t, x)  # exact, since it has more products than there are dimensions
        drawn.check(x)
        field = linearize_field(g, t, x)
        with torch.autocast(x.device.type, enabled=False):
            matrices = self._matrices(field, g, t, x)
            rest = drawn.from_products(_Rest(field, matrices), x)
            traces = matrices.diagonal(dim1=1, dim2=2).sum(dim=1).repeat_interleave(len(x) // len(matrices))
        samples = None if rest.samples is None else rest.samples + traces
        return Estimate(field.value, rest.divergence + traces, rest.standard_error, samples)

    def _matrices(self, field: Linearization, g: Field, t: Tensor, x: Tensor) -> Matrices:
        if isinstance(self.references, int):
            return of_batch(field, x, self.times, self.references)
        if isinstance(self.references, Tensor):
            return of_states(g, t.detach().mean(), self.references.detach().to(x))[None]
        # One time for each part of the batch: any other C than that of a sample's own time is as unbiased.
        return self.references.at(t.reshape(-1)[:: max(1, t.numel() // self.times)])


class _Rest:
    """Products with what a matrix for each time leaves of the Jacobian."""

    def __init__(self, field: Linearization, matrices: Matrices) -> None:
        self.value, self._field, self._matrices = field.value, field, matrices

    def pullback(self, vectors: Tensor, constant: bool = False) -> Tensor:
        """v^T (J - C) for every vector v, `(products, k, *event)`."""
        times, size = self._matrices.shape[:2]
        by_time = vectors.to(self._matrices.dtype).reshape(len(vectors), times, -1, size)
        known = (by_time @ self._matrices).view_as(vectors).to(vectors.dtype)
        return self._field.pullback(vectors, constant) - known


def _version(g: Field) -> Hashable:
    """Another after a field's parameters or buffers were changed; a C of others would only be a worse one."""
    parameters = g.parameters() if isinstance(g, nn.Module) else ()
    # A field that is made anew for each call tells what it is made of (see `Plans`).
    parts = getattr(g, "divflow_identity", (g,))
    return tuple(state_of(part) for part in parts), tuple(state_of(parameter) for parameter in parameters)
