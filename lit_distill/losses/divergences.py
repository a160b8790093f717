"""Divergences between class distributions. Computed in float32 and in log space, whatever the networks run in."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_distill.losses.reduction import Reduction, reduce


def forward_kl(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes KL(teacher || student) of tempered softmaxes: the loss of vanilla knowledge distillation.

    .. math:: T^2 \sum_k p^t_k(T) \, (\log p^t_k(T) - \log p^s_k(T)), \qquad p(T) = \mathrm{softmax}(z / T)

    The teacher is a constant. Its gradient with respect to the student's logits is `T (p^s(T) - p^t(T))`, so that with
    the factor T^2 the size of the gradient hardly depends on T.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K), detached here.
        temperature: T > 0.
        scale_by_t2: Whether the factor T^2 stands in front.
        reduction: "batchmean" (sum over classes, mean over samples), "sum", or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.
    """
    log_student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    value = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    return reduce(value * temperature**2 if scale_by_t2 else value, reduction)


def reverse_kl(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes KL(student || teacher) of tempered softmaxes: mode seeking where `forward_kl` is mode covering.

    Its gradient with respect to the student's logits (T = 1) is `p^s * ((log p^s - log p^t) - KL)`.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K), detached here.
        temperature: T > 0.
        scale_by_t2: Whether the factor T^2 stands in front.
        reduction: "batchmean", "sum", or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Kullback and Leibler 1951; as a distillation loss, Gu et al., MiniLLM, 2023, arXiv 2306.08543.
    """
    log_student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    value = (log_student.exp() * (log_student - log_teacher)).sum(-1)
    return reduce(value * temperature**2 if scale_by_t2 else value, reduction)
