import math

import pytest

from lit_distill.core.errors import UsageError
from lit_distill.core.schedules import Cosine, Linear, Steps, value_at


def test_linear_is_a_straight_line_between_its_ends():
    ramp = Linear(1.0, 5.0, 4, begin=10)
    assert [ramp(i) for i in (0, 10, 11, 12, 13, 14, 99)] == [1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.0]


def test_cosine_follows_half_a_cosine():
    ramp = Cosine(0.0, 2.0, 100)
    assert ramp(0) == 0.0
    assert ramp(50) == pytest.approx(1.0)
    assert ramp(25) == pytest.approx(1 - math.sqrt(0.5))
    assert ramp(100) == pytest.approx(2.0)
    assert ramp(1000) == pytest.approx(2.0)


def test_steps_change_at_their_milestones():
    steps = Steps([3.0, 2.0, 1.0], [10, 20])
    assert [steps(i) for i in (0, 9, 10, 19, 20, 1000)] == [3.0, 3.0, 2.0, 2.0, 1.0, 1.0]


def test_a_number_is_a_schedule_too():
    assert value_at(2, 100) == 2.0
    assert value_at(Linear(0.0, 10.0, 10), 3) == pytest.approx(3.0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Linear(0.0, 1.0, 0),
        lambda: Steps([1.0], [5]),
        lambda: Steps([1.0, 2.0, 3.0], [5, 5]),
        lambda: Steps([1.0, 2.0, 3.0], [6, 5]),
    ],
)
def test_schedules_that_make_no_sense_are_refused(build):
    with pytest.raises(UsageError, match="schedule"):
        build()
