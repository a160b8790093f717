"""Losses of diffusion distillation: what moves a sample, and what trains a score."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.paths import GaussianPath
from lit_distill.losses.reduction import Reduction, reduce

Weighting = Literal["edm", "eps", "v", "u", "x0"]
GANKind = Literal["ns", "hinge", "linear", "rpgan"]


def sample_mean(value: Float[Tensor, "b *sample"]) -> Float[Tensor, "b *ones"]:
    """Returns the mean over all but the batch, with the dimensions kept."""
    return value.mean(dim=tuple(range(1, value.ndim)), keepdim=True) if value.ndim > 1 else value


def score_gradient(
    student_x0: Float[Tensor, "b *sample"],
    fake_x0: Float[Tensor, "b *sample"],
    teacher_x0: Float[Tensor, "b *sample"],
    *,
    weight: Float[Tensor, "b *ones"] | float = 1.0,
    normalize: bool = True,
    floor: float = 1e-5,
) -> Float[Tensor, "b *sample"]:
    r"""Returns the direction g in which KL(fake || real) grows, so that the sample moves along -g.

    .. math:: g = w \, \frac{D_{fake}(x_t) - D_{real}(x_t)}{\operatorname{mean} |x - D_{real}(x_t)|}

    D are estimates of the data at the same noisy x_t. D_fake - D_real = sigma^2 / alpha (score_fake - score_real).
    What is not finite becomes 0. No gradients flow.

    Args:
        student_x0: x, the generator's samples.
        fake_x0: D_fake, what the score of the generator's samples says.
        teacher_x0: D_real, what the teacher says.
        weight: w, one for all or (B, 1, ...).
        normalize: Divide by the mean distance of each sample from what the teacher says (DMD), or by 1.
        floor: Smallest divisor.

    Reference: Yin et al., One-step Diffusion with Distribution Matching Distillation, 2023, arXiv 2311.18828, eq. 7 and
    8; the leading alpha_t is dropped as in the code of DMD2.
    """
    with torch.no_grad():
        gradient = fake_x0.float() - teacher_x0.float()
        if normalize:
            gradient = gradient / sample_mean((student_x0.float() - teacher_x0.float()).abs()).clamp(min=floor)
        return torch.nan_to_num(weight * gradient)


def surrogate_loss(
    student_x0: Float[Tensor, "b *sample"], gradient: Float[Tensor, "b *sample"], *, reduction: Reduction = "batchmean"
) -> Tensor:
    r"""Has the given gradient, divided by the number of elements: half the squared distance to x - g, detached.

    .. math:: L = \tfrac12 \operatorname{mean} (x - \operatorname{sg}[x - g])^2, \qquad
        \frac{\partial L}{\partial x} = \frac{g}{\text{elements}}

    Its value is half the mean square of g and says nothing of convergence.

    Args:
        student_x0: x (B, ...).
        gradient: g.
        reduction: "batchmean": the mean over everything; "sum" of the samples' means; "none": those (B,).
    """
    x = student_x0.float()
    distance = 0.5 * (x - (x - gradient).detach()).square()
    return reduce(distance.flatten(1).mean(1), reduction)


def denoising_weight(
    path: GaussianPath, t: Float[Tensor, " b"], weighting: Weighting, *, data_std: float = 0.5
) -> Float[Tensor, " b"]:
    """Returns the weight of the squared error of x0 that makes it the squared error of another prediction.

    "edm" is 1 / r^2 + 1 / data_std^2, "eps" 1 / r^2, "v" 1 / sigma^2, "x0" 1, and "u" (W / sigma)^2 with
    W = alpha sigma' - alpha' sigma: 1 / t^2 for a flow.
    """
    alpha, sigma, alpha_dot, sigma_dot = path.at(t)
    if weighting == "edm":
        return (alpha / sigma).square() + data_std**-2
    if weighting == "eps":
        return (alpha / sigma).square()
    if weighting == "v":
        return sigma**-2.0
    if weighting == "u":
        return ((alpha * sigma_dot - alpha_dot * sigma) / sigma).square()
    return torch.ones_like(sigma)


def denoising_loss(
    student_x0: Float[Tensor, "b *sample"],
    clean: Float[Tensor, "b *sample"],
    weight: Float[Tensor, " b"],
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Weighted mean squared error of estimates of the data: what trains teachers and fake scores.

    Args:
        student_x0: What the network makes of noisy samples.
        clean: The samples.
        weight: (B,), see `denoising_weight`.
        reduction: Of the samples' means (B,).
    """
    error = (student_x0.float() - clean.float()).square().flatten(1).mean(1)
    return reduce((weight * error).float(), reduction)


