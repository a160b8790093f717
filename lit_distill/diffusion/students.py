"""Several generators that share the classes among them: who has which, who answers, and data in their turn."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.loading import EpochLoader, EpochPermutation
from lit_distill.diffusion.data import GeneratorImages
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.paths import Prediction
from lit_distill.image.data.base import ImageDataModule


class ClassPartition:
    """Classes in parts: each class in one, sizes as equal as can be.

    Args:
        num_classes: Number of classes.
        parts: Number of parts, of consecutive classes (what ImageNet lists together is alike); or the parts themselves,
            such as clusters of classes.

    Raises:
        UsageError: There are more parts than classes, or the parts leave a class out or have it twice.
    """

    def __init__(self, num_classes: int, parts: int | Sequence[Sequence[int]] = 1) -> None:
        if isinstance(parts, int):
            if not 1 <= parts <= num_classes:
                raise UsageError(f"parts: {parts} are no number of parts of {num_classes} classes; give 1 to that many")
            self.groups = list(torch.arange(num_classes).tensor_split(parts))
        else:
            self.groups = [torch.tensor(list(group), dtype=torch.long) for group in parts]
        found = torch.cat(self.groups)
        if not torch.equal(found.sort().values, torch.arange(num_classes)) or not all(len(g) for g in self.groups):
            raise UsageError(
                f"parts: {[group.tolist() for group in self.groups]} do not have each of the {num_classes} classes "
                "once; give disjoint parts that cover them"
            )
        self.part_of = torch.empty(num_classes, dtype=torch.long)
        for number, group in enumerate(self.groups):
            self.part_of[group] = number

    def __len__(self) -> int:
        return len(self.groups)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassPartition) and torch.equal(self.part_of, other.part_of)

    __hash__ = None  # type: ignore[assignment]  # nobody keeps partitions in sets


class Turns(nn.ModuleList):
    """Networks of which one is called at a time: that whose turn it is."""

    turn = 0

    def forward(self, *args: Any) -> Any:
        """Calls that one."""
        return self.current(*args)

    @property
    def current(self) -> nn.Module:
        """The network whose turn it is."""
        return self[self.turn]


class StudentRouter(Denoiser):
    """One denoiser of several students: each sample goes to the student that has its class.

    A call costs what one student costs. It gives each class as often as it is asked for it, so it keeps any p(c).
    In training one student has its turn and gets everything, see `only`.

    Args:
        student: What all students begin as; each is a copy. It may be smaller than the teacher.
        parts: Number of students, or the classes of each, see `ClassPartition`.

    Raises:
        UsageError: The student knows no classes, or parts and classes do not fit.

    Attributes:
        network: The students, each a `Denoiser`.
        partition: Who has which classes.
    """

    network: nn.ModuleList
    part_of: Int[Tensor, " classes"]

    def __init__(self, student: Denoiser, parts: int | Sequence[Sequence[int]]) -> None:
        if student.num_classes is None:
            raise UsageError("model.student: it knows no classes to share among students; give one with num_classes")
        partition = ClassPartition(student.num_classes, parts)
        super().__init__(
            nn.ModuleList(copy.deepcopy(student) for _ in partition.groups),
            student.path,
            student.prediction,
            student.num_classes,
            student.data_std,
            student.time_input,
        )
        self.partition = partition
        self.register_buffer("part_of", partition.part_of, persistent=False)
        self._turn: int | None = None

    @contextmanager
    def only(self, number: int) -> Iterator[None]:
        """Has one student answer for all classes."""
        self._turn = number
        try:
            yield
        finally:
            self._turn = None

    def forward(
        self,
        x_t: Float[Tensor, "b *sample"],
        t: Float[Tensor, " b"] | float,
        condition: Condition = None,
        prediction: Prediction = "x0",
    ) -> Float[Tensor, "b *sample"]:
        """Denoises each sample with the student of its class."""
        if self._turn is not None:
            return self.network[self._turn](x_t, t, condition, prediction)
        if not isinstance(condition, Tensor):
            raise UsageError("model.student: students are chosen by class; give classes")
        t = torch.as_tensor(t, dtype=torch.float64, device=x_t.device).expand(len(x_t))
        parts = self.part_of[condition]
        out = torch.empty_like(x_t, dtype=torch.float32)
        for number, student in enumerate(self.network):
            own = (parts == number).nonzero()[:, 0]
            if len(own):
                out[own] = student(x_t[own], t[own], condition[own], prediction)
        return out

    def null_condition(self, condition: Condition) -> Condition:
        """There is none.

        Raises:
            UsageError: Always.
        """
        raise UsageError("model.sample_guidance: 'no class' belongs to no student; generate with 1.0")


class PartitionedImages(GeneratorImages):
    """Images in batches of one part of the classes each, the parts in turn.

    Args:
        source: See `GeneratorImages`.
        parts: As of the `StudentRouter`.
        turn: Batches before it is the next part's turn: `fake_updates` of the method.
        epoch_batches: Batches in an epoch.
        kwargs: See `GeneratorImages`.
    """

    def __init__(
        self,
        source: ImageDataModule,
        parts: int | Sequence[Sequence[int]],
        turn: int,
        epoch_batches: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(source, epoch_batches, **kwargs)
        check_least("data", 1, turn=turn)
        self.parts, self.turn, self.length = parts, turn, epoch_batches

    def read_parts(self) -> dict[str, Any]:
        """Reads the data, and says which of their classes are of which part."""
        parts = super().read_parts()
        self.partition = ClassPartition(self.num_classes, self.parts)
        return parts

    def part_at(self, epoch: int, batch_idx: int) -> int:
        """Says which part of the classes a batch is of."""
        return (epoch * self.length + batch_idx) // self.turn % len(self.partition)

    def make_loader(self, part: str, training: bool, device: torch.device, sampling: dict[str, Any]) -> EpochLoader:
        """Makes the loader of a part of the data."""
        if not training:
            return super().make_loader(part, training, device, sampling)
        return self.source.make_loader(part, training, device, {**sampling, "sampler": _InTurn(self)})


class _InTurn(EpochPermutation):
    """For each part of the classes one permutation of its samples after another, laid out in batches in turn."""

    def __init__(self, data: PartitionedImages) -> None:
        labels = data.part("train").labels
        super().__init__(len(labels), data.run_seed)
        self.data = data
        parts = data.partition.part_of[labels.cpu()]
        self.positions = [(parts == number).nonzero()[:, 0] for number in range(len(data.partition))]
        for number, own in enumerate(self.positions):
            if not len(own):
                raise UsageError(f"data.parts: no sample is of part {number}; give parts that the data have")

    def order(self) -> Tensor:
        """Returns the sample positions of the current epoch."""
        data, generator = self.data, self.generator()
        whose = torch.tensor([data.part_at(self.epoch, batch) for batch in range(data.length)])
        order = torch.empty(data.length, data.batch_size, dtype=torch.long)
        for number, own in enumerate(self.positions):
            batches = (whose == number).nonzero()[:, 0]
            passes = -(-len(batches) * data.batch_size // len(own))
            if passes:
                drawn = torch.cat([own[torch.randperm(len(own), generator=generator)] for _ in range(passes)])
                order[batches] = drawn[: len(batches) * data.batch_size].view(-1, data.batch_size)
        return order.flatten()

    def __len__(self) -> int:
        return self.data.length * self.data.batch_size
