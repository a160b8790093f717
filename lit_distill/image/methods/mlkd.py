"""Multi-level logit distillation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule, value_at
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import ImageDistiller, Outputs, Term
from lit_distill.image.losses.logits import MultiLevel
from lit_distill.losses.logits import multi_level_published


class MLKD(ImageDistiller):
    r"""The teacher's probabilities at several temperatures, its similarities of samples, and of classes.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha \sum_T \Big[
        \frac{T^2}{B} \sum_i \mathrm{KL}(p^t_i \,\|\, p^s_i)
        + \frac{1}{B} \lVert P^s {P^s}^\top - P^t {P^t}^\top \rVert_F^2
        + \frac{1}{K} \lVert {P^s}^\top P^s - {P^t}^\top P^t \rVert_F^2 \Big]

    The loss is summed over the views of the images: the second, strongly augmented one is there where the data has
    `strong_view: true`, as in the paper; each network then runs twice a step. With several views the sum is a reading
    of the paper, whose public code does something else: see `lit_distill.losses.logits.multi_level_published`, which
    `as_published` takes in the place of the sum over T (label terms are those of both views in either case).

    Args:
        student: The classifier to train.
        teacher: The frozen classifier.
        temperatures: The T summed over.
        unsure_only: Whether only samples and classes count of which the teacher is less sure than the median: what the
            masks of the public code are named for. No effect with `as_published`.
        as_published: Whether to compute what the public code computes, its oddities included. Temperatures are then 2
            to 6.
        standardize: Whether both networks' logits are standardized first.
        mlkd_weight: The alpha above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Multi-Level Logit Distillation",
        authors="Jin, Wang, Lin",
        year=2023,
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        unsure_only: bool = False,
        as_published: bool = False,
        standardize: bool = False,
        mlkd_weight: float | Schedule = 0.9,
        label_weight: float | Schedule = 0.1,
        **kwargs: Any,
    ) -> None:
        loss = MultiLevel(temperatures, unsure_only, standardize)
        super().__init__(student, teacher, [Term(loss, mlkd_weight)], label_weight, **kwargs)
        self.as_published = as_published

    def build(self) -> None:
        """Checks that the data has the views, then builds as every image method does."""
        if self.as_published and not getattr(self._data(), "strong_view", False):
            raise UsageError("model.as_published is true, which takes two views; set data.strong_view to true")
        super().build()

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Labels and multi-level terms of one view, or of both."""
        if batch.strong is None:
            return super().training_step(batch, batch_idx)
        assert self.teacher is not None
        with torch.no_grad():
            teacher = [self.teacher(images) for images in (batch.images, batch.strong)]
        student = [self.student(images) for images in (batch.images, batch.strong)]
        labels = torch.stack([F.cross_entropy(logits.float(), batch.labels) for logits in student]).sum()
        loss = self.losses["mlkd"]
        assert isinstance(loss, MultiLevel)
        if self.as_published:
            levels = multi_level_published(*student, *teacher, standardize=loss.standardize)
        else:
            views = ((Outputs(a, {}), Outputs(b, {})) for a, b in zip(student, teacher, strict=True))
            levels = torch.stack([loss(*view, batch, self.iteration) for view in views]).sum()
        label_weight, weight = (value_at(w, self.iteration) for w in (self.label_weight, self.weights["mlkd"]))
        return self.combine({"ce": label_weight * labels, "mlkd": weight * levels})
