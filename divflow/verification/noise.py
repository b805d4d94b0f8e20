"""Modules that draw random numbers in training mode."""

from typing import Any

from torch import nn

__all__ = ["draws", "noisy_modules"]


def draws(module: nn.Module) -> bool:
    """Whether a module itself draws random numbers as it is now, such as a dropout in training mode.

    Args:
        module: the module, without those within it.
    """
    if not module.training:
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0


def noisy_modules(g: Any) -> str:
    """List the modules of a field that draw random numbers, such as `net.1 (Dropout)`; empty if there are none.

    Args:
        g: a function or module.
    """
    found = g.named_modules() if isinstance(g, nn.Module) else ()
    return ", ".join(f"{name or 'the velocity'} ({type(module).__name__})" for name, module in found if draws(module))
