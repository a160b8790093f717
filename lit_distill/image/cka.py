"""Centered kernel alignment: how alike two networks see the same samples."""

from jaxtyping import Float
from torch import Tensor

from lit_distill.losses.precision import in_float32


@in_float32
def linear_cka(first: Float[Tensor, "n *first"], second: Float[Tensor, "n *second"]) -> Float[Tensor, ""]:
    r"""Computes the linear centered kernel alignment of two features, 0 to 1.

    .. math:: \frac{\lVert Y^\top X \rVert_F^2}{\lVert X^\top X \rVert_F \, \lVert Y^\top Y \rVert_F}
        = \frac{\langle K, L \rangle_F}{\lVert K \rVert_F \, \lVert L \rVert_F}, \qquad K = X X^\top, \; L = Y Y^\top

    with the columns of X and Y centered. It does not change under orthogonal maps and scaling of either feature, and
    the two may differ in width and in kind: maps against tokens. The N x N matrices are what takes memory; with few
    samples and wide features the value is too high, since any two random features then agree.

    Args:
        first: X (N, ...), flattened to (N, D) here.
        second: Y (N, ...), of any other shape.

    Returns:
        Scalar; 0 where a feature is the same for all samples.

    Reference: Kornblith, Norouzi, Lee, Hinton, Similarity of Neural Network Representations Revisited, 2019,
    arXiv 1905.00414.
    """
    grams = []
    for feature in (first.flatten(1), second.flatten(1)):
        centered = feature - feature.mean(0)
        grams.append(centered @ centered.T)
    norms = grams[0].norm() * grams[1].norm()
    return (grams[0] * grams[1]).sum() / norms.clamp_min(1e-30)
