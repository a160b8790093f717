"""The base of methods that recover images from trained networks: inversion of classifiers, block by block."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.transforms import v2

from lit_distill.core.cache import weights_fingerprint
from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError, check_least
from lit_distill.dataset.batchnorm import BatchNormMatcher
from lit_distill.dataset.committee import Committee
from lit_distill.dataset.synthesizer import DatasetSynthesizer
from lit_distill.dataset.synthetic import SyntheticSet


def adam(parameters: Iterable[Any]) -> Optimizer:
    """Builds the optimizer of pixels that methods of this family have."""
    return torch.optim.Adam(parameters, lr=0.25, betas=(0.5, 0.9))


class Block(NamedTuple):
    """Images that are recovered together.

    Attributes:
        numbers: Which of the images of each class they are, from 0.
        classes: The classes.
    """

    numbers: range
    classes: range


class Recovery(DatasetSynthesizer):
    r"""Learns images that trained networks take for their class, and whose statistics they know.

    .. math:: L = \sum_m \omega_m \big( \mathrm{CE}(f_m(A(\tilde x)), y) + r \, R_m(A(\tilde x)) \big)

    R is that of `BatchNormMatcher`. The augmentation A is one random resized crop and one coin for mirroring for the
    whole batch, then a roll by random offsets; all networks see the same.

    The images are recovered in blocks: image k of each class, or of `block_classes` of the classes. Blocks come one
    after another, `recover_iterations` each, with an optimizer state, a learning rate that falls along half a cosine,
    and voters of their own. After each step pixels are cut off where they are no colors. A run has to have as many
    steps as all blocks together: `trainer.max_steps` is checked.

    The result is rounded to 8 bits, as image files are; the published sets are JPEG files, with losses of their own.

    `train/ce_<m>` and `train/bn_<m>` are the parts of the loss by the network's position m, weighted.

    Args:
        student: The network that is trained on the set to show what it is worth, under hard labels.
        committee: The trained networks; see `votes` for what a subclass makes of them.
        bn_weight: r; 0 leaves R out, and networks without batch normalization can be taken.
        first_bn_weight: Weight of R's first layer, the others have 1.
        recover_iterations: Steps of each block.
        block_classes: Classes in a block, or all if they are fewer.
        crop_scale: Smallest and largest share of the image in a crop; None for no crop.
        flip: Whether images are mirrored.
        roll: Largest offset of the roll, in pixels; 0 for none.
        kwargs: See `DatasetSynthesizer`; `init` "real" begins with a random real image each.
    """

    frozen: ClassVar[tuple[str, ...]] = ("student", "committee")

    lower: Tensor
    upper: Tensor

    def __init__(
        self,
        student: nn.Module,
        committee: Committee,
        bn_weight: float = 0.01,
        first_bn_weight: float = 10.0,
        recover_iterations: int = 4000,
        block_classes: int = 100,
        crop_scale: tuple[float, float] | None = (0.08, 1.0),
        flip: bool = True,
        roll: int = 4,
        optimizer: OptimizerCallable = adam,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, optimizer=optimizer, **kwargs)
        check_least("model", 1, recover_iterations=recover_iterations, block_classes=block_classes)
        check_least("model", 0, bn_weight=bn_weight, first_bn_weight=first_bn_weight, roll=roll)
        if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UsageError(f"model.crop_scale is {list(crop_scale)}; give two shares in ascending order, or null")
        if self.lr_scheduler is not None:
            raise UsageError("model.lr_scheduler: each block has its own cosine schedule; leave it out")
        self.committee = committee
        self.bn_weight = bn_weight
        self.first_bn_weight = first_bn_weight
        self.recover_iterations = recover_iterations
        self.block_classes = block_classes
        self.crop_scale = crop_scale
        self.flip = flip
        self.roll = roll

    def votes(self, number: int) -> dict[int, float]:
        """Says who votes on the images number `number` of all classes: positions of networks, with their weights."""
        raise AssertionError(f"{type(self).__name__} is a base class; a method defines votes")

    def matcher(self, member: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Builds what runs a network on images, and returns its logits and R."""
        return BatchNormMatcher(member, self.first_bn_weight)

    # ---- blocks ----------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Checks the networks, and makes what the steps need."""
        data = self._data()
        self.committee.check(data.sample_shape, data.num_classes)
        self._matchers = [self.matcher(member) if self.bn_weight else None for member in self.committee.members]
        super().build()
        # The optimizer has a block of them, in memory of its own.
        self.images.requires_grad_(False)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.normalize.mean, data.normalize.std))
        self.register_buffer("lower", -mean / std, persistent=False)
        self.register_buffer("upper", (1 - mean) / std, persistent=False)
        size = list(data.sample_shape[1:])
        crops = [] if self.crop_scale is None else [v2.RandomResizedCrop(size, self.crop_scale, antialias=False)]
        self._transforms = [*crops, *([v2.RandomHorizontalFlip()] if self.flip else [])]
        self._members = [
            {
                "network": type(member).__name__,
                "weights": weights_fingerprint(member),
                "prior": None if self.committee.priors is None else self.committee.priors[place],
            }
            for place, member in enumerate(self.committee.members)
        ]

    def first_images(self) -> Float[Tensor, "n c h w"]:
        """Returns what the images are at the beginning; fewer of each class are the first of more."""
        if self.init != "noise":
            return super().first_images()
        shape = (self.num_classes, *self._data().sample_shape)
        return torch.stack([torch.randn(shape) for _ in range(self.per_class)], dim=1).flatten(0, 1)

    def blocks(self) -> list[Block]:
        """Returns all blocks in their order."""
        starts = range(0, self.num_classes, self.block_classes)
        parts = [range(start, min(start + self.block_classes, self.num_classes)) for start in starts]
        return [Block(range(number, number + 1), classes) for number in range(self.per_class) for classes in parts]

    def on_fit_start(self) -> None:
        """Checks that the run ends with the last block.

        Raises:
            UsageError: It does not, or there are several processes.
        """
        super().on_fit_start()
        if self.trainer.world_size > 1:
            raise UsageError("trainer.devices: blocks are recovered one after another in one process; take one device")
        blocks = len(self.blocks())
        wanted = blocks * self.recover_iterations
        if self.trainer.max_steps != wanted and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it late
            raise UsageError(
                f"trainer.max_steps is {self.trainer.max_steps}; {blocks} block{'s' * (blocks > 1)} of "
                f"{self.recover_iterations} iterations take {wanted}, set it to {wanted} (and trainer.max_epochs to -1)"
            )

    def on_train_start(self) -> None:
        """Leaves the real images where they are: they are needed for the beginning alone."""
        Distiller.on_train_start(self)

    def configure_optimizers(self) -> Any:
        """One optimizer, for the block at hand."""
        self._enter_block()
        optimizer = self.optimizer([self._pixels_of_block])
        self._lrs = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begins a new block when it is time, and sets the learning rate."""
        super().on_train_batch_start(batch, batch_idx)
        optimizer = self.trainer.optimizers[0]
        done = self.iteration % self.recover_iterations
        if done == 0:
            self._enter_block()
            optimizer.state.clear()
            optimizer.param_groups[0]["params"] = [self._pixels_of_block]
        for group, lr in zip(optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * done / self.recover_iterations))

    def _enter_block(self) -> None:
        blocks = self.blocks()
        block = blocks[min(self.iteration // self.recover_iterations, len(blocks) - 1)]
        part = tuple(slice(numbers.start, numbers.stop) for numbers in (block.classes, block.numbers))
        images, labels = (
            values.unflatten(0, (self.num_classes, self.per_class))[part]
            for values in (self.images.detach(), self.labels)
        )
        self._place = images.view(-1, *images.shape[2:])  # which never copies
        self._pixels_of_block = self._place.clone(memory_format=torch.channels_last).requires_grad_()
        self._labels_of_block = labels.flatten()
        self._votes = self.votes(block.numbers.start)

    # ---- a step ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The voters' losses on the block, augmented."""
        images = self.augmented(self._pixels_of_block)
        terms: dict[str, Tensor] = {}
        for place, weight in self._votes.items():
            for name, value in self.member_terms(place, images).items():
                terms[f"{name}_{place}"] = weight * value
        return self.combine(terms)

    def member_terms(self, place: int, images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
        """Computes the terms of one network, without its weight: "ce", and "bn" if there is one."""
        matcher = self._matchers[place]
        if matcher is None:
            return {"ce": F.cross_entropy(self.committee.members[place](images).float(), self._labels_of_block)}
        logits, distance = matcher(images)
        ce = F.cross_entropy(logits.float(), self._labels_of_block)
        return {"ce": ce, "bn": self.bn_weight * distance}

    def augmented(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Augments all images alike, with new random numbers."""
        for transform in self._transforms:
            images = transform(images)
        if self.roll:
            images = images.roll(torch.randint(self.roll + 1, (2,)).tolist(), (2, 3))
        return images

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step, cuts off what is no color, and puts the block back among the images."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self._pixels_of_block.clamp_(self.lower, self.upper)
            self._place.copy_(self._pixels_of_block)

    # ---- what comes out --------------------------------------------------------------------------------------------

    def distilled(self) -> SyntheticSet:
        """Returns the set as it is now, rounded to 8 bits."""
        found = super().distilled()
        description = {**found.description, "members": self._members, "init": self.init, "bn_weight": self.bn_weight}
        return replace(found.quantized(), description=description)
