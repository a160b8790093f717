from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    log_loss,
)

from lit_distill.core.metrics import (
    CalibrationError,
    TemperatureScaling,
    classification_metrics,
    classifier_panels,
    reliability,
)


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


def bins_by_hand(probabilities, hits):
    """Share of the samples and |frequency - mean probability| in each bin of equal width that is not empty."""
    for low in range(15):
        inside = (probabilities >= low / 15) & ((probabilities < (low + 1) / 15) | (low == 14))
        if inside.any():
            yield inside.mean(), abs(hits[inside].mean() - probabilities[inside].mean())


def test_accuracy_and_likelihood_equal_scikit_learns(answers):
    logits, labels = answers
    values = updated(logits, labels).compute()
    probabilities = logits.double().softmax(1).numpy()
    assert float(values["test/nll"]) == pytest.approx(log_loss(labels, probabilities, labels=range(5)), rel=1e-5)
    assert float(values["test/acc"]) == pytest.approx(accuracy_score(labels, logits.argmax(1)))


def test_confusion_and_balanced_accuracy_equal_scikit_learns(answers):
    logits, labels = answers
    labels = labels.clamp(max=3)  # of the last class there is no sample
    metrics = updated(logits, labels)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = balanced_accuracy_score(labels, logits.argmax(1))
    assert float(metrics.compute()["test/acc_balanced"]) == pytest.approx(expected)
    panel = classifier_panels(metrics, SimpleNamespace(classes=tuple("abcde")))["confusion"]
    assert panel["classes"] == list("abcde")
    assert panel["counts"] == confusion_matrix(labels, logits.argmax(1), labels=range(5)).tolist()


def test_a_confusion_of_many_classes_is_no_panel():
    metrics = updated(torch.randn(4, 31), torch.tensor([0, 1, 2, 30]))
    assert set(classifier_panels(metrics, SimpleNamespace())) == {"reliability"}
    few = updated(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert classifier_panels(few, SimpleNamespace())["confusion"]["classes"] == ["0", "1", "2"]


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


def test_validation_stays_light():
    assert set(classification_metrics(5, prefix="val/")) == {"val/acc", "val/ece", "val/nll"}
    assert {"test/teacher_mce", "test/teacher_brier"} < set(classification_metrics(5, prefix="test/teacher_"))


def test_brier_score_equals_scikit_learns(answers):
    logits, labels = answers
    expected = brier_score_loss(labels, logits.double().softmax(1).numpy(), labels=range(5))
    assert float(updated(logits, labels).compute()["test/brier"]) == pytest.approx(expected, rel=1e-5)
    worst = updated(torch.tensor([[90.0, 0.0]]), torch.tensor([1])).compute()["test/brier"]
    assert float(worst) == pytest.approx(2.0)


def test_worst_bin_equals_a_loop_over_bins(answers):
    logits, labels = answers
    probabilities = logits.double().softmax(1).numpy()
    hits = probabilities.argmax(1) == labels.numpy()
    expected = max(gap for _, gap in bins_by_hand(probabilities.max(1), hits))
    assert float(updated(logits, labels).compute()["test/mce"]) == pytest.approx(expected, rel=1e-4)


def test_adaptive_error_equals_a_loop_over_bins_of_equal_mass(answers):
    logits, labels = answers[0][:195], answers[1][:195]
    probabilities = logits.double().softmax(1).numpy()
    order = probabilities.max(1).argsort()
    hits, confidence = (probabilities.argmax(1) == labels.numpy())[order], probabilities.max(1)[order]
    expected = sum(
        abs(h.mean() - c.mean()) / 15 for h, c in zip(np.split(hits, 15), np.split(confidence, 15), strict=True)
    )
    assert float(updated(logits, labels).compute()["test/ece_adaptive"]) == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(ece_by_hand(probabilities, labels.numpy()), rel=1e-3)


def test_classwise_error_equals_a_loop_over_classes_and_bins(answers):
    logits, labels = answers
    probabilities = logits.double().softmax(1).numpy()
    expected = np.mean(
        [sum(share * gap for share, gap in bins_by_hand(probabilities[:, k], labels.numpy() == k)) for k in range(5)]
    )
    assert float(updated(logits, labels).compute()["test/ece_classwise"]) == pytest.approx(expected, rel=1e-4)


def test_labels_drawn_from_the_forecast_give_errors_that_vanish():
    generator = torch.Generator().manual_seed(1)
    errors = {}
    for count in (400, 40_000):
        logits = 2 * torch.randn(count, 4, generator=generator)
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        errors[count] = updated(logits, labels, batch=1000).compute()
    for name in ("ece", "ece_adaptive", "ece_classwise"):
        assert float(errors[40_000][f"test/{name}"]) < 0.01
        # Ten times the samples squared: a tenth of the error, give or take chance.
        assert float(errors[40_000][f"test/{name}"]) < 0.3 * float(errors[400][f"test/{name}"])


def test_constant_confidence_errs_by_its_distance_to_the_accuracy():
    # Confidence 0.7 on class 0, which is right for 50 of 150.
    logits = torch.tensor([[0.7, 0.3]]).log().expand(150, 2)
    values = updated(logits, torch.tensor([0, 1, 1] * 50)).compute()
    for name in ("ece", "mce", "ece_classwise"):
        assert float(values[f"test/{name}"]) == pytest.approx(0.7 - 1 / 3, rel=1e-5)
    # Ties are cut in the order of the data: bins of ten samples with 3 or 4 right, all below 0.7.
    assert float(values["test/ece_adaptive"]) == pytest.approx(0.7 - 1 / 3, rel=1e-5)


def test_temperature_is_the_one_that_scipy_finds_and_calibrates(answers):
    generator = torch.Generator().manual_seed(2)
    truth = torch.randn(6000, 5, generator=generator)
    labels = torch.multinomial(truth.softmax(1), 1, generator=generator)[:, 0]
    logits = 3.0 * truth  # three times too sure
    scaling, expected = TemperatureScaling(), CalibrationError(5)
    with torch.inference_mode():  # as evaluation runs
        for x, y in zip((logits + 0).split(1000), labels.split(1000), strict=True):
            scaling.update(x, y)
        temperature = float(scaling.compute())

    def likelihood(t):
        return log_loss(labels, (logits.double() / t).softmax(1).numpy())

    assert temperature == pytest.approx(minimize_scalar(likelihood, bounds=(0.5, 9), method="bounded").x, rel=1e-3)
    assert temperature == pytest.approx(3.0, rel=0.06)
    recalibrated = CalibrationError(5, temperature=temperature)
    for metric in (recalibrated, expected):
        metric.update(logits, labels)
    by_hand = ece_by_hand((logits.double() / temperature).softmax(1).numpy(), labels.numpy())
    assert float(recalibrated.compute()) == pytest.approx(by_hand, rel=1e-3)
    assert float(recalibrated.compute()) < 0.03 < 0.2 < float(expected.compute())
