"""The page itself: figures and tables put into the template."""

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lit_distill.core.files import write_text
from lit_distill.experiment.compare import MOST_SENTENCES, Comparison, Group
from lit_distill.experiment.dashboard.configs import without_secrets
from lit_distill.experiment.dashboard.cost import size_plot
from lit_distill.experiment.dashboard.curves import learning_curves
from lit_distill.experiment.dashboard.figure import Figure, Look, clean, drawn_groups, looks_of
from lit_distill.experiment.dashboard.panels import PANELS, panel_figures
from lit_distill.experiment.dashboard.rows import difference_plot, dot_plot
from lit_distill.experiment.runs import FINISHED, UNFINISHED, Run
from lit_distill.experiment.tables import Column, columns, is_marked, sentences
from lit_distill.experiment.words import MISSING, metric_name, show, show_plain


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
    looks = looks_of(comparison)
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
        specs=clean(specs),
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


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
