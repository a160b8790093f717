"""Data for generators: the image sets of the image domain, in epochs as long as one wants."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.core.data import EpochDataModule
from lit_distill.core.errors import UsageError
from lit_distill.core.loading import EpochLoader, EpochPermutation
from lit_distill.image.data.base import ImageDataModule


class GeneratorImages(EpochDataModule[Any]):
    """Images of another data module, in [-1, 1] or as that one normalizes them, and epochs of any length.

    Generators train for many more passes over the data than classifiers; an epoch is what lies between two
    validations. It is made of one permutation of the data after another.

    Args:
        source: The images, such as `DigitsDataModule` with mean [0.5] and std [0.5].
        epoch_batches: Batches in an epoch; one pass over the data if None.
        batch_size: Training samples per step over all processes.
        eval_batch_size: Samples per evaluation step over all processes.
        seed: Seed of the data order. None takes the run's.
    """

    def __init__(
        self,
        source: ImageDataModule,
        epoch_batches: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)
        if epoch_batches is not None and epoch_batches < 1:
            raise UsageError(f"data.epoch_batches is {epoch_batches}; give 1 or more")
        self.source = source
        self.epoch_batches = epoch_batches

    def read_parts(self) -> dict[str, Any]:
        """Reads the data of the source."""
        self.source.setup()
        self.num_classes, self.classes = self.source.num_classes, tuple(self.source.classes)
        self.sample_shape = self.source.sample_shape
        return {name: self.source.part(name) for name in ("train", "val", "test") if self.source.has_part(name)}

    def no_part(self, name: str) -> str:
        """See `EpochDataModule`."""
        return self.source.no_part(name)

    def make_loader(self, part: str, training: bool, device: torch.device, sampling: dict[str, Any]) -> EpochLoader:
        """Makes the loader of a part."""
        if training and self.epoch_batches is not None:
            length = self.epoch_batches * self.batch_size
            sampling = {**sampling, "sampler": RepeatedPermutation(self.part_size(part), length, self.run_seed)}
        return self.source.make_loader(part, training, device, sampling)

    def real(self, part: str, most: int) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        """Returns samples of a part as networks see them, with their classes: all, or `most` evenly spread ones."""
        size = self.part_size(part)
        index = torch.arange(min(size, most)) * size // min(size, most)
        return self.source.normalize(self.source.pixels(part, index)), self.part(part).labels[index]

    def pixels(self, samples: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Returns samples as pixels in [0, 1]."""
        mean, std = (
            torch.tensor(values, device=samples.device).view(1, -1, 1, 1)
            for values in (self.source.normalize.mean, self.source.normalize.std)
        )
        return (samples * std + mean).clamp(0, 1)


class RepeatedPermutation(EpochPermutation):
    """As many samples as one wants: one permutation of the data after another.

    Args:
        size: Number of samples in the data.
        length: Samples in an epoch.
        seed: Seed of the order.
    """

    def __init__(self, size: int, length: int, seed: int = 0) -> None:
        super().__init__(size, seed)
        self.length = length

    def order(self) -> Tensor:
        """Returns the sample positions of the current epoch."""
        generator = self.generator()
        passes = -(-self.length // self.size)
        return torch.cat([torch.randperm(self.size, generator=generator) for _ in range(passes)])[: self.length]

    def __len__(self) -> int:
        return self.length
