"""GKD: the generalized Jensen-Shannon divergence, on text of which the student writes a share."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from tiny_language import Pairs, language_model, trainer
from tiny_logits import centered, close, gradient, probabilities

from lit_distill.llm.losses import forward_kl, generalized_jsd, reverse_kl
from lit_distill.llm.methods.gkd import GKD
from lit_distill.llm.rollouts import OnPolicy


@pytest.mark.parametrize("b", [0.1, 0.5, 0.8])
def test_gradient_of_the_generalized_jsd(b, logits):
    q, p = probabilities(*logits)
    expected = (1 - b) * centered(q, np.log(q / (b * p + (1 - b) * q)))
    close(gradient(generalized_jsd(*logits, teacher_weight=b), logits[0]), expected)
    found = gradient(generalized_jsd(*logits, teacher_weight=b, normalize="endpoint"), logits[0])
    close(found, expected / (b * (1 - b)))


def test_the_symmetric_jsd_is_scipys_distance_squared(logits):
    q, p = probabilities(*logits)
    m = (p + q) / 2
    close(generalized_jsd(*logits), (entropy(p, m, axis=-1) + entropy(q, m, axis=-1)) / 2)
    close(generalized_jsd(*logits), generalized_jsd(*logits[::-1]).detach().numpy())


@pytest.mark.parametrize("b", [0.1, 0.5, 0.9])
def test_the_jsd_reaches_the_binary_entropy(b):
    student, teacher = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    bound = -b * math.log(b) - (1 - b) * math.log(1 - b)
    assert float(generalized_jsd(student, teacher, teacher_weight=b)) == pytest.approx(bound, abs=1e-6)


@pytest.mark.parametrize("b", [0.2, 0.7])
def test_the_teachers_weight_is_the_teachers(b, logits):
    q, p = probabilities(*logits)
    m = b * p + (1 - b) * q
    expected = b * entropy(p, m, axis=-1) + (1 - b) * entropy(q, m, axis=-1)
    close(generalized_jsd(*logits, teacher_weight=b), expected)
    q, p = probabilities(*logits, temperature=2.0)
    m = b * p + (1 - b) * q
    expected = b * entropy(p, m, axis=-1) + (1 - b) * entropy(q, m, axis=-1)
    close(generalized_jsd(*logits, teacher_weight=b, temperature=2.0), expected)


@pytest.mark.parametrize("normalize", ["none", "endpoint"])
def test_at_its_ends_the_jsd_is_the_two_kls(normalize, logits):
    forward, reverse = (loss(*logits).detach().numpy() for loss in (forward_kl, reverse_kl))
    close(generalized_jsd(*logits, teacher_weight=0.0, normalize=normalize), forward)
    close(generalized_jsd(*logits, teacher_weight=1.0, normalize=normalize), reverse)


def test_normalized_the_jsd_comes_to_its_ends_without_a_jump(logits):
    forward, reverse = (loss(*logits).detach().numpy() for loss in (forward_kl, reverse_kl))
    close(generalized_jsd(*logits, teacher_weight=1e-6, normalize="endpoint"), forward, 1e-4)
    close(generalized_jsd(*logits, teacher_weight=1 - 1e-6, normalize="endpoint"), reverse, 1e-4)
    close(generalized_jsd(*logits, teacher_weight=1e-6), 1e-6 * forward, 1e-8)


@pytest.mark.parametrize("b", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_jsd_is_that_of_trl(b, temperature, logits):
    gkd = pytest.importorskip("trl.experimental.gkd")
    jsd = gkd.GKDTrainer.generalized_jsd_loss
    # Theirs keeps the classes apart, so that its "sum" is over tokens and classes.
    theirs = torch.stack(
        [
            jsd(student[None, None], teacher[None, None].detach(), beta=b, temperature=temperature, reduction="sum")
            for student, teacher in zip(*logits, strict=True)
        ]
    )
    ours = generalized_jsd(*logits, teacher_weight=b, temperature=temperature)
    close(ours, theirs.detach().numpy())
    close(gradient(ours, logits[0]), gradient(theirs, logits[0]))


def test_gkd_writes_in_its_share_of_steps(tmp_path):
    written = []

    class Counted(OnPolicy):
        def __call__(self, batch, module):
            found = super().__call__(batch, module)
            written.append(found is not batch)
            return found

    module = GKD(language_model(0), language_model(1), rollout=Counted(share=0.3, max_new_tokens=2))
    trainer(tmp_path, max_steps=60).fit(module, Pairs(count=4))
    assert 8 <= sum(written) <= 28  # 18 expected, three standard deviations are 11
