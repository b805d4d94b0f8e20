"""A control variate: what the Jacobians of many samples have in common is known, and only the rest is estimated."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from divflow.divergence.estimator import Estimate, Estimator, FrozenProbes
from divflow.divergence.exact import Exact
from divflow.divergence.exact.conditioned import Conditioned
from divflow.divergence.mean_jacobian import Matrices, MeanJacobianCurve, of_batch, of_states
from divflow.errors import FieldError, check_count
from divflow.operators.field import Field, as_time, checked_state, event_size
from divflow.operators.linearization import Linearization, linearize_field
from divflow.verification.kept import Plans
from divflow.verification.state import state_of

__all__ = ["ControlVariate"]

# Dimensions up to which a whole matrix for every time fits in memory, and the rank of what is kept above.
_MOST_DIMENSIONS, _RANK = 4096, 128
_CURVES: Plans[MeanJacobianCurve] = Plans(size=8)

References = int | Tensor | MeanJacobianCurve


@dataclass(frozen=True, eq=False)
class ControlVariate(Estimator):
    """Another estimator, of what a matrix C of known trace leaves of the Jacobian; unbiased for any C.

        tr J = tr C + E[v^T (J - C) v]

    C(t) is the mean Jacobian of reference samples at time t, so that the variance counts only how a sample differs from
    them: for Rademacher probes it is `2 * sum_{i != j} S_ij^2` with S the symmetric part of J - C. The probes are
    independent of C, which may therefore depend on the very samples that are estimated: that is no bias. Standard errors
    are those of the rest, all that is estimated, and as often right as the wrapped estimator's. Products that are not
    finite are no part of C.

    **References of the batch** (a number) cost `references * D / k` products a sample and no evaluation of the field:
    each sample gives a few rows of its own Jacobian, the next sample the next rows, so that every row of C is the mean
    over `references` samples at least. Where they are the whole batch the exact divergence costs no more, and is what
    is returned.

    **Given references** (a tensor) cost one matrix product a sample, once C is known. A flow carries them along its
    trajectories, takes C at 15 times, again only after its parameters have changed, and interpolates linearly between
    them.

    **Low rank.** Above 4,096 dimensions, or where `rank` says so, C is the part of the mean Jacobian in its leading
    `rank` left singular directions, found by 2 * rank products forward and as many in reverse with the references
    (Halko, Martinsson and Tropp 2011), so that a sample costs 2 * rank * D multiplications in place of D^2. Of a batch
    of k the rank is k / references at most, for one product of each kind a sample. It leaves more of the variance than
    all of C: on MNIST, D = 784, with 64 given references, a 23rd of plain probes' with all of C, and 0.24, 0.43 and 0.61
    of it at ranks 128, 64 and 32.

    **Gradients** are unbiased, and as noisy as the wrapped estimator's, since C is a constant: it is for evaluation. (With
    its graph, at equal numbers of products: on the digits, D = 64, it lowered their variance 3.9 times against two probes
    on a fresh network, and raised it 1.5 times on a trained one; on MNIST, D = 784, it raised it 1.3 and 1.6 times against
    five. Batches of 256.)

    Args:
        estimator: `Hutchinson`, `HutchPlusPlus`, `XTrace`, or another whose `freeze` returns a `FrozenProbes`.
        references: how many samples of each batch to take; or samples `(r, *event)` of a flow's data (where there is no
            flow, states at the time of the call).
        rank: of C; None for all of it up to 4,096 dimensions, and 128 above. From D on it is all of C.

    Raises:
        ValueError: an estimator that is not stochastic, or less than one reference or rank.
        FieldError: references of another event shape; for a low rank, a field whose operations have no second derivatives.

    Example:
        >>> from divflow.divergence import Hutchinson, divergence
        >>> matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> estimator = ControlVariate(Hutchinson(), references=torch.zeros(1, 2))
        >>> divergence(lambda t, x: x @ matrix.T, 0.0, torch.ones(3, 2), estimator)  # J = C: nothing is left
        tensor([5., 5., 5.])
    """

    estimator: Estimator
    references: References = 16
    rank: int | None = None
    stochastic = True

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, Estimator) or not self.estimator.stochastic:
            raise ValueError(
                f"a control variate is for a stochastic estimator, such as Hutchinson(), but got {self.estimator!r}"
            )
        if isinstance(self.references, Tensor):
            if len(checked_state(self.references)) == 0:
                raise FieldError(
                    f"references must hold one sample at least, but have shape {tuple(self.references.shape)}"
                )
        elif not isinstance(self.references, MeanJacobianCurve):
            check_count("references, unless they are samples,", self.references)
            object.__setattr__(self, "references", int(self.references))
        if self.rank is not None:
            check_count("rank, unless it is None for a rank that suits the dimensions,", self.rank)

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """The value, the estimate, and its standard error (None where the wrapped estimator can't tell)."""
        return self.freeze(x, generator).estimate(g, t, x)

    def freeze(self, x: Tensor, generator: Generator | None = None) -> Estimator:
        """Draw the probes for batches of x's shape once; C is that of the field, time and batch of each call."""
        self._check(x)
        return _Controlled(self.estimator.freeze(x, generator), self.references, 1, self._rank_for(x))

    def along(self, x: Tensor, bundles: Sequence[int], generator: Generator | None = None) -> Sequence[Estimator]:
        """The wrapped estimator's, with a matrix C for each time of a bundle."""
        self._check(x)
        parts, rank = self.estimator.along(x, bundles, generator), self._rank_for(x)
        return [_Controlled(part, self.references, times, rank) for part, times in zip(parts, bundles, strict=True)]

    def prepare(self, g: Field, x: Tensor, trajectories: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Estimator:
        """With the mean Jacobian of given references along a flow, which is kept until the field's parameters change."""
        if not isinstance(self.references, Tensor) or event_size(x) == 0:
            return self
        self._check(x)
        conditions = self, x.dtype, x.device, _version(g)
        curve = _CURVES.get(g, *conditions)
        if curve is None:
            with torch.no_grad():
                times, states = trajectories(self.references.detach().to(x))
                matrices = [of_states(g, t, part, self._rank_for(x)) for t, part in zip(times, states, strict=True)]
                curve = MeanJacobianCurve.through(times, matrices)
            _CURVES.keep(curve, g, *conditions)
        return replace(self, references=curve)

    def _rank_for(self, x: Tensor) -> int | None:
        """Of C; None for all of it."""
        size = event_size(x)
        rank = self.rank if self.rank is not None or size <= _MOST_DIMENSIONS else _RANK
        if rank is None or rank >= size:
            return None
        return max(1, min(rank, len(x) // self.references)) if isinstance(self.references, int) else rank

    def _check(self, x: Tensor) -> None:
        checked_state(x)
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
    rank: int | None
    frozen = True

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """The value, the estimate and its standard error; `generator` is for what was not drawn before."""
        x = checked_state(x)
        t = as_time(t, x)
        drawn = self.estimator if self.estimator.frozen else self.estimator.freeze(x, generator)
        references = self.references
        if event_size(x) == 0 or (
            isinstance(references, int) and len(x) <= (references * self.times if self.rank is None else 0)
        ):
            return Exact().estimate(g, t, x)
        if not isinstance(drawn, FrozenProbes):
            return drawn.estimate(g, t, x)  # exact, since it has more products than there are dimensions
        drawn.check(x)
        field = linearize_field(g, t, x, twice=isinstance(references, int) and self.rank is not None)
        with torch.autocast(x.device.type, enabled=False):
            matrices = self._matrices(field, g, t, x)
            rest = drawn.from_products(_Rest(field, matrices), x)
            traces = matrices.traces().repeat_interleave(len(x) // len(matrices))
        samples = None if rest.samples is None else rest.samples + traces
        return Estimate(field.value, rest.divergence + traces, rest.standard_error, samples)

    def _matrices(self, field: Linearization, g: Field, t: Tensor, x: Tensor) -> Matrices:
        if isinstance(self.references, int):
            return of_batch(field, x, self.times, self.references, self.rank)
        if isinstance(self.references, Tensor):
            if isinstance(g, Conditioned) and g.context is not None:
                raise FieldError(
                    "reference samples of a field with a context would need contexts of their own; take references from the batch, such as "
                    "ControlVariate(Hutchinson(), references=16)"
                )
            return of_states(g, t.detach().mean(), self.references.detach().to(x), self.rank)
        # One time for each part of the batch: any other C than that of a sample's own time is as unbiased.
        return self.references.at(t.reshape(-1)[:: max(1, t.numel() // self.times)])


class _Rest:
    """Products with what a matrix for each time leaves of the Jacobian."""

    def __init__(self, field: Linearization, matrices: Matrices) -> None:
        self.value, self._field, self._matrices = field.value, field, matrices

    def pullback(self, vectors: Tensor, constant: bool = False) -> Tensor:
        """v^T (J - C) for every vector v, `(products, k, *event)`."""
        return self._field.pullback(vectors, constant) - self._matrices.pullback(vectors)


def _version(g: Field) -> Hashable:
    """Another after a field's parameters or buffers were changed; a C of others would only be a worse one."""
    parameters = g.parameters() if isinstance(g, nn.Module) else ()
    # A field that is made anew for each call tells what it is made of (see `Plans`).
    parts = getattr(g, "divflow_identity", (g,))
    return tuple(state_of(part) for part in parts), tuple(state_of(parameter) for parameter in parameters)
