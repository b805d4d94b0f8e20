"""The fields of generated calls, and what happens to them between the calls of an episode."""

import functools
import random

import torch
from torch import Tensor, nn
from written import tagged
from written.pieces import IMAGES, PIECES, VECTORS, Piece

__all__ = ["HALVES", "Episode", "Generated", "form_of"]

HALVES = (torch.float16, torch.bfloat16)


class Generated(nn.Module):
    """A field of some pieces, with residual connections."""

    def __init__(self, kinds: list[str], event: tuple[int, ...], inner: tuple[int, ...], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.event, self.inner = event, inner
        self.pieces = nn.ModuleList(Piece(kind, inner, generator) for kind in kinds)
        self.last = Piece("linear" if len(inner) == 1 else "image channel mix", inner, generator)
        self.residual = seed % 3 == 0

    def forward(self, t: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
        h = x.reshape(len(x), *self.inner)
        for i, piece in enumerate(self.pieces):
            new = piece(t, h)
            h = h + new if self.residual and i % 2 else new
        return (self.last(t, h) * factor).reshape(x.shape)

    @property
    def twice_differentiable(self) -> bool:
        return all("once" not in PIECES[piece.kind].tags for piece in self.pieces)

    def describe(self) -> str:
        return f"{[piece.kind for piece in self.pieces]} inner {self.inner} residual {self.residual}"


class Episode:
    """A field and the states of the world between its calls."""

    def __init__(self, seed: int) -> None:
        self.seed, self.draw = seed, random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)
        draw = self.draw
        image = draw.random() < 0.3
        if image:
            self.event = self.inner = (draw.choice([1, 2, 4]), *draw.choice([(2, 2), (3, 4), (4, 4)]))
        else:
            self.event = draw.choice([(), (1,), (2,), (3,), (4,), (6,), (2, 3), (1, 2, 2), (2, 1, 3)])
            self.inner = (max(1, torch.Size(self.event).numel()),)
        self.kinds = draw.choices(list(IMAGES if image else VECTORS), k=draw.choice([1, 1, 2, 2, 3, 4]))
        self.dtype = draw.choice([torch.float64] * 5 + [torch.float32] * 3 + list(HALVES))
        if any(PIECES[kind].tags & _ANOTHER[self.dtype] for kind in self.kinds):
            self.dtype = torch.float64
        self.module = Generated(self.kinds, self.event, self.inner, seed).to(self.dtype)
        if draw.random() < 0.25:
            self.zero_last()
        self.batch = draw.choice([1, 2, 3, 5, self.inner[0]])
        self.t, self.scalar_time, self.call_form = 0.25, draw.random() < 0.75, draw.choice(FORMS)
        self.x = self.new_x()
        # Forward mode has rules of its own, and neither hooks nor state.
        self.method = draw.choice(["auto"] * 6 + ["reverse", "layered", "colored"])

    def zero_last(self) -> None:
        with torch.no_grad():
            self.module.last.weight.zero_()
            self.module.last.bias.zero_()

    def new_x(self) -> Tensor:
        x = torch.randn(self.batch, *self.event, generator=self.noise, dtype=torch.float64).to(self.dtype)
        layout = self.draw.randrange(6)
        if layout == 0 and x.ndim > 1:
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == 1 and len(x):
            x = x[:1].expand(x.shape)
        elif layout == 2:
            x = torch.stack([x, x + 1], -1)[..., 0]
        return x

    def change(self) -> str:
        """Something that makes a kept plan stale, or may."""
        what = self.draw.choice(list(_CHANGES))
        _CHANGES[what](self)
        return what

    def time(self) -> Tensor | float:
        if not self.scalar_time:
            return torch.linspace(self.t, self.t + 0.3, len(self.x), dtype=self.dtype)
        return self.t if self.draw.random() < 0.5 else torch.tensor(self.t, dtype=self.dtype)


# What is another function in float64.
_ANOTHER = {torch.float64: set(), torch.float32: {"double"}} | {
    half: {"branching", "full", "double"} for half in HALVES
}


def _scaled(parameter: Tensor, episode: Episode) -> None:
    parameter.add_(0.5 * torch.randn(parameter.shape, generator=episode.noise, dtype=torch.float64).to(parameter))


def _trained(episode: Episode) -> None:
    with torch.no_grad():
        for parameter in episode.module.parameters():
            _scaled(parameter, episode)


def _trained_behind(episode: Episode) -> None:
    for parameter in episode.module.parameters():
        _scaled(parameter.data, episode)


def _replaced(episode: Episode) -> None:
    for piece in (*episode.module.pieces, episode.module.last):
        piece.weight = nn.Parameter(
            torch.randn(piece.weight.shape, generator=episode.noise, dtype=torch.float64).to(piece.weight)
        )
        piece.order = piece.order.roll(1)
        piece.mask = ~piece.mask


def _buffers(episode: Episode) -> None:
    for piece in episode.module.pieces:
        piece.order.copy_(torch.randperm(len(piece.order), generator=episode.noise))
        piece.mask.logical_not_()


def _swapped(episode: Episode) -> None:
    kinds = tagged(VECTORS if len(episode.inner) == 1 else IMAGES, without=_ANOTHER[episode.dtype])
    place = episode.draw.randrange(len(episode.module.pieces))
    episode.module.pieces[place] = Piece(episode.draw.choice(kinds), episode.inner, episode.noise).to(episode.dtype)


def _later(episode: Episode) -> None:
    episode.t = episode.draw.choice([0.0, 0.25, 0.3, 0.75, 1.0])


def _another_x(episode: Episode) -> None:
    episode.x = episode.new_x()


def _x_in_place(episode: Episode) -> None:
    episode.x = episode.x.clone()
    episode.x.mul_(-1).add_(0.3)


def _another_batch(episode: Episode) -> None:
    episode.batch = episode.draw.choice([0, 1, 2, 5])
    episode.x = episode.new_x()


def _mode(episode: Episode) -> None:
    episode.module.train(not episode.module.training)


def _hook_added(episode: Episode) -> None:
    factor = episode.draw.choice([0.5, 2.0])
    episode.module.pieces[0].register_forward_hook(lambda module, args, output: output * factor)


def _form(episode: Episode) -> None:
    episode.call_form = episode.draw.choice(FORMS)


_CHANGES = {
    "nothing": lambda episode: None,
    "weights trained": _trained,
    "weights trained by .data": _trained_behind,
    "weights and buffers replaced": _replaced,
    "buffers changed in place": _buffers,
    "module swapped": _swapped,
    "another time": _later,
    "another x": _another_x,
    "x in place": _x_in_place,
    "another batch": _another_batch,
    "train or eval": _mode,
    "hook": _hook_added,
    "another form": _form,
    "last layer zero": Episode.zero_last,
    "time a sample": lambda episode: setattr(episode, "scalar_time", not episode.scalar_time),
}


class Holder:
    """A field in an object."""

    def __init__(self, module):
        self.modules = {"net": module}

    def __call__(self, t, x):
        return self.modules["net"](t, x)

    def method(self, t, x):
        return self.modules["net"](t, x)


def form_of(form: str, module: nn.Module) -> object:
    if form == "module":
        return module
    if form == "lambda":
        return lambda t, x: module(t, x)
    if form == "partial":
        return functools.partial(module, factor=0.5)
    holder = Holder(module)
    return holder if form == "object" else holder.method


FORMS = ["module", "module", "lambda", "partial", "object", "method"]
