"""The comparison as one HTML page that needs nothing else: no server, no network, no second file.

Figures are plain Plotly specifications (`data`, `layout`). Colours in them are names such as `@c1` or `@c1/0.2`, which
the page's script resolves from its style sheet, so that light and dark come from one place. A trace names its row in
`meta`, so that the page can hide it.
"""

import base64
import hashlib
import html
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lit_distill.core.files import write_text
from lit_distill.experiment.compare import MOST_SENTENCES, Comparison, Group
from lit_distill.experiment.runs import FINISHED, UNFINISHED, Run
from lit_distill.experiment.tables import (
    MISSING,
    Column,
    columns,
    is_marked,
    is_percent,
    lower_is_better,
    metric_name,
    scaled,
    sentences,
    show,
    show_plain,
)

Spec = dict[str, Any]

MOST_DRAWN = 24  # more rows than this cannot be told apart in a plot
MOST_LABELLED = 12  # more labels than this do not fit beside the points of a plot
PICTURE_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
LARGEST_PICTURE = 2_000_000  # bytes; the page holds it
CURVE_POINTS = 200  # about the width of a plot in steps that the eye can tell apart

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
_DASHES = ("solid", "dash", "dashdot", "longdash", "longdashdot")  # "dot" is the baseline's
_COLOURS = 7


@dataclass(frozen=True)
class Look:
    """How a row is drawn, the same in every figure: colour name, marker, dash."""

    colour: str
    symbol: str
    dash: str


@dataclass(frozen=True)
class Figure:
    """A figure of the page, with what a reader who cannot see it needs.

    Attributes:
        id: Identifier, unique on the page.
        title: Heading.
        caption: What is drawn and how to read it.
        summary: The content in a sentence, for screen readers.
        specs: Name -> Plotly specification; with several, the page offers a choice.
        head: Column names of the numbers behind the figure.
        rows: The numbers behind the figure, as text.
        height: Height in pixels.
        image: A picture as a `data:` address, in place of specifications.
        row: The row that the figure is about, if it is about a single one.
        kind: The kind of panel, for panels.
    """

    id: str
    title: str
    caption: str
    summary: str
    specs: Mapping[str, Spec]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    height: int = 340
    image: str = ""
    row: str = ""
    kind: str = ""


def write_dashboard(comparison: Comparison, path: str | Path, extra: Sequence[Figure] = ()) -> None:
    """Writes the page.

    Args:
        comparison: What to show.
        path: The HTML file; links to run folders are relative to it.
        extra: Figures to show before the comparison's own, such as those of a sweep.

    Raises:
        RunError: The file cannot be written.
    """
    write_text(path, render(comparison, Path(path).parent, extra))


