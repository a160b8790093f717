"""Feature distillation between graph networks: the student's readout follows the teacher's."""

from typing import Any

from torch import Tensor, nn

from lit_distill.core.projectors import hint_regressor
from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.graph.distillation import GraphDistiller
from lit_distill.graph.graphs import GraphBatch
from lit_distill.graph.models import GraphNetwork
from lit_distill.losses import hint_mse


class FeatureKD(GraphDistiller):
    r"""A linear map carries the student's readout into the teacher's space, where it is matched: a hint after pooling.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha T^2 \, \mathrm{KL}(p^t(T) \,\|\, p^s(T))
        + \beta \, \mathrm{MSE}(W f^s + b, f^t)

    f is what the head reads, before dropout. In one stage, and with one vector a graph: the paper trains the lower half
    of an image network on the hint first. The size of the hint is that of the teacher's readout, which for a sum grows
    with the graphs, and beta has to suit it.

    Args:
        student: The `GraphNetwork` to train.
        teacher: The frozen `GraphNetwork`.
        hint_weight: The beta above.
        kwargs: See `GraphDistiller`, but for `feature_weight`.
    """

    reference = Reference(
        title="FitNets: Hints for Thin Deep Nets",
        authors="Romero, Ballas, Kahou, Chassang, Gatta, Bengio",
        year=2014,
        arxiv="1412.6550",
    )
    term = "hint"
    tap = "dropout@input"

    def __init__(
        self, student: nn.Module, teacher: nn.Module, hint_weight: float | Schedule = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(student, teacher, feature_weight=hint_weight, **kwargs)

    def build(self) -> None:
        """Makes the linear map."""
        super().build()
        assert isinstance(self.student, GraphNetwork)
        assert isinstance(self.teacher, GraphNetwork)
        self.regressor = hint_regressor([self.student.head.in_features], [self.teacher.head.in_features])

    def compare(self, student: Tensor, teacher: Tensor, batch: GraphBatch) -> Tensor:
        """Returns the mean squared difference of the readouts."""
        return hint_mse(self.regressor(student), teacher)
