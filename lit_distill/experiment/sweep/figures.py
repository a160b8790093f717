"""A sweep on the dashboard: parallel coordinates of its trials, and what each parameter matters."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_distill.experiment.comparison import Comparison
from lit_distill.experiment.dashboard import Figure
from lit_distill.experiment.runs import Run
from lit_distill.experiment.sweep.record import (
    COMPLETE,
    FAILED,
    STOPPED,
    Record,
    TrialRecord,
    described,
    read_record,
    short_names,
    show_value,
)
from lit_distill.experiment.tables import MISSING, is_percent, metric_name, scaled

MOST_LINES = 200  # more trials than this are a grey cloud
MOST_TICKS = 4  # as many values have one each; of more, ends and middle
LONGEST_TICK = 12  # characters, so that they fit between two axes on a phone
_STATES = (COMPLETE, STOPPED)  # what has a value to draw


def sweeps_of(runs: Iterable[Run]) -> dict[Path, Record]:
    """Finds the sweeps whose trials are among the runs: folder -> record."""
    folders = dict.fromkeys(run.path.parent for run in runs)
    return {folder: record for folder in folders if (record := read_record(folder)) is not None}


def sweep_metric(runs: Sequence[Run]) -> str | None:
    """Returns the metric of a sweep if all runs are its trials, or those of sweeps with the same metric."""
    sweeps = sweeps_of(runs)
    metrics = {record.metric for record in sweeps.values()}
    return metrics.pop() if len(metrics) == 1 and all(run.path.parent in sweeps for run in runs) else None


def sweep_figures(comparison: Comparison) -> tuple[list[Figure], list[str]]:
    """Draws the sweeps among the compared runs.

    Returns:
        Figures for the page, and notes on trials that have no row in it.
    """
    figures: list[Figure] = []
    notes: list[str] = []
    sweeps = sweeps_of(comparison.runs)
    labels = {run.path: group.label for group in comparison.groups for run in group.runs}
    for number, (folder, record) in enumerate(sweeps.items(), 1):
        suffix = f"-{number}" if number > 1 else ""
        of = f" of {record.name}" if len(sweeps) > 1 else ""
        rows = {trial.name: labels.get(folder / trial.name) for trial in record.trials}
        figures += filter(None, (parallel_coordinates(record, rows, suffix, of), importance(record, suffix, of)))
        notes += _notes(record)
    return figures, notes


@dataclass(frozen=True)
class _Axis:
    """One axis of the parallel coordinates: where values stand between 0 and 1, and what is written beside it."""

    title: str
    places: Mapping[int, float]
    ticks: Sequence[tuple[float, str]]


def parallel_coordinates(
    record: Record, rows: Mapping[str, str | None] | None = None, suffix: str = "", of: str = ""
) -> Figure | None:
    """A line for each trial through its parameters to its metric.

    Plotly's own kind of plot for this compiles code while it draws, which the page forbids; so these are plain lines.

    Args:
        record: The sweep.
        rows: Name of a trial -> label of its row, which hides with it.
        suffix: Makes the figure's identifier unique.
        of: Words that name the sweep in the heading.
    """
    sign = 1 if record.goal == "maximize" else -1
    valued = [t for t in record.trials if t.state in _STATES and t.value is not None and math.isfinite(t.value)]
    valued.sort(key=lambda trial: sign * (trial.value or 0.0))  # the best last, on top
    drawn = valued[-MOST_LINES:]
    short = short_names(list(record.parameters))
    if not drawn or not short:
        return None
    metric = metric_name(record.metric) + (" in %" if is_percent(record.metric) else "")
    axes = [
        _axis(short[name], [trial.values.get(name) for trial in drawn], log=log)
        for name, log in record.parameters.items()
    ]
    axes.append(_axis(metric, [scaled(record.metric, trial.value or 0.0) for trial in drawn]))
    complete = [place for place, trial in enumerate(drawn) if trial.state == COMPLETE]
    data = []
    for place, trial in enumerate(drawn):
        look: dict[str, Any] = {"color": "@muted/0.4", "width": 1, "dash": "dot"}
        if trial.state == COMPLETE:
            quality = complete.index(place) / max(len(complete) - 1, 1)
            look = {"color": f"@c1/{0.15 + 0.6 * quality:.2f}", "width": 1.5}
        if trial == record.best:
            look = {"color": "@c2", "width": 3.5}
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "meta": (rows or {}).get(trial.name),
                "x": [number for number, axis in enumerate(axes) if place in axis.places],
                "y": [axis.places[place] for axis in axes if place in axis.places],
                "line": look,
                "text": _hover(record, trial),
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    best = record.best
    left_out = f" The best {len(drawn)} of {len(valued)} trials." if len(drawn) < len(valued) else ""
    return Figure(
        f"coordinates{suffix}",
        f"Trials{of}: parameters and {metric_name(record.metric)}",
        f"A line is a trial; the stronger, the better{', the thick one is the best' if best else ''}. Dotted ones were "
        f"stopped early.{left_out}",
        f"{len(valued)} trials"
        + (f"; the best is {best.name}: {_with_metric(record, best)}" if best is not None else ""),
        {"": {"data": data, "layout": _layout(axes)}},
        ("trial", *short.values(), metric, "state"),
        [
            (
                trial.name,
                *(show_value(trial.values[name]) if name in trial.values else MISSING for name in short),
                f"{scaled(record.metric, trial.value):.4g}" if trial.value is not None else MISSING,
                trial.state + (f": {trial.why}" if trial.why else ""),
            )
            for trial in [*valued[::-1], *(trial for trial in record.trials if trial not in valued)]
        ],
        height=420,
    )


def importance(record: Record, suffix: str = "", of: str = "") -> Figure | None:
    """A bar for each parameter: its share in the variance of the metric."""
    if not record.importance or len(record.importance) < 2:
        return None
    shares = sorted(record.importance.items(), key=lambda item: item[1])
    short = short_names(list(record.parameters))
    names = [html.escape(short.get(name, name)) for name, _ in shares]
    percent = [100 * share for _, share in shares]
    complete = sum(trial.state == COMPLETE for trial in record.trials)
    return Figure(
        f"importance{suffix}",
        f"Importance of parameters{of}",
        f"Share of the variance of {metric_name(record.metric)} over the space searched, as a forest fitted to the "
        f"{complete} complete trials has it (fANOVA). A hint where to look, no proof: trials are few, and those "
        "stopped early are not among them.",
        "; ".join(f"{short.get(name, name)}: {100 * share:.0f} percent" for name, share in reversed(shares)),
        {
            "": {
                "data": [
                    {
                        "type": "bar",
                        "orientation": "h",
                        "x": percent,
                        "y": names,
                        "marker": {"color": "@c1/0.8"},
                        "hovertemplate": "%{y}: %{x:.0f} %<extra></extra>",
                    }
                ],
                "layout": {
                    "xaxis": {"title": {"text": "share of the variance in %"}, "rangemode": "tozero"},
                    "yaxis": {"type": "category", "showgrid": False},
                    "bargap": 0.45,
                },
            }
        },
        ("parameter", "share in %"),
        [(short.get(name, name), f"{100 * share:.1f}") for name, share in reversed(shares)],
        height=110 + 40 * len(shares),
    )


def _notes(record: Record) -> list[str]:
    notes = []
    stopped = [trial.name for trial in record.trials if trial.state == STOPPED]
    if stopped:
        notes.append(f"{record.name}: {', '.join(stopped)} stopped early; such trials have no summary, and no row")
    notes += [f"{record.name}: {trial.name} failed: {trial.why}" for trial in record.trials if trial.state == FAILED]
    complete = sum(trial.state == COMPLETE for trial in record.trials)
    if record.importance is None and len(record.parameters) > 1:
        notes.append(
            f"{record.name}: the importance of parameters is computed at the end of a local sweep, from some complete "
            f"trials that differ; there are {complete}"
        )
    return notes


def _axis(title: str, values: Sequence[Any], log: bool = False) -> _Axis:
    """The axis of one column; trials without a value have no place on it."""
    there = {place: value for place, value in enumerate(values) if value is not None}
    numbers = {p: float(v) for p, v in there.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    if len(numbers) == len(there) and numbers and len(set(numbers.values())) > 1:
        low, high = min(numbers.values()), max(numbers.values())
        log = log and low > 0
        scale = math.log if log else float
        first, span = scale(low), scale(high) - scale(low)
        places = {place: (scale(value) - first) / span for place, value in numbers.items()}
        few = sorted(set(numbers.values()))
        ticks = few if len(few) <= MOST_TICKS else [low, math.sqrt(low * high) if log else (low + high) / 2, high]
        return _Axis(title, places, [((scale(tick) - first) / span, f"{tick:.3g}") for tick in ticks])
    kinds = list(dict.fromkeys(show_value(value) for _, value in sorted(there.items(), key=lambda item: str(item[1]))))
    at = {kind: number / (len(kinds) - 1) if len(kinds) > 1 else 0.5 for number, kind in enumerate(kinds)}
    return _Axis(
        title, {place: at[show_value(value)] for place, value in there.items()}, [(y, k) for k, y in at.items()]
    )


def _layout(axes: Sequence[_Axis]) -> dict[str, Any]:
    last = len(axes) - 1
    return {
        "xaxis": {
            "tickvals": list(range(len(axes))),
            "ticktext": [html.escape(axis.title) for axis in axes],
            "range": [-0.3, last + 0.45],
            "ticklabeloverflow": "allow",
            "showgrid": False,
            "fixedrange": True,
        },
        "yaxis": {"visible": False, "range": [-0.06, 1.06], "fixedrange": True},
        "shapes": [
            {
                "type": "line",
                "x0": number,
                "x1": number,
                "y0": 0,
                "y1": 1,
                "layer": "below",
                "line": {"color": "@muted/0.6", "width": 1.5},
            }
            for number in range(len(axes))
        ],
        "annotations": [
            {
                "x": number,
                "y": y,
                "text": html.escape(text),
                "showarrow": False,
                "xanchor": "left",
                "xshift": 5,
                "bgcolor": "@card/0.75",
                "font": {"color": "@ink", "size": 11},
            }
            for number, axis in enumerate(axes)
            for y, text in axis.ticks
        ],
    }


def _with_metric(record: Record, trial: TrialRecord) -> str:
    values = described({name: trial.values[name] for name in record.parameters if name in trial.values})
    return f"{values}, {metric_name(record.metric)} {scaled(record.metric, trial.value or 0.0):.4g}"


def _hover(record: Record, trial: TrialRecord) -> str:
    text = html.escape(f"{trial.name}: {_with_metric(record, trial)}").replace("%{", "% {")
    return text.replace(", ", "<br>") + ("" if trial.state == COMPLETE else "<br>stopped early")
