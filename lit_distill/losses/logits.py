"""Losses between the logits of two networks beyond the plain divergence, and transforms of logits."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.losses.divergences import forward_kl
from lit_distill.losses.precision import in_float32
from lit_distill.losses.reduction import Reduction, reduce

# ---- standardization -----------------------------------------------------------------------------------------------


@in_float32
def standardize_logits(logits: Float[Tensor, "b k"], *, eps: float = 1e-7) -> Float[Tensor, "b k"]:
    r"""Brings each sample's logits to mean 0 and standard deviation 1.

    .. math:: \frac{z - \bar z}{\sigma(z) + \epsilon}, \qquad \sigma^2 = \frac{1}{K - 1} \sum_k (z_k - \bar z)^2

    Gradients flow through mean and deviation. So a loss of standardized logits leaves shift and positive scale of the
    student's logits free.

    Args:
        logits: (B, K), K >= 2.
        eps: Keeps logits that are all equal from being divided by zero.

    Returns:
        (B, K); each row's squares add up to K - 1.

    Reference: Sun, Ren, Li, Wang, Cao, Logit Standardization in Knowledge Distillation, 2024, arXiv 2403.01427.
    """
    # One kernel. It divides by the deviation over K, and its epsilon stands under the root: alike for a deviation far
    # above eps, and like eps for logits that are all equal.
    classes = logits.shape[1]
    return F.layer_norm(logits, (classes,), eps=eps**2) * math.sqrt(1 - 1 / classes)


# ---- decoupled -----------------------------------------------------------------------------------------------------


@in_float32
def decoupled_kl(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    labels: Int[Tensor, " b"],
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes the divergence on the labeled class and the divergence among all others, each with its own weight.

    .. math:: T^2 \big[ \alpha \, \mathrm{KL}(b^t \,\|\, b^s) + \beta \, \mathrm{KL}(n^t \,\|\, n^s) \big]

    b is the pair (probability of the labeled class, of all others), n the softmax over the K - 1 others. Plain KL is
    the case alpha = 1, :math:`\beta = 1 - p^t_y`: sure teachers hardly pass on n, which is what the method changes.

    The others are gathered, not masked with a large number, and their probability is a logsumexp: finite for all
    logits.

    Args:
        student_logits: (B, K), K >= 2.
        teacher_logits: (B, K), detached here.
        labels: y (B,).
        temperature: T > 0.
        alpha: Weight of the labeled class.
        beta: Weight of the others.
        reduction: "batchmean", "sum", or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Zhao, Cui, Song, Qiu, Liang, Decoupled Knowledge Distillation, 2022, arXiv 2203.08679.
    """
    student, teacher = student_logits / temperature, teacher_logits.detach() / temperature
    others = _other_classes(labels, student.shape[1])
    pairs, rests = [], []
    for tempered in (student, teacher):
        rest = tempered.gather(1, others)
        pairs.append(torch.cat([tempered.gather(1, labels[:, None]), rest.logsumexp(1, keepdim=True)], dim=1))
        rests.append(rest)
    target = forward_kl(*pairs, reduction="none")
    non_target = forward_kl(*rests, reduction="none")
    return reduce(temperature**2 * (alpha * target + beta * non_target), reduction)


# ---- correlations --------------------------------------------------------------------------------------------------


