"""Learning on what the student writes, and from the log-ratio of its tokens."""

import copy

import numpy as np
import torch
from tiny_language import Pairs, kl, language_model, logits_of, sgd, trainer
from tiny_logits import N, V, close, gradient, probabilities

from lit_distill.llm.losses import reverse_kl, sampled_reverse_kl
from lit_distill.llm.methods.kl import ReverseKL
from lit_distill.llm.methods.on_policy import OnPolicyDistillation
from lit_distill.llm.rollouts import OnPolicy, prompts_of

# ---- sampled reverse KL ----------------------------------------------------------------------------------------------


def test_the_expected_sampled_gradient_is_that_of_reverse_kl(logits):
    (q,) = probabilities(logits[0])
    expected = sum(
        q[:, token, None] * gradient(sampled_reverse_kl(*logits, torch.full((N,), token, dtype=torch.long)), logits[0])
        for token in range(V)
    )
    close(gradient(reverse_kl(*logits), logits[0]), expected)


def test_the_advantage_is_a_constant(logits):
    q, p = probabilities(*logits)
    labels = torch.tensor([0, 5, 16, 2, 2, 9])
    picked = np.arange(N), labels.numpy()
    advantage = np.log(p[picked] / q[picked])
    value = sampled_reverse_kl(*logits, labels)
    close(value, -advantage * np.log(q[picked]))
    close(gradient(value, logits[0]), -advantage[:, None] * (np.eye(V)[labels.numpy()] - q))
    assert logits[1].grad is None


# ---- the method ------------------------------------------------------------------------------------------------------


class Recorded(OnPolicy):
    def __call__(self, batch, module):
        self.last = super().__call__(batch, module)
        return self.last


def test_on_policy_scores_what_the_student_wrote(tmp_path):
    student = language_model(0)
    rollout = Recorded(share=1.0, max_new_tokens=5)
    module = ReverseKL(student, language_model(1), rollout=rollout, optimizer=sgd)
    data = Pairs()
    before = copy.deepcopy(student)
    trainer(tmp_path, max_steps=1).fit(module, data)
    batch, written = data.train_dataloader()[0], rollout.last
    assert prompts_of(written) == prompts_of(batch)
    assert written.total == len(written.targets)
    assert torch.equal(written.input_ids.flatten()[written.scored + 1], written.targets)
    q, p = (logits_of(network, written).log_softmax(-1) for network in (before, module.teacher))
    torch.testing.assert_close(module.terms["match"], kl(q, p).mean().detach(), rtol=1e-4, atol=1e-5)


def test_sampled_tokens_are_rewarded_by_the_log_ratio(tmp_path):
    rollout = Recorded(share=1.0, max_new_tokens=5)
    student = language_model(0)
    by_hand = copy.deepcopy(student)
    module = OnPolicyDistillation(student, language_model(1), rollout=rollout, optimizer=sgd)
    trainer(tmp_path, max_steps=1).fit(module, Pairs())
    batch = rollout.last
    q, p = (logits_of(network, batch).log_softmax(-1) for network in (by_hand, module.teacher))
    q, p = (x.gather(1, batch.targets[:, None])[:, 0] for x in (q, p))
    (-(p - q).detach() * q).mean().backward()
    moved = dict(student.named_parameters())
    for key, parameter in by_hand.named_parameters():
        torch.testing.assert_close(moved[key], parameter - 0.1 * parameter.grad, rtol=1e-4, atol=1e-5)
