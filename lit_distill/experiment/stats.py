"""Means over seeds and paired differences."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Stat:
    """Mean over seeds, standard deviation (n − 1 in the denominator; None for one seed), number of seeds."""

    mean: float
    sd: float | None
    n: int

    @property
    def se(self) -> float | None:
        """Standard error of the mean, None for one seed."""
        return None if self.sd is None else self.sd / math.sqrt(self.n)


@dataclass(frozen=True)
class Difference:
    """Paired difference to the baseline over the common seeds, with its 95 % interval by Student's t.

    Attributes:
        baseline: Label of the row that was subtracted.
        per_seed: Seed -> difference.
        mean: Mean difference.
        se: Standard error of the mean difference.
        low: Lower end of the interval.
        high: Upper end of the interval.
        fair: Whether both rows train the same student; otherwise the difference mixes size with method.
    """

    baseline: str
    per_seed: Mapping[int, float]
    mean: float
    se: float
    low: float
    high: float
    fair: bool = True

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.per_seed)

    @property
    def clear(self) -> bool:
        """Whether the difference exceeds two standard errors."""
        return abs(self.mean) > 2 * self.se


def stat(values: Iterable[float]) -> Stat:
    """Mean and standard deviation (n − 1) of at least one value."""
    values = list(values)
    n = len(values)
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return Stat(mean, sd, n)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], label: str, fair: bool = True
) -> Difference | None:
    """Difference of two rows over their common seeds.

    Args:
        values: Seed -> value of the row.
        baseline: Seed -> value of the baseline.
        label: The baseline's label.
        fair: Passed on.

    Returns:
        The difference, or None if fewer than two seeds are common, since one pair has no spread.
    """
    from scipy.special import stdtrit  # Student's t alone: scipy.stats takes most of a second to import

    common = sorted(values.keys() & baseline.keys())
    if len(common) < 2:
        return None
    per_seed = {seed: values[seed] - baseline[seed] for seed in common}
    over_seeds = stat(per_seed.values())
    mean, se = over_seeds.mean, over_seeds.se or 0.0
    reach = float(stdtrit(len(common) - 1, 0.975)) * se
    return Difference(label, per_seed, mean, se, mean - reach, mean + reach, fair)
