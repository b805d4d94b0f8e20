"""Watching a field as it is evaluated: the Jacobian of every value that it computes from x."""

import contextlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from divflow.divergence.layered.decompositions import DECOMPOSED
from divflow.divergence.layered.jacobian import NoRule
from divflow.divergence.layered.operation import (
    HOOKS,
    METADATA,
    Operation,
    described,
    indices,
    name_of,
    saved_tensors_hook,
    saved_whole,
    tensors_in,
)
from divflow.divergence.layered.rules import CHOOSING, RULES, SAME_EVERYWHERE
from divflow.divergence.layered.values import Values
from divflow.divergence.layered.verify import verify_operation
from divflow.verification.graph import graph_of

__all__ = ["Trace"]

_NOTHING = contextlib.nullcontext()


# Besides elementwise functions and movements, operations through which a NaN shows what is seen, whatever the numbers.
_LOCAL = set(
    """
    linear matmul mm sum mean glu batch_norm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d pad
    avg_pool1d avg_pool2d avg_pool3d interpolate pixel_shuffle pixel_unshuffle fold softmax log_softmax layer_norm
    group_norm instance_norm rms_norm var std amax amin logsumexp __iter__
    """.split()  # noqa: SIM905 - a list of these would take a screen
)
# Elementwise ones in which it may vanish.
_HIDING = set(
    """
    where masked_fill fmax fmin nan_to_num pow float_power hypot copysign heaviside sign sgn xlogy alpha_dropout
    feature_alpha_dropout feature_dropout rrelu
    """.split()  # noqa: SIM905
)


class Trace(Values, TorchFunctionMode):
    """While it is entered, every torch function applied to a value that depends on x adds that value's Jacobian.

    The tensors themselves stay plain, so the field notices nothing. Of a value that was changed in place behind
    its back, or that an operation without a rule has made, only that it depends on x is known; the rest of the
    field is still evaluated as ever.

    Args:
        x: the point `(k, *event)`.
        differentiable: whether values and Jacobians keep their graph.
        verify: whether what is known of each operation is compared with autograd; where it differs, it is not known.

    Attributes:
        signature: what was done to x: operations, shapes and options. Two evaluations of one signature have the
            same structure.
        choices: operations of which it is not certain that a NaN shows what they see at every point: those that
            choose by bool or integer tensors, or by x's numbers, and those that are not known.
        constants: tensors that entered as constants in x and have a history.
        start: the graph's node that x comes from, None if it has none.
    """

    def __init__(self, x: Tensor, differentiable: bool, verify: bool = False) -> None:
        TorchFunctionMode.__init__(self)
        Values.__init__(self, x, differentiable)
        self.start, self._verify, self._hook = x.grad_fn, verify, saved_tensors_hook()
        self.signature: list[tuple[Hashable, ...]] = []
        self.constants: list[Tensor] = []
        self.choices: list[str] = []
        if not differentiable:
            x.requires_grad_()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Evaluate, and apply the rule of the operation where x takes part; within a checkpoint, too."""
        with saved_whole() if saved_tensors_hook() is not self._hook else _NOTHING:
            return self._evaluated(func, args, kwargs or {})

    def _evaluated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        tensors: list[Tensor] = []
        if name in METADATA:
            return func(*args, **kwargs)
        # Where there is a rule, it finds anew at every call what depends on numbers.
        numbers = name not in RULES and name not in DECOMPOSED
        summary = (name, *described((*args, kwargs) if kwargs else args, self.known, tensors, numbers))
        if not any(map(self.depends, tensors)) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name in CHOOSING:
            summary = (*summary, *indices(tensors))
        self.constants += [tensor for tensor in tensors if tensor.grad_fn is not None and not self.depends(tensor)]
        op, reason = Operation(func, name, args, kwargs, tensors, summary), f"{name} has no rule"
        rule = Trace._decomposed if name in DECOMPOSED else RULES.get(name)
        if rule is not None:
            try:
                if self._verify:
                    operands = {id(tensor): tensor for tensor in tensors if self.depends(tensor)}
                    for operand in operands.values():
                        self.terms(operand)
                    verify_operation(op, [*operands.values()], _follow, name in DECOMPOSED)
                torch.set_grad_enabled(self.differentiable)
                try:
                    result = rule(self, op)
                finally:
                    torch.set_grad_enabled(True)
                return self._shown(op, result)
            except NoRule as error:
                reason = str(error)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
                # A rule that does not apply after all. If the field itself is wrong, the evaluation below says so.
                reason = f"the rule of {name} does not cover its arguments"
        with torch.set_grad_enabled(self.differentiable):
            result, touched = op.touching()
        for tensor in touched:
            self.refuse(tensor, reason)
        return self._shown(op, result)

    def _decomposed(self, op: Operation) -> object:
        """Follow it through simpler operations, which the trace sees one by one."""
        for tensor in filter(self.depends, op.tensors):
            self.terms(tensor)
        with torch.enable_grad(), self:
            return DECOMPOSED[op.name](*op.args, **op.kwargs)

    def _shown(self, op: Operation, result: object) -> object:
        """The result as the field sees it, with the operation noted."""
        outputs = [result] if isinstance(result, Tensor) else tensors_in(result)
        name = op.name.rstrip("_") if not op.name.startswith("_") else op.name
        if not (name in _LOCAL or (name in SAME_EVERYWHERE and name not in _HIDING) or _is_power(op)) or not all(
            tensor.is_floating_point() and tensor.layout == torch.strided for tensor in op.tensors + outputs
        ):
            self.choices.append(op.name)
        if outputs or result is None or op.name in HOOKS:
            self.signature.append(op.summary)
        if not self.differentiable:
            # What is done to it in ways that can't be followed then leaves a graph, by which it is found out.
            for tensor in outputs:
                if self.depends(tensor) and tensor.is_leaf:
                    tensor.requires_grad_()
        return result

    def hides(self, output: Tensor) -> bool:
        """Whether x entered by a way that torch functions do not show, such as a custom `autograd.Function`."""
        suspects = self.constants if self.depends(output) else [*self.constants, output]
        return any(node is self.start or self.depends(getattr(node, "variable", None)) for node in graph_of(*suspects))


def _follow(state: Tensor, function: Callable[[], Any]) -> tuple[Any, Values]:
    trace = Trace(state, differentiable=True)
    with trace:
        return function(), trace


def _is_power(op: Operation) -> bool:
    """Of a number other than zero, whose derivative is zero nowhere but at a point."""
    return op.name == "pow" and len(op.args) == 2 and not isinstance(op.args[1], Tensor) and op.args[1] != 0
