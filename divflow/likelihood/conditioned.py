"""A velocity with its context bound: the field g(t, x) that is integrated."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from divflow.divergence.exact.conditioned import Conditioned
from divflow.divergence.exact.own import OwnDivergence, own_divergence
from divflow.operators.context import Context, context_rows, mapped, named_tensors, repeated
from divflow.operators.field import called
from divflow.solver.captured import is_differentiated, substituted

__all__ = ["ConditionedField"]


class ConditionedField(Conditioned):
    """The field `g(t, x) = velocity(t, x)`, or `velocity(t, x, context)`, which gets a copy of the context.

    Args:
        velocity: a module or function.
        context: a tensor `(k, ...)`, or a tree of tensors, with one row per sample, or None.
        sample_times: whether the velocity takes one time per sample, so that several times fit one batch.

    Attributes:
        context: the context.
        sample_times: as above.
    """

    def __init__(self, velocity: Callable[..., Tensor], context: Context | None, sample_times: bool = False) -> None:
        super().__init__(velocity, context)
        self.sample_times = sample_times
        self._solved: dict[str, Tensor] = {}

    @property
    def velocity(self) -> Callable[..., Tensor]:
        """The module or function."""
        return self.g

    @property
    def value_and_divergence(self) -> OwnDivergence | None:
        """The velocity's own divergence, if it has one: `value_and_divergence(t, x)`, or `(t, x, context)`."""
        own = own_divergence(self.velocity)
        return (
            own if own is None or (self.context is None and not is_differentiated()) else super().value_and_divergence
        )

    def call(self, function: Callable[..., Any], t: Tensor, x: Tensor) -> Any:
        """Call a function of the velocity's with the tensors of the solve."""
        context = mapped(lambda leaf: substituted(leaf).clone(), self.context)
        with self._as_solved():
            return called(function, t, x, *(() if self.context is None else (context,)))

    @property
    def finest_scale(self) -> Callable[[Tensor], Tensor] | None:
        """The size of the finest details of the state at a time t `()`, if the velocity has a method of this name."""
        scale = getattr(self.velocity, "finest_scale", None)
        return scale if callable(scale) else None

    def _of_rows(self, rows: list[int]) -> "ConditionedField":
        return ConditionedField(self.velocity, context_rows(self.context, rows), self.sample_times)

    def repeat(self, times: int) -> "ConditionedField":
        """Return the field for `times` copies of the batch, one after another."""
        if self.context is None or times == 1:
            return self
        return ConditionedField(self.velocity, repeated(self.context, times), self.sample_times)

    def differentiable_tensors(self) -> list[Tensor]:
        """List what an adjoint differentiates in: the parameters, and the tensors of the context that require grad.

        The adjoint evaluates the velocity with the tensors that the module has now, which `torch.func.functional_call` removes
        before the adjoint is solved.
        """
        tensors = [*self.parameters(), *(leaf for _, leaf in named_tensors(self.context))]
        if isinstance(self.velocity, nn.Module):
            self._solved = _tensors_of(self.velocity)
        return list({id(tensor): tensor for tensor in tensors if tensor.requires_grad}.values())

    @contextlib.contextmanager
    def _as_solved(self) -> Iterator[None]:
        """Give the velocity the tensors of the solve."""
        velocity = self.velocity
        if not (self._solved and isinstance(velocity, nn.Module) and is_differentiated()):
            yield
            return
        now = _tensors_of(velocity)
        changed = {name: tensor for name, tensor in self._solved.items() if now.get(name) is not tensor}
        _put(velocity, changed)
        try:
            yield
        finally:
            _put(velocity, {name: now[name] for name in changed if name in now})


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set tensors without a registration, which would refuse anything but a `Parameter`."""
    for name, tensor in tensors.items():
        place, _, key = name.rpartition(".")
        owner = module.get_submodule(place)
        (owner._parameters if key in owner._parameters else owner._buffers)[key] = tensor  # type: ignore[assignment]
