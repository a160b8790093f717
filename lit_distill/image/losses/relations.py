"""Losses between the relations of samples in a batch, and between the relations of channels.

Relations between samples are those of each process's own batch: under DDP they are not gathered, so the same batch on
more processes is less to relate.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import DistillationLoss, Outputs, Shapes, penultimate, stages
from lit_distill.losses.relations import (
    channel_correlation,
    correlation_congruence,
    kernel_congruence,
    neuron_selectivity,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)


class EmbeddingLoss(DistillationLoss):
    """Base of the losses that read what each network's head reads: vectors, or maps that are averaged to vectors.

    Args:
        student_tap: Module in the student; what it calls `penultimate` if None.
        teacher_tap: The same in the teacher.
    """

    def __init__(self, student_tap: str | None = None, teacher_tap: str | None = None) -> None:
        super().__init__([student_tap] if student_tap else [], [teacher_tap] if teacher_tap else [])

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes the penultimate layers where no tap was given."""
        self.student_taps = self.student_taps or (penultimate(student),)
        self.teacher_taps = self.teacher_taps or (penultimate(teacher),)

    def build(self, shapes: Shapes) -> None:
        """Checks that the taps are vectors or maps."""
        _check_shapes(self, shapes, ranks=(1, 3), wanted="(D,) or (C, H, W)")

    def embeddings(self, student: Outputs, teacher: Outputs) -> tuple[Float[Tensor, "b ds"], Float[Tensor, "b dt"]]:
        """Returns both networks' vectors; the teacher's are constants."""
        return (
            _pooled(student.features[self.student_taps[0]]),
            _pooled(teacher.features[self.teacher_taps[0]].detach()),
        )


class SimilarityPreserving(DistillationLoss):
    """Difference of the samples' similarities in the last maps, see `lit_distill.losses.relations`.

    Args:
        student_tap: Module in the student, of any shape; its last stage if None.
        teacher_tap: The same in the teacher.
    """

    name = "sp"

    def __init__(self, student_tap: str | None = None, teacher_tap: str | None = None) -> None:
        super().__init__([student_tap] if student_tap else [], [teacher_tap] if teacher_tap else [])

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes the last stages where no tap was given."""
        self.student_taps = self.student_taps or stages(student)[-1:]
        self.teacher_taps = self.teacher_taps or stages(teacher)[-1:]

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        _check_batch(self, batch)
        return similarity_preserving(student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]])


class RelationalKD(EmbeddingLoss):
    """Distances and angles between samples, see `lit_distill.losses.relations`.

    Args:
        student_tap: Module in the student; what it calls `penultimate` if None.
        teacher_tap: The same in the teacher.
        distance_weight: Weight of the distances.
        angle_weight: Weight of the angles.
    """

    name = "rkd"

    def __init__(
        self,
        student_tap: str | None = None,
        teacher_tap: str | None = None,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
    ) -> None:
        super().__init__(student_tap, teacher_tap)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        _check_batch(self, batch)
        pair = self.embeddings(student, teacher)
        return self.distance_weight * relational_distance(*pair) + self.angle_weight * relational_angle(*pair)


class ProbabilisticTransfer(EmbeddingLoss):
    """Divergence of the samples' neighbor probabilities, see `lit_distill.losses.relations`."""

    name = "pkt"

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        _check_batch(self, batch)
        return probabilistic_transfer(*self.embeddings(student, teacher))


class CorrelationCongruence(EmbeddingLoss):
    """Products of neighboring samples' embedding differences, see `lit_distill.losses.relations`.

    Both features are embedded by trained linear layers. So there is a trivial solution, equal embeddings that tell
    nothing. The larger the features are, the stronger the pull to it: where the weight is too large, the student's
    features may all die. Watch `train/ce`.

    Args:
        student_tap: Module in the student; what it calls `penultimate` if None.
        teacher_tap: The same in the teacher.
        dimensions: Width of the embeddings.
    """

    name = "cc"

    def __init__(self, student_tap: str | None = None, teacher_tap: str | None = None, dimensions: int = 128) -> None:
        super().__init__(student_tap, teacher_tap)
        self.dimensions = dimensions
        self.student_embedding: nn.Module = nn.Identity()
        self.teacher_embedding: nn.Module = nn.Identity()

    def build(self, shapes: Shapes) -> None:
        """Makes the embeddings."""
        super().build(shapes)
        self.student_embedding = nn.Linear(shapes.student[self.student_taps[0]][0], self.dimensions)
        self.teacher_embedding = nn.Linear(shapes.teacher[self.teacher_taps[0]][0], self.dimensions)

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        _check_batch(self, batch)
        student_feature, teacher_feature = self.embeddings(student, teacher)
        return correlation_congruence(self.student_embedding(student_feature), self.teacher_embedding(teacher_feature))


