"""One call of a torch function, as a `TorchFunctionMode` receives it: its name, its tensors, its structure."""

import functools
import hashlib
import itertools
import types
from collections.abc import Callable, Container, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

__all__ = [
    "HOOKS",
    "METADATA",
    "OUTSIDE",
    "Operation",
    "described",
    "indices",
    "name_of",
    "tensors_in",
    "version",
]

HOOKS = {"register_hook", "register_post_accumulate_grad_hook"}
"""Operations that register a hook, which may change gradients."""
OUTSIDE = {"grad", "backward"}
"""Operations that need the very tensor, by its place in the graph; a copy with the same numbers would not do."""
METADATA = set(
    """
    shape size dim ndim ndimension numel nelement dtype device layout requires_grad is_leaf is_cuda is_floating_point
    is_complex is_contiguous stride element_size get_device __len__ grad_fn
    """.split()  # noqa: SIM905 - a list of these would take a screen
)
"""Operations whose result depends on the shape, dtype and device of a tensor, not on its numbers."""


@functools.cache
def name_of(func: Any) -> str:
    """The name of a torch function: `add` for torch.add, Tensor.add and +, and `add_` in place.

    Operators of `torch.library` and functions outside of torch have a qualified name, `mylib.rotate`, which no function of
    torch has.
    """
    if isinstance(func, OpOverload | OpOverloadPacket):
        name = str(func).removesuffix(".default")
        return name.removeprefix("aten.")
    name = getattr(func, "__name__", "")
    if isinstance(func, types.FunctionType) and func.__module__.split(".")[0] != "torch":
        return f"{func.__module__}.{func.__qualname__}"
    if name == "__get__":
        return func.__self__.__name__
    name = name.removeprefix("special_")
    if name.startswith("__") and name.endswith("__"):
        operator = name.strip("_")
        if operator in _OPERATORS:
            return _OPERATORS[operator]
        if operator[0] == "i" and operator[1:] in _OPERATORS:
            return _OPERATORS[operator[1:]] + "_"
    return name


_OPERATORS = {
    "add": "add", "radd": "add", "sub": "sub", "rsub": "rsub", "mul": "mul", "rmul": "mul", "truediv": "div",
    "rtruediv": "rdiv", "rdiv": "rdiv", "div": "div", "matmul": "matmul", "pow": "pow",
    "rpow": "rpow", "neg": "neg", "pos": "positive", "abs": "abs", "getitem": "getitem", "setitem": "setitem",
}  # fmt: skip


_PLAIN = {int, str, type(None), type(Ellipsis), torch.dtype, torch.device}
_NAMED = {torch.memory_format, torch.layout, range}


def described(
    values: Iterable[Any], known: Container[int], tensors: list[Tensor], numbers: bool
) -> tuple[Hashable, ...]:
    """A key of the arguments' structure: shapes and options, without the numbers in tensors.

    Args:
        values: the arguments.
        known: `id`s of the tensors that depend on x.
        tensors: a list to which the tensors among the arguments are added, those in tuples, lists and dicts included.
        numbers: whether floats are part of the structure, such as the scale of `interpolate`.
    """
    parts: list[Hashable] = []
    for value in values:
        kind = type(value)
        if kind is bool:
            parts.append((bool, value))  # True is 1 for a dict
        elif kind in _PLAIN:
            parts.append(value)
        elif isinstance(value, Tensor):
            tensors.append(value)
            parts.append((id(value) in known, value.shape))
        elif isinstance(value, tuple | list):
            parts.append(described(value, known, tensors, numbers))
        elif kind is dict:
            parts.append((*value, *described(value.values(), known, tensors, numbers)))
        elif kind is float or kind is complex:
            parts.append(value if numbers else "number")
        elif kind is slice:
            parts.append(("slice", *described((value.start, value.stop, value.step), known, tensors, numbers)))
        elif isinstance(value, np.ndarray):
            parts.append((value.shape, str(value.dtype), value.tobytes()))
        elif kind in _NAMED:
            parts.append(repr(value))
        else:
            parts.append(object())  # equal to nothing
    return tuple(parts)


def indices(tensors: list[Tensor]) -> list[Hashable]:
    """Digests of the contents of the integer and bool tensors among some, such as indices and masks."""
    chosen = [tensor for tensor in tensors if not (tensor.is_floating_point() or tensor.is_complex())]
    return [hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).digest() for tensor in chosen]


class Operation(NamedTuple):
    """One call of a torch function.

    Attributes:
        func: the function.
        name: its name, by `name_of`.
        args: positional arguments.
        kwargs: keyword arguments.
        tensors: all tensors among the arguments, those in lists and dicts included.
        summary: key of the call's structure: name, shapes, options, and numbers that a plan depends on.
    """

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    summary: tuple[Hashable, ...]

    def __call__(self) -> Any:
        """Evaluate it."""
        return self.func(*self.args, **self.kwargs)

    def arguments(self, new: Callable[[Tensor], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with `new(tensor)` for each tensor."""
        return _map(new, self.args), _map(new, self.kwargs)

    def at(self, new: Callable[[Tensor], Any]) -> Any:
        """Evaluate it with `new(tensor)` for each tensor."""
        args, kwargs = self.arguments(new)
        return self.func(*args, **kwargs)

    def at_places(self, new: Mapping[int, Tensor]) -> Any:
        """Evaluate it with other tensors at some positions in `tensors`."""
        place = itertools.count()
        return self.at(lambda tensor: new.get(next(place), tensor))

    def touching(self) -> tuple[Any, list[Tensor]]:
        """Evaluate it; return the value, and the tensors that it made or changed, or whose gradients it may change."""
        before = [(tensor, version(tensor)) for tensor in self.tensors]
        result = self()
        touched = [tensor for tensor in tensors_in(result) if tensor.is_floating_point() or tensor.is_complex()]
        touched += self.tensors if self.name in HOOKS else []
        return result, touched + [tensor for tensor, number in before if version(tensor) != number]

    def out_of_place(self, new: Callable[[Tensor], Tensor], func: Any, name: str) -> "Operation":
        """The same call of another function, `func`, with `new(tensor)` for each tensor and without `inplace`."""
        kwargs = {key: _map(new, value) for key, value in self.kwargs.items() if key != "inplace"}
        return Operation(func, name, _map(new, self.args), kwargs, [*map(new, self.tensors)], self.summary)


def version(tensor: Tensor) -> int:
    """How often a tensor's memory was changed in place, by it or another view; 0 for inference tensors, which have no count."""
    return 0 if tensor.is_inference() else tensor._version


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, tuple | list) else []


def _map(new: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return new(value)
    if isinstance(value, tuple | list):
        return type(value)(_map(new, item) for item in value)
    if isinstance(value, dict):
        return {key: _map(new, item) for key, item in value.items()}
    return value
