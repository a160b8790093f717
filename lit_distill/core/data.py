"""What the data modules of all domains share: the constructor's words, seeds, ranks, and loaders of parts."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from jaxtyping import Int
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import EpochLoader, EpochPermutation, derived_seed


class Labelled(Protocol):
    """What every part of a data set has, whatever its samples are."""

    @property
    def labels(self) -> Int[Tensor, " n"]:
        """Class of each sample."""


Part = TypeVar("Part", bound=Labelled)


class EpochDataModule(LightningDataModule, ABC, Generic[Part]):
    """Base of data modules whose parts ("train", "val", "test") are served by an `EpochLoader`.

    A subclass makes the parts (`read_parts`) and loaders of them (`make_loader`). Training batches are shuffled. Batch
    sizes count samples over all processes, so a run means the same on one GPU and on eight.

    Args:
        root: Folder of the data.
        batch_size: Training samples per step over all processes.
        num_workers: Processes that read files.
        seed: Seed of data order and augmentation. None takes the run's seed (`seed_everything`), or 0.
        train_size: Use only so many training samples, the same share of every class. A smaller subset lies inside a
            larger one.
        split_seed: Seed of all splits and subsets. Apart from `seed`, so that runs with other seeds see the same data.
        eval_batch_size: Samples per evaluation step over all processes, rounded up to a multiple of their number.

    Attributes:
        num_classes: Number of classes.
        classes: Names of the classes, in the order of the labels.
        drop_last: Whether what is left of an epoch after the last full batch is not used in that epoch.
    """

    num_classes: int
    classes: tuple[str, ...]
    drop_last = True

    def __init__(
        self,
        root: str | Path | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
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
        self.train_size = train_size
        self.split_seed = split_seed
        self.eval_batch_size = eval_batch_size
        self._parts: dict[str, Part] = {}

    def train_dataloader(self) -> EpochLoader:
        """Shuffled training batches."""
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

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the data, once; raises what `read_parts` does."""
        if not self._parts:
            self._parts = self.read_parts()

    def has_part(self, part: str) -> bool:
        """Says whether there is such a part ("train", "val" or "test")."""
        self.setup()
        return part in self._parts

    def part(self, name: str) -> Part:
        """Returns a part.

        Raises:
            UsageError: There is no such part.
        """
        if not self.has_part(name):
            raise UsageError(self.no_part(name))
        return self._parts[name]

    def part_size(self, part: str) -> int:
        """Returns the number of samples in a part."""
        return len(self.part(part).labels)

    def train_labels(self) -> Int[Tensor, " n"]:
        """Returns the labels of the training part by sample index."""
        return self.part("train").labels

    @abstractmethod
    def read_parts(self) -> dict[str, Part]:
        """Reads and splits the data. What else is known of them afterwards, such as `classes`, is set here too."""

    @abstractmethod
    def no_part(self, name: str) -> str:
        """Returns what a user is told who asks for a part that there is not."""

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
            "drop_last": training and self.drop_last,
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


def stratified_order(labels: Int[Tensor, " n"], seed: int) -> Int[Tensor, " n"]:
    """Shuffles a data set so that every stretch of it holds the classes in the proportions of the whole.

    A sample's place is decided by its rank among the shuffled samples of its class, divided by the size of the class.

    Args:
        labels: Class numbers.
        seed: Seed of the shuffling.

    Returns:
        Positions of the samples in the new order.
    """
    generator = torch.Generator().manual_seed(derived_seed("split", seed))
    shuffled = torch.randperm(len(labels), generator=generator)
    grouped = shuffled[labels[shuffled].argsort(stable=True)]  # shuffled within each class, class after class
    sizes = labels.bincount()
    starts = sizes.cumsum(0) - sizes
    own = labels[grouped]
    place = (torch.arange(len(labels)) - starts[own] + 0.5).double() / sizes[own]
    return grouped[place.argsort(stable=True)]
