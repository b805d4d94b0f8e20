"""The toy densities are densities, and their samples are theirs."""

import math

import pytest
import torch
from covering import thinned
from torch import Generator

from divflow.data import DataError, Toy, toy

NAMES = ["two_moons", "circles", "eight_gaussians", "checkerboard", "pinwheel", "two_spirals", "swiss_roll"]


def grid(count):
    axis = torch.linspace(-4.5, 4.5, count, dtype=torch.float64) + 1e-4
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).view(-1, 2), (axis[1] - axis[0]).item() ** 2


@thinned(name=NAMES)
def test_integrates_to_one_and_to_its_samples(name):
    density = getattr(toy, name)()
    points, area = grid(301 if name == "checkerboard" else 151)
    log_prob = density.log_prob(points)
    mass = log_prob.exp() * area
    tolerance = 1e-2 if name == "checkerboard" else 1e-3  # whose squares a grid does not meet exactly
    assert abs(mass.sum() - 1) < tolerance
    samples = density.sample(20_000, Generator().manual_seed(0))
    assert samples.shape == (20_000, 2)
    assert samples.dtype == torch.float32
    entropy = -(mass * log_prob.clamp_min(-100)).sum()
    of_samples = -density.log_prob(samples)
    assert abs(of_samples.mean() - entropy) < 5 * of_samples.std() / math.sqrt(20_000) + 2e-2
    # And their shares in a coarse histogram: a mirrored or rotated density has the same entropy.
    cells = (points[:, 0] > 0.3).long() + 2 * (points[:, 1] > 0.2).long() + 4 * (points.norm(dim=1) > 1.3).long()
    expected = torch.zeros(8, dtype=torch.float64).index_add(0, cells, mass)
    cells = (samples[:, 0] > 0.3).long() + 2 * (samples[:, 1] > 0.2).long() + 4 * (samples.norm(dim=1) > 1.3).long()
    shares = torch.bincount(cells, minlength=8) / 20_000
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=0.025)


@pytest.mark.parametrize("name", NAMES)
def test_seeded(name):
    density = getattr(toy, name)()
    a, b, c = (density.sample(10, Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_two_moons_by_monte_carlo_over_the_curve():
    density, noise = toy.two_moons(0.2), 0.2
    u = torch.rand(400_000, dtype=torch.float64) * math.pi
    centres = torch.cat(
        [
            torch.stack([u.cos() - 0.5, u.sin() - 0.25], dim=1),
            torch.stack([0.5 - u.cos(), 0.25 - u.sin()], dim=1),
        ]
    )
    for point in ([0.0, 0.0], [-0.5, 0.7], [1.4, 0.3]):
        x = torch.tensor([point], dtype=torch.float64)
        values = torch.exp(-(x - centres).square().sum(dim=1) / (2 * noise**2)) / (2 * math.pi * noise**2)
        assert abs(values.mean() - density.log_prob(x).exp()) < 5 * values.std() / math.sqrt(len(values))


def test_data_module_splits_and_knows_the_truth():
    data = Toy(toy.two_moons, num_train=100, num_val=10, num_test=20, batch_size=32)
    assert [len(rows) for rows in (data.train, data.val, data.test)] == [100, 10, 20]
    assert not set(map(tuple, data.train.rows.tolist())) & set(map(tuple, data.test.rows.tolist()))
    assert [len(batch) for batch in data.train_dataloader()] == [32, 32, 32]
    assert torch.cat(list(data.test_dataloader())).shape == (20, 2)
    torch.testing.assert_close(data.log_prob(data.test.rows), toy.two_moons().log_prob(data.test.rows))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Toy(toy.two_moons, num_val=1), "num_val.*1"),
        (lambda: Toy(toy.two_moons, batch_size=0), "batch_size.*0"),
        (lambda: toy.two_moons(noise=0.0), r"noise.*0\.0"),
        (lambda: toy.eight_gaussians(noise=-1.0), r"noise.*-1\.0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert issubclass(DataError, ValueError)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "checkerboard"])
def test_score_is_the_gradient_of_the_log_density(name):
    density = getattr(toy, name)()
    x = density.sample(50, Generator().manual_seed(0)).double()
    shift = 1e-5 * torch.eye(2, dtype=torch.float64)
    expected = torch.stack([(density.log_prob(x + s) - density.log_prob(x - s)) / 2e-5 for s in shift], dim=1)
    torch.testing.assert_close(density.score(x), expected, rtol=1e-5, atol=1e-4)
    assert density.score(x.float()).dtype == torch.float32
    with torch.inference_mode():  # in which Lightning validates
        torch.testing.assert_close(Toy(density, 4, 4, 4).score(x + 0), expected, rtol=1e-5, atol=1e-4)


def test_a_density_with_edges_has_no_score():
    assert Toy(toy.checkerboard, 4, 4, 4).score(torch.zeros(3, 2)) is None
