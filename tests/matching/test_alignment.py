"""The equivariant coupling: an image of the noise, never farther, and normal as before over the images of a datum."""

import itertools

import pytest
import torch

from divflow.matching import ConditionalFlowMatching, EquivariantCoupling, MatchingError
from divflow.networks import EGNN

PLANE, SPACE = (4, 2), (5, 3)


def pair(count, event, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, *event, generator=generator, dtype=torch.float64) for _ in range(2))


def squared(noise, data):
    return (noise - data).square().sum(dim=(1, 2))


def rotations(count, dimensions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(count, dimensions, dimensions, generator=generator, dtype=torch.float64)).Q


def orders(count, particles, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(particles, generator=generator) for _ in range(count)])


def image(x, order, rotation):
    return x.gather(1, order[:, :, None].expand_as(x)) @ rotation


def best_of_all_orders(noise, data):
    """Over all permutations, with the best orthogonal matrix for each: |x_0|^2 + |x_1|^2 - 2 times the nuclear norm of x_0^T x_1."""
    overlap = torch.stack(
        [
            torch.linalg.svdvals(noise[:, list(order)].mT @ data).sum(dim=1)
            for order in itertools.permutations(range(noise.shape[1]))
        ]
    )
    return noise.square().sum(dim=(1, 2)) + data.square().sum(dim=(1, 2)) - 2 * overlap.amax(dim=0)


@pytest.mark.parametrize("event", [PLANE, SPACE, (3, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("types", [None, "two kinds"])
def test_is_an_image_of_the_noise_that_is_never_farther(event, types):
    noise, data = pair(200, event)
    kinds = None if types is None else [0, 0, 1, 1, 1][: event[0]]
    kept, before = data.clone(), squared(noise, data)
    for turns in (1, 2, 4):
        near = EquivariantCoupling(kinds, turns)(noise, data)
        assert (squared(near, data) <= before + 1e-12).all()
        before = squared(near, data)
        distances = torch.cdist(near, near), torch.cdist(noise, noise)
        for kind in sorted(set(kinds or [0])):
            own = [i for i in range(event[0]) if (kinds or [0] * event[0])[i] == kind]
            one, other = (each[:, own][:, :, own].flatten(1).sort(dim=1).values for each in distances)
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(near.mean(dim=1).norm(dim=1), noise.mean(dim=1).norm(dim=1))
    assert torch.equal(data, kept)
    if types is None:
        best = best_of_all_orders(noise, data)
        assert (before >= best - 1e-9).all()
        assert (before - best).mean() < 0.25 * (squared(noise, data) - best).mean()


@pytest.mark.parametrize("event", [PLANE, SPACE], ids=str)
def test_finds_the_datum_among_images_of_itself(event):
    """Turned a little, and its particles in any order."""
    _, data = pair(50, event)
    skew = 0.05 * torch.randn(50, event[1], event[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = image(data, orders(50, event[0]), torch.linalg.matrix_exp(skew - skew.mT))
    torch.testing.assert_close(EquivariantCoupling()(noise, data), data)


@pytest.mark.parametrize("event", [PLANE, SPACE], ids=str)
def test_noise_stays_normal_over_the_images_of_a_datum(event):
    """And would not, if the data had one orientation: then it is theirs."""
    noise, data = pair(20_000, event)
    noise = noise - noise.mean(dim=1, keepdim=True)
    data = (3 * data[:1]).expand(20_000, *event)
    images = image(data, orders(20_000, event[0]), rotations(20_000, event[1]))
    free = torch.eye(event[0], dtype=torch.float64) - 1 / event[0]
    expected = torch.kron(free, torch.eye(event[1], dtype=torch.float64))
    near = EquivariantCoupling()(noise, images).flatten(1)
    assert (near.mean(dim=0).abs() < 5 / 20_000**0.5).all()
    assert (near.T.cov() - expected).abs().max() < 5 * (2 / 20_000) ** 0.5
    assert EquivariantCoupling()(noise, data).flatten(1).mean(dim=0).abs().max() > 0.3


def test_losses_of_equivariant_networks_vary_less():
    torch.manual_seed(0)
    network, (noise, data) = EGNN(PLANE, hidden=8), pair(500, PLANE)
    noise, data = noise.float(), data.float()
    losses = [
        ConditionalFlowMatching(coupling=coupling)(network, data, noise=noise)
        for coupling in (EquivariantCoupling(), ConditionalFlowMatching().coupling)
    ]
    assert losses[0].mean() < 0.6 * losses[1].mean()


def test_empty_batches_dtypes_and_contexts():
    noise, data = pair(6, PLANE)
    assert EquivariantCoupling()(noise[:0], data[:0]).shape == (0, 4, 2)
    half = EquivariantCoupling()(noise.to(torch.bfloat16), data.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.equal(EquivariantCoupling()(noise, data, torch.ones(6, 1)), EquivariantCoupling()(noise, data))


def test_refuses_what_it_is_not_for():
    with pytest.raises(ValueError, match="turns.*0"):
        EquivariantCoupling(turns=0)
    for data, types in ((torch.zeros(3, 4), None), (torch.zeros(3, 1, 4, 4), None), (torch.zeros(3, 4, 2), [0, 1])):
        with pytest.raises(MatchingError, match=r"\(k, n, d\).*\(3, .*OptimalTransport"):
            EquivariantCoupling(types)(torch.zeros_like(data), data)
    with pytest.raises(MatchingError, match="not finite"):
        EquivariantCoupling()(torch.full((2, 4, 2), torch.inf), torch.zeros(2, 4, 2))
