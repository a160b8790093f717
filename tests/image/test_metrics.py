import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss

from lit_distill.image.metrics import classification_metrics, reliability


def updated(logits, labels, batch=7):
    metrics = classification_metrics(logits.shape[1], prefix="test/")
    for x, y in zip(logits.split(batch), labels.split(batch), strict=True):
        metrics.update(x, y)
    return metrics


@pytest.fixture
def answers():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(200, 5, generator=generator), torch.randint(5, (200,), generator=generator)


def ece_by_hand(probabilities, labels):
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    error = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & ((confidence < (low + 1) / 15) | (low == 14))
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


def test_accuracy_and_likelihood_equal_scikit_learns(answers):
    logits, labels = answers
    values = updated(logits, labels).compute()
    probabilities = logits.double().softmax(1).numpy()
    assert float(values["test/nll"]) == pytest.approx(log_loss(labels, probabilities, labels=range(5)), rel=1e-5)
    assert float(values["test/acc"]) == pytest.approx(accuracy_score(labels, logits.argmax(1)))


def test_calibration_error_equals_a_loop_over_bins(answers):
    logits, labels = answers
    expected = ece_by_hand(logits.double().softmax(1).numpy(), labels.numpy())
    assert float(updated(logits, labels).compute()["test/ece"]) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.05


def test_calibration_error_of_four_answers_by_hand():
    # Confidence 0.9, right on 1 of 2; confidence 0.6, right on both.
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]]).log()
    values = updated(logits, torch.tensor([0, 1, 0, 1])).compute()
    assert float(values["test/ece"]) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4, rel=1e-5)


def test_a_confidence_of_one_belongs_to_the_last_bin():
    metrics = updated(torch.tensor([[200.0, 0.0], [np.log(0.95), np.log(0.05)]]), torch.tensor([1, 0]))
    bins = reliability(metrics)
    assert bins["count"] == [0.0] * 14 + [2.0]
    assert bins["accuracy"][14] == 0.5
    assert bins["confidence"][14] == pytest.approx(0.975)


def test_bins_give_the_calibration_error_back(answers):
    logits, labels = answers
    metrics = updated(logits, labels)
    bins = {key: np.array(value) for key, value in reliability(metrics).items()}
    assert {key: len(value) for key, value in bins.items()} == {"confidence": 15, "accuracy": 15, "count": 15}
    assert bins["count"].sum() == 200
    error = (bins["count"] / 200 * np.abs(bins["accuracy"] - bins["confidence"])).sum()
    assert error == pytest.approx(float(metrics.compute()["test/ece"]), rel=1e-5)
    filled = bins["count"] > 0
    assert bool((np.floor(bins["confidence"][filled] * 15) == np.arange(15)[filled]).all())
    probabilities = logits.softmax(1).numpy()
    inside = (probabilities.max(1) >= 6 / 15) & (probabilities.max(1) < 7 / 15)
    assert bins["count"][6] == inside.sum() > 0
    assert bins["accuracy"][6] == pytest.approx((probabilities.argmax(1) == labels.numpy())[inside].mean(), rel=1e-5)


def test_metrics_start_anew_after_a_reset(answers):
    metrics = updated(*answers)
    metrics.reset()
    metrics.update(torch.tensor([[5.0, 0, 0, 0, 0]]), torch.tensor([0]))
    assert float(metrics.compute()["test/acc"]) == 1.0
    assert sum(reliability(metrics)["count"]) == 1


def test_a_confidence_on_an_edge_belongs_to_the_bin_above():
    # Three classes equally likely: confidence 1/3 = 5/15, the lower edge of bin 5.
    # (Not zeros: torchmetrics takes logits that all lie between 0 and 1 for probabilities.)
    assert reliability(updated(torch.full((4, 3), 2.0), torch.tensor([0, 1, 2, 0])))["count"][5] == 4.0
