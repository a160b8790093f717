"""SNOOPI: variational score distillation under random guidance, and negative prompts."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.methods.swiftbrush import SwiftBrush
from lit_distill.diffusion.nasa import NASAAttnProcessor, install_nasa, subtracting, with_negative
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.rollout import Sample


class SNOOPI(SwiftBrush):
    r"""SwiftBrush whose guidance scale is drawn anew for each sample, the same for teacher and fake score (PG-SB).

    .. math:: \hat\epsilon = (1 - \kappa) \, \epsilon(x_t) + \kappa \, \epsilon(x_t, y), \qquad
        \kappa \sim U(\text{low}, \text{high})

    kappa is this package's guidance scale: 1 is none. With `nasa` (NASA-T) the generator, too, learns to keep away
    from a negative prompt: `NASAAttnProcessor` with a ~ U(0, 1), while the teacher is guided away from the same
    negative prompt in place of "no condition"; the fake score is not. Where conditions are classes, another class is
    the negative one.

    A generator without `nasa` can have negative prompts, too, when it is used (NASA-I): see
    `lit_distill.diffusion.nasa.subtracting`.

    Args:
        student: The generator.
        teacher: The frozen denoiser.
        steps: Time of the generator's step.
        guidance_range: Smallest and largest kappa.
        nasa: Whether the generator is trained with negative prompts; data of prompts then have `negative_prompts`.
        kwargs: See `SwiftBrush`.

    Raises:
        UsageError: The range runs backward; or with `nasa`, the generator has no cross-attention, or the batch no
            negative prompts.
    """

    reference = Reference(
        title="SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance",
        authors="Nguyen, Nguyen, Dao, Nguyen, Pham, Tran, Tran",
        year=2024,
        arxiv="2412.02687",
        reconstruction=True,
    )

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        steps: Sequence[float],
        guidance_range: tuple[float, float] = (0.5, 4.0),
        nasa: bool = False,
        **kwargs: Any,
    ) -> None:
        low, high = guidance_range
        if low > high:
            raise UsageError(f"model.guidance_range is {[low, high]}; give the smaller one first")
        # The base checks that there is "no condition" where one scale is not 1.
        super().__init__(student, teacher, steps, guidance=low if low != 1 else high, **kwargs)
        self.guidance_range = (low, high)
        self.nasa = nasa
        self._processor: NASAAttnProcessor | None = None
        self._negative: Condition = None

    def build(self) -> None:
        """Prepares the generator's attention."""
        super().build()
        if self.nasa:
            self._processor = install_nasa(self.student.network)

    def guidance_scale(self, count: int, draws: Draws) -> Tensor:
        """Draws kappa, (B,)."""
        low, high = self.guidance_range
        return low + (high - low) * draws.uniform(count)

    def away_from(self, condition: Condition) -> Condition:
        """The negative prompts of this iteration, if there are any."""
        return self._negative

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """As the base's; with `nasa`, the generator subtracts all the while."""
        if self._processor is None:
            return super().training_step(batch, batch_idx)
        with subtracting(self._processor, self.draws("nasa").uniform(len(batch.index))):
            return super().training_step(batch, batch_idx)

    def conditions(self, batch: Any, draws: Draws) -> Condition:
        """Finds the negative prompts besides."""
        condition = super().conditions(batch, draws)
        if self.nasa:
            self._negative = self._negatives(batch, condition, draws)
        return condition

    def student_forward(self, batch: Any, condition: Condition, draws: Draws) -> Sample:
        """Makes the samples, away from the negative prompts."""
        if self.nasa:
            condition = with_negative(condition, self._negative)
        return super().student_forward(batch, condition, draws)

    def _negatives(self, batch: Any, condition: Condition, draws: Draws) -> Condition:
        negative = getattr(batch, "negative", None)
        if negative is not None:
            return negative
        if isinstance(condition, Tensor) and self.student.num_classes and self.student.num_classes > 1:
            others = draws.integers(self.student.num_classes - 1, len(condition))
            return (condition + 1 + others) % self.student.num_classes
        raise UsageError("data.negative_prompts: model.nasa learns from negative prompts; give a file of them")
