"""Expert networks, whose training is kept epoch by epoch: what trajectory matching imitates."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.loading import derived_seed
from lit_distill.core.networks import check_redrawable, redraw
from lit_distill.core.reference import Reference
from lit_distill.dataset.data.subset import in_memory
from lit_distill.dataset.experts import FOLDER, ExpertBuffer, data_fingerprint
from lit_distill.dataset.siamese import SiameseAugment
from lit_distill.dataset.unrolled import check_parameters_only, flat_parameters
from lit_distill.image.data import ImageBatch
from lit_distill.image.methods.supervised import Supervised


class ExpertTrajectories(Supervised):
    """Trains one network after another on labels, and keeps their parameters after every epoch, and before the first.

    An expert has `epochs` epochs of the run, so that `trainer.max_epochs` says how many experts there are. Each starts
    with weights of its own, and with a new optimizer and schedule, and sees the images in an order of its own. A
    finished expert is written to `experts/` in the run's folder; the unfinished one is part of the checkpoint, so that
    an interrupted run goes on inside it. What is validated, tested and exported is the expert of the moment.

    The experts of the literature are trained by plain SGD: no momentum, no weight decay. Those of FTD, which look for
    flat minima by SAM and serve DATM's published results, are not offered.

    Args:
        student: The network; its weights are drawn anew for each expert.
        epochs: Epochs of each expert.
        operations: How training images are augmented, see `SiameseAugment`; each image has numbers of its own.
        kwargs: See `Supervised`.
    """

    reference = Reference(
        title="Dataset Distillation by Matching Training Trajectories",
        authors="Cazenavette, Wang, Torralba, Efros, Zhu",
        year=2022,
        arxiv="2203.11932",
    )

    def __init__(self, student: nn.Module, epochs: int = 50, operations: str = "none", **kwargs: Any) -> None:
        super().__init__(student, **kwargs)
        check_least("model", 1, epochs=epochs)
        self.epochs = epochs
        self.augmentation = SiameseAugment(operations)
        self._snapshots: list[Tensor] = []

    def build(self) -> None:
        """Checks the network."""
        super().build()
        if self.device_mesh is not None:
            raise UsageError("trainer.strategy: fsdp2 would keep parts of an expert; take ddp or one device")
        check_redrawable(self.student)
        check_parameters_only(self.student)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Labels, on augmented images."""
        images = self.augmentation(batch.images, self.augmentation.draw(len(batch.images)))
        return super().training_step(batch._replace(images=images), batch_idx)

    def on_train_epoch_start(self) -> None:
        """Begins the next expert when one is finished."""
        number, epoch = divmod(self.current_epoch, self.epochs)
        if epoch > 0:
            return
        torch.manual_seed(derived_seed("expert", self._data().run_seed, number))
        redraw(self.student)
        self.trainer.strategy.setup_optimizers(self.trainer)
        self._snapshots = [flat_parameters(self.student)]

    def on_train_epoch_end(self) -> None:
        """Keeps the parameters; writes the expert if that was its last epoch."""
        super().on_train_epoch_end()
        self._snapshots.append(flat_parameters(self.student))
        number, epoch = divmod(self.current_epoch + 1, self.epochs)
        folder = self.trainer.log_dir  # asked by all processes: one tells the others
        if epoch > 0 or not folder or not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it late
            return
        data = data_fingerprint(in_memory(self._data()))
        lr = float(self.trainer.optimizers[0].defaults["lr"])
        buffer = ExpertBuffer.create(Path(folder) / FOLDER, self.student, data, epochs=self.epochs, lr=lr)
        buffer.write(number - 1, torch.stack(self._snapshots))

    def on_fit_end(self) -> None:
        """Warns where no expert was finished."""
        if self.current_epoch < self.epochs:
            rank_zero_warn(
                f"model.epochs is {self.epochs}, and the run ended after {self.current_epoch}; no expert is finished, "
                "raise trainer.max_epochs"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is kept of the unfinished expert."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["snapshots"] = list(self._snapshots)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it back."""
        super().on_load_checkpoint(checkpoint)
        self._snapshots = checkpoint["snapshots"]
