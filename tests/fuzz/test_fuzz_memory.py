"""Nothing is kept of fields that are gone: memory after many steps with fields made anew is what it was."""

import gc
import tracemalloc

import pytest
import torch
from torch import nn

from divflow.divergence import Exact, Hutchinson, divergence
from divflow.flow import ContinuousFlow
from divflow.solver import Solver

_DIVERGENCES = [Exact(), Exact("reverse"), Hutchinson(2)]


def _step(i: int) -> None:
    """One training step of a network that nobody has seen before."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(2, 3)
    if i % 10 == 0:
        flow = ContinuousFlow(lambda t, x: net(x), 3, solver=Solver("rk4", options={"step_size": 0.5}))
        flow.log_prob(x).sum().backward()
    elif i % 3 == 0:  # local, but not layered, so that it is coloured
        kernel = torch.randn(1, 1, 3, requires_grad=True)
        field = lambda t, x: nn.functional.conv1d(x[:, None], kernel, padding=1)[:, 0].sort(1).values  # noqa: E731
        divergence(field, 0.0, x).sum().backward()
    else:
        divergence(lambda t, x: net(x), 0.0, x, _DIVERGENCES[i % 3]).sum().backward()


def _after(steps: int) -> tuple[int, int]:
    """Bytes that Python has allocated, and tensors that are alive."""
    for i in range(steps):
        _step(i)
    gc.collect()
    alive = sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())
    return tracemalloc.get_traced_memory()[0], alive


@pytest.mark.fuzz
@pytest.mark.parametrize("steps", [100, 300, 5_000])
def test_steps_with_fields_made_anew_leave_nothing_behind(steps):
    _after(300)  # what is kept of structures, not of fields, is bounded, and fills up
    tracemalloc.start()
    try:
        memory, alive = _after(50)
        memory_later, alive_later = _after(steps)
    finally:
        tracemalloc.stop()
    assert alive_later <= alive + 10
    assert memory_later - memory < 300_000 + 5 * steps
