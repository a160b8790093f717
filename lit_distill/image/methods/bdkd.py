"""Balanced divergences in online distillation."""

from collections.abc import Mapping
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.online import OnlineDistiller
from lit_distill.losses import forward_kl, reverse_kl
from lit_distill.losses.balanced import BalanceRule, balanced_divergence


class BDKD(OnlineDistiller):
    r"""A student and a teacher trained together; the student mixes forward and reverse divergence sample by sample.

    .. math::
        L_s &= \mathrm{CE}(y, z^s) + w \, T^2 \, \tfrac{1}{B} \sum_i
            \left[ a_i \, \mathrm{KL}(p^t_i \,\|\, p^s_i) + b_i \, \mathrm{KL}(p^s_i \,\|\, p^t_i) \right] \\
        L_t &= \mathrm{CE}(y, z^t) + w \, \lambda_t \, T^2 \, \mathrm{KL}(p^s \,\|\, p^t)

    Confirmed of the paper: both divergences in the student's loss, weights per sample by the gap between the entropies,
    one divergence as regulariser of the teacher. A reconstruction, since the equations could not be confirmed: the rule
    of the weights and nu (see `balance_weights`), the temperature, lambda, and that both losses come from one forward.
    With a high learning rate the reverse divergence wants clipped gradients and a warm-up of w.

    Args:
        student: The compact network.
        teacher: The larger network; it is trained too.
        rule: How the two divergences are weighed.
        nu: The larger weight of the two; 1 makes the divergence symmetric for every sample.
        temperature: T.
        teacher_divergence: Of the teacher's loss: "student_target" is the formula above, "teacher_first" has
            KL(p^t || p^s) instead, "none" leaves it out.
        teacher_divergence_weight: The lambda above.
        divergence_weight: The w above, a number or a schedule over iterations.
        sequential: See `OnlineDistiller`.
        clip_norm: See `OnlineDistiller`.
        kwargs: See `Distiller`.
    """

    reference = Reference(
        title="BD-KD: Balancing the Divergences for Online Knowledge Distillation",
        authors="Amara, Sepahvand, Meyer, Gross, Clark",
        year=2022,
        arxiv="2212.12965",
        reconstruction=True,
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        rule: BalanceRule = "entropy",
        nu: float = 2.0,
        temperature: float = 1.0,
        teacher_divergence: Literal["student_target", "teacher_first", "none"] = "student_target",
        teacher_divergence_weight: float = 1.0,
        divergence_weight: float | Schedule = 1.0,
        sequential: bool = False,
        clip_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, temperature, divergence_weight, sequential, clip_norm, **kwargs)
        if nu <= 0:
            raise UsageError(f"model.nu is {nu}; it must be above 0 (default 2; 1 weighs both divergences alike)")
        self.teacher = teacher
        self.rule: BalanceRule = rule
        self.nu = nu
        self.teacher_divergence = teacher_divergence
        self.teacher_divergence_weight = teacher_divergence_weight

    @property
    def networks(self) -> dict[str, nn.Module]:
        """`student` and `teacher`."""
        assert self.teacher is not None
        return {"student": self.student, "teacher": self.teacher}

    def divergence(self, name: str, logits: Mapping[str, Float[Tensor, "b k"]]) -> Float[Tensor, ""] | None:
        """Returns the balanced divergence for the student, the regulariser for the teacher."""
        if name == "student":
            return balanced_divergence(
                logits["student"], logits["teacher"], rule=self.rule, nu=self.nu, temperature=self.temperature
            )
        if self.teacher_divergence == "none":
            return None
        # Seen from the teacher, the student is the target: their parts in the arguments are exchanged.
        divergence = forward_kl if self.teacher_divergence == "student_target" else reverse_kl
        value = divergence(logits["teacher"], logits["student"], temperature=self.temperature)
        return self.teacher_divergence_weight * value
