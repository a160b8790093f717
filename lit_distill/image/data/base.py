"""What all image data modules share: the batch, the constructor's words, seeds and ranks."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import EpochLoader, EpochPermutation


class ImageBatch(NamedTuple):
    """A batch of images.

    Attributes:
        images: (b, c, h, w) float32 in channels_last layout, normalized.
        labels: (b,) int64 class numbers.
        index: (b,) int64 positions in the data set part (training, validation or test) that the batch is from.
    """

    images: Float[Tensor, "b c h w"]
    labels: Int[Tensor, " b"]
    index: Int[Tensor, " b"]  # type: ignore[assignment]  # tuple has a method of this name; nobody searches a batch


class ImageDataModule(LightningDataModule, ABC):
    """Base of the image data modules.

    Training batches are shuffled and whole: what is left of an epoch after the last full batch is not used in that
    epoch. Batch sizes count samples over all processes, so a run means the same on one GPU and on eight.

    Args:
        root: Folder of the data.
        batch_size: Training samples per step over all processes.
        num_workers: Processes that read files.
        seed: Seed of data order and augmentation. None takes the run's seed (`seed_everything`), or 0.
        augment: Augment the training images at random.
        train_size: Use only so many training samples, the same share of every class. A smaller subset lies inside a
            larger one.
        split_seed: Seed of all splits and subsets. Apart from `seed`, so that runs with other seeds see the same data.
        eval_batch_size: Samples per evaluation step over all processes, rounded up to a multiple of their number.

    Attributes:
        num_classes: Number of classes.
        sample_shape: (channels, height, width).
        classes: Names of the classes, in the order of the labels.
    """

    num_classes: int
    sample_shape: tuple[int, int, int]
    classes: tuple[str, ...]

    def __init__(
        self,
        root: str | Path | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
        augment: bool = False,
        train_size: int | None = None,
        split_seed: int = 0,
        eval_batch_size: int = 500,
    ) -> None:
        super().__init__()
        for key, value in {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "train_size": train_size,
        }.items():
            if value is not None and value < 1:
                raise UsageError(f"data.{key}: {value} is not a number of samples; give 1 or more")
        self.root = None if root is None else Path(root).expanduser()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.augment = augment
        self.train_size = train_size
        self.split_seed = split_seed
        self.eval_batch_size = eval_batch_size

    def train_dataloader(self) -> EpochLoader:
        """Shuffled, augmented training batches."""
        return self._loader("train", training=True)

    def ordered_loader(self) -> EpochLoader:
        """The training set in order, not augmented, whole in every process: for running a teacher over it once."""
        return self._loader("train", training=False, alone=True)

    def val_dataloader(self) -> EpochLoader | list[Any]:
        """Validation batches in order; none if there is no validation part."""
        return self._loader("val", training=False) if self.has_part("val") else []

    def test_dataloader(self) -> EpochLoader:
        """Test batches in order."""
        return self._loader("test", training=False)

    def predict_dataloader(self) -> EpochLoader:
        """The test batches."""
        return self.test_dataloader()

    @abstractmethod
    def has_part(self, part: str) -> bool:
        """Says whether there is such a part ("train", "val" or "test")."""

    @abstractmethod
    def part_size(self, part: str) -> int:
        """Returns the number of samples in a part."""

    @abstractmethod
    def train_labels(self) -> Int[Tensor, " n"]:
        """Returns the labels of the training part by sample index."""

    @abstractmethod
    def make_loader(self, part: str, training: bool, device: torch.device, sampling: dict[str, Any]) -> EpochLoader:
        """Makes the loader of a part; `sampling` is what every `EpochLoader` takes."""

    def _loader(self, part: str, training: bool, alone: bool = False) -> EpochLoader:
        rank, world_size, device = self._placement()
        if alone:
            rank, world_size = 0, 1
        sampling = {
            "sampler": EpochPermutation(self.part_size(part), self.run_seed, shuffle=training),
            "batch_size": self.batch_size if training else -(-self.eval_batch_size // world_size) * world_size,
            "drop_last": training,
            "rank": rank,
            "world_size": world_size,
        }
        return self.make_loader(part, training, device, sampling)

    @property
    def run_seed(self) -> int:
        """The seed in force: the module's own, else the one that Lightning's `seed_everything` has left, else 0."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def _placement(self) -> tuple[int, int, torch.device]:
        """Rank and number of processes that share the data, and the device of this one."""
        if self.trainer is None:
            return 0, 1, torch.device("cpu")
        # Where a model is split over processes, fewer share the data than there are; the strategy knows.
        shared = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return shared["rank"], shared["num_replicas"], self.trainer.strategy.root_device
