"""Generated calls of score objectives, probability flows and operators, compared with their formulas in float64."""

import copy
import random

import torch
from fuzz.calls import compare
from fuzz.outcomes import Fault, Outcome, is_typed, limit
from fuzz.reference import brute_force, quadratic_forms
from fuzz.world import Generated
from torch import Generator, Tensor

from divflow.divergence import Exact, FieldError, Hutchinson, check_field
from divflow.operators import gradient, hessian, jacobian, laplacian, parameter_jacobian, partial_derivative
from divflow.score import SubVariancePreserving, VarianceExploding, VariancePreserving, probability_flow
from divflow.score.objectives import (
    DenoisingScoreMatching,
    FiniteDifferenceScoreMatching,
    ImplicitScoreMatching,
    SlicedScoreMatching,
)

__all__ = ["operators", "scores"]

_SMOOTH = ["linear", "wide", "tanh", "silu", "softmax", "time gate", "permute", "gather", "attention", "norm", "square",
           "group norm", "hook", "custom gate", "bilinear", "cat int", "glu", "energy", "reshape batch"]  # fmt: skip
_EVENTS = [(), (1,), (2,), (3,), (4,), (2, 2), (1, 2, 2), (3, 2)]
_MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def _drawn(seed: int) -> tuple[random.Random, Generated, Tensor, tuple[int, ...], str]:
    """A field, states for it, some of which are not numbers, and a description."""
    draw, noise = random.Random(seed), Generator().manual_seed(seed)
    event, dtype = draw.choice(_EVENTS), draw.choice([torch.float64, torch.float64, torch.float32])
    kinds = draw.choices(_SMOOTH, k=draw.choice([1, 2, 3]))
    net = Generated(kinds, event, (max(1, torch.Size(event).numel()),), seed).to(dtype)
    x = torch.randn(draw.choice([0, 1, 2, 3]), *event, generator=noise, dtype=torch.float64).to(dtype)
    if x.numel() and draw.random() < 0.1:
        x.view(-1)[0] = draw.choice([float("nan"), float("inf")])
    return draw, net, x, event, f"seed {seed}, {kinds}, {tuple(x.shape)}, {dtype}"


def _typed(error: Exception, about: str, net: Generated, x: Tensor, mode: type) -> Outcome:
    if is_typed(error):
        return Outcome.TYPED
    try:
        with mode():
            for sample in (x, x[:1], x.new_zeros(1, *x.shape[1:])):  # one sample, also where there are none
                copy.deepcopy(net)(torch.tensor(0.3, dtype=x.dtype), sample.clone())
    except Exception as own:
        if type(own) is type(error):
            return Outcome.TYPED  # the field's own
    raise error if isinstance(error, Fault) else Fault(f"{error!r}: {about}", Outcome.OTHER) from error


def _compared(name: str, actual: Tensor, expected: Tensor, x: Tensor, about: str) -> Outcome:
    finite = expected.detach().nan_to_num(0, 0, 0).abs()
    size = 1 + (float(finite.amax()) if finite.numel() else 0)
    broken = not x.isfinite().all()
    compare(name, actual, expected, (1e-9 if x.dtype == torch.float64 else 1e-3) * size**2, about, broken)
    return Outcome.EQUAL


def scores(seed: int) -> list[Outcome]:
    """One objective, or one field of a probability flow."""
    draw, net, x, event, about = _drawn(seed)
    options = draw.choice([1, 2, 3]), draw.choice(["rademacher", "gaussian", "sphere"]), draw.choice([True, False])
    objective = draw.choice(
        [
            ImplicitScoreMatching(),
            ImplicitScoreMatching(Exact("forward")),
            ImplicitScoreMatching(Hutchinson(*options[:2])),
            SlicedScoreMatching(*options),
            FiniteDifferenceScoreMatching(*options, step=0.01),
            DenoisingScoreMatching(0.3),
            DenoisingScoreMatching([0.1, 1.0], "sigma2"),
            None,
        ]
    )
    if objective == ImplicitScoreMatching(Exact("forward")) and any(piece.kind == "hook" for piece in net.pieces):
        objective = ImplicitScoreMatching()  # forward mode ignores hooks
    t = draw.choice([0.0, 0.5, torch.tensor(0.25, dtype=x.dtype), torch.linspace(0.1, 0.9, len(x), dtype=x.dtype)])
    mode = draw.choice(_MODES)
    several = isinstance(getattr(objective, "sigma", None), tuple)
    about += f", {objective}, t {t}, {mode.__name__}"
    twin = copy.deepcopy(net).double()
    try:
        with limit(20), mode():
            if objective is None:
                return [_probability_flow(net, twin, x, t, event, draw, about)]
            losses = objective(net, x, None if several else t, Generator().manual_seed(seed))
    except Exception as error:
        return [_typed(error, about, net, x, mode)]
    time = t.double() if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    expected = _loss(objective, twin, time, x, Generator().manual_seed(seed))
    return [_compared("the losses", losses, expected, x, about)]


