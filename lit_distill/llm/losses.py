"""Token losses: student logits and what the teacher said in, one value per token out. In float32 and in log space.

`p` is the teacher's softmax, `q` the student's, KL(a || b) the sum of a (log a - log b) over the vocabulary. No loss
here averages over tokens: how a sum over tokens is divided depends on the whole step, which a loss does not see.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.llm.signals import TopK
from lit_distill.losses.precision import in_float32

Logits = Float[Tensor, "n v"]
PerToken = Float[Tensor, " n"]

# ---- labels --------------------------------------------------------------------------------------------------------


@in_float32
def cross_entropy(student_logits: Logits, labels: Int[Tensor, " n"]) -> PerToken:
    """Computes the negative log-likelihood of the labels: supervised fine-tuning, and sequence-level distillation.

    Args:
        student_logits: (N, V).
        labels: (N,) tokens.

    Returns:
        (N,).

    Reference: on a teacher's output, Kim and Rush, Sequence-Level Knowledge Distillation, 2016, arXiv 1606.07947.
    """
    return F.cross_entropy(student_logits, labels, reduction="none")


# ---- whole distributions -------------------------------------------------------------------------------------------


@in_float32
def forward_kl(
    student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0, scale_by_t2: bool = True
) -> PerToken:
    r"""Computes KL(p || q) of tempered softmaxes, which is 0 where both agree.

    .. math:: T^2 \sum_v p_v (\log p_v - \log q_v)

    Its gradient with respect to the student's logits is `T (q - p)`.

    Args:
        student_logits: (N, V).
        teacher_logits: (N, V), detached here.
        temperature: T > 0, of both.
        scale_by_t2: Whether the factor T^2 stands in front, which keeps the size of the gradient.

    Returns:
        (N,).

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.
    """
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits, temperature)
    return _kl(log_p, log_q) * (temperature**2 if scale_by_t2 else 1.0)


@in_float32
def reverse_kl(
    student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0, scale_by_t2: bool = True
) -> PerToken:
    """Computes KL(q || p) of tempered softmaxes: mode seeking where `forward_kl` covers all modes.

    This is the exact one-step term of the sequence-level divergence; what a token does to later ones is not in it. At
    T = 1 its gradient is `q (r - <q, r>)` with `r = log q - log p`.

    Args:
        student_logits: (N, V).
        teacher_logits: (N, V), detached here.
        temperature: T > 0, of both.
        scale_by_t2: Whether the factor T^2 stands in front, which keeps the size of the gradient.

    Returns:
        (N,).

    Reference: Gu et al., MiniLLM, 2023, arXiv 2306.08543.
    """
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits, temperature)
    return _kl(log_q, log_p) * (temperature**2 if scale_by_t2 else 1.0)


@in_float32
def generalized_jsd(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    teacher_weight: float = 0.5,
    normalize: Literal["none", "endpoint"] = "none",
    temperature: float = 1.0,
) -> PerToken:
    r"""Computes the generalized Jensen-Shannon divergence, by default the symmetric one, at most log 2.

    .. math:: b \, KL(p \| m) + (1 - b) \, KL(q \| m), \qquad m = b p + (1 - b) q

    It is small where b is near 0 or 1, like b KL(p || q) and (1 - b) KL(q || p). At 0 and 1 themselves stand these two
    KLs without the factor, as is the custom: as it stands, a sweep over b jumps there, and changes the size of the
    gradient on the way. With `normalize="endpoint"` the divergence is divided by b (1 - b), and nothing jumps.

    Args:
        student_logits: (N, V).
        teacher_logits: (N, V), detached here.
        teacher_weight: b from 0 to 1, the teacher's share of the mixture.
        normalize: "none", or "endpoint" for a family that is continuous from KL(p || q) to KL(q || p).
        temperature: T > 0, of both. No factor T^2 stands in front.

    Returns:
        (N,).

    Reference: Agarwal et al., On-Policy Distillation of Language Models (GKD), 2023, arXiv 2306.13649; the
    normalization is ours.
    """
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits, temperature)
    if teacher_weight == 0:
        return _kl(log_p, log_q)
    if teacher_weight == 1:
        return _kl(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, teacher_weight)
    value = teacher_weight * _kl(log_p, log_m) + (1 - teacher_weight) * _kl(log_q, log_m)
    return value / (teacher_weight * (1 - teacher_weight)) if normalize == "endpoint" else value


@in_float32
def skew_kl(student_logits: Logits, teacher_logits: Logits, *, skew: float = 0.1) -> PerToken:
    r"""Computes KL(p || a p + (1 - a) q): forward KL, but never above -log a.

    Args:
        student_logits: (N, V).
        teacher_logits: (N, V), detached here.
        skew: a from 0 (forward KL) to below 1, the teacher's share of the mixture.

    Returns:
        (N,).

    Reference: Ko et al., DistiLLM, 2024, arXiv 2402.03898.
    """
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits)
    return _kl(log_p, _log_mixture(log_p, log_q, skew))


@in_float32
def skew_reverse_kl(student_logits: Logits, teacher_logits: Logits, *, skew: float = 0.1) -> PerToken:
    r"""Computes KL(q || (1 - a) p + a q): reverse KL, but never above -log a.

    Args:
        student_logits: (N, V).
        teacher_logits: (N, V), detached here.
        skew: a from 0 (reverse KL) to below 1, the student's share of the mixture.

    Returns:
        (N,).

    Reference: Ko et al., DistiLLM, 2024, arXiv 2402.03898.
    """
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits)
    return _kl(log_q, _log_mixture(log_q, log_p, skew))


@in_float32
def adaptive_kl(student_logits: Logits, teacher_logits: Logits, *, head_mass: float = 0.5) -> PerToken:
    r"""Computes forward and reverse KL, weighted by where student and teacher differ.

    .. math:: \frac{g_h}{g_h + g_t} KL(p \| q) + \frac{g_t}{g_h + g_t} KL(q \| p), \qquad
        g = \sum_v |p_v - q_v| \text{ over head and tail}

    The head is the smallest set of the teacher's most probable tokens whose mass reaches `head_mass`. The weights are
    constants of the gradient.

    Args:
        student_logits: (N, V).
        teacher_logits: (N, V), detached here.
        head_mass: Above 0, at most 1.

    Returns:
        (N,).

    Reference: Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models,
    2024, arXiv 2404.02657.
    """
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits)
    with torch.no_grad():
        p = log_p.exp()
        gap = (p - log_q.exp()).abs()
        ranked, tokens = p.sort(-1, descending=True)
        in_head = ranked.cumsum(-1) - ranked < head_mass  # a token belongs to it while those before it fall short
        of_head = (gap.gather(-1, tokens) * in_head).sum(-1)
        share = of_head / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)  # 0 / 0 where both are equal
    return share * _kl(log_p, log_q) + (1 - share) * _kl(log_q, log_p)


@in_float32
def total_variation(student_logits: Logits, teacher_logits: Logits) -> PerToken:
    r"""Computes the total variation distance, half the sum of |p - q|: symmetric, and at most 1.

    Args:
        student_logits: (N, V).
        teacher_logits: (N, V), detached here.

    Returns:
        (N,).

    Reference: Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation, 2023, arXiv 2307.15190.
    """
    log_q, log_p = _log_softmaxes(student_logits, teacher_logits)
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


@in_float32
def taid(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    t: float | Float[Tensor, ""],
    value: Literal["kl", "cross_entropy"] = "kl",
) -> PerToken:
    r"""Computes KL(p_t || q) to a target between student and teacher.

    .. math:: p_t = \mathrm{softmax}((1 - t) \, \mathrm{sg}(z_s) + t \, z_t) \propto q^{1 - t} p^t

    The target is a constant, so the gradient is `q - p_t`: 0 at t = 0, that of forward KL at t = 1.

    Args:
        student_logits: (N, V).
        teacher_logits: (N, V), detached here.
        t: From 0 (the student itself) to 1 (the teacher).
        value: "kl", or "cross_entropy" for -sum p_t log q, which is larger by the entropy of p_t, a constant.

    Returns:
        (N,).

    Reference: Shing et al., TAID: Temporally Adaptive Interpolated Distillation, 2025, arXiv 2501.16937.
    """
    mixed = (1 - t) * student_logits.detach() + t * teacher_logits.detach()
    log_q, log_target = _log_softmaxes(student_logits, mixed)
    return -(log_target.exp() * log_q).sum(-1) if value == "cross_entropy" else _kl(log_target, log_q)


# ---- the most probable tokens --------------------------------------------------------------------------------------


@in_float32
def topk_kl(
    student_logits: Logits,
    target: TopK,
    *,
    support: Literal["bucket", "renormalized", "gathered", "both"] = "bucket",
) -> PerToken:
    r"""Computes KL(p || q) where only the k most probable tokens S of the teacher are known.

    - "bucket": all other tokens are one class more, on both sides. A lower bound of the dense KL, short of it by
      `p(rest) KL(p | rest || q | rest)`.
    - "renormalized": `p` is scaled to sum to 1 over S, `q` is over the whole vocabulary. The gradient is off by
      `2 (1 - p(S))` in L1, and the optimum is too confident.
    - "gathered": the sum over S as it is. With a target that sums to 1 the same as "renormalized".
    - "both": both are scaled to sum to 1 over S; what the student does elsewhere has no gradient. For large k alone.

    Where k is the whole vocabulary, all are the dense forward KL.

    Args:
        student_logits: (N, V).
        target: ids and logprobs (N, k), detached here.
        support: One of the above.

    Returns:
        (N,).

    Reference: "gathered" is the published formula of Shum et al., FIRST: Teach A Reliable Large Language Model Through
    Efficient Trustworthy Distillation, 2024, arXiv 2408.12168; the other three are what tools for cached logits do.
    """
    logits = student_logits.gather(-1, target.ids)
    log_p = target.logprobs.detach().to(logits.dtype)
    mass = log_p.logsumexp(-1, keepdim=True)
    if support in ("renormalized", "both"):
        log_p = log_p - mass
    if support == "both":
        return _sparse_kl(log_p, logits.log_softmax(-1))
    if support != "bucket" or logits.shape == student_logits.shape:  # no token is left for a bucket
        return _sparse_kl(log_p, logits - student_logits.logsumexp(-1, keepdim=True))
    # From the logits of the rest themselves: in 1 - q(S) nothing would be left of a small rest.
    rest = student_logits.scatter(-1, target.ids, -math.inf).logsumexp(-1, keepdim=True)
    log_rest = torch.log(-torch.expm1(mass.clamp_max(0)))
    return _sparse_kl(torch.cat([log_p, log_rest], -1), torch.cat([logits, rest], -1).log_softmax(-1))


def calibrate_topk(target: TopK, *, c: float) -> TopK:
    r"""Re-calibrates a teacher's most probable tokens: FIRST's trustworthy maximization.

    .. math:: \tilde p_j = \exp(p_j / c) / \sum_{k \in S} \exp(p_k / c)

    The softmax is of probabilities, not of logits: at c = 1 even a teacher that is certain is given e / (e + 4) = 0.40
    for its first of five tokens. Useful are c from 0 (the first token alone) to 1.

    Args:
        target: ids and logprobs (N, k).
        c: Above 0, chosen by the calibration error on validation data.

    Returns:
        The same ids, with log-probabilities that sum to 1 when exponentiated.

    Reference: Shum et al., FIRST, 2024, arXiv 2408.12168.
    """
    return TopK(target.ids, (target.logprobs.float().exp() / c).log_softmax(-1))


def smooth_topk(target: TopK, *, smoothing: float = 0.1) -> TopK:
    """Takes probability from the first token and shares it among the others: FIRST's alternative to calibration.

    Args:
        target: ids and logprobs (N, k).
        smoothing: What is taken; all of it where the first token has less.

    Returns:
        The same ids, with as much probability in sum.

    Raises:
        UsageError: If k is 1.

    Reference: label smoothing as an ablation in Shum et al., FIRST, 2024, arXiv 2408.12168.
    """
    p = target.logprobs.float().exp()
    others = p.shape[-1] - 1
    if not others:
        raise UsageError("smoothing shares probability among the other tokens, and k = 1 has none: use k >= 2")
    first = p.argmax(-1, keepdim=True)
    taken = p.gather(-1, first).clamp_max(smoothing)
    return TopK(target.ids, (p + taken / others).scatter(-1, first, p.gather(-1, first) - taken).log())


# ---- sampled tokens ------------------------------------------------------------------------------------------------


@in_float32
def sampled_reverse_kl(student_logits: Logits, teacher_logits: Logits, labels: Int[Tensor, " n"]) -> PerToken:
    r"""Computes the policy-gradient loss of reverse KL at tokens that the student sampled.

    .. math:: -A \log q_y, \qquad A = \mathrm{sg}(\log p_y - \log q_y)

    In expectation over y from q its gradient is that of `reverse_kl`, which has less variance where the teacher's whole
    distribution is known. Its value is no divergence: watch the mean of -A instead.

    Args:
        student_logits: (N, V).
        teacher_logits: (N, V), detached here.
        labels: (N,) tokens, sampled from the student as it is now.

    Returns:
        (N,).

    Reference: Lu and Thinking Machines Lab, On-Policy Distillation, 2025.
    """
    log_q = -F.cross_entropy(student_logits, labels, reduction="none")
    log_p = -F.cross_entropy(teacher_logits.detach(), labels, reduction="none")
    return -(log_p - log_q).detach() * log_q


# ---- shared --------------------------------------------------------------------------------------------------------


def _log_softmaxes(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher; a temperature of 1 costs no pass over the logits."""
    student_logits, teacher_logits = (
        x if temperature == 1 else x / temperature for x in (student_logits, teacher_logits.detach())
    )
    return student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _sparse_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL of few classes, some of which may have no probability at all: 0 log 0 is 0."""
    return F.kl_div(log_b, log_a.exp(), reduction="none").sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Log of `share` a + (1 - `share`) b."""
    if share == 0:
        return log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))
