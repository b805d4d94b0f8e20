"""From a CSV file of one's own to a trained density, and to samples in the file's units.

    python examples/csv_to_samples.py --path measurements.csv --out samples.csv

Without --path it writes such a file first: iris flowers, of scikit-learn. The same by commands:

    divflow train data=table data.path=measurements.csv
    divflow sample ckpt_path=outputs/latest/checkpoints/best.ckpt num_samples=1000 out=samples.csv
"""

import argparse
import csv
from pathlib import Path

import lightning as L
import numpy as np
import torch
from sklearn.datasets import load_iris
from torch import nn

from divflow.data import Table
from divflow.flow import ContinuousFlow, FlowDensity
from divflow.networks import MLP
from divflow.tasks import FlowMatchingTask


def write(path: Path, names: list[str], rows: np.ndarray) -> None:
    """A CSV file with a header."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(names)
        table.writerows(rows.tolist())


def main(path: Path | None, out: Path, steps: int, num_samples: int) -> float:
    """Train, test and sample; returns the mean of -log p over the test rows, in nats, per unit of the columns."""
    L.seed_everything(0, verbose=False)
    if path is None:
        iris = load_iris()
        path = out.with_name("iris.csv")
        write(path, [name.removesuffix(" (cm)") for name in iris.feature_names], iris.data)
    data = Table(path, batch_size=64)
    network = MLP(data.event_shape, hidden=[64, 64], activation=nn.SiLU, zero_init=True)
    density = FlowDensity(ContinuousFlow(network, data.event_shape), data.transform)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    task = FlowMatchingTask(density, draws=4)
    trainer.fit(task, datamodule=data)
    nll = trainer.test(task, datamodule=data, verbose=False)[0]["test/nll"]
    with torch.no_grad():
        samples = density.sample(num_samples)
    write(out, data.columns, samples.numpy())
    print(f"test: {nll:.3f} nats; {num_samples} samples of {', '.join(data.columns)} in {out}")
    return nll


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, help="a CSV file of numbers, with a header or without")
    parser.add_argument("--out", type=Path, default=Path("samples.csv"), help="for the samples")
    parser.add_argument("--steps", type=int, default=1500, help="of the optimizer")
    parser.add_argument("--num-samples", type=int, default=1000)
    arguments = parser.parse_args()
    main(arguments.path, arguments.out, arguments.steps, arguments.num_samples)
