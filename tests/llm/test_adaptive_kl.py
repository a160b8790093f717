"""Adaptive KL and total variation."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from tiny_language import Pairs, language_model, logits_of, sgd, trainer
from tiny_logits import V, centered, close, gradient, probabilities

from lit_distill.llm.losses import adaptive_kl, total_variation
from lit_distill.llm.methods.adaptive_kl import AdaptiveKL


def adaptive_by_loop(student, teacher, head_mass):
    values, shares = [], []
    for q, p in zip(*probabilities(student, teacher), strict=True):
        mass, head = 0.0, np.zeros(len(p), bool)
        for token in sorted(range(len(p)), key=lambda v: -p[v]):
            if mass >= head_mass:
                break
            head[token] = True
            mass += p[token]
        gap = np.abs(p - q)
        share = gap[head].sum() / gap.sum()
        shares.append(share)
        values.append(share * entropy(p, q) + (1 - share) * entropy(q, p))
    return np.array(values), np.array(shares)[:, None]


@pytest.mark.parametrize("head_mass", [0.2, 0.5, 0.9])
def test_adaptive_kl_is_what_a_loop_over_the_vocabulary_gives(head_mass, logits):
    value, share = adaptive_by_loop(*logits, head_mass)
    assert share.min() > 0.01
    assert share.max() < 0.999
    found = adaptive_kl(*logits, head_mass=head_mass)
    close(found, value)
    q, p = probabilities(*logits)
    close(gradient(found, logits[0]), share * (q - p) + (1 - share) * centered(q, np.log(q / p)))
    if head_mass == 0.5:
        close(adaptive_kl(*logits), value)


def test_adaptive_kl_does_not_care_how_tokens_are_numbered(logits):
    order = torch.randperm(V)
    close(adaptive_kl(logits[0][:, order], logits[1][:, order]), adaptive_kl(*logits).detach().numpy())


def test_adaptive_kl_of_equals_has_no_gradient(logits):
    student = logits[0]
    found = gradient(adaptive_kl(student, student.detach().clone()), student)
    close(found, 0, 1e-14)


def test_total_variation_is_half_the_l1_distance(logits):
    q, p = probabilities(*logits)
    close(total_variation(*logits), np.maximum(p - q, 0).sum(-1))
    assert float(total_variation(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]]))) == 1.0


def test_a_step_of_adaptive_kl_has_the_loss_of_the_loop(tmp_path):
    student, teacher = language_model(0), language_model(1)
    batch = Pairs().train_dataloader()[0]
    value, _ = adaptive_by_loop(*(logits_of(network, batch).double() for network in (student, teacher)), 0.4)
    module = AdaptiveKL(student, teacher, head_mass=0.4, optimizer=sgd)
    trainer(tmp_path, max_steps=1).fit(module, Pairs())
    assert float(module.terms["match"]) == pytest.approx(value.sum() / batch.total, rel=1e-4)
