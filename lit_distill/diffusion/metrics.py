"""How near generated samples are to real ones: functions of features, float64."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError


def frechet_distance(generated: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    r"""Frechet distance of two Gaussians with the moments of the features.

    .. math:: |\mu_1 - \mu_2|^2 + \operatorname{tr}\big(C_1 + C_2 - 2 (C_1 C_2)^{1/2}\big)

    Args:
        generated: Features (N, D).
        real: Features (M, D).

    Reference: Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, 2017,
    arXiv 1706.08500.
    """
    first, second = generated.double(), real.double()
    c1, c2 = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return (first.mean(0) - second.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * cross


def frechet_inception_distance(
    generated: Float[Tensor, "n c h w"],
    real: Float[Tensor, "m c h w"],
    *,
    extractor: nn.Module,
    batch_size: int = 100,
) -> Float[Tensor, ""]:
    """Frechet distance of pixels in the features of a network, computed by torchmetrics.

    Args:
        generated: Pixels in [0, 1] (N, C, H, W); of grey ones each channel is the same.
        real: Likewise (M, C, H, W).
        extractor: From uint8 images of three channels to features (N, D). With Inception's it is the FID.
        batch_size: Images at once.

    Raises:
        UsageError: torchmetrics' image metrics are not installed.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric: Any = FrechetInceptionDistance(feature=extractor, input_img_size=(3, *real.shape[2:]))
    except ModuleNotFoundError as error:
        raise UsageError(f"model.evaluation.fid: a package is missing ({error}); pip install torch-fidelity") from error
    metric = metric.to(real.device)
    for pixels, is_real in ((generated, False), (real, True)):
        for some in pixels.split(batch_size):
            # torchmetrics gives a network of the user's the images as they are.
            metric.update((some.expand(-1, 3, -1, -1) * 255).round().byte(), real=is_real)
    return metric.compute()


def inception(weights: str) -> nn.Module:
    """Makes the Inception network of FID with weights that the user has put on this machine, for YAML.

    Nothing is downloaded: the file is `pt_inception-2015-12-05-6726825d.pth` of torch-fidelity.

    Args:
        weights: The file.

    Raises:
        UsageError: The file is not there, or package torch-fidelity is missing.
    """
    if not Path(weights).expanduser().is_file():
        raise UsageError(f"model.evaluation.fid: {weights} does not exist; put Inception's weights there")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise UsageError(
            "model.evaluation.fid: package torch-fidelity is missing; pip install torch-fidelity"
        ) from error

    class Pooled(nn.Module):
        """Its features of 2,048 numbers, out of the tuple that it gives."""

        def __init__(self) -> None:
            super().__init__()
            path = str(Path(weights).expanduser())
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=path
            )

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images)[0]

    return Pooled().eval()


def relative_frechet_distance(generated: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Frechet distance divided by the total variance of the real features, so that feature spaces compare."""
    return frechet_distance(generated, real) / real.double().var(0).sum()


def precision_recall(
    generated: Float[Tensor, "n d"], real: Float[Tensor, "m d"], *, k: int = 3
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Share of generated samples on the real manifold, and of real ones on the generated.

    A manifold is the union of balls around samples that reach to their k-th neighbor. Numbers of samples should be
    equal.

    Args:
        generated: Features (N, D).
        real: Features (M, D).
        k: Neighbor that decides the radius.

    Reference: Kynkaanniemi et al., Improved Precision and Recall Metric for Assessing Generative Models, 2019, arXiv
    1904.06991.
    """
    first, second = generated.double(), real.double()
    between = torch.cdist(first, second)
    own = [torch.cdist(x, x).kthvalue(min(k + 1, len(x)), dim=1).values for x in (first, second)]
    precision = (between <= own[1][None]).any(1).double().mean()
    recall = (between <= own[0][:, None]).any(0).double().mean()
    return precision, recall


def squared_mmd(
    generated: Float[Tensor, "n d"], real: Float[Tensor, "m d"], *, widths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
) -> Float[Tensor, ""]:
    """Unbiased squared maximum mean discrepancy, mean over Gaussian kernels; may be slightly negative.

    Args:
        generated: (N, D).
        real: (M, D).
        widths: Standard deviations of the kernels, times the root of D.

    Reference: Gretton et al., A Kernel Two-Sample Test, JMLR 2012.
    """
    first, second = generated.double(), real.double()
    n, m, d = len(first), len(second), first.shape[1]
    squares = torch.cdist(first, first).square(), torch.cdist(second, second).square()
    between = torch.cdist(first, second).square()
    total = between.new_zeros(())
    for width in widths:
        scale = -1 / (2 * width**2 * d)
        xx, yy = ((square * scale).exp() for square in squares)
        total = total + (xx.sum() - n) / (n * (n - 1)) + (yy.sum() - m) / (m * (m - 1))
        total = total - 2 * (between * scale).exp().mean()
    return total / len(widths)


def nearest_train_ratio(
    generated: Float[Tensor, "n d"], train: Float[Tensor, "t d"], held_out: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    """Median distance of generated samples to the training set, over that of held-out real ones; small if memorised."""
    to_train = [torch.cdist(x.double(), train.double()).min(1).values.median() for x in (generated, held_out)]
    return to_train[0] / to_train[1]
