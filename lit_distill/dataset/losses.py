"""The losses of data set distillation that are not shared with other domains. Pure functions."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_distill.losses.precision import in_float32


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


@in_float32
def densification_loss(images: Float[Tensor, "k n d"], *, temperature: float = 4.0) -> Float[Tensor, ""]:
    r"""Computes how far from equal the eigenvalues are of the images of each class: images that are alike have one.

    .. math:: \sum_c \mathrm{KL}\big( \mathrm{softmax}(e_c / \tau) \,\Vert\, \mathrm{softmax}(e_c) \big), \qquad
        e_c = \mathrm{eig}(X_c X_c^\top)

    The flatter distribution is the target, detached here. A single image of a class gives 0. Images are not centered,
    and their eigenvalues not scaled: where one is larger than the others by much more than tau, the gradient is all but
    0, as it is in the public code.

    Args:
        images: n flat images of each of k classes, X.
        temperature: tau.

    Reference: Shao, Yin, Zhou, Zhang, Shen, Generalized Large-Scale Data Condensation via Various Backbone and
    Statistical Matching, 2023, arXiv 2311.17950.
    """
    spectrum = torch.linalg.eigvalsh(images @ images.mT)
    target = spectrum.detach().div(temperature).log_softmax(1)
    return F.kl_div(spectrum.log_softmax(1), target, reduction="sum", log_target=True)
