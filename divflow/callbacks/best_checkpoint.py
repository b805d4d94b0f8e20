"""The checkpoint of the best validation."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from divflow.callbacks.atomic_files import save_whole

__all__ = ["BestCheckpoint"]


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint of the best validation: `ModelCheckpoint`, made safe to interrupt and to resume in another folder.

    Each file is replaced completely or not at all. Lightning's callback forgets its best value when the folder changes, so that any
    later validation would be the best; this one keeps it. Training ends with a validation wherever its last step falls.

    Args:
        dirpath: folder of the checkpoints.
        filename: name of the best one, without `.ckpt`.
        save_top_k: how many are kept, -1 for all. If it is not one, names contain the step as well.
        settings: other arguments of `ModelCheckpoint`.

    Raises:
        WriteError: in training, the file can't be written.
    """

    def __init__(self, dirpath: str | Path, filename: str = "best", save_top_k: int = 1, **settings: Any) -> None:
        self._best = None if save_top_k in (0, 1) else Path(dirpath) / f"{filename}.ckpt"
        name = filename if self._best is None else f"{filename}-{{step}}"
        super().__init__(dirpath, name, save_top_k=save_top_k, auto_insert_metric_name=False, **settings)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Let a validation follow the last step, as Lightning does when training is to stop."""
        super().on_train_batch_end(trainer, *args)
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.global_step >= trainer.max_steps > 0 or (last_epoch and trainer.is_last_batch):
            trainer.should_stop = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the best value so far, in this folder."""

        def here(path: str) -> str:
            if not path:
                return path
            assert self.dirpath is not None  # `setup` has set it
            return str(Path(self.dirpath) / Path(path).name)

        paths = {name: here(state_dict.get(name, "")) for name in ("best_model_path", "kth_best_model_path")}
        models = {here(path): value for path, value in state_dict.get("best_k_models", {}).items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": models, "dirpath": self.dirpath})
        self.current_score = state_dict["current_score"]

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        with save_whole(trainer, filepath) as part:
            super()._save_checkpoint(trainer, str(part))
        self._last_checkpoint_saved = filepath

    def _update_best_and_save(self, current: Tensor, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._update_best_and_save(current, trainer, monitor_candidates)
        if self._best is not None and trainer.is_global_zero and self.best_model_path == self._last_checkpoint_saved:
            part = self._best.with_name(f"{self._best.name}.part")
            shutil.copy(self.best_model_path, part)
            os.replace(part, self._best)
