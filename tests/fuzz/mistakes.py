"""Wrong arguments: shapes, dtypes, types and options that no call should take."""

import random

import numpy as np
import torch
from fuzz.outcomes import Fault, Outcome, is_typed, limit

from divflow.divergence import (
    Autograd,
    Exact,
    Hutchinson,
    HutchPlusPlus,
    XTrace,
    check_field,
    divergence,
    value_and_divergence,
)
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.operators import flat_gradient, gradient, hessian, jacobian, laplacian, parameter_jacobian
from divflow.score import VarianceExploding, VariancePreserving, probability_flow
from divflow.score.objectives import (
    DenoisingScoreMatching,
    FiniteDifferenceScoreMatching,
    ImplicitScoreMatching,
    SlicedScoreMatching,
)
from divflow.solver import Solver

__all__ = ["mistakes"]


def field(t, x):
    return torch.sin(x)


def flow(**options):
    return ContinuousFlow(lambda t, x: -x, 2, solver=Solver("rk4", options={"step_size": 0.5}), **options)


def numbers(x):
    return x.flatten(1).square().sum(1)


X = torch.ones(2, 2)
ESTIMATORS = [Exact(), Exact("reverse"), Exact("forward"), Autograd(), Hutchinson(), HutchPlusPlus(3), XTrace(4)]
NO_STATES = [None, "x", 3, 2.5, [1.0, 2.0], np.ones((2, 2)), torch.ones(2, 2, dtype=torch.long), torch.ones(()),
             torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.complex64), object(), {}]  # fmt: skip
NO_EVENTS = [torch.ones(2), torch.ones(2, 3), torch.ones(2, 2, 1), torch.ones(2, 0)]
NO_TIMES = [None, "t", [0.0], torch.ones(3), torch.ones(2, 1), 1j, object(), np.ones(2)]
NO_FIELDS = [None, 3, "g", lambda t, x: x[:1], lambda t, x: x.sum(), lambda t, x: None, lambda t, x: (x, x),
             lambda t, x: x.double(), lambda t, x: x.long(), lambda t, x: x.tolist(), lambda t, x: x[None], torch.ones(2)]  # fmt: skip
NO_COUNTS = [0, -1, 1.5, "2", None, float("nan"), float("inf"), [2], torch.ones(2)]
NO_POSITIVES = [0, -1.0, float("nan"), "1e-3", [1.0], 1j]
NO_CONTEXTS = [torch.ones(3, 1), torch.ones(()), "c", 3]
NO_GENERATORS = [0, "seed", np.random.default_rng(0)]

