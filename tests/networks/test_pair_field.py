import pytest
import torch
from own_laws import TIMES, assert_euclidean, assert_own_divergence_is_exact, assert_permutes, perturbed, states
from torch import nn

from divflow.divergence import divergence
from divflow.networks import NetworkError, PairField, SinusoidalEmbedding

FIELDS = {
    "plane": lambda: PairField((4, 2), hidden=(5, 6)),
    "space": lambda: PairField((5, 3), hidden=(7,), activation=nn.Tanh),
    "line": lambda: PairField((2, 1), hidden=(4, 4, 4), time_embedding=SinusoidalEmbedding(6)),
}


@pytest.mark.parametrize("t", TIMES, ids=str)
@pytest.mark.parametrize("name", FIELDS)
def test_divergence_is_exact(name, t):
    field = perturbed(FIELDS[name]())
    assert_own_divergence_is_exact(field, t, states(*field.event_shape))


@pytest.mark.parametrize("t", TIMES, ids=str)
@pytest.mark.parametrize("name", FIELDS)
def test_symmetries(name, t):
    field = perturbed(FIELDS[name]())
    x = states(*field.event_shape)
    assert_euclidean(field, t, x)
    assert_permutes(field, t, x, torch.arange(x.shape[1]).flip(0))
    torch.testing.assert_close(field(t, x).sum(1), torch.zeros_like(x[:, 0]))


def test_it_is_the_formula():
    field, x, t = perturbed(PairField((3, 2), hidden=(4,), gaussians=7)), states(3, 2), 0.7
    first = field.distance.linear

    def phi(r):
        u = (1 + r**2).sqrt()
        gaussians = (-((u - torch.arange(1.0, 8.0)).square() / 2)).exp()  # from 1 to 7, as wide as they are apart
        hidden = first.weight @ torch.cat([u[None], gaussians]) + first.bias + t * field.time.weight[:, 0]
        return field.layers[1](nn.functional.silu(hidden))[0] / u

    forces = [sum((z[i] - z[j]) * phi((z[i] - z[j]).norm()) for j in range(3) if j != i) for z in x for i in range(3)]
    torch.testing.assert_close(field(torch.tensor(t).double(), x), torch.stack(forces).view_as(x))


def test_where_particles_meet_it_is_smooth():
    field, x = perturbed(PairField((3, 2))), torch.zeros(2, 3, 2, dtype=torch.float64, requires_grad=True)
    div = divergence(field, 0.3, x)
    (gradient,) = torch.autograd.grad(div.sum(), x, create_graph=True)
    assert torch.autograd.grad(gradient.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PairField((3,)), r"PairField.*\(particles, dimensions\).*\(3,\)"),
        (lambda: PairField((1, 3)), r"two particles.*\(1, 3\)"),
        (lambda: PairField((4, 3), hidden=()), "hidden layer"),
        (
            lambda: PairField((4, 3))(torch.tensor(0.0), torch.ones(2, 5, 3)),
            r"4 particles in 3.*\(2, 5, 3\).*Build a network for that number",
        ),
        (lambda: divergence(PairField((4, 3)), 0.0, torch.ones(2, 4, 2)), r"4 particles in 3.*\(2, 4, 2\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(NetworkError, match=message):
        call()
