"""Geodesics, distances and closest points, against scipy's rotations, closed forms and central differences."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation
from spaces import MANIFOLDS, points

from divflow.manifolds import (
    Manifold,
    ManifoldError,
    Product,
    SpecialOrthogonal,
    Sphere,
    Torus,
    hat,
    quaternion,
    rotation_matrix,
    vee,
)

ROTATIONS, SPHERE = SpecialOrthogonal(), Sphere(2)


def length(manifold, u):
    """Of tangent vectors in the metric of the manifold."""
    if isinstance(manifold, Product):
        return torch.stack(
            [length(part, v) for part, v in zip(manifold.parts.values(), manifold.split(u).values(), strict=True)]
        ).norm(dim=0)
    return u.flatten(1).norm(dim=1) / (2**0.5 if isinstance(manifold, SpecialOrthogonal) else 1)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_log_inverts_exp_and_is_as_long_as_the_distance(name):
    manifold = MANIFOLDS[name]
    x, y = points(manifold, 200, 0), points(manifold, 200, 100)
    u = manifold.log(x, y)
    torch.testing.assert_close(manifold.to_tangent(x, u), u, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        manifold.exp(x, u), y, rtol=0, atol=1e-12 * manifold.volume if name == "degrees" else 1e-11
    )
    torch.testing.assert_close(length(manifold, u), manifold.distance(x, y))
    torch.testing.assert_close(manifold.distance(x, y), manifold.distance(y, x))


@pytest.mark.parametrize("name", MANIFOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_short_geodesics_lose_nothing_but_the_points_own_rounding(name, dtype):
    manifold = MANIFOLDS[name]
    x, other = points(manifold, 100, 0, dtype), points(manifold, 100, 100, dtype)
    u = manifold.log(x, other)
    eps, size = torch.finfo(dtype).eps, x.abs().max()
    for wanted in (1e-1, 1e-3, 1e-6):
        v = u * (wanted / length(manifold, u)).view(-1, *[1] * (x.ndim - 1))
        y = manifold.exp(x, v)
        assert (manifold.distance(x, y) - wanted).abs().max() < 30 * eps * size
        assert (manifold.log(x, y) - v).abs().max() < 30 * eps * size


@pytest.mark.parametrize("manifold", [Sphere(2), Sphere(6), ROTATIONS], ids=repr)
@pytest.mark.parametrize("short_of", [1e-2, 1e-4, 1e-5])
def test_the_longest_geodesics(manifold, short_of):
    """Near the cut locus, in float32; distances as they were asked for."""
    x, other = points(manifold, 50, 0), points(manifold, 50, 9)
    u = manifold.log(x, other)
    wanted = math.pi - short_of
    y = manifold.exp(x, u * (wanted / length(manifold, u)).view(-1, *[1] * (x.ndim - 1)))
    x, y = x.float(), y.float()
    assert (manifold.distance(x, y) - wanted).abs().max() < 2e-6
    assert (manifold.exp(x, manifold.log(x, y)) - y).abs().max() < 2e-6


def test_rotations_are_scipys():
    w = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(3, dtype=torch.float64).expand(100, 3, 3)
    expected = Rotation.from_rotvec(w.numpy())
    rotations = torch.as_tensor(expected.as_matrix())
    torch.testing.assert_close(ROTATIONS.exp(eye, hat(w)), rotations)
    torch.testing.assert_close(vee(ROTATIONS.log(eye, rotations)), torch.as_tensor(expected.as_rotvec()))
    torch.testing.assert_close(ROTATIONS.distance(eye, rotations), torch.as_tensor(expected.magnitude()))
    scipys = torch.as_tensor(expected.as_quat(canonical=True, scalar_first=True))
    torch.testing.assert_close(quaternion(rotations), scipys)
    torch.testing.assert_close(rotation_matrix(scipys), rotations)


def test_quaternions_of_every_branch():
    q = torch.cat([torch.eye(4), torch.tensor([[1.0, -1, 1, 1], [0, 1, -1, 0]])]).double()
    q = q / q.norm(dim=1, keepdim=True)
    found = quaternion(rotation_matrix(q))
    torch.testing.assert_close((found * q).sum(dim=1).abs(), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("name", MANIFOLDS)
def test_the_closest_point(name):
    """Nearer than other points of the manifold, and left alone by a second projection."""
    manifold = MANIFOLDS[name]
    x = points(manifold, 50)
    away = x + 0.05 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    closest = manifold.project(away)
    torch.testing.assert_close(manifold.project(closest), closest)
    if not isinstance(manifold, Torus | Product):  # whose points are close in angle, and not as numbers
        for seed in range(5):
            u = manifold.to_tangent(
                closest, torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
            )
            other = manifold.exp(closest, 1e-2 * u)
            assert ((away - closest).flatten(1).norm(dim=1) <= (away - other).flatten(1).norm(dim=1) + 1e-15).all()


@pytest.mark.parametrize("name", ["circle", "directions", "rotations", "radians"])
def test_first_and_second_derivatives(name):
    """By central differences, where both points are one, too."""
    manifold = MANIFOLDS[name]
    x, y = points(manifold, 2, 0), points(manifold, 2, 50)
    u = manifold.to_tangent(x, torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2)))

    def checked(function, *at):
        at = [a.clone().requires_grad_() for a in at]
        assert torch.autograd.gradcheck(function, at, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, at, atol=1e-4, fast_mode=True)

    checked(manifold.exp, x, u)
    checked(manifold.exp, x, 0 * u)
    checked(lambda a: manifold.exp(x, manifold.to_tangent(x, a)), 1.2 * u)
    checked(manifold.log, x, y)
    checked(lambda a: manifold.log(x, manifold.project(a)), x + 1e-9)
    checked(manifold.project, x + 0.1)


def test_the_polar_factor_of_a_matrix_far_from_a_rotation():
    m = points(ROTATIONS, 20) @ torch.diag(torch.tensor([0.05, 1.0, 30.0], dtype=torch.float64))
    u, _, v = torch.linalg.svd(m)
    torch.testing.assert_close(ROTATIONS.project(m), u @ v)


def test_angles_across_the_end_of_a_period():
    degrees = Torus(1, period=360)
    assert degrees.distance(torch.tensor([179.0]), torch.tensor([-179.0])) == 2
    assert degrees.log(torch.tensor([179.0]), torch.tensor([-179.0])) == 2
    assert degrees.project(torch.tensor([540.0, 180.0, -180.0, 725.0])).tolist() == [-180, -180, -180, 5]


def test_volumes():
    assert Sphere(1).volume == pytest.approx(2 * math.pi)
    assert Sphere(2).volume == pytest.approx(4 * math.pi)
    assert Sphere(3).volume == pytest.approx(2 * math.pi**2)
    assert Product(a=Sphere(2), b=Torus(2, 1.0)).volume == pytest.approx(4 * math.pi)
    assert MANIFOLDS["product"].volume == math.inf


def test_parts_of_a_product_by_name():
    manifold = MANIFOLDS["product"]
    x = points(manifold, 4)
    assert {name: tuple(part.shape) for name, part in manifold.split(x).items()} == {
        "direction": (4, 3),
        "orientation": (4, 3, 3),
        "angles": (4, 2),
        "place": (4, 3),
    }
    torch.testing.assert_close(manifold.join(manifold.split(x)), x, rtol=0, atol=0)
    assert (manifold.dim, tuple(manifold.event_shape)) == (10, (17,))
    with pytest.raises(ManifoldError, match="the parts are"):
        manifold.join({"direction": x[:, :3]})
    with pytest.raises(ManifoldError, match="manifolds by name"):
        Product(direction=3)


class Stiefel(Manifold):
    """Pairs of orthonormal vectors in R^4, one of a user's own."""

    event_shape, dim = torch.Size([4, 2]), 5

    def project(self, x):
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        return u @ v

    def to_tangent(self, x, u):
        return u - x @ (x.mT @ u + u.mT @ x) / 2


