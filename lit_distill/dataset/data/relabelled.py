"""Few images, seen anew in each batch, with the labels that a committee gives to just this view of them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from tqdm import tqdm

from lit_distill.core.cache import weights_fingerprint
from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.loading import EpochLoader, EpochPermutation, Transform, derived_seed, take_samples
from lit_distill.core.taps import probe
from lit_distill.dataset.committee import Committee, Voting
from lit_distill.dataset.crops import CutMix, RandomResizedCrop, ShuffleTiles
from lit_distill.dataset.data.base import ReplacedImages
from lit_distill.dataset.relabel import LabelStore, committee_logits
from lit_distill.dataset.synthetic import SyntheticSet
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import count_classes

# What labels depend on beside the view; whoever has no teachers takes them as they are.
_OF_TEACHERS = ("teachers", "priors", "temperature", "batch_statistics")


class RelabelledImages(ReplacedImages):
    r"""Images cropped, mirrored, and mixed at random, batch by batch, and a committee's logits for each mixed batch.

    .. math:: t = \sum_m \omega_m z_m(x), \qquad \omega = \mathrm{softmax}(\alpha / \tau)

    With `batch_statistics` a batch is given to the committee in equal `parts`, and batch normalization takes the
    statistics of the part: batch-specific soft labels. A student that is to see the same statistics is trained with as
    many parts (`DistilledSetEvaluation.parts`; divided by the number of processes, since each takes its share of a
    batch). What is left of an epoch is served if each part has two images or more, and is not used in that epoch
    otherwise.

    Order, crops, boxes and permutations follow from (seed, epoch, batch), so that the view which was labelled is made
    again without having been stored. Labels are made when they are served, by all processes for the whole batch, or
    once, see `label_folder`. `ImageBatch.labels` are the classes of the images before they were mixed.

    Random images with the same labels, which any distilled set has to beat, are this module with `RandomSubset`.

    Args:
        images: The images: `DistilledImages`, `RandomSubset`, or another; validation and test are those of its source.
            How it augments or labels its images has no effect.
        teachers: Trained networks, the committee. May be empty where labels are stored.
        priors: Prior performance of each, in percent, alpha. None gives all the same weight.
        temperature: tau of the weights.
        batch_statistics: Normalize by the statistics of the batch; otherwise by running statistics.
        parts: Parts of a batch.
        batch_size: Images per step over all processes.
        seed: Seed of order and views. None takes the run's seed.
        crop_scale: Smallest and largest area of crops, as shares of the image; [1, 1] leaves images whole.
        flip: Mirror left and right at random.
        cutmix: Mix each batch by CutMix.
        grid: Images are put together of so many tiles in each direction, whose rows and columns are shuffled first.
        label_folder: Make the labels of `label_epochs` epochs once, before training, in float16, and keep them in this
            folder; none are made again. They hold for this seed.
        label_epochs: Number of epochs to make labels for: those of the run.
        top_k: Keep only so many of the largest logits, and the mean of the others; which share of their variance is
            lost, is said.

    Raises:
        UsageError: There are no teachers and no labels, or they are of other classes, or priors are not as many; or the
            batch is too small for its parts.

    Reference: Cui, Li, Ma, Bi, Luo, Shen, Dataset Distillation via Committee Voting, 2025, arXiv 2501.07575; labels for
    each view: Shen, Xing, A Fast Knowledge Distillation Framework for Visual Recognition, 2021, arXiv 2112.01528.
    """

    def __init__(
        self,
        images: ReplacedImages,
        teachers: Sequence[nn.Module],
        priors: Sequence[float] | None = None,
        temperature: float = 10.0,
        batch_statistics: bool = True,
        parts: int = 2,
        batch_size: int = 16,
        seed: int | None = None,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        cutmix: bool = True,
        grid: int = 1,
        label_folder: str | None = None,
        label_epochs: int = 300,
        top_k: int | None = None,
    ) -> None:
        super().__init__(images.source, batch_size=batch_size, seed=seed, soft_labels=False)
        if not teachers and label_folder is None:
            raise UsageError(
                "data.teachers is empty; give a trained network, or data.label_folder with finished labels"
            )
        if priors is not None and len(priors) != len(teachers):
            raise UsageError(f"data.priors: {len(priors)} numbers for {len(teachers)} teachers; give one for each")
        if priors is not None and max(priors) <= 1:
            raise UsageError(f"data.priors are {list(priors)}; give percent, since data.temperature is meant for it")
        if temperature <= 0:
            raise UsageError(f"data.temperature is {temperature}; it must be above 0 (usual: 10)")
        check_least("data", 1, parts=parts, grid=grid, label_epochs=label_epochs)
        self.images = images
        voting: Voting = "equal" if priors is None else "prior"
        self.committee = Committee(teachers, priors, voting) if teachers else None
        self.temperature = temperature
        self.batch_statistics = batch_statistics
        self.parts = parts
        self.crop = RandomResizedCrop((crop_scale[0], crop_scale[1]), flip=flip)
        self.cutmix = cutmix
        self.grid = grid
        self.label_folder = label_folder
        self.label_epochs = label_epochs
        self.top_k = top_k

    def prepare_data(self) -> None:
        """Prepares the images and their source."""
        self.images.prepare_data()

    def replace(self) -> SyntheticSet:
        """Takes the images, and checks that committee and batches fit them."""
        self.images.setup()
        distilled = self.images.distilled
        size = min(self.batch_size, len(distilled))
        if size < 2 * self.parts:
            raise UsageError(
                f"data.batch_size: {self.parts} parts of {size} images have fewer than 2 each; lower data.parts (and "
                "model.parts)"
            )
        if self.top_k is not None and not 1 <= self.top_k < self.num_classes:
            raise UsageError(f"data.top_k is {self.top_k}; give 1 to {self.num_classes - 1}, or leave it out")
        for number, teacher in enumerate(self.teachers()):
            logits, _ = probe(teacher, self.sample_shape)
            classes = count_classes(logits, teacher, f"teachers[{number}]")
            if classes != self.num_classes:
                raise UsageError(
                    f"data.teachers: number {number} has {classes} classes, the data has {self.num_classes}; give "
                    "networks of the same data"
                )
        return distilled

    def teachers(self) -> list[nn.Module]:
        """Returns the teachers."""
        return [] if self.committee is None else list(self.committee.members)

    def transforms(self) -> dict[str, Transform]:
        """Returns what is done to a batch, in order, by the names that seeds are derived from."""
        chosen: dict[str, Transform] = {"tiles": ShuffleTiles(self.grid)} if self.grid > 1 else {}
        chosen["crop"] = self.crop
        return {**chosen, "cutmix": CutMix()} if self.cutmix else chosen

    def teach(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Labels a batch."""
        if self.committee is None:
            raise UsageError("data.teachers is empty; labels that are not stored need them")
        return committee_logits(
            self.committee,
            images,
            temperature=self.temperature,
            batch_statistics=self.batch_statistics,
            parts=self.parts,
        )

    def made_from(self) -> dict[str, Any]:
        """Describes all that stored labels depend on."""
        distilled = self.distilled
        digest = hashlib.sha256(distilled.network_images().contiguous().numpy().data)
        found = {
            "images": digest.hexdigest()[:16],
            "seed": self.run_seed,
            "batch_size": min(self.batch_size, len(distilled)),
            "parts": self.parts,
            "transforms": repr(self.transforms()),
            "top_k": self.top_k,
            "teachers": [weights_fingerprint(teacher) for teacher in self.teachers()],
            "priors": self.committee and self.committee.priors,
            "temperature": self.temperature,
            "batch_statistics": self.batch_statistics,
        }
        return found if self.committee else {key: found[key] for key in found if key not in _OF_TEACHERS}

    def footprint(self) -> dict[str, int]:
        """Counts bytes.

        Returns:
            "bytes": of images and labels. "label_bytes": of stored soft labels; where labels are made when they are
            served, of the hard ones, and then "teacher_bytes" are those of the networks that have to be there.
        """
        self.setup()
        if self.label_folder is None:
            tensors = [tensor for teacher in self.teachers() for tensor in teacher.state_dict().values()]
            return {**self.distilled.footprint(), "teacher_bytes": sum(tensor.nbytes for tensor in tensors)}
        label_bytes = self.label_epochs * self._store(self.label_folder, {}).nbytes(self._served())
        return {"bytes": self.distilled.images.nbytes + label_bytes, "label_bytes": label_bytes}

    def make_loader(self, part: str, training: bool, device: torch.device, sampling: dict[str, Any]) -> EpochLoader:
        """Makes the loader of a part; for that of training, labels are made first where they are to be stored."""
        if part != "train" or not training:
            return super().make_loader(part, training, device, sampling)
        if self.committee is not None:
            self.committee.to(device)
        size = len(self.distilled)
        batch_size = min(sampling["batch_size"], size)
        sampling = {**sampling, "batch_size": batch_size, "drop_last": self._served() < size}
        loader = RelabelledLoader(
            self.distilled.network_images(), self.distilled.labels, self.transforms(), self.teach, device, **sampling
        )
        if self.label_folder is not None:
            store = self._store(self.label_folder, self.made_from())
            self._fill(store, loader)
            loader.teach = store
        return loader

    def _served(self) -> int:
        """Images of an epoch."""
        size = len(self.distilled)
        rest = size % min(self.batch_size, size)
        return size - rest if rest < 2 * self.parts else size

    def _store(self, folder: str, made_from: Mapping[str, Any]) -> LabelStore:
        return LabelStore(folder, made_from, self.num_classes, self.top_k)

    def _fill(self, store: LabelStore, loader: "RelabelledLoader") -> None:
        rank, world_size, _ = self._placement()
        missing = [epoch for epoch in range(rank, self.label_epochs, world_size) if not store.holds(epoch)]
        if missing and self.committee is None:
            raise UsageError(
                f"data.label_folder: {store.folder} has no labels of epoch {missing[0]}, counted from 0, and there are "
                "no data.teachers to make them; lower data.label_epochs, or give the teachers"
            )
        lost = []
        for epoch in tqdm(missing, desc="soft labels", unit="epoch", disable=not missing or rank > 0):
            lost.append(store.write(epoch, torch.cat([logits for _, _, logits in loader.whole_batches(epoch)])))
        if lost:
            rank_zero_info(
                f"soft labels in {store.folder}: {self.label_epochs * store.nbytes(self._served()):,} bytes; "
                f"{sum(lost) / len(lost):.2%} of their variance over classes is lost by truncation and rounding"
            )
        if self.trainer is not None:
            self.trainer.strategy.barrier()


