"""Figures with a line for each row: every seed's value, and the paired differences to the baseline."""

from collections.abc import Mapping, Sequence

from lit_distill.experiment.comparison import Comparison
from lit_distill.experiment.dashboard.figure import Figure, Look, Spec, axis_label, axis_title, plain
from lit_distill.experiment.groups import Group
from lit_distill.experiment.words import capital, is_percent, lower_is_better, metric_name, scaled, show


def dot_plot(comparison: Comparison, groups: Sequence[Group], looks: Mapping[str, Look]) -> Figure | None:
    """Every seed's value of the metric, and the mean with two standard errors, row by row."""
    metric = comparison.metric
    shown = [group for group in groups if metric in group.stats]
    if not shown:
        return None
    data: list[Spec] = []
    for place, group in enumerate(shown):
        look, stat = looks[group.label], group.stats[metric]
        seeds = group.values(metric)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "meta": group.label,
                "x": [scaled(metric, value) for value in seeds.values()],
                "y": [place + shift for shift in _spread(len(seeds))],
                "text": [f"{plain(group.label)}, seed {seed}" for seed in seeds],
                "hovertemplate": "%{text}: %{x:.4~g}<extra></extra>",
                "marker": {"color": f"@{look.colour}/0.45", "symbol": look.symbol, "size": 7},
            }
        )
        data.append(
            _mean_and_reach(group, place, look, scaled(metric, stat.mean), scaled(metric, 2 * (stat.se or 0.0)))
        )
    layout = _rows_layout(shown, looks, axis_title(metric))
    return Figure(
        "dots",
        f"{capital(metric_name(metric))} of every run",
        "Small marks are single seeds; the large mark is their mean, with two standard errors to each side.",
        "; ".join(f"{group.label}: {show(metric, group.stats[metric])}" for group in shown),
        {"": {"data": data, "layout": layout}},
        ("stage", "seed", axis_title(metric)),
        [
            (group.label, str(seed), f"{scaled(metric, value):.4g}")
            for group in shown
            for seed, value in group.values(metric).items()
        ],
        height=_rows_height(shown),
        kind="dots",
    )


def difference_plot(comparison: Comparison, groups: Sequence[Group], looks: Mapping[str, Look]) -> Figure | None:
    """Paired differences to the baseline with their 95 % intervals, row by row."""
    metric = comparison.metric
    shown = [group for group in groups if group.difference is not None]
    if not shown:
        return None
    data: list[Spec] = []
    for place, group in enumerate(shown):
        look, difference = looks[group.label], group.difference
        assert difference is not None
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "meta": group.label,
                "x": [scaled(metric, value) for value in difference.per_seed.values()],
                "y": [place + shift for shift in _spread(difference.n)],
                "text": [f"{plain(group.label)}, seed {seed}" for seed in difference.per_seed],
                "hovertemplate": "%{text}: %{x:+.3~g}<extra></extra>",
                "marker": {"color": f"@{look.colour}/0.45", "symbol": look.symbol, "size": 7},
            }
        )
        reach = scaled(metric, difference.high - difference.mean)
        data.append(_mean_and_reach(group, place, look, scaled(metric, difference.mean), reach))
    unit = "percentage points" if is_percent(metric) else metric_name(metric)
    direction = "below zero is better" if lower_is_better(metric) else "above zero is better"
    layout = _rows_layout(shown, looks, f"difference in {unit}")
    ends = [0.0] + [
        scaled(metric, value)
        for group in shown
        if (d := group.difference) is not None
        for value in (d.low, d.high, *d.per_seed.values())
    ]
    margin = 0.06 * (max(ends) - min(ends) or 1.0)
    layout["xaxis"] |= {
        "range": [min(ends) - margin, max(ends) + margin],
        "zeroline": True,
        "zerolinewidth": 2,
        "zerolinecolor": "@muted",
    }
    return Figure(
        "differences",
        f"Paired difference to {comparison.baseline}",
        f"Small marks are single seeds, the large mark is their mean with its 95 % interval; {direction}.",
        "; ".join(
            f"{group.label}: {scaled(metric, d.mean):+.2f}, interval {scaled(metric, d.low):.2f} to "
            f"{scaled(metric, d.high):.2f}"
            for group in shown
            if (d := group.difference) is not None
        ),
        {"": {"data": data, "layout": layout}},
        ("stage", "seed", f"difference in {unit}"),
        [
            (group.label, str(seed), f"{scaled(metric, value):+.3g}")
            for group in shown
            if group.difference is not None
            for seed, value in group.difference.per_seed.items()
        ],
        height=_rows_height(shown),
        kind="differences",
    )


def _mean_and_reach(group: Group, place: int, look: Look, mean: float, reach: float) -> Spec:
    return {
        "type": "scatter",
        "mode": "markers",
        "meta": group.label,
        "x": [mean],
        "y": [place],
        "error_x": {"type": "data", "array": [reach], "thickness": 2, "width": 6, "color": f"@{look.colour}"},
        "marker": {
            "color": f"@{look.colour}",
            "symbol": look.symbol,
            "size": 13,
            "line": {"color": "@card", "width": 1.5},
        },
        "hovertemplate": f"{plain(group.label)}: %{{x:.4~g}} ± {reach:.2g}<extra></extra>",
    }


def _rows_layout(groups: Sequence[Group], looks: Mapping[str, Look], title: str) -> Spec:
    return {
        "xaxis": {"title": {"text": title}},
        "yaxis": {
            "tickvals": list(range(len(groups))),
            "ticktext": [axis_label(looks[group.label].name) for group in groups],
            "range": [len(groups) - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
        },
    }


def _rows_height(groups: Sequence[Group]) -> int:
    return 90 + (56 if len(groups) <= 8 else 36) * max(len(groups), 2)


def _spread(n: int) -> list[float]:
    """Small shifts that keep the marks of n seeds apart, the same on every drawing."""
    return [0.3 * (i / (n - 1) - 0.5) if n > 1 else 0.0 for i in range(n)]
