"""Losses that compare maps in pairs, from shallow to deep."""

from collections.abc import Sequence

from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.image.distillation import DistillationLoss, Outputs, Shapes, stages


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

    def paired_shapes(self, shapes: Shapes) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Returns the student's and the teacher's shape of each pair.

        Raises:
            UsageError: The numbers of taps differ, or a tap is not a map.
        """
        student = [(tap, shapes.student[tap]) for tap in self.student_taps]
        teacher = [(tap, shapes.teacher[tap]) for tap in self.teacher_taps]
        if len(student) != len(teacher):
            raise UsageError(
                f"{self.name}: {len(student)} student taps and {len(teacher)} teacher taps; "
                "give student_taps and teacher_taps in pairs"
            )
        for role, taps in (("student", student), ("teacher", teacher)):
            for tap, shape in taps:
                self._check_map(role, tap, shape)
        return [(s, t) for (_, s), (_, t) in zip(student, teacher, strict=True)]

    def paired_features(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Returns the student's and the teacher's map of each pair."""
        pairs = zip(self.student_taps, self.teacher_taps, strict=True)
        return [(student.features[s], teacher.features[t]) for s, t in pairs]

    def _check_map(self, role: str, tap: str, shape: tuple[int, ...]) -> None:
        if len(shape) != 3:
            raise UsageError(
                f"{self.name}: {role} tap '{tap}' has shape {shape}; tap modules that return maps (C, H, W), "
                "or take a method that compares logits or embeddings"
            )
