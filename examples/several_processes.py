"""Several processes, here two on the CPU: each trains on its share of every epoch, and the test divides the rows.

    python examples/several_processes.py --processes 2

By the command: divflow train device=multi_process_cpu device.devices=2, or device=multi_gpu. Test averages are those of one
process, since no row is repeated; training differs, since a step sees as many batches as there are processes.
"""

import argparse

import lightning as L

from divflow.callbacks import Processes
from divflow.data import Toy
from divflow.data.toy import two_moons
from divflow.flow import ContinuousFlow
from divflow.likelihood import Quadrature
from divflow.networks import MLP
from divflow.tasks import FlowMatchingTask


def main(processes: int, steps: int) -> None:
    """Train and test; the first process prints."""
    L.seed_everything(0, verbose=False, workers=True)
    data = Toy(two_moons(), num_train=20_000, num_test=1_001, batch_size=128, eval_batch_size=500)
    flow = ContinuousFlow(MLP(2, hidden=[64, 64]), 2, likelihood=Quadrature(15))
    task = FlowMatchingTask(flow)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        callbacks=[Processes()],  # ends all when one of them is gone, by a message
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(task, datamodule=data)
    results = trainer.test(task, datamodule=data, verbose=False)[0]
    if trainer.is_global_zero:
        nll, error = results["test/nll"], results["test/nll_standard_error"]
        print(f"{processes} processes, {steps} steps: {nll:.3f} +- {error:.3f} nats over {len(data.test)} rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000, help="of the optimizer")
    arguments = parser.parse_args()
    main(arguments.processes, arguments.steps)
