"""The student of the best validation, instead of that of the last epoch."""

import math
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_distill.core.callbacks.ema import EMA, product_of
from lit_distill.core.errors import UsageError


class BestWeights(Callback):
    """Keeps a copy of the student at its best validation, and leaves it in the module as a fit ends.

    So what is tested, exported and reported as `val/*` is that student. Training goes on undisturbed to its last epoch.
    Of equal validations the first one counts. A run without a validation part needs none of this.

    Args:
        monitor: Metric of validation that decides, such as `val/acc`.
        mode: Whether "max" or "min" is best.
    """

    def __init__(self, monitor: str, mode: Literal["max", "min"] = "max") -> None:
        self.monitor = monitor
        self.mode = mode
        self.metrics: dict[str, float] = {}
        self.weights: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses company that it cannot work with."""
        if stage == "fit" and pl_module.device_mesh is not None:
            raise UsageError("callback BestWeights copies whole networks; leave it out under --trainer.strategy fsdp2")
        if any(isinstance(callback, EMA) for callback in trainer.callbacks):  # type: ignore[attr-defined]  # Lightning sets it late
            raise UsageError("callbacks: EMA and BestWeights both decide which student is left; take one of them")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the student if it was never better."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if self.monitor not in values:
            raise UsageError(
                f"callback BestWeights: monitor is '{self.monitor}', which validation does not log; there are "
                f"{', '.join(sorted(values))}"
            )
        sign = 1 if self.mode == "max" else -1
        value, best = (sign * found.get(self.monitor, -sign * math.inf) for found in (values, self.metrics))
        if value > best:
            self.metrics = {**values, "val/epoch": float(trainer.current_epoch)}
            self.weights = {name: value.clone() for name, value in product_of(pl_module).state_dict().items()}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the best student in the module."""
        if self.weights:
            product_of(pl_module).load_state_dict(self.weights)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the best student beside the one in training."""
        checkpoint["best"] = {"metrics": self.metrics, "weights": self.weights}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes it back; where nothing is trained, into the student itself."""
        if "best" not in checkpoint:
            return
        self.metrics = checkpoint["best"]["metrics"]
        self.weights = {name: value.to(pl_module.device) for name, value in checkpoint["best"]["weights"].items()}
        if trainer.state.fn != TrainerFn.FITTING and self.weights:
            product_of(pl_module).load_state_dict(self.weights)
