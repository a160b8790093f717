"""Quality against cost: what runs cost, and the rows that no other row beats in both."""

from collections.abc import Sequence
from dataclasses import dataclass

from lit_distill.experiment.groups import Group
from lit_distill.experiment.words import lower_is_better


@dataclass(frozen=True)
class Cost:
    """A cost that summaries tell, small where it is good.

    Attributes:
        key: The figure (see `Run.figures`).
        name: Short name, for a cell of a table.
        axis: What it is, for an axis.
        unit: Unit, for ticks.
        rate: Whether the figure is the cost's inverse: samples per second, where the cost is seconds per sample.
    """

    key: str
    name: str
    axis: str
    unit: str = ""
    rate: bool = False

    def of(self, group: Group) -> float | None:
        """Mean cost of a row, None where it is unknown or not above zero."""
        stat = group.stats.get(self.key)
        if stat is None or not stat.mean > 0:
            return None
        return 1 / stat.mean if self.rate else stat.mean


COSTS = (
    Cost("test/bytes", "bytes", "bytes of the training set", "B"),
    Cost("efficiency/student_params", "params", "parameters of the student"),
    Cost("efficiency/student_flops", "FLOPs", "FLOPs of the student for one sample"),
    Cost("test/nfe", "steps", "sampling steps (evaluations of the network)"),
    Cost("test/images_per_second", "sampling", "seconds for a sampled image", "s", rate=True),
    Cost("efficiency/inference_samples_per_second", "latency", "seconds for a sample in inference", "s", rate=True),
    Cost("efficiency/peak_memory_bytes", "memory", "peak memory of the run", "B"),
    Cost("seconds", "training", "wall time of the run", "s"),
)


def costs_of(groups: Sequence[Group], metric: str) -> list[Cost]:
    """The costs in which the rows that have the metric differ; those without a difference decide nothing."""
    measured = [group for group in groups if metric in group.stats]
    return [cost for cost in COSTS if len({value for group in measured if (value := cost.of(group)) is not None}) > 1]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats: none is as good in both coordinates and better in one.

    Args:
        points: Cost and loss of each row, both good when small.
    """
    kept: list[int] = []
    best = float("inf")
    order = sorted(range(len(points)), key=points.__getitem__)
    for index in order:
        cost, loss = points[index]
        is_equal = bool(kept) and points[kept[-1]] == (cost, loss)
        if loss < best or is_equal:
            kept.append(index)
            best = loss
    return sorted(kept)


def pareto_front(groups: Sequence[Group], metric: str, cost: Cost) -> list[Group]:
    """The rows on the front of the metric's mean against the mean cost, in the order of the rows."""
    sign = 1 if lower_is_better(metric) else -1
    shown = [(group, value) for group in groups if metric in group.stats and (value := cost.of(group)) is not None]
    return [shown[index][0] for index in front([(value, sign * group.stats[metric].mean) for group, value in shown])]