def _loss(objective: object, net: Generated, t: Tensor, x: Tensor, generator: Generator) -> Tensor:
    """The formula, with the noise that the same generator draws."""

    def norm(values: Tensor) -> Tensor:
        return values.reshape(len(x), -1 if len(x) else 1).square().sum(1) / 2

    if isinstance(objective, DenoisingScoreMatching):
        level = torch.tensor(objective.sigma, dtype=x.dtype)
        if level.ndim:
            level = t = level[torch.randint(len(level), (len(x),), generator=generator)]
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        scale = level.reshape(-1, *[1] * (x.ndim - 1)) if level.ndim else level
        loss = norm(net(t.double(), (x + scale * noise).double()) + noise.double() / scale.double())
        return loss * level.double() ** 2 if objective.weighting == "sigma2" else loss
    if isinstance(objective, FiniteDifferenceScoreMatching):
        probes = Hutchinson(objective.num_slices, objective.distribution).freeze(x, generator).probes
        total = 0.0
        for v in probes.double():
            above, below = (net(t, x.double() + sign * objective.step * v) for sign in (1, -1))
            mean = (above + below) / 2
            of_norm = norm(mean) if objective.variance_reduction else _inner(v, mean) ** 2 / 2
            total = total + _inner(v, above - below) / (2 * objective.step) + of_norm
        return total / len(probes)
    here = brute_force(net, t, x.double())
    if isinstance(objective, ImplicitScoreMatching):
        frozen = objective.estimator.freeze(x, generator)
        probes = getattr(frozen, "probes", None)
        trace = here.divergence if probes is None else quadratic_forms(here.jacobian, probes)
        return trace + norm(here.value)
    probes = Hutchinson(objective.num_slices, objective.distribution).freeze(x, generator).probes
    trace = quadratic_forms(here.jacobian, probes)
    if objective.variance_reduction:
        return trace + norm(here.value)
    return trace + torch.stack([_inner(v, here.value) ** 2 / 2 for v in probes.double()]).mean(0)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).reshape(len(a), -1 if len(a) else 1).sum(1)


def _probability_flow(
    net: Generated,
    twin: Generated,
    x: Tensor,
    t: Tensor | float,
    event: tuple[int, ...],
    draw: random.Random,
    about: str,
) -> Outcome:
    """Its velocity, f x - g^2 s / 2, by the coefficients of Song et al. (2021, appendix B)."""
    kind = draw.choice([VariancePreserving, SubVariancePreserving, VarianceExploding])
    sde = kind(event_shape=event)
    velocity = probability_flow(net, sde).field()
    t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=x.dtype)
    actual, time = velocity(t, x), t.double()
    if kind is VarianceExploding:
        rate = torch.log(torch.tensor(sde.sigma_max / sde.sigma_min, dtype=torch.float64)) * 2
        drift, squared = torch.zeros_like(time), rate * sde.sigma_min**2 * torch.exp(rate * time)
    else:
        beta = sde.beta_min + (sde.beta_max - sde.beta_min) * time
        integral = sde.beta_min * time + (sde.beta_max - sde.beta_min) * time**2 / 2
        drift = -beta / 2
        squared = beta if kind is VariancePreserving else beta * (1 - torch.exp(-2 * integral))
    drift, squared = (c.reshape(-1, *[1] * (x.ndim - 1)) if c.ndim else c for c in (drift, squared))
    expected = drift * x.double() - squared * twin(time, x.double()) / 2
    return _compared("the velocity", actual, expected, x, about + f", {sde}")


