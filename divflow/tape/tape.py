"""A function followed as it is evaluated: every torch function applied to what depends on the roots becomes a step.

The tensors themselves stay plain, so the function notices nothing. It is recorded anew at each call: what it did is what
is read, and no graph of another call is taken for it.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node

from divflow.tape.checkpoints import require_nothing_saved, saved_tensors_hook, saved_whole
from divflow.tape.listening import Listening
from divflow.tape.opaque import EvaluatedError, opaque, price_by_entries
from divflow.tape.operation import HOOKS, METADATA, OUTSIDE, Operation, described, indices, name_of, tensors_in, version
from divflow.tape.registry import registered, rule_of
from divflow.tape.rule import NoRule, Rule, RuleError
from divflow.tape.steps import Kind, Opaque, Root, Step
from divflow.tape.table import CHOOSING, is_local

__all__ = ["Reader", "Tape"]

# Of a rule that does not apply after all.
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)


class Reader(Protocol):
    """What reads a tape: it receives each step as it is made.

    Attributes:
        curved: whether it needs second derivatives.
    """

    curved: bool

    def learn(self, number: int, step: Step, value: Tensor) -> None:
        """Note a step.

        Raises:
            NoRule: nothing can be carried through it.
        """


class _Known(NamedTuple):
    """A tensor that depends on the roots: its step, or why there is none."""

    tensor: Tensor
    step: int | None
    version: int
    reason: str = ""


class Tape:
    """A tape, which records while `recording` is entered.

    What has no rule is a step of its own, known by its graph; of what can't be that, only that it depends on the roots
    is known, and why no more.

    Args:
        roots: the tensors to start from.
        reader: told every step.
        differentiable: whether values and slopes keep their graph.
        verify: called with each operation, its rule and those of its tensors that depend on the roots, before the rule is
            applied; raises `NoRule` where the rule is wrong.

    Attributes:
        steps: of values, in the order in which they were made; the roots are the first.
        signature: what was done to the roots: operations, shapes and options. Two evaluations of one signature have the
            same structure.
        choices: operations of which it is not certain that a NaN shows what they see at every point: those that
            choose by bool or integer tensors, or by numbers of the roots, and those that are not known; noted where rules
            are verified, since they are asked for then.
        hidden: functions that torch functions do not show, as a custom `autograd.Function`.
        elements: of the values made from the roots.
        widest: the number of elements of the largest.
    """

    def __init__(
        self,
        roots: Sequence[Tensor],
        reader: Reader,
        differentiable: bool,
        verify: Callable[[Operation, Rule, list[Tensor]], None] | None = None,
    ) -> None:
        self.differentiable, self.curved = differentiable, reader.curved
        self._reader, self._verify, self._hook = reader, verify, saved_tensors_hook()
        self.steps: list[Step] = []
        self.signature: list[tuple[Hashable, ...]] = []
        self.choices: list[str] = []
        self.hidden: list[str] = []
        self.elements = self.widest = self._depth = 0
        self._known: dict[int, _Known] = {}
        self._nodes: dict[tuple[Node, int], Tensor] = {}
        self._constant_nodes: set[Node] = set()
        self._checkpoints: set[object] = set()
        for root in roots:
            self.learn(root, Root(), [])
            if not differentiable:
                root.requires_grad_()

    @property
    def recording(self) -> Listening:
        """Entered while the function is evaluated; made anew, since a mode that is kept would keep the tape alive."""
        return Listening(self)

    # What rules tell.

    def learn(self, value: Tensor, kind: Kind, operands: Sequence[Tensor]) -> Tensor:
        """Remember how a value is made from some operands, and return it."""
        if value.is_complex():
            raise NoRule("complex numbers")
        number, size = len(self.steps), value.numel()
        step = Step(kind, tuple([self.step_of(operand) for operand in operands]), value.shape)
        self._reader.learn(number, step, value)
        self.steps.append(step)
        self._keep(value, number)
        self.elements += size
        if size > self.widest:
            self.widest = size
        return value

    def alias(self, value: Tensor, operand: Tensor) -> Tensor:
        """Remember that a value has the derivatives of another one, and return it."""
        self._keep(value, self.step_of(operand))
        return value

    def depends(self, tensor: object) -> bool:
        """Whether a tensor is known to depend on the roots."""
        return id(tensor) in self._known

    def follow(self, function: Callable[[], Any]) -> Any:
        """Call a function, every operation of which is followed, as a part of one that is noted as a whole."""
        self._depth += 1
        try:
            with torch.enable_grad(), self.recording:
                return function()
        finally:
            self._depth -= 1

    def _keep(self, value: Tensor, step: int | None, reason: str = "") -> None:
        self._known[id(value)] = _Known(value, step, version(value), reason)
        if value.grad_fn is not None:
            self._nodes[value.grad_fn, value.output_nr] = value

    # What readers ask.

    def step_of(self, value: Tensor) -> int:
        """The number of a value's step.

        Raises:
            NoRule: it has none.
        """
        known = self._known[id(value)]
        if known.version != version(value):
            raise NoRule("a change in place through another view")
        if known.step is None:
            raise NoRule(known.reason)
        return known.step

    def output(self, value: Tensor) -> int | None:
        """The number of the step of what the function returned; None if it does not depend on the roots.

        Raises:
            NoRule: how it depends on them is not known.
        """
        if not self.depends(value):
            self._find(value)
        return self.step_of(value) if self.depends(value) else None

    def require_whole(self) -> None:
        """After the function: that what was evaluated within checkpoints can be computed again.

        Raises:
            CheckpointedError: it can't.
        """
        for hook in self._checkpoints:
            require_nothing_saved(hook)

    # Recording.

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate a torch function, and record it where a root takes part; within a checkpoint, too."""
        if saved_tensors_hook() is self._hook:
            return self._called(func, args, kwargs)
        self._checkpoints.add(saved_tensors_hook())
        with saved_whole():
            return self._called(func, args, kwargs)

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        tensors: list[Tensor] = []
        if name in METADATA:
            return func(*args, **kwargs)
        rule = rule_of(func, name)
        # Where there is a rule, it finds anew at every call what depends on numbers.
        summary = (name, *described((*args, kwargs) if kwargs else args, self._known, tensors, rule is None))
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        operands: dict[int, Tensor] = {}
        for tensor in tensors:
            if id(tensor) not in self._known and tensor.grad_fn is not None:
                self._find(tensor)
            if id(tensor) in self._known:
                operands[id(tensor)] = tensor
        if not operands:
            return func(*args, **kwargs)
        if name in CHOOSING:
            summary = (*summary, *indices(tensors))
        op = Operation(func, name, args, kwargs, tensors, summary)
        if name in OUTSIDE:
            return self._noted(op, op())  # what it depends on is found in its graph
        try:
            return self._noted(op, self._recorded(op, rule, [*operands.values()]))
        except EvaluatedError as error:
            for tensor in error.unknown:
                self._keep(tensor, None, str(error))
            return self._noted(op, error.result)
        except NoRule as error:
            reason = str(error)
        except (torch.OutOfMemoryError, RuleError):
            raise
        except _FAILURES:  # if the function itself is wrong, the evaluation below says so
            reason = f"{name} has no rule"
        with torch.set_grad_enabled(self.differentiable):
            result, touched = op.touching()
        for tensor in touched:
            self._keep(tensor, None, reason)
        return self._noted(op, result)

    def _recorded(self, op: Operation, rule: Rule | None, operands: list[Tensor]) -> Any:
        """By its rule, or where that does not apply after all, as a function that is known by its graph alone."""
        for operand in operands:
            self.step_of(operand)
        if rule is None:
            reason = f"{op.name} has no rule"
        else:
            if self._verify is not None:
                self._verify(op, rule, operands)
            torch._C._set_grad_enabled(self.differentiable)  # without the object that torch.set_grad_enabled makes
            try:
                return rule.record(self, op)
            except torch.OutOfMemoryError:
                raise
            except NoRule as error:
                reason = str(error)
            except _FAILURES as error:
                if registered(op.func, op.name) is not None:
                    raise RuleError(
                        f"the rule that was registered for {op.name} fails with {type(error).__name__}: {error}"
                    ) from error
                reason = f"the rule of {op.name} does not cover its arguments"
            finally:
                torch._C._set_grad_enabled(True)
        if op.name in HOOKS or (op.name.endswith("_") and not op.name.startswith("_")) or op.kwargs.get("inplace"):
            raise NoRule(reason)
        return opaque(self, op, reason)

    def _noted(self, op: Operation, result: Any) -> Any:
        """The result as the function sees it, with the operation noted."""
        outputs = [result] if isinstance(result, Tensor) else tensors_in(result)
        if not self._depth:
            self._note(op, outputs, result is None)
        if not self.differentiable:
            # What is done to it in ways that can't be followed then leaves a graph, by which it is found out.
            for tensor in outputs:
                if self.depends(tensor) and tensor.is_leaf:
                    tensor.requires_grad_()
        return result

    def _note(self, op: Operation, outputs: list[Tensor], nothing: bool) -> None:
        if self._verify is not None and not (
            is_local(op)
            and all(tensor.is_floating_point() and tensor.layout == torch.strided for tensor in op.tensors + outputs)
        ):
            self.choices.append(op.name)
        if outputs or nothing or op.name in HOOKS:
            self.signature.append(op.summary)

    # What torch functions do not show.

    def _find(self, value: Tensor) -> None:
        """Look in the graph of a value for what it depends on: a part of the function may be hidden from torch functions."""
        sources = self._sources(value)
        if not sources:
            return
        name = value.grad_fn.name() if value.grad_fn is not None else "a view"
        self.hidden.append(name)
        self.signature.append((name, value.shape))
        try:
            if value.is_complex() or any(
                self._sources(one, other) for one in sources for other in sources if one is not other
            ):
                raise NoRule(f"{name} is hidden from torch functions, and of several values")
            why = f"{name} is hidden from torch functions"
            self.learn(value, Opaque(name, why, value, tuple(sources), price_by_entries(value, sources)), sources)
        except NoRule as error:
            self._keep(value, None, str(error))

    def _sources(self, value: Tensor, only: Tensor | None = None) -> list[Tensor]:
        """The known values that the graph of a value leads to, not through one another; whether one is, if `only` is given."""
        start = value.grad_fn
        if start is None or start in self._constant_nodes:
            return []
        found: dict[int, Tensor] = {}
        seen = {start}
        stack = list(start.next_functions)
        while stack:
            node, number = stack.pop()
            if node is None or node in self._constant_nodes:
                continue
            known = self._nodes.get((node, number))
            leaf = getattr(node, "variable", None)
            source = leaf if known is None and self.depends(leaf) else known
            if isinstance(source, Tensor) and (source is leaf or source.grad_fn is node):
                found[id(source)] = source
                if only is None:
                    continue
            if node not in seen:
                seen.add(node)
                stack.extend(node.next_functions)
        if not found:
            self._constant_nodes |= seen
        return [*found.values()] if only is None else [only] if id(only) in found else []
