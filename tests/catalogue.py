"""The invariant catalogue: every estimator, field and event shape that must meet every law."""

import torch
from torch import Tensor, nn

from divflow.divergence import Autograd, ControlVariate, Exact, Hutchinson, HutchPlusPlus, XTrace

EXACT = {
    "auto": Exact(),
    "forward": Exact("forward"),
    "forward in chunks": Exact("forward", chunk_size=2),
    "reverse": Exact("reverse"),
    "reverse in chunks": Exact("reverse", chunk_size=2),
    "reverse one by one": Exact("reverse", chunk_size=1),
    "autograd": Autograd(),
}
STOCHASTIC = {
    "rademacher": Hutchinson(),
    "three rademacher": Hutchinson(3),
    "gaussian": Hutchinson(2, "gaussian"),
    "sphere": Hutchinson(2, "sphere"),
}
ESTIMATORS = EXACT | STOCHASTIC
# One of each kind, for what every estimator must see in a field.
KINDS = {
    "exact": Exact(),
    "reverse": Exact("reverse"),
    "autograd": Autograd(),
    "hutchinson": Hutchinson(2),
    "hutch++": HutchPlusPlus(3),
    "xtrace": XTrace(4),
    "control variate": ControlVariate(Hutchinson(2), references=2),
}
EVENTS = [(), (1,), (5,), (3, 2, 2), (2, 1, 3, 1)]


class Network(nn.Module):
    """A small smooth field of any event shape, in which time (scalar or per sample) and all entries interact."""

    def __init__(self, event: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.size = torch.Size(event).numel()
        self.first = nn.Linear(self.size + 1, 7, dtype=dtype)
        self.last = nn.Linear(7, self.size, dtype=dtype)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        time = t.to(x.dtype).reshape(-1, 1).expand(x.shape[0], 1)
        features = torch.cat([x.reshape(x.shape[0], self.size), time], dim=1)
        return self.last(torch.tanh(self.first(features))).view_as(x)


def quadratic(t: Tensor, x: Tensor) -> Tensor:
    """t x^2 + roll(x): divergence 2 t sum(x) in closed form, whatever the shape (plus 1 where D = 1)."""
    time = t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t
    rolled = x.reshape(x.shape[0], -1).roll(1, dims=1).view_as(x) if x.shape[0] else x
    return time * x**2 + rolled


def quadratic_divergence(t: Tensor, x: Tensor) -> Tensor:
    flat = x.reshape(x.shape[0], x[0].numel() if x.shape[0] else 1)
    return 2 * t * flat.sum(dim=1) + (1 if flat.shape[1] == 1 else 0)


def true_jacobian(g, t: Tensor, x: Tensor) -> Tensor:
    """`(k, D, D)` by torch.autograd.functional, a sample at a time: an independent route."""
    rows = []
    for b in range(len(x)):
        time = t[b : b + 1] if t.ndim else t
        jacobian = torch.autograd.functional.jacobian(lambda z, time=time: g(time, z), x[b : b + 1])
        size = x[0].numel()
        rows.append(jacobian.reshape(size, size))
    return torch.stack(rows)


def true_divergence(g, t: Tensor, x: Tensor) -> Tensor:
    return true_jacobian(g, t, x).diagonal(dim1=1, dim2=2).sum(dim=1)
