"""Exact divergence of networks of linear maps and elementwise functions, for the price of about one probe.

With linear maps W, the same for the whole batch, and elementwise functions of derivatives s, one a sample, a path
through the network has the Jacobian W_3 diag(s_2) W_2 diag(s_1) W_1, whose trace is cyclic:

    tr(W_3 S_2 W_2 S_1 W_1) = s_2^T (W_2 * (W_1 W_3)^T) s_1        (* elementwise)

One H x H matrix serves the whole batch: the divergence costs one more matrix product than the value, whatever D is.
Any callable is followed (`trace`), by one rule an operation (`rules`); the Jacobian is kept as a sum of products
(`jacobian`), whose paths from output to input (`paths`) have traces in closed form (`contract`), or go through a place
where the network is cut (`cuts`), such as the mean and the variance of a layer normalization, chosen by cost (`choose`).
"""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from divflow.divergence.estimator import accumulation_dtype
from divflow.divergence.field import (
    AtTime,
    Field,
    Linearization,
    checked_value,
    event_size,
    flatten_event,
    linearize,
)
from divflow.divergence.layered import contract
from divflow.divergence.layered.choose import choose, cost
from divflow.divergence.layered.contract import Contraction
from divflow.divergence.layered.jacobian import NoRule, apply
from divflow.divergence.layered.trace import Trace
from divflow.divergence.layered.verify import require_equal
from divflow.verification.watch import Watch

__all__ = ["Contraction", "Followed", "NoRule", "follow"]


# The dimensions up to which a sample's whole Jacobian is formed, once, to check the trace.
_LARGEST_JACOBIAN = 2**12


class Followed(NamedTuple):
    """A field evaluated once at a point, with what is known of its Jacobian there.

    Attributes:
        field: the value.
        output: the tensor that the field returned.
        trace: of the evaluation.
    """

    field: Linearization
    output: Tensor
    trace: Trace

    @property
    def signature(self) -> Hashable:
        """Equal for evaluations of the same structure."""
        return tuple(self.trace.signature)

    @property
    def structure(self) -> Hashable:
        """The signature without the size of the batch."""
        return tuple(
            (name, *map(_without_batch, rest)) for name, *rest in self.trace.signature if name not in _RESHAPES
        )

    def hides(self) -> bool:
        """Whether x entered by a way that torch functions do not show."""
        return self.trace.hides(self.output)

    def contraction(self) -> Contraction:
        """How the trace of the Jacobian is taken.

        Raises:
            NoRule: the Jacobian is not known.
        """
        network = choose(self.trace.terms(self.output), self.trace.batch)
        with torch.inference_mode(False), torch.set_grad_enabled(self.field.create_graph):
            return contract.contraction(network, event_size(self.output))

    def cost(self, contraction: Contraction) -> float:
        """Multiplications that the trace takes, and what takes as long as them."""
        return cost(contraction.network, self.trace.batch)

    def divergence(self, contraction: Contraction, chunk_size: int | None) -> Tensor:
        """The exact divergence, `(k,)`."""
        like = self.output.new_empty((), dtype=accumulation_dtype(self.field.value))
        with torch.inference_mode(False), torch.set_grad_enabled(self.field.create_graph):
            divergence = contract.trace(contraction, self.trace.batch, like, chunk_size)
        return divergence if self.field.create_graph else divergence.detach()

    def verify(self, contraction: Contraction) -> None:
        """Compare what is known of the Jacobian with autograd, and the trace with that of one sample's Jacobian.

        The products u^T (J v) and (u^T J) v must agree for two random vectors. A dependence on x that torch
        functions do not show (a custom `autograd.Function`, scripted code) is found in the graph, whatever the
        numbers are: those of a last layer of zeros would hide it.

        Raises:
            NoRule: they disagree.
        """
        if self.hides():
            raise NoRule("a part is hidden from torch functions, as a custom autograd.Function is")
        value, terms = self.field.value.detach(), self.trace.terms(self.output)
        dtype, value = self.output.dtype, value.to(accumulation_dtype(value))
        noise, size = torch.Generator().manual_seed(0), event_size(value)
        u, v = (torch.randn(value.shape, generator=noise, dtype=torch.float64).to(value) for _ in range(2))
        with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
            known = apply(terms, size, flatten_event(v)) * flatten_event(u)
            true = flatten_event(self.field.pullback(u[None].to(self.field.value.dtype))[0] * v)
            bound = apply(terms, size, flatten_event(v), magnitudes=True) * flatten_event(u).abs()
            require_equal(known, true, dtype, "the Jacobian is another", bound)
            if size <= _LARGEST_JACOBIAN:
                basis = torch.eye(size).to(value)
                entries = apply(terms, size, basis, sample=0).diagonal()
                bound = apply(terms, size, basis, sample=0, magnitudes=True).diagonal()
                trace = self.divergence(contraction, None)[:1, None].to(value)
                require_equal(entries[None], trace, dtype, "its trace does not add up in this precision", bound[None])


# Their arguments are shapes.
_RESHAPES = {"view", "reshape", "expand", "repeat", "tile", "broadcast_to", "unflatten"}


def _without_batch(summary: Hashable) -> Hashable:
    if isinstance(summary, torch.Size):
        return summary[1:]
    return tuple(map(_without_batch, summary)) if isinstance(summary, tuple) else summary


def follow(
    g: Field, t: Tensor, x: Tensor, products: bool, verify: bool = False, watcher: Watch | None = None
) -> Followed:
    """Evaluate a field at (t, x), following what it does to x.

    Args:
        g: the field.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`.
        products: whether the value's graph from x is needed, for `Followed.verify` and for products with the Jacobian.
        verify: whether what is known of each operation is compared with autograd.
        watcher: of this evaluation, which then needs `products`.
    """
    differentiable = products or torch.is_grad_enabled()
    at = AtTime(g, t) if watcher is None else watcher
    seen: list[tuple[Tensor, Trace]] = []

    def followed(z: Tensor) -> Tensor:
        trace = Trace(z, differentiable, verify)
        with trace:
            output = at(z)
        seen.append((output, trace))
        return output

    return Followed(linearize(followed, x, checked_value, products, watched=watcher or False), *seen[0])
