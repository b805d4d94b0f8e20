"""Layers that carry tangents beside the value: linear maps, and elementwise functions."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from divflow.networks.conditioning import zero_initialize

__all__ = ["perceptron", "push_forward"]


def perceptron(widths: Sequence[int], activation: Callable[[], nn.Module], zero_init: bool = False) -> nn.Sequential:
    """Linear layers of some widths with activations between them, over the last dimension; zeros in the last if `zero_init`."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    if zero_init:
        zero_initialize(layers[-2])
    return nn.Sequential(*layers[:-1])


def push_forward(layers: Iterable[nn.Module], h: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """Value and directional derivatives, `f(h)` and `J v`, at the cost of one more product a direction.

    Args:
        layers: linear layers and elementwise functions.
        h: `(*rows, features)`.
        tangents: v, `(*directions, *rows, features)`, or what broadcasts to it.

    Returns:
        `(*rows, out)` and `(*directions, *rows, out)`, differentiable like the layers themselves.
    """
    for layer in layers:
        if isinstance(layer, nn.Linear):
            h, tangents = layer(h), nn.functional.linear(tangents, layer.weight)
        else:
            h, slope = _value_and_slope(layer, h)
            tangents = tangents * slope
    return h, tangents


def _value_and_slope(layer: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative by reverse mode, with autograd's conventions at kinks."""
    requires_grad = h.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())
    differentiable = requires_grad and torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        h = h.clone() if h.is_inference() else h
        point = h if differentiable and h.requires_grad else h.detach().requires_grad_()
        value = layer(point)
        (slope,) = torch.autograd.grad(value, point, torch.ones_like(value), create_graph=differentiable)
    return (value, slope) if differentiable else (value.detach(), slope)
