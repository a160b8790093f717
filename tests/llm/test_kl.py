"""Forward and reverse KL."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from tiny_logits import V, centered, close, gradient, probabilities

from lit_distill.llm.losses import cross_entropy, forward_kl, reverse_kl


def test_gradient_of_forward_kl(logits):
    q, p = probabilities(*logits)
    close(gradient(forward_kl(*logits), logits[0]), q - p)
    q, p = probabilities(*logits, temperature=3.0)
    close(gradient(forward_kl(*logits, temperature=3.0), logits[0]), 3 * (q - p))
    close(gradient(forward_kl(*logits, temperature=3.0, scale_by_t2=False), logits[0]), (q - p) / 3)


def test_gradient_of_reverse_kl(logits):
    q, p = probabilities(*logits)
    close(gradient(reverse_kl(*logits), logits[0]), centered(q, np.log(q / p)))
    q, p = probabilities(*logits, temperature=3.0)
    close(gradient(reverse_kl(*logits, temperature=3.0), logits[0]), 3 * centered(q, np.log(q / p)))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_both_kls_are_scipys(temperature, logits):
    q, p = probabilities(*logits, temperature=temperature)
    close(forward_kl(*logits, temperature=temperature), temperature**2 * entropy(p, q, axis=-1))
    close(reverse_kl(*logits, temperature=temperature), temperature**2 * entropy(q, p, axis=-1))
    close(reverse_kl(*logits, temperature=temperature, scale_by_t2=False), entropy(q, p, axis=-1))


def test_forward_kl_is_torchs(logits):
    log_q, log_p = (x.log_softmax(-1) for x in logits)
    close(forward_kl(*logits), F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).detach().numpy())


def test_a_point_mass_makes_forward_kl_the_cross_entropy_of_its_token(logits):
    labels = torch.tensor([0, 5, 16, 2, 2, 9])
    close(forward_kl(logits[0], 1e4 * F.one_hot(labels, V).double()), cross_entropy(logits[0], labels).detach().numpy())
