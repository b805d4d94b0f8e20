"""A velocity with its context bound: the field g(t, x) that is integrated."""

from collections.abc import Callable

from torch import Tensor, nn

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

    @property
    def divflow_identity(self) -> tuple[object, ...]:
        """What this field is, for plans to be kept: not the context's numbers."""
        return self.velocity, self.context is None

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The velocity at time t, `()` or `(k,)`, and state x, in x's dtype."""
        value = self.velocity(t, x) if self.context is None else self.velocity(t, x, self.context.clone())
        return checked_value(value, x)

    @property
    def value_and_divergence(self) -> OwnDivergence | None:
        """The velocity's own divergence, if it has one: `value_and_divergence(t, x)`, or `(t, x, context)`."""
        own, context = own_divergence(self.velocity), self.context
        return own if own is None or context is None else lambda t, x: own(t, x, context.clone())

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
        """What an adjoint differentiates in: the parameters, and a context that requires grad."""
        tensors: list[Tensor] = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.context is not None and self.context.requires_grad:
            tensors.append(self.context)
        return tensors


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
