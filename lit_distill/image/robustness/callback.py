"""Robust accuracy of the product network, measured in `test`."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError
from lit_distill.core.networks import freeze
from lit_distill.image.data import ImageBatch
from lit_distill.image.robustness.attacks import (
    PixelModel,
    carlini_wagner_l2,
    input_gradient,
    require_foolbox,
    rescaled,
    signed_step,
)


class AdversarialEvaluation(Callback):
    """Attacks the network that a method produces, on test data, with the controls that uncover masked gradients.

    - `test/fgsm_acc_eps<e>`: accuracy on all test images after FGSM of size e.
    - `test/zero_gradient`: share of all test images whose cross-entropy has a gradient of exactly zero; FGSM leaves
      them as they are, which looks like robustness.
    - `test/fgsm_rescaled_acc_eps<e>`: the same as the first, with the gradient taken of rescaled logits (see
      `attacks.rescaled`). Much lower than the first: the gradient was masked.
    - `test/cw_success`: share of the first `cw_samples` correctly classified test images (of each process its part)
      on which the Carlini-Wagner attack succeeds; `test/cw_l2`: mean L2 distance, in pixels, of the successes alone.

    Accuracy against epsilon goes into `panels["robustness"]`, which `lit-distill compare --html` draws. A frozen copy
    of the network is attacked, in float32 pixels with the normalization inside; nothing else about the test changes.

    Args:
        epsilons: Sizes of FGSM, in units of pixels in [0, 1].
        cw_samples: Images for the Carlini-Wagner attack; 0 leaves it out.
        cw_steps: Steps of its optimizer for one constant.
        cw_search_steps: Constants that it tries.
        batch_size: Images attacked at once: a gradient takes more memory than a test.
    """

    def __init__(
        self,
        epsilons: Sequence[float] = (0.1, 0.2, 0.3),
        cw_samples: int = 100,
        cw_steps: int = 1000,
        cw_search_steps: int = 9,
        batch_size: int = 128,
    ) -> None:
        if not epsilons or min(epsilons) <= 0:
            raise UsageError(
                f"AdversarialEvaluation: epsilons is {list(epsilons)}; give one or more above 0, such as 0.1"
            )
        least = {"cw_samples": 0, "cw_steps": 1, "cw_search_steps": 1, "batch_size": 1}
        given = {
            "cw_samples": cw_samples,
            "cw_steps": cw_steps,
            "cw_search_steps": cw_search_steps,
            "batch_size": batch_size,
        }
        for name, value in given.items():
            if value < least[name]:
                raise UsageError(f"AdversarialEvaluation: {name} is {value}; give {least[name]} or more")
        self.epsilons = tuple(sorted(set(epsilons)))
        self.cw_samples = cw_samples
        self.cw_steps = cw_steps
        self.cw_search_steps = cw_search_steps
        self.batch_size = batch_size

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses, before anything is trained, what could not be attacked afterwards."""
        if not isinstance(pl_module, Distiller):
            raise UsageError(
                f"callback AdversarialEvaluation: {type(pl_module).__name__} is no Distiller; leave it out"
            )
        if pl_module.device_mesh is not None:
            raise UsageError(
                "callback AdversarialEvaluation attacks whole networks; leave it out under --trainer.strategy fsdp2"
            )
        if getattr(getattr(trainer, "datamodule", None), "normalize", None) is None:
            raise UsageError(
                "callback AdversarialEvaluation: the data module has no `normalize` with mean and std, so pixels are "
                "unknown; use a data module of lit_distill.image, or set the attribute"
            )
        if self.cw_samples:
            require_foolbox()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the network; sets all counts to zero."""
        assert isinstance(pl_module, Distiller)
        normalize: Any = trainer.datamodule.normalize  # type: ignore[attr-defined]  # checked in setup
        # Lightning tests in inference mode, whose tensors can have no gradient, not even later.
        with torch.inference_mode(False):
            network = copy.deepcopy(getattr(pl_module, pl_module.product))
            self._model = PixelModel(network, normalize.mean, normalize.std).to(pl_module.device)
            freeze(self._model)
            zeros = torch.zeros(len(self.epsilons))
            self._right = {"fgsm": zeros, "rescaled": zeros.clone()}
            self._counts = torch.zeros(5)  # images, right, zero gradient, fooled by CW, their L2
            self._cw_tried = 0

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Attacks the batch."""
        if not isinstance(batch, ImageBatch):
            raise UsageError(
                f"callback AdversarialEvaluation: batches are {type(batch).__name__}, not ImageBatch; leave it out"
            )
        with torch.inference_mode(False):
            for images, labels in zip(
                batch.images.split(self.batch_size), batch.labels.split(self.batch_size), strict=True
            ):
                # Cloned outside of inference mode, the tensors are ordinary ones.
                self._attack(trainer, self._model.pixels(images.clone()), labels.clone())

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs `test/*`, keeps the curves."""
        assert isinstance(pl_module, Distiller)
        counts = torch.cat([self._counts, *self._right.values(), torch.tensor([float(self._cw_tried)])])
        total = trainer.strategy.reduce(counts.to(pl_module.device), reduce_op="sum").tolist()
        images, right, zero, fooled, distance = total[:5]
        curves, tried = total[5:-1], total[-1]
        n = len(self.epsilons)
        panel = {"epsilon": [0.0, *self.epsilons]}
        values = {"test/zero_gradient": zero / images}
        for kind, name, part in (("fgsm", "fgsm", curves[:n]), ("rescaled", "fgsm_rescaled", curves[n:])):
            values |= {
                f"test/{name}_acc_eps{e:g}": count / images for e, count in zip(self.epsilons, part, strict=True)
            }
            panel[kind] = [right / images, *(count / images for count in part)]
        if tried:
            values["test/cw_success"] = fooled / tried
        if fooled:
            values["test/cw_l2"] = distance / fooled
        pl_module.log_dict(values, sync_dist=True)
        pl_module.panels["robustness"] = panel
        del self._model

    def _attack(self, trainer: Trainer, pixels: Tensor, labels: Tensor) -> None:
        model = self._model
        right = model(pixels).argmax(1) == labels
        gradients = {
            "fgsm": input_gradient(model, pixels, labels),
            "rescaled": input_gradient(rescaled(model), pixels, labels),
        }
        zero = (gradients["fgsm"].flatten(1) == 0).all(1)
        for kind, gradient in gradients.items():
            hits = [
                (model(signed_step(pixels, gradient, epsilon=epsilon)).argmax(1) == labels).sum()
                for epsilon in self.epsilons
            ]
            self._right[kind] += torch.stack(hits).cpu()
        self._counts[:3] += torch.tensor([len(labels), right.sum(), zero.sum()])
        wanted = -(-self.cw_samples // trainer.world_size) - self._cw_tried
        chosen = right.nonzero()[:wanted, 0] if wanted > 0 else right.nonzero()[:0, 0]
        if len(chosen):
            clean = pixels[chosen]
            attacked, success = carlini_wagner_l2(
                model, clean, labels[chosen], steps=self.cw_steps, search_steps=self.cw_search_steps
            )
            distance = (attacked - clean).flatten(1).norm(dim=1)
            self._counts[3:] += torch.stack([success.sum(), torch.where(success, distance, 0.0).sum()]).cpu()
            self._cw_tried += len(chosen)
