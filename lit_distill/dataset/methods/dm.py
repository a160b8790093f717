"""DM: the mean embedding of synthetic images is that of real ones, in random networks."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import check_least
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
        check_least("model", 1, real_batch=real_batch)
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
        numbers = list(range(self.num_classes))
        # One by one where it can be, so that the real images of all classes are not in memory at once.
        groups = [numbers] if self._joint else [[number] for number in numbers]
        distances = [distance for group in groups for distance in self.match_classes(group)]
        return self.combine({"match": torch.stack(distances).sum()})

    def match_classes(self, numbers: list[int]) -> list[Float[Tensor, ""]]:
        """Compares the means of some classes, which the network sees together."""
        synthetic, real = [], []
        for number in numbers:
            draws = self.augmentation.draw(1)
            real.append(self.augmentation(self.real_images(number, self.real_batch), draws))
            synthetic.append(self.augmentation(self.of_class(number), draws))
        with torch.no_grad():
            targets = self.embed_classes(real)
        return [mean_distance(own, other) for own, other in zip(self.embed_classes(synthetic), targets, strict=True)]

    def embed_classes(self, classes: list[Tensor]) -> list[Float[Tensor, "m d"]]:
        """Embeds the images of some classes in one forward pass."""
        images = torch.cat(classes) if len(classes) > 1 else classes[0]
        return list(self._taps(images)[1][self._embedding].split([len(own) for own in classes]))
