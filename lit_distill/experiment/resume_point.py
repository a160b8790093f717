"""The checkpoint from which an interrupted run goes on."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class ResumePoint(Checkpoint):
    """Keeps one checkpoint: of the end of the last epoch, or of a batch since.

    Lightning's ModelCheckpoint counts optimizer steps, not batches. Moreover, Lightning resumes from a checkpoint of an
    epoch's last batch without the validation and the hooks that follow it; so batches before which more than the next
    batch would be left out, and those whose gradients are being accumulated, are passed over.

    Args:
        path: The file.
        every_n_batches: Batches between checkpoints inside an epoch; the end of each epoch alone if None.
    """

    def __init__(self, path: Path, every_n_batches: int | None = None) -> None:
        self.path = path
        self.every_n_batches = every_n_batches
        self._since = 0
        self._stopped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets a run that was stopped early stay stopped."""
        if self._stopped:
            trainer.should_stop = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the last epoch, which was saved before Lightning had."""
        progress: Any = trainer.fit_loop.epoch_progress.current
        progress.completed = progress.processed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if it is time, or as soon after as can be."""
        self._since += 1
        if self.every_n_batches is None or self._since < self.every_n_batches:
            return
        done, total = batch_idx + 1, trainer.fit_loop.total_batch_idx + 1
        interval = trainer.val_check_batch or float("inf")
        validates = done % interval == 0 or total % interval == 0
        if not trainer.is_last_batch and not validates and done % trainer.accumulate_grad_batches == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, after all others have done what they do at the end of an epoch."""
        self._stopped = trainer.should_stop
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Returns whether the run was stopped early."""
        return {"stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self._stopped = state_dict["stopped"]

    def _save(self, trainer: Trainer) -> None:
        # First what is logged: the resumed run starts behind it and logs none of it again.
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.path)
        self._since = 0
