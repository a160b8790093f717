"""Numbers that change during training: loss weights, temperatures, mixing factors.

A schedule maps the iteration (batches seen, from 0) to a number. Everything that takes a schedule takes a plain number
too.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from lit_distill.core.errors import UsageError


@runtime_checkable
class Schedule(Protocol):
    """A number as a function of the iteration."""

    def __call__(self, iteration: int) -> float:
        """Returns the value at `iteration` (batches seen so far, from 0)."""
        ...


class Linear:
    """From `start` to `end` in a straight line over `iterations`, then constant.

    Args:
        start: Value at and before iteration `begin`.
        end: Value from iteration `begin + iterations` on.
        iterations: Length of the ramp, in batches.
        begin: First iteration of the ramp.
    """

    def __init__(self, start: float, end: float, iterations: int, begin: int = 0) -> None:
        if iterations < 1:
            raise UsageError(f"schedule: iterations is {iterations}; give the ramp at least 1 batch")
        self.start, self.end, self.iterations, self.begin = start, end, iterations, begin

    def __call__(self, iteration: int) -> float:
        """Returns the value at `iteration`."""
        return self.start + (self.end - self.start) * self._shape(self._progress(iteration))

    def _progress(self, iteration: int) -> float:
        return min(max((iteration - self.begin) / self.iterations, 0.0), 1.0)

    @staticmethod
    def _shape(progress: float) -> float:
        return progress


class Cosine(Linear):
    """As `Linear`, along half a cosine: slow at both ends."""

    @staticmethod
    def _shape(progress: float) -> float:
        return 0.5 * (1.0 - math.cos(math.pi * progress))


class Steps:
    """Constant between milestones.

    Args:
        values: One more than milestones.
        milestones: Increasing iterations; `values[i + 1]` holds from `milestones[i]` on.
    """

    def __init__(self, values: Sequence[float], milestones: Sequence[int]) -> None:
        if len(values) != len(milestones) + 1 or list(milestones) != sorted(set(milestones)):
            raise UsageError(
                f"schedule: {len(values)} values for milestones {list(milestones)}; "
                "milestones must increase and there must be one value more than milestones"
            )
        self.values, self.milestones = list(values), list(milestones)

    def __call__(self, iteration: int) -> float:
        """Returns the value at `iteration`."""
        return self.values[bisect_right(self.milestones, iteration)]


def value_at(schedule: float | Schedule, iteration: int) -> float:
    """Returns the value of a schedule, or the plain number, at `iteration`."""
    return schedule(iteration) if callable(schedule) else float(schedule)
