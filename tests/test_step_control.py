"""Options of the steps, and the error that they may make: of every sample, whatever is beside it."""

import math

import pytest
import torch
from torch import nn

from divflow.divergence import FieldError
from divflow.divergence.check import accepts_sample_times
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.solver import Evaluations, Solver
from divflow.solver.norms import worst_sample
from divflow.solver.step_control import StepTimes, steps_for_one

TIMES = torch.tensor([0.0, 1.0], dtype=torch.float64)


def decay(t, state):
    return (-state[0],)


def solve(solver, times=TIMES, field=decay, state=None):
    accepted, evaluations = StepTimes(times[0], times[-1]), Evaluations()
    state = torch.ones(1, 1, dtype=times.dtype) if state is None else state
    with torch.no_grad():
        (states,) = solver.solve(field, (state,), times, evaluations=evaluations, accepted=accepted)
    return states, accepted, evaluations


@pytest.mark.parametrize(
    "options",
    [
        {"max_step": 0.1},
        {"max_step": 0.25},
        {"max_step": torch.tensor(0.1)},
        {"first_step": 0.5, "max_step": 0.1},
        {"min_step": 0.05},
        {"min_step": 0.1, "max_step": 0.1},
        {"max_step": 0.125, "step_t": [0.5, 0.25]},
        {"max_step": math.inf},
        {"first_step": 1e-4},
        {"first_step": 100.0},
        {"dtype": torch.float32},
        {"dtype": "float32"},
        {"dtype": "torch.float64", "step_t": 0.5},
        {"dtype": torch.float32, "max_step": 0.25},
        {"first_step": None, "max_step": 0.1, "min_step": None, "safety": None, "norm": None, "step_t": None},
        {"norm": lambda errors: errors.abs().max()},
        {"jump_t": 0.5},
        {"jump_t": [0.5, 0.5, 0.2], "step_t": [0.2, 0.7, 7.0, -1.0]},
        {"jump_t": [0.0, 1.0], "max_step": 0.3},
        {"safety": 0.5, "ifactor": 2.0, "dfactor": 0.5},
    ],
    ids=lambda options: ", ".join(f"{name}={'a function' if callable(it) else it}" for name, it in options.items()),
)
@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_options_and_outputs_are_kept(method, down, options):
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    field = (lambda t, state: (state[0],)) if down else decay
    evaluated = []

    def watched(t, state):
        evaluated.append(float(t))
        return field(t, state)

    states, accepted, evaluations = solve(Solver(method, options=options), times.flip(0) if down else times, watched)
    torch.testing.assert_close(states[:, 0, 0], torch.exp(-times), rtol=0, atol=1e-4)
    assert evaluations.forward < 300
    assert min(evaluated) > -1e-6
    assert max(evaluated) < 1 + 1e-6
    lengths = torch.stack(accepted._lengths)
    assert lengths.max() <= float(options.get("max_step") or 1.0) * (1 + 1e-6)
    assert (lengths > float(options.get("min_step") or 0.0) * (1 - 1e-6)).sum() >= len(lengths) - len(
        times
    )  # but for ends
    assert lengths.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dopri5", {"first_step": -0.1}, "first_step.*-0.1"),
        ("dopri5", {"first_step": 0.0}, "first_step.*0"),
        ("dopri5", {"max_step": 0.0}, "max_step.*0"),
        ("dopri5", {"min_step": 0.2, "max_step": 0.1}, "min_step.*0.2.*max_step.*0.1"),
        ("dopri5", {"min_step": -1.0}, "min_step.*-1"),
        ("dopri5", {"min_step": math.nan}, "min_step.*nan"),
        ("dopri5", {"safety": 2.0}, "safety"),
        ("dopri5", {"ifactor": 0.5}, "ifactor"),
        ("dopri5", {"norm": "rms"}, "norm.*'rms'"),
        ("dopri5", {"dtype": "float8"}, "float64 or float32, but is 'float8'"),
        ("dopri5", {"dtype": torch.int64}, "torch.int64"),
        ("dopri5", {"min_step": "0.1"}, "min_step.*'0.1'"),
        ("dopri5", {"step_t": "half"}, "step_t.*'half'"),
        ("dopri5", {"jump_t": [math.nan]}, "jump_t.*nan"),
        ("dopri8", {"step_t": [0.1, math.inf]}, "step_t.*inf"),
        ("rk4", {"step_size": -0.1}, "step_size.*-0.1"),
        ("rk4", {"jump_t": [0.1]}, "rk4 has no option jump_t"),
        ("explicit_adams", {"max_order": 0}, "max_order.*0"),
    ],
)
def test_values_that_no_step_can_take(method, options, message):
    with pytest.raises(ValueError, match=message):
        Solver(method, options=options)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize(
    "likelihood", [Quadrature(), Quadrature(tolerance=1e-4), Augmented()], ids=["nodes", "tolerance", "ode"]
)
def test_a_norm_is_that_of_one_tensor_in_every_likelihood(likelihood, gradient):
    seen = []

    def norm(errors):
        seen.append(errors.shape)
        return errors.abs().max()

    x = torch.randn(5, 2, dtype=torch.float64)
    found = []
    for options in ({"norm": norm}, {}):
        solver = Solver(rtol=1e-7, atol=1e-7, gradient=gradient, options=options)
        flow = ContinuousFlow(Uneven(), 2, likelihood=likelihood, solver=solver).double()
        flow.log_prob(x).sum().backward()
        found.append(torch.stack([flow.log_prob(x).sum(), flow.velocity.gain.grad]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)
    assert set(seen) == ({(5, 2), (5,)} if likelihood == Augmented() else {(5, 2)})


def test_a_norm_of_several_numbers_is_refused():
    with pytest.raises(ValueError, match=r"one number.*\(2, 2\)"):
        solve(Solver(options={"norm": lambda errors: errors}), state=torch.ones(2, 2, dtype=torch.float64))


class Uneven(nn.Module):
    """dx/dt = w cos(w t) x, w the sample's second entry: fast for one and slow for all others."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, t, x):
        rate = self.gain * x[:, 1] * torch.cos(x[:, 1] * t)
        return torch.stack([rate * x[:, 0], torch.zeros_like(rate)], dim=1)


def one_fast_among(count):
    x = torch.tensor([[1.0, 0.01]], dtype=torch.float64).repeat(count, 1)
    x[-1, 1] = 25.0
    return x


@torch.no_grad()
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_no_sample_hides_among_others(method, tolerance):
    """By the mean over the batch, the error of one among 1,000 would be allowed to be 30 times as large."""
    flow = ContinuousFlow(Uneven(), 2, solver=Solver(method, rtol=tolerance, atol=tolerance)).double()
    last = [flow.decode(one_fast_among(count))[-1, 0].item() for count in (1, 30, 1_000)]
    true = math.exp(math.sin(25.0))
    errors = [abs(value - true) for value in last]
    assert max(errors) < 2 * errors[0] + tolerance


def test_no_sample_hides_in_an_adjoint_or_an_augmented_solve():
    for settings in ({"solver": Solver(gradient="adjoint")}, {"likelihood": Augmented()}):
        found = []
        for count in (1, 300):
            flow = ContinuousFlow(Uneven(), 2, t_base=1.0, t_data=0.0, **settings).double()
            log_prob = flow.log_prob(one_fast_among(count))[-1]
            found.append(torch.stack([log_prob, *torch.autograd.grad(log_prob, flow.velocity.gain)]).detach())
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_the_error_of_a_step():
    errors = torch.tensor([[3.0, 4.0], [0.1, 0.0]])
    assert worst_sample(errors).item() == pytest.approx(12.5**0.5)
    assert worst_sample((errors, torch.tensor([1.0, 7.0]))).item() == 7.0
    assert worst_sample((errors[:, :0], errors)).item() == pytest.approx(12.5**0.5)
    assert worst_sample(torch.tensor([[1.0], [math.nan]])).isnan()


def test_steps_of_other_methods_in_those_of_dopri5():
    """On an oscillation all of them tell as much of the velocity, within a factor of five."""
    field = lambda t, state: (10 * torch.cos(10 * t) * state[0],)  # noqa: E731
    counts = []
    for method in ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"):
        for tolerance in (1e-3, 1e-5):
            solver = Solver(method, tolerance, tolerance, max_evaluations=100_000)
            counts.append(len(solve(solver, field=field)[1]) / steps_for_one(method, tolerance))
    assert max(counts) < 5 * min(counts)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "euler", "rk4", "explicit_adams", "scipy_solver"])
@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_a_finer_solve_has_less_error(method, down):
    times, field = (TIMES.flip(0), lambda t, s: (s[0],)) if down else (TIMES, decay)
    solver = Solver(method, rtol=1e-3, atol=1e-3)
    coarse, accepted, _ = solve(solver, times, field)
    fine, halves, _ = solve(solver.finer(accepted, *times), times, field)
    errors = [abs(states[-1].item() - math.exp(-1)) for states in (coarse, fine)]
    assert errors[1] < 0.6 * errors[0]
    assert len(halves) == 2 * len(accepted)


def test_what_a_velocity_raises_of_its_times():
    x = torch.ones(3, 2)

    class Mine(Exception):
        pass

    def of(error):
        def velocity(t, x):
            if t.ndim:
                raise error
            return -x

        return velocity

    for error in (AssertionError(), Mine(), NotImplementedError(), KeyError(), ZeroDivisionError(), AttributeError()):
        assert not accepts_sample_times(of(error), 0.0, 1.0, x)
        log_prob, expected = (
            ContinuousFlow(of(error), 2).log_prob(x),
            torch.full((3,), -math.log(2 * math.pi) - math.e**2 + 2),
        )
        torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-3)
    for error in (torch.OutOfMemoryError(), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            accepts_sample_times(of(error), 0.0, 1.0, x)


@torch.no_grad()
def test_a_sample_that_fails_is_an_error_and_one_outside_of_the_base_is_not():
    base = torch.distributions.Independent(
        torch.distributions.Uniform(torch.zeros(1), torch.ones(1), validate_args=False), 1, validate_args=False
    )
    flow = ContinuousFlow(lambda t, x: torch.sin(x), 1, base=base, t_base=1.0, t_data=0.0)
    result = flow.evaluate(torch.tensor([[0.1], [2.0]]))
    assert result.log_prob[1] == -math.inf
    assert (result.quadrature_error < 1e-3).all()
    with pytest.raises(FieldError, match="row 1 of 2"):
        flow.evaluate(torch.tensor([[0.1], [math.nan]]))
