"""SRe2L: images recovered from one trained network."""

from typing import Any, Literal

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.dataset.committee import Committee
from lit_distill.dataset.recovery import Recovery


class SRe2L(Recovery):
    r"""Noise becomes what one trained network takes for each class, under the statistics that it remembers.

    .. math:: L = \mathrm{CE}(f(A(\tilde x)), y) + r \, R(A(\tilde x))

    The network that was "squeezed" is an ordinary run on all data. The optional penalties of the paper, total variation
    and squared norm, are 0 in the released commands and left out.

    SRe2L++, the strong baseline of CV-DD (model setting 0 of its public code), begins with real images (`init: real`),
    and crops small images, too; the rest of it, labels by batch statistics and a smoothed learning rate, is a matter of
    what is done with the images afterwards.

    Args:
        student: See `Recovery`.
        teacher: The trained network, with batch normalization.
        init: "noise", or "real" images.
        kwargs: See `Recovery`.
    """

    reference = Reference(
        title="Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective",
        authors="Yin, Xing, Shen",
        year=2023,
        arxiv="2306.13092",
    )

    def __init__(
        self, student: nn.Module, teacher: nn.Module, init: Literal["real", "noise"] = "noise", **kwargs: Any
    ) -> None:
        super().__init__(student, Committee([teacher]), init=init, **kwargs)

    def votes(self, number: int) -> dict[int, float]:
        """The one network."""
        return {0: 1.0}
