"""Teacher-free knowledge distillation."""

from typing import Any

from torch import nn

from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.logits import VirtualTeacher


class TfKD(ImageDistiller):
    r"""A teacher made by hand in place of a network: label smoothing with softened targets.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha \, \mathrm{KL}(\mathrm{softmax}(u / T) \,\|\, p^s), \qquad
        u_k = a \text{ if } k = y, \text{ else } \frac{1 - a}{K - 1}

    This is the regularization form (Tf-KD reg). The other one of the paper, self-training, is `KD` with a trained
    network of the student's own architecture as the teacher (configs/image/tfkd_self.yaml).

    The defaults are those of the public code for ResNet-18 on CIFAR-100, where its factor of 100 undoes torch's mean
    over the 100 classes. Its temperatures and weights differ by network: 40 and 0.95, without that factor, for
    MobileNetV2.

    Args:
        student: The classifier to train.
        correct_probability: The a above.
        temperature: T.
        tfkd_weight: The alpha above.
        label_weight: The gamma above.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Revisiting Knowledge Distillation via Label Smoothing Regularization",
        authors="Yuan, Tay, Li, Wang, Feng",
        year=2019,
        arxiv="1909.11723",
    )

    def __init__(
        self,
        student: nn.Module,
        correct_probability: float = 0.99,
        temperature: float | Schedule = 20.0,
        tfkd_weight: float | Schedule = 0.1,
        label_weight: float | Schedule = 0.9,
        **kwargs: Any,
    ) -> None:
        loss = VirtualTeacher(correct_probability, temperature)
        super().__init__(student, terms=[Term(loss, tfkd_weight)], label_weight=label_weight, **kwargs)
