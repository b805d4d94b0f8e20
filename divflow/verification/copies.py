"""A copy of a field, in double precision or as it is, to evaluate at other points."""

import copy
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket
from torch.distributions import Distribution

__all__ = ["Copied", "CopyError", "copied"]

# The most elements of a field that are copied in double precision, and how deep containers are searched.
_MOST_ELEMENTS, _DEPTH = 2**27, 12


class CopyError(Exception):
    """A field can't be copied; caught inside this package."""


class Copied(NamedTuple):
    """A copy of a field.

    Attributes:
        field: the copy, which shares no tensor with the original.
        reset: resets tensors, generators and attributes of modules to their state at the time of the copy.
    """

    field: Any
    reset: Callable[[], None]


def copied(g: Any, double: bool = False) -> Copied:
    """Copy a field: modules, functions with their closures and globals, partials, and what these hold.

    Its all-zero parameters are perturbed, so that a last layer that starts there hides nothing.

    Args:
        g: the field.
        double: whether its floating-point tensors become float64, complex ones complex128.

    Raises:
        CopyError: it holds something that can't be copied, or is too large.
    """
    try:
        with torch.no_grad():
            copies = _Copy(double)
            field = copies.of(g, 0)
            copies.perturb()
            return Copied(field, copies.resetting())
    except (torch.OutOfMemoryError, CopyError):
        raise CopyError("it is too large") from None
    except Exception as error:
        raise CopyError(f"{type(error).__name__}: {error}") from error


