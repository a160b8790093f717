"""The list of all runs on the page, what it can be filtered by, and the facts above and below it."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lit_distill.experiment.comparison import Comparison
from lit_distill.experiment.runs import FINISHED, UNFINISHED, Run
from lit_distill.experiment.stats import stat
from lit_distill.experiment.words import MISSING, metric_name, show


def run_rows(comparison: Comparison, folder: Path) -> list[dict[str, Any]]:
    """The list of all runs, in the order of the comparison."""
    several = len({part.metric for part in comparison.parts}) > 1
    metrics = {run.path: part.metric for part in comparison.parts for run in part.runs}
    rows = []
    for run in comparison.runs:
        metric = metrics.get(run.path, "")
        value = run.figures().get(metric)
        shown = MISSING if value is None else show(metric, stat([value]))
        rows.append(
            {
                "name": run.name,
                "experiment": run.experiment,
                "domain": run.domain or MISSING,
                "method": run.method.rpartition(".")[2] or MISSING,
                "data": _data(run),
                "stage": run.stage or MISSING,
                "seed": str(run.seed) if run.finished else MISSING,
                "value": value,
                "shown": f"{metric_name(metric)} {shown}" if several and value is not None else shown,
                "status": run.state(),
                "kind": _kind(run),
                "path": str(run.path),
                "link": quote(Path(os.path.relpath(run.path, folder)).as_posix(), errors="replace") + "/",
            }
        )
    return rows


def facets(comparison: Comparison) -> list[dict[str, Any]]:
    """What runs can be chosen by: `name`, its `values`, and for each run the index `of` its value.

    Those that are the same for all runs are left out.
    """
    found = []
    for name, read in (
        ("domain", lambda run: run.domain or MISSING),
        ("data", _data),
        ("method", lambda run: run.method.rpartition(".")[2] or MISSING),
        ("stage", lambda run: run.stage or MISSING),
        ("experiment", lambda run: run.experiment),
        ("status", _kind),
    ):
        each = [read(run) for run in comparison.runs]
        values = sorted(set(each))
        if len(values) > 1:
            index = {value: number for number, value in enumerate(values)}
            found.append({"name": name, "values": values, "of": [index[value] for value in each]})
    return found


def _data(run: Run) -> str:
    return run.data.rpartition(".")[2].removesuffix("DataModule") or MISSING


def _kind(run: Run) -> str:
    return run.status if run.status in (FINISHED, UNFINISHED) else run.status.partition(":")[0]


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What was compared, in a few words."""
    finished = [run for run in comparison.runs if run.finished]
    others = len(comparison.runs) - len(finished)
    data = list(dict.fromkeys(_data(run) for run in finished))
    metrics = list(dict.fromkeys(metric_name(part.metric) for part in comparison.parts if part.metric))
    return [
        ("runs", f"{len(finished):,} finished" + (f", {others:,} not" if others else "")),
        ("rows", f"{len(comparison.groups):,}"),
        ("data", _few(data) or MISSING),
        ("metric", _few(metrics) or MISSING),
        ("baseline", comparison.baseline or "none"),
    ]


def _few(words: list[str], most: int = 6) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def software(comparison: Comparison) -> list[tuple[str, str]]:
    """Versions and machine: name -> every value that occurs."""
    found: dict[str, dict[str, None]] = {}
    for run in comparison.runs:
        for table in ("versions", "machine"):
            for key, value in ((run.summary or {}).get(table) or {}).items():
                if value is not None:
                    found.setdefault(str(key), {})[str(value)] = None
    return [(key, _few(list(values)).replace(", ", " / ")) for key, values in found.items()]
