"""Figures of points on manifolds show them where they are, with the density that is asked for."""

import math

import numpy as np
import pytest
import torch

from divflow.callbacks.manifold_plots import plot_on_manifold
from divflow.data import toy
from divflow.manifolds import Product, SpecialOrthogonal, Sphere, Torus, hat

NORTH_EAST = torch.tensor([[0.0, math.sqrt(0.5), math.sqrt(0.5)]])  # 45 degrees north, 90 east


def offsets(axis):
    return np.asarray(axis.collections[0].get_offsets())


def test_a_map_has_places_where_they_are_and_the_density_at_them():
    asked = []

    def log_prob(x):
        asked.append(Sphere(2).check(x))
        return x[:, 2]

    figure = plot_on_manifold(Sphere(2), NORTH_EAST, -NORTH_EAST, log_prob)
    data, samples, density = figure.axes[:3]
    np.testing.assert_allclose(offsets(data), [[math.pi / 2, math.pi / 4]], rtol=1e-6)
    np.testing.assert_allclose(offsets(samples), [[-math.pi / 2, -math.pi / 4]], rtol=1e-6)
    assert [it.get_title() for it in (data, samples, density)] == ["Data", "Samples of the model", "Log-density"]
    values = np.asarray(density.collections[0].get_array()).reshape(90, 180)
    latitude = np.deg2rad(np.arange(-89, 90, 2))
    np.testing.assert_allclose(values, np.sin(latitude)[:, None].repeat(180, axis=1), atol=1e-6)
    assert torch.cat(asked).dtype == NORTH_EAST.dtype
    # East is on the right: the density of a place is in the cell of its point.
    east = plot_on_manifold(Sphere(2), NORTH_EAST, NORTH_EAST, lambda x: x[:, 1]).axes[2].collections[0].get_array()
    assert np.unravel_index(np.asarray(east).argmax(), (90, 180))[1] in (134, 135)
    assert len(plot_on_manifold(Sphere(2), NORTH_EAST, NORTH_EAST).axes) == 2


@pytest.mark.parametrize("period", [2 * math.pi, 1.0])
def test_two_angles_are_a_square_in_degrees(period):
    x = period / 4 * torch.tensor([[1.0, 5.0], [-1.0, 3.0]])
    density = Torus(2, period).wrapped_normal(x[0], 0.1 * period)
    figure = plot_on_manifold(Torus(2, period), x, x[:1], density.log_prob, ["phi", "psi"])
    data, samples, image = figure.axes[:3]
    np.testing.assert_allclose(offsets(data), [[90, 90], [-90, -90]], rtol=1e-5)
    np.testing.assert_allclose(offsets(samples), [[90, 90]], rtol=1e-5)
    assert (data.get_xlabel(), data.get_ylabel()) == ("phi (degrees)", "psi (degrees)")
    assert data.get_xlim() == data.get_ylim() == (-180, 180)
    values = np.asarray(image.images[0].get_array())
    rows, columns = np.unravel_index(values.argmax(), values.shape)
    assert {rows, columns} <= {134, 135}  # of 180
    # The first angle is along the horizontal.
    values = np.asarray(plot_on_manifold(Torus(2), x, x, lambda x: x[:, 0]).axes[2].images[0].get_array())
    assert (np.diff(values, axis=1) > 0).all()


@pytest.mark.parametrize("count", [1, 3])
def test_other_angles_are_pairs_in_degrees(count):
    x = torch.linspace(-3, 3, 40)[:, None].repeat(1, count)
    figure = plot_on_manifold(Torus(count), x, x, lambda x: x[:, 0], list("abc"[:count]))
    assert len(figure.axes) == count**2
    assert figure.axes[-1].get_xlabel() == f"{'abc'[count - 1]} (degrees)"
    assert figure.axes[-1].get_xlim()[1] == pytest.approx(np.rad2deg(3) * 1.1, rel=0.02)


def test_axes_of_rotations_are_coloured_by_their_angle():
    axis = NORTH_EAST.repeat(3, 1) * torch.tensor([[0.5], [3.0], [-1.0]])
    x = SpecialOrthogonal().exp(torch.eye(3).repeat(3, 1, 1), hat(axis))
    figure = plot_on_manifold(SpecialOrthogonal(), x, x[:1], lambda x: x[:, 0, 0])
    east = [math.pi / 2, math.pi / 4]
    np.testing.assert_allclose(offsets(figure.axes[0]), [east, east, [-it for it in east]], rtol=1e-5)
    colours = np.asarray(figure.axes[0].collections[0].get_array())
    np.testing.assert_allclose(colours, np.rad2deg([0.5, 3.0, 1.0]), rtol=1e-5)
    assert len(offsets(figure.axes[1])) == 1


@pytest.mark.parametrize("manifold", [Sphere(4), Sphere(1), Product(a=Sphere(2), b=Torus(1))])
def test_other_manifolds_are_pairs_of_their_coordinates(manifold):
    x = manifold.uniform().sample((30,))
    assert len(plot_on_manifold(manifold, x, x, lambda x: x[:, 0]).axes) == x.shape[1] ** 2


@pytest.mark.parametrize("name", ["sphere", "torus", "rotations"])
def test_a_toy_density_is_drawn_and_saved(name, tmp_path):
    density = getattr(toy, f"{name}_mixture")()
    x = density.sample(200)
    plot_on_manifold(density.manifold, x, x, density.log_prob).savefig(tmp_path / "x.png", dpi=40)
    assert (tmp_path / "x.png").stat().st_size > 1_000
