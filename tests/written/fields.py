"""All that is written, as fields g(t, x) over vectors of D entries, and as potentials f(x) of them."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from written import D, Written, tagged
from written.networks import NETWORKS
from written.pieces import IMAGES, PIECES, Piece
from written.scalars import SCALARS

__all__ = ["DEFAULT", "FIELDS", "POTENTIALS"]


class Layers(nn.Module):
    """A field of which a kind of piece is two layers: one before an activation, one before a matrix."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.shape = (2, 3, 3) if kind in IMAGES else (12,)
        size, generator = torch.Size(self.shape).numel(), torch.Generator().manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(D, size), nn.Linear(size, size), nn.Linear(size, D)
        self.pieces = nn.ModuleList(Piece(kind, self.shape, generator) for _ in range(2))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        before, after = self.pieces
        h = self.first(x)
        if len(self.shape) == 1:
            return self.last(after(t, self.inner(before(t, h).tanh())))
        h = before(t, h.unflatten(1, self.shape)).tanh()
        return self.last(after(t, self.inner(h.flatten(1)).unflatten(1, self.shape)).flatten(1))


class Times(nn.Module):
    """A scalar function times a vector of the state's entries."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.scalar = make()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x.roll(1, 1) * self.scalar(x)[:, None]


class Total(nn.Module):
    """A sum of a field's entries at one time."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.field = make()

    def forward(self, x: Tensor) -> Tensor:
        return (self.field(x.new_tensor(0.3), x) * torch.linspace(1, 2, D, dtype=x.dtype)).sum(1)


def _made(make: Callable, entry: Written, of: object) -> Written:
    return Written(entry.tags, functools.partial(make, of))


_LAYERS = {f"layers of {kind}": _made(Layers, entry, kind) for kind, entry in PIECES.items()}
FIELDS = (
    NETWORKS | _LAYERS | {f"{name} times x": _made(Times, entry, entry.function) for name, entry in SCALARS.items()}
)
POTENTIALS = SCALARS | {
    f"sum of {name}": _made(Total, entry, entry.function) for name, entry in (NETWORKS | _LAYERS).items()
}
_BY_JETS = tagged(PIECES, "layered", "jets")[::3]
DEFAULT = {
    *NETWORKS,
    *SCALARS,
    *(f"layers of {kind}" for kind in PIECES if kind not in _BY_JETS),
    *(f"sum of layers of {kind}" for kind in PIECES if kind in _BY_JETS or "layered" not in PIECES[kind].tags),
}
"""What the default run takes: each as what it is written for, and of the pieces that both ways follow a third as potentials."""