@in_float32
def pearson_relation(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    *,
    temperature: float = 4.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Computes how far probabilities are from correlated: between the classes of a sample, and the samples of a class.

    .. math:: \tau^2 \Big[ \beta \Big(1 - \frac{1}{B} \sum_i \rho(p^s_{i \cdot}, p^t_{i \cdot})\Big)
        + \gamma \Big(1 - \frac{1}{K} \sum_k \rho(p^s_{\cdot k}, p^t_{\cdot k})\Big) \Big], \qquad
        p = \mathrm{softmax}(z / \tau)

    Pearson's :math:`\rho` sees neither shift nor positive scale, so a student need not match a stronger teacher's
    probabilities, only what they rise and fall with. A constant row or column has no correlation: it counts as 0.

    Args:
        student_logits: (B, K), K >= 2, and B >= 2 for the second part to mean anything.
        teacher_logits: (B, K), detached here.
        temperature: tau > 0.
        inter_weight: beta, of the relation between classes (rows).
        intra_weight: gamma, of the relation within classes (columns).

    Reference: Huang, You, Wang, Qian, Xu, Knowledge Distillation from A Stronger Teacher, 2022, arXiv 2205.10536.
    """
    student, teacher = ((logits / temperature).softmax(1) for logits in (student_logits, teacher_logits.detach()))
    inter = 1 - _pearson(student, teacher).mean()
    intra = 1 - _pearson(student.T, teacher.T).mean()
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


# ---- several levels ------------------------------------------------------------------------------------------------


@in_float32
def multi_level(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    *,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    unsure_only: bool = False,
) -> Float[Tensor, ""]:
    r"""Compares probabilities sample by sample, samples with each other, and classes with each other.

    .. math:: \sum_T \Big[ \frac{T^2}{B} \sum_i \mathrm{KL}(p^t_i \,\|\, p^s_i)
        + \frac{1}{B} \lVert P^s {P^s}^\top - P^t {P^t}^\top \rVert_F^2
        + \frac{1}{K} \lVert {P^s}^\top P^s - {P^t}^\top P^t \rVert_F^2 \Big], \qquad P = \mathrm{softmax}(z / T)

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K), detached here.
        temperatures: The T summed over.
        unsure_only: Whether only the half of the samples counts of which the teacher is less sure (its largest
            probability at T = 1 is at most the median), and in the class part the half of the classes of which it sees
            less. The means are still over all B and K.

    Reference: Jin, Wang, Lin, Multi-Level Logit Distillation, 2023 (CVPR, no arXiv entry). T^2 and the factors 1/B and
    1/K are those of its public code; see `multi_level_published` for what else that code does.
    """
    teacher_logits = teacher_logits.detach()
    samples, classes = _unsure(teacher_logits) if unsure_only else (None, None)
    total = student_logits.new_zeros(())
    for temperature in temperatures:
        student, teacher = (student_logits / temperature).softmax(1), (teacher_logits / temperature).softmax(1)
        instance = forward_kl(student_logits, teacher_logits, temperature=temperature, reduction="none")
        batch, by_class = _gram_difference(student, teacher), _gram_difference(student.T, teacher.T)
        total = total + _masked_mean(instance + batch, samples) + _masked_mean(by_class, classes)
    return total


@in_float32
def multi_level_published(
    student_weak: Float[Tensor, "b k"],
    student_strong: Float[Tensor, "b k"],
    teacher_weak: Float[Tensor, "b k"],
    teacher_strong: Float[Tensor, "b k"],
    *,
    standardize: bool = False,
) -> Float[Tensor, ""]:
    r"""Computes what the public code of multi-level logit distillation computes on a weak and a strong view.

    .. math:: \sum_{T=2}^{6} \big[ m (S_T + B_T) + c \, C_T \big]
        + \sum_{T \in \{3, 4, 5\}} S_T^{strong} + \sum_{T \in \{2, 6\}} S_T

    Here S, B and C are the three parts of `multi_level` (samples, batch, classes), on the weak view where not marked;
    m and c are the shares of samples and of classes that the teacher is unsure of: 1/2, but for ties and odd numbers.
    It reads as if masks were to leave out the other half, as if the strong view were to have all five temperatures,
    and as if it were to have B and C, which the code computes and does not add.

    Args:
        student_weak: (B, K), on the weak view.
        student_strong: (B, K), on the strong view.
        teacher_weak: (B, K), on the weak view, detached here.
        teacher_strong: (B, K), on the strong view, detached here.
        standardize: Whether S compares standardized logits, as in the code of Sun et al., 2024, arXiv 2403.01427; B
            and C do not.

    Reference: Jin, Wang, Lin, Multi-Level Logit Distillation, 2023 (CVPR, no arXiv entry).
    """
    teacher_weak, teacher_strong = teacher_weak.detach(), teacher_strong.detach()
    samples, classes = (mask.float().mean() for mask in _unsure(teacher_weak))
    scale = standardize_logits if standardize else lambda logits: logits
    weak, strong = (
        [scale(logits) for logits in view] for view in ((student_weak, teacher_weak), (student_strong, teacher_strong))
    )
    total = student_weak.new_zeros(())
    for temperature in (2.0, 3.0, 4.0, 5.0, 6.0):
        student, teacher = (student_weak / temperature).softmax(1), (teacher_weak / temperature).softmax(1)
        instance = forward_kl(*weak, temperature=temperature)
        batch, by_class = _gram_difference(student, teacher).mean(), _gram_difference(student.T, teacher.T).mean()
        second = instance if temperature in (2.0, 6.0) else forward_kl(*strong, temperature=temperature)
        total = total + samples * (instance + batch) + classes * by_class + second
    return total


# ---- learned temperature -------------------------------------------------------------------------------------------


@in_float32
def forward_kl_at(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    temperature: Float[Tensor, "#b"],
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes T^2 KL(teacher || student) with a gradient with respect to the temperature.

    The value is that of `forward_kl`. The teacher's logits are constants, its tempered probabilities are not: T moves
    them too.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K), detached here.
        temperature: T > 0, one for all (1,) or one per sample (B,).
        reduction: "batchmean", "sum", or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).
    """
    log_student = (student_logits / temperature[:, None]).log_softmax(1)
    log_teacher = (teacher_logits.detach() / temperature[:, None]).log_softmax(1)
    value = (log_teacher.exp() * (log_teacher - log_student)).sum(1)
    return reduce(temperature.square() * value, reduction)


