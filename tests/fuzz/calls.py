"""Generated calls of the public API: each episode is one field, called several times while its plan goes stale."""

import copy
import functools
import random

import torch
from fuzz.pieces import BRANCHING, IMAGE, VECTOR, Piece
from fuzz.reference import brute_force, quadratic_forms
from torch import Tensor, nn

from divflow.divergence import Autograd, Exact, Hutchinson, HutchPlusPlus, XTrace
from divflow.errors import DivflowError

__all__ = ["Fault", "episode"]

HALVES = (torch.float16, torch.bfloat16)


class Fault(AssertionError):
    """A number that is silently another, or an error without a type."""


class Generated(nn.Module):
    """A field of some pieces, with residual connections."""

    def __init__(self, kinds: list[str], event: tuple[int, ...], inner: tuple[int, ...], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.event, self.inner = event, inner
        self.pieces = nn.ModuleList(Piece(kind, inner, generator) for kind in kinds)
        self.last = Piece("linear" if len(inner) == 1 else "channel mix", inner, generator)
        self.residual = seed % 3 == 0

    def forward(self, t: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
        h = x.reshape(len(x), *self.inner)
        for i, piece in enumerate(self.pieces):
            new = piece(t, h)
            h = h + new if self.residual and i % 2 else new
        return (self.last(t, h) * factor).reshape(x.shape)

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
        kinds = list(IMAGE if image else VECTOR)
        self.kinds = draw.choices(kinds, k=draw.choice([1, 1, 2, 2, 3, 4]))
        self.dtype = draw.choice([torch.float64] * 5 + [torch.float32] * 3 + list(HALVES))
        if self.dtype in HALVES and any(kind in BRANCHING or kind in _NOT_HALF for kind in self.kinds):
            self.dtype = torch.float64
        self.module = Generated(self.kinds, self.event, self.inner, seed).to(self.dtype)
        if draw.random() < 0.25:
            self.zero_last()
        self.batch = draw.choice([1, 2, 3, 5, self.inner[0]])
        self.t, self.scalar_time, self.call_form = 0.25, draw.random() < 0.75, draw.choice(_FORMS)
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


_NOT_HALF = {"complex", "as complex", "matrix of time", "triangular solve", "interpolate", "warp", "float roundtrip"}


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
    kinds = list(VECTOR if len(episode.inner) == 1 else IMAGE)
    if episode.dtype in HALVES:
        kinds = [kind for kind in kinds if kind not in BRANCHING and kind not in _NOT_HALF]
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
    episode.call_form = episode.draw.choice(_FORMS)


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


def _form_of(form: str, module: nn.Module) -> object:
    if form == "module":
        return module
    if form == "lambda":
        return lambda t, x: module(t, x)
    if form == "partial":
        return functools.partial(module, factor=0.5)
    holder = Holder(module)
    return holder if form == "object" else holder.method


_FORMS = ["module", "module", "lambda", "partial", "object", "method"]


def estimator_of(episode: Episode) -> object:
    draw, x = episode.draw, episode.x
    size = max(1, x[0].numel() if len(x) else 1)
    kind = draw.random()
    if kind < 0.7:
        return Exact(episode.method, draw.choice([None, None, None, 1, 2, 100]))
    if kind < 0.75:
        return Autograd()
    if kind < 0.92:
        return Hutchinson(draw.choice([1, 2, 3, 7]), draw.choice(["rademacher", "gaussian", "sphere"]))
    return HutchPlusPlus(max(3, size)) if kind < 0.96 else XTrace(max(4, size))


def compare(name: str, actual: Tensor, expected: Tensor, tolerance: float, context: str) -> None:
    """Equal within a tolerance, or where there are infinities, not a number at all."""
    if actual.shape != expected.shape:
        raise Fault(f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}: {context}")
    actual = actual.detach().double()
    expected = expected.detach().double()
    difference = (actual - expected).abs()
    wrong = ~(difference <= tolerance) & actual.isfinite() & expected.isfinite()
    wrong |= actual.isfinite() != expected.isfinite()
    if wrong.any():
        raise Fault(
            f"{name} differs by {difference[wrong].max().item():.3g} (tolerance {tolerance:.3g}): got {actual[wrong][:4].tolist()}, "
            f"expected {expected[wrong][:4].tolist()}: {context}"
        )


def episode(seed: int, turns: int = 4) -> int:
    """Some calls of one field, compared with brute force; the number of calls."""
    world, history = Episode(seed), []
    for turn in range(turns):
        if turn:
            history.append(world.change())
        one_call(world, history)
    return turns


def one_call(world: Episode, history: list[str]) -> None:
    draw, module, x = world.draw, world.module, world.x
    estimator, t = estimator_of(world), world.time()
    mode = draw.choice(["grad", "grad", "grad", "no_grad", "inference"])
    gradients = mode == "grad" and draw.random() < 0.4 and world.dtype not in HALVES
    if gradients:
        x = x.detach().clone().requires_grad_()
    form = world.call_form
    twin, plain = copy.deepcopy(module).double(), copy.deepcopy(module)
    field = _form_of(form, module)
    context = (
        f"seed {world.seed}, {world.module.describe()}, {form}, event {world.event}, batch {len(x)}, {world.dtype}, {estimator}, "
        f"{mode}, t {t}, strides {x.stride()}, history {history}"
    )
    before = x.detach().clone()
    torch.manual_seed(world.seed)
    frozen = estimator.freeze(x)
    noise = draw.randrange(2**31)
    torch.manual_seed(noise)
    error = result = None
    scope = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    try:
        with scope():
            result = frozen(field, t, x)
    except Exception as caught:
        error = caught
    if not torch.equal(before, x.detach()):
        raise Fault(f"x was changed: {context}")
    torch.manual_seed(noise)
    as_tensor = (
        t.double()
        if isinstance(t, Tensor)
        else torch.tensor(float(torch.tensor(t, dtype=world.dtype)), dtype=torch.float64)
    )
    if error is not None:
        if isinstance(error, DivflowError) and world.method != "auto":
            return
        try:
            with torch.enable_grad():
                point = x.detach().clone().requires_grad_()
                _form_of(form, plain)(as_tensor.to(world.dtype), point.clone())
        except Exception as own:
            if type(own) is type(error):
                return
            raise Fault(f"{type(error).__name__}: {error} where the field raises {own!r}: {context}") from error
        raise Fault(f"{type(error).__name__}: {error}: {context}") from error
    reference = brute_force(_form_of(form, twin), as_tensor, x.detach().double().clone())
    expected = reference.divergence
    if hasattr(frozen, "probes"):
        expected = quadratic_forms(reference.jacobian, frozen.probes)
    epsilon = torch.finfo(world.dtype).eps
    size = 1 + reference.value.detach().abs().amax().item() if reference.value.numel() else 1.0
    steep = 1 + reference.jacobian.detach().abs().sum().item() * (10 if hasattr(frozen, "probes") else 1)
    if not (torch.isfinite(torch.tensor(size)) and size < 1e4 and steep < 1e5):
        return
    # Rounding errors grow with the number of operations and with the slopes between; 100 of both is generous for these.
    scale = 200 * epsilon if world.dtype != torch.float64 else 1e5 * epsilon
    with_half = 4 if world.dtype in HALVES else 1
    compare(
        "the value", result.value, reference.value, scale * size * with_half * (1 + steep / max(1, len(x))), context
    )
    compare("the divergence", result.divergence, expected, scale * steep * with_half * 3, context)
    if mode != "grad" and (result.value.requires_grad or result.divergence.requires_grad):
        raise Fault(f"a graph without grad: {context}")
    if gradients and len(x):
        compare_gradients(
            world, result, expected_of(form, as_tensor, x, noise, plain.double(), frozen), x, scale, context
        )


def expected_of(form, t, x, noise, twin, frozen):
    torch.manual_seed(noise)
    point = x.detach().double().clone().requires_grad_()
    reference = brute_force(_form_of(form, twin), t, point)
    divergence = (
        quadratic_forms(reference.jacobian, frozen.probes) if hasattr(frozen, "probes") else reference.divergence
    )
    weights = torch.arange(1, len(x) + 1).double()
    total = (divergence * weights).sum() + reference.value.sum()
    inputs = [point, *twin.parameters()]
    if not total.requires_grad:
        return [torch.zeros_like(i) for i in inputs]
    return torch.autograd.grad(total, inputs, materialize_grads=True, allow_unused=True)


def compare_gradients(world, result, expected, x, scale, context):
    weights = torch.arange(1, len(x) + 1).to(result.divergence)
    total = (result.divergence * weights).sum() + result.value.sum()
    inputs = [x, *world.module.parameters()]
    if not total.requires_grad:
        actual = [torch.zeros_like(i) for i in inputs]
    else:
        try:
            actual = torch.autograd.grad(total, inputs, materialize_grads=True, allow_unused=True)
        except Exception as error:
            raise Fault(f"backward: {type(error).__name__}: {error}: {context}") from error
    names = ["x", *(name for name, _ in world.module.named_parameters())]
    largest = 1 + max(float(e.abs().sum()) for e in expected)
    if largest < 1e6:
        for name, a, e in zip(names, actual, expected, strict=True):
            compare(f"the gradient in {name}", a, e, scale * largest * 10, context)