def render(comparison: Comparison, folder: Path, extra: Sequence[Figure] = ()) -> str:
    """The page as text, for a file that will lie in `folder`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("lit_distill.experiment"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    table = columns(comparison)
    drawn = drawn_groups(comparison)
    looks = _looks(comparison)
    notes = list(comparison.notes)
    if len(drawn) < len(comparison.groups):
        notes.append(f"figures show {len(drawn)} of {len(comparison.groups)} rows: the baseline and the best")
    figures = [*extra] + [
        figure
        for draw in (dot_plot, difference_plot, learning_curves, size_plot)
        if (figure := draw(comparison, drawn, looks)) is not None
    ]
    panels, panel_notes = panel_figures(drawn, looks)
    notes += panel_notes
    plotly, script, style = (
        Markup(get_plotlyjs()),
        *(
            Markup(environment.loader.get_source(environment, name)[0])  # type: ignore[union-attr]
            for name in ("dashboard.js", "dashboard.css")
        ),
    )
    specs = {figure.id: figure.specs for figure in (*figures, *panels) if figure.specs}
    return environment.get_template("dashboard.html.j2").render(
        title=", ".join(dict.fromkeys(run.experiment for run in comparison.runs)) or "no runs",
        sentences=sentences(comparison)[:MOST_SENTENCES],
        facts=_facts(comparison),
        notes=notes,
        columns=table,
        rows=[_row(comparison, index, table, looks) for index in range(len(comparison.groups))],
        all_metrics=_all_metrics(drawn),
        legend=[(group.label, looks[group.label].colour, _ICONS[looks[group.label].symbol]) for group in drawn],
        figures=figures,
        panels=[
            (kind, known, [panel for panel in panels if panel.kind == kind])
            for kind, known in PANELS.items()
            if any(panel.kind == kind for panel in panels)
        ],
        specs=_clean(specs),
        runs=[_run_row(run, folder) for run in comparison.runs],
        configs=[(group.label, group.runs[0].name, without_secrets(group.runs[0].config_text())) for group in drawn],
        environment=_environment(comparison),
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        plotly=plotly,
        script=script,
        style=style,
        # Only these two scripts may run, and nothing may be fetched, whatever a name or a configuration contains.
        script_hashes=" ".join(f"'sha256-{_sha256(text)}'" for text in (plotly, script)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def drawn_groups(comparison: Comparison) -> list[Group]:
    """The rows that figures show: all if they are few, else the baseline and the best in the metric."""
    if len(comparison.groups) <= MOST_DRAWN:
        return list(comparison.groups)
    sign = -1 if lower_is_better(comparison.metric) else 1

    def rank(group: Group) -> tuple[bool, float]:
        stat = group.stats.get(comparison.metric)
        return comparison.is_baseline(group), -math.inf if stat is None else sign * stat.mean

    kept = {group.label for group in sorted(comparison.groups, key=rank, reverse=True)[:MOST_DRAWN]}
    return [group for group in comparison.groups if group.label in kept]


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
                "text": [f"{_plain(group.label)}, seed {seed}" for seed in seeds],
                "hovertemplate": "%{text}: %{x:.4~g}<extra></extra>",
                "marker": {"color": f"@{look.colour}/0.45", "symbol": look.symbol, "size": 7},
            }
        )
        data.append(
            _mean_and_reach(group, place, look, scaled(metric, stat.mean), scaled(metric, 2 * (stat.se or 0.0)))
        )
    layout = _rows_layout(shown, _axis_title(metric))
    return Figure(
        "dots",
        f"{metric_name(metric).capitalize()} of every run",
        "Small marks are single seeds; the large mark is their mean, with two standard errors to each side.",
        "; ".join(f"{group.label}: {show(metric, group.stats[metric])}" for group in shown),
        {"": {"data": data, "layout": layout}},
        ("stage", "seed", _axis_title(metric)),
        [
            (group.label, str(seed), f"{scaled(metric, value):.4g}")
            for group in shown
            for seed, value in group.values(metric).items()
        ],
        height=_rows_height(groups),
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
                "text": [f"{_plain(group.label)}, seed {seed}" for seed in difference.per_seed],
                "hovertemplate": "%{text}: %{x:+.3~g}<extra></extra>",
                "marker": {"color": f"@{look.colour}/0.45", "symbol": look.symbol, "size": 7},
            }
        )
        reach = scaled(metric, difference.high - difference.mean)
        data.append(_mean_and_reach(group, place, look, scaled(metric, difference.mean), reach))
    unit = "percentage points" if is_percent(metric) else metric_name(metric)
    direction = "below zero is better" if lower_is_better(metric) else "above zero is better"
    layout = _rows_layout(shown, f"difference in {unit}")
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
        height=_rows_height(groups),
    )


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
                    "name": _plain(group.label),
                    "meta": group.label,
                    "x": steps,
                    "y": mean,
                    "line": {"color": f"@{look.colour}", "width": 2, "dash": look.dash},
                    "marker": {"symbol": look.symbol, "size": 5},
                    "hovertemplate": f"{_plain(group.label)}, step %{{x}}: %{{y:.4~g}}<extra></extra>",
                }
            )
            rows.append((metric_name(key), group.label, f"{steps[-1]:,}", f"{mean[-1]:.4g}"))
        if data:
            specs[key] = {
                "data": data,
                "layout": {
                    "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
                    "yaxis": {"title": {"text": _axis_title(key)}},
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
                "hovertemplate": f"{_plain(group.label)}: %{{y:.4~g}} with %{{customdata}}<extra></extra>",
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
                    "yaxis": {"title": {"text": _axis_title(metric)}, "range": y_range},
                },
            }
        },
        ("stage", unit, _axis_title(metric)),
        [(g.label, f"{g.stats[size].mean:,.0f}", show(metric, g.stats[metric])) for g in shown],
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


# ---------------------------------------------------------------------------------------------------------------------
# Panels: what a summary holds beyond numbers. A new kind is a function and a line in PANELS.


def reliability_panel(group: Group, panels: Sequence[Any], look: Look) -> Figure:
    """Reliability diagram, pooled over seeds: accuracy in each bin of confidence, above the share of samples in it."""
    import numpy as np

    confidence, accuracy, count = (
        np.array([panel[key] for panel in panels], float) for key in ("confidence", "accuracy", "count")
    )
    if not (confidence.shape == accuracy.shape == count.shape) or confidence.ndim != 2 or not count.sum() > 0:
        raise ValueError("bins of unequal number, or empty")
    confidence, accuracy = np.where(count > 0, confidence, 0), np.where(count > 0, accuracy, 0)
    gap = np.abs(confidence - accuracy)
    ece = ((count * gap).sum(axis=1) / count.sum(axis=1)).mean()
    total = count.sum(axis=0)
    weight = np.maximum(total, 1)
    mean_accuracy = [
        float(a) if n else None for a, n in zip((count * accuracy).sum(axis=0) / weight, total, strict=True)
    ]
    mean_confidence = (count * confidence).sum(axis=0) / weight
    share = (100 * total / total.sum()).tolist()
    bins = len(total)
    centres = [(i + 0.5) / bins for i in range(bins)]
    counts = [f"{n:,.0f}" for n in total]
    width = 0.9 / bins
    data: list[Spec] = [
        {
            "type": "bar",
            "x": centres,
            "y": mean_accuracy,
            "width": width,
            "marker": {"color": f"@{look.colour}/0.75"},
            "customdata": counts,
            "hovertemplate": "confidence %{x:.2f}: accuracy %{y:.3f}, %{customdata} samples<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "x": [0, 1],
            "y": [0, 1],
            "line": {"color": "@ink", "width": 1.5, "dash": "dash"},
            "hoverinfo": "skip",
        },
        {
            "type": "bar",
            "x": centres,
            "y": share,
            "width": width,
            "yaxis": "y2",
            "marker": {"color": "@muted/0.6"},
            "customdata": counts,
            "hovertemplate": "confidence %{x:.2f}: %{customdata} samples, %{y:.1f} %<extra></extra>",
        },
    ]
    layout = {
        "xaxis": {"title": {"text": "confidence"}, "range": [0, 1], "dtick": 0.25, "anchor": "y2"},
        "yaxis": {"title": {"text": "accuracy"}, "range": [0, 1], "dtick": 0.25, "domain": [0.34, 1]},
        "yaxis2": {"title": {"text": "% samples"}, "domain": [0, 0.24], "rangemode": "tozero", "nticks": 3},
        "bargap": 0,
    }
    stat = group.stats.get("test/ece")
    shown = show("test/ece", stat) if stat is not None else f"{100 * ece:.1f}"
    return Figure(
        "",
        f"{group.label}: ECE {shown} %",
        f"{len(panels)} seed{'s' if len(panels) != 1 else ''}, {total.sum():,.0f} samples",
        f"Reliability diagram. Expected calibration error {shown} percent",
        {"": {"data": data, "layout": layout}},
        ("bin", "mean confidence", "accuracy", "samples"),
        [
            (f"{i / bins:.2f} to {(i + 1) / bins:.2f}", f"{mean_confidence[i]:.3f}", f"{accuracy_:.3f}", counts[i])
            for i, accuracy_ in enumerate(mean_accuracy)
            if accuracy_ is not None
        ],
        height=330,
        row=group.label,
    )


def robustness_panel(group: Group, panels: Sequence[Any], look: Look) -> Figure:
    """Accuracy under FGSM against its size, mean over seeds: attacked as it is, and with logits rescaled."""
    import numpy as np

    epsilon = [float(value) for value in panels[0]["epsilon"]]
    curves = {name: np.array([panel[name] for panel in panels], float) for name in ("fgsm", "rescaled")}
    if any([float(value) for value in panel["epsilon"]] != epsilon for panel in panels):
        raise ValueError("sizes that differ between seeds")
    if any(curve.shape != (len(panels), len(epsilon)) or not np.isfinite(curve).all() for curve in curves.values()):
        raise ValueError("curves of another length than the sizes, or not finite")
    data: list[Spec] = []
    for name, words, dash, symbol in (
        ("fgsm", "FGSM", "solid", look.symbol),
        ("rescaled", "FGSM on rescaled logits", "dot", f"{look.symbol}-open"),
    ):
        error = curves[name].std(axis=0, ddof=1) / math.sqrt(len(panels)) if len(panels) > 1 else np.zeros(len(epsilon))
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": epsilon,
                "y": curves[name].mean(axis=0).tolist(),
                "error_y": {"type": "data", "array": (2 * error).tolist(), "thickness": 1.5, "width": 4},
                "line": {"color": f"@{look.colour}", "width": 2, "dash": dash},
                "marker": {"symbol": symbol, "size": 8},
                "hovertemplate": f"{words}, size %{{x}}: accuracy %{{y:.3f}}<extra></extra>",
            }
        )
    attacked, rescaled = (curve.mean(axis=0) for curve in curves.values())
    return Figure(
        "",
        f"{group.label}: {100 * attacked[-1]:.1f} % at {epsilon[-1]:g}, rescaled {100 * rescaled[-1]:.1f} %",
        f"{len(panels)} seed{'s' if len(panels) != 1 else ''}; solid: FGSM, dotted: FGSM on rescaled logits",
        f"Accuracy under FGSM falls from {100 * attacked[0]:.1f} percent to {100 * attacked[-1]:.1f} percent at size "
        f"{epsilon[-1]:g}; with rescaled logits to {100 * rescaled[-1]:.1f} percent",
        {
            "": {
                "data": data,
                "layout": {
                    "xaxis": {
                        "title": {"text": "epsilon, of pixels in [0, 1]"},
                        "rangemode": "tozero",
                    },
                    "yaxis": {"title": {"text": "accuracy"}, "range": [-0.02, 1.02], "dtick": 0.25},
                },
            }
        },
        ("size", "accuracy under FGSM", "with rescaled logits"),
        [(f"{e:g}", f"{a:.3f}", f"{r:.3f}") for e, a, r in zip(epsilon, attacked, rescaled, strict=True)],
        height=330,
        row=group.label,
    )


def picture_panel(group: Group, panels: Sequence[Any], look: Look, kind: str = "picture") -> Figure:
    """A picture that the first run left in its folder: SVG or PNG, shown as an image, in which no script runs."""
    run, panel = next((run, run.panels[kind]) for run in group.runs if kind in run.panels)
    file = Path(str(panel["file"]))
    if file.suffix not in PICTURE_TYPES or file.is_absolute() or ".." in file.parts:
        raise ValueError("a picture is an SVG or PNG file in the run's folder")
    try:
        content = (run.path / file).read_bytes()
    except OSError as error:
        raise ValueError(f"{run.path / file} cannot be read") from error
    if len(content) > LARGEST_PICTURE:
        raise ValueError(f"{run.path / file} is larger than {LARGEST_PICTURE} bytes")
    rows = [tuple(str(cell) for cell in row) for row in panel["rows"]]
    return Figure(
        "",
        f"{group.label}: {panel['title']}",
        f"As in the run {run.name}, whose folder has it as {file}.",
        str(panel["summary"]),
        {},
        tuple(str(name) for name in panel["head"]),
        rows,
        image=f"data:{PICTURE_TYPES[file.suffix]};base64,{base64.b64encode(content).decode()}",
        row=group.label,
    )


def text_panel(group: Group, panels: Sequence[Any], look: Look) -> Figure:
    """Continuations that the networks of the first run wrote to a few prompts."""
    run, rows = next((run, run.panels["text"]) for run in group.runs if "text" in run.panels)
    head = [str(name) for name in rows[0]]
    return Figure(
        "",
        f"{group.label}: continuations",
        f"As the networks of the run {run.name} wrote them.",
        f"{len(rows)} prompts",
        {},
        tuple(head),
        [tuple(str(row[name]) for name in head) for row in rows],
        row=group.label,
    )


@dataclass(frozen=True)
class PanelKind:
    """A kind of panel: heading and explanation of its section, and what draws it for a row."""

    title: str
    about: str
    draw: Callable[[Group, Sequence[Any], Look], Figure]


PANELS = {
    "picture": PanelKind(
        "Distilled data", "What the student was trained on, or the most frequent parts of it.", picture_panel
    ),
    "samples": PanelKind(
        "Samples", "What the generators make of the same noise.", partial(picture_panel, kind="samples")
    ),
    "text": PanelKind(
        "Text", "What student and teacher write to the same prompts, word by word the likeliest.", text_panel
    ),
    "reliability": PanelKind(
        "Calibration",
        "How often a prediction is right (bars) at each confidence; a calibrated model follows the dashed line. Below, "
        "the share of samples in each bin, pooled over seeds.",
        reliability_panel,
    ),
    "robustness": PanelKind(
        "Robustness",
        "Accuracy on all test images after an attack by the gradient's sign (FGSM), with two standard errors. Where "
        "the dotted line, the same attack with rescaled logits, lies far below the solid one, the gradient is masked "
        "and the network is not robust.",
        robustness_panel,
    ),
}


def panel_figures(groups: Sequence[Group], looks: Mapping[str, Look]) -> tuple[list[Figure], list[str]]:
    """All panels of the drawn rows, and notes on what could not be shown."""
    figures: list[Figure] = []
    notes: list[str] = []
    unknown: set[str] = set()
    for group in groups:
        for kind in sorted({kind for run in group.runs for kind in run.panels}):
            known = PANELS.get(kind)
            if known is None:
                unknown.add(kind)
                continue
            try:
                drawn = known.draw(
                    group, [run.panels[kind] for run in group.runs if kind in run.panels], looks[group.label]
                )
            except (KeyError, TypeError, ValueError) as error:
                notes.append(f"{group.label}: panel {kind!r} is left out, its data are malformed ({error})")
                continue
            figures.append(Figure(**{**vars(drawn), "id": f"panel-{len(figures)}", "kind": kind}))
    notes += [f"panel {kind!r} is left out: this version cannot draw it" for kind in sorted(unknown)]
    return figures, notes


# ---------------------------------------------------------------------------------------------------------------------
# Parts of figures


def _looks(comparison: Comparison) -> dict[str, Look]:
    """The baseline is neutral, other rows take colours in turn; markers and dashes differ too, for print."""
    looks = {}
    coloured = 0
    for group in comparison.groups:
        if comparison.is_baseline(group):
            looks[group.label] = Look("neutral", "circle", "dot")
            continue
        coloured += 1
        looks[group.label] = Look(
            f"c{(coloured - 1) % _COLOURS + 1}",
            _SYMBOLS[coloured % len(_SYMBOLS)],
            _DASHES[(coloured - 1) % len(_DASHES)],
        )
    return looks


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
        "hovertemplate": f"{_plain(group.label)}: %{{x:.4~g}} ± {reach:.2g}<extra></extra>",
    }


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
        text = _axis_label(point["meta"]).partition("<br>")[0]
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


def _rows_layout(groups: Sequence[Group], title: str) -> Spec:
    return {
        "xaxis": {"title": {"text": title}},
        "yaxis": {
            "tickvals": list(range(len(groups))),
            "ticktext": [_axis_label(group.label) for group in groups],
            "range": [len(groups) - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
        },
    }


def _rows_height(groups: Sequence[Group]) -> int:
    return 90 + 56 * max(len(groups), 2)


def _spread(n: int) -> list[float]:
    """Small shifts that keep the marks of n seeds apart, the same on every drawing."""
    return [0.3 * (i / (n - 1) - 0.5) if n > 1 else 0.0 for i in range(n)]


def _axis_title(metric: str) -> str:
    return metric_name(metric) + (" in %" if is_percent(metric) else "") + (" ↓" if lower_is_better(metric) else "")


def _plain(text: str) -> str:
    """Text for Plotly, which reads a few HTML tags and `%{...}`; neither may come from a name."""
    return html.escape(text).replace("%{", "% {")


def _axis_label(label: str, longest: int = 22) -> str:
    """The label for an axis: stage and distinguishing settings on a line each, cut to fit a phone."""
    stage, _, settings = label.partition(" (")
    lines = [line for line in (stage, settings.removesuffix(")")) if line]
    return "<br>".join(_plain(line if len(line) <= longest else line[: longest - 1] + "…") for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the page

_ICONS = {
    "circle": "M6 1.5a4.5 4.5 0 1 0 0 9a4.5 4.5 0 1 0 0-9z",
    "square": "M2 2h8v8H2z",
    "diamond": "M6 .8L11.2 6L6 11.2L.8 6z",
    "triangle-up": "M6 1.2L11 10H1z",
    "triangle-down": "M6 10.8L11 2H1z",
    "cross": "M4.3 1h3.4v3.3H11v3.4H7.7V11H4.3V7.7H1V4.3h3.3z",
    "x": "M3.2 1L6 3.8L8.8 1L11 3.2L8.2 6L11 8.8L8.8 11L6 8.2L3.2 11L1 8.8L3.8 6L1 3.2z",
    "star": "M6 .8l1.5 3.4l3.7.4l-2.8 2.5l.8 3.6L6 8.9l-3.2 1.8l.8-3.6L.8 4.6l3.7-.4z",
}


def _row(comparison: Comparison, index: int, table: Sequence[Column], looks: Mapping[str, Look]) -> dict[str, Any]:
    group = comparison.groups[index]
    look = looks[group.label]
    return {
        "label": group.label,
        "method": group.method.rpartition(".")[2],
        "method_path": group.method,
        "colour": look.colour,
        "icon": _ICONS[look.symbol],
        "baseline": comparison.is_baseline(group),
        "why_none": group.why_none,
        "cells": [(column.cells[index], is_marked(group, column)) for column in table],
    }


def _all_metrics(groups: Sequence[Group]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Names, and for each row every figure as text."""
    keys = sorted({key for group in groups for key in group.stats})
    numbers = [
        (
            group.label,
            [
                show_plain(stat) if (stat := group.stats.get(key)) and "/" not in key else show(key, stat)
                for key in keys
            ],
        )
        for group in groups
    ]
    return keys, numbers


