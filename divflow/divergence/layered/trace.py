"""Watching a field as it is evaluated: the Jacobian of every value that it computes from x."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from divflow.divergence.layered.jacobian import Base, NoRule, Term
from divflow.divergence.layered.operation import Operation, described, name_of, tensors_in
from divflow.divergence.layered.rules import RULES

__all__ = ["Trace"]


# Operations that let a NaN vanish, or take numbers out of tensors.
_CHOOSING = {
    *("fmax", "fmin", "nan_to_num", "nansum", "nanmean", "nanmedian", "nanquantile", "where", "masked_fill"),
    *("masked_scatter", "item", "tolist", "numpy", "is_nonzero", "equal", "allclose", "isclose"),
    *("__bool__", "__float__", "__int__", "__index__"),
}


# What depends on shape, type and place of a tensor alone.
_METADATA = set(
    """
    shape size dim ndim ndimension numel nelement dtype device layout requires_grad is_leaf is_cuda is_floating_point
    is_complex is_contiguous stride element_size get_device __len__ grad_fn
    """.split()  # noqa: SIM905 - a list of these would take a screen
)


def _version(tensor: Tensor) -> int:
    """How often a tensor, or another view of its memory, was changed in place; inference tensors don't count."""
    return 0 if tensor.is_inference() else tensor._version


class _Known:
    """A value computed from x: its terms, or why there are none."""

    __slots__ = ("reason", "tensor", "terms", "version")

    def __init__(self, tensor: Tensor, terms: list[Term] | None, reason: str = "") -> None:
        self.tensor, self.terms, self.reason, self.version = tensor, terms, reason, _version(tensor)


class Trace(TorchFunctionMode):
    """While it is entered, every torch function applied to a value that depends on x adds that value's Jacobian.

    The tensors themselves stay plain, so the field notices nothing. Of a value that was changed in place behind
    its back, or that an operation without a rule has made, only that it depends on x is known; the rest of the
    field is still evaluated as ever.

    Args:
        x: the point `(k, *event)`.
        differentiable: whether values and Jacobians keep their graph.

    Attributes:
        signature: what was done to x: operations, shapes and options. Two evaluations of one signature have the
            same structure.
        multiplications: of the linear maps, for the whole batch.
        elements: of the values made from x.
        choices: operations that choose by bool or integer tensors, or by x's numbers, which entries are seen; at
            another point they may choose others.
        constants: tensors that entered as constants in x and have a history.
        start: the graph's node that x comes from, None if it has none.
    """

    def __init__(self, x: Tensor, differentiable: bool) -> None:
        super().__init__()
        self.batch, self.differentiable, self.start = x.shape[0], differentiable, x.grad_fn
        self.signature: list[Hashable] = []
        self.multiplications = self.elements = 0
        self.constants: list[Tensor] = []
        self.choices: list[str] = []
        self._known: dict[int, _Known] = {}
        self.learn(x, [Term(Base(x.shape[1:].numel()))])

    def learn(self, value: Tensor, terms: list[Term]) -> Tensor:
        """Remember a value's Jacobian."""
        if value.ndim == 0 or value.shape[0] != self.batch:
            raise NoRule(f"a value of shape {tuple(value.shape)}, without the batch's dimension,")
        self._known[id(value)] = _Known(value, terms)
        self.elements += value.numel()
        return value

    def depends(self, tensor: Tensor) -> bool:
        """Whether a tensor is known to depend on x."""
        return id(tensor) in self._known

    def terms(self, value: Tensor) -> list[Term]:
        """The Jacobian of a value: no terms for a constant.

        Raises:
            NoRule: it has none.
        """
        known = self._known.get(id(value))
        if known is None:
            if value.grad_fn is not None:
                self.constants.append(value)
            return []
        if known.version != _version(value):
            raise NoRule("a change in place through another view")
        if known.terms is None:
            raise NoRule(known.reason)
        return known.terms

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Evaluate, and apply the rule of the operation where x takes part."""
        name = name_of(func)
        kwargs, tensors = kwargs or {}, []
        if name in _METADATA:
            return func(*args, **kwargs)
        summary = (name, *described((*args, kwargs) if kwargs else args, self._known, tensors))
        if not any(map(self.depends, tensors)) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        op, rule, reason = Operation(func, name, args, kwargs, tensors, summary), RULES.get(name), f"{name} has no rule"
        if rule is not None:
            try:
                torch.set_grad_enabled(self.differentiable)
                try:
                    result = rule(self, op)
                finally:
                    torch.set_grad_enabled(True)
                self._note(op, result)
                return result
            except NoRule as error:
                reason = str(error)
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
                # A rule that does not apply after all. If the field itself is wrong, the evaluation below says so.
                reason = f"the rule of {name} does not cover its arguments"
        versions = [(tensor, _version(tensor)) for tensor in tensors]
        result = op()
        made = [tensor for tensor in tensors_in(result) if tensor.is_floating_point()]
        changed = [tensor for tensor, version in versions if _version(tensor) != version]
        for tensor in made + changed:
            self._known[id(tensor)] = _Known(tensor, None, reason)
            self.elements += tensor.numel()
        self._note(op, result)
        return result

    def _note(self, op: Operation, result: object) -> None:
        outputs = [result] if isinstance(result, Tensor) else tensors_in(result)
        if op.name in _CHOOSING or not all(map(Tensor.is_floating_point, op.tensors + outputs)):
            self.choices.append(op.name)
        if outputs or result is None:
            self.signature.append(op.summary)
