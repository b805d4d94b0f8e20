"""Both columns of docs/migration.md run, with the same weights, and give the same numbers."""

import pytest
import torch
from documents import run_blocks, sections
from run import ROOT

SECTIONS = sections(ROOT / "docs" / "migration.md")
NEEDED = {
    "zuko": ["zuko"],
    "FFJORD and torchdiffeq": [],
    "flow_matching": ["flow_matching"],
    "torchcfm": ["torchcfm", "torchdyn"],
    "score_sde": [],
}


def columns(name):
    """What the left and the right block leave, by name; what is before them is of both."""
    for package in NEEDED[name]:
        pytest.importorskip(package, reason=f"needs the package {package}, which .ci/run installs")
    *shared, left, right = SECTIONS[name]
    both = run_blocks(shared, "migration")
    theirs = dict(run_blocks([left], "migration", both))
    gradients = [p.grad for net in _networks(both) for p in net.parameters()]
    for net in _networks(both):
        net.zero_grad()  # to None, so that those of the left block are kept
    ours = run_blocks([right], "migration", both)
    for before, net_parameter in zip(gradients, (p for net in _networks(both) for p in net.parameters()), strict=True):
        torch.testing.assert_close(net_parameter.grad, before, rtol=1e-3, atol=1e-4)
    return theirs, ours


def _networks(names):
    return [names[name] for name in ("net", "model") if name in names]


def close(theirs, ours, tolerance):
    assert theirs is not ours
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_every_section_is_tested():
    assert list(SECTIONS) == list(NEEDED)
    assert all(len(blocks) == 2 + (name != "zuko") for name, blocks in SECTIONS.items())


@pytest.mark.slow  # zuko takes some seconds to import, and for its first solve
def test_zuko(without_validation):
    theirs, ours = columns("zuko")
    close(theirs["log_prob"], ours["log_prob"], 2e-3)  # its log-determinant has 100 times the tolerance that was given
    assert theirs["samples"].shape == ours["samples"].shape
    assert all(p.grad is not None for p in ours["velocity"].parameters())
    theirs["flow"].eval()
    assert not theirs["flow"](theirs["c"]).log_prob(theirs["x"]).requires_grad
    assert ours["flow"].eval().log_prob(ours["x"], ours["c"]).requires_grad


def test_torchdiffeq():
    theirs, ours = columns("FFJORD and torchdiffeq")
    close(theirs["log_prob"], ours["log_prob"], 1e-4)
    x = ours["x"].clone().requires_grad_()
    dx = ours["net"](torch.tensor(0.5), x)
    ones = torch.eye(2).unsqueeze(1).expand(2, len(x), 2)  # probes along the axes, which add up to the trace
    close(ours["trace"](dx, x), sum(ours["hutchinson"](dx, x, e) for e in ones), 1e-6)


def test_flow_matching():
    theirs, ours = columns("flow_matching")
    close(theirs["loss"], ours["loss"], 1e-6)
    close(theirs["samples"], ours["samples"], 1e-4)
    close(theirs["log_prob"], ours["log_prob"], 1e-3)


@pytest.mark.slow  # torchdyn takes four seconds to import
def test_torchcfm():
    theirs, ours = columns("torchcfm")
    close(theirs["loss"], ours["loss"], 1e-6)
    close(theirs["trajectory"], ours["trajectory"], 1e-3)


@pytest.mark.slow
def test_score_sde():
    theirs, ours = columns("score_sde")
    estimates, _, _ = theirs["likelihood_fn"](theirs["data"][:1].expand(400, 1, 4, 4).contiguous())
    error = estimates.std().item() / 20
    assert error < 0.02
    assert abs(estimates.mean().item() - ours["bpd"][0].item()) < 4 * error
    assert (ours["noisy"].log_prob - ours["nats"]).abs().max() > 1e-3
