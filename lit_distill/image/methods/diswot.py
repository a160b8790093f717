"""DisWOT: the two metrics that chose the student, as losses that train it."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.diswot import RelationSimilarity, SemanticSimilarity
from lit_distill.image.losses.logits import LogitKL


class DisWOT(ImageDistiller):
    r"""KD, and a student that follows the teacher in class semantics and in the relations of samples.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha \, T^2 \, \mathrm{KL}(p^t(T) \,\|\, p^s(T)) + \beta_s M_s
        + \beta_r M_r

    This is the paper's second form of retraining (marked with a dagger there); with both metrics' weights 0 it is the
    first, plain KD. The paper's factors 1/c^2 and 1/b^2 are in the terms. The semantic term is that of the public code
    (see `lit_distill.losses.diswot`), whose factor is 1 / (K D).

    Args:
        student: The classifier to train, such as the one that `DisWOTSearch` found.
        teacher: The frozen, trained classifier.
        temperature: T.
        kd_weight: The alpha above.
        semantic_weight: The beta of the semantic term.
        relation_weight: The beta of the relation term.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="DisWOT: Student Architecture Search for Distillation WithOut Training",
        authors="Dong, Li, Wei",
        year=2023,
        arxiv="2303.15678",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float | Schedule = 4.0,
        kd_weight: float | Schedule = 0.9,
        semantic_weight: float | Schedule = 1.0,
        relation_weight: float | Schedule = 1.0,
        label_weight: float | Schedule = 0.1,
        **kwargs: Any,
    ) -> None:
        terms = [
            Term(LogitKL(temperature), kd_weight),
            Term(SemanticSimilarity(), semantic_weight),
            Term(RelationSimilarity(), relation_weight),
        ]
        super().__init__(student, teacher, terms, label_weight, **kwargs)
