"""What is known of the values that a field computes from x: their Jacobians."""

from torch import Tensor

from divflow.divergence.layered.jacobian import Base, NoRule, Term
from divflow.divergence.layered.operation import version

__all__ = ["Values"]


class _Known:
    """A value computed from x: its terms, or why there are none."""

    __slots__ = ("reason", "tensor", "terms", "version")

    def __init__(self, tensor: Tensor, terms: list[Term] | None, reason: str = "") -> None:
        self.tensor, self.terms, self.reason, self.version = tensor, terms, reason, version(tensor)


class Values:
    """The values computed from x, by identity, each with its Jacobian or the reason why that is not known.

    Args:
        x: the point `(k, *event)`.
        differentiable: whether values and Jacobians keep their graph.

    Attributes:
        batch: k.
        multiplications: of the linear maps, for the whole batch.
        elements: of the values made from x.
    """

    def __init__(self, x: Tensor, differentiable: bool) -> None:
        self.batch, self.differentiable = x.shape[0], differentiable
        self.multiplications = self.elements = 0
        self.known: dict[int, _Known] = {}
        self.learn(x, [Term(Base(x.shape[1:].numel()))])

    def learn(self, value: Tensor, terms: list[Term]) -> Tensor:
        """Remember a value's Jacobian."""
        if value.is_complex():
            raise NoRule("complex numbers")
        if value.ndim == 0 or value.shape[0] != self.batch:
            raise NoRule(f"a value of shape {tuple(value.shape)}, without the batch's dimension,")
        self.known[id(value)] = _Known(value, terms)
        self.elements += value.numel()
        return value

    def refuse(self, value: Tensor, reason: str) -> None:
        """Remember that a value depends on x in a way that is not known."""
        self.known[id(value)] = _Known(value, None, reason)
        self.elements += value.numel()

    def depends(self, tensor: Tensor | None) -> bool:
        """Whether a tensor is known to depend on x."""
        return id(tensor) in self.known

    def terms(self, value: Tensor) -> list[Term]:
        """The Jacobian of a value: no terms for a constant.

        Raises:
            NoRule: it has none.
        """
        known = self.known.get(id(value))
        if known is None:
            return []
        if known.version != version(value):
            raise NoRule("a change in place through another view")
        if known.terms is None:
            raise NoRule(known.reason)
        return known.terms
