"""One step of a run of the real configs, watched."""

import lightning as L
from hydra.utils import instantiate
from run import SMALL_TOY, config
from waits import Watch

from divflow.runs.experiment import _build_callbacks, _build_task, _build_trainer


class _WatchStep(L.Callback):
    def __init__(self, watch: Watch, step: int) -> None:
        self.watch, self.step, self.inside = watch, step, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            self.watch.__enter__()
            self.inside = True
        elif self.inside:
            self.watch.__exit__(None, None, None)
            self.inside = False


def watched_step(device: str, step: int, *overrides: str) -> Watch:
    """What one step of a run asks of a device, from the batch's arrival to that of the next one."""
    settings = config(
        *SMALL_TOY,
        f"device={'gpu' if device == 'cuda' else 'cpu'}",
        f"trainer.max_steps={step + 2}",
        f"trainer.val_check_interval={step + 2}",
        f"trainer.log_every_n_steps={10 * step}",
        "callbacks.figures=null",
        "network.hidden=[16]",
        "seed=0",
        *overrides,
    )
    data = instantiate(settings.data, _convert_="all")
    trainer = _build_trainer(settings, _build_callbacks(settings))
    watch = Watch(device)
    trainer.callbacks.insert(0, _WatchStep(watch, step))
    L.seed_everything(0, verbose=False)
    trainer.limit_val_batches = 0
    trainer.fit(_build_task(settings, data), datamodule=data)
    return watch
