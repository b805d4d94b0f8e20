"""Fields that hide a part from autograd, found by following what depends on x while they are evaluated.

A tensor depends on x if an operand of the operation that made it did. It is *severed* if it depends on x without a
graph leading there (`detach`, `no_grad`, a gradient without `create_graph`), or if a severed operand went into it.
Indices and masks are piecewise constant, and pass nothing on. If nothing is severed, no differences are needed: there is
no false alarm, and a cut of any size is found with the line that made it.
"""

import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from divflow.tape.listening import Listening
from divflow.tape.operation import HOOKS, name_of
from divflow.tape.registry import registered
from divflow.tape.table import SHAPED

__all__ = ["Following"]

# With these a number leaves torch; `__bool__` decides a branch, which is piecewise constant.
_LEAVING = frozenset(
    "item tolist numpy __array__ __float__ __complex__ __int__ __index__ __dlpack__".split()  # noqa: SIM905
)
_OURS = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, os.path.dirname(__file__)))


class Following:
    """A listener that tracks which results of torch functions depend on x, and whether autograd knows.

    Args:
        x: the point, which requires grad; the field's input.
    """

    def __init__(self, x: Tensor) -> None:
        self._kept = [x]  # kept alive, because identities are reused
        self._depends = {id(x)}
        # True if a severed operand went in. False if there was no graph when it was made: there may be one later, because
        # results of a custom Function look like that inside its forward pass.
        self._cut: dict[int, bool] = {}
        self._cuts: list[str] = []
        self._left: list[str] = []
        self._other: list[str] = []

    @property
    def listening(self) -> Listening:
        """Entered while the field is evaluated."""
        return Listening(self)

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function, and note which results depend on x."""
        with torch._C.DisableTorchFunction():  # operations here are not the field's
            before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            operands = [tensor for tensor in before if id(tensor) in self._depends]
            severed = any(map(self._is_severed, operands))  # before the call, which may be `requires_grad_`
        out = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self._note(_name_of(func), out, args, before, operands, severed)
            if operands and registered(func, name_of(func)) is not None:  # its inside is not seen
                self._other.append(f"a function with a rule of its own, {_name_of(func)}")
        return out

    def _note(
        self,
        name: str,
        out: object,
        args: tuple[Any, ...],
        before: list[Tensor],
        operands: list[Tensor],
        severed: bool,
    ) -> None:
        if not self._other and any(map(_is_transformed, before)):
            self._other.append(f"a transform of torch.func{_line()}")
        if not operands or name in SHAPED:
            return
        if name in _LEAVING:
            self._left.append(f"{name}{_line()}")
        elif name in HOOKS:
            self._other.append(f"a hook on a gradient{_line()}")
        else:
            self._learn(name, out, args, before, severed)

    def _learn(self, name: str, out: object, args: tuple[Any, ...], before: list[Tensor], severed: bool) -> None:
        written = name.endswith("_") and not name.startswith("_")
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name in ("__setitem__", "__set__"):
            results.append(args[0])
        results += [
            it._base for it in results if it._is_view() and it._base is not None and any(it is t for t in before)
        ]
        # The graph does not show what is written without grad.
        blind = ((written or name == "__setitem__") and not torch.is_grad_enabled()) or name == "__set__"
        for tensor in results:
            if tensor.is_floating_point() or tensor.is_complex():
                self._kept.append(tensor)
                self._depends.add(id(tensor))
                if severed or blind or not tensor.requires_grad:
                    if not severed:
                        self._cuts.append(f"{name}{_line()}")
                    self._cut[id(tensor)] = tensor.requires_grad or self._cut.get(id(tensor), False)

    def _is_severed(self, tensor: Tensor) -> bool:
        cut = self._cut.get(id(tensor))
        return cut is True or (cut is False and tensor.grad_fn is None)

    def suspicion(self, output: Tensor, nodes: Iterable[Node]) -> str | None:
        """Explain why the derivative of an output may differ from autograd's; None if autograd knows all that was done.

        Args:
            output: what the field returned.
            nodes: of its graph.
        """
        if id(output) not in self._depends:
            return "no torch function that was seen leads from x to its value"
        if self._is_severed(output):
            return f"it is severed by {_listed(self._cuts)}"
        if self._left:
            return f"a number left torch by {_listed(self._left)}"
        if self._other:
            return f"there is {self._other[0]}"
        for node in nodes:
            name = node.name()
            if isinstance(node, torch.autograd.function.BackwardCFunction) or "NotImplemented" in name:
                return f"it has a backward pass of its own, {name}"
            if "CompiledFunction" in name:
                return "a part of it is compiled"
        return None


def _name_of(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", name)
    if name == "__set__" and getattr(getattr(func, "__self__", None), "__name__", name) != "data":
        return "requires_grad_"
    return name


def _listed(causes: list[str]) -> str:
    """All causes, because the first need not be the one that matters."""
    return ", ".join(dict.fromkeys(causes))


def _is_transformed(tensor: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _line() -> str:
    """Where the operation was called, in the user's code."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else f" in line {frame.f_lineno} of {os.path.basename(frame.f_code.co_filename)}"
