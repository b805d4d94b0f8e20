"""What all adapters refuse, and what they leave as it is."""

import math
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Generator, nn

import divflow
from divflow.adapters import AdapterError, from_denoiser, from_diffusers, from_flow_matching, from_torchcfm
from divflow.divergence import Exact, FieldError
from divflow.errors import DivflowError
from divflow.flow import FlowDensity
from divflow.flow.transforms import Affine
from divflow.flow.units import UnitsWarning

SCHEDULER = SimpleNamespace(
    alphas_cumprod=torch.linspace(0.99, 0.01, 10).double(), config=SimpleNamespace(prediction_type="sample")
)
ADAPTERS = {
    "flow_matching": from_flow_matching,
    "torchcfm": from_torchcfm,
    "denoiser": lambda model, event_shape, **options: from_denoiser(model, event_shape, 0.1, 10.0, **options),
    "diffusers": lambda model, event_shape, **options: from_diffusers(model, SCHEDULER, event_shape, **options),
}
SIGNATURES = {
    "flow_matching": r"model\(x, t\)",
    "torchcfm": r"model\(t, x\)",
    "denoiser": r"D\(x, sigma\)",
    "diffusers": r"unet\(sample, timestep\)",
}
each = pytest.mark.parametrize("name", ADAPTERS)


def called(name, model):
    """A model(x, t) in the order that the adapter calls."""
    return (lambda t, x, *context: model(x, t, *context)) if name == "torchcfm" else model


def swapped(name, model):
    return model if name == "torchcfm" else (lambda t, x: model(x, t))


class Net(nn.Module):
    """As x, t or as t, x."""

    def __init__(self, *layers, time_first=False):
        super().__init__()
        self.net, self.time_first = nn.Sequential(*layers), time_first

    def forward(self, a, b):
        x, t = (b, a) if self.time_first else (a, b)
        return self.net(x) * t.reshape(-1, 1)


@each
def test_are_reached_from_the_package(name):
    assert getattr(divflow.adapters, f"from_{name}") is not None
    assert issubclass(AdapterError, DivflowError)
    assert issubclass(AdapterError, ValueError)


def test_import_no_other_library():
    code = "import divflow.adapters, divflow.networks, sys; print(sorted(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for name in ("diffusers", "flow_matching", "torchcfm", "torchdyn", "transformers", "lightning", "hydra", "sklearn"):
        assert f"'{name}'" not in loaded


@each
@pytest.mark.parametrize("model", [None, 3, "model", torch.zeros(2)], ids=repr)
def test_no_model(name, model):
    with pytest.raises(AdapterError, match=f"called as {SIGNATURES[name]}, but got"):
        ADAPTERS[name](model, 2)


@each
def test_weights_are_no_model(name):
    with pytest.raises(AdapterError, match="got an OrderedDict. Load weights into their module first"):
        ADAPTERS[name](nn.Linear(3, 3).state_dict(), 3)


@each
def test_other_order_of_arguments(name):
    """Found from what the model does, with no name to tell: matrices take no scalars."""
    matrix = torch.eye(3)
    models = [
        swapped(name, lambda a, b: a @ matrix + 0 * b.reshape(-1, 1)),
        swapped(name, lambda a, b: -a),
        Net(nn.Linear(3, 3), time_first=name != "torchcfm"),
    ]
    for model in models:
        with pytest.raises(AdapterError, match=f"expected a model called as {SIGNATURES[name]}.*other order"):
            ADAPTERS[name](model, 3)


@each
def test_other_order_that_broadcasting_would_hide(name):
    """x - t is t - x with arguments exchanged, of the same shape; the names tell."""
    model = (lambda x, t: x - t) if name == "torchcfm" else (lambda t, x: x - t)
    with pytest.raises(
        AdapterError,
        match=rf"{SIGNATURES[name]}.*other order.*arguments are \({'x, t' if name == 'torchcfm' else 't, x'}\)",
    ):
        ADAPTERS[name](model, 3)


@each
def test_value_of_another_shape(name):
    for model in (lambda x, t: x[:, :1], lambda x, t: x.sum(), lambda x, t: torch.cat([x, x], dim=1)):
        with pytest.raises(AdapterError, match=r"returned shape .* for x of shape \(2, 3\)"):
            ADAPTERS[name](called(name, model), 3)