def test_what_a_manifold_of_ones_own_lacks_is_named():
    manifold = Stiefel()
    x = points(manifold, 3)
    manifold.check(x)
    for name, ask in {
        "exp": lambda: manifold.exp(x, x),
        "log": lambda: manifold.log(x, x),
        "distance": lambda: manifold.distance(x, x),
        "volume": lambda: manifold.volume,
        "uniform": lambda: manifold.uniform(),
        "wrapped_normal": lambda: manifold.wrapped_normal(x, 1.0),
    }.items():
        with pytest.raises(ManifoldError, match=f"Stiefel has no {name}"):
            ask()


REFLECTION = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
BAD = {
    "off": (
        SPHERE,
        torch.tensor([[1.0, 0, 0], [1, 1, 0]]),
        r"off Sphere\(2\) by up to 0.293 in row 1 of 2.*manifold.project",
    ),
    "zero": (SPHERE, torch.zeros(1, 3), "by up to inf in row 0 of 1"),
    "nan": (SPHERE, torch.tensor([[math.nan, 0, 1]]), "NaN or infinite in row 0"),
    "shape": (SPHERE, torch.zeros(2, 4), r"shape \(3,\) after the batch, but x has shape \(2, 4\)"),
    "no batch": (ROTATIONS, torch.zeros(3), r"shape \(3, 3\) after the batch"),
    "whole numbers": (SPHERE, torch.tensor([[0, 0, 1]]), "torch.int64.*x.float"),
    "list": (SPHERE, [0.0, 0, 1], "list"),
    "reflection": (ROTATIONS, REFLECTION[None], "by up to 2 in row 0"),
    "scaled": (ROTATIONS, torch.eye(3)[None] * 1.1, "by up to 0.1 in row 0"),
    "part": (Product(way=SPHERE, place=Torus(1)), torch.tensor([[1.0, 1, 0, 9]]), "the part 'way' is off"),
}


@pytest.mark.parametrize("case", BAD)
def test_points_off_the_manifold_are_refused(case):
    manifold, x, message = BAD[case]
    with pytest.raises(ManifoldError, match=message):
        manifold.check(x)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_rounding_is_not_refused(name):
    manifold = MANIFOLDS[name]
    x = points(manifold, 1000)
    assert manifold.check(x) is x
    manifold.check(x.float())
    manifold.check(x.half(), tolerance=1e-2)


def test_antipodal_pairs_are_refused():
    x = points(SPHERE, 4)
    y = x.clone()
    y[2] = -y[2]
    with pytest.raises(ManifoldError, match="antipodal in row 2 of 4"):
        SPHERE.log(x, y)
