"""Fields by number: right ones, of what people put into networks, and ones that are cut off from autograd by some share."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from written import tagged
from written.pieces import PIECES, VECTORS, Piece

NORM = nn.utils.parametrizations

SIZES = (1, 2, 3, 6, 16, 64, 784)
SHARES = (1.0, 0.1, 0.01, 0.001)
RIGHT = tagged(VECTORS, without=["severed", "stateful", "joint"])
PARTS = 6
PERIOD = math.ceil(len(RIGHT) / PARTS)
"""Of so many seeds in a row, from a multiple of it, the right fields have every piece."""


class Field(nn.Module):
    """A sum of parts as a field of time and state, and perhaps of what autograd does not see."""

    def __init__(self, parts: list[nn.Module], severed: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.parts, self.severed, self.scale = nn.ModuleList(parts), severed, nn.Parameter(torch.ones(()))

    def forward(self, t, x):
        total = sum(part(t, x.clone()) for part in self.parts)
        return self.scale.to(x.dtype) * (total if self.severed is None else total + self.severed(x))


class Layers(nn.Module):
    """A perceptron with pieces between its layers."""

    def __init__(self, first: nn.Module, pieces: list[Piece], last: nn.Module) -> None:
        super().__init__()
        self.first, self.pieces, self.last = first, nn.ModuleList(pieces), last

    def forward(self, t, x):
        h = self.first(x)
        for piece in self.pieces:
            h = piece(t, h)
        return self.last(h)


class Draw:
    """What one number decides: sizes, parts, and how they are joined.

    Args:
        seed: the number.
        dtype: of the field.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.seed, self.numbers, self.dtype = seed, np.random.default_rng(seed), dtype
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.size = int(self.numbers.choice(SIZES))
        self.batch = int(self.numbers.integers(1, 9 if self.size < 100 else 3))

    def state(self, several: bool = False) -> Tensor:
        """Where several, without zeros, whose entries are all equal."""
        scale = float(self.numbers.choice([1.0 if several else 0.0, 1e-3, 1.0, 1.0, 1.0, 30.0]))
        return scale * torch.randn(self.batch, self.size, dtype=self.dtype)

    def piece(self, kind: str, size: int) -> Piece:
        return Piece(kind, (size,), self.generator).to(self.dtype)

    def layers(self) -> nn.Module:
        """A perceptron with one of many activations, and perhaps a normalization or dropout."""
        hidden = int(self.numbers.choice([8, 32]))
        middle = self.numbers.choice(["", "LayerNorm", "Dropout", "GroupNorm", "AlphaDropout"])
        kinds = [middle] if middle else []
        kinds.append(str(self.numbers.choice(tagged(VECTORS, "activation"))))
        wrap = self.numbers.choice([None, NORM.spectral_norm, NORM.weight_norm, None, None])
        linear = (lambda *sizes: wrap(nn.Linear(*sizes))) if wrap else nn.Linear
        first, last = linear(self.size, hidden), linear(hidden, self.size)
        if wrap is None and self.numbers.random() < 0.15:
            nn.init.zeros_(last.weight)
        return Layers(first, [self.piece(kind, hidden) for kind in kinds], last).to(self.dtype)

    def right(self) -> tuple[nn.Module, Tensor]:
        """A field that is right, and a state."""
        order = np.random.default_rng(self.seed // PERIOD).permutation(RIGHT)
        kinds = [str(kind) for kind in order[self.seed % PERIOD :: PERIOD]]
        impossible = {"small"} if self.size >= 100 else {"several"} if self.size == 1 else set()
        kinds = [kind for kind in kinds if not PIECES[kind].tags & impossible]
        parts = [self.piece(kind, self.size) for kind in kinds]
        if not parts or self.numbers.random() < 0.5:
            parts.append(self.layers())
        return Field(parts), self.state(any("several" in PIECES[kind].tags for kind in kinds))

    def cut(self, share: float) -> tuple[nn.Module, Tensor]:
        """A field of which autograd misses a part of that share, and a state."""
        net = self.layers()
        other = nn.Sequential(nn.Linear(self.size, 8), nn.Tanh(), nn.Linear(8, self.size)).to(self.dtype)
        kind = self.numbers.choice(["detach", "no_grad", "data", "numpy", "geometry", "force", "leaf", "list"])

        def severed(x):
            if kind == "detach":
                return other(x.detach())
            if kind == "no_grad":
                with torch.no_grad():
                    return other(x)
            if kind == "data":
                return other(x.data)
            if kind == "numpy":
                return torch.from_numpy(np.sin(other(x).detach().numpy()))
            if kind == "list":
                return torch.tensor(other(x).tolist(), dtype=x.dtype)
            if kind == "geometry":
                with torch.no_grad():
                    r = (1 + x.square().sum(1, keepdim=True)).sqrt()
                return other(x) * r
            with torch.enable_grad():
                z = x if kind == "force" and x.requires_grad else x.detach().requires_grad_()
                energy = other(z).square().sum()
                return torch.autograd.grad(energy, z, create_graph=kind == "leaf", retain_graph=True)[0]

        state = torch.randn(self.batch, self.size, dtype=self.dtype)
        return Field([net], lambda x: share * severed(x)), state
