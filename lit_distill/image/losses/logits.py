"""Losses that compare logits."""

from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.core.schedules import Schedule, value_at
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import DistillationLoss, Outputs
from lit_distill.losses import forward_kl


class LogitKL(DistillationLoss):
    """T^2 KL(teacher || student) of the logits, see `lit_distill.losses.forward_kl`.

    Args:
        temperature: T, a number or a schedule over iterations.
    """

    name = "kd"

    def __init__(self, temperature: float | Schedule = 4.0) -> None:
        super().__init__()
        if not isinstance(temperature, Schedule) and temperature <= 0:
            raise UsageError(f"temperature is {temperature}; it must be above 0 (usual: 1 to 8)")
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        return forward_kl(student.logits, teacher.logits, temperature=value_at(self.temperature, iteration))
