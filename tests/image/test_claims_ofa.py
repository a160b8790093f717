"""OFA against KD with a convolutional teacher and a transformer as the student, ten paired seeds. Slow.

The paper claims accuracy, which held here with the exponent 1: +1.9 +- 0.7 points (mean and standard error). With 1.3
there was no clear difference (+0.8 +- 0.7), and hints, the paper's worst, were no worse than KD (+1.4 +- 1.0): neither
is asserted. The settings were fixed before test images were looked at, but for seed 0, which is not here.
"""

import statistics

import pytest
from claims import difference, results_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def shorten(recipe):
        recipe["stages"] = {name: recipe["stages"][name] for name in ("teacher", "kd", "ofa")}

    return results_of("ofa", tmp_path_factory.mktemp("claims"), shorten)


def test_exits_beat_logits_where_networks_differ_in_kind(results):
    mean, error = difference(results, "ofa", "test/acc", "kd")
    assert mean > 0.005
    assert mean > 1.5 * error


def test_the_teacher_is_much_better_than_its_students(results):
    assert results["teacher"][0]["test/acc"] > 0.98
    assert 0.8 < statistics.mean(metrics["test/acc"] for metrics in results["kd"].values()) < 0.92
