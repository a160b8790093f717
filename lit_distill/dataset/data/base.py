"""Data modules whose training images stand in for those of another one."""

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import EpochLoader, TensorLoader
from lit_distill.dataset.augment import ByteAugment
from lit_distill.dataset.siamese import SiameseAugment
from lit_distill.dataset.synthetic import PICTURE, SyntheticSet, check_classes
from lit_distill.image.augment import Normalize
from lit_distill.image.data import ImageBatch, ImageDataModule


class ReplacedImages(ImageDataModule[Any]):
    """Base of data modules with few training images; validation and test are those of the source.

    An epoch has all images, in batches of `batch_size` or of all of them if they are fewer; its last batch may be
    smaller.

    Args:
        source: The real data.
        batch_size: Training images per step over all processes.
        seed: Seed of data order and augmentation. None takes the run's seed.
        operations: How training images are augmented, see `SiameseAugment`; here each image has numbers of its own.
        soft_labels: Serve the set's soft labels, as `ImageBatch.targets`, where it has some.
        soft_labels: Serve the set's soft labels, as `ImageBatch.targets`, where it has some.
        transform: A transform of torchvision in place of `operations`, given each training image as bytes, (c, h, w):
            `torchvision.transforms.v2.AutoAugment`, `RandAugment`, or a `Compose` of several.

    Attributes:
        distilled: The set, after `setup`.
    """

    drop_last = False
    distilled: SyntheticSet

    def __init__(
        self,
        source: ImageDataModule,
        batch_size: int = 256,
        seed: int | None = None,
        operations: str = "none",
        soft_labels: bool = True,
        transform: nn.Module | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, eval_batch_size=source.eval_batch_size)
        self.source = source
        self.augmentation = SiameseAugment(operations)
        if transform is not None and self.augmentation.random:
            raise UsageError(f"data.operations is {operations!r}, and there is data.transform; leave one of them out")
        self.transform = transform
        self.soft_labels = soft_labels
        self.panels: dict[str, Any] = {}

    @abstractmethod
    def replace(self) -> SyntheticSet:
        """Makes the training images from those of the source, or reads them."""

    def prepare_data(self) -> None:
        """Prepares the source."""
        self.source.prepare_data()

    def read_parts(self) -> dict[str, Any]:
        """Sets the source up, and makes the training images.

        Raises:
            UsageError: The images are of other classes, or of another size, than the source's.
        """
        self.source.setup()
        self.num_classes, self.sample_shape = self.source.num_classes, self.source.sample_shape
        self.distilled = self.replace()
        self.classes = tuple(self.source.classes)
        check_classes(self.distilled.classes, self.classes)
        shape = tuple(self.distilled.images.shape[1:])
        if shape != tuple(self.sample_shape):
            raise UsageError(
                f"data.folder: its images are {shape}, those of data.source {tuple(self.sample_shape)}; give the data "
                "that it was made from"
            )
        real = {name: self.source.part(name) for name in ("val", "test") if self.source.has_part(name)}
        return {**real, "train": self.distilled}

    def footprint(self) -> dict[str, int]:
        """Counts the bytes of the training set, see `SyntheticSet.footprint`."""
        self.setup()
        return self.distilled.footprint()

    def make_loader(self, part: str, training: bool, device: torch.device, sampling: dict[str, Any]) -> EpochLoader:
        """Makes the loader of a part."""
        if part != "train":
            return self.source.make_loader(part, training, device, sampling)
        distilled = self.distilled
        tensors = {"images": distilled.network_images(), "labels": distilled.labels}
        if distilled.soft_labels is not None and self.soft_labels:
            tensors["targets"] = distilled.soft_labels
        transforms: dict[str, Any] = {}
        if training and self.transform is not None:
            tensors["images"] = distilled.pixels()
            transforms["images"] = ByteAugment(self.transform, Normalize(distilled.mean, distilled.std))
        elif training and self.augmentation.random:
            transforms["images"] = self.augmentation
        sampling = {**sampling, "batch_size": min(sampling["batch_size"], len(distilled))}
        return TensorLoader(tensors, make_batch=ImageBatch, transforms=transforms, device=device, **sampling)

    def keep(self, folder: Any) -> None:
        """Writes the set and its picture into a run's folder, and names the picture for the dashboard."""
        self.distilled.save(folder)
        self.panels["picture"] = picture_panel(self.distilled)


def picture_panel(distilled: SyntheticSet) -> dict[str, Any]:
    """Describes the picture that `SyntheticSet.save` leaves in the folder distilled/, for the dashboard."""
    counts = distilled.labels.bincount(minlength=len(distilled.classes)).tolist()
    size = f"{len(distilled):,} images, {distilled.footprint()['bytes']:,} bytes"
    return {
        "file": f"distilled/{PICTURE}",
        "title": size,
        "summary": f"The first images of each class, a row for each; {size} in all.",
        "head": ["class", "images"],
        "rows": [[name, str(count)] for name, count in zip(distilled.classes, counts, strict=True)],
    }