class KernelCongruence(EmbeddingLoss):
    """Difference of the samples' correlations under a Gaussian kernel: `CorrelationCongruence` as in its paper.

    Needs no embeddings. See `lit_distill.losses.relations.kernel_congruence`.

    Args:
        student_tap: Module in the student; what it calls `penultimate` if None.
        teacher_tap: The same in the teacher.
        gamma: Inverse width of the kernel.
        order: Where its Taylor series ends.
    """

    name = "cc_kernel"

    def __init__(
        self, student_tap: str | None = None, teacher_tap: str | None = None, gamma: float = 0.4, order: int = 2
    ) -> None:
        super().__init__(student_tap, teacher_tap)
        self.gamma = gamma
        self.order = order

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        _check_batch(self, batch)
        return kernel_congruence(*self.embeddings(student, teacher), gamma=self.gamma, order=self.order)


class ChannelCorrelation(DistillationLoss):
    """Difference of the channels' correlations in the last maps, see `lit_distill.losses.relations`.

    A 1x1 convolution with batch normalization carries the student's map to the teacher's number of channels, also where
    it has that number already.

    Args:
        student_tap: Module in the student that returns a map; its last stage if None.
        teacher_tap: The same in the teacher.
    """

    name = "ickd"

    def __init__(self, student_tap: str | None = None, teacher_tap: str | None = None) -> None:
        super().__init__([student_tap] if student_tap else [], [teacher_tap] if teacher_tap else [])
        self.connector: nn.Module = nn.Identity()

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes the last stages where no tap was given."""
        self.student_taps = self.student_taps or stages(student)[-1:]
        self.teacher_taps = self.teacher_taps or stages(teacher)[-1:]

    def build(self, shapes: Shapes) -> None:
        """Makes the connector."""
        _check_shapes(self, shapes, ranks=(3,), wanted="(C, H, W)")
        student, teacher = shapes.student[self.student_taps[0]][0], shapes.teacher[self.teacher_taps[0]][0]
        self.connector = nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher))

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        connected = self.connector(student.features[self.student_taps[0]])
        return channel_correlation(connected, teacher.features[self.teacher_taps[0]])


class NeuronSelectivity(DistillationLoss):
    """Sum over stages of the discrepancy between sets of channels, see `lit_distill.losses.relations`.

    Args:
        student_taps: Module names in the student, shallow to deep; its stages if None.
        teacher_taps: As many in the teacher; its stages if None.
    """

    name = "nst"

    def __init__(self, student_taps: Sequence[str] | None = None, teacher_taps: Sequence[str] | None = None) -> None:
        super().__init__(student_taps or (), teacher_taps or ())

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes the stages where no taps were given."""
        self.student_taps = self.student_taps or stages(student)
        self.teacher_taps = self.teacher_taps or stages(teacher)

    def build(self, shapes: Shapes) -> None:
        """Checks that the taps are maps, in pairs."""
        if len(self.student_taps) != len(self.teacher_taps):
            raise UsageError(
                f"{self.name}: {len(self.student_taps)} student taps and {len(self.teacher_taps)} teacher taps; "
                "give student_taps and teacher_taps in pairs"
            )
        _check_shapes(self, shapes, ranks=(3,), wanted="(C, H, W)")

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        pairs = zip(self.student_taps, self.teacher_taps, strict=True)
        values = [neuron_selectivity(student.features[s], teacher.features[t]) for s, t in pairs]
        return sum(values[1:], start=values[0])


def _pooled(feature: Tensor) -> Tensor:
    return feature.mean((2, 3)) if feature.ndim == 4 else feature


def _check_shapes(loss: DistillationLoss, shapes: Shapes, *, ranks: tuple[int, ...], wanted: str) -> None:
    taps = [(tap, shapes.student[tap]) for tap in loss.student_taps]
    taps += [(tap, shapes.teacher[tap]) for tap in loss.teacher_taps]
    for tap, shape in taps:
        if len(shape) not in ranks:
            raise UsageError(f"{loss.name}: tap '{tap}' has shape {shape}; tap modules that return {wanted}")


def _check_batch(loss: DistillationLoss, batch: ImageBatch) -> None:
    if len(batch.index) < 2:
        raise UsageError(
            f"data.batch_size: {loss.name} relates the samples of a batch, and each process has 1; "
            "give 2 or more per process"
        )
