"""Learning curves: mean over seeds against the step, and those of single runs for the page to draw."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lit_distill.experiment.comparison import Comparison
from lit_distill.experiment.dashboard.figure import Figure, Look, Spec, axis_title, plain
from lit_distill.experiment.groups import Group
from lit_distill.experiment.runs import History, Run
from lit_distill.experiment.words import metric_name, scaled

CURVE_POINTS = 200  # about the width of a plot in steps that the eye can tell apart
MOST_POINTS = 150_000  # of all single runs together; about 1 MB of the page
MOST_METRICS = 6  # of single runs


def learning_curves(
    comparison: Comparison, groups: Sequence[Group], looks: Mapping[str, Look], read: Callable[[Run], History]
) -> Figure | None:
    """Mean over seeds against the step, with one standard deviation as a band; one specification for each metric."""
    histories = {group.label: [read(run) for run in group.runs] for group in groups}
    keys = {key for history in histories.values() for run in history for key in run}
    longest = {
        key: max(len(run[key][0]) for history in histories.values() for run in history if key in run) for key in keys
    }
    like_metric = "val/" + comparison.metric.rpartition("/")[2]
    chosen = sorted(
        (key for key in keys if key.partition("/")[0] in ("val", "train")),
        # A single point is no curve: metrics that have no more come last.
        key=lambda key: (longest[key] == 1, key != like_metric, not key.startswith("val/"), key != "train/loss", key),
    )
    specs: dict[str, Spec] = {}
    rows = []
    for key in chosen:
        data: list[Spec] = []
        for group in groups:
            curve = mean_curve([run[key] for run in histories[group.label] if key in run])
            if curve is None:
                continue
            steps, mean, sd = curve
            look, mean = looks[group.label], [scaled(key, value) for value in mean]
            if sd is not None:
                reach = [scaled(key, value) for value in sd]
                data.append(_band(group, look, steps, mean, reach))
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if len(steps) <= 40 else "lines",
                    "name": plain(group.label),
                    "meta": group.label,
                    "x": steps,
                    "y": mean,
                    "line": {"color": f"@{look.colour}", "width": 2, "dash": look.dash},
                    "marker": {"symbol": look.symbol, "size": 5},
                    "hovertemplate": f"{plain(group.label)}, step %{{x}}: %{{y:.4~g}}<extra></extra>",
                }
            )
            rows.append((metric_name(key), group.label, f"{steps[-1]:,}", f"{mean[-1]:.4g}"))
        if data:
            specs[key] = {
                "data": data,
                "layout": {
                    "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
                    "yaxis": {"title": {"text": axis_title(key)}},
                },
            }
    if not specs:
        return None
    return Figure(
        "curves",
        "Learning curves",
        "Mean over seeds, with a band of one standard deviation to each side.",
        f"Curves of {len(specs)} metrics; the last value of each row is in the table of numbers.",
        specs,
        ("metric", "stage", "last step", "last mean"),
        rows,
        height=420,
        kind="curves",
    )


def mean_curve(
    curves: Sequence[tuple[Sequence[int], Sequence[float]]],
) -> tuple[list[int], list[float], list[float] | None] | None:
    """Mean and standard deviation of several seeds' curves.

    Taken at the first curve's steps, as far as all curves reach; others are interpolated linearly, which changes
    nothing where the steps agree. Long curves are thinned to `CURVE_POINTS`. Non-finite values are left out.

    Returns:
        Steps, means, standard deviations (None for one curve), or None where the curves do not overlap.
    """
    import numpy as np

    finite = [
        (np.asarray(steps, float)[keep], np.asarray(values, float)[keep])
        for steps, values in curves
        if (keep := np.isfinite(np.asarray(values, float))).any()
    ]
    if not finite:
        return None
    first, last = max(steps[0] for steps, _ in finite), min(steps[-1] for steps, _ in finite)
    grid = finite[0][0]
    grid = grid[(grid >= first) & (grid <= last)]
    if grid.size == 0:
        return None
    if grid.size > CURVE_POINTS:
        grid = grid[np.unique(np.linspace(0, grid.size - 1, CURVE_POINTS).round().astype(int))]
    stacked = np.stack([np.interp(grid, steps, values) for steps, values in finite])
    sd = stacked.std(axis=0, ddof=1).tolist() if len(finite) > 1 else None
    return grid.astype(int).tolist(), stacked.mean(axis=0).tolist(), sd


def _band(group: Group, look: Look, steps: list[int], mean: list[float], reach: list[float]) -> Spec:
    upper = [m + r for m, r in zip(mean, reach, strict=True)]
    lower = [m - r for m, r in zip(mean, reach, strict=True)]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": steps + steps[::-1],
        "y": upper + lower[::-1],
        "fill": "toself",
        "fillcolor": f"@{look.colour}/0.16",
        "line": {"width": 0},
        "meta": group.label,
        "hoverinfo": "skip",
    }


def run_curves(runs: Sequence[Run], metrics: Sequence[str], read: Callable[[Run], History]) -> dict[str, Any]:
    """Learning curves of all single runs, thinned so that a thousand of them fit into the page.

    Args:
        runs: All runs.
        metrics: Metrics of the comparison, whose validation curves come first.
        read: Gives a run's history.

    Returns:
        `metrics`, their titles and factors to the unit shown; `steps`, every different sequence of steps; `runs`, for
        each run the index of its steps and its values, by index of the metric.
    """
    histories = [read(run) for run in runs]
    known = Counter(key for history in histories for key in history if key.partition("/")[0] in ("val", "train"))
    first = {f"val/{metric.rpartition('/')[2]}" for metric in metrics}
    keys = sorted(
        known, key=lambda key: (key not in first, key != "train/loss", not key.startswith("val/"), -known[key])
    )
    keys = keys[:MOST_METRICS]
    curves = sum(known[key] for key in keys)
    most = max(12, min(CURVE_POINTS, MOST_POINTS // max(curves, 1)))
    steps: dict[tuple[int, ...], int] = {}
    of_runs = []
    factors = [scaled(key, 1.0) for key in keys]
    for history in histories:
        of_run = {}
        for number, key in enumerate(keys):
            if key in history:
                at, values = thinned(*history[key], most)
                place = steps.setdefault(tuple(at), len(steps))
                of_run[number] = [place, [_short(factors[number] * value) for value in values]]
        of_runs.append(of_run)
    return {"metrics": keys, "titles": [axis_title(key) for key in keys], "steps": list(steps), "runs": of_runs}


def thinned(steps: Sequence[int], values: Sequence[float], most: int) -> tuple[Sequence[int], Sequence[float]]:
    """At most so many points of a curve, evenly chosen, its ends among them."""
    n = len(steps)
    if n <= most:
        return steps, values
    kept = [round(i * (n - 1) / (most - 1)) for i in range(most)]
    return [steps[i] for i in kept], [values[i] for i in kept]


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
