"""Flow of solution procedure."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Steps
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.fsp import FlowOfSolution
from lit_distill.image.losses.logits import LogitKL


class FSP(ImageDistiller):
    r"""The student starts from layers that relate to one another as the teacher's do; then it learns the task.

    .. math:: L = \begin{cases} \beta \sum_i \tfrac{1}{C_i C_{i+1}} \lVert G^s_i - G^t_i \rVert_F^2 &
        \text{first phase} \\ \gamma \, \mathrm{CE}(y, z^s) + \alpha \, T^2 \, \mathrm{KL}(p^t(T) \,\|\, p^s(T)) &
        \text{afterwards} \end{cases}, \qquad G_i = \tfrac{1}{HW} f_i f_{i+1}^\top

    Both phases are one run. In the first, of `init_iterations` batches, the student's classifier gets no gradient, so
    that DDP needs `--trainer.strategy ddp_find_unused_parameters_true`.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier, with as many channels at its taps as the student.
        student_taps: Module names, shallow to deep; if None what the student's first stage is given, and its stages.
        teacher_taps: As many module names; the same of the teacher if None.
        init_iterations: Length of the first phase, in batches: 30 epochs of CIFAR if not told otherwise.
        fsp_weight: The beta above.
        label_weight: The gamma above.
        kd_weight: The alpha above; labels alone if 0.
        temperature: T.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning",
        authors="Yim, Joo, Bae, Kim",
        year=2017,
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
        init_iterations: int = 30 * 781,
        fsp_weight: float = 1.0,
        label_weight: float = 1.0,
        kd_weight: float = 0.0,
        temperature: float = 4.0,
        **kwargs: Any,
    ) -> None:
        loss, main = FlowOfSolution(student_taps, teacher_taps), [init_iterations]
        terms = [Term(loss, Steps([fsp_weight, 0.0], main))]
        if kd_weight:
            terms.append(Term(LogitKL(temperature), Steps([0.0, kd_weight], main)))
        super().__init__(student, teacher, terms, Steps([0.0, label_weight], main), **kwargs)
        self.init_iterations = init_iterations
