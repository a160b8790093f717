"""Losses between feature maps of two networks, beside those of `lit_distill.losses.features`."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_distill.losses.precision import in_float32
from lit_distill.losses.reduction import Reduction, reduce


@in_float32
def variational_information(
    student_mean: Float[Tensor, "b c h w"],
    teacher_feature: Float[Tensor, "b c h w"],
    variance: Float[Tensor, " c"],
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes the negative log-likelihood of a teacher map under a Gaussian that the student predicts.

    .. math:: \frac{1}{CHW} \sum_{c,h,w} \tfrac{1}{2} \Big[
        \frac{(\mu_{chw} - f^t_{chw})^2}{\sigma_c^2} + \log \sigma_c^2 \Big]

    Without the constant log(2 pi) / 2. It is lowest where each variance is its channel's mean squared residual.

    Args:
        student_mean: mu (B, C, H, W), regressed from the student's map.
        teacher_feature: f^t (B, C, H, W), detached here.
        variance: sigma^2 > 0, one for each channel (C,).
        reduction: "batchmean", "sum" over samples, or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Ahn et al., Variational Information Distillation for Knowledge Transfer, 2019, arXiv 1904.05835.
    """
    # One variance for a whole channel: what it divides is the channel's mean square.
    squares = F.mse_loss(student_mean, teacher_feature.detach(), reduction="none").sum((2, 3))
    value = 0.5 * (squares / (variance * student_mean[0, 0].numel()) + variance.log())
    return reduce(value.mean(1), reduction)


