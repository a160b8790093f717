"""Claims on real data, several seeds, with a margin. Slow: `make test-claims`."""

import statistics

import pytest
from claims import difference, results_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of("image_small", tmp_path_factory.mktemp("claims"))


def test_kd_beats_the_student_alone_by_two_points_and_two_standard_errors(results):
    mean, error = difference(results, "kd", "test/acc")
    assert mean > 0.02
    assert mean > 2 * error


def test_kd_student_is_better_calibrated_than_the_student_alone(results):
    mean, error = difference(results, "kd", "test/ece")
    assert mean < -0.015
    assert mean < -2 * error


def test_teacher_reaches_what_the_pilot_reached(results):
    accuracies = [metrics["test/acc"] for metrics in results["teacher"].values()]
    assert statistics.mean(accuracies) > 0.975


def test_kd_with_attention_beats_the_student_alone_by_two_points_and_two_standard_errors(results):
    mean, error = difference(results, "combined", "test/acc")
    assert mean > 0.02
    assert mean > 2 * error


@pytest.mark.parametrize("stage", ["fitnets", "at"])
def test_features_make_the_labels_likelier_though_accuracy_shows_no_clear_difference(results, stage):
    # The papers claim accuracy. Likelihood was singled out after these very seeds were seen, so this guards the code
    # against change; it is not evidence for the methods.
    mean, error = difference(results, stage, "test/nll")
    assert mean < -0.03
    assert mean < -2 * error
