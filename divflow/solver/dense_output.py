"""The states between the steps of a solve by Dormand and Prince's method, at times that are chosen afterwards."""

import functools

import torch
from torch import Tensor

__all__ = ["Steps"]

# Stages that a step adds to the last stage of the previous one.
_STAGES = 6
# The solution, y1 = y0 + h sum_i c_i k_i (Dormand & Prince 1980), and the state at the middle of a step (Shampine 1986).
_END = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
_MIDDLE = (
    6025192743 / 30085553152 / 2, 0.0, 51252292925 / 65400821598 / 2, -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2, -1776094331 / 19743644256 / 2, 11237099 / 235043384 / 2,
)  # fmt: skip


def _powers() -> tuple[tuple[float, ...], ...]:
    """The quartic through y0, y1, the middle and both slopes, per h: the weight of each k_i in the powers 1 to 4 of theta."""
    first, last = (1.0, *[0.0] * 6), (*[0.0] * 6, 1.0)
    stages = list(zip(first, last, _END, _MIDDLE, strict=True))
    return (
        first,
        tuple(f1 - 4 * f0 - 5 * end + 16 * middle for f0, f1, end, middle in stages),
        tuple(5 * f0 - 3 * f1 + 14 * end - 32 * middle for f0, f1, end, middle in stages),
        tuple(2 * (f1 - f0) - 8 * end + 16 * middle for f0, f1, end, middle in stages),
    )


# Copied to a device once, because the host waits for the copy.
@functools.lru_cache(maxsize=16)
def _weights(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_powers(), dtype=dtype, device=device)


class Steps:
    """The accepted steps of one solve of a single tensor by dopri5, as torchdiffeq takes them, with their graph.

    The states at other times are torchdiffeq's own interpolation, a quartic as accurate as the steps. Here it is evaluated
    at all times at once, after the solve.

    Args:
        start: the first time.
        end: the last one.
        most: steps to hold. More set `overflowed` and drop all: without a graph these steps would be most of what a long
            solve keeps in memory.
    """

    def __init__(self, start: Tensor, end: Tensor, most: int | None = None) -> None:
        self._start, self._end, self._most = start.detach(), end.detach(), most
        self._evaluated: list[Tensor] = []
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []
        self._stages: list[Tensor] = []
        self._dense: tuple[Tensor, Tensor, Tensor, list[Tensor]] | None = None
        self.overflowed = False

    def evaluated(self, derivative: Tensor) -> None:
        """Note an evaluation: the first one of the solve, or a stage of a step."""
        if not self.overflowed:
            self._evaluated.append(derivative)

    def accept(self, time: Tensor, state: Tensor, step: Tensor) -> None:
        """Keep the step of the latest stages; the last one is the first of the next step."""
        if self._most is not None and len(self._steps) == self._most:
            self.overflowed = True
            self._steps, self._stages, self._evaluated = [], [], []
        if self.overflowed:
            return
        self._steps.append((time, state, step))
        self._stages.extend(self._evaluated)
        self._evaluated = self._evaluated[-1:]

    def reject(self, time: Tensor, state: Tensor, step: Tensor) -> None:
        """Forget the stages of a step that is taken again."""
        self._evaluated = self._evaluated[:-_STAGES]

    def states(self, times: Tensor) -> Tensor:
        """Return the states at times between the first and the last, in any order, `(len(times), *state)`."""
        starts, lengths, initial, powers = self._coefficients()
        sign = (self._end - self._start).sign().to(starts.dtype)
        at = times.detach().to(starts.dtype)
        index = (torch.searchsorted(sign * starts, sign * at, right=True) - 1).clamp(0, len(starts) - 1)
        theta = ((at - starts[index]) / lengths[index]).to(initial.dtype).view(-1, *[1] * (initial.ndim - 1))
        polynomial = powers[3][index]
        for power in powers[2::-1]:
            polynomial = polynomial * theta + power[index]
        return initial[index] + theta * polynomial

    def _coefficients(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Times and signed lengths of the steps, their initial states, and the powers of theta."""
        if self._dense is None:
            times, states, lengths = (torch.stack(column) for column in zip(*self._steps, strict=True))
            lengths = lengths * (self._end - self._start).sign().to(lengths.dtype)
            stages = torch.stack(self._stages).view(len(states), _STAGES + 1, *states.shape[1:])
            scale = lengths.to(states.dtype).view(-1, *[1] * (states.ndim - 1))
            weights = _weights(stages.dtype, stages.device).view(4, 1, _STAGES + 1, *[1] * (states.ndim - 1))
            # No matrix products, which may be less precise than the states.
            powers = [scale * (stages * weight).sum(dim=1) for weight in weights]
            self._dense = times.detach(), lengths.detach(), states, powers
        return self._dense