class _Copy:
    """Copies by identity of their originals.

    Args:
        double: whether to convert.
    """

    def __init__(self, double: bool) -> None:
        self._double, self._elements = double, 0
        self._home: str | None = None  # the module that the field's own code is of
        self.memo: dict[int, Any] = {}
        self._originals: list[Any] = []

    def of(self, value: Any, depth: int) -> Any:
        """Copy a value; values of other kinds than those that hold a field's numbers are returned as they are."""
        if id(value) in self.memo:
            return self.memo[id(value)]
        if depth > _DEPTH:
            return value
        kind = type(value)
        if isinstance(value, Tensor):
            return self._keep(value, self._tensor(value))
        if isinstance(value, np.ndarray):
            floating = self._double and value.dtype == np.float32
            return self._keep(value, value.astype(np.float64) if floating else value.copy())
        if isinstance(value, Generator):
            generator = Generator(value.device)
            return self._keep(value, generator.set_state(value.get_state()))
        if isinstance(value, nn.Module):
            return self._module(value, depth)
        if kind is types.FunctionType:
            return self._function(value, depth)
        if kind is types.MethodType:
            owner = self.of(value.__self__, depth + 1)
            function = self.of(value.__func__, depth + 1)
            return (
                value if owner is value.__self__ and function is value.__func__ else types.MethodType(function, owner)
            )
        if kind is functools.partial:
            arguments = [self.of(item, depth + 1) for item in value.args]
            keywords = {key: self.of(item, depth + 1) for key, item in value.keywords.items()}
            return functools.partial(self.of(value.func, depth + 1), *arguments, **keywords)
        if kind in (list, dict, set):
            return self._container(value, depth)
        if isinstance(value, tuple):
            parts = [self.of(item, depth + 1) for item in value]
            return value._make(parts) if hasattr(value, "_make") else kind(parts)
        return self._object(value, depth) if hasattr(value, "__dict__") else value

    def perturb(self) -> None:
        """Add noise to parameters that are zero."""
        noise = Generator("cpu").manual_seed(1)
        for parameter in self.memo.values():
            if isinstance(parameter, nn.Parameter) and parameter.numel() and not parameter.any():
                steps = torch.randn(parameter.shape, generator=noise, dtype=torch.float64, device="cpu")
                parameter.add_(0.1 * steps.to(parameter))

    def resetting(self) -> Callable[[], None]:
        """Return a function that resets what was copied."""
        tensors = [(it, it.detach().clone(), it._version) for it in self.memo.values() if isinstance(it, Tensor)]
        generators = [(it, it.get_state()) for it in self.memo.values() if isinstance(it, Generator)]
        modules = [(it, dict(vars(it))) for it in self.memo.values() if isinstance(it, nn.Module)]
        parts = [(held, dict(held)) for _, own in modules for held in own.values() if isinstance(held, dict)]

        def reset() -> None:
            for tensor, value, version in tensors:
                if tensor._version != version:
                    tensor.data.copy_(value)
            for generator, state in generators:
                generator.set_state(state)
            for module, own in modules:
                module.__dict__.clear()
                module.__dict__.update(own)
            for held, before in parts:
                held.clear()
                held.update(before)

        return reset

    def _keep(self, value: Any, new: Any) -> Any:
        self.memo[id(value)] = new
        self._originals.append(value)  # kept alive, so that no other object gets its identity
        return new

    def _tensor(self, value: Tensor) -> Tensor:
        self._elements += value.numel()
        if self._double and self._elements > _MOST_ELEMENTS:
            raise CopyError("it is too large")
        if value.layout != torch.strided or value.is_quantized:
            return value.detach().clone()
        new = value.detach()
        if self._double and (new.is_floating_point() or new.is_complex()):
            new = new.to(torch.complex128 if new.is_complex() else torch.float64)
        new = new.clone() if new.untyped_storage()._cdata == value.untyped_storage()._cdata else new
        if isinstance(value, nn.Parameter):
            return nn.Parameter(new, requires_grad=value.requires_grad)
        return new.requires_grad_(value.requires_grad)

    def _module(self, value: nn.Module, depth: int) -> Any:
        if isinstance(value, nn.parallel.DistributedDataParallel):
            return self.of(value.module, depth)  # evaluated in this process alone
        if isinstance(value, torch.jit.ScriptModule):
            new = copy.deepcopy(value)
            return self._keep(value, new.double() if self._double else new)
        new = self._keep(value, value.__class__.__new__(value.__class__))
        for key, item in vars(value).items():
            new.__dict__[key] = self.of(item, depth if isinstance(item, dict) else depth + 1)
        return new

    def _function(self, value: types.FunctionType, depth: int) -> Any:
        # A function of another module holds none of the field's numbers, but calls a library.
        if self._home not in (None, value.__module__) and not value.__closure__:
            return value
        self._home = self._home or value.__module__
        cells = value.__closure__ or ()
        closure = tuple(types.CellType() for _ in cells)
        own = dict(value.__globals__)
        new = types.FunctionType(value.__code__, own, value.__name__, None, closure)
        self._keep(value, new)  # before what it holds, which may be itself
        for cell, old in zip(closure, cells, strict=True):
            try:
                cell.cell_contents = self.of(old.cell_contents, depth + 1)
            except ValueError:  # a variable without a value yet
                continue
        for name in _names(value.__code__):
            if name in own and not isinstance(own[name], types.ModuleType):
                own[name] = self.of(own[name], depth + 1)
        new.__defaults__ = self.of(value.__defaults__, depth + 1)
        new.__kwdefaults__ = self.of(value.__kwdefaults__, depth + 1)
        new.__dict__.update(value.__dict__)
        return new

    def _container(self, value: Any, depth: int) -> Any:
        new = self._keep(value, type(value)())
        if isinstance(value, dict):
            new.update({key: self.of(item, depth + 1) for key, item in value.items()})
        elif isinstance(value, set):
            new.update(value)
        else:
            new.extend(self.of(item, depth + 1) for item in value)
        return new

    def _object(self, value: Any, depth: int) -> Any:
        """Copy a callable, a dataclass or a distribution with what it holds; anything else stays as it is."""
        called = callable(value) or dataclasses.is_dataclass(value) or isinstance(value, Distribution)
        if isinstance(value, type | types.ModuleType | OpOverload | OpOverloadPacket | CustomOpDef) or not called:
            return value
        try:
            new = copy.copy(value)
        except Exception:
            return value
        if new is value:
            return value
        self._keep(value, new)
        for key, item in vars(value).items():
            with_new = self.of(item, depth + 1)
            if with_new is not item:
                object.__setattr__(new, key, with_new)
        return new


def _names(code: types.CodeType) -> set[str]:
    """The globals that a function, or one inside it, may use."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))
