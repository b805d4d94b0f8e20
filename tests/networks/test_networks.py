import math
import sys

import pytest
import torch
from covering import alternated
from torch import nn

from divflow.divergence import Autograd, Exact, check_field, divergence
from divflow.networks import (
    EGNN,
    MLP,
    ConcatSquash,
    ConvNet,
    DiffusersUNet,
    GaussianFourierEmbedding,
    HollowEGNN,
    HollowMLP,
    LogarithmicEmbedding,
    MLPPotential,
    NetworkError,
    PairField,
    SinusoidalEmbedding,
    TokenMixer,
    UNet,
)


def diffusers_unet(event_shape=(1, 2, 4), **arguments):
    pytest.importorskip("diffusers")
    return DiffusersUNet(event_shape, block_out_channels=(8, 8), norm_num_groups=2, **arguments)


NETWORKS = {
    "MLP": lambda **k: MLP((2, 3), hidden=(8, 8), **k),
    "MLP of vectors": lambda **k: MLP(6, hidden=(), **k),
    "ConcatSquash": lambda **k: ConcatSquash((2, 3), hidden=(8, 8), **k),
    "ConvNet 1d": lambda **k: ConvNet((2, 3), hidden=(4,), **k),
    "ConvNet 2d": lambda **k: ConvNet((1, 3, 2), hidden=(4,), **k),
    "ConvNet 3d": lambda **k: ConvNet((1, 3, 2, 1), hidden=(4,), **k),
    "MLP of waves": lambda **k: MLP((2, 3), hidden=(8,), time_embedding=SinusoidalEmbedding(6), **k),
    "MLP of logarithmic waves": lambda **k: MLP((2, 3), hidden=(8,), time_embedding=LogarithmicEmbedding(2), **k),
    "ConcatSquash of waves": lambda **k: ConcatSquash((2, 3), (8,), time_embedding=GaussianFourierEmbedding(6), **k),
    "ConvNet of waves": lambda **k: ConvNet((2, 3), hidden=(4,), time_embedding=SinusoidalEmbedding(2), **k),
    "MLPPotential": lambda **k: MLPPotential((2, 3), hidden=(8, 8), **k),
    "UNet": lambda **k: UNet((1, 2, 4), channels=(4, 8), **k),
    "UNet with attention": lambda **k: UNet((1, 2, 4), channels=(4, 8), blocks=2, attention=True, **k),
    "UNet of one level": lambda **k: UNet((1, 2, 4), channels=(4,), time_embedding=None, **k),
    "DiffusersUNet": diffusers_unet,
    "HollowMLP": lambda **k: HollowMLP((2, 3), hidden=(8,), **k),
    "PairField": lambda **k: PairField((2, 3), hidden=(8,), **k),
    "EGNN": lambda **k: EGNN((2, 3), hidden=8, **k),
    "HollowEGNN": lambda **k: HollowEGNN((2, 3), hidden=8, **k),
    "TokenMixer": lambda **k: TokenMixer((2, 3), hidden=(8,), width=8, **k),
}
WITHOUT_CONTEXT = {"DiffusersUNet", "EGNN", "HollowEGNN", "HollowMLP", "PairField", "TokenMixer"}
EVENTS = {"MLP of vectors": (6,), "ConvNet 2d": (1, 3, 2), "ConvNet 3d": (1, 3, 2, 1)}
EVENTS |= dict.fromkeys(["UNet", "UNet with attention", "UNet of one level", "DiffusersUNet"], (1, 2, 4))
CONTEXTS = [(name, features) for name in NETWORKS for features in (0, 5) if name not in WITHOUT_CONTEXT or not features]


@pytest.mark.parametrize(("name", "context_features"), CONTEXTS)
def test_is_a_field_of_scalar_and_sample_times(name, context_features):
    event, network = (
        EVENTS.get(name, (2, 3)),
        NETWORKS[name](**{"context_features": context_features} if context_features else {}),
    )
    x = torch.randn(4, *event)
    context = (torch.randn(4, context_features),) if context_features else ()
    scalar = network(torch.tensor(0.3), x, *context)
    assert scalar.shape == x.shape
    torch.testing.assert_close(network(torch.full((4,), 0.3), x, *context), scalar)
    assert not torch.allclose(network(torch.tensor(0.9), x, *context), scalar)
    times = torch.rand(4)
    for b in range(4):
        alone = network(times[b], x[b : b + 1], *(c[b : b + 1] for c in context))
        torch.testing.assert_close(network(times, x, *context)[b : b + 1], alone)
    check_field(lambda t, x: network(t, x, *context), 0.3, x)
    assert network(torch.tensor(0.3), x[:0], *(c[:0] for c in context)).shape == (0, *event)


