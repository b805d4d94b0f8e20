"""Divergences on manifolds by every estimator, against an orthonormal frame's, closed forms and geodesic differences."""

import math

import pytest
import torch
from catalogue import KINDS
from spaces import MANIFOLDS, points
from torch import nn
from torch.func import jacrev

from divflow.divergence import (
    ControlVariate,
    Exact,
    FieldError,
    Hutchinson,
    check_field,
    divergence,
    value_and_divergence,
)
from divflow.divergence.around import around
from divflow.divergence.exact.conditioned import given
from divflow.manifolds import Manifold, ManifoldError, Product, SpecialOrthogonal, Sphere, TangentField, Torus, hat
from divflow.networks import MLP, HollowMLP
from divflow.tape.graph import graph_of

TIME = torch.tensor(0.3, dtype=torch.float64)


class Stiefel(Manifold):
    """Matrices (n, p) of orthonormal columns, by their closest point and tangent projection alone."""

    def __init__(self, n, p):
        self.event_shape, self.dim = torch.Size([n, p]), n * p - p * (p + 1) // 2

    def project(self, x):
        for _ in range(40):
            x = x @ (1.5 * torch.eye(x.shape[-1], dtype=x.dtype) - 0.5 * x.mT @ x)
        return x

    def to_tangent(self, x, u):
        a = x.mT @ u
        return u - x @ (a + a.mT) / 2


SPACES = {
    **MANIFOLDS,
    "sphere in R^4": Sphere(3),
    "sphere in R^9": Sphere(8),
    "two spheres": Product(here=Sphere(2), there=Sphere(1)),
    "stiefel": Stiefel(4, 2),
}


