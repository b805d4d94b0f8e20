"""A manifold of one's own whose methods do not fit together is refused before it gives a wrong divergence."""

import pytest
import torch
from spaces import MANIFOLDS, points

from divflow.divergence import divergence
from divflow.manifolds import Manifold, ManifoldError, SpecialOrthogonal, Sphere, TangentField, laws
from divflow.manifolds.laws import _broken

POINTS = points(Sphere(2), 3)


class Ellipsoid(Manifold):
    """x^2 + y^2 + 4 z^2 = 1 in space, to whose points rays from the centre lead."""

    event_shape, dim = torch.Size([3]), 2
    weights = torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64)

    def project(self, x):
        return x / (self.weights.to(x) * x**2).sum(dim=-1, keepdim=True).sqrt()

    def to_tangent(self, x, u):
        normal = torch.nn.functional.normalize(self.weights.to(x) * x, dim=-1)
        return u - normal * (normal * u).sum(dim=-1, keepdim=True)


class Own(Sphere):
    """Divflow's under another name, which is not taken as tested."""


def changed(name, method, base=Own, *arguments):
    return type("Changed", (base,), {name: method})(*arguments)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_those_of_divflow_hold(name):
    assert _broken(MANIFOLDS[name], points(MANIFOLDS[name], 2)) == ""


def test_one_of_ones_own_is_compared_once(monkeypatch):
    kind, calls = type("Passing", (Own,), {}), []
    monkeypatch.setattr(laws, "_broken", lambda *given: calls.append(1) or _broken(*given))
    for _ in range(3):
        divergence(TangentField(lambda t, x: x.roll(1, 1), kind(2)), 0.0, POINTS)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("manifold", "words"),
    [
        (Ellipsoid(), "derivative of project at a point of the manifold is not to_tangent"),
        (changed("to_tangent", lambda self, x, u: u - x * u.sum(-1, keepdim=True), Own, 2), "no orthogonal projection"),
        (changed("to_tangent", lambda self, x, u: u, Own, 2), "projects to 3 directions, but dim is 2"),
        (changed("mean_curvature", lambda self, x: -x, Own, 2), "mean_curvature is not the sum"),
        (
            changed("normals", lambda self, x: 2 * x[None], Own, 2),
            "normals are no orthonormal basis of the normal space",
        ),
    ],
)
def test_broken_laws(manifold, words):
    x = manifold.project(POINTS)
    with pytest.raises(ManifoldError, match=words):
        divergence(TangentField(lambda t, x: x.roll(1, 1), manifold), 0.0, x)


def test_broken_frames():
    rotations = points(SpecialOrthogonal(), 2)
    turned = changed("tangents", lambda self, x: x @ torch.eye(3).to(x).expand(3, *x.shape), SpecialOrthogonal)
    assert "tangents are no orthonormal basis" in _broken(turned, rotations)
