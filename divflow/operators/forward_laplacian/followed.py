"""A scalar function of each sample evaluated once, with what it did to its state."""

import contextlib
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from divflow.errors import FieldError
from divflow.operators.field import AtTime
from divflow.operators.forward_laplacian.jet import Jet
from divflow.operators.forward_laplacian.reader import JetReader
from divflow.operators.linearization import Linearization, linearize
from divflow.tape import NoRule, Tape
from divflow.tape.verify import verifier
from divflow.verification.watch import watch

__all__ = ["Followed", "Scalar", "SeveralNumbersError", "evaluated", "one_number_a_sample"]

Scalar = Callable[[Tensor, Tensor], Tensor]
"""f(t, x) -> (k,), one number a sample."""


class SeveralNumbersError(FieldError):
    """A function returns several numbers per sample where one is needed.

    Attributes:
        shape: of its value.
    """

    shape: torch.Size


class Followed(NamedTuple):
    """A function evaluated once.

    Attributes:
        point: the state, of which it was given a copy that it may write to.
        output: what it returned, maybe complex.
        tape: of what it did.
        reader: of the tape.
        create_graph: whether results keep theirs.
    """

    point: Tensor
    output: Tensor
    tape: Tape
    reader: JetReader
    create_graph: bool

    def structure(self) -> Hashable:
        """What was done to the state, equal for evaluations that need not be verified twice.

        Raises:
            NoRule: it is not known.
        """
        goal = self.tape.output(self.output)
        if self.output.dtype != self.point.dtype:
            raise NoRule(f"its value has {self.output.dtype}, not the state's {self.point.dtype}")
        wiring = tuple(step.sources for step in self.tape.steps)
        return tuple(self.tape.signature), wiring, goal, self.output.dtype, self.output.device

    def derivatives(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """First derivatives along m directions `(m, 1 or k, *event)`, `(m, k)`, and the sum of the second ones, `(k,)`.

        Raises:
            NoRule: they are not known.
        """
        with torch.inference_mode(False), torch.set_grad_enabled(self.create_graph):
            jet = self.reader.jet(self.tape, self.output, [Jet(directions)])
        zeros = directions.new_zeros(len(directions), *self.output.shape)
        if jet is None:
            return zeros, zeros[0]
        return jet.first, zeros[0] if jet.second is None else jet.second[0]

    def parts(self) -> list[Tensor]:
        """The output, or where it is complex its real and its imaginary part."""
        with torch.inference_mode(False), torch.enable_grad():
            return [self.output.real, self.output.imag] if self.output.is_complex() else [self.output]

    def gradient(self, part: Tensor) -> Linearization:
        """The gradient of the output, or a part of it, by autograd, ready for products with the Hessian."""
        with torch.inference_mode(False), torch.enable_grad():
            if not part.requires_grad:
                return Linearization(torch.zeros_like(self.point), self.point, self.create_graph)
            (gradient,) = torch.autograd.grad(
                part, self.point, torch.ones_like(part), create_graph=True, materialize_grads=True
            )
        return Linearization(gradient, self.point, self.create_graph)


def one_number_a_sample(value: Tensor, x: Tensor) -> Tensor:
    """Return the value of a scalar function of each sample, or raise `FieldError` unless it is `(k,)`.

    Args:
        value: of the function.
        x: states `(k, *event)`.
    """
    if isinstance(value, Tensor) and value.shape == x.shape[:1]:
        return value
    must = f"f must return one number per sample, shape ({x.shape[0]},), but returned "
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[:1] == x.shape[:1]:
        several = SeveralNumbersError(
            f"{must}a tensor of shape {tuple(value.shape)}. Select one of its outputs, such as f(x)[:, 0], or use jacobian, hessian or "
            "laplacian for all of them."
        )
        several.shape = value.shape
        raise several
    found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise FieldError(f"{must}{found}. Sum over the event dimensions, not over the samples.")


def evaluated(f: Scalar, t: Tensor, x: Tensor, products: bool, verify: bool = False, recorded: bool = True) -> Followed:
    """Evaluate, following what is done to x.

    Args:
        f: the function.
        t: time.
        x: states.
        products: whether a graph from x is needed, for the gradient by autograd.
        verify: whether every operation is compared with autograd.
        recorded: whether what is done to x is followed.
    """
    at_time = AtTime(f, t)
    watcher = watch(at_time, x)
    products = products or watcher is not None
    differentiable, wanted = products or torch.is_grad_enabled(), torch.is_grad_enabled()
    seen: list[tuple[Tensor, Tensor, Tape, JetReader]] = []

    def followed(z: Tensor) -> Tensor:
        own = z.clone()  # which f may write to: what was written to is another in the graph
        reader = JetReader()
        tape = Tape([own], reader, differentiable, verifier(JetReader) if verify else None)
        with tape.recording if recorded else contextlib.nullcontext():
            output = at_time(own) if watcher is None else watcher(own)
        tape.require_whole()
        seen.append((z, output, tape, reader))
        return output

    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
        at = linearize(followed, x, one_number_a_sample, products, watched=watcher or False)
    return Followed(*seen[0], create_graph=wanted and at.create_graph)
