"""Losses between features of two networks. Computed in float32, whatever the networks run in."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_distill.losses.maps import on_smaller_grid
from lit_distill.losses.reduction import Reduction, reduce


def hint_mse(
    student_feature: Float[Tensor, "b *shape"],
    teacher_feature: Float[Tensor, "b *shape"],
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes the mean squared difference over all elements of a feature: the hint loss of FitNets.

    .. math:: \frac{1}{D} \lVert r(f^s) - f^t \rVert_2^2, \qquad D = \text{elements of one sample's feature}

    Args:
        student_feature: (B, ...), already carried into the teacher's shape by the regressor r.
        teacher_feature: (B, ...), detached here.
        reduction: "batchmean", "sum" over samples, or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Romero et al., FitNets: Hints for Thin Deep Nets, 2015, arXiv 1412.6550 (the paper halves the sum of
    squares; the mean is what later comparisons weigh with beta = 100).
    """
    student_feature, teacher_feature = student_feature.float(), teacher_feature.detach().float()
    if reduction == "batchmean":
        return F.mse_loss(student_feature, teacher_feature)  # the same mean, in one pass
    return reduce(F.mse_loss(student_feature, teacher_feature, reduction="none").flatten(1).mean(1), reduction)


def attention_map(feature: Float[Tensor, "b c h w"], *, power: float = 2.0) -> Float[Tensor, "b hw"]:
    r"""Computes the normalised spatial attention map of a feature.

    .. math:: Q = \frac{v}{\lVert v \rVert_2}, \qquad v = \mathrm{vec}\big(\tfrac{1}{C} \sum_c |f_c|^p\big)

    Args:
        feature: (B, C, H, W).
        power: Exponent p.

    Returns:
        (B, H * W), rows of unit length (a zero map stays zero).
    """
    feature = feature.float()
    powers = feature.square() if power == 2 else feature.abs().pow(power)
    # As a sum: the gradient of a mean is written out for each element, that of a sum is a view.
    return F.normalize((powers.sum(1) / feature.shape[1]).flatten(1), dim=1)


def attention_transfer(
    student_feature: Float[Tensor, "b cs hs ws"],
    teacher_feature: Float[Tensor, "b ct ht wt"],
    *,
    power: float = 2.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes the mean squared difference of two spatial attention maps.

    .. math:: \frac{1}{HW} \lVert Q(f^s) - Q(f^t) \rVert_2^2 = \frac{2 - 2 \cos(v^s, v^t)}{HW}

    Grids that differ are average-pooled to the smaller one. The paper has the Euclidean norm; the mean over positions
    is what public code and the usual weight of 1000 refer to.

    Args:
        student_feature: (B, C_s, H_s, W_s).
        teacher_feature: (B, C_t, H_t, W_t), detached here.
        power: Exponent p of the attention map.
        reduction: "batchmean", "sum" over samples, or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Zagoruyko and Komodakis, Paying More Attention to Attention, 2017, arXiv 1612.03928.
    """
    student, teacher = on_smaller_grid(student_feature.float(), teacher_feature.detach().float())
    difference = attention_map(student, power=power) - attention_map(teacher, power=power)
    return reduce(difference.square().mean(1), reduction)
