"""The metric against what it costs, with the Pareto front."""

import math
from collections.abc import Mapping, Sequence

from lit_distill.experiment.comparison import Comparison
from lit_distill.experiment.dashboard.figure import Figure, Look, Spec, axis_label, axis_title, plain
from lit_distill.experiment.groups import Group
from lit_distill.experiment.pareto import COSTS, Cost, costs_of, pareto_front
from lit_distill.experiment.words import capital, lower_is_better, metric_name, scaled, show

MOST_LABELLED = 12  # more labels than this do not fit beside the points of a plot


def cost_plot(comparison: Comparison, groups: Sequence[Group], looks: Mapping[str, Look]) -> Figure | None:
    """The metric against each cost on a logarithmic axis, with the rows that no other beats in both.

    The front is that of all rows; those that are not among `groups` are drawn as small grey points.
    """
    metric = comparison.metric
    costs = (
        costs_of(comparison.groups, metric)
        or [cost for cost in COSTS[:2] if any(metric in group.stats and cost.of(group) for group in groups)][:1]
    )
    if not costs:
        return None
    specs: dict[str, Spec] = {}
    rows: list[tuple[str, ...]] = []
    fronts = []
    is_moved = False
    for cost in costs:
        measured = [group for group in comparison.groups if metric in group.stats and cost.of(group) is not None]
        front = pareto_front(comparison.groups, metric, cost)
        spec, moved = _cost_spec(metric, cost, measured, groups, front, looks)
        specs[cost.name] = spec
        is_moved |= moved
        on_front = {group.label for group in front}
        fronts.append(f"on the front of {cost.name}: {', '.join(group.label for group in front)}")
        rows += [
            (
                cost.name,
                group.label,
                _amount(cost, cost.of(group) or 0.0),
                show(metric, group.stats[metric]),
                "yes" if group.label in on_front else "",
            )
            for group in measured
        ]
    direction = "down" if lower_is_better(metric) else "up"
    return Figure(
        "cost",
        f"{capital(metric_name(metric))} against cost",
        f"Mean with two standard errors; {direction} and to the left is better. The line is the Pareto front: no other "
        "row is as good for less." + (" Marks of one cost stand side by side." if is_moved else ""),
        "; ".join(fronts),
        specs,
        ("cost", "stage", "amount", axis_title(metric), "on the front"),
        rows,
        height=420,
        kind="cost",
        choice="cost",
    )


def _cost_spec(
    metric: str,
    cost: Cost,
    measured: Sequence[Group],
    groups: Sequence[Group],
    front: Sequence[Group],
    looks: Mapping[str, Look],
) -> tuple[Spec, bool]:
    """The specification for one cost, and whether marks were moved off each other."""
    drawn = {group.label for group in groups}
    shown = [group for group in measured if group.label in drawn]
    others = [group for group in measured if group.label not in drawn]
    amounts = {group.label: cost.of(group) or 1.0 for group in measured}
    logs = [math.log10(amounts[group.label]) for group in measured]
    margin = max(0.12 * (max(logs) - min(logs)), 0.15)
    x_range = [min(logs) - margin, max(logs) + margin]
    sizes = [math.log10(amounts[group.label]) for group in shown]
    places, label_places = _side_by_side(sizes, x_range)
    data = [
        _point(metric, cost, group, place, looks[group.label], is_on_front=group in front)
        for group, place in zip(shown, places, strict=True)
    ]
    reach = [
        scaled(metric, group.stats[metric].mean + sign * 2 * (group.stats[metric].se or 0.0))
        for group in measured
        for sign in (-1, 1)
    ]
    margin = 0.08 * (max(reach) - min(reach)) or 0.05
    y_range = [min(reach) - margin, max(reach) + margin]
    labels = _point_labels(data, looks, label_places, x_range, y_range) if len(shown) <= MOST_LABELLED else []
    behind: list[Spec] = [_front_line(metric, cost, front)]
    if others:
        behind.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [amounts[group.label] for group in others],
                "y": [scaled(metric, group.stats[metric].mean) for group in others],
                "text": [plain(group.label) for group in others],
                "marker": {"color": "@muted/0.5", "size": 5},
                "hovertemplate": "%{text}: %{y:.4~g}<extra></extra>",
            }
        )
    ticks = _log_ticks(*x_range)
    layout = {
        "xaxis": {
            "type": "log",
            "title": {"text": cost.axis},
            "range": x_range,
            "tickvals": ticks,
            "ticktext": [_short_number(tick, f" {cost.unit}" if cost.unit else "") for tick in ticks],
        },
        "yaxis": {"title": {"text": axis_title(metric)}, "range": y_range},
    }
    is_moved = any(not math.isclose(place, 10**size) for place, size in zip(places, sizes, strict=True))
    return {"data": [*behind, *data, *labels], "layout": layout}, is_moved


