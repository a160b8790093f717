"""One section of the page: the table of one domain and data set, its figures and its panels."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_distill.experiment.comparison import Comparison
from lit_distill.experiment.dashboard.cost import cost_plot
from lit_distill.experiment.dashboard.curves import learning_curves
from lit_distill.experiment.dashboard.figure import Look, drawn_groups, looks_of
from lit_distill.experiment.dashboard.panels import MOST_PICTURES, PANELS, panel_figures
from lit_distill.experiment.dashboard.rows import difference_plot, dot_plot
from lit_distill.experiment.groups import Group
from lit_distill.experiment.runs import History, Run
from lit_distill.experiment.tables import Column, best, columns, is_marked, sentences
from lit_distill.experiment.words import heading, metric_name, show, show_plain

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


def section_parts(
    part: Comparison, prefix: str, sections: int, place: Mapping[Path, int], history: Callable[[Run], History]
) -> tuple[dict[str, Any], list[str]]:
    """What the template needs of a section, and notes on what is left out.

    Args:
        part: The section.
        prefix: Put before identifiers, so that they are unique on the page.
        sections: How many sections share the page.
        place: Path of a run -> its number on the page.
        history: Reads a run's curves.
    """
    table, drawn, looks, winner = columns(part), drawn_groups(part), looks_of(part), best(part)
    notes = []
    if len(drawn) < len(part.groups):
        notes.append(
            f"figures{f' of {part.title}' if prefix else ''} show {len(drawn)} of {len(part.groups)} rows: "
            "the baseline and the best"
        )
    figures = [
        replace(figure, id=prefix + figure.id)
        for figure in (
            dot_plot(part, drawn, looks),
            difference_plot(part, drawn, looks),
            cost_plot(part, drawn, looks),
            learning_curves(part, drawn, looks, history),
        )
        if figure is not None
    ]
    panels, more = panel_figures(drawn, looks, MOST_PICTURES // sections)
    panels = [replace(panel, id=prefix + panel.id) for panel in panels]
    shown = {group.label: looks[group.label] for group in drawn}
    section = {
        "id": prefix,
        "title": part.title,
        "lead": sentences(part)[0] if prefix else "",
        "metric": metric_name(part.metric),
        "columns": table,
        "rows": [_row(part, index, table, looks, place, winner) for index in range(len(part.groups))],
        "all_metrics": _all_metrics(drawn),
        "legend": [(label, look.name, look.colour, _ICONS[look.symbol]) for label, look in shown.items()],
        "figures": figures,
        "panels": [
            (kind, known, of_kind)
            for kind, known in PANELS.items()
            if (of_kind := [panel for panel in panels if panel.kind == kind])
        ],
        "all_figures": [*figures, *panels],
    }
    return section, notes + more


def _row(
    part: Comparison,
    index: int,
    table: list[Column],
    looks: Mapping[str, Look],
    place: Mapping[Path, int],
    winner: str,
) -> dict[str, Any]:
    group = part.groups[index]
    look = looks[group.label]
    is_best, main = group.label == winner, heading(part.metric)
    return {
        "label": group.label,
        "name": look.name,
        "method": group.method.rpartition(".")[2],
        "method_path": group.method,
        "colour": look.colour,
        "icon": _ICONS[look.symbol],
        "baseline": part.is_baseline(group),
        "why_none": group.why_none,
        "runs": " ".join(str(place[run.path]) for run in group.runs if run.path in place),
        "cells": [
            (
                column.cells[index],
                is_marked(group, column) or (is_best and column.heading == main),
                column.values[index],
            )
            for column in table
        ],
    }


def _all_metrics(groups: list[Group]) -> tuple[list[str], list[tuple[str, list[str]]]]:
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
