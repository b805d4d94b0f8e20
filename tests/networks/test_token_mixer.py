import pytest
import torch
from own_laws import TIMES, assert_own_divergence_is_exact, assert_permutes, perturbed, states
from torch import nn

from divflow.divergence import Exact, divergence
from divflow.networks import NetworkError, SinusoidalEmbedding, TokenMixer

NETWORKS = {
    "one head": lambda: TokenMixer((4, 3), hidden=(6,), width=5, heads=1),
    "heads": lambda: TokenMixer((3, 2), hidden=(7, 6), width=6, heads=3, activation=nn.Tanh, types=range(3)),
    "entries as tokens": lambda: TokenMixer(
        (5, 1), hidden=(4,), width=4, heads=2, time_embedding=SinusoidalEmbedding(4)
    ),
}


@pytest.mark.parametrize("t", TIMES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_divergence_is_exact(name, t):
    network = perturbed(NETWORKS[name]())
    assert_own_divergence_is_exact(network, t, states(*network.event_shape))


def test_attention_is_torchs():
    network, t, x = perturbed(TokenMixer((4, 3), width=6, heads=2)), TIMES[0], states(4, 3)
    theirs = nn.MultiheadAttention(6, 2, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": network.project.weight,
            "in_proj_bias": network.project.bias,
            "out_proj.weight": network.out.weight,
            "out_proj.bias": network.out.bias,
        }
    )
    tokens = network.before(network.first(x) + network.features(t, x))
    expected = network.after(tokens + theirs(tokens, tokens, tokens, need_weights=False)[0])
    torch.testing.assert_close(network(t, x), expected)


@pytest.mark.parametrize("t", TIMES, ids=str)
def test_tokens_of_one_type_are_alike(t):
    network, x = perturbed(TokenMixer((4, 3), types=[0, 1, 0, 1])), states(4, 3)
    assert_permutes(network, t, x, torch.tensor([2, 3, 0, 1]))
    with pytest.raises(AssertionError):
        assert_permutes(network, t, x, torch.tensor([1, 0, 2, 3]))


def test_it_costs_a_product_an_entry_whatever_the_number_of_tokens():
    costs = [
        Exact().explain(TokenMixer((tokens, 4)), torch.tensor(0.5), torch.randn(8, tokens, 4)).cost_in_forward_passes
        for tokens in (4, 16, 64)
    ]
    assert max(costs) < 1 + 4 + 2  # and what attention takes beside matrix products


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenMixer((3,)), r"TokenMixer.*\(3,\)"),
        (lambda: TokenMixer((4, 3), hidden=()), "hidden layer"),
        (lambda: TokenMixer((4, 3), width=10, heads=4), "heads=4 and width=10"),
        (lambda: TokenMixer((4, 3), types=[0, 1]), r"each of 4 particles.*\[0, 1\]"),
        (lambda: divergence(TokenMixer((4, 3)), 0.0, torch.ones(2, 5, 3)), r"\(2, 5, 3\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(NetworkError, match=message):
        call()
