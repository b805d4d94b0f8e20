"""Paths: ends, moments, and velocities that are their derivatives in time."""

import math

import pytest
import torch

from divflow.matching import LinearPath, PathPoint, TrigonometricPath, VariancePreservingPath
from divflow.score import VariancePreserving

PATHS = {
    "linear": LinearPath(),
    "linear, noise left": LinearPath(0.1),
    "trigonometric": TrigonometricPath(),
    "variance preserving": VariancePreservingPath(),
}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def ends(*event, count=4):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(count, *event, generator=generator, dtype=torch.float64) for _ in range(2))


@each_path
@pytest.mark.parametrize("event", [(), (3,), (2, 4, 4)], ids=str)
def test_the_velocity_is_the_derivative_of_the_point(path, event):
    """At each sample's own time, both ends of the interval included."""
    noise, data = ends(*event)
    t = torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
    point = path(t, noise, data)
    assert isinstance(point, PathPoint)
    x, slope = torch.func.jvp(lambda s: path(s, noise, data).x, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(point.x, x)
    torch.testing.assert_close(point.velocity, slope)
    assert torch.isfinite(point.velocity).all()


@each_path
def test_one_time_for_all_is_that_time_for_each(path):
    noise, data = ends(2, 3)
    for one, each in zip(path(torch.tensor(0.4), noise, data), path(torch.full((4,), 0.4), noise, data), strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, each)


@pytest.mark.parametrize(
    ("path", "at_noise", "at_data"),
    [
        (LinearPath(), (0, 1), (1, 0)),
        (LinearPath(0.1), (0, 1), (1, 0.1)),
        (TrigonometricPath(), (0, 1), (1, 0)),
        # exp(-B(1) / 2) with B(1) = (0.1 + 20) / 2, and sqrt(1 - exp(-B)) at s = 1e-3
        (VariancePreservingPath(), (math.exp(-5.025), 1), (1, math.sqrt(0.1e-3 + 9.95e-6))),
    ],
    ids=PATHS,
)
def test_ends(path, at_noise, at_data):
    noise, data = ends(3)
    for t, (alpha, sigma) in ((0.0, at_noise), (1.0, at_data)):
        expected = alpha * data + sigma * noise
        torch.testing.assert_close(path(torch.tensor(t).double(), noise, data).x, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", [TrigonometricPath(), VariancePreservingPath()], ids=lambda path: type(path).__name__)
def test_paths_that_preserve_the_variance(path):
    """Of standardized data with a covariance of their own the marginals keep the variances 1, and alpha^2 of the covariances."""
    generator = torch.Generator().manual_seed(0)
    noise, data = (torch.randn(100_000, 2, generator=generator) for _ in range(2))
    data[:, 1] = 0.8 * data[:, 0] + 0.6 * data[:, 1]
    for t in (0.2, 0.7):
        alpha = path.coefficients(torch.tensor(t)).alpha.item()
        expected = torch.tensor([[1, 0.8 * alpha**2], [0.8 * alpha**2, 1]])
        torch.testing.assert_close(torch.cov(path(torch.tensor(t), noise, data).x.T), expected, rtol=0, atol=0.015)


def test_straight_lines_have_constant_velocity():
    noise, data = ends(3)
    for t in (0.0, 0.5, 1.0):
        torch.testing.assert_close(LinearPath()(torch.tensor(t), noise, data).velocity, data - noise)


def test_the_variance_preserving_path_is_the_sde_backwards():
    """Its kernel at s = 1 - (1 - epsilon) t, for the SDE of the same betas."""
    path, sde = VariancePreservingPath(0.2, 15.0, epsilon=1e-2), VariancePreserving(beta_min=0.2, beta_max=15.0)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    alpha, sigma = sde.marginal(1 - 0.99 * t)
    found = path.coefficients(t)
    torch.testing.assert_close(found.alpha, alpha)
    torch.testing.assert_close(found.sigma, sigma)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearPath(-0.1), r"sigma_min must lie in \[0, 1\), but is -0.1"),
        (lambda: LinearPath(1.0), r"sigma_min must lie in \[0, 1\)"),
        (lambda: LinearPath("0.1"), "sigma_min must be a finite number, but is '0.1'"),
        (lambda: VariancePreservingPath(20.0, 0.1), "0 < beta_min < beta_max, but got 20.0 and 0.1"),
        (lambda: VariancePreservingPath(epsilon=0.0), r"epsilon must lie in \(0, 1\), but is 0.0"),
    ],
)
def test_settings_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
