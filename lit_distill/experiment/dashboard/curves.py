"""Learning curves: mean over seeds against the step."""

from collections.abc import Mapping, Sequence

from lit_distill.experiment.compare import Comparison, Group
from lit_distill.experiment.dashboard.figure import Figure, Look, Spec, axis_title, plain
from lit_distill.experiment.words import metric_name, scaled

CURVE_POINTS = 200  # about the width of a plot in steps that the eye can tell apart


def learning_curves(comparison: Comparison, groups: Sequence[Group], looks: Mapping[str, Look]) -> Figure | None:
    """Mean over seeds against the step, with one standard deviation as a band; one specification for each metric."""
    histories = {group.label: [run.history() for run in group.runs] for group in groups}
    keys = {key for history in histories.values() for run in history for key in run}
    like_metric = "val/" + comparison.metric.rpartition("/")[2]
    chosen = sorted(
        (key for key in keys if key.partition("/")[0] in ("val", "train")),
        key=lambda key: (key != like_metric, not key.startswith("val/"), key),
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
