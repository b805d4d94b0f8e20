import pytest
import torch
from own_laws import TIMES, assert_euclidean, assert_own_divergence_is_exact, assert_permutes, perturbed, states
from torch import nn

from divflow.divergence import Autograd, Exact, divergence
from divflow.errors import FieldError
from divflow.networks import EGNN, HollowEGNN, NetworkError

KINDS = {"EGNN": EGNN, "HollowEGNN": HollowEGNN}
HOLLOW = {
    "plane": lambda: HollowEGNN((4, 2), hidden=5, time_embedding=None),
    "space": lambda: HollowEGNN((5, 3), hidden=4, layers=3, types=[0, 1, 0, 2, 1], mean_free=True, activation=nn.Tanh),
    "pairs only": lambda: HollowEGNN((3, 2), hidden=4, layers=0),
    "two": lambda: HollowEGNN((2, 1), hidden=4, layers=1, gaussians=0),
}


@pytest.mark.parametrize("t", TIMES, ids=str)
@pytest.mark.parametrize("name", HOLLOW)
def test_divergence_of_a_hollow_one_is_exact(name, t):
    network = perturbed(HOLLOW[name](), scale=0.2)
    assert_own_divergence_is_exact(network, t, states(*network.event_shape))


@pytest.mark.parametrize("t", TIMES, ids=str)
@pytest.mark.parametrize("mean_free", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_symmetries(kind, mean_free, t):
    network = perturbed(KINDS[kind]((5, 3), hidden=6, types=[0, 1, 0, 1, 2], mean_free=mean_free))
    x = states(5, 3)
    assert_euclidean(network, t, x)
    assert_permutes(network, t, x, torch.tensor([2, 3, 0, 1, 4]))
    with pytest.raises(AssertionError):
        assert_permutes(network, t, x, torch.tensor([1, 0, 2, 3, 4]))
    drift = network(t, x).mean(1).abs().max()
    assert drift < 1e-12 if mean_free else drift > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_particle_sees_every_other(kind):
    network, x = perturbed(KINDS[kind]((4, 2), hidden=6)), states(4, 2, k=1)
    seen = torch.autograd.functional.jacobian(lambda z: network(TIMES[0], z), x)[0, :, :, 0]
    assert (seen.abs().amax(dim=(1, 3)) > 0).all()


def test_more_than_pairs_matter():
    """A third particle, moved about the first at the same distance, changes what the second does to the first."""
    network, t, x = perturbed(HollowEGNN((3, 2), hidden=6, layers=1)), TIMES[0], states(3, 2, k=1)
    seen = torch.autograd.functional.jacobian(lambda z: network.conditioner(t, z)[0], x)[..., 0, :, :]
    sent_by_second = seen[0, 1].abs().amax(dim=(0, 2))
    assert sent_by_second[0] == 0
    assert (sent_by_second[1:] > 0).all()


def test_forces_on_a_particle_depend_on_each_other():
    """What moves a particle is no sum over the others, whose mixed derivative in two of their places would be zero."""
    network, t, x = perturbed(HollowEGNN((3, 1), hidden=6, layers=0)), TIMES[0], states(3, 1, k=1)
    hessian = torch.autograd.functional.hessian(lambda z: network(t, z)[0, 0, 0], x)[0, :, 0, 0, :, 0]
    assert hessian[1, 2].abs() > 1e-6


def other(i, *more):
    return [j for j in range(4) if j not in (i, *more)]


def distance(x, i, j):
    return (1 + (x[i] - x[j]).square().sum()).sqrt()[None]


def test_egnn_is_the_formula():
    network, t, x = perturbed(EGNN((4, 2), hidden=3, layers=2)), TIMES[0], states(4, 2, k=1)
    place, h = list(x[0]), list(network.features(t, x)[0])
    for layer in network.layers:
        u = {(i, j): distance(place, i, j) for i in range(4) for j in range(4)}
        m = {(i, j): layer.message(layer.receive(h[i]) + layer.send(h[j]) + layer.distance(u[i, j])) for i, j in u}
        steps = [sum((place[i] - place[j]) / u[i, j] * layer.move(m[i, j]) for j in other(i)) / 3 for i in range(4)]
        heard = [sum(m[i, j] for j in other(i)) / 3 for i in range(4)]
        place = [place[i] + steps[i] for i in range(4)]
        h = [h[i] + layer.learn(torch.cat([h[i], heard[i]])) for i in range(4)]
    torch.testing.assert_close(network(t, x)[0], torch.stack(place) - x[0])


def test_hollow_egnn_is_the_formula():
    network, t, x = perturbed(HollowEGNN((4, 2), hidden=3, layers=2)), TIMES[0], states(4, 2, k=1)
    place, kinds, receivers = x[0], network.sender(t, x)[0], network.receiver(t, x)[0]
    s = {(i, j): kinds[j] for i in range(4) for j in other(i)}
    for layer in network.layers:
        heard = {(i, j): sum(layer.filters(distance(place, j, k)) * s[i, k] for k in other(i, j)) / 2 for i, j in s}
        s = {pair: s[pair] + layer.learn(layer.own(s[pair]) + layer.heard(heard[pair])) for pair in s}
    u = {(i, j): distance(place, i, j) for i, j in s}
    m = {(i, j): network.pair(network.told(s[i, j]) + receivers[i] + network.distance(u[i, j])) for i, j in s}
    around = [network.around(sum(m[i, k] for k in other(i)) / 3) for i in range(4)]
    phi = {(i, j): network.joint(m[i, j] + around[i]) for i, j in s}
    expected = [sum((place[i] - place[j]) / u[i, j] * phi[i, j] for j in other(i)) / 3 for i in range(4)]
    torch.testing.assert_close(network(t, x)[0], torch.stack(expected))


@pytest.mark.parametrize("name", HOLLOW)
def test_no_message_has_been_where_it_goes(name):
    network = perturbed(HOLLOW[name]())
    x = states(*network.event_shape, k=1)
    seen = torch.autograd.functional.jacobian(lambda z: network.conditioner(TIMES[0], z)[0], x)[..., 0, :, :]
    for i in range(x.shape[1]):
        assert not seen[i, :, :, i].any()
        assert not network.conditioner(TIMES[0], x)[0, i, i].any()


class Seeing(HollowEGNN):
    """One whose messages have been where they go, as those of `EGNN`."""

    def conditioner(self, t, x):
        features = super().conditioner(t, x)
        return features + features.mean(dim=1, keepdim=True)


def test_what_is_not_hollow_is_refused():
    with pytest.raises(NetworkError, match=r"Seeing is not hollow: changing part \d"):
        divergence(Seeing((4, 2)), 0.3, torch.randn(2, 4, 2))
    Unseen = type("Unseen", (Seeing,), {"require_hollow": lambda self, t, x: None})
    with pytest.raises(
        FieldError, match="Unseen is wrong: of the divergence"
    ):  # found by the comparison with autograd, too
        divergence(perturbed(Unseen((4, 2))), 0.3, states(4, 2))


def test_divergence_of_the_other_is_that_of_any_field():
    network, x = perturbed(EGNN((3, 2), hidden=4)), states(3, 2)
    assert Exact().explain(network, 0.3, x).method == "reverse"
    torch.testing.assert_close(divergence(network, 0.3, x), divergence(network, 0.3, x, Autograd()))


@pytest.mark.parametrize("kind", KINDS)
def test_where_particles_meet_it_is_smooth(kind):
    network, x = perturbed(KINDS[kind]((3, 2), hidden=4)), torch.zeros(2, 3, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(divergence(network, 0.3, x).sum(), x, create_graph=True)
    assert torch.autograd.grad(gradient.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"event_shape": (3,)}, NetworkError, r"GNN.*\(3,\)"),
        ({"types": [0, 1]}, NetworkError, r"each of 4 particles.*\[0, 1\]"),
        ({"types": [0, 1, -1, 0]}, NetworkError, "of at least 0"),
        ({"hidden": 0}, ValueError, "hidden.*0"),
        ({"layers": -1}, ValueError, "layers.*-1"),
    ],
)
def test_errors(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        KINDS[kind](**{"event_shape": (4, 3), **arguments})


@pytest.mark.parametrize("kind", KINDS)
def test_particles_of_another_number_are_refused(kind):
    with pytest.raises(
        NetworkError, match=r"4 particles in 3 dimensions.*\(2, 5, 3\).*Build a network for that number"
    ):
        KINDS[kind]((4, 3))(torch.tensor(0.0), torch.ones(2, 5, 3))