def _run_row(run: Run, folder: Path) -> dict[str, Any]:
    return {
        "name": run.name,
        "experiment": run.experiment,
        "seed": str(run.seed) if run.finished else MISSING,
        "status": run.status,
        "kind": run.status if run.status in (FINISHED, UNFINISHED) else "broken",
        "path": str(run.path),
        "link": quote(Path(os.path.relpath(run.path, folder)).as_posix()) + "/",
    }


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    finished = [run for run in comparison.runs if run.finished]
    others = len(comparison.runs) - len(finished)
    data = dict.fromkeys(run.data.rpartition(".")[2].removesuffix("DataModule") for run in finished)
    return [
        ("runs", f"{len(finished)} finished" + (f", {others} not" if others else "")),
        ("rows", str(len(comparison.groups))),
        ("data", ", ".join(data) or MISSING),
        ("metric", metric_name(comparison.metric)),
        ("baseline", comparison.baseline or "none"),
    ]


def _environment(comparison: Comparison) -> list[tuple[str, str]]:
    """Versions and machine: name -> every value that occurs."""
    found: dict[str, dict[str, None]] = {}
    for run in comparison.runs:
        for table in ("versions", "machine"):
            for key, value in ((run.summary or {}).get(table) or {}).items():
                if value is not None:
                    found.setdefault(str(key), {})[str(value)] = None
    return [(key, " / ".join(values)) for key, values in found.items()]


_SECRET_KEY = re.compile(
    r"^(\s*(?:- )?[\w.-]*?(?:api_?key|secret|password|passwd|(?:^|[_\s.-])token)['\"]?:\s*)\S.*$", re.I | re.M
)
_SECRET_VALUE = re.compile(r"\b(?:sk-|hf_|ghp_|github_pat_|xox[abp]-|AKIA)[\w-]{12,}")


def without_secrets(config: str) -> str:
    """The configuration with keys, tokens and passwords blanked, by the setting's name or the value's known shape."""
    return _SECRET_VALUE.sub("[hidden]", _SECRET_KEY.sub(r"\1[hidden]", config))


def _clean(value: Any) -> Any:
    """The value for JSON: floats with six digits, None for what JSON cannot write."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