def operators(seed: int) -> list[Outcome]:
    """One operator at one point."""
    draw, net, x, _, about = _drawn(seed)
    what, mode = draw.choice(list(_OPERATORS)), draw.choice(_MODES)
    about += f", {what}, {mode.__name__}"
    twin = copy.deepcopy(net).double()
    try:
        with limit(20), mode():
            actual = _OPERATORS[what][0](net, x)
    except Exception as error:
        return [_typed(error, about, net, x, mode)]
    with torch.enable_grad():
        expected = _OPERATORS[what][1](twin, x.detach().double())
    return [_compared(what, actual, expected, x, about)]


def _of(net: Generated, power: int = 2):
    """A scalar function of each sample."""
    return lambda z: net(torch.tensor(0.3, dtype=z.dtype), z).reshape(len(z), -1 if len(z) else 1).pow(power).sum(1)


def _rows(f, x: Tensor) -> Tensor:
    """Derivatives of `f(x) -> (k, n)` entry by entry, `(k, n, *event)`."""
    x = x.detach().clone().requires_grad_()
    values = f(x)
    rows = [
        torch.autograd.grad(values[:, i].sum(), x, create_graph=True, materialize_grads=True)[0]
        for i in range(values.shape[1])
    ]
    return torch.stack(rows, 1) if rows else x.new_zeros(len(x), 0, *x.shape[1:])


def _second(net: Generated, x: Tensor) -> Tensor:
    size = max(1, x.shape[1:].numel())

    def slope(z: Tensor) -> Tensor:
        first = torch.autograd.grad(_of(net)(z).sum(), z, create_graph=True, materialize_grads=True)[0]
        return first.reshape(len(z), size)

    return _rows(slope, x).reshape(len(x), *x.shape[1:], *x.shape[1:])


def _parameters(net: Generated, x: Tensor) -> Tensor:
    rows = []
    for sample in x:
        (row,) = torch.autograd.grad(_of(net)(sample[None]).sum(), net.last.weight, materialize_grads=True)
        rows.append(row)
    return torch.stack(rows) if rows else x.new_zeros(0, *net.last.weight.shape)


def _by_parameters(net: Generated, x: Tensor) -> Tensor:
    def f(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return (
            torch.func.functional_call(net, parameters, (torch.tensor(0.3, dtype=sample.dtype), sample))
            .reshape(1, -1)
            .pow(2)
            .sum(1)
        )

    return parameter_jacobian(f, x, parameters={"last.weight": net.last.weight})["last.weight"]


def _checked(net: Generated, x: Tensor) -> Tensor:
    """`check_field` lets it pass, and refuses it with the batch's mean added; `explain` changes no number."""
    check_field(net, 0.3, x)
    if len(x) > 1 and x.isfinite().all():
        try:
            check_field(lambda t, z: net(t, z) + z.mean(0), 0.3, x)
        except FieldError:
            pass
        else:
            raise Fault("a field that mixes samples passes check_field")
    Exact().explain(net, 0.3, x)
    return Exact()(net, 0.3, x).divergence


_OPERATORS = {
    "gradient": (lambda net, x: gradient(_of(net), x), lambda net, x: _rows(lambda z: _of(net)(z)[:, None], x)[:, 0]),
    "jacobian": (
        lambda net, x: jacobian(net, 0.3, x),
        lambda net, x: brute_force(net, torch.tensor(0.3, dtype=torch.float64), x).jacobian.reshape(
            len(x), *x.shape[1:], *x.shape[1:]
        ),
    ),
    "hessian": (lambda net, x: hessian(_of(net), x), _second),
    "laplacian": (
        lambda net, x: laplacian(_of(net), x),
        lambda net, x: (
            _second(net, x)
            .reshape(len(x), max(1, x.shape[1:].numel()), -1 if len(x) else max(1, x.shape[1:].numel()))
            .diagonal(dim1=1, dim2=2)
            .sum(1)
        ),
    ),
    "partial_derivative": (
        lambda net, x: partial_derivative(lambda a, b: (a * b).sin(), [x, x[:1] + 1], 1),
        lambda net, x: x * (x * (x[:1] + 1)).cos(),
    ),
    "parameter_jacobian": (_by_parameters, _parameters),
    "check_field": (_checked, lambda net, x: brute_force(net, torch.tensor(0.3, dtype=torch.float64), x).divergence),
}
