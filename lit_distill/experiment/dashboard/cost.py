"""The metric against what it costs."""

import math
from collections.abc import Mapping, Sequence

from lit_distill.experiment.compare import Comparison, Group
from lit_distill.experiment.dashboard.figure import Figure, Look, Spec, axis_label, axis_title, plain
from lit_distill.experiment.words import lower_is_better, metric_name, scaled, show

MOST_LABELLED = 12  # more labels than this do not fit beside the points of a plot


def size_plot(comparison: Comparison, groups: Sequence[Group], looks: Mapping[str, Look]) -> Figure | None:
    """The metric against size on a logarithmic axis: bytes of distilled data where there are any, else parameters."""
    metric, size, unit, axis = comparison.metric, "efficiency/student_params", "parameters", "parameters of the student"
    if any("test/bytes" in group.stats for group in groups):
        size, unit, axis = "test/bytes", "bytes", "bytes of the training set"
    shown = [
        group for group in groups if metric in group.stats and group.stats.get(size) and group.stats[size].mean > 0
    ]
    if not shown:
        return None
    sizes = [math.log10(group.stats[size].mean) for group in shown]
    margin = max(0.12 * (max(sizes) - min(sizes)), 0.15)
    x_range = [min(sizes) - margin, max(sizes) + margin]
    places, label_places = _side_by_side(sizes, x_range)
    data: list[Spec] = []
    for group, place in zip(shown, places, strict=True):
        look, stat, bulk = looks[group.label], group.stats[metric], group.stats[size]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "meta": group.label,
                "x": [place],
                "customdata": [f"{bulk.mean:,.0f} {unit}"],
                "y": [scaled(metric, stat.mean)],
                "error_x": {"type": "data", "array": [2 * (bulk.se or 0.0)], "thickness": 1.5, "width": 4},
                "error_y": {
                    "type": "data",
                    "array": [scaled(metric, 2 * (stat.se or 0.0))],
                    "thickness": 1.5,
                    "width": 4,
                },
                "marker": {
                    "color": f"@{look.colour}",
                    "symbol": look.symbol,
                    "size": 13,
                    "line": {"color": "@card", "width": 1.5},
                },
                "hovertemplate": f"{plain(group.label)}: %{{y:.4~g}} with %{{customdata}}<extra></extra>",
            }
        )
    reach = [
        scaled(metric, group.stats[metric].mean + sign * 2 * (group.stats[metric].se or 0.0))
        for group in shown
        for sign in (-1, 1)
    ]
    margin = 0.08 * (max(reach) - min(reach)) or 0.05
    y_range = [min(reach) - margin, max(reach) + margin]
    if len(shown) <= MOST_LABELLED:
        data += _point_labels(data, label_places, x_range, y_range)
    ticks = _log_ticks(*x_range)
    return Figure(
        "size",
        f"{metric_name(metric).capitalize()} against size",
        f"Mean with two standard errors; {'down' if lower_is_better(metric) else 'up'} and to the left is better."
        + (" Marks of one size stand side by side." if places != [10**value for value in sizes] else ""),
        "; ".join(f"{g.label}: {g.stats[size].mean:,.0f} {unit}, {show(metric, g.stats[metric])}" for g in shown),
        {
            "": {
                "data": data,
                "layout": {
                    "xaxis": {
                        "type": "log",
                        "title": {"text": axis},
                        "range": x_range,
                        "tickvals": ticks,
                        "ticktext": [_short_number(tick, " B" if unit == "bytes" else "") for tick in ticks],
                    },
                    "yaxis": {"title": {"text": axis_title(metric)}, "range": y_range},
                },
            }
        },
        ("stage", unit, axis_title(metric)),
        [(g.label, f"{g.stats[size].mean:,.0f}", show(metric, g.stats[metric])) for g in shown],
        height=420,
    )


def _side_by_side(sizes: Sequence[float], x_range: Sequence[float]) -> tuple[list[float], list[float]]:
    """Moves marks of about one size apart, so that their error bars can be told apart.

    Args:
        sizes: Logarithms to base 10.
        x_range: Those of the axis's ends.

    Returns:
        Where each mark stands on the axis, and where the last one beside it does.
    """
    width = x_range[1] - x_range[0]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    clusters: list[list[int]] = []
    for at in order:
        if clusters and sizes[at] - sizes[clusters[-1][0]] < 0.02 * width:
            clusters[-1].append(at)
        else:
            clusters.append([at])
    places, ends = list(sizes), list(sizes)
    for cluster in clusters:
        step = min(0.03, 0.25 / len(cluster)) * width
        for number, at in enumerate(cluster):
            places[at] += step * (number - (len(cluster) - 1) / 2)
        for at in cluster:
            ends[at] = places[cluster[-1]]
    return [10**place for place in places], [10**end for end in ends]


def _point_labels(
    points: Sequence[Spec], places: Sequence[float], x_range: Sequence[float], y_range: Sequence[float]
) -> list[Spec]:
    """Labels beside points on a logarithmic axis: to the left near the right border, and moved up off each other."""
    width, height, line, letter = 340, 330, 16, 7  # pixels; a figure is rarely smaller
    placed: list[tuple[float, float, float]] = []
    labels: list[Spec] = []
    for point, place in sorted(zip(points, places, strict=True), key=lambda pair: pair[0]["y"][0]):
        text = axis_label(point["meta"]).partition("<br>")[0]
        x = width * (math.log10(place) - x_range[0]) / (x_range[1] - x_range[0])
        is_left = x + 12 + letter * len(text) > width
        first = x - 12 - letter * len(text) if is_left else x + 12
        last = first + letter * len(text)
        y = height * (point["y"][0] - y_range[0]) / (y_range[1] - y_range[0])
        for begin, end, other in placed:  # from the lowest up
            if begin < last and first < end and abs(y - other) < line:
                y = other + line
        placed.append((first, last, y))
        labels.append(
            {
                "type": "scatter",
                "mode": "text",
                "meta": point["meta"],
                "x": [point["x"][0] if is_left else place],
                "y": [y_range[0] + (y_range[1] - y_range[0]) * y / height],
                "text": [f"{text}   " if is_left else f"   {text}"],
                "textposition": "middle left" if is_left else "middle right",
                "textfont": {"color": "@ink", "size": 12},
                "cliponaxis": False,
                "hoverinfo": "skip",
            }
        )
    return labels


def _log_ticks(low: float, high: float) -> list[int]:
    """Round numbers between two powers of ten: the more of them, the closer these are."""
    steps = (1, 2, 5) if high - low < 1.6 else (1, 3) if high - low < 3.2 else (1,)
    return [
        step * 10**power
        for power in range(max(math.floor(low), 0), math.ceil(high) + 1)
        for step in steps
        if low <= math.log10(step * 10**power) <= high
    ]


def _short_number(number: int, unit: str) -> str:
    for power, prefix in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:g}{unit[:1]}{prefix}{unit[1:]}"
    return f"{number:,}{unit}"
