"""Generated calls from the command line: python tests/fuzz/generate.py 10000 [first seed]."""

import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fuzz.episodes import episode  # noqa: E402 - found by the path above
from fuzz.outcomes import Fault, Outcome  # noqa: E402


def main(calls: int, first: int = 0) -> int:
    """Run at least so many calls; print every fault and the counts, and return the number of faults."""
    warnings.simplefilter("ignore")
    counts, seed = Counter(), first
    while counts.total() < calls:
        try:
            counts.update(episode(seed))
        except Fault as fault:
            counts[fault.outcome] += 1
            print(f"seed {seed}: {fault.outcome.value}: {fault}", flush=True)
        seed += 1
    numbers = ", ".join(f"{outcome.value} {counts[outcome]}" for outcome in Outcome)
    print(f"{counts.total()} calls, seeds {first} to {seed - 1}: {numbers}")
    return sum(counts[outcome] for outcome in (Outcome.SILENT, Outcome.OTHER, Outcome.HANG))


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
