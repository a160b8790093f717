"""What losses between features share: one feature of each network, or maps in pairs from shallow to deep."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import DistillationLoss, Outputs, Shapes, penultimate, stages


class PairedFeature(DistillationLoss):
    """Base of losses that compare one feature of the student with one of the teacher.

    Args:
        student_tap: Module name in the student; what `default_tap` says if None.
        teacher_tap: The same in the teacher.
    """

    def __init__(self, student_tap: str | None = None, teacher_tap: str | None = None) -> None:
        super().__init__([student_tap] if student_tap else [], [teacher_tap] if teacher_tap else [])

    def default_tap(self, network: nn.Module) -> str:
        """Returns the tap of a network for which none was given: its last stage."""
        return stages(network)[-1]

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes the default taps where none were given."""
        self.student_taps = self.student_taps or (self.default_tap(student),)
        self.teacher_taps = self.teacher_taps or (self.default_tap(teacher),)

    def pair_of_shapes(self, shapes: Shapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the student's and the teacher's shape, without the batch dimension."""
        return shapes.student[self.student_taps[0]], shapes.teacher[self.teacher_taps[0]]

    def pair(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """Returns the student's and the teacher's feature."""
        return student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]]


class PairedEmbedding(PairedFeature):
    """Base of losses that read what each network's head reads: vectors, or maps that are averaged to vectors."""

    def default_tap(self, network: nn.Module) -> str:
        """Returns a network's penultimate layer."""
        return penultimate(network)

    def build(self, shapes: Shapes) -> None:
        """Checks that the taps are vectors or maps."""
        check_ranks(self, shapes, ranks=(1, 3), wanted="(D,) or (C, H, W)")

    def pair(self, student: Outputs, teacher: Outputs) -> tuple[Float[Tensor, "b ds"], Float[Tensor, "b dt"]]:
        """Returns both networks' vectors; the teacher's are constants."""
        own, target = super().pair(student, teacher)
        return pooled(own), pooled(target.detach())


class EmbeddedPair(PairedEmbedding):
    """Base of losses that embed each network's vector by a linear layer, which is trained.

    Args:
        student_tap: Module in the student; what it calls `penultimate` if None.
        teacher_tap: The same in the teacher.
        dimensions: Width of the embeddings.
    """

    def __init__(self, student_tap: str | None = None, teacher_tap: str | None = None, dimensions: int = 128) -> None:
        super().__init__(student_tap, teacher_tap)
        self.dimensions = dimensions
        self.student_embedding: nn.Module = nn.Identity()
        self.teacher_embedding: nn.Module = nn.Identity()

    def build(self, shapes: Shapes) -> None:
        """Makes the embeddings."""
        super().build(shapes)
        (student, *_), (teacher, *_) = self.pair_of_shapes(shapes)
        self.student_embedding = nn.Linear(student, self.dimensions)
        self.teacher_embedding = nn.Linear(teacher, self.dimensions)

    def pair(self, student: Outputs, teacher: Outputs) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Returns the embeddings of both networks' vectors."""
        own, target = super().pair(student, teacher)
        return self.student_embedding(own), self.teacher_embedding(target)


class PairedMaps(DistillationLoss):
    """Base of losses that compare each map of the student with one of the teacher.

    Args:
        student_taps: Module names in the student, shallow to deep; what `default_taps` says if None.
        teacher_taps: As many in the teacher.
    """

    def __init__(self, student_taps: Sequence[str] | None = None, teacher_taps: Sequence[str] | None = None) -> None:
        super().__init__(student_taps or (), teacher_taps or ())

    def default_taps(self, network: nn.Module) -> tuple[str, ...]:
        """Returns the taps of a network for which none were given: its stages."""
        return stages(network)

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes the default taps where none were given."""
        self.student_taps = self.student_taps or self.default_taps(student)
        self.teacher_taps = self.teacher_taps or self.default_taps(teacher)

    def build(self, shapes: Shapes) -> None:
        """Checks that the taps are maps, in pairs."""
        self.pairs_of_shapes(shapes)

    def pairs_of_shapes(self, shapes: Shapes) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Returns the student's and the teacher's shape of each pair.

        Raises:
            UsageError: The numbers of taps differ, or a tap is not a map.
        """
        if len(self.student_taps) != len(self.teacher_taps):
            raise UsageError(
                f"{self.name}: {len(self.student_taps)} student taps and {len(self.teacher_taps)} teacher taps; "
                "give student_taps and teacher_taps in pairs"
            )
        self.check_maps(shapes)
        pairs = zip(self.student_taps, self.teacher_taps, strict=True)
        return [(shapes.student[s], shapes.teacher[t]) for s, t in pairs]

    def check_maps(self, shapes: Shapes) -> None:
        """Checks that all taps are maps."""
        check_ranks(self, shapes, ranks=(3,), wanted="(C, H, W)")

    def pairs(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Returns the student's and the teacher's map of each pair."""
        pairs = zip(self.student_taps, self.teacher_taps, strict=True)
        return [(student.features[s], teacher.features[t]) for s, t in pairs]


def pooled(feature: Float[Tensor, "b c ..."]) -> Float[Tensor, "b c"]:
    """Averages maps to vectors, and leaves vectors as they are."""
    return feature.mean((2, 3)) if feature.ndim == 4 else feature


def check_ranks(
    loss: DistillationLoss, shapes: Shapes, *, ranks: Sequence[int], wanted: str, taps: slice = slice(None)
) -> None:
    """Checks how many dimensions the tapped features have, the batch's left out.

    Args:
        loss: The loss whose taps are checked.
        shapes: Probed shapes.
        ranks: Numbers of dimensions that will do.
        wanted: Their shapes, for the message.
        taps: Which of the taps.

    Raises:
        UsageError: A feature has another number.
    """
    found = [("student", tap, shapes.student[tap]) for tap in loss.student_taps[taps]]
    found += [("teacher", tap, shapes.teacher[tap]) for tap in loss.teacher_taps[taps]]
    for role, tap, shape in found:
        if len(shape) not in ranks:
            raise UsageError(
                f"{loss.name}: {role} tap '{tap}' has shape {shape}; tap modules that return {wanted}, "
                "or take a method that compares logits or embeddings"
            )


def check_several(loss: DistillationLoss, batch: ImageBatch) -> None:
    """Checks that a batch has samples to relate.

    Raises:
        UsageError: It has one.
    """
    if len(batch.index) < 2:
        raise UsageError(
            f"data.batch_size: {loss.name} relates the samples of a batch, and each process has 1; "
            "give 2 or more per process"
        )
