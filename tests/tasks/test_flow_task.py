"""FlowTask in a user's own hands: a plain flow, a plain DataLoader, Lightning's own Trainer."""

import functools

import lightning as L
import pytest
import torch
from closed_forms import LinearVelocity, carried_normal
from torch import nn
from torch.utils.data import DataLoader

from divflow.divergence import Exact, FieldError, Hutchinson
from divflow.flow import ContinuousFlow
from divflow.tasks import FlowTask


def trainer(tmp_path, **settings):
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def as_it_is(batch):
    return torch.stack(batch)


def test_recovers_a_gaussian(tmp_path):
    """Maximum likelihood of a linear flow on a Gaussian: the trained density is the sample's own."""
    torch.manual_seed(0)
    truth = carried_normal(LinearVelocity((2,)), 0.0, 1.0)
    data = truth.sample((2_000,)).float()
    velocity = LinearVelocity((2,), torch.float32)
    with torch.no_grad():
        velocity.A.zero_()
        velocity.b.zero_()
    flow = ContinuousFlow(velocity, 2, estimator=Hutchinson())
    task = FlowTask(flow, functools.partial(torch.optim.Adam, lr=0.03), evaluation=flow.replace(estimator=Exact()))
    loader = DataLoader(data, batch_size=500, shuffle=True, collate_fn=as_it_is)
    held_out = DataLoader(truth.sample((4_000,)).float(), batch_size=1_000, collate_fn=as_it_is)
    run = trainer(tmp_path, max_epochs=25, check_val_every_n_epoch=25)
    run.fit(task, loader, held_out)
    results = run.test(task, held_out, verbose=False)[0]
    entropy = truth.entropy().item()
    assert abs(results["test/nll"] - entropy) < 5 * results["test/nll_standard_error"]
    fitted = torch.cov(flow.sample(20_000).T).double()
    torch.testing.assert_close(fitted, torch.cov(data.T.double()), rtol=0.15, atol=0.1)


def test_a_field_that_mixes_the_batch_is_refused_before_the_first_step(tmp_path):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, t, x):
            return self.norm(x)

    network = Mixing()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    loader = DataLoader(torch.randn(8, 2), batch_size=4, collate_fn=as_it_is)
    with pytest.raises(FieldError, match="norm is a BatchNorm1d"):
        trainer(tmp_path, max_epochs=1).fit(FlowTask(ContinuousFlow(network, 2)), loader, loader)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("estimator", [Exact(), Hutchinson()], ids=str)
def test_regularization_is_added_to_the_loss(estimator, tmp_path):
    """Loss = -log p + a * kinetic energy + b * Jacobian norm, each known for a linear flow."""
    torch.manual_seed(0)
    flow = ContinuousFlow(LinearVelocity((2,)), 2, estimator=estimator).double()
    batch = torch.randn(6, 2, dtype=torch.float64)
    weights = {"kinetic_energy": 0.3, "jacobian_norm": 0.2}
    logged = {}

    def loss(regularization):
        task = FlowTask(flow, regularization=regularization)
        task.trainer = trainer(tmp_path)
        task.log = lambda name, value, **options: logged.update({name: float(value)})
        torch.manual_seed(1)
        return task.training_step(batch, 0)

    plain, penalized = loss(None), loss(weights)
    expected = plain + 0.3 * logged["train/kinetic_energy"] + 0.2 * logged["train/jacobian_norm"]
    torch.testing.assert_close(penalized, expected)
    assert logged["train/nll"] == pytest.approx(plain.item())
    torch.testing.assert_close(loss({"kinetic_energy": 0.0, "jacobian_norm": 0}), plain)
    penalized.backward()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"curvature": 1.0}, r"jacobian_norm.*'curvature'"),
        ({"kinetic_energy": -1.0}, "kinetic_energy.*not negative.*-1"),
        ({"kinetic_energy": float("nan")}, "kinetic_energy.*finite"),
    ],
)
def test_regularization_that_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        FlowTask(ContinuousFlow(LinearVelocity((2,)), 2), regularization=weights)


def test_errors_of_the_mean_by_the_probes(tmp_path):
    flow = ContinuousFlow(LinearVelocity((2,), torch.float32), 2, estimator=Hutchinson(4))
    loader = DataLoader(torch.randn(60, 2), batch_size=20, collate_fn=as_it_is)
    results = trainer(tmp_path).test(FlowTask(flow), loader, verbose=False)[0]
    assert results["test/nll_estimator_error"] == pytest.approx(results["test/estimator_error"] / 60**0.5)
    assert 0 < results["test/nll_estimator_error"] < results["test/nll_standard_error"]
