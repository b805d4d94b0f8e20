"""The error that is stated bounds the true one, for 95 % of samples: random networks, against an independent solve."""

import importlib.util
from pathlib import Path

import pytest
import torch

from divflow.likelihood import Quadrature
from divflow.solver import Solver

_PATH = Path(__file__).parent / "benchmarks" / "claims.py"
_SPEC = importlib.util.spec_from_file_location("claims", _PATH)
claims = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(claims)


def test_claims_of_a_few_networks():
    """At solver and quadrature tolerances of both of which each is the larger error for some."""
    for solver, tolerance in ((1e-5, 1e-1), (1e-3, 1e-4)):
        ratio, _ = claims.ratios(5, tolerance, Solver(rtol=solver, atol=solver), torch.float64)
        assert (ratio <= 1).double().mean() >= 0.95
        assert ratio.median() > 0.01  # and no claim is so large that it says nothing


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_claims_of_two_hundred_networks(tolerance, dtype):
    ratio, _ = claims.ratios(200, tolerance, Solver(), dtype)
    assert (ratio <= 1).double().mean() >= 0.95


@torch.no_grad()
def test_what_was_not_asked_for_is_not_spent():
    flow, x = claims.random_flow(0)
    flow = flow.replace(likelihood=Quadrature(tolerance=1e-2))
    plain, full = flow.evaluate(x, diagnostics=False), flow.evaluate(x)
    assert plain.evaluations.diagnostics == 0 < full.evaluations.diagnostics
    assert plain.trajectory_error is None
    torch.testing.assert_close(full.quadrature_error, plain.quadrature_error + full.trajectory_error)
    torch.testing.assert_close(full.log_prob, plain.log_prob, rtol=0, atol=0)