def scale_gradient(values: Tensor, scale: float) -> Tensor:
    """Returns `values` unchanged and multiplies their gradient by `scale`; below 0, a minimizer of the loss climbs it.

    Reference: Ganin, Lempitsky, Unsupervised Domain Adaptation by Backpropagation, 2014, arXiv 1409.7495 (where the
    minus sign is part of the layer; here it is part of `scale`).
    """
    return _ScaleGradient.apply(values, scale)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.scale * gradient, None


# ---- no teacher ----------------------------------------------------------------------------------------------------


@in_float32
def virtual_teacher_kl(
    student_logits: Float[Tensor, "b k"],
    labels: Int[Tensor, " b"],
    *,
    correct_probability: float = 0.99,
    temperature: float = 20.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Computes the divergence from a teacher made by hand, which is always right and knows nothing of other classes.

    .. math:: \mathrm{KL}(\mathrm{softmax}(u / T) \,\|\, p^s), \qquad
        u_k = a \text{ if } k = y, \text{ else } \frac{1 - a}{K - 1}

    Softened is u itself, a distribution and not its logarithm, and the student is at temperature 1, as in the public
    code. So the targets are close to even: with a = 0.99, T = 20 and K = 100 the labeled class has 0.0105.

    Args:
        student_logits: (B, K), K >= 2.
        labels: y (B,).
        correct_probability: a.
        temperature: T > 0.
        reduction: "batchmean", "sum", or "none" for one value per sample, (B,).

    Returns:
        Scalar, or (B,).

    Reference: Yuan, Tay, Li, Wang, Feng, Revisiting Knowledge Distillation via Label Smoothing Regularization, 2019,
    arXiv 1909.11723.
    """
    rest = (1 - correct_probability) / (student_logits.shape[1] - 1)
    teacher = torch.full_like(student_logits, rest).scatter(1, labels[:, None], correct_probability)
    return forward_kl(student_logits, teacher / temperature, reduction=reduction)


# ---- born again ----------------------------------------------------------------------------------------------------


@in_float32
def confidence_weights(teacher_logits: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    r"""Computes the weights of samples in CWTM: the teacher's largest probabilities, scaled to a sum of B.

    .. math:: w_i = \frac{\max_k p^t_{ik}}{\frac{1}{B} \sum_j \max_k p^t_{jk}}

    Args:
        teacher_logits: (B, K), detached here.

    Reference: Furlanello, Lipton, Tschannen, Itti, Anandkumar, Born-Again Neural Networks, 2018, arXiv 1805.04770.
    """
    confidence = teacher_logits.detach().softmax(1).amax(1)
    return confidence / confidence.mean()


@in_float32
def permute_other_classes(teacher_logits: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Shuffles each sample's logits among the classes that are not its largest: DKPP.

    Softmax follows a permutation, so it is the same to shuffle the probabilities. What is left of them is how sure the
    teacher is and how uneven the rest; which classes it confuses is gone.

    Args:
        teacher_logits: (B, K), detached here.

    Reference: Furlanello, Lipton, Tschannen, Itti, Anandkumar, Born-Again Neural Networks, 2018, arXiv 1805.04770.
    """
    logits = teacher_logits.detach()
    others = _other_classes(logits.argmax(1), logits.shape[1])
    order = torch.rand(others.shape, device=logits.device).argsort(1)
    return logits.scatter(1, others, logits.gather(1, others).gather(1, order))


# ---- parts ---------------------------------------------------------------------------------------------------------


def _other_classes(labels: Tensor, num_classes: int) -> Tensor:
    """For each sample the K - 1 classes that are not its label, in order (B, K - 1)."""
    places = torch.arange(num_classes - 1, device=labels.device)
    return places + (places >= labels[:, None])


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)


def _gram_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """For each row the sum of squared differences of its inner products with all rows."""
    return (student @ student.T - teacher @ teacher.T).square().sum(1)


def _unsure(teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The samples with the smaller largest probabilities, and the classes that the teacher sees less of."""
    probabilities = teacher_logits.softmax(1)
    return _lower_half(probabilities.amax(1)), _lower_half(probabilities.sum(0))


def _lower_half(values: Tensor) -> Tensor:
    return values <= values.median()


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.mean() if mask is None else torch.where(mask, values, 0.0).mean()
