"""Token losses between a student and a teacher whose tokenizers differ, and what brings their words to one form.

`q` is the student's distribution, `p` the teacher's. A group is one or several tokens on each side that cover the same
text; what a network says of one is a row of log-probabilities, that sum to less than 1 where the group has several
tokens: see `merge_groups`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.losses.precision import in_float32


@in_float32
def uld(student_logits: Float[Tensor, "n v"], teacher_logits: Float[Tensor, "n w"]) -> Float[Tensor, " n"]:
    r"""Computes the distance of sorted probabilities, which needs no common vocabulary: universal logit distillation.

    .. math:: \sum_i | q_{(i)} - p_{(i)} |

    The smaller vocabulary is filled up with zeros. Which token has which probability is lost.

    Args:
        student_logits: (N, V).
        teacher_logits: (N, W) at the same N places of the text, detached here.

    Returns:
        (N,).

    Reference: Boizard et al., Towards Cross-Tokenizer Distillation, 2024, arXiv 2402.12030.
    """
    return sorted_l1(student_logits.softmax(-1), teacher_logits.softmax(-1))


@in_float32
def sorted_l1(student_probs: Float[Tensor, "g v"], teacher_probs: Float[Tensor, "g w"]) -> Float[Tensor, " g"]:
    """Computes `uld` of probabilities, which need not sum to 1.

    Args:
        student_probs: (G, V).
        teacher_probs: (G, W), detached here. Where V and W differ, the fewer are filled up with zeros.

    Returns:
        (G,).
    """
    q = student_probs.sort(-1, descending=True).values
    p = teacher_probs.detach().sort(-1, descending=True).values
    width = max(q.shape[-1], p.shape[-1])
    return (F.pad(q, (0, width - q.shape[-1])) - F.pad(p, (0, width - p.shape[-1]))).abs().sum(-1)


@in_float32
def merge_groups(
    logits: Float[Tensor, "n v"],
    labels: Int[Tensor, " n"],
    *,
    last: Int[Tensor, " g"],
    earlier: Int[Tensor, " n"],
) -> Float[Tensor, "g v"]:
    r"""Merges what a network says of the tokens of a group, by the chain rule: GOLD's "bayesian" strategy.

    .. math:: \log P(v) = \sum_{j < k} \log p_j(y_j) + \log p_k(v)

    for a group of tokens `y_1 ... y_k`: the probability of its first tokens as they are in the text, and then of v.
    `p_j` is what predicts `y_j`, from the tokens before it.

    Args:
        logits: (N, V) that predict the N tokens.
        labels: (N,) the tokens.
        last: (G,) the number of the last token of each group.
        earlier: (N,) of each token that is not the last of its group: the group's number. Of all others: G.

    Returns:
        (G, V) log-probabilities.

    Reference: Patiño et al., Unlocking On-Policy Distillation for Any Model Family (GOLD), 2025; and its public code.
    """
    norm = logits.logsumexp(-1)
    taken = logits.gather(1, labels[:, None])[:, 0] - norm
    chain = torch.zeros(len(last) + 1, dtype=logits.dtype, device=logits.device).index_add(0, earlier, taken)[:-1]
    return logits[last] + (chain - norm[last])[:, None]


@dataclass
class TokenMatch:
    """Which tokens of two vocabularies stand for the same text.

    Attributes:
        student: (m,) tokens of the student.
        teacher: (m,) the teacher's for the same.
        student_rest: All other tokens of the student.
        teacher_rest: All others of the teacher.
    """

    student: Int[Tensor, " m"]
    teacher: Int[Tensor, " m"]
    student_rest: Int[Tensor, " r"]
    teacher_rest: Int[Tensor, " s"]


def match_tokens(
    student: Mapping[bytes | str, int], teacher: Mapping[bytes | str, int], student_size: int, teacher_size: int
) -> TokenMatch:
    """Matches tokens by what they stand for.

    Args:
        student: Its tokens, by their bytes or name.
        teacher: Its own.
        student_size: V, rows of its head.
        teacher_size: W.
    """
    pairs = [(number, teacher[text]) for text, number in student.items() if text in teacher]
    ours, theirs = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)

    def rest(tokens: Tensor, size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bool).index_fill(0, tokens, False).nonzero()[:, 0]

    return TokenMatch(ours, theirs, rest(ours, student_size), rest(theirs, teacher_size))


@in_float32
def gold(
    student_logprobs: Float[Tensor, "g v"],
    teacher_logprobs: Float[Tensor, "g w"],
    match: TokenMatch,
    *,
    teacher_weight: float = 0.5,
) -> Float[Tensor, " g"]:
    r"""Computes GOLD's hybrid: tokens that both vocabularies have are compared as they are, the others sorted.

    .. math:: s \sum_{v \in M} \big( b \, p_v \log \tfrac{p_v}{m_v} + (1 - b) \, q_v \log \tfrac{q_v}{m_v} \big)
        + (1 - s) \sum_i | q_{(i)} - p_{(i)} |_{v \notin M}, \qquad m = b p + (1 - b) q

    s is the share of the teacher's vocabulary in M. The first sum is never below 0 for b from above 0 to below 1,
    though p and q do not sum to 1 over M. At 0 and 1 stand the terms of KL(p || q) and KL(q || p), as in
    `generalized_jsd`; they can be below 0.

    Args:
        student_logprobs: (G, V).
        teacher_logprobs: (G, W), detached here.
        match: M, and the rest.
        teacher_weight: b from 0 to 1, the teacher's share of the mixture.

    Returns:
        (G,).

    Reference: Patiño et al., Unlocking On-Policy Distillation for Any Model Family (GOLD), 2025; formula and weights
    are those of its public code.
    """
    teacher_logprobs = teacher_logprobs.detach()
    log_q, log_p = student_logprobs[:, match.student], teacher_logprobs[:, match.teacher]
    b = teacher_weight
    if b == 0:
        matched = log_p.exp() * (log_p - log_q)
    elif b == 1:
        matched = log_q.exp() * (log_q - log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(b), log_q + math.log1p(-b))
        matched = b * log_p.exp() * (log_p - log_m) + (1 - b) * log_q.exp() * (log_q - log_m)
    others = sorted_l1(student_logprobs[:, match.student_rest].exp(), teacher_logprobs[:, match.teacher_rest].exp())
    share = len(match.teacher) / teacher_logprobs.shape[1]
    return share * matched.sum(-1) + (1 - share) * others
