"""Teacher-assistant knowledge distillation."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.methods.kd import KD


class TAKD(KD):
    r"""One step of a chain of `KD` runs that ends at the student: teacher to assistant, assistant to student.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha \, T^2 \, \mathrm{KL}(p^a(T) \,\|\, p^s(T))

    The paper's observation is that a student can be too small for its teacher. An assistant of a size between the two
    is distilled from the teacher first and then teaches the student in its place. The step is KD unchanged, with the
    assistant a as the teacher: what is new is the order of runs, which a recipe writes down
    (configs/recipes/takd.yaml). A longer chain is more stages. The student never sees the large teacher.

    The paper tuned temperature and weights for each experiment; the defaults are those of `KD`.

    Args:
        student: The classifier to train: the student, or an assistant on the way to it.
        teacher: What the step before has left, frozen: an assistant, or the teacher for the first step.
        temperature: T.
        kd_weight: The alpha above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Improved Knowledge Distillation via Teacher Assistant",
        authors="Mirzadeh, Farajtabar, Li, Levine, Matsukawa, Ghasemzadeh",
        year=2019,
        arxiv="1902.03393",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float | Schedule = 4.0,
        kd_weight: float | Schedule = 0.9,
        label_weight: float | Schedule = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, temperature, kd_weight, label_weight, **kwargs)
