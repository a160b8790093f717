"""Kernel ridge regression in closed form, as the inner problem of data set distillation."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.losses.precision import in_float32


@in_float32
def kernel_ridge_prediction(
    kernel: Float[Tensor, "n n"],
    cross_kernel: Float[Tensor, "m n"],
    targets: Float[Tensor, "n k"],
    *,
    ridge: float = 1e-6,
) -> Float[Tensor, "m k"]:
    r"""Predicts for m samples what kernel ridge regression on n others says of them.

    .. math:: K_{TS} \Big(K_{SS} + \lambda \frac{\mathrm{tr} K_{SS}}{n} I\Big)^{-1} Y_S

    The ridge is a share of the kernel's mean diagonal, so that the prediction does not change when all kernels are
    multiplied by one number. The system is solved in float64: with the usual ridge its condition number is close to
    what float32 can tell apart.

    Args:
        kernel: K_SS (n, n), between the samples that are fitted.
        cross_kernel: K_TS (m, n), between those predicted and those fitted.
        targets: Y_S (n, k), such as one-hot labels.
        ridge: lambda > 0.

    Returns:
        (m, k), in the precision of the kernel.

    Reference: Nguyen, Chen, Lee, Dataset Meta-Learning from Kernel Ridge-Regression, 2020, arXiv 2011.00050.
    """
    system = kernel.double()
    strength = ridge * system.diagonal().mean()
    system = system + strength * torch.eye(len(system), dtype=system.dtype, device=system.device)
    return (cross_kernel.double() @ torch.linalg.solve(system, targets.double())).to(kernel.dtype)


@in_float32
def kernel_ridge_cross_entropy(
    kernel: Float[Tensor, "n n"],
    cross_kernel: Float[Tensor, "m n"],
    targets: Float[Tensor, "n k"],
    labels: Int[Tensor, " m"],
    *,
    ridge: float = 1e-6,
) -> Float[Tensor, ""]:
    r"""Computes how badly the regression on synthetic samples predicts real ones.

    .. math:: \frac{1}{m} \sum_i -\log \mathrm{softmax}(\hat Y_{i \cdot})_{y_i}, \qquad
        \hat Y = \text{the prediction of kernel\_ridge\_prediction}

    The prediction is used as logits. The paper has the squared error of the one-hot labels in this place; its public
    code computes what stands here.

    Args:
        kernel: K_SS (n, n), between synthetic samples.
        cross_kernel: K_TS (m, n), between real and synthetic ones.
        targets: Y_S (n, k).
        labels: y (m,), classes of the real samples.
        ridge: lambda > 0.

    Reference: Xu et al., Kernel Ridge Regression-Based Graph Dataset Distillation, 2023 (KDD, no arXiv entry).
    """
    return F.cross_entropy(kernel_ridge_prediction(kernel, cross_kernel, targets, ridge=ridge), labels)


@in_float32
def kernel_orthogonality(kernel: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    r"""Computes how far samples are from orthogonal to each other, as the kernel sees them.

    .. math:: \lVert \tilde K - I \rVert_F, \qquad \tilde K_{ij} = \frac{K_{ij}}{\sqrt{K_{ii} K_{jj}}}

    Zero where no two samples have anything in common, sqrt(n (n - 1)) where all are alike. A norm, not its square.

    Args:
        kernel: K (n, n), with a positive diagonal.

    Reference: Xu et al., Kernel Ridge Regression-Based Graph Dataset Distillation, 2023 (KDD, no arXiv entry).
    """
    scale = kernel.diagonal().rsqrt()
    normalized = kernel * scale[:, None] * scale
    return torch.linalg.vector_norm(normalized - torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device))
