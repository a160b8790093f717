"""Losses between the relations of samples in a batch, and between the relations of channels.

Relations between samples are those of each process's own batch: under DDP they are not gathered, so the same batch on
more processes is less to relate.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import Outputs, Shapes
from lit_distill.image.losses.pairs import (
    EmbeddedPair,
    PairedEmbedding,
    PairedFeature,
    PairedMaps,
    check_ranks,
    check_several,
)
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


class SimilarityPreserving(PairedFeature):
    """Difference of the samples' similarities in the last maps, see `lit_distill.losses.relations`.

    Args:
        student_tap: Module in the student, of any shape; its last stage if None.
        teacher_tap: The same in the teacher.
    """

    name = "sp"

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        check_several(self, batch)
        return similarity_preserving(*self.pair(student, teacher))


class RelationalKD(PairedEmbedding):
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
        check_several(self, batch)
        pair = self.pair(student, teacher)
        return self.distance_weight * relational_distance(*pair) + self.angle_weight * relational_angle(*pair)


class ProbabilisticTransfer(PairedEmbedding):
    """Divergence of the samples' neighbor probabilities, see `lit_distill.losses.relations`."""

    name = "pkt"

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        check_several(self, batch)
        return probabilistic_transfer(*self.pair(student, teacher))


class CorrelationCongruence(EmbeddedPair):
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

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        check_several(self, batch)
        return correlation_congruence(*self.pair(student, teacher))


class KernelCongruence(PairedEmbedding):
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
        check_several(self, batch)
        return kernel_congruence(*self.pair(student, teacher), gamma=self.gamma, order=self.order)


class ChannelCorrelation(PairedFeature):
    """Difference of the channels' correlations in the last maps, see `lit_distill.losses.relations`.

    A 1x1 convolution with batch normalization carries the student's map to the teacher's number of channels, also where
    it has that number already.

    Args:
        student_tap: Module in the student that returns a map; its last stage if None.
        teacher_tap: The same in the teacher.
    """

    name = "ickd"

    def __init__(self, student_tap: str | None = None, teacher_tap: str | None = None) -> None:
        super().__init__(student_tap, teacher_tap)
        self.connector: nn.Module = nn.Identity()

    def build(self, shapes: Shapes) -> None:
        """Makes the connector."""
        check_ranks(self, shapes, ranks=(3,), wanted="(C, H, W)")
        (student, *_), (teacher, *_) = self.pair_of_shapes(shapes)
        self.connector = nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher))

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        own, target = self.pair(student, teacher)
        return channel_correlation(self.connector(own), target)


class NeuronSelectivity(PairedMaps):
    """Sum over stages of the discrepancy between sets of channels, see `lit_distill.losses.relations`.

    Args:
        student_taps: Module names in the student, shallow to deep; its stages if None.
        teacher_taps: As many in the teacher; its stages if None.
    """

    name = "nst"

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        return torch.stack([neuron_selectivity(*pair) for pair in self.pairs(student, teacher)]).sum()