# Each call, and the arguments that it must refuse.
CALLS = {
    **{f"{e!r} of x": (lambda x, e=e: value_and_divergence(field, 0.0, x, e), NO_STATES) for e in ESTIMATORS},
    **{f"{e!r} of t": (lambda t, e=e: divergence(field, t, X, e), NO_TIMES) for e in ESTIMATORS},
    **{f"{e!r} of g": (lambda g, e=e: divergence(g, 0.0, X, e), NO_FIELDS) for e in ESTIMATORS},
    **{f"{type(e).__name__}.freeze": (lambda x, e=e: e.freeze(x), NO_STATES) for e in ESTIMATORS[4:]},
    "Hutchinson generator": (lambda v: Hutchinson()(field, 0.0, X, v), NO_GENERATORS),
    "estimator": (lambda e: divergence(field, 0.0, X, e), [None, "exact", Exact, 3]),
    "explain x": (lambda x: Exact().explain(field, 0.0, x), NO_STATES),
    "explain g": (lambda g: Exact().explain(g, 0.0, X), NO_FIELDS),
    "check_field x": (lambda x: check_field(field, 0.0, x), NO_STATES),
    "check_field g": (lambda g: check_field(g, 0.0, X), NO_FIELDS),
    "check_field t": (lambda t: check_field(field, t, X), NO_TIMES),
    "Exact method": (lambda v: Exact(v), ["no", None, 3, ["auto"], torch.ones(2)]),
    "Exact chunk_size": (lambda v: Exact(chunk_size=v), [v for v in NO_COUNTS if v is not None]),
    "Hutchinson probes": (lambda v: Hutchinson(v), NO_COUNTS),
    "Hutchinson distribution": (lambda v: Hutchinson(1, v), ["no", None, 3, ["gaussian"]]),
    "HutchPlusPlus": (lambda v: HutchPlusPlus(v), [*NO_COUNTS, 2]),
    "XTrace": (lambda v: XTrace(v), [*NO_COUNTS, 3]),
    "Solver method": (lambda v: Solver(v), ["no", None, 3, ["rk4"]]),
    "Solver rtol": (lambda v: Solver(rtol=v), [*NO_POSITIVES, None]),
    "Solver atol": (lambda v: Solver(atol=v), [*NO_POSITIVES, None]),
    "Solver gradient": (lambda v: Solver(gradient=v), ["no", None, 3]),
    "Solver options": (lambda v: Solver(options=v), [{"no": 1}, "step_size", 3]),
    "Solver step_size": (lambda v: Solver("rk4", options={"step_size": v}), [0, -1, "a", float("nan")]),
    "Solver max_evaluations": (lambda v: Solver(max_evaluations=v), [0, -1, "2", float("nan")]),
    "Quadrature nodes": (lambda v: Quadrature(v), [*(v for v in NO_COUNTS if v is not None), 2, 4, 1]),
    "Quadrature tolerance": (lambda v: Quadrature(tolerance=v), NO_POSITIVES),
    "Quadrature max_intervals": (lambda v: Quadrature(max_intervals=v), [0, -1, "2", None]),
    "flow event_shape": (lambda v: ContinuousFlow(field, v), [-1, "2", None, 2.5, [2.5], [-1]]),
    "flow velocity": (lambda v: ContinuousFlow(v, 2).log_prob(X), [None, 3, "v", lambda t, x: x[:1], lambda t: t]),
    "flow base": (lambda v: flow(base=v), ["normal", 3, torch.distributions.Normal(0.0, 1.0)]),
    "flow t_base": (lambda v: flow(t_base=v), ["0", None, 1.0, torch.ones(2), float("nan"), float("inf"), [0.0], 1j]),
    "flow t_data": (lambda v: flow(t_data=v), ["1", None, 0.0, torch.ones(2), float("nan"), -float("inf"), [1.0]]),
    "flow estimator": (lambda v: flow(estimator=v), ["exact", 3, Exact]),
    "flow likelihood": (lambda v: flow(likelihood=v), ["quadrature", 3, Quadrature]),
    "flow solver": (lambda v: ContinuousFlow(field, 2, solver=v), ["rk4", 3, Solver]),
    "flow.replace": (lambda v: flow().replace(estimator=v), ["exact", 3, Augmented()]),
    **{f"flow.{name}": (lambda x, name=name: getattr(flow(), name)(x), NO_STATES + NO_EVENTS) for name in ("log_prob", "evaluate", "encode", "decode")},
    **{f"flow.{name} context": (lambda c, name=name: getattr(flow(), name)(X, c), NO_CONTEXTS) for name in ("log_prob", "encode")},
    "flow.log_prob generator": (lambda v: flow(estimator=Hutchinson()).log_prob(X, generator=v), NO_GENERATORS),
    "flow.evaluate penalties": (lambda v: flow().evaluate(X, penalties=v), [["no"], "kinetic_energy", 3]),
    "flow.sample": (lambda v: flow().sample(v), [-1, 1.5, "2", None, [2], torch.ones(2)]),
    "flow.sample generator": (lambda v: flow().sample(2, generator=v), NO_GENERATORS),
    "flow.rsample": (lambda v: flow().rsample_and_log_prob(v), [-1, 1.5, "2", None]),
    "flow.trajectory": (lambda v: flow().trajectory(X, v), [[], [0.0, 0.0], [0.0, 1.0, 0.5], "01", 3, [0.0, None], [0.0, float("nan")]]),
    "probability_flow score": (lambda v: probability_flow(v, VariancePreserving(event_shape=2)).log_prob(X), [None, 3, lambda: 1, lambda t, x: x[:1]]),
    "probability_flow sde": (lambda v: probability_flow(field, v), [None, 3, "vp", VariancePreserving, VariancePreserving()]),
    "VP beta_min": (lambda v: VariancePreserving(beta_min=v), [0, -1, 30, float("nan"), "a", None]),
    "VE sigma_max": (lambda v: VarianceExploding(sigma_max=v), [0, -1, 1e-9, float("inf"), "a", None]),
    "VP epsilon": (lambda v: VariancePreserving(epsilon=v), [0, -1, 2, float("nan"), "a", None]),
    "VP event_shape": (lambda v: VariancePreserving(event_shape=v), [-1, "2", 2.5, [2.5]]),
    **{f"{type(o).__name__} {i}": (call, wrong)
       for o in (ImplicitScoreMatching(), SlicedScoreMatching(), FiniteDifferenceScoreMatching(), DenoisingScoreMatching(0.1))
       for i, (call, wrong) in enumerate([(lambda x, o=o: o(field, x), NO_STATES), (lambda t, o=o: o(field, X, t), NO_TIMES[1:]), (lambda g, o=o: o(g, X), NO_FIELDS)])},
    "objective generator": (lambda v: DenoisingScoreMatching(0.1)(field, X, generator=v), NO_GENERATORS),
    "implicit estimator": (lambda v: ImplicitScoreMatching(v)(field, X), [None, "exact", 3]),
    "slices": (lambda v: SlicedScoreMatching(v), NO_COUNTS),
    "sigma": (lambda v: DenoisingScoreMatching(v), [0, -1, "a", [], [0.1, 0], [0.1, "a"], float("nan"), 1j]),
    "step": (lambda v: FiniteDifferenceScoreMatching(step=v), NO_POSITIVES),
    "gradient x": (lambda x: gradient(numbers, x), NO_STATES),
    "gradient f": (lambda f: gradient(f, X), [None, 3, lambda x: x, lambda x: None, lambda x: x.sum(), lambda x: 2.0]),
    "hessian x": (lambda x: hessian(numbers, x), NO_STATES),
    "hessian f": (lambda f: hessian(f, X), [None, 3, lambda x: None, lambda x: x.sum(), lambda x: x[:1]]),
    "jacobian x": (lambda x: jacobian(field, 0.0, x), NO_STATES),
    "jacobian t": (lambda t: jacobian(field, t, X), NO_TIMES),
    "jacobian g": (lambda g: jacobian(g, 0.0, X), [None, 3, "g", lambda t, x: x[:1], lambda t, x: x.sum(), lambda t, x: None]),
    "laplacian x": (lambda x: laplacian(numbers, x), NO_STATES),
    "laplacian f": (lambda f: laplacian(f, X), [None, 3, lambda x: x[:1], lambda x: None]),
    "laplacian estimator": (lambda e: laplacian(numbers, X, e), ["exact", 3, Exact]),
    "flat_gradient": (lambda v: flat_gradient(lambda *a: a[0].sum(), v), [[], [None], [torch.ones(2, dtype=torch.long)], 3, None, "ab"]),
    "parameter_jacobian": (lambda v: parameter_jacobian(lambda p, x: x * p["a"], X, parameters=v), [None, {}, 3, "a", {"a": 3}]),
    "parameter_jacobian x": (lambda v: parameter_jacobian(lambda p, x: x * p["a"], v, parameters={"a": torch.ones(())}), [None, 3, "x", torch.ones(())]),
}  # fmt: skip


def mistakes(seed: int) -> list[Outcome]:
    """One call with an argument that it must refuse."""
    draw = random.Random(seed)
    name = draw.choice(list(CALLS))
    return [refused(name, draw.choice(CALLS[name][1]))]


def refused(name: str, value: object) -> Outcome:
    """The call with this argument must end in a typed error."""
    try:
        with limit(20):
            result = CALLS[name][0](value)
    except Fault:
        raise
    except Exception as error:
        # Of beartype, which checks the annotations while tests run.
        if is_typed(error) or type(error).__name__ in ("TypeCheckError", "BeartypeCallHintParamViolation"):
            return Outcome.TYPED
        raise Fault(f"{name} of {value!r}: {error!r}", Outcome.OTHER) from error
    raise Fault(f"{name} takes {value!r} and returns {result!r}")
