"""Losses between the relations that two networks see: between samples of a batch, or between channels of a map.

Relations do not depend on the width of a feature, so most of these need no projector. The relations between samples are
those of the batch that is given: under DDP, of each process's own share of it.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_distill.losses.maps import on_smaller_grid
from lit_distill.losses.precision import in_float32
from lit_distill.losses.reduction import Reduction, reduce

# ---- between samples -----------------------------------------------------------------------------------------------


@in_float32
def similarity_preserving(
    student_feature: Float[Tensor, "b *student"], teacher_feature: Float[Tensor, "b *teacher"]
) -> Float[Tensor, ""]:
    r"""Computes the squared difference of the samples' similarities.

    .. math:: \frac{1}{B^2} \lVert N(F^s {F^s}^\top) - N(F^t {F^t}^\top) \rVert_F^2, \qquad
        N: \text{rows to unit length}

    Args:
        student_feature: F^s (B, ...), flattened to (B, D) here.
        teacher_feature: F^t (B, ...), of any other shape, detached here.

    Reference: Tung and Mori, Similarity-Preserving Knowledge Distillation, 2019, arXiv 1907.09682.
    """
    student, teacher = student_feature.flatten(1), teacher_feature.detach().flatten(1)
    difference = F.normalize(student @ student.T, dim=1) - F.normalize(teacher @ teacher.T, dim=1)
    return difference.square().mean()


@in_float32
def relational_distance(
    student_embedding: Float[Tensor, "b ds"], teacher_embedding: Float[Tensor, "b dt"]
) -> Float[Tensor, ""]:
    r"""Computes how much the distances between samples differ, each network's in units of their mean.

    .. math:: \frac{1}{B^2} \sum_{ij} \ell(\tfrac{1}{\mu^s} d^s_{ij}, \tfrac{1}{\mu^t} d^t_{ij}), \qquad
        d_{ij} = \lVert f_i - f_j \rVert_2, \quad \mu = \text{mean of } d_{ij} \text{ over } i \ne j

    with the Huber loss :math:`\ell` of width 1. The mean counts the zeros of the diagonal.

    Args:
        student_embedding: (B, D_s) with B of 2 or more.
        teacher_embedding: (B, D_t), detached here.

    Reference: Park, Kim, Lu, Cho, Relational Knowledge Distillation, 2019, arXiv 1904.05068.
    """
    student, teacher = _distances(student_embedding), _distances(teacher_embedding.detach())
    pairs = len(student) * (len(student) - 1)
    return F.smooth_l1_loss(student * (pairs / student.sum()), teacher * (pairs / teacher.sum()))


@in_float32
def relational_angle(
    student_embedding: Float[Tensor, "b ds"], teacher_embedding: Float[Tensor, "b dt"]
) -> Float[Tensor, ""]:
    r"""Computes how much the angles that three samples form differ.

    .. math:: \frac{1}{B^3} \sum_{ijk} \ell(a^s_{ijk}, a^t_{ijk}), \qquad
        a_{ijk} = \left\langle \frac{f_j - f_i}{d_{ij}}, \frac{f_k - f_i}{d_{ik}} \right\rangle
        = \frac{d_{ij}^2 + d_{ik}^2 - d_{jk}^2}{2 \, d_{ij} d_{ik}}

    with the Huber loss :math:`\ell` of width 1. The mean counts all triplets; where two of them coincide the cosine is
    0 (j = i or k = i) or 1 (j = k). By the law of cosines the distances suffice: B^3 numbers, and no B^2 D.

    Args:
        student_embedding: (B, D_s).
        teacher_embedding: (B, D_t), detached here.

    Reference: Park, Kim, Lu, Cho, Relational Knowledge Distillation, 2019, arXiv 1904.05068.
    """
    return F.smooth_l1_loss(_cosines(student_embedding), _cosines(teacher_embedding.detach()))


@in_float32
def probabilistic_transfer(
    student_embedding: Float[Tensor, "b ds"], teacher_embedding: Float[Tensor, "b dt"], *, epsilon: float = 1e-7
) -> Float[Tensor, ""]:
    r"""Computes the divergence between the conditional probabilities that one sample has another as its neighbor.

    .. math:: \frac{1}{B^2} \sum_{ij} q_{ij} \log \frac{q_{ij} + \epsilon}{p_{ij} + \epsilon}, \qquad
        p_{ij} = \frac{1 + \cos(f_i, f_j)}{\sum_k 1 + \cos(f_i, f_k)}

    p is the student's, q the teacher's; the diagonal is part of them. The mean over all pairs (and not the sum, as a
    divergence has) is the form of the authors' code, to which the usual weight of 30000 refers.

    Args:
        student_embedding: (B, D_s).
        teacher_embedding: (B, D_t), detached here.
        epsilon: Keeps the logarithm finite.

    Reference: Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, 2018,
    arXiv 1803.10837.
    """
    p, q = _neighbor_probabilities(student_embedding), _neighbor_probabilities(teacher_embedding.detach())
    return (q * ((q + epsilon).log() - (p + epsilon).log())).mean()


@in_float32
def correlation_congruence(
    student_embedding: Float[Tensor, "b d"], teacher_embedding: Float[Tensor, "b d"]
) -> Float[Tensor, ""]:
    r"""Computes the products of neighboring samples' differences: the form that the published comparisons use.

    .. math:: \frac{1}{B - 1} \sum_{i=1}^{B-1} \langle |\delta_i|, |\delta_{i+1}| \rangle, \qquad \delta = e^s - e^t

    In a shuffled batch neighbors are random pairs. Zero if every other sample's embeddings agree, so not a distance.

    Args:
        student_embedding: e^s (B, D) with B of 2 or more.
        teacher_embedding: e^t (B, D). Not detached: it is the output of a trained layer on the teacher's feature.

    Reference: Peng et al., Correlation Congruence for Knowledge Distillation, 2019, arXiv 1904.01802, in the form of
    the public code of Tian, Krishnan, Isola, 2019, arXiv 1910.10699. The paper's form is `kernel_congruence`.
    """
    difference = (student_embedding - teacher_embedding).abs()
    return (difference[:-1] * difference[1:]).sum(1).mean()


@in_float32
def kernel_congruence(
    student_embedding: Float[Tensor, "b ds"],
    teacher_embedding: Float[Tensor, "b dt"],
    *,
    gamma: float = 0.4,
    order: int = 2,
) -> Float[Tensor, ""]:
    r"""Computes the squared difference of the samples' correlations under a Gaussian kernel: the form of the paper.

    .. math:: \frac{1}{B^2} \lVert C^s - C^t \rVert_F^2, \qquad C_{ij} = e^{-2 \gamma} \sum_{p=0}^{P}
        \frac{(2 \gamma)^p}{p!} (f_i^\top f_j)^p \approx e^{-\gamma \lVert f_i - f_j \rVert^2}

    The expansion holds for unit vectors, so rows are normalised here.

    Args:
        student_embedding: (B, D_s).
        teacher_embedding: (B, D_t), detached here.
        gamma: Inverse width of the kernel.
        order: P, where the Taylor series ends.

    Reference: Peng et al., Correlation Congruence for Knowledge Distillation, 2019, arXiv 1904.01802.
    """
    student, teacher = _cosine_similarity(student_embedding), _cosine_similarity(teacher_embedding.detach())
    powers = range(1, order + 1)  # the terms of power 0 cancel
    differences = [(student**p - teacher**p) * ((2 * gamma) ** p / math.factorial(p)) for p in powers]
    return (math.exp(-2 * gamma) * torch.stack(differences).sum(0)).square().mean()


# ---- between channels ----------------------------------------------------------------------------------------------


@in_float32
def channel_correlation(
    student_feature: Float[Tensor, "b c hs ws"],
    teacher_feature: Float[Tensor, "b c ht wt"],
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes the squared difference of the correlations between channels.

    .. math:: \frac{1}{C} \lVert N(F^s {F^s}^\top) - N(F^t {F^t}^\top) \rVert_F^2, \qquad F: (C, HW), \quad
        N: \text{rows to unit length}

    Grids may differ. The factor 1/C is that of the authors' code, to which the published weight of 2.5 refers.

    Args:
        student_feature: (B, C, H_s, W_s), already carried to the teacher's number of channels.
        teacher_feature: (B, C, H_t, W_t), detached here.
        reduction: "batchmean", "sum" over samples, or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Liu et al., Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation, 2021,
    arXiv 2202.03680.
    """
    student, teacher = student_feature.flatten(2), teacher_feature.detach().flatten(2)
    difference = F.normalize(student @ student.mT, dim=2) - F.normalize(teacher @ teacher.mT, dim=2)
    return reduce(difference.square().sum((1, 2)) / difference.shape[1], reduction)


