"""The losses of data set distillation that are not shared with other domains. Pure functions."""

import torch
from jaxtyping import Float
from torch import Tensor


def mean_distance(synthetic: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    r"""Computes the squared distance between mean embeddings: the discrepancy of two sets under a linear kernel.

    .. math:: \Big\lVert \frac{1}{m} \sum_i f(x_i) - \frac{1}{n} \sum_j f(\tilde x_j) \Big\rVert_2^2

    Args:
        synthetic: Embeddings of synthetic images.
        real: Embeddings of real images, detached here.

    Reference: Zhao, Bilen, Dataset Condensation with Distribution Matching, 2021, arXiv 2110.04181.
    """
    return (synthetic.float().mean(0) - real.detach().float().mean(0)).square().sum()


def statistics_distance(
    mean: Float[Tensor, " c"],
    variance: Float[Tensor, " c"],
    running_mean: Float[Tensor, " c"],
    running_variance: Float[Tensor, " c"],
) -> Float[Tensor, ""]:
    r"""Computes how far the statistics of a batch are from those that a normalization layer remembers.

    .. math:: \lVert \hat\mu - \mu \rVert_2 + \lVert \hat\sigma^2 - \sigma^2 \rVert_2

    Norms are not squared; where statistics are equal, the gradient is 0. Nothing here is a matrix product, so float32
    stays float32 under autocast.

    Args:
        mean: mu, of each channel of the batch.
        variance: sigma^2, biased.
        running_mean: The remembered mean, detached here.
        running_variance: The remembered variance, likewise.

    Reference: Yin, Xing, Shen, Squeeze, Recover and Relabel, 2023, arXiv 2306.13092.
    """
    norm = torch.linalg.vector_norm
    return norm(running_mean.detach() - mean) + norm(running_variance.detach() - variance)


def trajectory_distance(
    reached: Float[Tensor, " p"], *, start: Float[Tensor, " p"], target: Float[Tensor, " p"]
) -> Float[Tensor, ""]:
    r"""Computes how far from the target parameters a network has come, relative to how far from them it began.

    .. math:: \frac{\lVert \theta_N - \theta^*_{t+M} \rVert^2}{\lVert \theta^*_t - \theta^*_{t+M} \rVert^2}

    Args:
        reached: Parameters after the steps on synthetic images.
        start: Parameters before them.
        target: Parameters of the expert, M epochs after the start.

    Reference: Cazenavette et al., Dataset Distillation by Matching Training Trajectories, 2022, arXiv 2203.11932.
    """
    start, target = start.detach(), target.detach()
    return (reached - target).square().sum() / (start - target).square().sum()
