"""Fields over vectors of 6 entries: as many kinds of network as users write."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from divflow.networks import MLP, ConcatSquash
from written import D, written

__all__ = ["NETWORKS", "Plain"]

H = 9


def column(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, 1).expand(len(x), 1)


class Plain(nn.Module):
    """Any function of x alone as a module."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, t, x):
        return self.net(x)


def two_hidden(activation) -> nn.Module:
    return Plain(nn.Linear(D, H), activation(), nn.Linear(H, H), activation(), nn.Linear(H, D))


class WithTime(nn.Module):
    """x and t concatenated, as torchcfm, torchdyn and zuko have it."""

    def __init__(self, embed=lambda t: t, features: int = 1) -> None:
        super().__init__()
        self.embed, self.net = embed, nn.Sequential(nn.Linear(D + features, H), nn.SELU(), nn.Linear(H, D))

    def forward(self, t, x):
        return self.net(torch.cat([x, self.embed(column(t, x))], dim=-1))


class Preconditioned(nn.Module):
    """A network between scales of each sample's time, around which the state is carried, as denoisers and scores are."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.narrow = two_hidden(nn.Tanh).net, nn.Linear(D, 1)

    def forward(self, t, x):
        t = column(t, x)
        inner = self.net(x / (1 + t * t).sqrt())
        entries = inner[:, [2, 2, 0, 5, 1, 4]] * t.exp() + self.narrow(inner) * t.cos()
        return entries / t - x / (1 + t) + torch.cat([x[:, :1] * t, (x[:, 1:] * t).flip(1)], dim=1)


class TimeAtEachLayer(nn.Module):
    """FFJORD's concat layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D + 1, H), nn.Linear(H + 1, H), nn.Linear(H + 1, D)])

    def forward(self, t, x):
        for i, layer in enumerate(self.layers):
            x = layer(torch.cat((column(t, x), x), 1))
            x = F.softplus(x) if i < 2 else x
        return x


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(H, H), nn.SiLU(), nn.Linear(H, H))


class Residual(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, H), nn.Linear(H, D)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))

    def forward(self, t, x):
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return self.last(h)


class Shared(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(D, H), nn.Linear(H, H), nn.Linear(H, D)

    def forward(self, t, x):
        return self.last(torch.tanh(self.inner(torch.tanh(self.inner(self.first(x))))))


class Gated(nn.Module):
    """Gates from time: shared for a scalar t, one a sample for (k,)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.gate = nn.Linear(D, H), nn.Linear(H, D), nn.Linear(1, H)

    def forward(self, t, x):
        return self.last(self.first(x).tanh() * torch.sigmoid(self.gate(t.reshape(-1, 1))))


class GatedByItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, 2 * H), nn.Linear(H, D)

    def forward(self, t, x):
        value, gate = self.first(x).chunk(2, dim=1)
        return self.last(value * gate.sigmoid())


class Coupling(nn.Module):
    """RealNVP's halves and a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D // 2, H), nn.Tanh(), nn.Linear(H, D // 2))
        self.register_buffer("order", torch.tensor([3, 1, 5, 0, 2, 4]))

    def forward(self, t, x):
        a, b = x[:, self.order].split(D // 2, dim=1)
        return torch.cat([a, b * 2 + self.net(a)], dim=1)[:, self.order]


class Matrices(nn.Module):
    """Parameters by matmul, addmm, einsum and @."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(D, H) / 3)
        self.b = nn.Parameter(torch.randn(H, H) / 3)
        self.c = nn.Parameter(torch.randn(H, D) / 3)
        self.bias = nn.Parameter(torch.randn(H))

    def forward(self, t, x):
        h = torch.einsum("bi,ij->bj", torch.addmm(self.bias, x, self.a).sin(), self.b)
        return torch.matmul(h.cos(), self.c) + (
            self.c.T @ x.unsqueeze(-1)[:, :0].sum(1, keepdim=True).expand(-1, H, 1)
        ).squeeze(-1)


class OnTokens(nn.Module):
    """A linear layer over the last of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, t, x):
        return self.last(torch.tanh(self.first(x.view(-1, 2, 3)))).flatten(1)


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = two_hidden(nn.Tanh)

    def forward(self, t, x):
        x = x - x.mean(dim=1, keepdim=True)
        y = self.net(t, x)
        return y - y.mean(dim=-1, keepdim=True) + x.cumsum(1) + x.sum(-1, keepdim=True)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Plain(nn.Linear(D, H), nn.ELU(inplace=True), nn.Linear(H, H), nn.SiLU(inplace=True), nn.Linear(H, D))

    def forward(self, t, x):
        h = self.net(t, x)
        h += x
        h *= 2
        return h.tanh_()


class Quadratic(nn.Module):
    """OT-Flow's potential gradient in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.a, self.w = nn.Linear(D, H), nn.Parameter(torch.randn(3, D) / 2), nn.Parameter(torch.randn(H))

    def forward(self, t, x):
        return -(torch.tanh(self.k(x)) * self.w) @ self.k.weight - x @ (self.a.T @ self.a) - t.reshape(-1, 1)


class UnusedInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, H), nn.Sigmoid(), nn.Linear(H, 3))

    def forward(self, t, x):
        return torch.cat([self.net(x[:, 2:5]), torch.ones_like(x[:, :2]), x[:, :1].detach() * x[:, 5:]], dim=1)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = two_hidden(nn.Tanh)

    def forward(self, t, x):
        with torch.no_grad():
            scale = (x * x).sum(dim=1, keepdim=True).sqrt()
        return self.net(t, x) * scale + self.net(t, x.detach()) * x


class Nested(nn.Module):
    """Modules in modules, stack and unbind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a": two_hidden(nn.GELU), "b": Residual(1)})

    def forward(self, t, x):
        a, b = torch.stack([self.inner["a"](t, x), self.inner["b"](t, x)], dim=1).unbind(1)
        return torch.where(a > 0, a, 0.1 * a) - b / (1 + a * a)


class Reshaped(nn.Module):
    """Permutations, flips and broadcasts that only move entries."""

    def __init__(self) -> None:
        super().__init__()
        self.net = two_hidden(nn.Softsign)

    def forward(self, t, x):
        image = x.reshape(-1, 2, 3).permute(0, 2, 1).flip(1)
        y = self.net(t, image.flatten(1)).unflatten(1, (3, 2)) + image[:, :, :1] * 0.5 + image.roll(1, dims=1)
        return y.transpose(1, 2).reshape(len(x), D)


def shifted(norm: nn.Module) -> nn.Module:
    """A normalization by statistics that training has left."""
    norm.running_mean.normal_()
    return norm.eval()


def normalized(*norms: nn.Module, last: nn.Module | None = None) -> nn.Module:
    """A normalization of H entries after each hidden layer, its weights as training leaves them."""
    layers: list[nn.Module] = []
    for norm in norms:
        layers += [nn.Linear(H if layers else D, H), norm, nn.Tanh()]
    for parameter in nn.ModuleList(norms).parameters():
        nn.init.normal_(parameter)
    return Plain(*layers, nn.Linear(H, D), *([] if last is None else [last]))


class Channels(nn.Module):
    """Normalizations of channels: H = 9 entries as 3 channels of 3, or of 3 x 1."""

    def __init__(self, norm: nn.Module, *event: int) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.event = nn.Linear(D, H), norm, nn.Linear(H, D), event
        for parameter in norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, t, x):
        return self.last(self.norm(self.first(x).unflatten(1, self.event)).flatten(1).sin())


