"""What the recipes on digits show, three generators each. Slow: `make test-claims`."""

import statistics

import pytest
from claims import difference, results_of

pytestmark = pytest.mark.slow

WANTED = ("classifier", "teacher", "dmd-no-pairs", "dmd2", "sid")


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


# -0.0048 in Frechet distance.
def test_score_identity_improves_on_the_gradient_of_the_divergence(results):
    mean, error = difference(results, "sid", "test/fd", "dmd-no-pairs")
    assert mean < -0.0024
    assert abs(mean) > 2 * error


# 0.717 with a fake score; one step of the teacher itself has 0.02.
def test_a_fake_score_keeps_the_modes(results):
    assert statistics.mean(m["test/recall"] for m in results["dmd-no-pairs"].values()) > 0.5


# 0.0086 in one evaluation, 0.0091 in 35.
def test_one_evaluation_is_near_the_teacher(results):
    (teacher,) = results["teacher"].values()
    assert statistics.mean(m["test/fd"] for m in results["dmd2"].values()) < teacher["test/fd"] + 0.005


# ---- parts of methods ------------------------------------------------------------------------------------------------

# Stage without the part, metric, and half of the difference to the whole method that was measured.
PARTS = [
    ("decoupled/ca-only", "test/std_ratio", 0.3),
    ("mdt/matching-only", "test/fd", 0.0026),
    ("msd/no-tsm", "test/fd", 0.017),
    ("nct/lambda-1", "test/control_error", 0.015),
    ("nct/boundary-only", "test/control_error", 0.037),
    ("nct/consistency-only", "test/fd", 1.0),
    ("nct/regression", "test/fd", 0.009),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    def shown(recipe):
        wanted = {"classifier", "teacher", "flow", "small", "dmd2"} | {stage for stage, _, _ in PARTS}
        wanted |= {f"{stage.partition('/')[0]}/baseline" for stage, _, _ in PARTS}
        recipe["stages"] = {name: stage for name, stage in recipe["stages"].items() if name in wanted}

    return results_of("digits_ablations", tmp_path_factory.mktemp("claims"), shown)


@pytest.mark.parametrize(("stage", "metric", "margin"), PARTS)
def test_a_method_is_better_than_without_a_part(parts, stage, metric, margin):
    mean, error = difference(parts, stage, metric, f"{stage.partition('/')[0]}/baseline")
    assert mean > margin
    assert mean > 2 * error
