"""The laws that every estimator meets for every field, event shape, dtype, kind of time and grad mode."""

import pytest
import torch
from catalogue import (
    ESTIMATORS,
    EVENTS,
    EXACT,
    STOCHASTIC,
    Network,
    quadratic,
    quadratic_divergence,
    true_divergence,
    true_jacobian,
)
from covering import covered
from torch import nn

from divflow.divergence import Exact, Hutchinson, divergence, value_and_divergence

TIMES = {"scalar": lambda k: torch.tensor(0.3), "per sample": lambda k: torch.linspace(0.1, 0.9, k)}


def close(estimator, actual, expected, jacobian=None):
    """Exact estimators to rounding; a single stochastic draw is checked elsewhere, for its distribution."""
    if estimator in EXACT.values():
        tolerance = 1e-10 if actual.dtype == torch.float64 else 2e-5
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@covered(name=ESTIMATORS, event=EVENTS, time=TIMES, batch=[0, 1, 4], dtype=[torch.float64, torch.float32])
def test_shape_dtype_and_value(name, event, time, batch, dtype):
    estimator, x = ESTIMATORS[name], torch.randn(batch, *event, dtype=dtype)
    t = TIMES[time](batch).to(dtype)
    for field in (Network(event, dtype), quadratic):
        value, div = value_and_divergence(field, t, x, estimator)
        assert value.shape == x.shape
        assert value.dtype == dtype
        assert div.shape == (batch,)
        assert div.dtype == dtype
        torch.testing.assert_close(value, field(t, x))
        if batch:
            expected = true_divergence(field, t, x)
            close(estimator, div, expected)
            if field is quadratic:
                torch.testing.assert_close(expected, quadratic_divergence(t, x))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_number_as_time(name):
    x = torch.randn(3, 2)
    torch.manual_seed(1)
    a = divergence(quadratic, 0.5, x, ESTIMATORS[name])
    torch.manual_seed(1)
    b = divergence(quadratic, torch.tensor(0.5), x, ESTIMATORS[name])
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_field_is_evaluated_once(name):
    calls = []

    def field(t, x):
        calls.append(1)
        return x**3

    for _ in range(3 if "forward" in name else 1):  # which is compared with reverse mode at calls 1 and 2
        calls.clear()
        divergence(field, 0.0, torch.randn(4, 3), ESTIMATORS[name])
    # Chunked forward mode evaluates once a chunk, as it says: it keeps no graph to go back to.
    assert len(calls) == (2 if name == "forward in chunks" else 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_without_gradients(name, mode):
    field, x, t = Network((5,)), torch.randn(3, 5, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    estimator = ESTIMATORS[name].freeze(x)
    expected = estimator(field, t, x)
    with mode():
        inside = x * 1, t * 1  # inference tensors, in inference mode
        value, div = estimator(field, inside[1], inside[0])
    assert not value.requires_grad
    assert not div.requires_grad
    assert div.grad_fn is None
    torch.testing.assert_close(value, expected.value.detach())
    torch.testing.assert_close(div, expected.divergence.detach())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_graph_where_nothing_requires_grad(name):
    value, div = value_and_divergence(quadratic, 0.5, torch.randn(3, 2), ESTIMATORS[name])
    assert not value.requires_grad
    assert not div.requires_grad


@pytest.mark.parametrize("name", ESTIMATORS)
def test_first_and_second_derivatives(name):
    field = Network((3,))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    t = torch.rand(2, dtype=torch.float64, requires_grad=True)
    estimator = ESTIMATORS[name].freeze(x)

    def function(t, x, *parameters):
        bound = dict(zip(dict(field.named_parameters()), parameters, strict=True))
        value, div = estimator(lambda t, x: torch.func.functional_call(field, bound, (t, x)), t, x)
        return div, value.square().sum()

    inputs = (t, x, *(p.detach().clone().requires_grad_() for p in field.parameters()))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(lambda t, x: function(t, x, *inputs[2:])[0], (t, x))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradients_reach_the_callers_graph_and_nothing_else(name):
    source = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x = source * 2
    field = Network((3,))
    divergence(field, 0.1, x, ESTIMATORS[name]).sum().backward()
    assert source.grad is not None
    assert x.grad_fn is not None
    plain = torch.randn(4, 3, dtype=torch.float64)
    divergence(field, 0.1, plain, ESTIMATORS[name]).sum().backward()
    assert plain.grad is None
    assert not plain.requires_grad
    assert plain.is_leaf


@pytest.mark.parametrize("name", ESTIMATORS)
def test_arguments_are_left_alone_by_code_that_works_in_place(name):
    def field(t, x):
        x *= 2
        x += 1
        return x * x

    x = torch.randn(3, 4, dtype=torch.float64)
    before = x.clone()
    value, div = value_and_divergence(field, 0.0, x, ESTIMATORS[name])
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    torch.testing.assert_close(value, (2 * x + 1) ** 2)
    # The Jacobian is diagonal, for which Rademacher probes are exact, too.
    if name in EXACT or "rademacher" in name:
        torch.testing.assert_close(div, (4 * (2 * x + 1)).sum(dim=1))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_module_gains_nothing(name):
    field = Network((3,))
    before, hooks = set(vars(field)), len(field._forward_hooks)
    divergence(field, 0.0, torch.randn(2, 3, dtype=torch.float64), ESTIMATORS[name])
    assert set(vars(field)) == before
    assert len(field._forward_hooks) == hooks
    assert all(parameter.grad is None for parameter in field.parameters())


@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_field_that_ignores_x(name, parameters):
    constant = torch.ones(4, dtype=torch.float64, requires_grad=parameters)
    x = torch.randn(3, 4, dtype=torch.float64)
    value, div = value_and_divergence(lambda t, x: constant.expand(3, 4) * t, 0.5, x, ESTIMATORS[name])
    torch.testing.assert_close(div.detach(), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(value.detach(), torch.full((3, 4), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("name", EXACT)
def test_detached_branches_and_partly_unused_inputs(name):
    x = torch.randn(3, 4, dtype=torch.float64)
    div = divergence(lambda t, x: (x * x).detach() * x, 0.0, x, EXACT[name], detached=True)
    torch.testing.assert_close(div, (x * x).sum(dim=1))
    div = divergence(lambda t, x: torch.cat([x[:, :1] ** 2, x[:, :3]], dim=1), 0.0, x, EXACT[name])
    torch.testing.assert_close(div, 2 * x[:, 0])


@pytest.mark.parametrize("name", EXACT)
def test_non_contiguous_and_channels_last(name):
    field = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    expected = true_divergence(lambda t, x: field(x), torch.tensor(0.0), x)
    for layout in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(divergence(lambda t, x: field(x), 0.0, layout, EXACT[name]), expected)


@pytest.mark.parametrize("name", EXACT)
def test_one_mask_of_dropout_for_value_and_divergence(name):
    dropout = nn.Dropout(0.5)

    def field(t, x):
        return dropout(x) * x  # value 2 m x^2, divergence sum 4 m x: the mask can be read off the value

    x = torch.rand(5, 6, dtype=torch.float64) + 0.5
    value, div = value_and_divergence(field, 0.0, x, EXACT[name])
    assert 0 < (value == 0).sum() < value.numel()
    torch.testing.assert_close(div, (2 * value / x).sum(dim=1))


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if "forward" not in name])
def test_custom_functions_without_batching_rules(name):
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.from_numpy(x.detach().numpy() ** 3)

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return torch.from_numpy(3 * x.detach().numpy() ** 2 * gradient.detach().numpy())

    x = torch.randn(3, 4, dtype=torch.float64)
    div = divergence(lambda t, x: Cube.apply(x), 0.0, x, ESTIMATORS[name])
    if name in EXACT or "rademacher" in name:
        torch.testing.assert_close(div, (3 * x**2).sum(dim=1))


def test_attention_within_a_sample_can_be_trained():
    layer = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)

    def field(t, x):
        return layer(x, x, x, need_weights=False)[0]  # fused kernels, without second derivatives of their own

    x = torch.randn(2, 3, 4, dtype=torch.float64)
    div = divergence(field, 0.0, x)
    torch.testing.assert_close(div.detach(), true_divergence(field, torch.tensor(0.0), x))
    div.sum().backward()
    assert layer.in_proj_weight.grad.abs().sum() > 0


def test_compiled_network_can_be_trained():
    field = Network((3,), torch.float32)
    x, t = torch.randn(4, 3), torch.tensor(0.2)
    expected = torch.autograd.grad(divergence(field, t, x).sum(), field.first.weight)
    compiled = torch.compile(field, backend="aot_eager")
    compiled(t, x)
    actual = torch.autograd.grad(divergence(compiled, t, x).sum(), field.first.weight)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_autocast_accumulates_in_float32(name):
    field = nn.Linear(64, 64)
    x = torch.randn(8, 64)
    estimator = ESTIMATORS[name].freeze(x)
    expected = estimator(lambda t, x: field(x), 0.0, x).divergence
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, div = estimator(lambda t, x: field(x), 0.0, x)
    assert value.dtype == div.dtype == torch.float32
    # The weights are rounded to 8 bits, the sum of 64 terms is not: were it, it would be off by 2^-8 of its size.
    torch.testing.assert_close(div, expected, rtol=0, atol=0.15)
    if name in EXACT:
        rounded = field.weight.to(torch.bfloat16).float().trace().expand(8)
        torch.testing.assert_close(div, rounded, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_states_give_a_float32_divergence(dtype):
    x = torch.rand(2, 300, dtype=dtype)
    div = divergence(lambda t, x: x * x, 0.0, x)
    assert div.dtype == torch.float32
    torch.testing.assert_close(div, (2 * x).float().sum(dim=1))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_generator_makes_it_reproducible_and_leaves_the_default_one_alone(name):
    field, x = Network((5,)), torch.randn(3, 5, dtype=torch.float64)
    state = torch.get_rng_state()
    a, b, c = (
        ESTIMATORS[name](field, 0.0, x, generator=torch.Generator().manual_seed(seed)).divergence for seed in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)
    d, e = (ESTIMATORS[name](field, 0.0, x).divergence for _ in range(2))
    assert not torch.equal(d, e)
    frozen = ESTIMATORS[name].freeze(x, torch.Generator().manual_seed(0))
    assert torch.equal(frozen(field, 0.0, x).divergence, a)
    assert torch.equal(frozen(field, 0.0, x).divergence, a)


@pytest.mark.parametrize("name", EXACT)
def test_deterministic_ones_freeze_to_themselves(name):
    assert EXACT[name].freeze(torch.ones(1, 2)) is EXACT[name]


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
def test_hutchinson_is_unbiased_with_the_variance_of_theory(distribution):
    field, draws = Network((2, 3)), 10_000
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    jacobian = true_jacobian(field, torch.tensor(0.4), x)[0]
    with torch.no_grad():
        samples = divergence(field, 0.4, x.expand(draws, 2, 3), Hutchinson(1, distribution))
    symmetric = (jacobian + jacobian.T) / 2
    trace, frobenius, size = jacobian.trace(), symmetric.square().sum(), 6
    variance = {
        "rademacher": 2 * (frobenius - symmetric.diagonal().square().sum()),
        "gaussian": 2 * frobenius,
        "sphere": 2 * size / (size + 2) * (frobenius - trace**2 / size),
    }[distribution]
    assert abs(samples.mean() - trace) < 5 * (variance / draws).sqrt()
    fourth = (samples - trace).pow(4).mean()
    assert abs(samples.var() - variance) < 5 * ((fourth - variance**2) / draws).sqrt()


def test_probes_are_averaged_and_report_their_standard_error():
    field = Network((6,))
    x = torch.randn(1, 6, dtype=torch.float64).expand(4_000, 6)
    with torch.no_grad():
        one, eight = (Hutchinson(m).estimate(field, 0.0, x) for m in (1, 8))
    assert one.standard_error is None
    ratio = one.divergence.var() / eight.divergence.var()
    assert 6.5 < ratio < 9.5
    torch.testing.assert_close(eight.standard_error.square().mean(), eight.divergence.var(), rtol=0.1, atol=0)
    assert Exact().estimate(field, 0.0, x[:2]).standard_error.abs().max() == 0


def test_probes_have_identity_covariance():
    x = torch.zeros(20_000, 2, 2)
    for distribution in ("rademacher", "gaussian", "sphere"):
        probes = Hutchinson(1, distribution).freeze(x).probes.view(-1, 4)
        torch.testing.assert_close(probes.T @ probes / len(probes), torch.eye(4), rtol=0, atol=0.05)


def test_nested_divergence_of_a_score():
    """The divergence of a gradient field is a Laplacian, through two levels of differentiation."""
    from divflow.operators import gradient

    x = torch.randn(3, 2, 2, dtype=torch.float64)

    def score(t, x):
        return gradient(lambda z: -(z**4).flatten(1).sum(dim=1), x)

    torch.testing.assert_close(divergence(score, 0.0, x), -12 * (x**2).flatten(1).sum(dim=1))
