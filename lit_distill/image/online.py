"""The base of online distillation: all networks start untrained, and each learns from labels and from the others."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.metrics import CalibrationError, TemperatureScaling, classification_metrics
from lit_distill.core.schedules import Schedule, value_at
from lit_distill.core.taps import probe
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import ImageDistiller, check_classes, count_classes


class OnlineDistiller(ImageDistiller):
    r"""Trains all networks together, each on its own loss and by its own optimizer.

    .. math:: L_k = \mathrm{CE}(y, z_k) + w \, D_k(z_k, \mathrm{sg}\,z_{l \ne k})

    The student is what is kept as the product. Every network is in the checkpoint, is validated and tested. The terms
    of the student are logged as `train/ce` and `train/divergence`, those of network `teacher` as `train/teacher_ce` and
    so on; `train/loss` is their sum over all networks.

    A subclass says which networks there are besides the student (`networks`) and what `divergence` is.

    Args:
        student: The classifier to keep; images (B, C, H, W) to logits (B, K).
        temperature: T of both sides of the divergences.
        divergence_weight: The w above. A schedule that rises from 0 is a warm-up.
        sequential: Update the networks in turn, each against what those before it say after their update. Otherwise all
            losses come from one forward.
        clip_norm: Largest gradient norm of a network; None for no clipping.
        kwargs: See `Distiller`.
    """

    frozen = ()

    def __init__(
        self,
        student: nn.Module,
        temperature: float = 1.0,
        divergence_weight: float | Schedule = 1.0,
        sequential: bool = False,
        clip_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        # Spelt out, so that they are no options of an online method.
        super().__init__(student, teacher=None, terms=(), label_weight=1.0, teacher_cache=None, **kwargs)
        if temperature <= 0:
            raise UsageError(f"model.temperature is {temperature}; it must be above 0 (usual: 1 to 4)")
        if clip_norm is not None and clip_norm <= 0:
            raise UsageError(f"model.clip_norm is {clip_norm}; it must be above 0, or null for no clipping")
        self.automatic_optimization = False
        self.temperature = temperature
        self.divergence_weight = divergence_weight
        self.sequential = sequential
        self.clip_norm = clip_norm

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All networks by name, the student first: the order of the optimizers and of sequential updates."""
        raise AssertionError(f"{type(self).__name__} is a base class; a method defines networks")

    def divergence(self, name: str, logits: Mapping[str, Float[Tensor, "b k"]]) -> Float[Tensor, ""] | None:
        """Returns the unweighted divergence of one network from the others, which are constants; None for none.

        Args:
            name: The network that learns.
            logits: What each network says of the batch.
        """
        raise AssertionError(f"{type(self).__name__} is a base class; a method defines divergence")

    # ---- construction ----------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Probes all networks on the data's sample shape, checks that they fit, and builds the metrics of each."""
        data = self._data()
        for name, network in self.networks.items():
            found = count_classes(probe(network, data.sample_shape)[0], network, name)
            check_classes(name, found, data.num_classes)
        self.num_classes = data.num_classes
        self.val_metrics = classification_metrics(self.num_classes, prefix="val/")
        self.test_metrics = classification_metrics(self.num_classes, prefix="test/")
        others = list(self.networks)[1:]
        self.other_val_metrics = nn.ModuleDict(
            {name: classification_metrics(self.num_classes, prefix=f"val/{name}_") for name in others}
        )
        self.other_test_metrics = nn.ModuleDict(
            {name: classification_metrics(self.num_classes, prefix=f"test/{name}_") for name in others}
        )

    def configure_optimizers(self) -> Any:
        """One optimizer, with its schedule, for each network."""
        return tuple(
            self.optimizer_with_schedule(
                [parameter for parameter in network.parameters() if parameter.requires_grad], self.optimizer
            )
            for network in self.networks.values()
        )

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:  # type: ignore[override]  # steps itself
        """One step of every network."""
        weight = value_at(self.divergence_weight, self.iteration)
        logits = {name: network(batch.images) for name, network in self.networks.items()}
        terms: dict[str, Tensor] = {}
        for position, (name, network) in enumerate(self.networks.items()):
            loss = ce = F.cross_entropy(logits[name].float(), batch.labels)
            prefix = "" if name == "student" else f"{name}_"
            terms[f"{prefix}ce"] = ce.detach()
            divergence = self.divergence(name, logits) if weight else None
            if divergence is not None:
                loss = ce + weight * divergence
                terms[f"{prefix}divergence"] = weight * divergence.detach()
            self.optimize(loss, position, clip_norm=self.clip_norm)
            if self.sequential and position < len(logits) - 1:
                with torch.no_grad():
                    logits[name] = network(batch.images)
        self.combine(terms)
        self.terms = {}  # their graphs are gone, and no network was trained before that could be checked

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Accuracy, calibration and likelihood of every network on validation data."""
        for name, metrics in self._metrics("val").items():
            metrics.update(self.networks[name](batch.images).float(), batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/*` of the student, `val/<name>_*` of the others."""
        for metrics in self._metrics("val").values():
            self._log_metrics(metrics)

    def on_test_start(self) -> None:
        """Fits one temperature to each network on validation data, if there are any: `ece_recalibrated`."""
        loader = self._data().val_dataloader()
        if not len(loader):
            return
        scalings = {name: TemperatureScaling().to(self.device) for name in self.networks}
        for batch in loader:
            batch = self.trainer.strategy.batch_to_device(batch)
            for name, scaling in scalings.items():
                scaling.update(self.networks[name](batch.images).float(), batch.labels)
        for name, metrics in self._metrics("test").items():
            recalibrated = CalibrationError(self.num_classes, temperature=float(scalings[name].compute()))
            metrics.add_metrics({"ece_recalibrated": recalibrated.to(self.device)})

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """The same on test data, and how often the others decide as the student does."""
        logits = {name: network(batch.images).float() for name, network in self.networks.items()}
        for name, metrics in self._metrics("test").items():
            metrics.update(logits[name], batch.labels)
        student, *others = (values.argmax(1) for values in logits.values())
        agreement = (torch.stack(others) == student).float().mean()
        self.log("test/agreement", agreement, batch_size=len(batch.labels), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Logs `test/*` of the student, `test/<name>_*` of the others; keeps the student's reliability bins."""
        super().on_test_epoch_end()
        for metrics in self.other_test_metrics.values():
            self._log_metrics(metrics)

    def teacher_hits(self, batch: ImageBatch) -> None:
        """No network knows anything at the start."""
        return

    def _metrics(self, part: str) -> dict[str, Any]:
        own, others = (
            (self.val_metrics, self.other_val_metrics)
            if part == "val"
            else (self.test_metrics, self.other_test_metrics)
        )
        return {"student": own, **dict(others.items())}
