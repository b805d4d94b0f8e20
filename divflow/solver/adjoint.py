"""The adjoint of a solve: torchdiffeq's, of the function that was solved, in all tensors that it depends on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from divflow.solver.captured import Dependences

__all__ = ["Adjoint"]

State = Tensor | tuple[Tensor, ...]
Evaluate = Callable[[Tensor, State], State]


class Adjoint:
    """A field in one solve and its adjoint, which must see the same function of the same tensors.

    The field is evaluated once to find what it depends on, at the start of the solve, which begins with that evaluation.

    Args:
        evaluate: the field.
        state: at the start.
        time: of the start.
        known: tensors that it is known to depend on.
        refuse: makes an error of a reason.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        state: State,
        time: Tensor,
        known: Sequence[Tensor],
        refuse: Callable[[str], Exception],
    ) -> None:
        self._evaluate, self._refuse = evaluate, refuse
        self._start = time.detach(), _mapped(Tensor.detach, state)
        fresh_time, fresh = time.detach().requires_grad_(), _mapped(_leaf, state)
        self._dependences = Dependences(
            lambda: _parts(evaluate(fresh_time, fresh)), known, [fresh_time, *_parts(fresh)]
        )
        values = tuple(part.detach() for part in self._dependences.value)
        self._first: State | None = values if isinstance(state, tuple) else values[0]
        self._last: tuple[Tensor, State, State] | None = None
        self._constant = False
        self._dtype, device = _parts(state)[0].dtype, _parts(state)[0].device
        autocast = torch.is_autocast_enabled(device.type)
        self._precision = torch.get_autocast_dtype(device.type) if autocast else self._dtype
        for tensor in self._dependences.outer:
            if tensor.device != device:
                raise refuse(
                    f"the field depends on a tensor of shape {tuple(tensor.shape)} on {tensor.device}, but the state is on "
                    f"{device}. gradient='adjoint' needs both on one device; gradient='direct' does not."
                )
        found = self._dependences
        for tensor in [*found.unseen, *(leaf for leaf in found.leaves if leaf.is_complex())]:
            if tensor.is_complex() or found.entangled:
                raise refuse(
                    f"an operation that can't be seen, such as a custom autograd Function, takes a tensor of shape "
                    f"{tuple(tensor.shape)} that is complex, or was computed from parameters that the field uses itself. "
                    "Compute it inside the field, or use gradient='direct'."
                )

    def solve(self, run: Callable[[State, Tensor, tuple[Tensor, ...]], State], state: State, times: Tensor) -> State:
        """Return the solution, once differentiable in the state, the times, and all that the field depends on.

        Args:
            run: the solve and its adjoint, of leaves: state, times, and what else is differentiated in.
            state: at the start.
            times: of the solution.
        """
        inner_state = _mapped(lambda part: _leaf(part, part.requires_grad), state)
        inner_times = _leaf(times, times.requires_grad)
        inner = [*_parts(inner_state), inner_times, *self._dependences.inner]
        outer = [*_parts(state), times, *self._dependences.outer]
        self._constant = not any(tensor.requires_grad for tensor in outer)

        def solution() -> tuple[Tensor, ...]:
            return _parts(run(inner_state, inner_times, tuple(self._dependences.inner)))

        found = _Boundary.apply(solution, inner, len(self._dependences.outer), self._refuse, *outer)
        return found if isinstance(state, tuple) else found[0]

    def forward(self, t: Tensor, state: State) -> State:
        """Evaluate the field in the solve."""
        first, self._first = self._first, None
        time, start = self._start
        if first is not None and torch.equal(t, time) and all(map(torch.equal, _parts(state), _parts(start))):
            value = first
        else:
            # Without anything to differentiate, no graph is made.
            with torch.set_grad_enabled(self._constant):
                value = self._evaluate(t, state)
            if self._constant:
                self._check(t, state, value)
                value = _mapped(Tensor.detach, value)
        self._last = t, state, value
        return value

    def backward(self, t: Tensor, state: State) -> State:
        """Evaluate the field in the adjoint.

        Parameters of another dtype convert torchdiffeq's augmented state to theirs; here it is converted back.
        """
        if self._last is not None:
            self._compare(*self._last)
            self._last = None
        wide = _parts(state)[0].dtype
        if wide != self._dtype:
            t = t.to(self._start[0].dtype)
            state = _mapped(lambda part: part.to(self._dtype), state)
        with self._dependences.in_place():
            value = self._evaluate(t, state)
        self._check(t, state, value)
        return value if wide == self._dtype else _mapped(lambda part: part.to(wide), value)

    def _check(self, t: Tensor, state: State, value: State) -> None:
        """Refuse a field that depends on other tensors than at the start."""
        if missed := self._dependences.missed(_parts(value), [t, *_parts(state)]):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in missed)
            raise self._refuse(
                f"at t = {float(t.detach()):.6g} the field depends on tensors of shapes {shapes}, on which it did not depend at the "
                "start. Make them parameters of its module, or use gradient='direct'."
            )

    @torch.no_grad()
    def _compare(self, t: Tensor, state: State, before: State) -> None:
        """Refuse a field whose value has changed."""
        with self._dependences.in_place():
            now = self._evaluate(t, state)
        pairs = list(zip(_parts(now), _parts(before), strict=True))
        error = torch.stack([(new - old).abs().amax() for new, old in pairs if new.numel()]).amax()
        scale = torch.stack([old.abs().amax() for _, old in pairs if old.numel()]).amax()
        if not error <= torch.finfo(self._precision).eps ** 0.4 * scale:
            raise self._refuse(
                f"evaluated again for the adjoint at t = {float(t.detach()):.6g}, the field has another value, by {float(error):.3g} of "
                f"{float(scale):.3g}: it draws random numbers, keeps a state, or was changed since. Use gradient='direct'."
            )


class _Boundary(torch.autograd.Function):
    """A result computed from leaves, as a function of the tensors that they stand for; once differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        solution: Callable[[], tuple[Tensor, ...]],
        inner: list[Tensor],
        watched: int,
        refuse: Callable[[str], Exception],
        *outer: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*outer[-watched:] if watched else ())  # raises if one was written to
        ctx.inner, ctx.complex, ctx.refuse = inner, [tensor.is_complex() for tensor in outer], refuse
        with torch.enable_grad():
            ctx.solution = solution()
        return tuple(part.detach() for part in ctx.solution)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ctx.refuse("gradient='adjoint' is differentiable once only. Use Solver(gradient='direct').")
        _ = ctx.saved_tensors
        wanted = [tensor for tensor in ctx.inner if tensor.requires_grad]
        given = iter(torch.autograd.grad(ctx.solution, wanted, gradients, retain_graph=True, allow_unused=True))
        found = [next(given) if tensor.requires_grad else None for tensor in ctx.inner]
        return (
            None,
            None,
            None,
            None,
            *(
                torch.view_as_complex(gradient) if is_complex and gradient is not None else gradient
                for gradient, is_complex in zip(found, ctx.complex, strict=True)
            ),
        )


def _leaf(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    return tensor.detach().requires_grad_(requires_grad)


def _parts(state: State) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def _mapped(function: Callable[[Tensor], Tensor], state: State) -> State:
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)
