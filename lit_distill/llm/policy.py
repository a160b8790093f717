"""Policy gradients of the reverse KL of whole texts: what sampled tokens earn, and a loss that follows it.

`p` is the teacher's probability of a token, `q` the student's, given what stands before it. All functions are pure; in
tables of rows (B, M), a row's tokens stand at its beginning.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_distill.losses.precision import in_float32

PerToken = Float[Tensor, " n"]


def log_ratio_rewards(
    student_logprobs: PerToken, teacher_logprobs: PerToken, *, scaling: float = 0.5, clip: float | None = 100.0
) -> PerToken:
    r"""Computes what each sampled token earns.

    .. math:: r_t = \mathrm{clip}\big((\log p(y_t) - \log q(y_t)) / s,\; -c,\; c\big)

    At s = 1 and without clip, the mean of its sum over the student's texts is -KL(q || p) of whole texts.

    Args:
        student_logprobs: (N,) log q(y_t), of the student that is to be rewarded.
        teacher_logprobs: (N,) log p(y_t).
        scaling: s.
        clip: c; None for no clip.

    Returns:
        (N,).

    Reference: Gu et al., MiniLLM, 2023, arXiv 2306.08543 (scaling and clip are those of the public code).
    """
    rewards = (teacher_logprobs - student_logprobs) / scaling
    return rewards if clip is None else rewards.clamp(-clip, clip)


def discounted_returns(
    rewards: Float[Tensor, "b m"],
    mask: Bool[Tensor, "b m"],
    *,
    discount: float = 0.95,
    own: bool = True,
    length_normalized: bool = True,
) -> Float[Tensor, "b m"]:
    r"""Sums, for each token, what it and the tokens behind it earn.

    .. math:: R_t = \frac{1}{n_t} \sum_{k \ge t} \gamma^{k - t} r_k

    Args:
        rewards: (B, M) r; what is not in `mask` does not count.
        mask: (B, M) the tokens of each text.
        discount: gamma from 0 to 1.
        own: Whether the token's own reward counts, or only those behind it, k > t.
        length_normalized: Whether n_t is the number of rewards in the sum (1 if there is none), or 1 for all.

    Returns:
        (B, M), 0 outside the mask.

    Reference: Gu et al., MiniLLM, 2023, arXiv 2306.08543. The paper has no discount; in its public code it is 0.95.
    """
    rewards = rewards.masked_fill(~mask, 0.0)
    place = torch.arange(rewards.shape[1], device=rewards.device)
    ahead = place[:, None] - place  # (k, t): k - t
    factors = rewards.new_tensor(discount) ** ahead.clamp(min=0) * (ahead >= (0 if own else 1))
    returns = rewards @ factors
    if length_normalized:
        left = mask.sum(1, keepdim=True) - place - (0 if own else 1)
        returns = returns / left.clamp(min=1)
    return returns.masked_fill(~mask, 0.0)


def whiten(values: PerToken, *, add: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> PerToken:
    """Brings values to mean 0 and variance 1, over all processes.

    Args:
        values: (N,), of real tokens alone.
        add: Adds a tensor up over processes.

    Returns:
        (N,); all 0 where they do not differ.
    """
    count = add(values.new_tensor(float(len(values))))
    centred = values - add(values.sum()) / count
    return centred * torch.rsqrt(add(centred.square().sum()) / count + 1e-8)


def importance_weights(
    student_logprobs: PerToken, teacher_logprobs: PerToken, *, teacher_share: float = 0.2
) -> PerToken:
    r"""Computes how much oftener the student would have sampled tokens that were sampled from a mixture.

    .. math:: w_t = \frac{q(y_t)}{\alpha \, p(y_t) + (1 - \alpha) \, q(y_t)} \le \frac{1}{1 - \alpha}

    It is that of the token alone: that what stands before it was sampled from the mixture too is left out, which biases
    the gradient and keeps its variance small.

    Args:
        student_logprobs: (N,) log q(y_t), of the student that sampled.
        teacher_logprobs: (N,) log p(y_t).
        teacher_share: alpha from 0 to below 1.

    Returns:
        (N,); exactly 1 at alpha = 0.

    Reference: Gu et al., MiniLLM, 2023, arXiv 2306.08543.
    """
    return (student_logprobs - log_mixture(student_logprobs, teacher_logprobs, teacher_share)).exp()


def log_mixture(student_logprobs: Tensor, teacher_logprobs: Tensor, teacher_share: float) -> Tensor:
    """Computes the logarithm of (1 - `teacher_share`) q + `teacher_share` p, elementwise."""
    if teacher_share == 0:
        return student_logprobs
    return torch.logaddexp(student_logprobs + math.log1p(-teacher_share), teacher_logprobs + math.log(teacher_share))


@in_float32
def clipped_policy(
    student_logits: Float[Tensor, "n v"],
    labels: Int[Tensor, " n"],
    old_logprobs: PerToken,
    advantages: PerToken,
    weights: PerToken,
    *,
    clip: float | None = 0.2,
) -> PerToken:
    r"""Computes PPO's clipped objective, to be minimized, at tokens that an older student sampled.

    .. math:: \max\big(-A_t \rho_t,\; -A_t \, \mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon)\big), \qquad
        \rho_t = w_t \, q(y_t) / q_{\text{old}}(y_t)

    The clip is on the ratio with its importance weight in it: a token that is rarer in the student than in the mixture
    may be outside from the start, and is then followed only where its advantage pulls it back.

    Args:
        student_logits: (N, V) of the student as it is now.
        labels: (N,) the tokens y_t.
        old_logprobs: (N,) log q_old(y_t).
        advantages: (N,) A_t.
        weights: (N,) w_t.
        clip: epsilon; None for no clip.

    Returns:
        (N,).

    Reference: Schulman et al., Proximal Policy Optimization Algorithms, 2017, arXiv 1707.06347; with the weight inside,
    Gu et al., MiniLLM, 2023, arXiv 2306.08543 (public code).
    """
    logprobs = -F.cross_entropy(student_logits, labels, reduction="none")
    ratio = (logprobs - old_logprobs.detach()).exp() * weights.detach()
    gain = advantages.detach() * ratio
    if clip is not None:
        gain = torch.minimum(gain, advantages.detach() * ratio.clamp(1 - clip, 1 + clip))
    return -gain
