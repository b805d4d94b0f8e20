"""Evaluations at other points must leave no trace: a field that writes to what it keeps is stopped before."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["NoWrites", "WritesError"]

# These write to their running statistics, which their schemas do not declare.
_STATISTICS = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm_gather_stats")


class WritesError(Exception):
    """A field is about to change a tensor that existed before; caught inside this package."""


class NoWrites(TorchDispatchMode):
    """Make tensors that existed before read-only, however they are reached, also by globals or defaults.

    Args:
        own: tensors that may be changed nevertheless.

    Raises:
        WritesError: before the first such change.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        # Kept alive, so that no other storage takes the address of one that is freed.
        self._made = {_storage(tensor): tensor.untyped_storage() for tensor in own}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Refuse to write; else note what was made."""
        given = dict(kwargs or {})
        for name, value in _written(func, args, given):
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor) and _storage(tensor) not in self._made:
                    raise WritesError(f"{func} changes its argument {name}")
        result = func(*args, **given)
        read = {_storage(leaf) for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            # A result that shares its storage with an argument is a view of it, and not new.
            if isinstance(leaf, Tensor) and _storage(leaf) not in read:
                self._made[_storage(leaf)] = leaf.untyped_storage()
        return result


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and values of the arguments that an operation writes to."""
    arguments = func._schema.arguments
    values = dict(zip((it.name for it in arguments), args, strict=False)) | dict(kwargs)
    names = [it.name for it in arguments if it.alias_info is not None and it.alias_info.is_write]
    if func._schema.name.removeprefix("aten::") in _STATISTICS and values.get("training", True):
        names += ["running_mean", "running_var"]
    return [(name, values[name]) for name in names if values.get(name) is not None]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
