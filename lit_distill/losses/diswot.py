"""The two metrics of DisWOT: how alike two classifiers are in what tells classes apart, and in how samples relate."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.losses.precision import in_float32
from lit_distill.losses.relations import similarity_preserving


@in_float32
def head_gradient(
    logits: Float[Tensor, "b k"], embedding: Float[Tensor, "b d"], labels: Int[Tensor, " b"]
) -> Float[Tensor, "k d"]:
    r"""Computes the gradient of the mean cross-entropy with respect to the last linear layer's weight, in closed form.

    .. math:: g = \frac{1}{B} (\mathrm{softmax}(z) - \mathrm{onehot}(y))^\top f

    Differentiable in logits and embedding, without a second backward pass.

    Args:
        logits: z (B, K).
        embedding: f (B, D), what the last linear layer reads.
        labels: y (B,).
    """
    residual = logits.softmax(1) - torch.zeros_like(logits).scatter(1, labels[:, None], 1.0)
    return residual.T @ embedding / len(labels)


@in_float32
def semantic_similarity(
    student_gradient: Float[Tensor, "k d"], teacher_gradient: Float[Tensor, "k d"], *, eps: float = 1e-12
) -> Float[Tensor, ""]:
    r"""Computes how much two networks differ in which features speak for which class: the form of the public code.

    .. math:: \frac{1}{KD} \sum_k \lVert N(g^t_k {g^t_k}^\top) - N(g^s_k {g^s_k}^\top) \rVert_F^2, \qquad
        N: \text{rows to unit length}

    Row j of the normalised outer product is a_j u with u the unit vector of g_k and a_j = sign(g_kj). So the D x D
    matrices need not be made: two rows are :math:`(a^t_j - a^s_j)^2 + a^t_j a^s_j |u^t - u^s|^2` apart. Without zeros
    the sum is :math:`\sum_k [2D - 2 \cos(g^t_k, g^s_k) \sum_j \mathrm{sign}(g^t_{kj}) \mathrm{sign}(g^s_{kj})] / (KD)`.

    Args:
        student_gradient: (K, D), see `head_gradient`.
        teacher_gradient: (K, D) with the same D, detached here.
        eps: Rows shorter than this are divided by it instead of by their length, as torch's `normalize` in the public
            code does. This decides the score of networks with weights from N(0, 1), whose softmax is so sure that the
            gradients of most classes all but vanish.

    Reference: Dong, Li, Wei, DisWOT, 2023, arXiv 2303.15678: its code, which takes the channel correlation of Liu et
    al. (ICKD, 2021) of the gradient. The form of the paper's text is `class_map_similarity`.
    """
    teacher_gradient = teacher_gradient.detach()
    student, teacher = _unit(student_gradient), _unit(teacher_gradient)
    student_row, teacher_row = (
        (gradient * torch.linalg.vector_norm(gradient, dim=1, keepdim=True) / eps).clamp(-1, 1)
        for gradient in (student_gradient, teacher_gradient)
    )
    apart = (teacher - student).square().sum(1, keepdim=True)
    return ((teacher_row - student_row).square() + teacher_row * student_row * apart).mean()


@in_float32
def relation_similarity(
    student_feature: Float[Tensor, "b *student"], teacher_feature: Float[Tensor, "b *teacher"]
) -> Float[Tensor, ""]:
    r"""Computes how much two networks differ in which samples of a batch they find alike.

    .. math:: \frac{1}{B^2} \lVert N(A^t {A^t}^\top) - N(A^s {A^s}^\top) \rVert_F^2, \qquad
        N: \text{rows to unit length}

    Args:
        student_feature: A^s (B, ...), flattened to (B, C H W) here.
        teacher_feature: A^t (B, ...), of any other shape, detached here.

    Reference: Dong, Li, Wei, DisWOT, 2023, arXiv 2303.15678: its code, which is the similarity-preserving loss of Tung
    and Mori, 2019, arXiv 1907.09682. The paper's search has the norm without square and factor, which ranks the same.
    """
    return similarity_preserving(student_feature, teacher_feature)


@in_float32
def class_maps(feature: Float[Tensor, "b c h w"], weight: Float[Tensor, "k c"]) -> Float[Tensor, "b k h w"]:
    """Computes class activation maps (Zhou et al., 2015, arXiv 1512.04150): G_n = sum over c of w_nc A_c.

    Args:
        feature: A (B, C, H, W), the map before global pooling.
        weight: w (K, C), of the last linear layer.
    """
    return torch.einsum("bchw,kc->bkhw", feature, weight)


@in_float32
def class_map_similarity(
    student_maps: Float[Tensor, "b k hs ws"], teacher_maps: Float[Tensor, "b k ht wt"]
) -> Float[Tensor, ""]:
    r"""Computes how much the correlations between class maps differ: the semantic metric of the paper's text.

    .. math:: \frac{1}{K^2} \lVert N(G^t {G^t}^\top) - N(G^s {G^s}^\top) \rVert_F^2, \qquad G: (K, B H W)

    The paper writes a norm and not along which axis; rows are normalised here, and the difference squared, as in the
    other metric. The paper's search has the norm without square and factor, which ranks the same.

    Args:
        student_maps: (B, K, H_s, W_s), see `class_maps`.
        teacher_maps: (B, K, H_t, W_t), detached here; grids may differ.

    Reference: Dong, Li, Wei, DisWOT, 2023, arXiv 2303.15678. The public code computes `semantic_similarity`.
    """
    # As samples there, so classes here.
    return similarity_preserving(student_maps.transpose(0, 1), teacher_maps.transpose(0, 1))


def _unit(rows: Tensor) -> Tensor:
    # A sure network's gradients are so small that their squares vanish in float32; the direction is what counts.
    largest = rows.detach().abs().amax(1, keepdim=True)
    return F.normalize(rows / torch.where(largest > 0, largest, 1.0), dim=1)
