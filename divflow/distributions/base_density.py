"""A flow's base density as a module: a distribution of torch whose tensors move and are saved with the flow."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Size, Tensor, nn
from torch.distributions import Distribution, Independent, Normal, Transform
from torch.distributions.transforms import _InverseTransform

from divflow.distributions.base import BaseError, OnSubspace
from divflow.distributions.support import log_density, without_volume
from divflow.errors import check_count, check_generator
from divflow.operators.transformed import refuse_transforms
from divflow.verification.seeded import seeded

__all__ = ["BaseDensity"]

_Path = tuple[str | int, ...]
_Held = tuple[_Path, dict | list, Any, Tensor | nn.Module]


class BaseDensity(nn.Module):
    """Wrap a base distribution as a module, whose buffers move and are saved with the flow.

    Outside of its support the density is zero. Values that a distribution caches are dropped before each use, because they
    would belong to other tensors after loading, moving, averaging or replacing them: torch computes `probs` from `logits`
    on first use, and transforms keep their last point.

    Args:
        distribution: of `event_shape`, without batch shape; it is copied.
        event_shape: of the flow.

    Raises:
        BaseError: not a distribution; one of another shape; one whose tensors require grad; or one without a density over
            all entries of an event: a discrete one, or one of a surface, such as a Dirichlet distribution.
    """

    def __init__(self, distribution: Distribution, event_shape: Size) -> None:
        super().__init__()
        _check(distribution, event_shape)
        self._distribution = _own_copy(distribution, {})
        self._buffer_of: dict[_Path, str] = {}
        for path, place, key, value in list(_held(self._distribution)):
            name = "_".join(map(str, path))
            if isinstance(value, nn.Module):
                self.add_module(name, value)
                continue
            self._buffer_of[path] = name
            # A clone, because a checkpoint can't be loaded into the shared memory of broadcast parameters.
            self.register_buffer(name, value.clone(memory_format=torch.contiguous_format))
            place[key] = getattr(self, name)
        self._names = {path: frozenset(vars(part)) for path, part in _parts(self._distribution)}

    @property
    def distribution(self) -> Distribution:
        """The distribution, with the present buffers as its tensors."""
        return self._current(None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the distribution's first floating-point tensor."""
        floating = (tensor.dtype for tensor in self.buffers() if tensor.is_floating_point())
        return next(floating, torch.get_default_dtype())

    def log_prob(self, z: Tensor) -> Tensor:
        """Compute the log-density in nats, `(k,)`; -inf outside of the support.

        Its precision is the finer one of z's and the distribution's, also under autocast.

        Args:
            z: states `(k, *event)`.
        """
        if len(z) == 0:  # torch's Independent can't reshape it
            return z.new_zeros(0)
        if any(buffer.device != z.device for buffer in self.buffers()):  # possible if the velocity has no tensors
            return copy.deepcopy(self).to(z.device).log_prob(z)
        dtype = torch.promote_types(z.dtype, self.dtype)
        with torch.autocast(z.device.type, enabled=False):
            return log_density(self._current(dtype), z.to(dtype))

    def check_states(self, x: Tensor) -> None:
        """Refuse states off the base's subspace, if it has one."""
        if isinstance(self._distribution, OnSubspace):
            self._distribution.check_states(x)

    def sample(self, num_samples: int, generator: Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw `(num_samples, *event)`.

        Torch's distributions take no generator. For one given here, a seed is drawn from it and lent to the default generator,
        which other threads may draw from, too. Normal draws, the base of most flows, need no such loan.

        Args:
            num_samples: how many.
            generator: torch's default one if None.
            dtype: of the draws; the distribution's own if None.
        """
        refuse_transforms("samples of a flow", "draw all of them at once", only_vmap=True)
        check_count("num_samples", num_samples, least=0)
        check_generator(generator)
        distribution = self._current(dtype)
        if generator is None:
            return distribution.sample((num_samples,))
        normal = getattr(distribution, "base_dist", None)
        if isinstance(distribution, Independent) and type(normal) is Normal:
            noise = torch.randn(
                (num_samples, *distribution.event_shape),
                generator=generator,
                dtype=normal.loc.dtype,
                device=generator.device,
            )
            return (normal.loc + normal.scale * noise.to(normal.loc.device)).detach()
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        devices = [buffer.device for buffer in self.buffers() if buffer.is_cuda][:1]
        with seeded(seed, devices):
            return distribution.sample((num_samples,))

    def _current(self, dtype: torch.dtype | None) -> Distribution:
        """The distribution with the present buffers, floating-point ones in `dtype`, and nothing computed from others."""
        for path, part in _parts(self._distribution):
            if isinstance(part, Transform) and getattr(part, "_cache_size", False):
                part._cached_x_y = None, None
            for key in [key for key, value in vars(part).items() if isinstance(value, Tensor)]:
                if (*path, key) in self._buffer_of:
                    continue
                if key in self._names[path]:
                    vars(part)[key] = None
                else:
                    vars(part).pop(key, None)  # another thread may have been faster
        for path, place, key, _ in list(_held(self._distribution)):
            if path in self._buffer_of:
                buffer = getattr(self, self._buffer_of[path])
                converted = dtype is not None and buffer.is_floating_point() and buffer.dtype != dtype
                place[key] = buffer.to(dtype) if converted else buffer
        return self._distribution

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._current(None)  # so that no tensors stay on the old device
        return self


def _check(distribution: object, event_shape: Size) -> None:
    if not isinstance(distribution, Distribution):
        raise BaseError(f"the base must be a torch.distributions.Distribution, but is a {type(distribution).__name__}")
    if distribution.batch_shape or distribution.event_shape != event_shape:
        raise BaseError(
            f"the base must have event shape {tuple(event_shape)} and no batch shape, but has event shape "
            f"{tuple(distribution.event_shape)} and batch shape {tuple(distribution.batch_shape)}. Wrap it in "
            "torch.distributions.Independent(base, n) to make n batch dimensions part of the event."
        )
    if (reason := without_volume(distribution)) is not None:
        raise BaseError(
            f"the base {type(distribution).__name__} {reason}, but a flow needs a density over all {event_shape.numel()} entries of "
            "an event. Use another base, and map the data to the whole space by a transform with its log-determinant."
        )
    for *_, value in _held(distribution):
        tensors = value.parameters() if isinstance(value, nn.Module) else [value]
        if any(tensor.requires_grad for tensor in tensors):
            raise BaseError(
                "the base's tensors require grad, but would not be among the flow's parameters. Detach them."
            )


class _Inverse(_InverseTransform):
    """An inverse that knows its transform after it was copied, unlike torch's own."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


def _own_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Copy a distribution and its parts, without what it computed itself.

    The copy does not validate, because the density is zero outside of a support; only those on a subspace validate.
    """
    if id(value) in memo:
        return memo[id(value)]
    if type(value) in (list, tuple):
        return type(value)(_own_copy(part, memo) for part in value)
    if type(value) is dict:
        return {key: _own_copy(part, memo) for key, part in value.items()}
    if not isinstance(value, Distribution | Transform):
        return copy.deepcopy(value, memo)
    kind = _Inverse if isinstance(value, _InverseTransform) else type(value)
    memo[id(value)] = new = object.__new__(kind)
    computed = _computed(value)
    for key, part in vars(value).items():
        if key == "_inv" and not isinstance(value, _InverseTransform):
            part = None  # made again on demand
        elif key == "_cached_x_y":
            part = (None, None)
        if key not in computed:
            vars(new)[key] = _own_copy(part, memo)
    if isinstance(new, Distribution) and not isinstance(new, OnSubspace):
        new._validate_args = False
    return new


def _computed(part: Distribution | Transform) -> set[str]:
    """Names of the attributes that torch's `lazy_property` has computed and keeps.

    A constructor's argument may have such a name, too (`logits` beside `probs`). It precedes the shapes, which constructors
    set once they have all arguments.
    """
    names = list(vars(part))
    after = names[names.index("_batch_shape") :] if "_batch_shape" in names else []
    return {name for name in after if type(getattr(type(part), name, None)).__name__ == "_lazy_property_and_property"}


def _parts(distribution: Distribution) -> Iterator[tuple[_Path, Distribution | Transform]]:
    """Yield a distribution and all distributions and transforms inside it, each once, with the path to it."""
    found: list[tuple[_Path, Distribution | Transform]] = [((), distribution)]
    seen = {id(distribution)}
    while found:
        path, current = found.pop()
        yield path, current
        for key, value in list(vars(current).items()):
            if key == "_inv" and not isinstance(current, _InverseTransform):
                continue  # a cached inverse, which leads back
            for i, part in _items(value):
                if isinstance(part, Distribution | Transform) and id(part) not in seen:
                    seen.add(id(part))
                    found.append(((*path, key, i), part))


def _held(distribution: Distribution) -> Iterator[_Held]:
    """Yield every tensor and module of a distribution, its parts and its functions: path, place, key, value."""
    for path, part in _parts(distribution):
        for key, value in list(vars(part).items()):
            if isinstance(value, Tensor | nn.Module):
                yield (*path, key), vars(part), key, value
            elif callable(value) and not isinstance(value, Distribution | Transform):
                for i, module in enumerate(_modules_of(value)):
                    yield (*path, key, i), vars(part), key, module
            elif isinstance(value, list | dict):
                for i, entry in _items(value):
                    if isinstance(entry, Tensor | nn.Module):
                        yield (*path, key, i), value, i, entry


def _modules_of(function: Any) -> list[nn.Module]:
    """Those whose method a function is, or that are bound to it, as in the transforms of zuko."""
    if isinstance(function, functools.partial):
        return [module for part in (function.func, *function.args) for module in _modules_of(part)]
    owner = getattr(function, "__self__", None)
    return [owner] if isinstance(owner, nn.Module) else [function] if isinstance(function, nn.Module) else []


def _items(value: Any) -> list[tuple[Any, Any]]:
    """The items of a list or mapping; anything else is its only item."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else [(0, value)]
