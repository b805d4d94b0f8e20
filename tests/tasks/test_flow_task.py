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
    run = trainer(tmp_path, max_epochs=40, check_val_every_n_epoch=40)
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