@each
def test_value_that_is_no_tensor_or_of_another_dtype(name):
    for model, message in ((lambda x, t: (x, x), "tuple"), (lambda x, t: (x + t.reshape(-1, 1)).float(), "float32")):
        flow = ADAPTERS[name](called(name, model), 3)
        with pytest.raises(FieldError, match=message):
            flow.log_prob(torch.zeros(2, 3, dtype=torch.float64))


@each
def test_model_that_raises(name):
    def model(x, t):
        raise RuntimeError("no such weights\nand more")

    flow = ADAPTERS[name](called(name, model), 3)
    with pytest.raises(
        AdapterError, match=rf"RuntimeError: no such weights\. Expected {SIGNATURES[name]}.*\(2, 3\)"
    ) as raised:
        flow.log_prob(torch.zeros(2, 3))
    assert isinstance(raised.value.__cause__, RuntimeError)


@each
def test_dtype_of_the_model(name):
    flow = ADAPTERS[name](Net(nn.Linear(3, 3), time_first=name == "torchcfm"), 3)
    with pytest.raises(AdapterError, match=r"module\.to\(torch\.float64\)"):
        flow.log_prob(torch.zeros(2, 3, dtype=torch.float64))


@each
def test_events_of_another_size(name):
    flow = ADAPTERS[name](called(name, lambda x, t: -x), (1, 4, 4))
    with pytest.raises(FieldError, match=r"\(1, 4, 4\).*\(2, 1, 5, 5\)"):
        flow.log_prob(torch.zeros(2, 1, 5, 5))


@each
@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(3)], ids=repr)
def test_training_mode(name, layer):
    model = Net(nn.Linear(3, 3), layer, time_first=name == "torchcfm")
    with pytest.raises(AdapterError, match=rf"net\.1 is a {type(layer).__name__} in training mode.*\.eval\(\)"):
        ADAPTERS[name](model, 3)
    flow = ADAPTERS[name](model.eval(), 3)
    assert flow.log_prob(torch.zeros(2, 3)).shape == (2,)
    assert not model.training
    flow.train()
    with pytest.raises(AdapterError, match="training mode"):
        flow.log_prob(torch.zeros(2, 3))


@each
def test_training_mode_that_changes_nothing(name):
    model = Net(nn.Linear(3, 3), nn.Dropout(0.0), nn.LayerNorm(3), time_first=name == "torchcfm")
    assert ADAPTERS[name](model, 3).log_prob(torch.zeros(2, 3)).shape == (2,)
    assert model.training


@each
def test_normalization_over_the_batch(name):
    model = Net(nn.BatchNorm1d(3, track_running_stats=False), time_first=name == "torchcfm").eval()
    with pytest.raises(AdapterError, match="normalizes over the batch"):
        ADAPTERS[name](model, 3)


@each
def test_times_of_one_a_sample_only(name):
    """A model that takes one time a sample, and no scalar, has the density of one that takes both."""
    both = called(name, lambda x, t: -x * (1 + t.reshape(-1, 1) / 20))
    rows = called(name, lambda x, t: -x * (1 + t[:, None] / 20))
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = ADAPTERS[name](both, 3).log_prob(x)
    torch.testing.assert_close(ADAPTERS[name](rows, 3).log_prob(x), expected, rtol=0, atol=1e-6)


@each
def test_scalar_times_only(name):
    both = called(name, lambda x, t: -x * (1 + t.reshape(-1, 1) / 20))
    scalar = called(name, lambda x, t: -x * (1 + t.reshape(()) / 20))
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = ADAPTERS[name](both, 3).log_prob(x)
    torch.testing.assert_close(ADAPTERS[name](scalar, 3).log_prob(x), expected, rtol=0, atol=1e-6)


@each
def test_times_outside_of_the_models_range(name):
    flow = ADAPTERS[name](called(name, lambda x, t: -x), 3)
    low, high = sorted(flow.times())
    for t in (low - 0.1, high + 0.1):
        with pytest.raises(AdapterError, match=r"known for times of the flow in \["):
            flow.trajectory(torch.zeros(1, 3), [(low + high) / 2, t])
    assert flow.trajectory(torch.zeros(1, 3), [low, high]).shape == (2, 1, 3)


