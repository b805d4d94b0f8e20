"""Models of torchcfm: log p of a mixture in closed form, by the ways in which its models are called."""

import pytest
import torch
from gaussian_mixtures import Mixture, over
from torch import nn
from torch.distributions import Independent, MixtureSameFamily, Normal

from divflow.adapters import from_torchcfm
from divflow.solver import Solver

EVENTS = [(2,), (1, 4, 4)]


def velocity(data):
    """The mean of data - noise given (1 - t) noise + t data."""

    def model(t, x, shift=None):
        shift = torch.zeros((), dtype=x.dtype) if shift is None else over(shift, x)
        mean, noise = data.predictions(x - over(t, x) * shift, t, 1 - t)
        return mean + shift - noise

    return model


class Concatenated(nn.Module):
    """As torchcfm.utils.torch_wrapper: t is a scalar, and a column of what the model takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, t, x, *args, **kwargs):
        return self.model(torch.cat([x, t.repeat(x.shape[0])[:, None]], 1))


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_log_prob_of_a_mixture(event):
    data = Mixture(event)
    x = data.sample(6)
    result = from_torchcfm(velocity(data), event).evaluate(x)
    torch.testing.assert_close(result.log_prob, data.log_prob(x), rtol=0, atol=1e-3)


def test_wrapped_model_of_scalar_times():
    data = Mixture((2,))
    x = data.sample(6)
    flow = from_torchcfm(Concatenated(lambda rows: velocity(data)(rows[:, -1], rows[:, :-1])), 2)
    torch.testing.assert_close(flow.log_prob(x), data.log_prob(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_context_shifts_the_data(event):
    data, shift = Mixture(event), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    x = data.sample(3)
    for name in (None, "shift"):
        flow = from_torchcfm(velocity(data), event, context_name=name)
        torch.testing.assert_close(flow.log_prob(x + over(shift, x), shift), data.log_prob(x), rtol=0, atol=1e-3)


def test_between_two_distributions():
    """From a mixture in the source to one twice as wide: x_t = (1 + t) x_0, whose velocity is x / (1 + t)."""
    centres = torch.tensor([[-1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)

    def mixture(scale):
        weights = torch.distributions.Categorical(torch.ones(2, dtype=torch.float64))
        return MixtureSameFamily(weights, Independent(Normal(scale * centres, 0.3 * scale), 1))

    x = torch.randn(5, 2, dtype=torch.float64)
    flow = from_torchcfm(lambda t, x: x / over(1 + t, x), 2, base=mixture(1.0))
    torch.testing.assert_close(flow.log_prob(x), mixture(2.0).log_prob(x), rtol=0, atol=1e-4)


def test_torchcfms_own_models():
    """Of torchcfm.models, if it is there: the same as the ODE of the wrapped model by hand."""
    models = pytest.importorskip("torchcfm.models", reason="compares with torchcfm 1.0.7, of the extra peers")
    model = models.MLP(dim=2, time_varying=True).double()
    flow = from_torchcfm(Concatenated(model), 2, solver=Solver(rtol=1e-8, atol=1e-8))
    x = torch.randn(3, 2, dtype=torch.float64)
    z, steps = x.clone(), 400
    for i in range(steps, 0, -1):
        t = torch.tensor(i / steps, dtype=torch.float64)
        middle = z - Concatenated(model)(t, z) / (2 * steps)
        z = z - Concatenated(model)(t - 1 / (2 * steps), middle) / steps
    torch.testing.assert_close(flow.encode(x), z, rtol=0, atol=1e-5)
