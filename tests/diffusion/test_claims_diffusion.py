"""What the recipe on digits shows, three generators each. Slow: `make test-claims`."""

import statistics

import pytest
from claims import difference, results_of

pytestmark = pytest.mark.slow

WANTED = ("classifier", "teacher", "dmd-no-pairs", "dmd2")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def distribution_matching(recipe):
        recipe["stages"] = {name: recipe["stages"][name] for name in WANTED}

    return results_of("digits_diffusion", tmp_path_factory.mktemp("claims"), distribution_matching)


# -0.0080 in Frechet distance, +0.16 in recall.
def test_a_discriminator_on_real_images_improves_distribution_matching(results):
    for metric, margin in (("test/fd", -0.004), ("test/recall", 0.08)):
        mean, error = difference(results, "dmd2", metric, "dmd-no-pairs")
        assert mean / margin > 1
        assert abs(mean) > 2 * error


# 0.717 with a fake score; one step of the teacher itself has 0.02.
def test_a_fake_score_keeps_the_modes(results):
    assert statistics.mean(m["test/recall"] for m in results["dmd-no-pairs"].values()) > 0.5


# 0.0086 in one evaluation, 0.0091 in 35.
def test_one_evaluation_is_near_the_teacher(results):
    (teacher,) = results["teacher"].values()
    assert statistics.mean(m["test/fd"] for m in results["dmd2"].values()) < teacher["test/fd"] + 0.005
