"""Generated calls of the divergence: each episode is one field, called several times while its plan goes stale."""

import copy

import torch
from fuzz.outcomes import Fault, Outcome, is_typed, limit
from fuzz.reference import Reference, brute_force, quadratic_forms
from fuzz.sketches import hutch_plus_plus, xtrace
from fuzz.world import HALVES, Episode, form_of
from torch import Tensor

from divflow.divergence import Autograd, Exact, Hutchinson, HutchPlusPlus, XTrace
from divflow.operators.field import flatten_event

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
    # Fewer products than dimensions are a sketch, as many are exact.
    return (
        HutchPlusPlus(draw.choice([3, 4, max(3, size)])) if kind < 0.96 else XTrace(draw.choice([4, 5, max(4, size)]))
    )


def compare(
    name: str, actual: Tensor, expected: Tensor, tolerance: float | Tensor, context: str, excused: Tensor | bool = False
) -> None:
    """Equal within a tolerance; not finite where brute force is not, and elsewhere only where that is excused."""
    if actual.shape != expected.shape:
        raise Fault(f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}: {context}")
    actual = actual.detach().double()
    expected = expected.detach().double()
    difference = (actual - expected).abs()
    wrong = ~(difference <= tolerance) & actual.isfinite() & expected.isfinite()
    wrong |= actual.isfinite() & ~expected.isfinite() | ~actual.isfinite() & expected.isfinite() & ~torch.as_tensor(
        excused
    )
    if wrong.any():
        raise Fault(
            f"{name} differs by {difference[wrong].max().item():.3g} (tolerance {float(torch.as_tensor(tolerance).max()):.3g}): got {actual[wrong][:4].tolist()}, "
            f"expected {expected[wrong][:4].tolist()}: {context}"
        )


def divergences(seed: int, turns: int = 4) -> list[Outcome]:
    """Some calls of one field, compared with brute force."""
    world, history, outcomes = Episode(seed), [], []
    for turn in range(turns):
        if turn:
            history.append(world.change())
        with limit(20):
            outcomes.append(one_call(world, history))
    return outcomes


def one_call(world: Episode, history: list[str]) -> Outcome:
    draw, module, x = world.draw, world.module, world.x
    estimator, t = estimator_of(world), world.time()
    mode = draw.choice(["grad", "grad", "grad", "no_grad", "inference"])
    gradients = mode == "grad" and draw.random() < 0.4 and world.dtype not in HALVES and module.twice_differentiable
    if x.numel() and draw.random() < 0.05:
        x = x.clone(memory_format=torch.contiguous_format)
        x.view(-1)[draw.randrange(x.numel())] = draw.choice([float("nan"), float("inf"), -float("inf")])
        gradients = False
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
    if not torch.equal(before.nan_to_num(), x.detach().nan_to_num()):
        raise Fault(f"x was changed: {context}")
    torch.manual_seed(noise)
    as_tensor = (
        t.double()
        if isinstance(t, Tensor)
        else torch.tensor(float(torch.tensor(t, dtype=world.dtype)), dtype=torch.float64)
    )
    if error is not None:
        if isinstance(error, Fault):
            raise error
        if is_typed(error) and (world.method != "auto" or not x.isfinite().all()):
            return Outcome.TYPED
        try:
            with torch.enable_grad():
                point = x.detach().clone().requires_grad_()
                form_of(form, plain)(as_tensor.to(world.dtype), point.clone())
        except Exception as own:
            if type(own) is type(error):
                return Outcome.TYPED  # the field's own
            raise Fault(
                f"{type(error).__name__}: {error} where the field raises {own!r}: {context}", Outcome.OTHER
            ) from error
        raise Fault(f"{type(error).__name__}: {error}: {context}", Outcome.OTHER) from error
    reference = brute_force(form_of(form, twin), as_tensor, x.detach().double().clone())
    expected, determined = trace_of(frozen, reference)
    epsilon = torch.finfo(world.dtype).eps
    size = 1 + finite_size(reference.value.abs().amax()) if reference.value.numel() else 1.0
    steep = (1 + finite_size(reference.jacobian.abs().sum())) * (1 if isinstance(frozen, Exact | Autograd) else 10)
    if world.dtype in HALVES and not (size < 1e4 and steep < 1e5):
        return Outcome.UNCOMPARED
    # Rounding errors grow with the number of operations and with the slopes between; 100 of both is generous for these.
    scale = 200 * epsilon if world.dtype != torch.float64 else 1e5 * epsilon
    with_half = 4 if world.dtype in HALVES else 1
    if size >= 1e4 or steep >= 1e5:  # slopes between may be the squares of those at the end
        with_half *= size + steep
    # A sample with a NaN may be one altogether; half precisions overflow by themselves.
    excused = ~flatten_event(x.detach()).isfinite().all(1) if world.dtype not in HALVES else torch.tensor(True)
    tolerance = scale * size * with_half * (1 + steep / max(1, len(x)))
    excused_entries = excused.reshape(-1, *[1] * (x.ndim - 1)) if excused.ndim else excused
    compare("the value", result.value, reference.value, tolerance, context, excused_entries)
    tolerance = torch.where(determined, scale * steep * with_half * 3, torch.inf)
    compare("the divergence", result.divergence, expected, tolerance, context, excused)
    if mode != "grad" and (result.value.requires_grad or result.divergence.requires_grad):
        raise Fault(f"a graph without grad: {context}")
    if gradients and len(x) and spanned(frozen, reference.jacobian):
        twin = plain.double()
        torch.manual_seed(noise)
        compare_gradients(world, result, expected_of(form, as_tensor, x, twin, frozen), x, scale, context)
    return Outcome.EQUAL if determined.any() or not len(x) else Outcome.UNCOMPARED


def spanned(frozen: object, jacobian: Tensor) -> bool:
    """Whether a sketch's basis is determined; where it is not, as for J = 0, the estimate's derivative is not either."""
    vectors = getattr(frozen, "vectors", None)
    return vectors is None or int(torch.linalg.matrix_rank(jacobian.detach()).min()) >= len(vectors)


def finite_size(size: Tensor) -> float:
    """A size, or that of the finite numbers alone where there are others."""
    return float(size.detach().nan_to_num(0, 0, 0))


def trace_of(frozen: object, reference: Reference) -> tuple[Tensor, Tensor]:
    """What an estimator should give, from the Jacobian itself, and which samples of it are determined."""
    determined = torch.ones(len(reference.value), dtype=torch.bool)
    if hasattr(frozen, "probes"):
        return quadratic_forms(reference.jacobian, frozen.probes), determined
    if not hasattr(frozen, "vectors"):
        return reference.divergence, determined
    if not reference.jacobian.isfinite().all():  # which has no singular values
        return reference.divergence, ~determined
    formula = hutch_plus_plus if isinstance(frozen.estimator, HutchPlusPlus) else xtrace
    return formula(reference.jacobian, frozen.vectors)


def expected_of(form, t, x, twin, frozen):
    point = x.detach().double().clone().requires_grad_()
    reference = brute_force(form_of(form, twin), t, point)
    divergence, _ = trace_of(frozen, reference)
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
            raise Fault(f"backward: {type(error).__name__}: {error}: {context}", Outcome.OTHER) from error
    names = ["x", *(name for name, _ in world.module.named_parameters())]
    largest = 1 + max(float(e.abs().sum()) for e in expected)
    if largest < 1e6:
        for name, a, e in zip(names, actual, expected, strict=True):
            compare(f"the gradient in {name}", a, e, scale * largest * 10, context)
