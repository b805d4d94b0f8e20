"""Couplings: optimal within the batch, against brute force; nothing is moved but the noise, and not between contexts."""

import itertools

import pytest
import torch

from divflow.manifolds import Euclidean, ManifoldError, Product, SpecialOrthogonal, Sphere, Torus
from divflow.matching import GeodesicPath, IndependentCoupling, MatchingError, OptimalTransportCoupling


def pair(count, *event, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, *event, generator=generator, dtype=torch.float64) for _ in range(2))


def cost(noise, data):
    return (noise - data).flatten(1).square().sum().item()


def rows(values):
    """The rows as a set, to compare what was permuted."""
    return sorted(values.flatten(1).tolist())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("event", [(1,), (3,), (2, 2, 2)], ids=str)
def test_equals_brute_force_over_all_permutations(count, event):
    noise, data = pair(count, *event, seed=count)
    paired = OptimalTransportCoupling()(noise, data)
    assert rows(paired) == rows(noise)
    best = min(cost(noise[list(order)], data) for order in itertools.permutations(range(count)))
    assert cost(paired, data) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_never_costs_more_than_as_drawn(seed):
    noise, data = pair(40, 7, seed=seed)
    kept = data.clone()
    assert cost(OptimalTransportCoupling()(noise, data), data) < cost(noise, data)
    assert torch.equal(data, kept)
    paired = OptimalTransportCoupling()(noise, data)
    assert cost(OptimalTransportCoupling()(paired, data), data) == pytest.approx(cost(paired, data))


def test_in_one_dimension_the_order_is_kept():
    """Optimal transport on a line sorts."""
    noise, data = pair(50, 1)
    paired = OptimalTransportCoupling()(noise, data)
    assert torch.equal(paired.flatten()[data.flatten().argsort()], noise.flatten().sort().values)


def test_far_from_the_origin_near_points_are_told_apart():
    noise = torch.arange(30.0)[:, None].expand(30, 3) * 0.01 + 1000
    assert torch.equal(OptimalTransportCoupling()(noise.flip(0), noise), noise)


def test_images_are_paired_as_vectors():
    noise, data = pair(20, 2, 3, 3)
    flat = OptimalTransportCoupling()(noise.flatten(1), data.flatten(1))
    assert torch.equal(OptimalTransportCoupling()(noise, data).flatten(1), flat)


def test_large_batches_are_paired_in_parts():
    noise, data = pair(10, 2)
    parts = [OptimalTransportCoupling()(noise[i : i + 4], data[i : i + 4]) for i in (0, 4, 8)]
    assert torch.equal(OptimalTransportCoupling(max_rows=4)(noise, data), torch.cat(parts))
    assert torch.equal(OptimalTransportCoupling(max_rows=1)(noise, data), noise)


@pytest.mark.parametrize("count", [0, 1])
def test_batches_without_a_choice(count):
    noise, data = pair(count, 3)
    for coupling in (IndependentCoupling(), OptimalTransportCoupling()):
        for context in (None, torch.zeros(count, 2)):
            assert torch.equal(coupling(noise, data, context), noise)


def test_half_precisions_and_scalar_events():
    noise, data = (values.squeeze(1).to(torch.bfloat16) for values in pair(20, 1))
    paired = OptimalTransportCoupling()(noise, data)
    assert paired.dtype == torch.bfloat16
    assert torch.equal(paired[data.argsort()], noise.sort().values)


@pytest.mark.parametrize("context", [torch.arange(24) % 3, (torch.arange(24) % 3)[:, None].expand(24, 2).float()])
def test_noise_stays_with_its_context(context):
    """Each context's noise is its own rows', in the order that is best within it."""
    noise, data = pair(24, 2)
    paired = OptimalTransportCoupling()(noise, data, context)
    for first in range(3):
        mine = slice(first, None, 3)
        assert torch.equal(paired[mine], OptimalTransportCoupling()(noise[mine], data[mine]))
    alone = torch.arange(24.0)[:, None]
    assert torch.equal(OptimalTransportCoupling()(noise, data, alone), noise)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_numbers_that_have_no_distance_are_refused(bad):
    noise, data = pair(5, 2)
    data[3, 1] = bad
    with pytest.raises(MatchingError, match=r"not finite.*IndependentCoupling"):
        OptimalTransportCoupling()(noise, data)


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_a_number_of_rows_that_is_none(value):
    with pytest.raises(ValueError, match=f"max_rows must be a whole number of at least 1, but is {value}"):
        OptimalTransportCoupling(value)


MANIFOLDS = {
    "sphere": Sphere(2),
    "degrees": Torus(2, period=360),
    "rotations": SpecialOrthogonal(),
    "product": Product(direction=Sphere(2), orientation=SpecialOrthogonal(), angle=Torus(1, period=0.5)),
}


@pytest.mark.parametrize("name", MANIFOLDS)
def test_on_a_manifold_by_its_distance(name):
    """Against brute force; the order is another than that in the ambient space."""
    manifold = MANIFOLDS[name]
    like = torch.empty(6, *manifold.event_shape, dtype=torch.float64)
    noise, data = (GeodesicPath(manifold).noise(like, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    paired = OptimalTransportCoupling(manifold=manifold)(noise, data)
    assert rows(paired) == rows(noise)
    costs = [
        manifold.distance(noise[list(order)], data).square().sum().item() for order in itertools.permutations(range(6))
    ]
    assert manifold.distance(paired, data).square().sum().item() == pytest.approx(min(costs))
    context = torch.arange(6) % 2
    torch.testing.assert_close(
        OptimalTransportCoupling(manifold=manifold)(noise, data, context)[::2],
        OptimalTransportCoupling(manifold=manifold)(noise[::2], data[::2]),
    )


def test_angles_are_paired_across_the_end_of_a_period():
    noise, data = torch.tensor([[-179.0], [100.0]]), torch.tensor([[90.0], [179.0]])
    assert torch.equal(OptimalTransportCoupling(manifold=Torus(1, period=360))(noise, data), noise.flip(0))
    assert torch.equal(OptimalTransportCoupling()(noise, data), noise)


def test_euclidean_space_is_none():
    noise, data = pair(30, 3)
    assert torch.equal(
        OptimalTransportCoupling(manifold=Euclidean(3))(noise, data), OptimalTransportCoupling()(noise, data)
    )


def test_what_has_no_distance_on_a_manifold_is_refused():
    noise, data = pair(5, 3)
    with pytest.raises(MatchingError, match=r"not finite.*IndependentCoupling"):
        OptimalTransportCoupling(manifold=Sphere(2))(noise, data * float("nan"))
    with pytest.raises(ManifoldError, match="but is 3"):
        OptimalTransportCoupling(manifold=3)
