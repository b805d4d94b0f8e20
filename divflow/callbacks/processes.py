"""Agreement among the processes of a run: who is alive, when to stop, and how many wrote a checkpoint."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import distributed

from divflow.callbacks.signs_of_life import Watch
from divflow.callbacks.trainer_attributes import declared

__all__ = ["Processes"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Processes(L.Callback):
    """End all processes of a run when one is gone, stop them after the same step, and report when their number changes.

    - If a process dies or fails, the others end with a message that names it and the checkpoint to go on with: within seconds on the
      same machine, within `limit` from another one.
    - Ctrl-C, SIGTERM or SIGUSR1 (a scheduler's warning) to any process stops all of them after the current step, with
      `last.ckpt` saved. A second signal stops them at once.
    - In a single process it only records that there is one.

    Args:
        interval: seconds between signs of life.
        limit: seconds without a sign of life after which a process counts as gone. It must exceed the longest call that holds
            Python's lock.

    Raises:
        ProcessError: in training, another process is gone.
    """

    def __init__(self, interval: float = 1.0, limit: float = 30.0) -> None:
        self.interval, self.limit = interval, limit
        self._watch: Watch | None = None
        self._group: distributed.ProcessGroup | None = None
        self._received = self.stop = 0
        self.stopping = False
        self._world_size, self._was = 1, 1

    def state_dict(self) -> dict[str, Any]:
        """The number of processes that wrote the checkpoint."""
        return {"world_size": self._world_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the number of processes that wrote the checkpoint."""
        self._was = state_dict["world_size"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin to watch, once all processes are there."""
        self._world_size = self._was = trainer.world_size
        if trainer.world_size == 1 or self._watch is not None:
            return
        launcher: Any = trainer.strategy.launcher  # some of its classes have processes
        kill = getattr(launcher, "kill", lambda number: None)
        self._watch = watch = Watch(
            trainer.global_rank,
            trainer.world_size,
            trainer.strategy.broadcast,
            lambda: _remedy(trainer),
            lambda: kill(signal.SIGKILL),
            self.interval,
            self.limit,
        )
        # On the CPU, so that nothing waits for a device.
        self._group = distributed.new_group(backend="gloo")
        trainer.strategy.barrier("divflow.watch")
        self._watch.start()
        if processes := getattr(launcher, "procs", None):
            # Lightning's own observer, which holds this list, kills this process without a message when a child has died.
            launcher.procs = list(processes)
            processes.clear()

        def kill_children(number: int) -> None:
            # After Ctrl-C Lightning kills the children, which are already ending by themselves: that is no failure of theirs.
            watch.close()
            kill(number)

        if launcher is not None:
            launcher.kill = kill_children

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report what another number of processes changes; from here on, answer signals in step."""
        if self._was != trainer.world_size:
            rank_zero_warn(_changes(trainer, self._was))
        # Lightning's handlers start a collective wherever the process is, which another process may not be at; and its
        # answer to Ctrl-C comes in the middle of a step.
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop all processes if a signal has reached one of them."""
        if self._watch is not None:
            self._watch.step = trainer.global_step
        received = self._agreed()
        # Gradients that are being accumulated would be lost.
        if received and not trainer.fit_loop.epoch_loop._should_accumulate():
            self.stop = received

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop before the next step, when the last one has been logged and, if that was due, validated."""
        self._stop_if_requested()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before the test if a signal came during the last validation; `last.ckpt` is saved."""
        self.stop = self.stop or self._agreed()
        self._stop_if_requested()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Report the error to the other processes, or find that it follows from one of theirs."""
        if self._watch is None or self.stopping:
            return
        self._watch.failed(exception)

    def _agreed(self) -> int:
        """The signal that has reached one of the processes; 0 for none."""
        if self._watch is None:
            return self._received
        numbers = torch.tensor(self._received, device="cpu")
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self._group)
        return int(numbers)

    def _stop_if_requested(self) -> None:
        if self.stop:
            self.stopping = True
            raise KeyboardInterrupt if self.stop == signal.SIGINT else SIGTERMException

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            raise KeyboardInterrupt if number == signal.SIGINT else SIGTERMException
        self._received = number


def _remedy(trainer: L.Trainer) -> str:
    # Attributes of divflow's callback, and of Lightning's own.
    names = ("last_good", "last_model_path")
    paths = [getattr(callback, name, "") for name in names for callback in trainer.checkpoint_callbacks]
    last = next((path for path in paths if path and Path(path).is_file()), None)
    return f"Go on with ckpt_path={last}" if last else "There is no last.ckpt yet, so start again"


def _changes(trainer: L.Trainer, was: int) -> str:
    now, rows = trainer.world_size, getattr(declared(trainer).datamodule, "batch_size", None)
    accumulated = trainer.accumulate_grad_batches
    batch = f"the global batch from {was * rows * accumulated} to {now * rows * accumulated} rows " if rows else ""
    keep = f"(data.batch_size={was * rows // now} keeps it)" if rows and was * rows % now == 0 else ""
    return (
        f"the checkpoint was written by {was} process{'es' if was > 1 else ''}, but {now} resume{'s' if now == 1 else ''} from it. This changes "
        f"{batch}{keep}{', ' if rows else ''}the order of the rows and the noise of each process: "
        f"the result will differ from that of an uninterrupted run. To avoid this, keep device.devices * device.num_nodes = {was}"
    )