def _point(metric: str, cost: Cost, group: Group, place: float, look: Look, *, is_on_front: bool) -> Spec:
    stat, bulk = group.stats[metric], group.stats[cost.key]
    spread = 0.0 if cost.rate else 2 * (bulk.se or 0.0)
    point: Spec = {
        "type": "scatter",
        "mode": "markers",
        "meta": group.label,
        "x": [place],
        "customdata": [_amount(cost, cost.of(group) or 0.0)],
        "y": [scaled(metric, stat.mean)],
        "error_x": {"type": "data", "array": [spread], "thickness": 1.5, "width": 4},
        "error_y": {"type": "data", "array": [scaled(metric, 2 * (stat.se or 0.0))], "thickness": 1.5, "width": 4},
        "marker": {
            "color": f"@{look.colour}",
            "symbol": look.symbol,
            "size": 14 if is_on_front else 11,
            "opacity": 1 if is_on_front else 0.65,
            "line": {"color": "@ink" if is_on_front else "@card", "width": 2 if is_on_front else 1.5},
        },
        "hovertemplate": f"{plain(group.label)}: %{{y:.4~g}} with %{{customdata}}<extra></extra>",
    }
    return point


def _front_line(metric: str, cost: Cost, front: Sequence[Group]) -> Spec:
    """The front as steps: up to the next point's cost, one gets no better than the point before."""
    points = sorted((cost.of(group) or 1.0, scaled(metric, group.stats[metric].mean)) for group in front)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front",
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": "@muted", "width": 1.5, "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
    }


def _amount(cost: Cost, value: float) -> str:
    """A cost in full: `1,000 parameters`, `0.0123 s`."""
    if cost.unit == "s":
        return f"{value:,.3g} s" if value < 1000 else f"{value:,.0f} s"
    unit = {"": cost.axis.partition(" ")[0], "B": "bytes"}[cost.unit]
    return f"{value:,.0f} {unit}" if value >= 10 or value == int(value) else f"{value:.3g} {unit}"


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
    points: Sequence[Spec],
    looks: Mapping[str, Look],
    places: Sequence[float],
    x_range: Sequence[float],
    y_range: Sequence[float],
) -> list[Spec]:
    """Labels beside points on a logarithmic axis: to the left near the right border, and moved up off each other."""
    width, height, line, letter = 340, 330, 16, 7  # pixels; a figure is rarely smaller
    placed: list[tuple[float, float, float]] = []
    labels: list[Spec] = []
    for point, place in sorted(zip(points, places, strict=True), key=lambda pair: pair[0]["y"][0]):
        text = axis_label(looks[point["meta"]].name).partition("<br>")[0]
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


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten: the more of them, the closer these are."""
    steps = (1, 2, 5) if high - low < 1.6 else (1, 3) if high - low < 3.2 else (1,)
    return [
        float(f"{step}e{power}")
        for power in range(math.floor(low), math.ceil(high) + 1)
        for step in steps
        if low <= math.log10(step) + power <= high
    ]


def _short_number(number: float, unit: str) -> str:
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m"), (-6, "µ"), (-9, "n")):
        if number >= 0.999 * 10**power:
            if prefix in ("m", "µ", "n") and not unit:
                break
            return f"{number / 10**power:.3g}{unit[:1]}{prefix}{unit[1:]}"
    return f"{number:g}{unit}"