class Field(nn.Module):
    """A small smooth network of ambient coordinates; with a normal part and no symmetry."""

    def __init__(self, manifold, hidden=12, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = MLP(manifold.event_shape, hidden=(hidden, hidden)).double()

    def forward(self, t, x, context=None):
        return self.net(t, x) if context is None else self.net(t, x) * context.reshape(-1, *[1] * (x.ndim - 1))


def on(manifold, count, seed=0):
    if isinstance(manifold, Stiefel):
        noise = torch.randn(count, *manifold.event_shape, generator=torch.Generator().manual_seed(seed)).double()
        return torch.linalg.qr(noise)[0]
    return points(manifold, count, seed)


def frame(manifold, x):
    """An orthonormal basis of the tangent space at a point `(*event)`, from the projection's eigenvectors."""
    basis = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    projection = manifold.to_tangent(x.expand_as(basis), basis).flatten(1)
    values, vectors = torch.linalg.eigh(projection)
    tangent = vectors.T[values > 0.5]
    assert len(tangent) == manifold.dim
    return tangent


def by_frame(field, manifold, x):
    """sum_i <e_i, D_i v> of the tangent field v(y) = P_y u(t, y), `(k,)`."""
    found = []
    for point in x:
        jacobian = jacrev(lambda y: manifold.to_tangent(y, field(TIME, y[None])[0]).flatten())(point).flatten(1)
        basis = frame(manifold, point)
        found.append(torch.einsum("in,nm,im->", basis, jacobian, basis))
    return torch.stack(found).detach()


@pytest.mark.parametrize("kind", ["exact", "reverse", "forward", "autograd"])
@pytest.mark.parametrize("name", SPACES)
def test_exact_divergences_are_those_of_a_frame(name, kind):
    manifold, estimator = SPACES[name], KINDS.get(kind, Exact("forward"))
    u, x = Field(manifold), on(manifold, 5)
    value, found = value_and_divergence(TangentField(u, manifold), TIME, x, estimator)
    torch.testing.assert_close(found, by_frame(u, manifold, x), rtol=0, atol=1e-10)
    torch.testing.assert_close(value, manifold.to_tangent(x, u(TIME, x)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["hutchinson", "hutch++", "xtrace", "control variate"])
@pytest.mark.parametrize("name", ["sphere", "radians", "rotations", "product", "stiefel"])
def test_estimates_are_unbiased(name, kind):
    manifold, draws = SPACES[name], 3_000
    u, x = Field(manifold), on(manifold, 3)
    many = x.repeat(draws, *[1] * (x.ndim - 1))
    generator = torch.Generator().manual_seed(0)
    found = KINDS[kind].estimate(TangentField(u, manifold), TIME, many, generator).divergence.view(draws, 3).detach()
    error = found.std(dim=0) / draws**0.5
    assert ((found.mean(dim=0) - by_frame(u, manifold, x)).abs() < 4 * error + 1e-10).all()


@pytest.mark.parametrize("name", ["sphere", "sphere in R^9", "rotations", "two spheres"])
def test_only_the_tangent_part_of_a_probe_counts(name):
    """The products are those with P Du P, but for the part that the curvature adds."""
    manifold = SPACES[name]
    u, x = Field(manifold), on(manifold, 4)
    field, coordinates = around(TangentField(u, manifold), x, estimated=True)
    jacobian = torch.func.vmap(jacrev(lambda y: u(TIME, y[None])[0].flatten()))(x).flatten(2)
    size = x[0].numel()
    projection = manifold.to_tangent(
        x[:, None].expand(-1, size, *x.shape[1:]), torch.eye(size, dtype=x.dtype).view(1, size, *x.shape[1:])
    ).flatten(2)
    curvature = (manifold.mean_curvature(x) * u(TIME, x)).flatten(1).sum(dim=1) / size
    expected = projection @ jacobian @ projection + curvature[:, None, None] * torch.eye(size, dtype=x.dtype)
    found = torch.stack(
        [
            torch.autograd.grad((field(TIME, y) * b.view(x.shape[1:])).sum(), y)[0].flatten(1)
            for b in torch.eye(size, dtype=x.dtype)
            for y in [coordinates.origin.clone().requires_grad_()]
        ],
        dim=1,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_tangent_probes_vary_less_than_ambient_ones():
    manifold, draws = Sphere(2), 20_000
    u, x = Field(manifold), points(Sphere(2), 1).expand(draws, 3)
    ambient = divergence(lambda t, y: TangentField(u, manifold)(t, y), TIME, x, Hutchinson())
    tangent = divergence(TangentField(u, manifold), TIME, x, Hutchinson())
    error = (ambient.var() / draws).sqrt()
    assert (ambient.mean() - tangent.mean()).abs() < 5 * error
    assert tangent.var() < 0.7 * ambient.var()


@pytest.mark.parametrize("name", ["sphere", "radians", "rotations", "product", "stiefel"])
def test_derivatives_along_geodesics(name):
    """Of the divergence by x and by parameters, first and second, against central differences on the manifold."""
    manifold = SPACES[name]
    u, x = Field(manifold), on(manifold, 2)
    tangent = manifold.to_tangent(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double())
    field, bias = TangentField(u, manifold), u.net.layers[0].bias

    def along(s):
        return manifold.project(x + s * tangent)

    def at(s):
        return divergence(field, TIME, along(s)).sum()

    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(at(s), s, create_graph=True)
    (second,) = torch.autograd.grad(first, s, retain_graph=True)
    (mixed,) = torch.autograd.grad(first, bias)
    h = 1e-4
    with torch.no_grad():
        plus, middle, minus = at(torch.tensor(h)), at(torch.tensor(0.0)), at(torch.tensor(-h))
    torch.testing.assert_close(first, (plus - minus) / (2 * h), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(second, (plus - 2 * middle + minus) / h**2, rtol=1e-4, atol=1e-5)
    rates = []
    for step in (h, -h):
        (rate,) = torch.autograd.grad(at(torch.tensor(step)), bias)
        rates.append(rate)
    torch.testing.assert_close(mixed, (rates[0] - rates[1]) / (2 * h), rtol=1e-6, atol=1e-7)


def test_closed_forms():
    """The gradient of x_3 on a sphere of dimension d has the divergence -d x_3; on SO(3) left-invariant fields have none."""
    for d in (1, 2, 5):
        up = torch.eye(d + 1, dtype=torch.float64)[d]
        x = points(Sphere(d), 6)
        found = divergence(TangentField(lambda t, x, up=up: up.expand_as(x), Sphere(d)), 0.0, x)
        torch.testing.assert_close(found, -d * x[:, d])
    turn = hat(torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64))
    rotations = points(SpecialOrthogonal(), 6)
    for field in (lambda t, x: x @ turn, lambda t, x: turn @ x):  # flows by isometries
        found = divergence(TangentField(field, SpecialOrthogonal()), 0.0, rotations)
        torch.testing.assert_close(found, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
    # The gradient of tr(R) in SO(3), whose Laplacian there is -2 tr(R) by the metric of the ambient space / 2
    found = divergence(TangentField(lambda t, x: torch.eye(3).to(x).expand_as(x), SpecialOrthogonal()), 0.0, rotations)
    torch.testing.assert_close(found, -rotations.diagonal(dim1=1, dim2=2).sum(dim=1))


@pytest.mark.parametrize(
    ("manifold", "method", "products"),
    [
        (Sphere(2), "layered", 0),
        (Sphere(15), "layered", 0),
        (Torus(7), "layered", 0),
        (SpecialOrthogonal(), "reverse", 3),
    ],
)
def test_the_networks_closed_form_is_found(manifold, method, products):
    torch.manual_seed(0)
    plan = Exact().explain(
        TangentField(MLP(manifold.event_shape, (256, 256)), manifold), 0.3, points(manifold, 512).float()
    )
    assert (plan.method, plan.products) == (method, products)


@pytest.mark.parametrize("manifold", [Sphere(4), Torus(3), Product(here=Sphere(2), there=Torus(2))])
def test_an_own_divergence_serves(manifold):
    torch.manual_seed(0)
    u, x = HollowMLP(manifold.event_shape[0], (16, 16)).double(), points(manifold, 5)
    field = TangentField(u, manifold)
    assert Exact().explain(field, TIME, x).method == "own"
    torch.testing.assert_close(divergence(field, TIME, x), by_frame(u, manifold, x), rtol=0, atol=1e-10)


def test_a_context_goes_through():
    manifold, x = Sphere(2), points(Sphere(2), 4)
    u, context = Field(Sphere(2)), torch.rand(4, 1, dtype=torch.float64) + 1
    found = divergence(TangentField(u, manifold), TIME, x, context=context)
    torch.testing.assert_close(found, context[:, 0] * by_frame(u, manifold, x))
    assert Exact().explain(TangentField(u, manifold), TIME, x, context=context).products in (0, 3)


def test_a_plan_is_kept_from_call_to_call():
    manifold, calls = Sphere(2), []
    u = Field(manifold)
    u.register_forward_hook(lambda *_: calls.append(1))
    field = TangentField(u, manifold)
    for seed in range(6):
        divergence(field, TIME, points(manifold, 4, seed))
    calls.clear()
    for seed in (8, 9):  # no power of two, at which calls are verified
        divergence(field, TIME, points(manifold, 4, seed + 1))
    assert len(calls) <= 3


def test_a_checked_field_is_one_of_its_manifold():
    manifold = Sphere(2)
    check_field(TangentField(Field(manifold), manifold), TIME, points(manifold, 4), gradient=True)
    with pytest.raises(FieldError, match="mixes"):
        check_field(TangentField(lambda t, x: x.roll(1, 0), manifold), TIME, points(manifold, 4))


class WrongTwice(torch.autograd.Function):
    """x^3 with a right first and a wrong second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 3 * x.detach() ** 2


def test_a_wrong_second_derivative_is_found():
    with pytest.raises(FieldError, match="gradient of its divergence"):
        check_field(
            TangentField(lambda t, x: WrongTwice.apply(x), Sphere(2)), TIME, points(Sphere(2), 4), gradient=True
        )


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.tensor([[1.0, 0, 0], [0, 1.1, 0]]), "off Sphere.2. by up to 0.1 in row 1"),
        (torch.tensor([[1.0, 0, math.nan]]), "NaN or infinite in row 0"),
        (torch.eye(4), r"shape \(3,\)"),
    ],
)
@pytest.mark.parametrize("estimator", [Exact(), Hutchinson()])
def test_points_off_the_manifold_are_refused(x, words, estimator):
    with pytest.raises((ManifoldError, FieldError), match=words):
        divergence(TangentField(lambda t, x: x.roll(1, 1), Sphere(2)), 0.0, x, estimator)


def test_vectors_that_are_declared_tangent_are_checked():
    x = points(Sphere(2), 3)
    turning = TangentField(lambda t, x: torch.linalg.cross(x, torch.ones_like(x)), Sphere(2), tangent=True)
    torch.testing.assert_close(divergence(turning, 0.0, x), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    with pytest.raises(ManifoldError, match=r"not tangent to Sphere\(2\) in row 0, 1, 2"):
        divergence(TangentField(lambda t, x: x + 1, Sphere(2), tangent=True), 0.0, x)
    with pytest.raises(ManifoldError, match="must be one of divflow.manifolds"):
        TangentField(lambda t, x: x, "sphere")


def test_references_of_other_points_are_refused():
    field, x = TangentField(Field(Sphere(2)), Sphere(2)), points(Sphere(2), 8)
    with pytest.raises(FieldError, match="points of a manifold"):
        divergence(field, TIME, x, ControlVariate(Hutchinson(), references=points(Sphere(2), 3, 9)))


def test_no_graph_is_kept_without_need():
    x = points(Sphere(2), 3)
    with torch.no_grad():
        assert not divergence(TangentField(Field(Sphere(2)), Sphere(2)), TIME, x).requires_grad
    assert list(graph_of(divergence(TangentField(Field(Sphere(2)), Sphere(2)), TIME, x)))


def test_inside_function_transforms():
    u, x = Field(Sphere(2)), points(Sphere(2), 4)
    field = TangentField(u, Sphere(2))
    single = torch.func.vmap(lambda y: divergence(field, TIME, y[None])[0])(x)
    torch.testing.assert_close(single, by_frame(u, Sphere(2), x))


@pytest.mark.parametrize("context", [None, torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)])
def test_some_rows_of_a_field_near_its_points(context):
    """By which single samples are verified."""
    x, rows = points(Sphere(2), 3), [2, 0]
    field = given(TangentField(Field(Sphere(2)), Sphere(2)), context, x)
    near, coordinates = around(field, x, estimated=False)
    y = coordinates.origin + 0.1
    torch.testing.assert_close(near.divflow_rows(rows)(TIME, y[rows]), near(TIME, y)[rows])
