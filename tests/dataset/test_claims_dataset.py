"""What the recipe on digits shows, three distillations and three students each. Slow: `make test-claims`."""

import statistics

import pytest
from claims import difference, results_of

pytestmark = pytest.mark.slow

LEARNED = [f"{method}-{count}" for method in ("dm", "dc", "mtt") for count in (1, 10)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def only_hard_labels(recipe):
        wanted = {"random-1", "random-10", "experts", *LEARNED, *(f"{stage}-set" for stage in LEARNED)}
        recipe["stages"] = {name: stage for name, stage in recipe["stages"].items() if name in wanted}

    return results_of("dataset_digits", tmp_path_factory.mktemp("claims"), only_hard_labels)


# DM +22.9, DC +20.9, MTT +22 points for one image of each class.
@pytest.mark.parametrize("method", ["dm", "dc", "mtt"])
def test_one_learned_image_of_each_class_is_far_above_a_random_one(results, method):
    mean, error = difference(results, f"{method}-1", "test/acc", "random-1")
    assert mean > 0.1
    assert mean > 2 * error


def test_ten_images_matched_in_distribution_are_above_random_ones(results):
    mean, error = difference(results, "dm-10", "test/acc", "random-10")
    assert mean > 0.01
    assert mean > 2 * error


def test_more_images_are_better(results):
    for method in ("random", "dm", "dc", "mtt"):
        one, ten = (statistics.mean(m["test/acc"] for m in results[f"{method}-{n}"].values()) for n in (1, 10))
        assert ten > one + 0.03
