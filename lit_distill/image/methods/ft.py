"""Factor transfer."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Steps
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.ft import FactorTransfer


class FT(ImageDistiller):
    r"""The student's translated map follows factors that a paraphraser has drawn from the teacher's.

    .. math:: L = \begin{cases} w \, \mathrm{MSE}(P(f^t), f^t) & \text{first phase} \\
        \gamma \, \mathrm{CE}(y, z^s) + \beta \, \tfrac{1}{D} \Big\lVert \frac{F^t}{\lVert F^t \rVert_2} -
        \frac{F^s}{\lVert F^s \rVert_2} \Big\rVert_1 & \text{afterwards} \end{cases}

    Both phases are one run. In the first, of `init_iterations` batches, the paraphraser P is trained alone; the student
    only runs, which moves its batch statistics and nothing else. From then on the paraphraser is at rest. In either
    phase some parameters get no gradient, so that DDP needs `--trainer.strategy ddp_find_unused_parameters_true`.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_tap: Module name; the student's last stage if None.
        teacher_tap: Module name; the teacher's last stage if None.
        init_iterations: Length of the first phase, in batches: 30 epochs of CIFAR if not told otherwise.
        reconstruction_weight: The w above.
        ft_weight: The beta above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Paraphrasing Complex Network: Network Compression via Factor Transfer",
        authors="Kim, Park, Kwak",
        year=2018,
        arxiv="1802.04977",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_tap: str | None = None,
        teacher_tap: str | None = None,
        init_iterations: int = 30 * 781,
        reconstruction_weight: float = 1.0,
        ft_weight: float = 200.0,
        label_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = FactorTransfer(student_tap, teacher_tap, init_iterations)
        weight = Steps([reconstruction_weight, ft_weight], [init_iterations])
        super().__init__(
            student, teacher, [Term(loss, weight)], Steps([0.0, label_weight], [init_iterations]), **kwargs
        )
        self.init_iterations = init_iterations
