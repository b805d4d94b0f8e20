"""Steps of vectors that are modules of torch's, by its name, or of the user's own."""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from written import Written, written

__all__ = ["MODULES", "channels"]


def groups(size: int) -> int:
    return next(n for n in (3, 2, 1) if size % n == 0 and (size > n or n == 1))


def channels(h: Tensor) -> Tensor:
    """A vector as a few channels."""
    return h.unflatten(1, (groups(h.shape[1]), -1))


class Swish(nn.Module):
    """FFJORD's swish: a product, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return x * torch.sigmoid(x * F.softplus(self.beta))


def perceptron(size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, size))


def autocast(layer: nn.Module, h: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16) if h.dtype == torch.float32 else contextlib.nullcontext():
        return layer(h).to(h.dtype)


def energy(layer: nn.Module, h: Tensor) -> Tensor:
    """The gradient of an energy with noise of its own."""
    with torch.enable_grad():
        z = h if h.requires_grad else h.detach().requires_grad_()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            potential = layer(z).square().sum()
        return torch.autograd.grad(potential, z, create_graph=True)[0]


def _layer(tags: str, make) -> Written:
    return written(tags, lambda m, t, h: m.layer(h), make)


def _noisy(tags: str, make) -> Written:
    """Of entries in their order: torch draws noise in that of memory, which is another one where a rule writes them."""
    return written(tags, lambda m, t, h: m.layer(h.contiguous()), make)


def _in_place(tags: str, make) -> Written:
    return written(tags, lambda m, t, h: m.layer(h.clone()), make)


def _of_channels(tags: str, make) -> Written:
    return written(tags, lambda m, t, h: m.layer(channels(h)).flatten(1), make)


MODULES = {
    "Tanh": _layer("layered jets activation", lambda size: nn.Tanh()),
    "Sigmoid": _layer("layered jets activation", lambda size: nn.Sigmoid()),
    "SiLU": _layer("layered jets activation", lambda size: nn.SiLU()),
    "SiLU in place": _in_place("layered jets activation", lambda size: nn.SiLU(inplace=True)),
    "GELU": _layer("layered jets activation", lambda size: nn.GELU()),
    "GELU by tanh": _layer("layered jets activation", lambda size: nn.GELU("tanh")),
    "Softplus": _layer("layered jets activation", lambda size: nn.Softplus()),
    "Softplus with a threshold": _layer("layered jets activation branching", lambda size: nn.Softplus(2.0, 1.0)),
    "ELU": _layer("layered jets activation", lambda size: nn.ELU()),
    "ELU with a slope": _layer("layered jets activation branching", lambda size: nn.ELU(0.7)),
    "ELU in place": _in_place("layered jets activation", lambda size: nn.ELU(inplace=True)),
    "SELU": _layer("layered jets activation branching", lambda size: nn.SELU()),
    "CELU": _layer("layered jets activation", lambda size: nn.CELU(0.6)),
    "Mish": _layer("layered jets activation", lambda size: nn.Mish()),
    "ReLU": _layer("layered jets activation branching", lambda size: nn.ReLU()),
    "ReLU6": _layer("layered jets activation branching", lambda size: nn.ReLU6()),
    "LeakyReLU": _layer("layered jets activation branching", lambda size: nn.LeakyReLU(0.3)),
    "PReLU": _layer("layered jets activation branching", lambda size: nn.PReLU(size)),
    "PReLU of one slope": _layer("layered jets activation branching", lambda size: nn.PReLU()),
    "Hardtanh": _layer("layered jets activation branching", lambda size: nn.Hardtanh()),
    "Hardswish": _layer("layered jets activation branching", lambda size: nn.Hardswish()),
    "Hardsigmoid": _layer("layered activation branching once", lambda size: nn.Hardsigmoid()),
    "LogSigmoid": _layer("layered jets activation", lambda size: nn.LogSigmoid()),
    "Softsign": _layer("layered jets activation", lambda size: nn.Softsign()),
    "Tanhshrink": _layer("layered jets activation", lambda size: nn.Tanhshrink()),
    "Softshrink": _layer("layered jets activation branching", lambda size: nn.Softshrink(0.1)),
    "Hardshrink": _layer("layered jets activation branching", lambda size: nn.Hardshrink(0.1)),
    "Threshold": _layer("layered jets activation branching", lambda size: nn.Threshold(0.1, 0.0)),
    "Swish": _layer("layered jets activation", lambda size: Swish()),
    "Identity": _layer("layered jets activation", lambda size: nn.Identity()),
    "Dropout of nothing": _layer("layered jets activation", lambda size: nn.Dropout(0.0)),
    "Dropout": _noisy("layered jets random double", lambda size: nn.Dropout(0.5)),
    "AlphaDropout": _noisy("layered jets random double", lambda size: nn.AlphaDropout(0.2)),
    "LayerNorm": _layer("layered jets", nn.LayerNorm),
    "LayerNorm without weights": _layer("layered jets", lambda size: nn.LayerNorm(size, elementwise_affine=False)),
    "LayerNorm without bias": _layer("layered jets", lambda size: nn.LayerNorm(size, bias=False)),
    "LayerNorm of two dimensions": _of_channels("layered jets", lambda size: nn.LayerNorm((groups(size), size // groups(size)))),
    "LayerNorm of the last of two": _of_channels("layered jets", lambda size: nn.LayerNorm(size // groups(size))),
    "RMSNorm": _layer("layered jets", nn.RMSNorm),
    "RMSNorm of another eps": _layer("layered jets", lambda size: nn.RMSNorm(size, eps=0.1)),
    "RMSNorm without weights": _layer("layered jets", lambda size: nn.RMSNorm(size, elementwise_affine=False)),
    "GroupNorm": _layer("layered jets several", lambda size: nn.GroupNorm(groups(size), size)),
    "GroupNorm of one group": _layer("layered jets several", lambda size: nn.GroupNorm(1, size)),
    "GroupNorm without weights": _layer("layered jets several", lambda size: nn.GroupNorm(groups(size), size, affine=False)),
    "GroupNorm of channels": _of_channels("layered jets several", lambda size: nn.GroupNorm(1, groups(size))),
    "InstanceNorm1d": _of_channels("layered jets several", lambda size: nn.InstanceNorm1d(groups(size), affine=True)),
    "InstanceNorm2d": written(
        "layered jets several", lambda m, t, h: m.layer(channels(h)[..., None]).flatten(1), lambda size: nn.InstanceNorm2d(groups(size), eps=0.01)
    ),
    "Softmax": _layer("layered jets", lambda size: nn.Softmax(dim=1)),
    "Softmax from the end": _layer("layered jets", lambda size: nn.Softmax(dim=-1)),
    "Softmax of channels": _of_channels("layered jets", lambda size: nn.Softmax(dim=1)),
    "Softmin": _layer("layered jets", lambda size: nn.Softmin(dim=1)),
    "LogSoftmax": _layer("layered jets", lambda size: nn.LogSoftmax(dim=1)),
    "GRU": written(
        "small", lambda m, t, h: m.layer[1](m.layer[0](h[..., None])[0])[..., 0],
        lambda size: nn.ModuleList([nn.GRU(1, 4, batch_first=True), nn.Linear(4, 1)]),
    ),
    "script": _layer("", lambda size: torch.jit.script(perceptron(size))),
    "checkpoint": written("layered jets", lambda m, t, h: checkpoint(m.layer, h, use_reentrant=False), lambda size: perceptron(size)),
    "checkpoint with dropout": written(
        "layered jets random double", lambda m, t, h: checkpoint(m.layer, h.contiguous(), use_reentrant=False), lambda size: nn.Sequential(nn.Dropout(0.5), perceptron(size)),
    ),
    "autocast": written("layered jets double", lambda m, t, h: autocast(m.layer, h), lambda size: perceptron(size)),
    "energy of a perceptron": written("", lambda m, t, h: energy(m.layer, h), lambda size: nn.Sequential(perceptron(size), nn.Dropout(0.5))),
}  # fmt: skip