class ResidualNormalized(nn.Module):
    """Normalization before each block, or after it."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.first, self.last, self.before = nn.Linear(D, H), nn.Linear(H, D), before
        self.norms = nn.ModuleList(nn.LayerNorm(H) for _ in range(2))
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, t, x):
        h = self.first(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h = h + block(norm(h)) if self.before else norm(h + block(h))
        return self.last(h)


def sincos(t: Tensor) -> Tensor:
    angles = t * torch.arange(1, 4, dtype=t.dtype) * torch.pi
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Closure(nn.Module):
    """A lambda over a module, with the module's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = two_hidden(nn.Tanh)

    def forward(self, t, x):
        return (lambda z: self.inner(t, z) - z * t.reshape(-1, 1))(x)


NETWORKS = {
    name: written("layered jets", make)
    for name, make in {
        "no hidden layer": lambda: Plain(nn.Linear(D, D)),
        "one hidden layer": lambda: Plain(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, D)),
        "two hidden layers": lambda: two_hidden(nn.Tanh),
        "three hidden layers": lambda: MLP(D, (H, 2 * H, H)),
        "four hidden layers": lambda: MLP(D, (H, 4, H, 5)),
        "no bias": lambda: Plain(nn.Linear(D, H, bias=False), nn.Tanh(), nn.Linear(H, D, bias=False)),
        "weight norm": lambda: Plain(weight_norm(nn.Linear(D, H)), nn.Tanh(), weight_norm(nn.Linear(H, D))),
        "spectral norm": lambda: Plain(spectral_norm(nn.Linear(D, H)).eval(), nn.Tanh(), orthogonal(nn.Linear(H, D))),
        "frozen weights": lambda: Plain(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, H).requires_grad_(False), nn.Tanh(), nn.Linear(H, D)),
        "divflow MLP": lambda: MLP(D, (H, H)),
        "divflow ConcatSquash": lambda: ConcatSquash(D, (H, H)),
        "time concatenated": WithTime,
        "time embedded": lambda: WithTime(sincos, 6),
        "time at each layer": TimeAtEachLayer,
        "residual": lambda: Residual(2),
        "deep residual": lambda: Residual(4),
        "shared weights": Shared,
        "gated by time": Gated,
        "preconditioned": Preconditioned,
        "gated by itself": GatedByItself,
        "glu": lambda: Plain(nn.Linear(D, 2 * H), nn.GLU(), nn.Linear(H, D)),
        "coupling": Coupling,
        "matrices": Matrices,
        "tokens": OnTokens,
        "centred": Centred,
        "in place": InPlace,
        "quadratic potential": Quadratic,
        "unused inputs": UnusedInputs,
        "detached": Detached,
        "nested": Nested,
        "reshaped": Reshaped,
        "batch norm in eval mode": lambda: normalized(shifted(nn.BatchNorm1d(H))),
        "instance norm in eval mode": lambda: Channels(shifted(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)), 3, 3),
        "two layer norms": lambda: normalized(nn.LayerNorm(H), nn.LayerNorm(H, eps=0.1)),
        "three layer norms": lambda: normalized(*(nn.LayerNorm(H) for _ in range(3))),
        "layer norm at the end": lambda: normalized(nn.LayerNorm(H), last=nn.LayerNorm(D)),
        "layer norm at the start": lambda: Plain(nn.LayerNorm(D), nn.Linear(D, H), nn.Tanh(), nn.Linear(H, D)),
        "layer norm before blocks": lambda: ResidualNormalized(before=True),
        "layer norm after blocks": lambda: ResidualNormalized(before=False),
        "two group norms": lambda: normalized(nn.GroupNorm(3, H), nn.GroupNorm(1, H)),
        "closure": Closure,
    }.items()
}  # fmt: skip
