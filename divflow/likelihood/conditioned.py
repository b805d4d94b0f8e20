"""A velocity with its context bound: the field g(t, x) that is integrated."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from divflow.captured import is_differentiated, substituted
from divflow.divergence.field import FieldError, checked_value
from divflow.divergence.own import OwnDivergence, own_divergence

__all__ = ["ConditionedField", "check_context"]


class ConditionedField(nn.Module):
    """The field `g(t, x) = velocity(t, x)`, or `velocity(t, x, context)` where there is a context, of which it gets a copy.

    Attributes:
        velocity: a module or function.
        context: `(k, ...)`, one row a sample, or None.
        sample_times: whether the velocity takes one time a sample, so that several times fit one batch.
    """

    def __init__(self, velocity: Callable[..., Tensor], context: Tensor | None, sample_times: bool = False) -> None:
        super().__init__()
        self.velocity, self.context, self.sample_times = velocity, context, sample_times
        self._solved: dict[str, Tensor] = {}

    @property
    def divflow_identity(self) -> tuple[object, ...]:
        """What this field is, for plans to be kept: not the context's numbers."""
        return self.velocity, self.context is None

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The velocity at time t, `()` or `(k,)`, and state x, in x's dtype."""
        context = substituted(self.context)
        with self._as_solved():
            value = self.velocity(t, x) if context is None else self.velocity(t, x, context.clone())
        return checked_value(value, x)

    @property
    def value_and_divergence(self) -> OwnDivergence | None:
        """The velocity's own divergence, if it has one: `value_and_divergence(t, x)`, or `(t, x, context)`."""
        own = own_divergence(self.velocity)
        return own if own is None or (self.context is None and not is_differentiated()) else self._own

    def _own(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        own, context = own_divergence(self.velocity), substituted(self.context)
        assert own is not None
        with self._as_solved():
            return own(t, x) if context is None else own(t, x, context.clone())

    @property
    def finest_scale(self) -> Callable[[Tensor], Tensor] | None:
        """The size of the finest details of the state at a time t `()`, if the velocity knows it by this name."""
        scale = getattr(self.velocity, "finest_scale", None)
        return scale if callable(scale) else None

    def divflow_rows(self, rows: list[int]) -> "ConditionedField":
        """The field for some samples of the batch."""
        context = None if self.context is None else self.context[rows]
        return ConditionedField(self.velocity, context, self.sample_times)

    def repeat(self, times: int) -> "ConditionedField":
        """The field for `times` copies of the batch, one after another."""
        if self.context is None or times == 1:
            return self
        context = self.context.repeat(times, *[1] * (self.context.ndim - 1))
        return ConditionedField(self.velocity, context, self.sample_times)

    def differentiable_tensors(self) -> list[Tensor]:
        """What an adjoint differentiates in: the parameters, and a context that requires grad.

        It evaluates the velocity with the tensors that are a module's now, which `torch.func.functional_call` takes away
        before the adjoint is solved.
        """
        tensors: list[Tensor] = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.context is not None and self.context.requires_grad:
            tensors.append(self.context)
        if isinstance(self.velocity, nn.Module):
            self._solved = _tensors_of(self.velocity)
        return tensors

    @contextlib.contextmanager
    def _as_solved(self) -> Iterator[None]:
        """Within it the velocity's tensors are those of the solve."""
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
    """Without a registration, which would refuse what is no `Parameter`."""
    for name, tensor in tensors.items():
        place, _, key = name.rpartition(".")
        owner = module.get_submodule(place)
        (owner._parameters if key in owner._parameters else owner._buffers)[key] = tensor  # type: ignore[assignment]


def check_context(context: Tensor | None, x: Tensor) -> None:
    """Refuse a context that is no tensor of one row a sample.

    Raises:
        FieldError: naming its shape.
    """
    if context is not None and not isinstance(context, Tensor):
        raise FieldError(f"the context must be a tensor of one row a sample, but is a {type(context).__name__}")
    if context is not None and (context.ndim == 0 or len(context) != len(x)):
        raise FieldError(
            f"the context needs one row a sample, ({len(x)}, ...), but has shape {tuple(context.shape)}; "
            f"repeat a single one by context.expand({len(x)}, ...)"
        )
