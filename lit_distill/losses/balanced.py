"""Forward and reverse divergence of one sample, weighed by which of the two networks is the surer."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_distill.losses.divergences import forward_kl, reverse_kl
from lit_distill.losses.precision import in_float32
from lit_distill.losses.reduction import Reduction, reduce

BalanceRule = Literal["entropy", "entropy_swapped", "constant", "forward"]


def balanced_divergence(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    *,
    rule: BalanceRule = "entropy",
    nu: float = 2.0,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes the student's divergence of BD-KD.

    .. math:: T^2 \left[ a_i \, \mathrm{KL}(p^t_i \,\|\, p^s_i) + b_i \, \mathrm{KL}(p^s_i \,\|\, p^t_i) \right]

    with the weights of `balance_weights`, which are constants, as is the teacher. With `nu` 1 it is Jeffreys'
    symmetric divergence (under every rule but "forward").

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K), detached here.
        rule: See `balance_weights`.
        nu: See `balance_weights`.
        temperature: T > 0.
        scale_by_t2: Whether the factor T^2 stands in front.
        reduction: "batchmean" (sum over classes, mean over samples), "sum", or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Amara et al., BD-KD: Balancing the Divergences for Online Knowledge Distillation, 2022, arXiv 2212.12965.
    """
    forward_weight, reverse_weight = balance_weights(
        student_logits, teacher_logits, rule=rule, nu=nu, temperature=temperature
    )
    forward = forward_kl(
        student_logits, teacher_logits, temperature=temperature, scale_by_t2=scale_by_t2, reduction="none"
    )
    reverse = reverse_kl(
        student_logits, teacher_logits, temperature=temperature, scale_by_t2=scale_by_t2, reduction="none"
    )
    return reduce(forward_weight * forward + reverse_weight * reverse, reduction)


def balance_weights(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    *,
    rule: BalanceRule = "entropy",
    nu: float = 2.0,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    r"""Computes the weights a, b of the forward and the reverse divergence of each sample.

    That the gap between the entropies decides is the paper's; the rule is a reconstruction, since its equation could
    not be confirmed: where the student is the surer, :math:`H(p^s_i) < H(p^t_i)`, :math:`a_i = \nu` makes it cover
    what the teacher deems possible; elsewhere :math:`b_i = \nu` makes it seek the teacher's mode. The other is 1.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K).
        rule: "entropy" is the rule above; "entropy_swapped" exchanges a and b. Two controls spend the same total:
            "constant" with both at (1 + nu) / 2, "forward" with a at 1 + nu and b at 0.
        nu: The larger weight.
        temperature: T > 0 of the distributions, here as in the divergences.

    Returns:
        a and b, (B,) each, without gradient.

    Raises:
        ValueError: Another rule.
    """
    student_entropy, teacher_entropy = _entropy(student_logits, temperature), _entropy(teacher_logits, temperature)
    surer = (student_entropy < teacher_entropy).to(student_entropy.dtype)
    if rule == "constant":
        half = surer.new_full(surer.shape, (1 + nu) / 2)
        return half, half
    if rule == "forward":
        return surer.new_full(surer.shape, 1 + nu), torch.zeros_like(surer)
    toward_forward, toward_reverse = 1 + (nu - 1) * surer, nu + (1 - nu) * surer
    if rule == "entropy":
        return toward_forward, toward_reverse
    if rule == "entropy_swapped":
        return toward_reverse, toward_forward
    raise ValueError(f"rule is '{rule}'; use {', '.join(map(repr, get_args(BalanceRule)))}")


@in_float32
def _entropy(logits: Float[Tensor, "b k"], temperature: float) -> Float[Tensor, " b"]:
    log_probabilities = F.log_softmax(logits.detach() / temperature, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)
