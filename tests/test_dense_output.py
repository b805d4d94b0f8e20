"""States between the steps of a solve: what torchdiffeq interpolates there, at any time, with its gradient."""

import pytest
import torch
from catalogue import Network

from divflow.solver import Evaluations, Solver
from divflow.solver.dense_output import Steps

NETWORK = Network((2, 2))


def solve(x, times, record=None, solver=None, evaluations=None):
    (states,) = (solver or Solver(rtol=1e-4, atol=1e-4)).solve(
        lambda t, state: (6 * NETWORK(t, 3 * state[0]),), (x,), times, record=record, evaluations=evaluations
    )
    return states


@pytest.mark.parametrize("times", [torch.linspace(0.1, 2.0, 40), torch.linspace(1.5, -0.5, 33)], ids=["up", "down"])
def test_states_and_gradients_of_torchdiffeq(times):
    """Whose steps are the same, since all of them end at the last output alone; some of them were rejected here."""
    times, x = times.double(), torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    counted, again = Evaluations(), Evaluations()
    expected = solve(x, times, evaluations=counted)
    steps = Steps(times[0], times[-1])
    ends = solve(x, times[[0, -1]], steps, evaluations=again)
    assert counted.forward == again.forward
    accepted = len(steps._steps)
    assert 3 < accepted < (counted.forward - 1) / 6
    order = torch.randperm(len(times))
    torch.testing.assert_close(steps.states(times[order]), expected[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(ends[-1], expected[-1], rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    of = [x, *NETWORK.parameters()]
    ours = torch.autograd.grad((steps.states(times) * weights).sum(), of, retain_graph=True)
    theirs = torch.autograd.grad((expected * weights).sum(), of)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_more_steps_than_are_held():
    times, x = torch.tensor([0.0, 2.0], dtype=torch.float64), torch.randn(5, 2, 2, dtype=torch.float64)
    for most, overflowed in ((3, True), (500, False)):
        steps = Steps(*times, most)
        torch.testing.assert_close(solve(x, times, steps), solve(x, times))
        assert steps.overflowed == overflowed
        assert bool(steps._stages) != overflowed


@pytest.mark.parametrize(
    ("solver", "dense"),
    [
        (Solver(), True),
        (Solver(options={"first_step": 0.1, "step_t": [0.3]}), True),
        (Solver(options={"jump_t": [0.5]}), False),  # where the field is evaluated once more
        (Solver(gradient="adjoint"), False),
        (Solver("dopri8"), False),
        (Solver("rk4"), False),
    ],
)
def test_which_solvers_record_steps(solver, dense):
    assert solver.dense == dense
