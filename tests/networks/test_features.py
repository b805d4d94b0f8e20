"""Features of points: their formulas, periods and scales, and the networks and divergences that they leave as they were."""

import math

import pytest
import torch
from torch import nn

from divflow.divergence import Autograd, Exact, divergence
from divflow.manifolds import Euclidean, Product, SpecialOrthogonal, Sphere, Torus
from divflow.networks import MLP, ConcatSquash, FourierFeatures, ManifoldFeatures, NetworkError, PeriodicFeatures

FEATURES = {
    "periodic": lambda: PeriodicFeatures((2, 2), harmonics=3),
    "fourier": lambda: FourierFeatures((2, 2), waves=5),
    "coordinates": lambda: FourierFeatures((2, 2), waves=0),
    "manifold": lambda: ManifoldFeatures(Product(way=Sphere(1), angles=Torus(2)), waves=3),
}
EVENTS = {"manifold": (4,)}


def test_periodic_is_the_formula():
    x = torch.tensor([[0.3, -2.0], [5.0, 0.0]], dtype=torch.float64)
    angles = [[w * h for w in row for h in (1, 2, 3)] for row in (x * 2 * math.pi / 0.7).tolist()]
    expected = [[*map(math.sin, row), *map(math.cos, row)] for row in angles]
    torch.testing.assert_close(
        PeriodicFeatures(2, harmonics=3, period=0.7)(x), torch.tensor(expected).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("period", [2 * math.pi, 360.0, 0.5])
def test_angles_a_period_apart_are_one(period):
    x = period * torch.rand(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = PeriodicFeatures(3, harmonics=5, period=period)
    turns = period * torch.tensor([1.0, -2, 7], dtype=torch.float64)
    torch.testing.assert_close(features(x + turns), features(x))
    assert not torch.allclose(features(x + period / 2), features(x))
    assert features.features == 30


def test_fourier_is_the_formula():
    features = FourierFeatures(3, waves=4, max_frequency=8.0)
    frequencies = features.frequencies.double()
    torch.testing.assert_close(frequencies.norm(dim=1), torch.tensor([1.0, 2, 4, 8]).double(), rtol=1e-6, atol=0)
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = [[*p, *(math.sin(w @ p) for w in frequencies), *(math.cos(w @ p) for w in frequencies)] for p in x]
    torch.testing.assert_close(features(x), torch.tensor(expected).double(), atol=1e-6, rtol=0)


def test_frequencies_go_all_ways_and_are_saved_and_not_trained():
    first, second = (FourierFeatures(3, waves=3000, max_frequency=1.0) for _ in range(2))
    ways = first.frequencies
    torch.testing.assert_close(ways.T @ ways / 3000, torch.eye(3) / 3, rtol=0, atol=0.03)
    assert not list(first.parameters())
    x = torch.randn(2, 3)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    assert torch.equal(first(x), first(x))


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype(name, dtype):
    features, event = FEATURES[name](), EVENTS.get(name, (2, 2))
    for size in (0, 1, 3):
        found = features(torch.ones(size, *event, dtype=dtype))
        assert found.shape == (size, features.features)
        assert found.dtype == dtype
    with pytest.raises(NetworkError, match=r"built for x of shape .* but x has shape \(3, 5\)"):
        features(torch.ones(3, 5))


def test_features_of_a_product_are_those_of_its_parts():
    product = Product(inner=Product(way=Sphere(2), turn=SpecialOrthogonal()), angle=Torus(1, period=360.0))
    features = ManifoldFeatures(product, waves=4, max_frequency=3.0, harmonics=2)
    x = torch.cat([product.parts["inner"].uniform().sample((6,)), torch.rand(6, 1) * 360], dim=1)
    way, turn = features.parts[0].parts
    expected = [way(x[:, :3]), turn(x[:, 3:12].view(-1, 3, 3)), PeriodicFeatures(1, 2, 360.0)(x[:, 12:])]
    torch.testing.assert_close(features(x), torch.cat(expected, dim=1))
    assert features.features == 3 + 8 + 9 + 8 + 4
    assert ManifoldFeatures(Euclidean(3)).features == 3 + 128
    matrices = SpecialOrthogonal().uniform().sample((6,))
    torch.testing.assert_close(ManifoldFeatures(SpecialOrthogonal(), waves=0)(matrices), matrices.flatten(1))


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("make", [MLP, ConcatSquash])
def test_networks_see_features_alone(make, name):
    event = EVENTS.get(name, (2, 2))
    net = make(event, hidden=(8,), context_features=2, features=FEATURES[name]()).double()
    x, context = torch.randn(3, *event, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    value = net(torch.tensor(0.3), x, context)
    assert value.shape == x.shape
    again = make(event, hidden=(8,), context_features=2, features=FEATURES[name]()).double()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(torch.tensor(0.3), x, context), value)
    if name == "periodic":
        torch.testing.assert_close(net(torch.tensor(0.3), x + 2 * math.pi, context), value)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("hidden", [(), (7,), (7, 6)])
@pytest.mark.parametrize("t", [0.3, [0.1, 0.5, 0.9]])
def test_the_divergence(name, hidden, t):
    event, t = EVENTS.get(name, (2, 2)), torch.tensor(t, dtype=torch.float64)
    net = MLP(event, hidden=hidden, features=FEATURES[name]()).double()
    x = torch.randn(3, *event, dtype=torch.float64)
    torch.testing.assert_close(divergence(net, t, x), Autograd()(net, t, x).divergence)


@pytest.mark.parametrize("features", [FourierFeatures(16), PeriodicFeatures(16)])
def test_one_hidden_layer_keeps_its_closed_form(features):
    """Waves are one elementwise function of a linear map more: a closed form for two in a row, rows or products for three."""
    plan = Exact().explain(MLP(16, hidden=(256,), features=features), 0.5, torch.randn(64, 16))
    assert plan.method == "layered"
    assert plan.cost_in_probes < 1.5
    deeper = Exact().explain(MLP(16, hidden=(256, 256), features=features), 0.5, torch.randn(64, 16))
    assert 2 < deeper.cost_in_probes <= 8.5


@pytest.mark.parametrize("scale", [4.0, 30.0])
def test_fast_waves_learn_what_coordinates_do_not(scale):
    """A fit of a narrow bump on a sphere in 300 steps, whose width is a half or a fifteenth of what the fastest wave spans."""
    torch.manual_seed(0)
    x = Sphere(2).uniform().sample((1000,))
    bump = (scale * (x[:, 2:] - 1)).exp().expand(-1, 3)
    left = {}
    for name, features in {"waves": FourierFeatures(3, waves=32, max_frequency=10.0), "none": None}.items():
        torch.manual_seed(1)
        net = MLP(3, hidden=(32,), activation=nn.SiLU, features=features)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(150):
            loss = (net(torch.zeros(()), x) - bump).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        left[name] = (loss / bump.var()).item()
    assert left["waves"] < 0.02
    assert left["waves"] < left["none"] / 3


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: PeriodicFeatures(2, harmonics=0),
            ValueError,
            "harmonics must be a whole number of at least 1, but is 0",
        ),
        (lambda: PeriodicFeatures(2, period=-1.0), ValueError, "period must be a positive, finite number, but is -1.0"),
        (lambda: FourierFeatures(2, waves=-1), ValueError, "waves must be a whole number of at least 0, but is -1"),
        (lambda: FourierFeatures(2, max_frequency=0.5), ValueError, "max_frequency must be at least 1.*0.5"),
        (lambda: FourierFeatures(2, max_frequency=math.inf), ValueError, "max_frequency must be a positive, finite"),
        (lambda: MLP(2, features=nn.Linear(2, 3)), NetworkError, "integer attribute `features`, but Linear has none"),
        (lambda: ConcatSquash(2, features=nn.Linear(2, 3)), NetworkError, "but Linear has none"),
        (lambda: MLP(2)(torch.tensor(0.0), torch.zeros(1, 3)), NetworkError, r"shape \(k, \*\(2,\)\)"),
    ],
)
def test_errors(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