@pytest.mark.parametrize("name", NETWORKS)
def test_zero_init_is_the_zero_field_and_learns(name):
    event, network = EVENTS.get(name, (2, 3)), NETWORKS[name](zero_init=True)
    x = torch.randn(4, *event)
    for t in (0.0, 0.7):
        assert network(torch.tensor(t), x).abs().max() == 0
    divergence(network, 0.3, x).sum().backward()
    assert sum(parameter.grad.abs().sum() for parameter in network.parameters() if parameter.grad is not None) > 0


def test_concat_squash_is_the_formula():
    network = ConcatSquash(2, hidden=())
    layer, t, x = network.layers[0], torch.tensor(0.4), torch.randn(3, 2)
    gate = torch.sigmoid(layer.gate.weight[:, 0] * t + layer.gate.bias)
    expected = (x @ layer.linear.weight.T + layer.linear.bias) * gate + layer.shift.weight[:, 0] * t
    torch.testing.assert_close(network(t, x), expected)


def test_activation_is_an_object():
    assert any(isinstance(module, nn.Softplus) for module in MLP(2, activation=nn.Softplus).modules())


def test_float64():
    network = MLP(2).double()
    assert network(torch.tensor(0.3), torch.randn(3, 2, dtype=torch.float64)).dtype == torch.float64


@alternated(name=["UNet", "UNet with attention", "DiffusersUNet"], t=[0.3, [0.1, 0.9]])
def test_divergence_of_unets_and_its_gradient(name, t):
    network, t = NETWORKS[name]().double(), torch.tensor(t, dtype=torch.float64)
    x = torch.randn(2, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    exact, reference = divergence(network, t, x), Autograd()(network, t, x).divergence
    torch.testing.assert_close(exact, reference)
    (gradient,) = torch.autograd.grad(exact.sum(), x)
    # gradcheck would do the same at several times the price
    step = 1e-5 * torch.randn_like(x)
    with torch.no_grad():
        slope = (divergence(network, t, x + step) - divergence(network, t, x - step)).sum() / 2
    torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-4, atol=1e-11)


@pytest.mark.parametrize("waves", [SinusoidalEmbedding, GaussianFourierEmbedding])
@pytest.mark.parametrize("t", [0.3, [0.1, 0.5, 0.9]])
def test_waves_of_time_leave_the_divergence_its_method(waves, t):
    t = torch.tensor(t)
    for make in (MLP, ConcatSquash):
        plain, waving = (
            Exact().explain(net, t, torch.randn(3, 3)) for net in (make(3), make(3, time_embedding=waves(8)))
        )
        assert waving.method == plain.method
    assert plain.method == ("layered" if t.ndim == 0 else "reverse")  # gates of a sample are diagonals like any other
    network = ConvNet((1, 16, 16), hidden=(4,), time_embedding=waves(4))
    assert Exact().explain(network, t, torch.randn(3, 1, 16, 16)).method == "colored"


def test_time_embedding_changes_no_name_that_is_saved():
    names = ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"]
    assert list(MLP(2, hidden=(8,)).state_dict()) == names
    assert list(MLP(2, hidden=(8,), time_embedding=SinusoidalEmbedding(6)).state_dict()) == names


def test_times_are_embedded_in_single_precision_at_least():
    # in bfloat16 the phase of the fastest wave would be off by 0.05
    embedding, t = SinusoidalEmbedding(6), torch.tensor(0.3)
    network = MLP(2, hidden=(), time_embedding=embedding).bfloat16()
    x = torch.zeros(1, 2, dtype=torch.bfloat16)
    expected = network.layers(torch.cat([x, embedding(t[None]).bfloat16()], dim=1))
    torch.testing.assert_close(network(t, x), expected, rtol=0, atol=0)


