"""The checkpoint of the best validation."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from divflow.callbacks.whole import save_whole

__all__ = ["BestCheckpoint"]


class BestCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` that is replaced whole or not at all, and that a run resumed in another folder takes along.

    Lightning's forgets its best value when the folder changes, so that any later validation would be the best.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best value so far, in this folder."""

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
