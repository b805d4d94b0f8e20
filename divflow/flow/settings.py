"""The dtype and the device in which a network computes."""

import itertools
from typing import Any

import torch
from torch import nn

__all__ = ["drawn_dtype", "solved_settings", "tensor_settings"]


def tensor_settings(module: object) -> dict[str, Any]:
    """The dtype and device of a module's first floating-point parameter or buffer; empty if it has none.

    Args:
        module: the module, or any function.
    """
    tensors = itertools.chain(module.parameters(), module.buffers()) if isinstance(module, nn.Module) else ()
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    return {} if first is None else {"dtype": first.dtype, "device": first.device}


def solved_settings(module: object) -> dict[str, Any]:
    """The same with float32 at least, because no trajectory can be solved in a coarser dtype.

    Args:
        module: the module, or any function.
    """
    settings = tensor_settings(module)
    if "dtype" in settings:
        settings["dtype"] = torch.promote_types(settings["dtype"], torch.float32)
    return settings


def drawn_dtype(module: object, default: torch.dtype) -> torch.dtype:
    """The one dtype of a module's floating-point parameters, in which a base is drawn; at least float32.

    Args:
        module: the module, or any function.
        default: of the base, for a module without parameters or with several dtypes.
    """
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    dtypes = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else default
    return torch.promote_types(default, torch.float32) if dtype.itemsize < torch.float32.itemsize else dtype
