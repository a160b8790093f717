"""Activation boundaries."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Steps
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.ab import ActivationBoundary
from lit_distill.image.losses.logits import LogitKL


class AB(ImageDistiller):
    r"""The student starts from neurons that fire where the teacher's do; then it learns the task.

    .. math:: L = \begin{cases} \beta \sum_{i=1}^{L} 2^{i-L} \, A_m(r_i(f^s_i), f^t_i) & \text{first phase} \\
        \gamma \, \mathrm{CE}(y, z^s) + \alpha \, T^2 \, \mathrm{KL}(p^t(T) \,\|\, p^s(T)) & \text{afterwards}
        \end{cases}

    A is the squared hinge of `lit_distill.losses.maps.activation_boundary`, r the connectors. Both phases are one run.
    In the first, of `init_iterations` batches, the student's classifier gets no gradient, so that DDP needs
    `--trainer.strategy ddp_find_unused_parameters_true`.

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        student_taps: Module names, shallow to deep, before activations; what the student names if None.
        teacher_taps: As many module names; what the teacher names if None.
        margin: The m above.
        init_iterations: Length of the first phase, in batches: 30 epochs of CIFAR if not told otherwise.
        ab_weight: The beta above.
        label_weight: The gamma above.
        kd_weight: The alpha above; labels alone if 0.
        temperature: T.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons",
        authors="Heo, Lee, Yun, Choi",
        year=2018,
        arxiv="1811.03233",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
        margin: float = 1.0,
        init_iterations: int = 30 * 781,
        ab_weight: float = 3 / 1000,
        label_weight: float = 1.0,
        kd_weight: float = 0.0,
        temperature: float = 4.0,
        **kwargs: Any,
    ) -> None:
        loss, main = ActivationBoundary(student_taps, teacher_taps, margin), [init_iterations]
        terms = [Term(loss, Steps([ab_weight, 0.0], main))]
        if kd_weight:
            terms.append(Term(LogitKL(temperature), Steps([0.0, kd_weight], main)))
        super().__init__(student, teacher, terms, Steps([0.0, label_weight], main), **kwargs)
        self.init_iterations = init_iterations