@in_float32
def factor_transfer(
    student_factor: Float[Tensor, "b c hs ws"],
    teacher_factor: Float[Tensor, "b c ht wt"],
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes the mean absolute difference of two factors, each flattened and brought to unit length.

    .. math:: \frac{1}{D} \Big\lVert \frac{F^t}{\lVert F^t \rVert_2} - \frac{F^s}{\lVert F^s \rVert_2} \Big\rVert_1,
        \qquad D = CHW

    Grids that differ are average-pooled to the smaller one. The mean over elements is what public code and the usual
    weight of 200 refer to. Some public code squares and averages the factor's channels before: not the paper's form.

    Args:
        student_factor: F^s (B, C, H_s, W_s), from the translator.
        teacher_factor: F^t (B, C, H_t, W_t), from the paraphraser, detached here.
        reduction: "batchmean", "sum" over samples, or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Kim, Park, Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer, 2018, arXiv
    1802.04977.
    """
    student, teacher = on_smaller_grid(student_factor, teacher_factor.detach())
    difference = F.normalize(student.flatten(1), dim=1) - F.normalize(teacher.flatten(1), dim=1)
    return reduce(difference.abs().sum(1) / difference.shape[1], reduction)  # a sum as in `_mean_square`


@in_float32
def flow_matrix(first: Float[Tensor, "b c1 h1 w1"], second: Float[Tensor, "b c2 h2 w2"]) -> Float[Tensor, "b c1 c2"]:
    r"""Computes the flow of solution procedure (FSP) matrix of two layers: channels of one against those of the other.

    .. math:: G_{ij} = \frac{1}{HW} \sum_{h,w} f_{ihw} \, g_{jhw}

    Grids that differ are average-pooled to the smaller one, as in the public code behind the usual figures; the paper
    takes the maximum.

    Args:
        first: f (B, C_1, H_1, W_1).
        second: g (B, C_2, H_2, W_2).

    Reference: Yim, Joo, Bae, Kim, A Gift from Knowledge Distillation, CVPR 2017.
    """
    first, second = on_smaller_grid(first, second)
    return first.flatten(2) @ second.flatten(2).mT / first[0, 0].numel()


@in_float32
def flow_of_solution(
    student_first: Float[Tensor, "b c1 hs1 ws1"],
    student_second: Float[Tensor, "b c2 hs2 ws2"],
    teacher_first: Float[Tensor, "b c1 ht1 wt1"],
    teacher_second: Float[Tensor, "b c2 ht2 wt2"],
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes the mean squared difference of the FSP matrices of two networks.

    .. math:: \frac{1}{C_1 C_2} \lVert G^s - G^t \rVert_F^2

    Args:
        student_first: (B, C_1, H, W), the shallower layer of the student.
        student_second: (B, C_2, H, W), the deeper one.
        teacher_first: The same of the teacher, detached here; channels are the student's, grids may differ.
        teacher_second: The same of the teacher, detached here.
        reduction: "batchmean", "sum" over samples, or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Yim, Joo, Bae, Kim, A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
    Transfer Learning, CVPR 2017 (the paper sums; the mean is what public code computes).
    """
    teacher = flow_matrix(teacher_first.detach(), teacher_second.detach())
    return reduce(_mean_square(flow_matrix(student_first, student_second) - teacher), reduction)


@in_float32
def activation_boundary(
    student_feature: Float[Tensor, "b *shape"],
    teacher_feature: Float[Tensor, "b *shape"],
    *,
    margin: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes a squared hinge that brings each student neuron to the teacher's side of zero.

    .. math:: \sum_i [t_i > 0] \, \max(m - s_i, 0)^2 + [t_i \le 0] \, \max(m + s_i, 0)^2

    Args:
        student_feature: s (B, ...), before its activation.
        teacher_feature: t (B, ...), before its activation, detached here; only signs count.
        margin: m, how far beyond zero a neuron has to be.
        reduction: "batchmean" (sum over neurons, mean over samples), "sum", or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Heo, Lee, Yun, Choi, Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
    Neurons, 2018, arXiv 1811.03233.
    """
    side = torch.where(teacher_feature.detach() > 0, 1.0, -1.0)
    return reduce((margin - side * student_feature).relu().square().flatten(1).sum(1), reduction)


@in_float32
def expected_negative(mean: Float[Tensor, " c"], deviation: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    r"""Computes the expected value of the negative part of Gaussians: the margins of the margin ReLU.

    .. math:: E[x \mid x < 0] = \mu - \sigma \frac{\varphi(\mu / \sigma)}{\Phi(-\mu / \sigma)},
        \qquad x \sim N(\mu, \sigma^2)

    Where less than a thousandth of the mass is negative it is -3 sigma, as in the public code.

    Args:
        mean: mu, one for each channel (C,): the bias of the teacher's BatchNorm.
        deviation: sigma, one for each channel (C,): its weight; the sign is dropped here.

    Reference: Heo et al., A Comprehensive Overhaul of Feature Distillation, 2019, arXiv 1904.01866.
    """
    # A pruned channel has weight 0; the limit is then its bias where that is negative, and 0 elsewhere.
    mu, sigma = mean.double(), deviation.double().abs().clamp(min=1e-12)
    mass = torch.special.ndtr(-mu / sigma)
    density = torch.exp(-0.5 * (mu / sigma).square()) / math.sqrt(2 * math.pi)
    expected = torch.where(mass > 1e-3, mu - sigma * density / mass, -3 * sigma)
    return expected.clamp(max=0.0).to(mean.dtype)


@in_float32
def margin_relu(feature: Float[Tensor, "b c h w"], margin: Float[Tensor, " c"]) -> Float[Tensor, "b c h w"]:
    """Computes max(x, m): a ReLU that ends at a negative margin, one for each channel.

    Args:
        feature: x (B, C, H, W), before its activation.
        margin: m < 0 (C,), see `expected_negative`.

    Reference: Heo et al., A Comprehensive Overhaul of Feature Distillation, 2019, arXiv 1904.01866.
    """
    return torch.maximum(feature, margin.view(-1, 1, 1))


@in_float32
def partial_l2(
    student_feature: Float[Tensor, "b *shape"],
    teacher_feature: Float[Tensor, "b *shape"],
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes the squared distance without positions where the student is below a teacher that is not positive.

    .. math:: \sum_i \begin{cases} 0 & s_i \le t_i \le 0 \\ (s_i - t_i)^2 & \text{otherwise} \end{cases}

    A ReLU would set both to zero there, so that nothing is left to learn.

    Args:
        student_feature: s (B, ...), before its activation.
        teacher_feature: t (B, ...), after the margin ReLU, detached here.
        reduction: "batchmean" (sum over positions, mean over samples), "sum", or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Heo et al., A Comprehensive Overhaul of Feature Distillation, 2019, arXiv 1904.01866.
    """
    teacher = teacher_feature.detach()
    skipped = (student_feature <= teacher) & (teacher <= 0)
    value = torch.where(skipped, 0.0, F.mse_loss(student_feature, teacher, reduction="none"))
    return reduce(value.flatten(1).sum(1), reduction)


@in_float32
def hierarchical_context(
    student_feature: Float[Tensor, "b c h w"],
    teacher_feature: Float[Tensor, "b c h w"],
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes the mean squared difference of two maps at several scales (HCL of knowledge review).

    .. math:: \frac{\sum_l w_l \, \mathrm{MSE}(P_l f^s, P_l f^t)}{\sum_l w_l}, \qquad
        w = 1, \tfrac{1}{2}, \tfrac{1}{4}, \tfrac{1}{8}

    P is average pooling: none, then to 4x4, 2x2, 1x1. Scales that are not smaller than the map are left out.

    Args:
        student_feature: f^s (B, C, H, W), after fusion.
        teacher_feature: f^t (B, C, H, W), detached here.
        reduction: "batchmean", "sum" over samples, or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Chen, Liu, Zhao, Jia, Distilling Knowledge via Knowledge Review, 2021, arXiv 2104.09044.
    """
    # Pooling is linear: what is pooled is the difference.
    difference = student_feature - teacher_feature.detach()
    value, weight, total = _mean_square(difference), 1.0, 1.0
    for size in (4, 2, 1):
        if size < min(difference.shape[-2:]):
            weight /= 2
            total += weight
            value = value + weight * _mean_square(F.adaptive_avg_pool2d(difference, size))
    return reduce(value / total, reduction)


def on_smaller_grid(first: Float[Tensor, "b c1 h1 w1"], second: Float[Tensor, "b c2 h2 w2"]) -> tuple[Tensor, Tensor]:
    """Average-pools two maps to the smaller height and the smaller width of the two; returns both."""
    (h_1, w_1), (h_2, w_2) = first.shape[-2:], second.shape[-2:]
    grid = (min(h_1, h_2), min(w_1, w_2))
    # Not what has the grid already: torch would copy it, forward and backward.
    first, second = (x if x.shape[-2:] == grid else F.adaptive_avg_pool2d(x, grid) for x in (first, second))
    return first, second


def _mean_square(difference: Tensor) -> Tensor:
    """Mean square of each sample's elements (B,)."""
    # As a sum: the gradient of a mean is written out for each element, that of a sum is a view.
    return difference.square().flatten(1).sum(1) / difference.shape[1:].numel()
