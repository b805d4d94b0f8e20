"""What `Exact().explain` says of usual networks: the first table of the README; `python tests/benchmarks/costs.py`.

Vectors: D = 64 with layers of 256, D = 784 with layers of 512, 256 rows. Sequences: 16 tokens of 4 entries and 49 of 16, images: 8 x 8 and
28 x 28 pixels; 2 rows each. Costs are relative to value and one vector-Jacobian product, and the plan's own estimate; nothing is timed.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from divflow.divergence import Exact
from divflow.networks import ConvNet, UNet

Field = Callable[[Tensor, Tensor], Tensor]


class TransformerLayer(nn.Module):
    """One layer of torch's, between two maps of tokens."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.net = nn.Sequential(nn.Linear(entries, 64), layer, nn.Linear(64, entries))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The value."""
        return self.net(x)


class Residual(nn.Module):
    """Blocks h + W2 silu(W1 FiLM(LayerNorm(h), t)) between two linear maps."""

    def __init__(self, dimension: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(dimension, hidden), nn.Linear(hidden, dimension)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(blocks))
        self.films = nn.ModuleList(nn.Linear(2, 2 * hidden) for _ in range(blocks))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden)) for _ in range(blocks)
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The value."""
        h, embedded = self.first(x), torch.stack([t.sin(), t.cos()], dim=-1)
        for norm, film, block in zip(self.norms, self.films, self.blocks, strict=True):
            scale, shift = film(embedded).chunk(2, dim=-1)
            h = h + block(norm(h) * (1 + scale) + shift)
        return self.last(h)


def perceptron(dimension: int, hidden: int, layers: int, normalized: bool = False) -> Field:
    """Hidden layers of one width."""
    widths, parts = [dimension, *[hidden] * layers], []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Linear(before, after), *([nn.LayerNorm(after)] if normalized else []), nn.SiLU()]
    net = nn.Sequential(*parts, nn.Linear(hidden, dimension))
    return lambda t, x: net(x)


def fields(dimension: int, hidden: int, tokens: tuple[int, int], pixels: int) -> dict[str, tuple[Field, Tensor]]:
    """Each network and states of its."""
    x, images = torch.randn(256, dimension), torch.randn(2, 1, pixels, pixels)
    return {
        "two hidden layers": (perceptron(dimension, hidden, 2), x),
        "the same with LayerNorm": (perceptron(dimension, hidden, 2, normalized=True), x),
        "one residual block with LayerNorm and FiLM": (Residual(dimension, hidden, 1), x),
        "four 3x3 convolutions": (ConvNet((1, pixels, pixels)), images),
        "four hidden layers": (perceptron(dimension, hidden, 4), x),
        "three residual blocks with LayerNorm and FiLM": (Residual(dimension, hidden, 3), x),
        "a transformer layer": (TransformerLayer(tokens[1]), torch.randn(2, *tokens)),
        "a UNet with GroupNorm": (UNet((1, pixels, pixels)), images),
    }


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    sizes = [fields(64, 256, (16, 4), 8), fields(784, 512, (49, 16), 28)]
    print("| your network | method | cost in probes, D = 64 | D = 784 |\n|---|---|---|---|")
    for name in sizes[0]:
        plans = [Exact().explain(field, torch.tensor(0.5), x) for field, x in (size[name] for size in sizes)]
        methods = " / ".join(dict.fromkeys(plan.method for plan in plans))
        print(f"| {name} | {methods} |", " | ".join(f"{plan.cost_in_probes:.3g}" for plan in plans), "|", flush=True)


if __name__ == "__main__":
    main()
