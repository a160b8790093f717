"""LELP: classes split along linear directions of the teacher's embedding."""

from typing import Any, Literal

from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.core.taps import probe
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.lelp import SubclassCrossEntropy
from lit_distill.image.subclasses import SubclassClassifier, SubclassSplitter


class LELP(ImageDistiller):
    r"""With few classes, logits say little; pseudo-subclasses carry more of what the teacher knows.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) - w \sum_{c,s} p_{c,s} \log q_{c,s}, \qquad
        p_{c,s} = p_c(\tau) \, \mathrm{softmax}_s(\langle v_{c,s}, h - \mu_c \rangle / \beta)

    q is the student's softmax over C * S outputs, h the teacher's embedding. The directions v of a class are the
    principal ones of its training samples, after what the teacher's head reads has been projected out, and turned at
    random. The teacher runs over the training set once for them, at the start of the fit. Labels see the summed
    probabilities; the paper leaves them out.

    The paper's S, beta and tau could not be confirmed. The defaults of tau and beta are 1; directions are scaled so
    that a class's subclass logits have variance 1, which is a choice made here and gives beta its unit. For one
    subclass and tau = 1 this would be KD with temperature 1.

    Args:
        student: A `SubclassClassifier`, which says what S is.
        teacher: The frozen classifier, with a linear head.
        splitter: How a class is split; see `lit_distill.image.subclasses`. LELP's own way if None.
        temperature: The tau above.
        subclass_temperature: The beta above.
        membership: The class whose directions a sample helps to find: its label's, or the one the teacher says (which
            needs no labels).
        teacher_tap: Module whose output is the embedding; the teacher's `penultimate` if None.
        lelp_weight: The w above.
        label_weight: The gamma above (the paper's alpha); 0 in the paper.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Linear Projections of Teacher Embeddings for Few-Class Distillation",
        authors="Loo, Iliopoulos, Hu, Vee",
        year=2024,
        arxiv="2409.20449",
        reconstruction=True,
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        splitter: SubclassSplitter | None = None,
        temperature: float = 1.0,
        subclass_temperature: float = 1.0,
        membership: Literal["labels", "teacher"] = "labels",
        teacher_tap: str | None = None,
        lelp_weight: float | Schedule = 1.0,
        label_weight: float | Schedule = 0.0,
        **kwargs: Any,
    ) -> None:
        loss = SubclassCrossEntropy(splitter, temperature, subclass_temperature, membership, teacher_tap)
        super().__init__(student, teacher, [Term(loss, lelp_weight)], label_weight, **kwargs)

    def build(self) -> None:
        """Checks the number of outputs, then builds as every method does."""
        if isinstance(self.student, SubclassClassifier):
            data, subclasses = self._data(), self.student.subclasses
            outputs = probe(self.student.network, data.sample_shape)[0].shape[1]
            if outputs != data.num_classes * subclasses:
                raise UsageError(
                    f"model.student: the network has {outputs} outputs, {data.num_classes} classes of {subclasses} "
                    f"subclasses need {data.num_classes * subclasses}; set its num_classes to that"
                )
        super().build()
