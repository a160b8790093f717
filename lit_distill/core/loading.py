"""Loaders whose batches follow from (seed, epoch, position) alone: resumable, and the same on any number of ranks."""

import hashlib
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_distill.core.errors import RunError, UsageError


def derived_seed(*words: int | str) -> int:
    """Hashes its arguments to a seed, so that neighbours such as (0, 1) and (1, 0) have nothing in common.

    Returns:
        A whole number below 2^32: the CPU generator of torch uses no more bits.
    """
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=4).digest(), "little")


def take_samples(tensor: Tensor, index: Tensor) -> Tensor:
    """Returns (b, ...) samples of a tensor (N, ...) in the tensor's own memory layout."""
    # index_select copies whole samples only in memory order; over a channels_last view it is 20 times slower.
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return tensor.index_select(0, index)


class EpochPermutation(Sampler[int]):
    """The order of samples in an epoch, a pure function of (seed, epoch).

    Lightning calls `set_epoch` at the start of each epoch; outside Lightning the caller does.

    Args:
        size: Number of samples, N.
        seed: Seed of the order, and of the augmentation that loaders derive from it.
        shuffle: If false, the order is 0 ... N - 1 in every epoch.
    """

    def __init__(self, size: int, seed: int = 0, *, shuffle: bool = True) -> None:
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order is given next."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """Returns the sample positions of the current epoch, (N,) int64 on the CPU."""
        if not self.shuffle:
            return torch.arange(self.size)
        return torch.randperm(self.size, generator=self.generator())

    def generator(self) -> torch.Generator:
        """Returns what the order of the current epoch is drawn from."""
        return torch.Generator().manual_seed(derived_seed("order", self.seed, self.epoch))

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def __len__(self) -> int:
        return self.size


@runtime_checkable
class Transform(Protocol):
    """What is done to a whole batch of one tensor, with its randomness drawn outside.

    Drawing is apart from doing, so that draws can be made for the batch of all ranks and only the rank's share be done.
    """

    def draw(self, count: int, generator: torch.Generator, /) -> Tensor:
        """Returns (count, k) int64 on the CPU, one row of random numbers a sample; k = 0 where nothing is random."""

    def __call__(self, values: Tensor, draws: Tensor, /) -> Tensor:
        """Transforms (b, ...) on any device with draws (b, k), which are on the CPU."""


class EpochLoader(ABC):
    """The part that all loaders share: batches, ranks, and the position inside the epoch.

    `batch_size` counts samples over all ranks. Each rank takes its contiguous share of every batch, so the shares put
    together are the batch that a single process would see. All ranks take the same number of steps. Where the last
    batch is smaller (`drop_last=False`, for evaluation), it is shared out as evenly as can be, to within one sample; if
    it has fewer samples than there are ranks, it joins the batch before it. No sample is repeated and none is left out,
    so sums over ranks are exact, and no rank meets an empty batch. Training wants `drop_last=True`: equal shares are
    what makes the mean of the ranks' gradients the gradient of the batch.

    `state_dict` and `load_state_dict` are what Lightning saves and restores with a checkpoint: a loader restored in the
    middle of an epoch goes on with the next batch of the same epoch, on any number of ranks.

    Args:
        sampler: The order of samples; its epoch is the loader's epoch.
        batch_size: Samples per step over all ranks.
        rank: This process, 0 ... `world_size` - 1.
        world_size: Number of processes that share each batch.
        drop_last: Leave out a last batch that is not full.

    Raises:
        UsageError: The batch size is not positive, cannot be divided among the ranks, or (with `drop_last`) exceeds the
            number of samples; or there are no samples, or fewer than ranks.
    """

    batch_sampler = None  # Lightning reads it of whatever has a sampler

    def __init__(
        self,
        sampler: EpochPermutation,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        size = len(sampler)
        if batch_size < 1:
            raise UsageError(f"data.batch_size: {batch_size} is not a number of samples; give 1 or more")
        if batch_size % world_size:
            raise UsageError(
                f"data.batch_size: {batch_size} samples cannot be shared equally by {world_size} processes; "
                f"give a multiple of {world_size} (batch_size counts samples over all processes)"
            )
        if size < world_size:
            raise UsageError(f"data: {size} samples are too few for {world_size} processes; give at least one each")
        if drop_last and batch_size > size:
            raise UsageError(
                f"data.batch_size: {batch_size} is more than the {size} training samples; lower it to {size} or less"
            )
        self.sampler = sampler
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self._epoch = sampler.epoch
        self._position = 0  # batches given in `_epoch`
        self._resuming = False

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.batch_size)
        return full if self.drop_last else max(1, full + (rest >= self.world_size))

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing below runs before the first `next`. Lightning calls `iter` first and `set_epoch` after.
        # A saved position counts for the epoch it was saved in: after a finished epoch the next one starts at 0.
        resumed = self._resuming and self._epoch == self.sampler.epoch
        self._position = self._position if resumed else 0
        self._epoch = self.sampler.epoch
        self._resuming = False
        for batch in self._batches(self._epoch, self._position):
            self._position += 1
            yield batch

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[Any]:
        """Yields this rank's share of the batches from number `start` on."""

    def _bounds(self, number: int) -> tuple[int, int]:
        """Returns start and stop of a batch in the epoch's order."""
        last = number == len(self) - 1 and not self.drop_last
        start = number * self.batch_size
        return start, len(self.sampler) if last else start + self.batch_size

    def _share(self, count: int) -> slice:
        """Returns this rank's part of a batch of `count` samples."""
        return slice(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position, and what it is a position in."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved position.

        Raises:
            UsageError: The position lies inside an epoch of other batches.
        """
        changed = [(key, state[key], value) for key, value in self._identity().items() if state[key] != value]
        if changed and 0 < state["position"] < len(self):
            key, before, now = changed[0]
            raise UsageError(
                f"data.{key}: was {before}, now {now}, but the checkpoint is in the middle of an epoch; "
                f"resume with {before} or from a checkpoint of an epoch's end"
            )
        self._epoch, self._position, self._resuming = state["epoch"], state["position"], True

    def _identity(self) -> dict[str, Any]:
        sampler = self.sampler
        return {"size": len(sampler), "batch_size": self.batch_size, "seed": sampler.seed, "shuffle": sampler.shuffle}


class TensorLoader(EpochLoader):
    """Batches of tensors that lie in memory, selected and transformed whole: no Python per sample.

    Order and draws are made on the CPU, so they are the same whatever the device.

    Args:
        tensors: Tensors by name, each (N, ...). Images are fastest where channels lie last in memory.
        sampler: The order of samples.
        batch_size: Samples per step over all ranks.
        make_batch: Makes the batch from keyword arguments: the tensors (b, ...) by name, and `index` (b,) int64, the
            samples' positions among the N.
        transforms: Transforms by name of the tensor.
        device: Where tensors lie and transforms run.
        rank: See `EpochLoader`; so are the others.
        world_size: See `EpochLoader`.
        drop_last: See `EpochLoader`.

    Raises:
        UsageError: As `EpochLoader`, or the tensors differ in number of samples.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        sampler: EpochPermutation,
        batch_size: int,
        *,
        make_batch: Callable[..., Any] = dict,
        transforms: Mapping[str, Transform] | None = None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        super().__init__(sampler, batch_size, rank=rank, world_size=world_size, drop_last=drop_last)
        for name, tensor in tensors.items():
            if len(tensor) != sampler.size:
                raise UsageError(
                    f"data: '{name}' has {len(tensor)} samples, the sampler {sampler.size}; make them equal"
                )
        self.device = torch.device(device)
        self.tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self.make_batch = make_batch
        self.transforms = dict(transforms or {})

    def _batches(self, epoch: int, start: int) -> Iterator[Any]:
        order = self.sampler.order()
        for number in range(start, len(self)):
            first, stop = self._bounds(number)
            share = self._share(stop - first)
            index = order[first:stop][share].to(self.device)
            fields = {name: take_samples(tensor, index) for name, tensor in self.tensors.items()}
            for name, transform in self.transforms.items():
                generator = torch.Generator().manual_seed(derived_seed(name, self.sampler.seed, epoch, number))
                draws = transform.draw(stop - first, generator)[share]
                fields[name] = transform(fields[name], draws)
            yield self.make_batch(**fields, index=index)


class SampleLoader(EpochLoader):
    """Batches of samples that a data set makes one by one (files, too large for memory), by worker processes.

    A wrapper around torch's `DataLoader`, not a subclass: Lightning would replace the sampler of a subclass.

    Args:
        dataset: Takes the key (epoch, index), so that a sample's randomness can follow from it, and gives the sample.
        sampler: The order of samples.
        batch_size: Samples per step over all ranks.
        collate: Makes the batch from a list of samples.
        num_workers: Worker processes; 0 loads in the main process.
        pin_memory: Put batches into page-locked memory, for a faster copy to a GPU.
        rank: See `EpochLoader`; so are the others.
        world_size: See `EpochLoader`.
        drop_last: See `EpochLoader`.

    Raises:
        UsageError: As `EpochLoader`, or the number of workers is negative.
        RunError: While iterating, a sample cannot be read.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: EpochPermutation,
        batch_size: int,
        *,
        collate: Callable[[list[Any]], Any],
        num_workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        super().__init__(sampler, batch_size, rank=rank, world_size=world_size, drop_last=drop_last)
        if num_workers < 0:
            raise UsageError(f"data.num_workers: {num_workers} is not a number of processes; give 0 or more")
        self._keys = _Keys()
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._keys,
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # else each epoch would draw from the global stream, which is the networks'
        )

    def _batches(self, epoch: int, start: int) -> Iterator[Any]:
        order = self.sampler.order()
        bounds = [self._bounds(number) for number in range(start, len(self))]
        shares = [range(first, stop)[self._share(stop - first)] for first, stop in bounds]
        # Nothing here may refer to `self`: in a reference cycle the workers would end by timeout, 5 s each.
        self._keys.batches = (
            [(epoch, index) for index in order[share.start : share.stop].tolist()] for share in shares
        )
        try:
            yield from self._loader
        except RunError as error:
            # A worker's error arrives with the worker's whole traceback as its text; the last line is the message.
            message = str(error).strip().splitlines()[-1]
            traceback.clear_frames(error.__traceback__)  # it holds the workers' iterator in another such cycle
            raise RunError(message.removeprefix(f"{RunError.__module__}.RunError: ")) from error


class _Keys(Sampler[list[tuple[int, int]]]):
    """The keys of the epoch at hand; exchanged between epochs, while the loader and its workers live on."""

    def __init__(self) -> None:
        self.batches: Iterable[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)
