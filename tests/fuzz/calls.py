"""Generated calls of the divergence: each episode is one field, called several times while its plan goes stale."""

import copy

import torch
from fuzz.outcomes import Fault, Outcome, is_typed, limit
from fuzz.reference import brute_force, quadratic_forms
from fuzz.sketches import hutch_plus_plus, xtrace
from fuzz.world import HALVES, Episode, form_of
from torch import Tensor

from divflow.divergence import Autograd, Exact, Hutchinson, HutchPlusPlus, XTrace

__all__ = ["compare", "divergences"]


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
    field = form_of(form, module)
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
                form_of(form, plain)(as_tensor.to(world.dtype), point.clone())
        except Exception as own:
            if type(own) is type(error):
                return
            raise Fault(f"{type(error).__name__}: {error} where the field raises {own!r}: {context}") from error
        raise Fault(f"{type(error).__name__}: {error}: {context}") from error
    reference = brute_force(form_of(form, twin), as_tensor, x.detach().double().clone())
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
    reference = brute_force(form_of(form, twin), t, point)
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
