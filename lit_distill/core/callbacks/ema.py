"""Exponential moving average of the student alone."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.swa_utils import AveragedModel

from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError


class EMA(EMAWeightAveraging):
    """Lightning's EMA callback, over the product of distillation instead of the whole module.

    A teacher, a critic or a projector is never averaged, and the teacher is not copied. The averaged student is what is
    validated, tested and exported; the raw one goes on training.

    Args:
        decay: Weight of the old average, per step.
        update_every_n_steps: Steps between updates.
        update_starting_at_step: First step that is averaged; all if None.
    """

    def __init__(
        self, decay: float = 0.999, update_every_n_steps: int = 1, update_starting_at_step: int | None = None
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise UsageError(f"EMA: decay is {decay}; it must be at least 0 and below 1")
        super().__init__(
            decay=decay, update_every_n_steps=update_every_n_steps, update_starting_at_step=update_starting_at_step
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copies the student at the start of a fit."""
        if stage != "fit":
            return
        if pl_module.device_mesh is not None:
            raise UsageError("callback EMA averages whole networks; leave it out under --trainer.strategy fsdp2")
        pl_module.configure_model()
        self._average_model = AveragedModel(product_of(pl_module), use_buffers=self._use_buffers, **self._kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the average to the device of training."""
        if self._average_model is not None:
            self._average_model.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average."""
        assert self._average_model is not None
        if trainer.global_step <= self._latest_update_step:  # gradients are being accumulated
            return
        # With several optimizers a batch is several steps of Lightning's; here it is one.
        step = trainer.global_step - 1
        if isinstance(pl_module, Distiller) and not pl_module.automatic_optimization:
            step = pl_module.iteration
        if self.should_update(step_idx=step):
            self._average_model.update_parameters(product_of(pl_module))
            self._latest_update_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Updates the average where it counts in epochs."""
        super().on_train_epoch_end(trainer, product_of(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves it to `on_fit_end`: a run resumed behind its last batch has no end of training any more."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the averaged student in the module."""
        super().on_train_end(trainer, product_of(pl_module))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps the averaged student in."""
        super().on_validation_epoch_start(trainer, product_of(pl_module))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps the raw student back."""
        super().on_validation_epoch_end(trainer, product_of(pl_module))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the average beside the raw student."""
        if self._average_model is not None:
            checkpoint["ema"] = self._average_model.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the average back; where nothing is trained, into the student itself."""
        if "ema" not in checkpoint:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            assert self._average_model is not None
            self._average_model.load_state_dict(checkpoint["ema"])
        else:
            prefix = "module."
            average = {k.removeprefix(prefix): v for k, v in checkpoint["ema"].items() if k.startswith(prefix)}
            product_of(pl_module).load_state_dict(average)


def product_of(module: LightningModule) -> Any:
    """Returns the network that a method is there to make, which callbacks average or keep.

    Raises:
        UsageError: It has none.
    """
    name = module.product if isinstance(module, Distiller) else "student"
    network = getattr(module, name, None)
    if not isinstance(network, torch.nn.Module):
        raise UsageError(f"callbacks: {type(module).__name__} has no network '{name}' to average or keep")
    return network
