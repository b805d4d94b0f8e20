import pytest
import torch
from own_laws import TIMES, assert_own_divergence_is_exact, perturbed, states
from torch import nn

from divflow.divergence import Exact, divergence
from divflow.networks import HollowMLP, NetworkError, SinusoidalEmbedding

NETWORKS = {
    "vectors": lambda **k: HollowMLP(5, hidden=(8, 7), features=2, joint=(6,), **k),
    "wide": lambda **k: HollowMLP(3, hidden=(16,), features=3, joint=(6, 5), activation=nn.Tanh, **k),
    "narrow": lambda **k: HollowMLP((2, 3), hidden=(4, 4, 4), time_embedding=SinusoidalEmbedding(4), **k),
    "no hidden layers": lambda **k: HollowMLP(3, hidden=(), joint=(), **k),
    "one entry": lambda **k: HollowMLP(1, hidden=(4,), joint=(4,), **k),
    "a scalar": lambda **k: HollowMLP((), hidden=(4,), joint=(4,), **k),
}


@pytest.mark.parametrize("t", TIMES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_divergence_is_exact(name, t):
    network = perturbed(NETWORKS[name]())
    assert_own_divergence_is_exact(network, t, states(*network.event_shape))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_entry_sees_all_others_and_receives_nothing_of_itself(name):
    network, t = perturbed(NETWORKS[name](), scale=1.0), TIMES[0]
    x = states(*network.event_shape, k=1)
    seen = torch.autograd.functional.jacobian(lambda z: network.conditioner(t, z)[0], x)
    seen = seen.reshape(network.size, -1, network.size).abs().amax(dim=1)
    own = torch.eye(network.size, dtype=torch.bool)
    assert (seen[own] == 0).all()
    if name != "narrow":
        assert (seen[~own] > 0).all()
        seen = torch.autograd.functional.jacobian(lambda z: network(t, z), x).reshape(network.size, network.size)
        assert (seen != 0).all()


class Seeing(HollowMLP):
    """One whose features depend a little on their own entry."""

    def conditioner(self, t, x):
        return super().conditioner(t, x) + 1e-3 * self.parts(x).tanh()


def test_what_is_not_hollow_is_refused():
    for call in (Seeing(3).value_and_divergence, lambda t, x: Exact()(Seeing(3), t, x)):
        with pytest.raises(NetworkError, match=r"Seeing is not hollow: changing part \d.*value_and_divergence = None"):
            call(torch.tensor(0.3), torch.randn(4, 3))
    Without = type("Without", (Seeing,), {"value_and_divergence": None})
    assert Exact().explain(Without(3), 0.3, torch.randn(4, 3)).method != "own"


def test_random_masks_of_units_are_no_reason_to_refuse():
    network, x = HollowMLP(6, activation=lambda: nn.Sequential(nn.SiLU(), nn.Dropout(0.5))), torch.randn(3, 6)
    network.require_hollow(torch.tensor(0.3), x)


def test_large_ones_are_tried_at_some_entries():
    network = HollowMLP(1000, hidden=(8,))
    assert network.value_and_divergence(torch.tensor(0.3), torch.randn(2, 1000))[1].shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    network, x = HollowMLP(4).to(dtype), torch.randn(3, 4, dtype=dtype)
    found = divergence(network, 0.3, x)
    torch.testing.assert_close(found, divergence(network, 0.3, x, Exact("reverse")), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: HollowMLP(3)(torch.tensor(0.0), torch.ones(2, 4)), NetworkError, r"\(k, \*\(3,\)\).*\(2, 4\)"),
        (lambda: HollowMLP(3, features=0), ValueError, "features.*0"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
