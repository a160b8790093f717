"""TAID: the target between student and teacher, and how it moves."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from tiny_language import Pairs, language_model, sgd, trainer
from tiny_logits import close, gradient, probabilities

from lit_distill.llm.losses import forward_kl, taid
from lit_distill.llm.methods.taid import TAID

# ---- the target ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["kl", "cross_entropy"])
def test_gradient_of_taid(value, logits):
    q, p = probabilities(*logits)
    geometric = q**0.7 * p**0.3
    target = geometric / geometric.sum(-1, keepdims=True)
    close(gradient(taid(*logits, t=0.3, value=value), logits[0]), q - target)


@pytest.mark.parametrize("t", [1.0, torch.tensor(1.0)])
def test_at_the_end_taid_is_forward_kl(t, logits):
    close(taid(*logits, t=t), forward_kl(*logits).detach().numpy())
    close(gradient(taid(*logits, t=t), logits[0]), gradient(forward_kl(*logits), logits[0]))


@pytest.mark.parametrize("value", ["kl", "cross_entropy"])
def test_at_the_start_taid_teaches_nothing(value, logits):
    found = taid(*logits, t=0.0, value=value)
    (q,) = probabilities(logits[0])
    close(found, 0.0 if value == "kl" else entropy(q, axis=-1), 1e-14)
    close(gradient(found, logits[0]), 0, 1e-14)


def test_taid_aims_at_the_geometric_mixture(logits):
    q, p = probabilities(*logits)
    geometric = q**0.6 * p**0.4
    target = geometric / geometric.sum(-1, keepdims=True)
    close(taid(*logits, t=0.4), entropy(target, q, axis=-1))
    close(taid(*logits, t=torch.tensor(0.4, dtype=torch.float64)), entropy(target, q, axis=-1))
    close(taid(*logits, t=0.4, value="cross_entropy"), -(target * np.log(q)).sum(-1))


# ---- how it moves ----------------------------------------------------------------------------------------------------


def test_taid_under_a_constant_loss_follows_the_closed_form():
    module = TAID(language_model(0), language_model(1), t_start=0.2, alpha=0.05)
    steps = 12
    for _ in range(steps + 1):  # the first loss is only kept
        module.move(torch.tensor(3.0), 0.0)
    assert float(module.t) == pytest.approx(1 - 0.8 * (1 - 0.05 / 2) ** steps, rel=1e-5)


def test_taid_counts_the_momentum_of_relative_change():
    module = TAID(language_model(0), language_model(1), t_start=0.2, alpha=0.3, beta=0.9)
    losses = [4.0, 3.0, 3.5, 1.0]
    t, momentum, last = 0.2, 0.0, None
    for loss in losses:
        module.move(torch.tensor(loss), 0.0)
        if last is not None:
            momentum = 0.9 * momentum + 0.1 * (last - loss) / last
            t += 0.3 / (1 + math.exp(-momentum)) * (1 - t)
        last = loss
        assert float(module.t) == pytest.approx(t, rel=1e-5)
    assert float(module.momentum) == pytest.approx(momentum, rel=1e-5)


def test_taid_moves_once_a_step_and_ends_at_the_teacher(tmp_path):
    seen = []

    class Watched(TAID):
        def move(self, loss, done):
            super().move(loss, done)
            seen.append((float(loss), float(self.t)))

    module = Watched(language_model(0), language_model(1), adaptive=False, t_start=0.2)
    runner = trainer(tmp_path, max_steps=4, accumulate_grad_batches=2, limit_val_batches=1.0)
    runner.fit(module, Pairs(count=16, batch_size=2, accumulated=2))
    assert [t for _, t in seen] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    runner.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state["t"] == 1.0
    assert {"momentum", "last_loss"} <= set(state)


def test_the_loss_that_moves_taid_is_that_of_the_whole_step(tmp_path):
    losses = {}
    for size, accumulated in ((4, 1), (2, 2)):
        module = TAID(language_model(0), language_model(1), teacher_weight=0.5, optimizer=sgd)
        runner = trainer(tmp_path, max_steps=1, accumulate_grad_batches=accumulated)
        runner.fit(module, Pairs(count=4, batch_size=size, accumulated=accumulated))
        losses[size] = float(module.last_loss)
    assert losses[2] == pytest.approx(losses[4], rel=1e-5)
