"""Knowledge distillation between graph networks."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.graph.distillation import GraphDistiller


class KD(GraphDistiller):
    r"""The student's tempered probabilities follow those of a frozen graph network, beside the labels.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha T^2 \, \mathrm{KL}(p^t(T) \,\|\, p^s(T))

    To a student around `DeepSets`, which sees no edges, this is the graph-level form of a graph-free student (Zhang,
    Liu, Sun, Shah, Graph-less Neural Networks, 2021, arXiv 2110.08727).

    Args:
        student: The `GraphNetwork` to train.
        teacher: The frozen `GraphNetwork`.
        temperature: T.
        kd_weight: The alpha above.
        label_weight: The gamma above.
        kwargs: See `Distiller`.
    """

    reference = Reference(
        title="Distilling the Knowledge in a Neural Network",
        authors="Hinton, Vinyals, Dean",
        year=2015,
        arxiv="1503.02531",
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
        super().__init__(
            student,
            teacher,
            feature_weight=0.0,
            temperature=temperature,
            kd_weight=kd_weight,
            label_weight=label_weight,
            **kwargs,
        )
