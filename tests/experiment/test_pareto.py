"""The Pareto front against a search of all pairs."""

import random

import pytest

from lit_distill.experiment.pareto import front
from lit_distill.experiment.tables import columns, fronts


def by_all_pairs(points):
    """Indices of the points that no other point beats, by the definition."""
    return [
        index
        for index, (cost, loss) in enumerate(points)
        if not any((c <= cost and q < loss) or (c < cost and q <= loss) for c, q in points)
    ]


@pytest.mark.parametrize("seed", range(30))
def test_the_front_is_that_of_all_pairs(seed):
    rng = random.Random(seed)
    points = [(float(rng.randrange(8)), float(rng.randrange(8))) for _ in range(rng.randrange(1, 25))]
    assert front(points) == by_all_pairs(points)


def test_equal_points_are_both_on_the_front():
    assert front([(1.0, 2.0), (1.0, 2.0), (1.0, 3.0), (2.0, 2.0)]) == [0, 1]
    assert front([]) == []


def test_small_is_good_or_bad_by_the_metric_and_rates_are_inverted(write_run, compared):
    for name, kl, speed in (("slow", 1.0, 10.0), ("fast", 2.0, 100.0), ("poor", 3.0, 50.0)):
        efficiency = {"inference_samples_per_second": speed}
        write_run(name, 0, {"test/kl": kl}, efficiency=efficiency, seconds=1.0)
    comparison = compared(metric="test/kl")
    assert fronts(comparison) == {"slow": ["latency"], "fast": ["latency"], "poor": []}


def test_costs_in_which_no_rows_differ_are_left_out(write_run, compared):
    for name, accuracy, steps in (("one", 0.5, 1.0), ("four", 0.7, 4.0)):
        write_run(name, 0, {"test/acc": accuracy, "test/nfe": steps})
    comparison = compared()
    assert fronts(comparison) == {"one": ["steps"], "four": ["steps"]}
    column = next(column for column in columns(comparison) if column.heading == "Pareto front")
    assert column.cells == ("steps", "steps")
