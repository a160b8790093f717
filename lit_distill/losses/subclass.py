"""Losses over classes that are split into pseudo-subclasses. Output c * S + s is subclass s of class c."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_distill.losses.precision import in_float32
from lit_distill.losses.reduction import Reduction, reduce


@in_float32
def subclass_targets(
    teacher_logits: Float[Tensor, "b c"],
    subclass_logits: Float[Tensor, "b c s"],
    *,
    temperature: float = 1.0,
    subclass_temperature: float = 1.0,
) -> Float[Tensor, "b cs"]:
    r"""Computes the soft targets of LELP: the teacher's class probabilities, each shared out among subclasses.

    .. math:: p_{c,s} = p_c(\tau) \, \frac{\exp(z_{c,s} / \beta)}{\sum_j \exp(z_{c,j} / \beta)},
        \qquad p(\tau) = \mathrm{softmax}(z^t / \tau)

    Their sum over the subclasses of a class is `p_c(tau)`: the target of vanilla knowledge distillation.

    Args:
        teacher_logits: (B, C), detached here.
        subclass_logits: z above, (B, C, S), detached here; -inf gives a subclass nothing.
        temperature: tau > 0.
        subclass_temperature: beta > 0. Large values share out evenly, small ones give all to one subclass.

    Returns:
        (B, C * S), rows sum to 1.

    Reference: Loo, Iliopoulos, Hu, Vee, Linear Projections of Teacher Embeddings for Few-Class Distillation, 2024,
    arXiv 2409.20449.
    """
    classes = F.softmax(teacher_logits.detach() / temperature, dim=-1)
    within = F.softmax(subclass_logits.detach() / subclass_temperature, dim=-1)
    return (classes.unsqueeze(-1) * within).flatten(1)


@in_float32
def subclass_cross_entropy(
    student_logits: Float[Tensor, "b cs"],
    teacher_targets: Float[Tensor, "b cs"],
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes the cross-entropy of the student's C * S outputs against soft targets: the loss of LELP.

    .. math:: - \sum_{c,s} p_{c,s} \log \mathrm{softmax}(z^s)_{c,s}

    It is KL(p || student) plus the entropy of p, in which no student takes part. The student's softmax has no
    temperature: only so does the gradient, summed over the subclasses of a class, equal that of cross-entropy with the
    target `p_c(tau)`.

    Args:
        student_logits: (B, C * S).
        teacher_targets: (B, C * S) probabilities from `subclass_targets`, detached here.
        reduction: "batchmean", "sum" over samples, or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: as `subclass_targets`.
    """
    return reduce(-(teacher_targets.detach() * F.log_softmax(student_logits, dim=-1)).sum(-1), reduction)


@in_float32
def class_logits(logits: Float[Tensor, "b cs"], *, subclasses: int) -> Float[Tensor, "b c"]:
    """Sums the probabilities of the subclasses of each class, in log space: `logsumexp` over S outputs.

    The softmax of the result is the sum of the softmax of the input.

    Args:
        logits: (B, C * S).
        subclasses: S, which divides the number of outputs.

    Returns:
        (B, C).
    """
    return logits.unflatten(1, (-1, subclasses)).logsumexp(-1)
