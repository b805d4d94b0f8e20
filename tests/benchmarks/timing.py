"""Medians of functions that take turns, so that what slows the machine for a while slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def medians(functions: Mapping[str, Callable[[], object]], seconds: float = 20.0) -> dict[str, float]:
    """Median seconds of each function, by name, after a call to warm up.

    Args:
        functions: what to time; they take turns.
        seconds: to spend, at least; three rounds are the least.
    """
    cuda = torch.cuda.is_available()
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    while len(next(iter(times.values()))) < 3 or time.perf_counter() - started < seconds:
        for name, function in functions.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
