"""G-VBSM: images recovered from networks in turn, whose statistics are matched at convolutions, too."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.transforms import v2
from tqdm import tqdm

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.reference import Reference
from lit_distill.dataset.committee import Committee
from lit_distill.dataset.data.subset import in_memory
from lit_distill.dataset.losses import densification_loss
from lit_distill.dataset.recovery import Block, Recovery
from lit_distill.dataset.statistics import GeneralizedMatcher

BATCH = 250


def adam(parameters: Iterable[Any]) -> Optimizer:
    """Builds the optimizer of pixels that the published images have."""
    return torch.optim.Adam(parameters, lr=0.05, betas=(0.5, 0.9))


class GeneralizedStatisticalMatching(Recovery):
    r"""Noise becomes what several trained networks, one each iteration, take for its class, under more statistics.

    .. math:: L = \mathrm{CE}(f_m(A(\tilde x)), y) + r \, R_m(A(\tilde x)) + \nu \, D(A(\tilde x)), \qquad
        m = i \bmod M

    R is that of `GeneralizedMatcher`, D is `densification_loss`, i counts the iterations of the run. A block has all
    images of `block_classes` of the classes, since D compares the images of a class. The statistics that the
    convolutions are given by the real images come from one pass over them, when the run begins; they and the
    exponential averages, which go on from block to block, are part of the checkpoint.

    A student learns from the images with `DistilledSetEvaluation` on `RelabelledImages`, with the same networks as
    teachers, `priors` left out (all weigh the same), and `batch_statistics: false`; its `objective` is mse and its
    `label_weight` 0.15 on CIFAR-100.

    Taken from the public code: the crop and the roll; averages that are not begun anew with a block; patches over batch
    and channels together, on a grid that is stretched where it has to be; the first weight for the first layer of any
    kind; a sum over classes in D, with its flatter spectrum as a constant.

    Where this is another thing than the public code: its averages begin at 0, by mistake, and here with the first
    batch. Its statistics of convolutions are means over batches of 64 augmented images, here they are those of all
    images, not augmented. Its command for CIFAR-100 halves each block among two processes, with statistics of their
    own; here a block is whole. It averages images to 32x32 for D if they are larger; that is left out.

    `train/ce_<m>` and `train/bn_<m>` are the parts of the loss by the network's position m, and R has those of
    convolutions; `train/density` is the rest.

    Args:
        student: See `Recovery`.
        members: The trained networks.
        momentum: m of the exponential averages.
        drop_rate: How often a convolution is skipped.
        density_weight: nu; 0 leaves D out.
        padding: Pixels of zeros around the images, before a crop of their size; 0 for neither.
        init: "noise", or "real" images.
        block_classes: Classes in a block, or all if they are fewer; 100 images is what the public code takes.
        crop_scale: See `Recovery`; here it follows the other crop.
        roll: See `Recovery`.
        optimizer: Builds the optimizer of the images.
        kwargs: See `Recovery`. `first_bn_weight` is that of the first layer, whichever kind it is of.
    """

    reference = Reference(
        title="Generalized Large-Scale Data Condensation via Various Backbone and Statistical Matching",
        authors="Shao, Yin, Zhou, Zhang, Shen",
        year=2023,
        arxiv="2311.17950",
    )

    def __init__(
        self,
        student: nn.Module,
        members: Sequence[nn.Module],
        momentum: float = 0.8,
        drop_rate: float = 0.4,
        density_weight: float = 1.0,
        padding: int = 4,
        init: Literal["real", "noise"] = "noise",
        block_classes: int = 10,
        crop_scale: tuple[float, float] | None = None,
        roll: int = 32,
        optimizer: OptimizerCallable = adam,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            student,
            Committee(members, voting="equal"),
            init=init,
            block_classes=block_classes,
            crop_scale=crop_scale,
            roll=roll,
            optimizer=optimizer,
            **kwargs,
        )
        if not 0 <= momentum < 1:
            raise UsageError(f"model.momentum is {momentum}; give 0 or more, and less than 1 (published: 0.8)")
        if not 0 <= drop_rate <= 1:
            raise UsageError(f"model.drop_rate is {drop_rate}; it is a probability, give 0 to 1 (published: 0.4)")
        check_least("model", 0, density_weight=density_weight, padding=padding)
        self.momentum = momentum
        self.drop_rate = drop_rate
        self.density_weight = density_weight
        self.padding = padding

    def votes(self, number: int) -> dict[int, float]:
        """All networks, each with its whole loss when it is its turn."""
        return dict.fromkeys(range(len(self.committee)), 1.0)

    def matcher(self, member: nn.Module) -> GeneralizedMatcher:
        """Matches convolutions, too."""
        return GeneralizedMatcher(member, self.first_bn_weight, self.momentum, self.drop_rate)

    def build(self) -> None:
        """Puts the crop before the other augmentations."""
        super().build()
        if self.padding:
            size = list(self._data().sample_shape[1:])
            self._transforms = [v2.RandomCrop(size, padding=self.padding), *self._transforms]

    def blocks(self) -> list[Block]:
        """Returns all blocks in their order: each has all images of some classes."""
        starts = range(0, self.num_classes, self.block_classes)
        numbers = range(self.per_class)
        return [Block(numbers, range(start, min(start + self.block_classes, self.num_classes))) for start in starts]

    def on_fit_start(self) -> None:
        """Collects the statistics of the real images, unless they came with a checkpoint."""
        super().on_fit_start()
        for matcher in self._generalized():
            if matcher.convolutions and not matcher.targets:
                matcher.collect(self._real_batches(type(matcher.network).__name__))
            matcher.to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of the network whose turn it is, on the block, augmented."""
        images = self.augmented(self._pixels_of_block)
        place = self.iteration % len(self._votes)
        terms = {f"{name}_{place}": value for name, value in self.member_terms(place, images).items()}
        if self.density_weight:
            flat = images.unflatten(0, (-1, self.per_class)).flatten(2)
            terms["density"] = self.density_weight * densification_loss(flat)
        return self.combine(terms)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the statistics."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["statistics"] = [
            {"targets": dict(matcher.targets), "averages": dict(matcher.averages)} for matcher in self._generalized()
        ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back."""
        super().on_load_checkpoint(checkpoint)
        for matcher, kept in zip(self._generalized(), checkpoint["statistics"], strict=True):
            matcher.targets, matcher.averages = dict(kept["targets"]), dict(kept["averages"])

    def _generalized(self) -> list[GeneralizedMatcher]:
        return [matcher for matcher in self._matchers if isinstance(matcher, GeneralizedMatcher)]

    def _real_batches(self, name: str) -> Iterator[Tensor]:
        source = in_memory(self._data())
        for pixels in tqdm(source.part("train").images.split(BATCH), desc=f"statistics of {name}", leave=False):
            yield source.normalize(pixels.to(self.device))
