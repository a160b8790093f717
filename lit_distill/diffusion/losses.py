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
Divergence = Literal["reverse_kl", "forward_kl", "js", "hellinger", "jeffreys", "neyman", "softened_rkl"]
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


def variational_score_gradient(
    fake_eps: Float[Tensor, "b *sample"],
    teacher_eps: Float[Tensor, "b *sample"],
    *,
    sigma: Float[Tensor, "b *ones"],
) -> Float[Tensor, "b *sample"]:
    r"""Returns the direction of variational score distillation; the sample moves along -g.

    .. math:: g = \sigma_t^2 \, (\epsilon_{real}(x_t) - \epsilon_{fake}(x_t)) = \sigma_t \alpha_t \,
        (D_{fake}(x_t) - D_{real}(x_t))

    Real minus fake noise is fake minus real data: the sign of `score_gradient`. What is not finite becomes 0. No
    gradients flow.

    Args:
        fake_eps: What the score of the generator's samples takes the noise to be.
        teacher_eps: What the teacher does.
        sigma: Factor of the noise on a path that preserves the variance, (B, 1, ...).

    Reference: Nguyen, Tran, SwiftBrush, 2023, arXiv 2312.05239, with the weight of the public code.
    """
    with torch.no_grad():
        return torch.nan_to_num(sigma.square() * (teacher_eps.float() - fake_eps.float()))


def sid_loss(
    student_x0: Float[Tensor, "b *sample"],
    fake_x0: Float[Tensor, "b *sample"],
    teacher_x0: Float[Tensor, "b *sample"],
    *,
    alpha: float = 1.2,
    floor: float = 1e-5,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""The loss of score identity distillation; gradients flow through all three.

    .. math:: L = \sum_{pixels} \frac{(D_{real} - D_{fake}) \, \big((D_{real} - x) - a \, (D_{real} - D_{fake})\big)}
        {\operatorname{sg}[\operatorname{mean} |x - D_{real}|]}

    With an exact fake score its expectation is (1 - a) E |D_real - D_fake|^2 over the divisor: negative at a > 1.

    Args:
        student_x0: x, the generator's samples.
        fake_x0: D_fake at the noised samples, a function of x.
        teacher_x0: D_real, likewise.
        alpha: a.
        floor: Smallest divisor.
        reduction: Of the samples' sums (B,).

    Reference: Zhou et al., Score identity Distillation, 2024, arXiv 2404.04057, with the divisor of the public code.
    """
    x, fake, teacher = student_x0.float(), fake_x0.float(), teacher_x0.float()
    divisor = sample_mean((x - teacher).abs()).detach().clamp(min=floor)
    difference = teacher - fake
    return reduce((difference * ((teacher - x) - alpha * difference) / divisor).flatten(1).sum(1), reduction)


def divergence_weight(ratio: Float[Tensor, "*b"], *, divergence: Divergence = "js") -> Float[Tensor, "*b"]:
    r"""Returns h(r) = r^2 f''(r), the weight of distribution matching that descends an f-divergence.

    D_f = E_fake[f(r)] at r = p_real / p_fake; constant factors are left out.

    ============ ================================== ===========
    reverse_kl   -log r                             1
    forward_kl   r log r                            r
    js           r log r - (r + 1) log((r + 1) / 2) r / (1 + r)
    hellinger    1 - sqrt(r)                        sqrt(r)
    jeffreys     (r - 1) log r                      1 + r
    neyman       (1 - r)^2 / r                      1 / r
    softened_rkl (1 + r) log((1 + r) / r)           1 / (1 + r)
    ============ ================================== ===========

    Args:
        ratio: r, positive.
        divergence: Which.

    Reference: Xu, Nie, Vahdat, One-step Diffusion Models with f-Divergence Distribution Matching, 2025, arXiv
    2502.15681.
    """
    weights = {
        "reverse_kl": torch.ones_like,
        "forward_kl": lambda r: r,
        "js": lambda r: r / (1 + r),
        "hellinger": torch.sqrt,
        "jeffreys": lambda r: 1 + r,
        "neyman": lambda r: 1 / r,
        "softened_rkl": lambda r: 1 / (1 + r),
    }
    return weights[divergence](ratio)


def clamped_similarity_loss(
    student_embedding: Float[Tensor, "b d"],
    text_embedding: Float[Tensor, "b d"],
    *,
    threshold: float,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Pulls embeddings of images towards those of their texts until they are alike enough.

    .. math:: L = \max(0, \tau - \cos(E_{image}, E_{text}))

    Args:
        student_embedding: Of generated images (B, D), by a frozen encoder such as CLIP's, with the graph.
        text_embedding: Of their prompts, detached here.
        threshold: tau.
        reduction: Of the samples' values (B,).

    A reconstruction: the formula is from memory of the paper, and no code was found. The paper's encoder is CLIP's.

    Reference: Dao et al., SwiftBrush v2, 2024, arXiv 2408.14176.
    """
    cosine = F.cosine_similarity(student_embedding.float(), text_embedding.detach().float(), dim=1)
    return reduce(F.relu(threshold - cosine), reduction)


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
