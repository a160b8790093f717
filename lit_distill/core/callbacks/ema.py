"""Exponential moving average of the student alone."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.strategies import reshard


class EMA(Callback):
    """Averages the product of distillation, and nothing else of the module.

    A teacher, a critic or a projector is never averaged, and none is copied. The averaged student is what is validated,
    tested and exported; the raw one goes on training. Under FSDP2 each process averages its own shards, which
    Lightning's callback cannot do.

    Args:
        decay: Weight of the old average, per step.
        update_every_n_steps: Steps between updates.
        update_starting_at_step: First step that is averaged; all if None.

    Attributes:
        average: The averaged weights by name; empty before training.
    """

    def __init__(
        self, decay: float = 0.999, update_every_n_steps: int = 1, update_starting_at_step: int | None = None
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise UsageError(f"EMA: decay is {decay}; it must be at least 0 and below 1")
        check_least("EMA", 1, update_every_n_steps=update_every_n_steps)
        self.decay = decay
        self.every, self.start = update_every_n_steps, update_starting_at_step or 0
        self.average: dict[str, Tensor] = {}
        self._updates = 0
        self._latest_step = 0

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average; the first student that is averaged is taken as it is."""
        if trainer.global_step <= self._latest_step:  # gradients are being accumulated
            return
        # With several optimizers a batch is several steps of Lightning's; here it is one.
        step = trainer.global_step - 1
        if isinstance(pl_module, Distiller) and not pl_module.automatic_optimization:
            step = pl_module.iteration
        if step < self.start or step % self.every:
            return
        weights = _averaged(pl_module)
        if self._updates:
            get_ema_multi_avg_fn(self.decay)(list(self.average.values()), list(weights.values()), self._updates)
        else:
            self.average = {name: value.clone() for name, value in weights.items()}
        self._updates += 1
        self._latest_step = trainer.global_step

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the averaged student in the module; here, as a run resumed behind its last batch trains no more."""
        weights = _averaged(pl_module)
        for name, value in self.average.items():
            weights[name].copy_(value)

    @torch.no_grad()
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps the averaged student in."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        weights = _averaged(pl_module)
        for name, value in self.average.items():
            raw = weights[name].clone()
            weights[name].copy_(value)
            value.copy_(raw)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps the raw student back."""
        self.on_validation_epoch_start(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the average beside the raw student."""
        average = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in self.average.items()}
        checkpoint["ema"] = {"average": average, "updates": self._updates, "latest_step": self._latest_step}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the average back; where nothing is trained, into the student itself."""
        if "ema" not in checkpoint:
            return
        kept = checkpoint["ema"]
        self._updates, self._latest_step = kept["updates"], kept["latest_step"]
        weights = _averaged(pl_module)
        self.average = {name: _placed(value, weights[name]) for name, value in kept["average"].items()}
        if trainer.state.fn != TrainerFn.FITTING:
            self.on_fit_end(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the average to the device of training."""
        self.average = {name: value.to(pl_module.device) for name, value in self.average.items()}


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


def _averaged(module: LightningModule) -> dict[str, Tensor]:
    """Returns what is averaged of the product: its parameters, each once, and buffers of real numbers that it keeps."""
    network = product_of(module)
    reshard(network)
    kept = network.state_dict().keys()
    buffers = {k: v for k, v in network.named_buffers() if k in kept and v.is_floating_point()}
    return {k: v.detach() for k, v in network.named_parameters()} | buffers


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """Returns a whole tensor sharded and placed as another one is."""
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
