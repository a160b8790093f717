"""Contrast of one network's embedding with a memory of the other's: is this the same sample, or one of K others?"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.losses.precision import in_float32


@in_float32
def memory_similarity(
    embedding: Float[Tensor, "b d"], memory: Float[Tensor, "n d"], index: Int[Tensor, "b k"]
) -> Float[Tensor, "b k"]:
    """Computes inner products of embeddings with chosen rows of a memory.

    All B N products are computed and the chosen ones picked. Gathering the rows first needs B K D numbers (537 MB for
    B = 64, K = 16384, D = 128); this needs B N and runs at the speed of a matrix product (13 MB for the N = 50,000
    images of CIFAR, 328 MB for the 1.3 million of ImageNet). Besides, the caller keeps a copy of the memory for the
    backward pass.

    Args:
        embedding: (B, D).
        memory: (N, D), detached here. It must not be overwritten before the backward pass.
        index: (B, K) rows of the memory.
    """
    return (embedding @ memory.detach().T).gather(1, index)


@in_float32
def contrastive_normalizer(
    similarity: Float[Tensor, "b k"], *, num_samples: int, temperature: float = 0.07
) -> Float[Tensor, ""]:
    r"""Estimates the constant Z that makes exp(s / tau) / Z a distribution over the memory: N times the mean.

    Args:
        similarity: s (B, K + 1) of one batch, see `contrastive_nce`.
        num_samples: N, rows of the memory.
        temperature: tau.
    """
    return (similarity.detach() / temperature).exp().mean() * num_samples


@in_float32
def contrastive_nce(
    similarity: Float[Tensor, "b k"],
    *,
    normalizer: Float[Tensor, ""],
    num_samples: int,
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    r"""Computes the noise-contrastive loss of one positive against K negatives.

    .. math:: -\frac{1}{B} \sum_b \Big[ \log h(s_{b0}) + \sum_{k=1}^{K} \log (1 - h(s_{bk})) \Big], \qquad
        h(s) = \frac{e^{s / \tau} / Z}{e^{s / \tau} / Z + K / N}

    h is the sigmoid of :math:`s / \tau - \log Z - \log (K / N)`, so all of it is computed in log space, without the
    1e-7 that public code adds to the denominators.

    Args:
        similarity: s (B, K + 1), the positive first; gradients flow into it.
        normalizer: Z, see `contrastive_normalizer`; a constant.
        num_samples: N, the samples that negatives are drawn from.
        temperature: tau.

    Reference: Tian, Krishnan, Isola, Contrastive Representation Distillation, 2019, arXiv 1910.10699, equation 18.
    """
    noise = (similarity.shape[1] - 1) / num_samples
    logits = similarity / temperature - (normalizer.detach() * noise).log()
    return (F.softplus(-logits[:, 0]) + F.softplus(logits[:, 1:]).sum(1)).mean()
