"""Models of flow_matching: log p of a mixture in closed form, and against flow_matching's own solver."""

import pytest
import torch
from gaussian_mixtures import Mixture, over
from torch import Generator, nn
from torch.distributions import Independent, Normal

from divflow.adapters import AdapterError, from_flow_matching
from divflow.divergence import Hutchinson
from divflow.networks import MLP
from divflow.solver import Solver

EVENTS = [(2,), (1, 4, 4)]


class Velocity(nn.Module):
    """The mean of data - noise given (1 - t) noise + t data, the data shifted by a context."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def forward(self, x, t, shift=None):
        shift = torch.zeros((), dtype=x.dtype) if shift is None else over(shift, x)
        data, noise = self.data.predictions(x - over(t, x) * shift, t, 1 - t)
        return data + shift - noise


class Extras(nn.Module):
    """As flow_matching.utils.ModelWrapper: extras by name only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, **extras):
        return self.model(x, t, extras["label"])


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_log_prob_of_a_mixture(event):
    data = Mixture(event)
    x = data.sample(6)
    result = from_flow_matching(Velocity(data), event).evaluate(x)
    torch.testing.assert_close(result.log_prob, data.log_prob(x), rtol=0, atol=1e-3)
    assert result.quadrature_error.max() < 1e-3
    assert (result.standard_error == 0).all()


def test_float32():
    data = Mixture((2,))
    x = data.sample(6)
    flow = from_flow_matching(lambda x, t: Velocity(data)(x.double(), t.double()).float(), 2)
    torch.testing.assert_close(flow.log_prob(x.float()).double(), data.log_prob(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_context_shifts_the_data(event):
    data, shift = Mixture(event), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    x = data.sample(3)
    for model, name in ((Velocity(data), None), (Velocity(data), "shift"), (Extras(Velocity(data)), "label")):
        flow = from_flow_matching(model, event, context_name=name)
        torch.testing.assert_close(flow.log_prob(x + over(shift, x), shift), data.log_prob(x), rtol=0, atol=1e-3)


def test_labels_are_whole_numbers():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 2)

        def forward(self, x, t, label):
            return self.table(label) - x

    flow, labels = from_flow_matching(Labelled(), 2), torch.tensor([0, 2, 2])
    alone = [flow.log_prob(torch.zeros(1, 2), label[None]) for label in labels]
    together = flow.log_prob(torch.zeros(3, 2), labels)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert together[0] != together[1]


def test_a_source_of_ones_own():
    """A velocity of zero leaves the source as it is."""
    source = Independent(Normal(torch.ones(2, dtype=torch.float64), torch.full((2,), 3.0, dtype=torch.float64)), 1)
    x = torch.randn(4, 2, dtype=torch.float64)
    flow = from_flow_matching(lambda x, t: torch.zeros_like(x), 2, base=source)
    torch.testing.assert_close(flow.log_prob(x), source.log_prob(x))


def test_parameters_are_the_flows():
    model = Extras(MLP(2, hidden=(4,)))
    flow = from_flow_matching(model, 2, context_name="label")
    assert set(flow.parameters()) == set(model.parameters())


def test_extras_without_a_name():
    flow = from_flow_matching(Extras(Velocity(Mixture((2,)))), 2)
    with pytest.raises(AdapterError, match=r"model\(x, t\).*context_name="):
        flow.log_prob(torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3))


@pytest.mark.parametrize("event", [(5,), (64,)], ids=str)
def test_flow_matchings_own_likelihood(event):
    solvers = pytest.importorskip(
        "flow_matching.solver", reason="compares with flow_matching 1.0.10, of the extra peers"
    )
    wrapper = pytest.importorskip("flow_matching.utils", reason="of the extra peers").ModelWrapper
    network = MLP(event, hidden=(16, 16)).double()

    class Wrapped(wrapper):
        def forward(self, x, t):
            return 2 * self.model(t, x)

    model, x = Wrapped(network), torch.randn(4, *event, dtype=torch.float64)
    flow = from_flow_matching(model, event, solver=Solver(rtol=1e-9, atol=1e-9))
    source = Independent(Normal(torch.zeros(event, dtype=torch.float64), 1.0), len(event))
    _, theirs = solvers.ODESolver(model).compute_likelihood(
        x, source.log_prob, step_size=None, method="dopri5", atol=1e-9, rtol=1e-9, exact_divergence=True
    )
    torch.testing.assert_close(flow.log_prob(x), theirs, rtol=0, atol=1e-6)
    estimate = flow.replace(estimator=Hutchinson(20)).evaluate(x, generator=Generator().manual_seed(0))
    assert ((estimate.log_prob - theirs).abs() < 5 * estimate.standard_error + 1e-6).all()
