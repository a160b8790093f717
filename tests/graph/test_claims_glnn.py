"""GLNN on digits as nodes against the same MLP with labels alone, ten paired seeds. Slow: `make test-claims`."""

import statistics

import pytest
from claims import difference, results_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of("graph_glnn", tmp_path_factory.mktemp("claims"))


# All test nodes +4.4 +- 0.4, visible ones +4.5 +- 0.4, hidden ones +4.2 +- 0.6: percent, mean and standard error.
@pytest.mark.parametrize("metric", ["test/acc", "test/acc_transductive", "test/acc_inductive"])
def test_a_teacher_that_sees_edges_makes_the_same_perceptron_better(results, metric):
    mean, error = difference(results, "glnn", metric, "mlp")
    assert mean > 0.02
    assert mean > 3 * error


def test_the_student_comes_close_to_its_teacher_without_edges(results):
    mean, _ = difference(results, "glnn", "test/acc", "teacher")
    assert mean > -0.01
    assert statistics.mean(metrics["test/agreement"] for metrics in results["glnn"].values()) > 0.97


def test_production_is_the_mix_of_both_protocols(results):
    for metrics in (*results["glnn"].values(), *results["teacher"].values()):
        mix = 0.8 * metrics["test/acc_transductive"] + 0.2 * metrics["test/acc_inductive"]
        assert metrics["test/acc_production"] == pytest.approx(mix)
        assert metrics["test/acc"] == pytest.approx(mix, abs=1e-3)
