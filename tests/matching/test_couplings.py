"""Couplings: optimal within the batch, against brute force; nothing is moved but the noise, and not between contexts."""

import itertools

import pytest
import torch

from divflow.matching import IndependentCoupling, MatchingError, OptimalTransportCoupling


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
