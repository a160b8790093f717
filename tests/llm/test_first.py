"""FIRST: a few tokens of the teacher, calibrated."""

import math

import numpy as np
import pytest
import torch
from tiny_language import Pairs, language_model, logits_of, pairs, token_batch, trainer
from tiny_logits import N, close, gradient, topk

from lit_distill.core.errors import UsageError
from lit_distill.llm.losses import calibrate_topk, cross_entropy, smooth_topk, topk_kl
from lit_distill.llm.methods.first import FIRST, most_probable, search_c
from lit_distill.llm.signals import TopK

# ---- calibrated tokens -----------------------------------------------------------------------------------------------


def test_calibration_is_a_softmax_of_probabilities():
    target = TopK(torch.tensor([[4, 2, 7]]), torch.tensor([[0.6, 0.2, 0.1]]).log())
    weights = np.exp(np.array([0.6, 0.2, 0.1]) / 0.3)
    found = calibrate_topk(target, c=0.3)
    assert found.ids.tolist() == [[4, 2, 7]]
    close(found.logprobs.exp(), (weights / weights.sum())[None], 1e-6)


def test_calibration_goes_from_the_first_token_alone_to_equal_shares(logits):
    target = topk(logits[1].detach(), 5)
    assert (calibrate_topk(target, c=0.2).logprobs.diff(dim=-1) < 0).all()  # the ranking stays
    close(calibrate_topk(target, c=1e6).logprobs.exp(), np.full((N, 5), 0.2), 1e-5)
    close(calibrate_topk(target, c=1e-6).logprobs.exp(), np.eye(5)[[0] * N], 1e-5)
    certain = TopK(torch.arange(5)[None], torch.tensor([[1.0, 0, 0, 0, 0]]).log())
    assert float(calibrate_topk(certain, c=1.0).logprobs[0, 0].exp()) == pytest.approx(math.e / (math.e + 4))


def test_a_calibrated_certain_teacher_gives_finite_losses(logits):
    target = calibrate_topk(topk(logits[1].detach(), 5), c=1e-6)
    value = topk_kl(logits[0], target, support="gathered")
    close(value, cross_entropy(logits[0], target.ids[:, 0]).detach().numpy(), 1e-5)
    assert np.isfinite(gradient(value, logits[0])).all()


def test_smoothing_shares_what_it_takes_from_the_first():
    target = TopK(torch.tensor([[4, 2, 7], [1, 2, 3]]), torch.tensor([[0.2, 0.6, 0.1], [0.05, 0.03, 0.02]]).log())
    found = smooth_topk(target, smoothing=0.1)
    close(found.logprobs.exp(), [[0.25, 0.5, 0.15], [0.0, 0.055, 0.045]], 1e-6)
    assert found.ids.tolist() == target.ids.tolist()
    with pytest.raises(UsageError, match=r"k = 1 has none: use k >= 2"):
        smooth_topk(TopK(torch.tensor([[1]]), torch.tensor([[-0.1]])))


# ---- the method ------------------------------------------------------------------------------------------------------


def test_first_searches_the_c_of_least_calibration_error():
    torch.manual_seed(0)
    logits = 2 * torch.randn(4000, 5)
    logprobs = logits.log_softmax(1).sort(descending=True).values
    honest = (logprobs.exp() / 0.37).softmax(1)[:, 0]  # first choices are right as often as c = 0.37 says
    right = torch.rand(4000) < honest

    def error(c):
        confidence = (logprobs.exp() / c).softmax(1)[:, 0]
        bins = (10 * confidence).long().clamp(max=9)
        gaps = torch.zeros(10).index_add(0, bins, right.float() - confidence)
        return float(gaps.abs().sum() / 4000)

    coarse = min((tenth / 10 for tenth in range(1, 11)), key=error)
    near = [coarse + step / 50 for step in range(-5, 6) if 0 < coarse + step / 50 <= 1]
    found = search_c(logprobs, right)
    assert found == pytest.approx(min(near, key=error))
    assert found == pytest.approx(0.37, abs=0.05)
    assert error(found) < error(coarse)


def test_first_takes_c_from_the_validation_tokens(tmp_path):
    teacher = language_model(1)
    module = FIRST(language_model(0), teacher, k=3)
    trainer(tmp_path, max_steps=1).fit(module, Pairs())
    batch = token_batch(pairs(4, seed=1) + pairs(3, seed=2))
    kept = most_probable(logits_of(teacher, batch).detach(), 3)
    assert module.c == search_c(kept.logprobs, kept.ids[:, 0] == batch.targets)


def test_first_learns_the_calibrated_tokens(tmp_path):
    student, teacher = language_model(0), language_model(1)
    batch = Pairs().train_dataloader()[0]
    p = logits_of(teacher, batch).softmax(-1).detach()
    top, ids = p.topk(3)
    target = (top / 0.4).softmax(-1)
    q = logits_of(student, batch).log_softmax(-1).gather(1, ids)
    wanted = (target * (target.log() - q)).sum() / batch.total
    module = FIRST(student, teacher, k=3, c=0.4)
    trainer(tmp_path, max_steps=1).fit(module, Pairs())
    torch.testing.assert_close(module.terms["match"], wanted.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("calibration", ["trustworthy", "smoothing", "none"])
@torch.no_grad()
def test_first_tells_how_calibrated_the_teacher_is(tmp_path, calibration):
    teacher = language_model(1)
    c = 0.4 if calibration == "trustworthy" else None
    module = FIRST(language_model(0), teacher, k=3, c=c, calibration=calibration, bins=5)
    runner, data = trainer(tmp_path, max_steps=1), Pairs()
    with torch.enable_grad():
        runner.fit(module, data)
    (logged,) = runner.test(module, data, verbose=False)
    batch = token_batch(pairs(4, seed=1) + pairs(3, seed=2))
    p, ids = logits_of(teacher, batch).softmax(-1).topk(3)
    right = (ids[:, 0] == batch.targets).float()
    taken = p[:, 0].clamp(max=0.1)
    said = {"trustworthy": (p / 0.4).softmax(-1)[:, 0], "smoothing": p[:, 0] - taken, "none": p[:, 0]}[calibration]
    for name, confidence in (("teacher", p[:, 0]), ("calibrated", said)):
        gaps = torch.zeros(5).index_add(0, (5 * confidence).long().clamp(max=4), right - confidence)
        assert logged[f"test/{name}_ece"] == pytest.approx(float(gaps.abs().sum() / len(right)), abs=1e-4), name
    assert logged["test/teacher_acc"] == pytest.approx(float(right.mean()))
    assert ("test/c" in logged) == (calibration == "trustworthy")
    assert "test/calibrated_acc" not in logged


def test_kept_tokens_may_be_more_but_not_fewer():
    kept = TopK(torch.tensor([[4, 9, 2]]), torch.tensor([[-3.0, -0.5, -1.0]]))
    fewer = most_probable(kept, 2)
    assert fewer.ids.tolist() == [[9, 2]]
    assert fewer.logprobs.tolist() == [[-0.5, -1.0]]
    with pytest.raises(UsageError, match=r"model.k is 5, but only 3 tokens were kept"):
        most_probable(kept, 5)
