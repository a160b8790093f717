"""Losses of exits: classifiers at the stages of a student, taught by logits."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.losses.precision import in_float32
from lit_distill.losses.reduction import Reduction, reduce


@in_float32
def one_for_all(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    labels: Int[Tensor, " b"],
    *,
    exponent: float = 1.0,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes a cross-entropy against the teacher's probabilities, that of the labelled class enhanced.

    .. math:: - \sum_k w_k \log p^s_k(T), \qquad w_k = (p^t_k(T) + m_k)^\epsilon - m_k, \quad m = \mathrm{onehot}(y)

    This is the form of the authors' code. The paper writes the labelled class as (1 + p)^epsilon and leaves the other
    probabilities alone; the code raises all to epsilon, and takes the 1 of the labelled class away again, since the
    cross-entropy on labels is a term of its own. There is no factor T^2.

    With epsilon 1 the gradient with respect to the student's logits is that of KL(teacher || student). With a larger
    one the targets do not add up to 1: a teacher that is sure and right gives 2^epsilon - 1, a confused one less than
    1, so that samples count by the teacher's confidence. The gradient is (W p^s - w) / T with W = sum of w.

    Args:
        student_logits: (B, K), the student's own or those of an exit.
        teacher_logits: (B, K), detached here.
        labels: y (B,).
        exponent: epsilon, 1 or more.
        temperature: T > 0.
        reduction: "batchmean" (sum over classes, mean over samples), "sum", or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Hao et al., One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation,
    2023, arXiv 2310.19444.
    """
    teacher = F.softmax(teacher_logits.detach() / temperature, dim=1)
    label_mask = torch.zeros_like(teacher).scatter(1, labels[:, None], 1.0)
    target = (teacher + label_mask).pow(exponent) - label_mask
    return reduce(-(target * F.log_softmax(student_logits / temperature, dim=1)).sum(1), reduction)


@in_float32
def squared_distance(
    exit_feature: Float[Tensor, "b d"], deepest_feature: Float[Tensor, "b d"], *, reduction: Reduction = "batchmean"
) -> Tensor:
    r"""Computes the squared Euclidean distance between the features that an exit and the deepest classifier read.

    .. math:: \lVert F_i - F_C \rVert_2^2

    Args:
        exit_feature: F_i (B, D).
        deepest_feature: F_C (B, D), detached here.
        reduction: "batchmean", "sum" over samples, or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Zhang et al., Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self
    Distillation, 2019, arXiv 1905.08094.
    """
    return reduce((exit_feature - deepest_feature.detach()).square().sum(1), reduction)
