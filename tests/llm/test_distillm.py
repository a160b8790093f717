"""DistiLLM: skew KL, and completions that are kept and served again."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from tiny_language import Pairs, language_model, trainer
from tiny_logits import centered, close, gradient, probabilities

from lit_distill.llm import rollouts
from lit_distill.llm.losses import forward_kl, reverse_kl, skew_kl, skew_reverse_kl
from lit_distill.llm.methods.kl import ForwardKL
from lit_distill.llm.rollouts import AdaptiveReplay

# ---- skew KL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [0.1, 0.7])
def test_gradient_of_skew_kl(skew, logits):
    q, p = probabilities(*logits)
    w = (1 - skew) * p * q / (skew * p + (1 - skew) * q)
    close(gradient(skew_kl(*logits, skew=skew), logits[0]), q * w.sum(-1, keepdims=True) - w)


@pytest.mark.parametrize("skew", [0.1, 0.7])
def test_gradient_of_skew_reverse_kl(skew, logits):
    q, p = probabilities(*logits)
    m = (1 - skew) * p + skew * q
    close(gradient(skew_reverse_kl(*logits, skew=skew), logits[0]), centered(q, np.log(q / m) - skew * q / m))


def test_skew_kls_are_kls_to_a_mixture(logits):
    q, p = probabilities(*logits)
    close(skew_kl(*logits, skew=0.2), entropy(p, 0.2 * p + 0.8 * q, axis=-1))
    close(skew_reverse_kl(*logits, skew=0.2), entropy(q, 0.8 * p + 0.2 * q, axis=-1))
    q, p = probabilities(*logits)
    close(skew_kl(*logits), entropy(p, 0.1 * p + 0.9 * q, axis=-1))


def test_skew_kls_become_kls(logits):
    close(skew_kl(*logits, skew=0.0), forward_kl(*logits).detach().numpy())
    close(skew_reverse_kl(*logits, skew=0.0), reverse_kl(*logits).detach().numpy())
    close(skew_kl(*logits, skew=1e-9), forward_kl(*logits).detach().numpy(), 1e-5)


def test_skew_kls_reach_their_bound_where_nothing_is_shared():
    student, teacher = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    for loss in (skew_kl, skew_reverse_kl):
        assert float(loss(student, teacher)) == pytest.approx(-math.log(0.1), abs=1e-6)
        assert float(loss(student, teacher, skew=0.4)) == pytest.approx(-math.log(0.4), abs=1e-6)


# ---- replay ----------------------------------------------------------------------------------------------------------


def test_replay_grows_where_validation_gets_worse():
    rollout = AdaptiveReplay(tolerance=0.1)
    for loss in (2.0, 1.5, 2.05, 2.2, 2.25, 2.5):
        rollout.on_validation(loss)
    assert rollout.phi == pytest.approx(0.2)  # 2.2 against 2.0, 2.5 against 2.2
    fresh = AdaptiveReplay()
    fresh.load_state_dict(rollout.state_dict())
    assert (fresh.phi, fresh.last_loss) == (rollout.phi, 2.5)


@pytest.mark.parametrize(("processes", "mine"), [(2, [3, 4]), (1, [1, 2, 3, 4]), (3, [2])])
def test_replay_keeps_the_rows_of_all_processes(monkeypatch, processes, mine):
    """Two saved; as many or another number go on, and all of these have equally many rows."""
    saved = {"phi": 0.3, "last_loss": 1.0, "kept": [[([1], [9], 1), ([1], [9], 2)], [([1], [9], 3), ([1], [9], 4)]]}
    monkeypatch.setattr(rollouts, "distributed_rank", lambda: (min(1, processes - 1), processes))
    rollout = AdaptiveReplay(buffer=4)
    rollout.load_state_dict(saved)
    assert [row for _, _, row in rollout.kept] == mine
    monkeypatch.setattr(rollouts, "gathered", lambda kept: [saved["kept"][0], kept])
    rollout.kept = saved["kept"][1]
    assert rollout.state_dict() == saved


def test_replay_fills_its_buffer_and_then_serves_from_it(tmp_path):
    rollout = AdaptiveReplay(buffer=4, max_new_tokens=3)
    rollout.phi = 1.0
    module = ForwardKL(language_model(0), language_model(1), rollout=rollout)
    calls = []
    writer = rollout.writer
    rollout.writer = lambda batch, module: calls.append(module.iteration) or writer(batch, module)
    trainer(tmp_path, max_steps=12).fit(module, Pairs())
    assert len(rollout.kept) == 4
    assert calls[0] == 0
    assert 1 <= len(calls) < 12