def test_attention_is_attention():
    attention, h = UNet((1, 4, 4), channels=(8,), attention=True).attention, torch.randn(2, 8, 4, 4)
    queries, keys, values = attention.project(h).flatten(2).transpose(1, 2).chunk(3, dim=2)
    expected = nn.functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).reshape(h.shape)
    torch.testing.assert_close(attention(h), h + attention.out(expected))


def test_unet_of_an_image_of_one_pixel_sees_it():
    network = UNet((1, 1, 1), channels=(16,))
    assert not torch.allclose(
        network(torch.tensor(0.3), torch.ones(1, 1, 1, 1)), network(torch.tensor(0.3), torch.zeros(1, 1, 1, 1))
    )


def test_diffusers_unet_is_its_model_at_scaled_times():
    network, x = diffusers_unet(time_scale=10.0, options={"freq_shift": 1}), torch.randn(2, 1, 2, 4)
    assert network.model.config.freq_shift == 1
    torch.testing.assert_close(network(torch.tensor([0.1, 0.5]), x), network.model(x, torch.tensor([1.0, 5.0])).sample)


def test_diffusers_is_asked_for_when_it_is_needed(monkeypatch):
    """`tests/adapters/test_foreign.py` sees that it is not loaded before."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(NetworkError, match=r'pip install "divflow\[diffusers\]"'):
        DiffusersUNet((1, 2, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MLP(2, time_embedding=nn.Tanh()), "integer attribute `features`, but Tanh has none"),
        (lambda: UNet((3,)), r"UNet.*\(3,\).*MLP"),
        (lambda: UNet((1, 4, 4), blocks=0), r"at least 1, but are 0 and \(32, 64\)"),
        (lambda: UNet((1, 4, 4), channels=(0, 8)), r"at least 1, but are 1 and \(0, 8\)"),
        (lambda: UNet((1, 4, 6), channels=(8, 8, 8)), r"3 levels.*divisible by 4.*\(1, 4, 6\).*fewer levels"),
        (lambda: UNet((1, 4, 4), channels=()), "at least one level"),
        (lambda: diffusers_unet((1, 3, 4)), r"DiffusersUNet of 2 levels.*divisible by 2.*\(1, 3, 4\)"),
        (lambda: diffusers_unet(options={"dropuot": 0.1}), r"\['dropuot'\].*'dropout'"),
        (lambda: diffusers_unet(options={"layers_per_block": 2}), "layers_per_block.*arguments of DiffusersUNet"),
        (
            lambda: diffusers_unet(layers_per_block=1, down_block_types=("DownBlock2D",)),
            "UNet2DModel refused.*same number",
        ),
        (
            lambda: diffusers_unet()(torch.tensor(0.0), torch.ones(3, 1, 2, 4), torch.ones(3, 4)),
            r"no context.*\(3, 4\)",
        ),
        (lambda: ConvNet((3,)), r"\(3,\).*MLP"),
        (lambda: ConvNet((1, 4, 4), kernel_size=2), "odd.*2"),
        (lambda: MLP(2)(torch.tensor(0.0), torch.ones(3, 2), torch.ones(3, 4)), "0 context features, but got 4"),
        (lambda: MLP(2, context_features=4)(torch.tensor(0.0), torch.ones(3, 2)), "4 context features, but got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(NetworkError, match=message):
        call()


def test_logarithmic_waves_tell_times_near_the_data_apart():
    """s is the logarithm of 1 + (1 - t) / epsilon, divided by that at t = 0; beyond the data nothing changes."""
    embedding = LogarithmicEmbedding(harmonics=1, epsilon=1e-3)
    t = torch.tensor([0.0, 0.99, 0.999, 1.0, 1.01], dtype=torch.float64)
    s = torch.log(1 + (1 - t).clamp(min=0) / 1e-3) / math.log(1_001)
    expected = torch.stack([t, s, (math.pi * s).sin(), (math.pi * s).cos()], dim=1)
    torch.testing.assert_close(embedding(t), expected)
    with pytest.raises(NetworkError, match="epsilon must be positive"):
        LogarithmicEmbedding(epsilon=0.0)
    with pytest.raises(ValueError, match="harmonics"):
        LogarithmicEmbedding(harmonics=-1)
