"""Scalar functions of samples of 6 entries: in as many forms as users write."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from written import D, written

__all__ = ["SCALARS", "net"]

H = 5


class Of(nn.Module):
    """A function of x with parameters."""

    def __init__(self, function, *layers: nn.Module, **tensors: Tensor) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def net(*hidden: int, activation=nn.Tanh, inputs: int = D) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 1), nn.Flatten(0))


def residual() -> nn.Module:
    def forward(m, x):
        h = m.layers[0](x)
        for layer in m.layers[1:-1]:
            h = h + 0.5 * F.softplus(layer(h))
        return m.layers[-1](h).squeeze(-1)

    return Of(forward, nn.Linear(D, H), nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, 1))


def matrices(m, x):
    h = torch.einsum("bi,ij->bj", torch.addmm(m.b, x, m.A).sin(), m.B)
    return torch.tensordot(h.cos() @ m.B, m.b, dims=1) + x @ m.A @ m.b + (x @ m.A).mv(m.b)


def quadratic(m, x):
    return 0.5 * (x @ (m.A @ m.A.T) * x).sum(1) + torch.einsum("bi,ij,bj->b", x, m.C, x) + torch.linalg.vecdot(x, x)


def in_place(m, x):
    h = m.layers[0](x)
    h += x.sum(dim=1, keepdim=True)
    h *= 2
    h.tanh_()
    return F.elu(m.layers[1](h), inplace=True).sum(-1)


def arithmetic(m, x):
    c = torch.linspace(1, 2, D, dtype=x.dtype)
    y = 2 * x + x / c - (1 - x) * c + c / (x * x + 2) - 3 / (x**2 + 1) + 2**x - (-x) + +x
    y = y.add(x, alpha=3).sub(x * c, alpha=2).mul(c[:1]).div(x.exp() + 1) + x.pow(3) + torch.rsub(x, 1)
    y = torch.addcmul(y, x, x.sin(), value=0.5) + torch.lerp(x, y, 0.3) + torch.clamp(x, -0.5, 0.5)
    y = y + torch.maximum(x, y) + torch.atan2(x, y) + (x * x.detach()) + x.square() + torch.hypot(x, y)
    return (y + torch.where(x > 0, x * x, 0.1 * y) + (x * x + 1) ** x + (1 + x * x) ** 1.5 + x * x * x).sum(1)


def moved(m, x):
    image = x.reshape(-1, 2, 3).permute(0, 2, 1).flip(1)
    a, b = image.unbind(2)
    y = torch.cat([a * b, b.roll(1, 1), torch.ones_like(a[:, :1]), a.new_zeros(len(x), 1)], dim=1)
    y = torch.stack([y, y.sin()], dim=1)[:, :, [0, 2, 4, 1, 6, 7]].flatten(1)
    c, d = y[:, None].expand(-1, 2, -1).transpose(1, 2).chunk(2, dim=1)
    return (c.cumsum(1) * d).mean(dim=(1, 2)) + image.diff(dim=1).square().sum((-1, -2)) + x[:, 2] * x[..., -1]


def particles(x, n: int = 3) -> Tensor:
    return x.view(-1, n, D // n)


def pairs(m, x):
    """A Jastrow factor of all pairs of particles, by differences and norms."""
    difference = particles(x)[:, :, None] - particles(x)[:, None]
    i, j = torch.triu_indices(3, 3, offset=1)
    distance = difference[:, i, j].norm(dim=-1)
    return (distance / (1 + m.a * distance)).sum(1) + torch.linalg.vector_norm(x, dim=1)


def determinant(m, x):
    """A Slater determinant of orbitals."""
    orbitals = torch.tanh(m.layers[0](particles(x)))
    sign, log = torch.linalg.slogdet(orbitals)
    gram = orbitals @ orbitals.mT + torch.eye(3, dtype=x.dtype)
    return log - 0.5 * (m.a * x * x).sum(1) + sign + gram.logdet() / 4


def attention(m, x):
    q, k, v = m.layers[0](particles(x)).chunk(3, dim=-1)
    weights = torch.softmax(q @ k.mT / 2, dim=-1)
    return (weights @ v).tanh().sum((1, 2)) + torch.bmm(q, k.transpose(1, 2)).sum((1, 2))


def normal(m, x):
    h = m.layers[0](x).tanh()
    spread = h.var(dim=1) + h.std(1, keepdim=True).squeeze(1) + torch.var(h, 1, correction=0)
    return spread + torch.logsumexp(h, dim=1) + F.normalize(h, dim=1).prod(dim=1) + h.log_softmax(-1)[:, 0]


def gated(m, x):
    return F.glu(m.layers[0](x)).mean(dim=-1)


SCALARS = {
    "one hidden layer": written("layered jets", lambda: net(H)),
    "two hidden layers": written("layered jets", lambda: net(H, H)),
    "four hidden layers": written("layered jets", lambda: net(H, H, H, H, activation=nn.SiLU)),
    "no layer": written("layered jets", lambda: net()),
    "residual": written("layered jets", residual),
    "matrices": written(
        "layered jets", lambda: Of(matrices, A=torch.randn(D, H), B=torch.randn(H, H), b=torch.randn(H))
    ),
    "quadratic": written("jets", lambda: Of(quadratic, A=torch.randn(D, 3), C=torch.randn(D, D))),
    "in place": written("layered jets", lambda: Of(in_place, nn.Linear(D, H), nn.Linear(H, H))),
    "arithmetic": written("layered jets", lambda: Of(arithmetic)),
    "moved": written("layered jets", lambda: Of(moved)),
    "joined": written("layered jets", lambda: Of(lambda m, x: torch.cat([x, x * x, x.sin()], dim=-1).prod(dim=1))),
    "pairs": written("layered jets", lambda: Of(pairs, a=torch.tensor(0.7))),
    "determinant": written("jets", lambda: Of(determinant, nn.Linear(D // 3, 3), a=torch.tensor(0.7))),
    "attention": written("jets", lambda: Of(attention, nn.Linear(D // 3, 12))),
    "statistics": written("layered jets", lambda: Of(normal, nn.Linear(D, H))),
    "layer normalization": written(
        "layered jets", lambda: net(H, H, activation=lambda: nn.Sequential(nn.LayerNorm(H), nn.Tanh()))
    ),
    "gated": written("layered jets", lambda: Of(gated, nn.Linear(D, 2 * H))),
    "a conv": written(
        "layered jets",
        lambda: Of(lambda m, x: m.layers[0](x[:, None]).sin().sum((1, 2)), nn.Conv1d(1, 2, 3, padding=1)),
    ),
    "a constant": written("layered jets", lambda: Of(lambda m, x: x.new_ones(len(x)))),
    "of one entry": written("layered jets", lambda: Of(lambda m, x: x[:, 0])),
}
