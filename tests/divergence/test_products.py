"""Products with a Jacobian, several in one pass: whatever torch's batching rules do, they are what single ones are."""

import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch_samples import samples

from divflow.divergence import Autograd, Exact, Hutchinson, divergence, value_and_divergence
from divflow.networks import UNet
from divflow.operators import batching
from divflow.operators.linearization import linearize

SHAPE = (2, 4, 2, 2)
NORMS = {
    "one group, as many channels as entries": nn.GroupNorm(1, 4),
    "no weight": nn.GroupNorm(2, 4, affine=False),
    "groups": nn.GroupNorm(2, 4),
    "instances": nn.InstanceNorm2d(4, affine=True),
    "layer": nn.LayerNorm((4, 2, 2)),
    "batch, evaluation": nn.BatchNorm2d(4).eval(),
    "root mean square": nn.RMSNorm((2,)),
}


def field_of(norm):
    return lambda t, x: norm(x) ** 2 * x


@pytest.mark.parametrize("estimator", [Exact(), Exact("reverse"), Exact(chunk_size=3), Exact("reverse", chunk_size=16)])
@pytest.mark.parametrize("name", NORMS)
def test_normalization_with_a_graph(name, estimator):
    norm = NORMS[name].double()
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    results = []
    for way in (estimator, Autograd()):
        div = divergence(field_of(norm), 0.0, x, way)
        (first,) = torch.autograd.grad(div.square().sum(), x, create_graph=True)
        results.append((div, first, *torch.autograd.grad(first.square().sum(), x)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NORMS)
def test_several_probes_are_the_mean_of_single_ones(name):
    norm = NORMS[name].double()
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    frozen = Hutchinson(3).freeze(x)
    singly = [frozen.__class__(probe[None]) for probe in frozen.probes]
    together = divergence(field_of(norm), 0.0, x, frozen)
    expected = torch.stack([divergence(field_of(norm), 0.0, x, one) for one in singly]).mean(dim=0)
    torch.testing.assert_close(together, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value.square().sum(), x)[0] for value in (together, expected)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("zero", [False, True])
def test_a_training_step_of_a_unet_in_chunks(zero):
    """Whether to batch is decided once, for the products and for their recomputation in the backward pass."""
    net = UNet((1, 4, 4), channels=[4, 4]).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.0 if zero else 0.3)
    x, t, gradients = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64), []
    for estimator in (Exact(chunk_size=3), Exact("reverse", chunk_size=5), Autograd()):
        net.zero_grad()
        value, div = value_and_divergence(net, t, x, estimator)
        (div.sum() + value.square().sum()).backward()
        gradients.append([div.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
    for found in gradients[:2]:
        for actual, expected in zip(found, gradients[2], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_a_fault_is_found_behind_a_layer_of_zeros():
    """The products themselves are all zero there; their derivatives are not."""
    norm, last = nn.GroupNorm(1, 4).double(), nn.Conv2d(4, 4, 1).double()
    nn.init.zeros_(last.weight)
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)

    def field(t, x):
        return last(norm(x) ** 2)

    for _ in range(3):
        torch.testing.assert_close(divergence(field, 0.0, x), divergence(field, 0.0, x, Autograd()))
        nn.init.normal_(last.weight)


def test_a_point_that_the_value_ignores_has_products_of_zero_whatever_its_shape():
    weight = torch.ones(3, requires_grad=True)
    for shape in ((), (2,), (2, 0)):
        at = linearize(lambda z: 2 * weight, torch.zeros(shape, requires_grad=True), lambda value, _: value)
        torch.testing.assert_close(at.pullback(torch.ones(4, 3)), torch.zeros(4, *shape))
        torch.testing.assert_close(at.pullback(torch.ones(1, 3)), torch.zeros(1, *shape))


def test_tried_at_the_first_use_and_at_uses_2_4_8(monkeypatch):
    compared, uses, compare = [], [], batching._compare
    monkeypatch.setattr(batching, "_compare", lambda *arguments: compared.append(len(uses)) or compare(*arguments))
    layer = nn.LayerNorm((3, 5))  # shapes that no other test has
    for use in range(9):
        uses.append(use)
        divergence(lambda t, x: layer(x).tanh(), 0.0, torch.randn(7, 3, 5), Exact("reverse"))
    # All products in one pass: what is tried is that.
    assert compared == [1, 2, 4, 8]


def _fields(op, most):
    """Functions of one tensor, of its shape or another, from torch's own samples for an operation."""
    found = 0
    for sample in samples(op):
        x = sample.input
        if found == most:
            return
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.layout == torch.strided and 0 < x.numel() <= 64:
            found += 1
            yield lambda z, sample=sample: op(z, *sample.args, **sample.kwargs), x.detach()


# They draw random numbers, or need what this build lacks.
_LEFT_OUT = "dropout rrelu bernoulli normal rand multinomial jiterator sparse to_sparse new_empty empty uniform cauchy"
OPS = [
    op
    for op in op_db
    if op.supports_autograd
    and op.supports_gradgrad
    and torch.float64 in op.dtypes
    and not any(word in op.name for word in _LEFT_OUT.split())
]


def _products_of(name, most):
    """How many of its samples were compared."""
    compared = 0
    for op in OPS:
        if op.name != name:
            continue
        for function, x in _fields(op, most):
            point = x.clone().requires_grad_()
            try:
                at = linearize(lambda z, function=function: function(z), point, lambda value, _: value)
            except Exception:
                continue  # a sample that is no function of one floating tensor
            value = at.value
            if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not 0 < value.numel() <= 256:
                continue
            vectors = torch.randn((3, *value.shape), dtype=value.dtype)
            try:
                single = torch.stack([at.pullback(vector[None])[0] for vector in vectors])
            except RuntimeError:
                continue  # not differentiable at all, as it is
            torch.testing.assert_close(at.pullback(vectors), single, rtol=1e-7, atol=1e-7, equal_nan=True)
            compared += 1
    return compared


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(8))
def test_batched_products_of_all_of_torchs_operations(part):
    """torch's own samples of each operation; of torch 2.13's, three have wrong batched products with a graph."""
    names = sorted({op.name for op in OPS})[part::8]
    assert sum(_products_of(name, most=2) for name in names) > len(names) / 2


@pytest.mark.filterwarnings("ignore")
def test_a_rule_that_was_right_and_refuses_another_memory_layout_is_left():
    """`max_unpool2d` has one that can't be told from the graph: an error of torch, which is not the field's."""
    assert _products_of("nn.functional.max_unpool2d", most=1000) > 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_batched_products_of_all_of_torchs_operations_at_all_samples():
    assert sum(_products_of(name, most=1000) for name in sorted({op.name for op in OPS})) > 5000


def _exact_of(name, most):
    compared = 0
    for op in OPS:
        # torch's own derivative of that one is wrong: finite differences of its samples are another trace.
        if op.name != name or name == "as_strided_scatter":
            continue
        for function, x in _fields(op, most):

            def field(t, z, function=function, shape=x.shape):
                return function(z.reshape(shape)).reshape(1, -1)

            rows = x.reshape(1, -1)
            try:
                expected = divergence(field, 0.0, rows, Autograd())
            except Exception:
                continue  # of another shape, or not differentiable
            actual = divergence(field, 0.0, rows)
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7, equal_nan=True)
            compared += 1
    return compared


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_exact_divergence_of_all_of_torchs_operations(part):
    names = sorted({op.name for op in OPS})[part::4]
    assert sum(_exact_of(name, most=2) for name in names) > len(names) / 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_exact_divergence_of_all_of_torchs_operations_at_all_samples():
    assert sum(_exact_of(name, most=1000) for name in sorted({op.name for op in OPS})) > 1000