@each
def test_no_samples(name):
    def model(x, t):
        assert len(x), "an empty batch"
        return -x

    assert ADAPTERS[name](called(name, model), 3).log_prob(torch.zeros(0, 3)).shape == (0,)


@each
def test_looking_at_a_model_draws_no_random_numbers(name):
    before = torch.get_rng_state()
    ADAPTERS[name](called(name, lambda x, t: x + 0 * torch.rand(())), 3)
    assert torch.equal(torch.get_rng_state(), before)


@each
def test_gradients_reach_data_and_parameters(name):
    model = Net(nn.Linear(3, 3), nn.Tanh(), time_first=name == "torchcfm").double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    ADAPTERS[name](model, 3).log_prob(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert model.net[0].weight.grad.abs().sum() > 0


@each
def test_samples_are_in_the_models_precision(name):
    for dtype in (torch.float32, torch.float64):
        model = Net(nn.Linear(3, 3), nn.Tanh(), time_first=name == "torchcfm").to(dtype)
        assert ADAPTERS[name](model, 3).sample(2).dtype == dtype


@each
def test_the_range_of_their_data(name):
    """Pixels of a model from -1 to 1, which a picture of 0 to 1 fills by half."""
    flow = ADAPTERS[name](called(name, lambda x, t: -x / 20), 9, data_range=(-1, 1))
    assert flow.data_range == (-1, 1)
    assert "data_range=(-1.0, 1.0)" in repr(flow)
    assert flow.replace(estimator=Exact()).data_range == (-1, 1)
    pixels = torch.rand(12, 9, dtype=torch.float64, generator=Generator().manual_seed(0))
    density = FlowDensity(flow, Affine.between((0, 1), flow.data_range))
    assert [end.item() for end in density.data_range] == [0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnitsWarning)
        warnings.filterwarnings("error", "the model was trained on data", UnitsWarning)
        expected = flow.log_prob(2 * pixels - 1) + 9 * math.log(2)  # of pixels twice as dense
        torch.testing.assert_close(density.log_prob(pixels).double(), expected, rtol=1e-4, atol=1e-3)
        flow.log_prob(pixels[:7])  # a few pictures may be bright
        flow.log_prob(pixels[:0])
        flow.sample(2)
        with pytest.raises(
            UnitsWarning, match=r"from -1 to 1, but these are from 0\.\d+ to 0\.\d+, which fill no more than half"
        ):
            flow.log_prob(pixels)
        with pytest.raises(UnitsWarning, match=r"these are from \S+ to 2\d\d\.\d+, which reach beyond that"):
            flow.log_prob(255 * pixels)
    for wrong in ((1, -1), (0, math.inf), 3, "wide", (0, 1, 2)):
        with pytest.raises(ValueError, match=r"data_range must be a range \(low, high\), such as \(-1, 1\), but is"):
            ADAPTERS[name](called(name, lambda x, t: -x), 9, data_range=wrong)


@each
def test_data_far_from_the_base_are_warned_of(name):
    flow = ADAPTERS[name](called(name, lambda x, t: -x / 20), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnitsWarning)
        flow.log_prob(flow.sample(20, generator=Generator().manual_seed(0)))
        flow.log_prob(torch.zeros(20, 3))
        flow.log_prob(1e4 * torch.ones(7, 3))  # which may be asked for
    with pytest.warns(UnitsWarning, match="most of the 20 rows are farther from the base than any of 1,000 samples"):
        flow.log_prob(1e4 * torch.ones(20, 3))


@each
def test_compiled_models_are_known_by_their_names(name):
    class TimeFirst(nn.Module):
        def forward(self, t, x):
            return t - x

    class TimeLast(nn.Module):
        def forward(self, x, t):
            return x - t

    with pytest.raises(AdapterError, match="its arguments are"):
        ADAPTERS[name](torch.compile((TimeLast if name == "torchcfm" else TimeFirst)()), 3)
