"""All tensors that a function depends on, declared or not: found in the graph of an evaluation.

A field may use tensors that are not parameters of its module: those of a closure, an encoder's output kept as an
attribute, those of networks in a plain list. Leaves are found at the ends of the graph. A tensor that was computed
before, and is not a leaf, is found as an operand and replaced by a leaf, so that a gradient ends there and continues
from there once. Complex tensors are replaced, too, by real leaves.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from divflow.tape.listening import Listening
from divflow.tape.registry import inside

__all__ = ["Dependences", "is_differentiated", "substituted"]

Function = Callable[[], Sequence[Tensor]]
Replaced = dict[int, tuple[Tensor, Tensor]]

_PLACED = threading.local()


class Dependences:
    """The tensors that a function's value depends on, so that differentiating in them misses nothing.

    Args:
        function: evaluated once; two or three times if it depends on more than is known.
        known: tensors that it is known to depend on; those that require no grad do not count.
        fresh: leaves that were made for this evaluation.

    Attributes:
        leaves: those that are differentiated in as they are.
        unseen: operands of an operation that can't be seen (a custom autograd Function). They stay as they are, too,
            though they are complex or were computed before.
        entangled: what an unseen one was computed from and is differentiated in itself, so that it would count twice.
        replaced: by identity, tensors that were computed before or are complex, and the leaves in their places.
        value: of the last evaluation.
    """

    def __init__(self, function: Function, known: Iterable[Tensor], fresh: Sequence[Tensor]) -> None:
        known = [tensor for tensor in known if tensor.requires_grad]
        self._fresh = {id(tensor) for tensor in fresh}
        self.leaves = [tensor for tensor in known if tensor.is_leaf and not tensor.is_complex()]
        others = [tensor for tensor in known if not tensor.is_leaf or tensor.is_complex()]
        self.replaced: Replaced = {id(tensor): _pair(tensor) for tensor in others}
        self.unseen: list[Tensor] = []
        self.entangled: list[Tensor] = []
        self._watches = self._makes_leaves = False
        with torch.enable_grad():
            start = _number(torch.ones((), requires_grad=True, device="cpu") * 1)
            with _placed(self.replaced):
                self.value = function()
            graph = _Graph(self.value)
            if graph.earliest < start or self._others(graph):
                self._follow(function, graph, start)

    @property
    def outer(self) -> list[Tensor]:
        """All of them, as the caller holds them."""
        return [*self.leaves, *self.unseen, *(original for original, _ in self.replaced.values())]

    @property
    def inner(self) -> list[Tensor]:
        """All of them, as leaves of the function's graph."""
        return [*self.leaves, *self.unseen, *(leaf for _, leaf in self.replaced.values())]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the function the leaves in place of the replaced tensors."""
        with _placed(self.replaced), _watched(self.replaced) if self._watches else contextlib.nullcontext():
            yield

    def missed(self, value: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
        """Return the leaves that another value depends on, apart from these arguments and those found before."""
        return [] if self._makes_leaves else self._others(_Graph(value, [*arguments, *self.unseen]))

    def _others(self, graph: "_Graph") -> list[Tensor]:
        found = self._fresh.union(map(id, self.inner))
        return [leaf for leaf in graph.leaves if id(leaf) not in found]

    def _follow(self, function: Function, first: "_Graph", start: int) -> None:
        """Evaluate again, to see which tensors come from outside."""
        unseen: Replaced = {}
        before = set(map(id, first.leaves))

        def taken(tensor: Tensor) -> bool:
            if id(tensor) in unseen:
                return False
            if tensor.grad_fn is None:
                return tensor.is_complex() and id(tensor) in before
            return _number(tensor) < start and not any(id(leaf) in self._fresh for leaf in _Graph([tensor]).leaves)

        for _ in range(2):
            self.replaced = {key: pair for key, pair in self.replaced.items() if key not in unseen}
            with _placed(self.replaced), _watched(self.replaced, taken):
                self.value = function()
            graph = _Graph(self.value)
            unseen |= {key: pair for key, pair in self.replaced.items() if graph.holds(pair[0])}
            if not unseen.keys() & self.replaced.keys():
                break
        self.replaced = {key: pair for key, pair in self.replaced.items() if key not in unseen}
        self._watches = bool(self.replaced)
        self.unseen = [original for original, _ in unseen.values()]
        # The function makes its own leaves anew at each evaluation.
        others = self._others(_Graph(self.value, self.unseen))
        self.leaves += [leaf for leaf in others if id(leaf) in before]
        self._makes_leaves = any(id(leaf) not in before for leaf in others)
        own = set(map(id, self.leaves))
        self.entangled = [leaf for leaf in _Graph(self.unseen).leaves if id(leaf) in own]


def is_differentiated() -> bool:
    """Whether this evaluation finds or uses `Dependences`, of the function as it was when they were found."""
    return getattr(_PLACED, "by", None) is not None


def substituted(tensor: Tensor) -> Tensor:
    """Return the leaf that stands for a tensor while a function is differentiated, or the tensor.

    Args:
        tensor: any.
    """
    pair = (getattr(_PLACED, "by", None) or {}).get(id(tensor))
    return tensor if pair is None else _stand_in(pair)


class _Graph:
    """The part of the autograd graph from some tensors to others.

    Attributes:
        leaves: where it ends, constants apart.
        earliest: the least number of a node; nodes are numbered in the order in which a thread makes them.
    """

    def __init__(self, outputs: Sequence[Tensor], arguments: Sequence[Tensor] = ()) -> None:
        self._edges: set[tuple[Node | None, int]] = {(output.grad_fn, output.output_nr) for output in outputs}
        self.leaves: list[Tensor] = [output for output in outputs if output.requires_grad and output.is_leaf]
        self.earliest = sys.maxsize
        seen: set[Node | None] = {None, *(argument.grad_fn for argument in arguments)}
        nodes = [output.grad_fn for output in outputs]
        # A view that is written in place continues the graph of its base.
        ignored = {id(tensor) for argument in arguments for tensor in (argument, argument._base)}
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is None:
                self.earliest = min(self.earliest, node._sequence_nr())
                self._edges.update(node.next_functions)
                nodes.extend(function for function, _ in node.next_functions)
            elif id(leaf) not in ignored:
                self.leaves.append(leaf)

    def holds(self, tensor: Tensor) -> bool:
        """Whether it passes through a tensor."""
        if tensor.grad_fn is None:
            return any(leaf is tensor for leaf in self.leaves)
        return (tensor.grad_fn, tensor.output_nr) in self._edges


class _Watch:
    """A listener that gives operations leaves in place of tensors, and of more tensors if they are to be `taken`."""

    def __init__(self, replaced: Replaced, taken: Callable[[Tensor], bool]) -> None:
        self._replaced, self._taken = replaced, taken

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the operation with leaves; inside a function with a rule of its own, too."""
        args, kwargs, original = self._with_leaves(args), self._with_leaves(kwargs), inside(func)
        if original is None:
            return func(*args, **kwargs)
        with Listening(self):
            return original(*args, **kwargs)

    def _with_leaves(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._replaced and value.requires_grad and self._taken(value):
                self._replaced[id(value)] = _pair(value)
            pair = self._replaced.get(id(value))
            return value if pair is None else _stand_in(pair)
        if type(value) in (tuple, list):
            return type(value)(self._with_leaves(part) for part in value)
        return {key: self._with_leaves(part) for key, part in value.items()} if type(value) is dict else value


@contextlib.contextmanager
def _watched(replaced: Replaced, taken: Callable[[Tensor], bool] = lambda tensor: False) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
            # A compiled network holds its operands where no one sees them.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(Listening(_Watch(replaced, taken)))
        yield


@contextlib.contextmanager
def _placed(replaced: Replaced) -> Iterator[None]:
    before = getattr(_PLACED, "by", None)
    _PLACED.by = replaced
    try:
        yield
    finally:
        _PLACED.by = before


def _pair(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor and the leaf in its place, with the same numbers and without its graph."""
    leaf = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    return tensor, leaf.requires_grad_()


def _stand_in(pair: tuple[Tensor, Tensor]) -> Tensor:
    original, leaf = pair
    return torch.view_as_complex(leaf) if original.is_complex() else leaf


def _number(tensor: Tensor) -> int:
    return tensor.grad_fn._sequence_nr()  # type: ignore[union-attr]
