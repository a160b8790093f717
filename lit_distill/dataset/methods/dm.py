"""DM: the mean embedding of synthetic images is that of real ones, in random networks."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.networks import redraw
from lit_distill.core.reference import Reference
from lit_distill.core.taps import FeatureTaps
from lit_distill.dataset.losses import mean_distance
from lit_distill.dataset.synthesizer import DatasetSynthesizer
from lit_distill.image.distillation import penultimate


class DistributionMatching(DatasetSynthesizer):
    r"""Synthetic and real images of a class have the same mean embedding, whatever random network embeds them.

    .. math:: L = \sum_c \Big\lVert \operatorname{mean} f_\theta(A_\omega(\mathcal{T}_c)) - \operatorname{mean}
        f_\theta(A_\omega(\mathcal{S}_c)) \Big\rVert^2, \qquad \theta \sim P_0

    The network is drawn anew each iteration and never trained; f is what its last linear layer reads. The augmentation
    A has the same random numbers for the real and the synthetic images of a class. A network with batch normalization
    sees all classes at once, since a batch of one class would be normalized by itself.

    Args:
        student: The network whose shape embeds, and which is trained on the result.
        real_batch: Real images of each class in an iteration.
        kwargs: See `DatasetSynthesizer`.
    """

    reference = Reference(
        title="Dataset Condensation with Distribution Matching",
        authors="Zhao, Bilen",
        year=2021,
        arxiv="2110.04181",
    )

    def __init__(self, student: nn.Module, real_batch: int = 256, **kwargs: Any) -> None:
        super().__init__(student, **kwargs)
        if real_batch < 1:
            raise UsageError(f"model.real_batch is {real_batch}; give 1 or more")
        self.real_batch = real_batch

    def build(self) -> None:
        """Finds the embedding of the network."""
        super().build()
        self._embedding = penultimate(self.student)
        self._taps = FeatureTaps(self.student, [self._embedding])
        self._joint = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.student.modules())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Draws a network and real images, and compares means."""
        redraw(self.student)
        self.student.train()
        pairs = []
        for number in range(self.num_classes):
            draws = self.augmentation.draw(1)
            real = self.augmentation(self.real_images(number, self.real_batch), draws)
            pairs.append((self.augmentation(self.of_class(number), draws), real))
        synthetic, real_means = (self.embed_classes(side) for side in zip(*pairs, strict=True))
        distances = [mean_distance(own, other) for own, other in zip(synthetic, real_means, strict=True)]
        return self.combine({"match": torch.stack(distances).sum()})

    def embed_classes(self, classes: tuple[Tensor, ...]) -> list[Float[Tensor, "m d"]]:
        """Embeds the images of each class, together where the network normalizes over the batch."""
        needed = any(images.requires_grad for images in classes)
        with torch.set_grad_enabled(needed):
            if not self._joint:
                return [self._taps(images)[1][self._embedding] for images in classes]
            sizes = [len(images) for images in classes]
            return list(self._taps(torch.cat(classes))[1][self._embedding].split(sizes))