def mean_variance_kl(
    student_x0: Float[Tensor, "b *sample"], *, mean: float, variance: float, reduction: Reduction = "batchmean"
) -> Tensor:
    r"""KL divergence of Gaussians: one with each sample's own mean and variance, to a given one.

    .. math:: \tfrac12 \Big[ \frac{v_i + (\mu_i - m)^2}{S} - 1 - \log \frac{v_i}{S} \Big]

    Args:
        student_x0: Generated samples; mu_i and v_i are over all numbers of a sample.
        mean: m.
        variance: S.
        reduction: Of the samples' divergences (B,).

    Reference: the constraint on mean and variance that Decoupled DMD compares with, 2025, arXiv 2511.22677.
    """
    flat = student_x0.float().flatten(1)
    found = flat.var(1, correction=0)
    distance = (found + (flat.mean(1) - mean).square()) / variance - 1 - (found / variance).log()
    return reduce(distance / 2, reduction)


def gan_loss(
    fake_logits: Float[Tensor, "b *heads"], real_logits: Float[Tensor, "b *heads"] | None, *, kind: GANKind = "ns"
) -> Float[Tensor, ""]:
    r"""The discriminator's loss; mean over samples and heads.

    ====== ====================================================
    ns     softplus(f) + softplus(-r), at its best f = r = log(p_real / p_fake)
    hinge  relu(1 + f) + relu(1 - r)
    linear f - r (Wasserstein)
    rpgan  softplus(f - r), pairs of one fake and one real (relativistic)
    ====== ====================================================

    Args:
        fake_logits: f, of generated samples; large means "real".
        real_logits: r, of real samples.
        kind: Which.

    Raises:
        UsageError: Real samples are missing.

    Reference: Goodfellow et al., 2014, arXiv 1406.2661 (ns); Lim, Ye, 2017, arXiv 1705.02894 (hinge); Arjovsky et al.,
    2017, arXiv 1701.07875 (linear); Jolicoeur-Martineau, 2018, arXiv 1807.00734 (rpgan).
    """
    if real_logits is None:
        raise UsageError("model.gan_weight: a discriminator needs real samples; give data")
    fake, real = fake_logits.float(), real_logits.float()
    if kind == "ns":
        return F.softplus(fake).mean() + F.softplus(-real).mean()
    if kind == "hinge":
        return F.relu(1 + fake).mean() + F.relu(1 - real).mean()
    if kind == "linear":
        return fake.mean() - real.mean()
    return F.softplus(fake - real).mean()


def generator_gan_loss(
    fake_logits: Float[Tensor, "b *heads"],
    real_logits: Float[Tensor, "b *heads"] | None = None,
    *,
    kind: GANKind = "ns",
) -> Float[Tensor, ""]:
    """The generator's loss to `gan_loss`: softplus(-f) for ns, -f for hinge and linear, softplus(r - f) for rpgan."""
    fake = fake_logits.float()
    if kind == "ns":
        return F.softplus(-fake).mean()
    if kind == "rpgan":
        if real_logits is None:
            raise UsageError("gan_kind: rpgan compares each sample with a real one; give data")
        return F.softplus(real_logits.detach().float() - fake).mean()
    return -fake.mean()


def approximate_r1(
    real_logits: Float[Tensor, "b *heads"], shaken_logits: Float[Tensor, "b *heads"]
) -> Float[Tensor, ""]:
    """How much logits of real samples change when a little noise is added to those: R1 without a second backward.

    For small noise of standard deviation s it is s^2 times the squared norm of the logit's gradient.

    Reference: Lin et al., Diffusion Adversarial Post-Training for One-Step Video Generation, 2025, arXiv 2501.08316.
    """
    return (real_logits.float() - shaken_logits.float()).square().mean()
