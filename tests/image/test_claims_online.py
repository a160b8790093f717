"""The claim of BD-KD on real data with noisy labels, four seeds, with a margin. Slow: `make test-claims`."""

import pytest
from claims import difference, results_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of("bdkd_noise", tmp_path_factory.mktemp("claims"))


# The first is the paper's claim. DML and the controls of equal total weight meet it as well here: it is evidence for
# learning together, not for balancing.
@pytest.mark.parametrize("stage", ["bdkd", "dml", "forward", "constant"])
def test_a_student_that_learns_with_a_teacher_is_better_calibrated_than_one_that_learns_alone(results, stage):
    mean, error = difference(results, stage, "test/ece")
    assert mean < -0.06
    assert mean < -2 * error


@pytest.mark.parametrize("stage", ["bdkd", "dml", "forward", "constant"])
def test_it_is_no_less_accurate_and_makes_the_labels_likelier(results, stage):
    mean, _ = difference(results, stage, "test/acc")
    assert mean > -0.005
    mean, error = difference(results, stage, "test/nll")
    assert mean < -0.2
    assert mean < -2 * error