@in_float32
def neuron_selectivity(
    student_feature: Float[Tensor, "b cs hs ws"],
    teacher_feature: Float[Tensor, "b ct ht wt"],
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes the squared maximum mean discrepancy between two sets of channels, with the kernel <a, b>^2.

    .. math:: \frac{1}{C_s^2} \sum_{cc'} \langle u^s_c, u^s_{c'} \rangle^2
        + \frac{1}{C_t^2} \sum_{cc'} \langle u^t_c, u^t_{c'} \rangle^2
        - \frac{2}{C_s C_t} \sum_{cc'} \langle u^s_c, u^t_{c'} \rangle^2
        = \Big\lVert \tfrac{1}{C_s} {U^s}^\top U^s - \tfrac{1}{C_t} {U^t}^\top U^t \Big\rVert_F^2

    U (C, HW) holds one channel per row, at unit length. The left side costs products between channels, the right side
    products between positions; what is less for the shapes at hand is computed. Grids that differ are average-pooled to
    the smaller one.

    Args:
        student_feature: (B, C_s, H_s, W_s).
        teacher_feature: (B, C_t, H_t, W_t), detached here.
        reduction: "batchmean", "sum" over samples, or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017,
    arXiv 1707.01219.
    """
    maps = on_smaller_grid(student_feature, teacher_feature.detach())
    student, teacher = (F.normalize(feature.flatten(2), dim=2) for feature in maps)
    (c_s, positions), c_t = student.shape[1:], teacher.shape[1]
    if positions * (c_s + c_t) < c_s**2 + c_t**2 + c_s * c_t:
        difference = student.mT @ student / c_s - teacher.mT @ teacher / c_t
        return reduce(difference.square().sum((1, 2)), reduction)
    within_student, within_teacher, between = (
        (a @ b.mT).square().mean((1, 2)) for a, b in ((student, student), (teacher, teacher), (student, teacher))
    )
    return reduce(within_student + within_teacher - 2 * between, reduction)


# ---- parts ---------------------------------------------------------------------------------------------------------


def _distances(embedding: Tensor) -> Tensor:
    """Euclidean distances (B, B), at least 1e-6 where two samples coincide, zero on the diagonal."""
    # By differences: through a Gram matrix, the distances of near neighbors are lost to rounding.
    distances = torch.cdist(embedding, embedding, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.clamp(min=1e-6).fill_diagonal_(0.0)


def _cosines(embedding: Tensor) -> Tensor:
    """Cosines (B, B, B) of the angle at the first sample between the directions to the other two."""
    distances = _distances(embedding)
    squares = distances.square()
    inverse = torch.where(distances > 1e-6, 1 / distances.clamp(min=1e-6), 0.0)  # no direction leads nowhere
    return (squares[:, :, None] + squares[:, None] - squares) * (0.5 * inverse[:, :, None] * inverse[:, None])


def _cosine_similarity(embedding: Tensor) -> Tensor:
    unit = F.normalize(embedding, dim=1)
    return unit @ unit.T


def _neighbor_probabilities(embedding: Tensor) -> Tensor:
    similarity = (1 + _cosine_similarity(embedding)) / 2
    return similarity / similarity.sum(1, keepdim=True)