class RelabelledLoader(EpochLoader):
    """Batches of images that lie in memory, transformed whole, with labels for the result.

    Each process makes the whole batch and takes its share.

    Args:
        images: Normalized images (n, c, h, w).
        labels: Class numbers.
        transforms: What is done to a batch, in order, by name.
        teach: Labels a transformed batch; or holds the labels.
        device: Where all this takes place.
        sampler: See `EpochLoader`; so are the others.
        batch_size: See `EpochLoader`.
        sampling: See `EpochLoader`.
    """

    def __init__(
        self,
        images: Float[Tensor, "n c h w"],
        labels: Int[Tensor, " n"],
        transforms: Mapping[str, Transform],
        teach: Callable[[Tensor], Tensor] | LabelStore,
        device: torch.device | str,
        sampler: EpochPermutation,
        batch_size: int,
        **sampling: Any,
    ) -> None:
        super().__init__(sampler, batch_size, **sampling)
        self.device = torch.device(device)
        self.images = images.to(self.device)
        self.labels = labels.to(self.device)
        self.transforms = dict(transforms)
        self.teach = teach

    def whole_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields index (b,), images (b, c, h, w) and logits (b, k) of an epoch's batches from number `start` on."""
        order = self._order(epoch)
        stored = self.teach.read(epoch).to(self.device) if isinstance(self.teach, LabelStore) else None
        for number in range(start, len(self)):
            first, stop = self._bounds(number)
            index = order[first:stop].to(self.device)
            images = take_samples(self.images, index)
            for name, transform in self.transforms.items():
                generator = torch.Generator().manual_seed(derived_seed(name, self.sampler.seed, epoch, number))
                images = transform(images, transform.draw(len(index), generator))
            logits = self.teach(images) if callable(self.teach) else stored[first:stop]  # type: ignore[index]  # it is stored
            yield index, images, logits

    def _batches(self, epoch: int, start: int) -> Iterator[ImageBatch]:
        for index, images, logits in self.whole_batches(epoch, start):
            share = self._share(len(index))
            yield ImageBatch(images[share], self.labels[index[share]], index[share], targets=logits[share])

    def _order(self, epoch: int) -> Tensor:
        order = EpochPermutation(len(self.sampler), self.sampler.seed, shuffle=self.sampler.shuffle)
        order.set_epoch(epoch)
        return order.order()
