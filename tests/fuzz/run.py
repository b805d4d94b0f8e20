"""Generated calls from the command line: python tests/fuzz/run.py 10000 [first seed]."""

import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fuzz.calls import Fault, episode  # noqa: E402 - found by the path above


def main(calls: int, first: int = 0) -> int:
    """Run at least so many calls; print every fault, and return their number."""
    warnings.simplefilter("ignore")
    done = faults = 0
    seed = first
    while done < calls:
        try:
            done += episode(seed)
        except Fault as fault:
            done, faults = done + 1, faults + 1
            print(f"seed {seed}: {fault}", flush=True)
        seed += 1
    print(f"{done} calls, seeds {first} to {seed - 1}, {faults} faults")
    return faults


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
