"""Steps of the same shape before and after, as modules."""

import torch
from torch import Tensor, nn

from written.images import IMAGES
from written.modules import MODULES
from written.vectors import FUNCTIONS

__all__ = ["IMAGES", "PIECES", "VECTORS", "Piece"]

VECTORS = MODULES | FUNCTIONS
PIECES = VECTORS | IMAGES


class Piece(nn.Module):
    """One step of a field, with the tensors that its function takes.

    Args:
        kind: its name in `PIECES`.
        shape: `(n,)` of vectors, `(c, h, w)` of images.
        generator: of its weights.
    """

    def __init__(self, kind: str, shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.kind, self.shape, self.calls = kind, shape, 0
        size = shape[0]
        side = size if size < 100 else 0  # of matrices, which nothing else than what is small has

        def draw(*shape: int | torch.Size) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight = nn.Parameter(draw(side, side) / size**0.5)
        if kind in IMAGES:
            self.kernel = nn.Parameter(draw(size, size, 3, 3) / (9 * size) ** 0.5)
        else:
            self.kernel = nn.Parameter(draw(3) / 3)
            self.wide = nn.Parameter(draw(side + 3, side) / size**0.5)
        self.bias, self.scale = nn.Parameter(0.3 * draw(size)), nn.Parameter(draw(()) * 0.3 + 1)
        self.register_buffer("order", torch.randperm(size, generator=generator))
        self.register_buffer("mask", torch.rand(size, generator=generator) < 0.5)
        self.register_buffer("mean", torch.ones((), dtype=torch.float64))
        make = PIECES[kind].layer
        self.layer = nn.Identity() if make is None else make(size).double()
        for parameter in self.layer.parameters():
            parameter.data = draw(parameter.shape) / parameter.shape[1:].numel() ** 0.5

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        self.calls += 1
        return PIECES[self.kind].function(self, t, h)
