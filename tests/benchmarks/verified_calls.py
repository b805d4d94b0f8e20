"""What verification costs: a first call, a later one and training steps, beside the same without it, in one run.

    python tests/benchmarks/verified_calls.py

A first call is of a fresh field; a later one is the hundredth, which is not verified. In a field that is suspect the first
call compares with differences on a copy.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from divflow.divergence import Exact, Hutchinson, divergence
from divflow.flow import ContinuousFlow
from divflow.networks import MLP, UNet
from divflow.verification.schedule import verifying

torch.set_num_threads(1)


class Suspect(nn.Module):
    """A network whose state is shifted by a detached maximum, which cancels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = MLP(size, (128, 128))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(t, torch.softmax(x - x.amax(1, keepdim=True).detach(), dim=1))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP, D = 2, 64 x 64, 512 rows": (lambda: MLP(2, (64, 64)), (512, 2)),
    "MLP, D = 43, 256 x 256, 256 rows": (lambda: MLP(43, (256, 256)), (256, 43)),
    "suspect, D = 43, 128 x 128, 256 rows": (lambda: Suspect(43), (256, 43)),
    "UNet, 1 x 8 x 8, 4 rows": (lambda: UNet((1, 8, 8)), (4, 1, 8, 8)),
}


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _row(make: Callable[[], nn.Module], shape: tuple[int, ...], estimator: object, repeats: int = 7) -> list[float]:
    """Medians: first and later call without and with verification, in turns."""
    times: dict[tuple[bool, str], list[float]] = {}
    x = torch.randn(shape)
    for _ in range(repeats):
        for verified in (False, True):
            with contextlib.nullcontext() if verified else verifying():
                field = make()
                times.setdefault((verified, "first"), []).append(
                    _milliseconds(functools.partial(divergence, field, 0.5, x, estimator))
                )
                for _ in range(4):
                    divergence(field, 0.5, x, estimator)
                later = [_milliseconds(functools.partial(divergence, field, 0.5, x, estimator)) for _ in range(2)]
                times.setdefault((verified, "later"), []).append(min(later))
    return [
        statistics.median(times[key]) for key in ((False, "first"), (True, "first"), (False, "later"), (True, "later"))
    ]


def _step(flow: ContinuousFlow, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        flow.zero_grad()
        (-flow.log_prob(x).mean()).backward()

    return step


def main() -> None:
    print("milliseconds | first call: without, with | later call: without, with")
    for name, (make, shape) in CASES.items():
        for estimator in (Exact(), Hutchinson()):
            first, verified, later, later_verified = _row(make, shape, estimator)
            kind = type(estimator).__name__
            print(f"{name}, {kind} | {first:.2f} | {verified:.2f} | {later:.3f} | {later_verified:.3f}")
    print("training step, median of steps 5 to 30 (verified at 8 and 16): without, with")
    for size, hidden, rows in ((2, 64, 512), (16, 128, 256), (43, 256, 256)):
        x, steps = torch.randn(rows, size), {False: [], True: []}
        flows = {verified: _step(ContinuousFlow(MLP(size, (hidden, hidden)), size), x) for verified in steps}
        for _ in range(30):
            for verified, step in flows.items():
                with contextlib.nullcontext() if verified else verifying():
                    steps[verified].append(_milliseconds(step))
        print(f"D = {size} | {statistics.median(steps[False][4:]):.1f} | {statistics.median(steps[True][4:]):.1f}")


if __name__ == "__main__":
    main()
