"""Factor transfer."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import Outputs, Shapes
from lit_distill.image.losses.pairs import PairedFeature, check_ranks
from lit_distill.losses import hint_mse
from lit_distill.losses.maps import factor_transfer


class FactorTransfer(PairedFeature):
    """The student's translated map follows the teacher's factors, see `lit_distill.losses.maps.factor_transfer`.

    While `iteration < init_iterations` the loss is the mean squared error with which the paraphraser, an autoencoder,
    reconstructs the teacher's map: nothing of it reaches the student. From then on the paraphraser is at rest, in eval
    mode and without gradient, and the loss is that of the factors.

    Paraphraser: three 3x3 convolutions to factors of half the teacher's channels, three transposed ones back; each with
    BatchNorm and leaky ReLU of slope 0.1. Translator: the same three convolutions on the student's map. Some public
    code leaves the paraphraser's BatchNorm out.

    Args:
        student_tap: Module name in the student; its last stage if None.
        teacher_tap: Module name in the teacher; its last stage if None.
        init_iterations: Length of the paraphraser's own training, in batches.
    """

    name = "ft"

    def __init__(
        self, student_tap: str | None = None, teacher_tap: str | None = None, init_iterations: int = 30 * 781
    ) -> None:
        super().__init__(student_tap, teacher_tap)
        if init_iterations < 1:
            raise UsageError(f"init_iterations is {init_iterations}; give the paraphraser at least 1 batch")
        self.init_iterations = init_iterations
        self.paraphraser = nn.Sequential()
        self.translator: nn.Module = nn.Identity()

    def build(self, shapes: Shapes) -> None:
        """Makes paraphraser and translator."""
        check_ranks(self, shapes, ranks=(3,), wanted="(C, H, W)")
        (own, *_), (others, *_) = self.pair_of_shapes(shapes)
        factors = max(others // 2, 1)
        self.paraphraser = nn.Sequential(
            _layers(nn.Conv2d, others, others, factors, factors),
            _layers(nn.ConvTranspose2d, factors, factors, others, others),
        )
        self.translator = _layers(nn.Conv2d, own, own, factors, factors)

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch: the paraphraser's own in the first phase, that of the factors afterwards."""
        own, target = self.pair(student, teacher)
        if iteration < self.init_iterations:
            return hint_mse(self.paraphraser(target), target)
        if self.paraphraser.training:
            self.paraphraser.eval()
        with torch.no_grad():
            factor = self.paraphraser[0](target)
        return factor_transfer(self.translator(own), factor)


def _layers(convolution: type[nn.Conv2d] | type[nn.ConvTranspose2d], *channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [convolution(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)
