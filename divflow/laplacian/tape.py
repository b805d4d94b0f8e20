"""Following a function as it is evaluated: how derivatives are carried through each of its operations.

The tape is made once, with the values; jets are sent along it afterwards, as many at a time as memory allows.
"""

import contextlib
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from divflow.divergence.layered import NoRule
from divflow.divergence.layered.operation import (
    HOOKS,
    METADATA,
    Operation,
    described,
    name_of,
    saved_tensors_hook,
    saved_whole,
    tensors_in,
    version,
)
from divflow.laplacian.jet import Jet
from divflow.verification.graph import graph_of

__all__ = ["Push", "Rule", "Tape", "at_places"]

_NOTHING = contextlib.nullcontext()

Push = Callable[..., Jet]
Rule = Callable[["Tape", Operation], Any]


class _Step(NamedTuple):
    """A value: the steps that it is made from, and how their jets give its own."""

    sources: tuple[int, ...]
    push: Push
    shape: torch.Size


class _Known(NamedTuple):
    """A tensor that depends on x: its step, or why there is none."""

    tensor: Tensor
    step: int | None
    version: int
    reason: str = ""


def _never() -> Jet:
    """The push of a root, whose jet is given."""
    raise AssertionError("a root is made from nothing")


class Tape(TorchFunctionMode):
    """While it is entered, every torch function applied to a value that depends on the roots adds a step.

    The tensors themselves stay plain, so the function notices nothing. What has no rule is evaluated as ever, and of
    its result only that it depends on the roots is known.

    Args:
        roots: the tensors to start from.
        rules: by the name of the operation.
        differentiable: whether values keep their graph.
        verify: called with each operation and those of its tensors that depend on the roots, before its rule is
            applied; raises `NoRule` where the rule is wrong.

    Attributes:
        signature: operations, shapes and options. Two evaluations of one signature have the same structure.
        widest: the number of elements of the largest value made from the roots.
    """

    def __init__(
        self,
        roots: Sequence[Tensor],
        rules: Mapping[str, Rule],
        differentiable: bool,
        verify: Callable[[Operation, list[Tensor]], None] | None = None,
    ) -> None:
        super().__init__()
        self.differentiable, self._rules, self._verify = differentiable, rules, verify
        self.signature: list[tuple[Hashable, ...]] = []
        self.widest = 0
        self._starts = {root.grad_fn for root in roots if root.grad_fn is not None}
        self._hook = saved_tensors_hook()
        self._steps: list[_Step] = []
        self._known: dict[int, _Known] = {}
        self._constants: list[Tensor] = []
        self._roots = len(roots)
        for root in roots:
            self.learn(root, [], _never)
            if not differentiable:
                root.requires_grad_()

    def learn(self, value: Tensor, operands: Sequence[Tensor], push: Push) -> Tensor:
        """Remember how the jets of some operands give that of a value."""
        if value.is_complex():
            raise NoRule("complex numbers")
        self._steps.append(_Step(tuple(map(self._step, operands)), push, value.shape))
        self._known[id(value)] = _Known(value, len(self._steps) - 1, version(value))
        self.widest = max(self.widest, value.numel())
        return value

    def alias(self, value: Tensor, operand: Tensor) -> Tensor:
        """Remember that a value is another one, or a copy."""
        self._known[id(value)] = _Known(value, self._step(operand), version(value))
        return value

    def depends(self, tensor: object) -> bool:
        """Whether a tensor is known to depend on the roots."""
        return id(tensor) in self._known

    def _step(self, value: Tensor) -> int:
        known = self._known[id(value)]
        if known.version != version(value):
            raise NoRule("a change in place through another view")
        if known.step is None:
            raise NoRule(known.reason)
        return known.step

    def structure(self, output: Tensor) -> Hashable:
        """What was done to the roots to arrive at an output.

        Raises:
            NoRule: it is not known.
        """
        goal = self._step(output) if self.depends(output) else None
        return tuple(self.signature), tuple(step.sources for step in self._steps), goal

    def carry(self, output: Tensor, seeds: Sequence[Jet]) -> Jet | None:
        """The jet of an output for jets of the roots; None if it does not depend on them.

        Raises:
            NoRule: it is not known.
        """
        if not self.depends(output):
            return None
        goal = self._step(output)
        last = {goal: goal}
        for step in range(goal, self._roots - 1, -1):
            if step in last:
                for source in self._steps[step].sources:
                    last.setdefault(source, step)
        jets = dict(enumerate(seeds))
        for step in range(self._roots, goal + 1):
            if step in last:
                sources, push, _ = self._steps[step]
                try:
                    jets[step] = push(*(jets[source] for source in sources))
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
                    raise NoRule(f"its derivatives fail: {error}".splitlines()[0]) from error
                for source in {source for source in sources if last[source] == step}:
                    jets.pop(source, None)
        return jets[goal].expand(self._steps[goal].shape)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Evaluate, and apply the rule of the operation where a root takes part; within a checkpoint, too."""
        with saved_whole() if saved_tensors_hook() is not self._hook else _NOTHING:
            return self._evaluated(func, args, kwargs or {})

    def _evaluated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        tensors: list[Tensor] = []
        if name in METADATA:
            return func(*args, **kwargs)
        rule = self._rules.get(name)
        # Where there is a rule, it finds anew at every call what depends on numbers.
        summary = (name, *described((*args, kwargs) if kwargs else args, self._known, tensors, rule is None))
        operands = [*{id(tensor): tensor for tensor in tensors if self.depends(tensor)}.values()]
        if not operands or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        op = Operation(func, name, args, kwargs, tensors, summary)
        self._constants += [tensor for tensor in tensors if tensor.grad_fn is not None and not self.depends(tensor)]
        reason = f"{name} has no rule"
        if rule is not None:
            try:
                for operand in operands:
                    self._step(operand)
                if self._verify is not None:
                    self._verify(op, operands)
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
                # A rule that does not apply after all. If the function itself is wrong, the evaluation below says so.
                reason = f"the rule of {name} does not cover its arguments"
        return self._shown(op, self._unknown(op, reason))

    def _unknown(self, op: Operation, reason: str) -> Any:
        """Evaluate what has no rule."""
        with torch.set_grad_enabled(self.differentiable):
            result, touched = op.touching()
        for tensor in touched:
            self._known[id(tensor)] = _Known(tensor, None, version(tensor), reason)
        return result

    def _shown(self, op: Operation, result: object) -> object:
        """The result as the function sees it, with the operation noted."""
        outputs = tensors_in(result)
        if outputs or result is None or op.name in HOOKS:
            self.signature.append(op.summary)
        if not self.differentiable:
            # What is done to it in ways that can't be followed then leaves a graph, by which it is found out.
            for tensor in outputs:
                if self.depends(tensor) and tensor.is_leaf:
                    tensor.requires_grad_()
        return result

    def hides(self, output: Tensor) -> bool:
        """Whether a root entered by a way that torch functions do not show, such as a custom `autograd.Function`."""
        suspects = self._constants if self.depends(output) else [*self._constants, output]
        return any(
            node in self._starts or self.depends(getattr(node, "variable", None)) for node in graph_of(*suspects)
        )


def at_places(op: Operation, new: Mapping[int, Tensor]) -> Any:
    """The operation with other tensors at some places among its tensors."""
    place = itertools.count()
    return op.at(lambda tensor: new.get(next(place), tensor))
