"""Knowledge review."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.projectors import AttentionFusion
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import Outputs, Shapes, penultimate, pre_activations, stages
from lit_distill.image.losses.pairs import PairedMaps, check_ranks
from lit_distill.losses.maps import hierarchical_context


class KnowledgeReview(PairedMaps):
    """Fused student maps against the teacher's, see `lit_distill.losses.maps.hierarchical_context`.

    From deep to shallow, each student map is fused with the deeper ones (`lit_distill.core.projectors.AttentionFusion`)
    and compared with the teacher's map of its level. The deepest level is the embedding, a map of one pixel.

    Args:
        student_taps: Module names in the student, shallow to deep, the last of them the embedding (B, D); its stages
            and its penultimate layer if None.
        teacher_taps: As many in the teacher; its stages before their last activation and its penultimate layer if None.
        max_mid_channels: The fused maps have as many channels as the student's embedding, but not more than this.
    """

    name = "review"

    def __init__(
        self,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
        max_mid_channels: int = 512,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if max_mid_channels < 1:
            raise UsageError(f"max_mid_channels is {max_mid_channels}; give 1 or more")
        self.max_mid_channels = max_mid_channels
        self.fusions = nn.ModuleList()

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes stages and embeddings where no taps were given."""
        self.student_taps = self.student_taps or (*stages(student), penultimate(student))
        self.teacher_taps = self.teacher_taps or (*pre_activations(teacher), penultimate(teacher))

    def build(self, shapes: Shapes) -> None:
        """Makes the fusions, shallow to deep."""
        pairs = self.pairs_of_shapes(shapes)
        mid = min(self.max_mid_channels, pairs[-1][0][0])
        for level, (student, teacher) in enumerate(pairs):
            channels, height, width = teacher if len(teacher) == 3 else (*teacher, 1, 1)
            fuse = level < len(pairs) - 1
            self.fusions.append(AttentionFusion(student[0], mid, (channels, height, width), fuse))

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        values, deeper = [], None
        for fusion, pair in zip(reversed(self.fusions), reversed(self.pairs(student, teacher)), strict=True):
            own, target = (feature if feature.ndim == 4 else feature[:, :, None, None] for feature in pair)
            fused, deeper = fusion(own, deeper)
            values.append(hierarchical_context(fused, target))
        return torch.stack(values).sum()

    def check_maps(self, shapes: Shapes) -> None:
        """Checks that all taps are maps, of which the deepest may be one of one pixel, a vector."""
        check_ranks(self, shapes, ranks=(3,), wanted="(C, H, W)", taps=slice(-1))
        check_ranks(self, shapes, ranks=(1, 3), wanted="(D,) or (C, H, W)", taps=slice(-1, None))
