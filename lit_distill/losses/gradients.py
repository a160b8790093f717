"""How far apart two gradients of one network are: what data set distillation by gradient matching descends."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Metric = Literal["mse", "rows", "cos"]


def gradient_distance(
    synthetic: Sequence[Float[Tensor, "..."]], real: Sequence[Float[Tensor, "..."]], *, metric: Metric = "mse"
) -> Float[Tensor, ""]:
    r"""Computes the distance between the gradients that synthetic and real samples give a network.

    With g one gradient over all parameters, and g_r the gradient of the weights that lead to one output unit:

    .. math:: \frac{\lVert g^S - g^T \rVert^2}{\lVert g^T \rVert^2} \text{ (mse)}, \qquad
        \sum_r \big(1 - \cos(g^S_r, g^T_r)\big) \text{ (rows)}, \qquad 1 - \cos(g^S, g^T) \text{ (cos)}

    "rows" leaves out parameters of one dimension, such as biases. A row without a gradient on either side adds 1, and
    gets no gradient; the public codes add 1e-6 to the product of the norms instead.

    Args:
        synthetic: Gradients of the parameters, in their order, with the graph that leads back to the samples.
        real: The same of real samples, detached here.
        metric: "mse", the squared distance relative to the real gradient (DosCond), "rows" (data set condensation),
            or "cos".

    Reference: "rows": Zhao, Mopuri, Bilen, Dataset Condensation with Gradient Matching, 2020, arXiv 2006.05929. "mse":
    Jin et al., Condensing Graphs via One-Step Gradient Matching, 2022, arXiv 2206.07746.
    """
    pairs = [(_wide(own), _wide(other.detach())) for own, other in zip(synthetic, real, strict=True)]
    if metric == "rows":
        rows = [(own.flatten(1), other.flatten(1)) for own, other in pairs if own.ndim > 1]
        return torch.stack([(1 - F.cosine_similarity(own, other, dim=1)).sum() for own, other in rows]).sum()
    own, other = (torch.cat([gradient.flatten() for gradient in side]) for side in zip(*pairs, strict=True))
    if metric == "cos":
        return 1 - F.cosine_similarity(own, other, dim=0)
    return (own - other).square().sum() / other.square().sum()


def _wide(gradient: Tensor) -> Tensor:
    return gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
