"""Host waits and kernels of a training step, by place: python tests/benchmarks/host_waits.py (see its --help).

On a machine with a CUDA device, what happens there; else the CPU's own reads, without copies between devices.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STEPS = {
    "flow, exact": [],
    "flow, Hutchinson": ["estimator=hutchinson"],
    "score, denoising": ["task=score", "objective=denoising", "sde=vp"],
    "score, implicit exact": ["task=score", "objective=implicit", "sde=vp"],
}


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", help="one to import before torch, such as a simulated device")
    parser.add_argument("--step", type=int, default=6, help="which step is watched")
    arguments = parser.parse_args()
    if arguments.module:
        importlib.import_module(arguments.module)
    import torch
    from watched_step import watched_step

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, overrides in STEPS.items():
        with tempfile.TemporaryDirectory() as folder:
            watch = watched_step(device, arguments.step, f"output_dir={folder}", *overrides)
        solver = sum(count for place, count in watch.waits.items() if place.startswith("torchdiffeq"))
        print(f"\n{name}: {watch.waits.total()} waits, {solver} of them torchdiffeq's; {watch.kernels.total()} kernels")
        for place, count in watch.waits.most_common():
            print(f"  {count:4d} waits    {place}")
        for place, count in watch.kernels.most_common(12):
            print(f"  {count:4d} kernels  {place}")


if __name__ == "__main__":
    main()
