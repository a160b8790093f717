"""Runs on disk: finding them, reading them, and saying what is wrong with the ones that cannot be read.

A run is a folder `runs/<experiment>/<name>/` with `config.yaml` from the start, `metrics.csv` while it trains, and
`summary.json` at the end. The summary is written atomically, so its absence means that the run has not finished.
"""

import contextlib
import csv
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_distill.core.errors import UsageError
from lit_distill.core.files import write_json
from lit_distill.experiment.secrets import without_secrets

SCHEMA = 1
PLAN_FILE = "recipe.json"
LARGEST_SUMMARY = 50_000_000  # bytes; larger files are no summaries, and would fill the memory
LARGEST_TEXT = 100_000_000

FINISHED = "finished"
UNFINISHED = "unfinished"

History = dict[str, tuple[list[int], list[float]]]

_Kind = type | tuple[type, ...]
_REQUIRED: dict[str, _Kind] = {"method": str, "data": str, "networks": dict, "seed": int, "metrics": dict}
_OPTIONAL: dict[str, _Kind] = {
    "experiment": str,
    "name": str,
    "stage": str,
    "domain": str,
    "metric": str,
    "efficiency": dict,
    "panels": dict,
    "versions": dict,
    "machine": dict,
    "started": str,
    "finished": str,
    "seconds": (int, float),
    "config_hash": str,
}


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        path: The folder.
        status: `"finished"`, `"unfinished"` (no summary yet: running or killed) or `"broken: <why>"`.
        summary: The content of summary.json of a finished run, None otherwise.
    """

    path: Path
    status: str
    summary: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether the summary is there and well formed."""
        return self.summary is not None

    @property
    def name(self) -> str:
        """The name of the folder, such as `kd-s0`."""
        return self.path.name

    @property
    def experiment(self) -> str:
        """The experiment's name: what the summary says, else the name of the folder above."""
        return self._get("experiment") or self.path.parent.name

    @property
    def stage(self) -> str:
        """The stage of the recipe, or the method's class name for a run outside recipes."""
        return self._get("stage") or (self.method.rpartition(".")[2] if self.finished else "")

    @property
    def method(self) -> str:
        """Class path of the method; by the configuration while unfinished."""
        return self._get("method") or self._configured("model")

    @property
    def domain(self) -> str:
        """The domain (`image`, `graph`, ...)."""
        if self.finished:
            return self._get("domain") or ""
        package, _, rest = self.method.partition(".")
        return rest.partition(".")[0] if package == "lit_distill" else ""

    @property
    def data(self) -> str:
        """Class path of the data module; by the configuration while unfinished."""
        return self._get("data") or self._configured("data")

    @property
    def seed(self) -> int:
        """The seed, -1 while unfinished."""
        return -1 if self.summary is None else int(self.summary["seed"])

    @property
    def started(self) -> str:
        """Start time in ISO format, empty while unfinished."""
        return self._get("started") or ""

    @property
    def metric(self) -> str:
        """The figure that tells most about this run, by its own word; empty where the summary names none."""
        return self._get("metric") or ""

    @property
    def networks(self) -> dict[str, dict[str, Any]]:
        """Role -> `{"class_path": ..., "params": ...}`, without roles that the method leaves empty."""
        return {role: network for role, network in (self._get("networks") or {}).items() if network}

    @property
    def panels(self) -> dict[str, Any]:
        """Panel kind -> its data, for the dashboard."""
        return self._get("panels") or {}

    def figures(self) -> dict[str, float]:
        """All single numbers of the run: metrics, `efficiency/...`, and `seconds` of wall time.

        Values may be infinite or NaN where a run diverged.
        """
        return self._figures

    @cached_property
    def _figures(self) -> dict[str, float]:
        if self.summary is None:
            return {}
        numbers = dict(self.summary["metrics"])
        numbers |= {f"efficiency/{key}": value for key, value in (self._get("efficiency") or {}).items()}
        numbers["seconds"] = self._get("seconds")
        if (student := self.networks.get("student")) is not None:
            numbers.setdefault("efficiency/student_params", student.get("params"))
        return {key: float(value) for key, value in numbers.items() if _is_number(value)}

    def _get(self, key: str) -> Any:
        return None if self.summary is None else self.summary.get(key)

    def _configured(self, section: str) -> str:
        """The class that a section of the configuration names, for a run that has no summary."""
        if self.finished:
            return ""
        found = re.search(rf"^{section}:\n +class_path: *([\w.]+)", self.config_text(), re.M)
        return found[1] if found else ""

    def state(self) -> str:
        """The status in words; of an unfinished run also when something was last written, to tell going from dead."""
        if self.status != UNFINISHED:
            return self.status
        times = []
        for name in ("metrics.csv", "config.yaml"):
            with contextlib.suppress(OSError):
                times.append((self.path / name).stat().st_mtime)
        if not times:
            return self.status
        with contextlib.suppress(OverflowError, ValueError, OSError):
            return f"{self.status} (last written {datetime.fromtimestamp(max(times)):%Y-%m-%d %H:%M})"
        return self.status

    def config_text(self) -> str:
        """The resolved configuration as YAML text without secrets; empty where the file is missing or unreadable."""
        return self._config_text

    @cached_property
    def _config_text(self) -> str:
        return without_secrets(_text_or_empty(self.path / "config.yaml"))

    def history(self) -> History:
        """Reads metrics.csv: metric -> (steps, values), sorted by step.

        A resumed run logs some steps again: the last value wins. A last line without its line end was cut off in the
        middle and is left out, since half of a number still reads as a number. Cells that are no number are left out.
        """
        text = _text_or_empty(self.path / "metrics.csv")
        table = csv.reader(text[: text.rfind("\n") + 1].replace("\0", "").splitlines())
        try:
            header = next(table, [])
        except csv.Error:  # a cell of more than 100 kB is none of ours
            return {}
        if "step" not in header:
            return {}
        rows: list[list[str]] = []
        with contextlib.suppress(csv.Error):
            rows.extend(table)  # until the first such cell
        columns = list(itertools.zip_longest(*rows, fillvalue=""))
        if header.index("step") >= len(columns):
            return {}
        steps = [_step(cell) for cell in columns[header.index("step")]]
        history: History = {}
        for key, column in zip(header, columns, strict=False):
            if not key or key in ("step", "epoch"):
                continue
            # Later rows overwrite earlier ones of the same step.
            points = {
                step: value
                for step, cell in zip(steps, column, strict=True)
                if cell and step is not None and (value := _number(cell)) is not None
            }
            if points:
                at = sorted(points)
                history[key] = (at, [points[step] for step in at])
        return history


@dataclass(frozen=True)
class Plan:
    """What a recipe says of the comparison of its runs.

    Attributes:
        metric: The figure to compare, empty if it says nothing.
        baselines: Stages to compare with.
    """

    metric: str = ""
    baselines: tuple[str, ...] = ()


def write_plan(folder: Path, metric: str | None, baselines: Iterable[str]) -> None:
    """Leaves a recipe's words on comparison beside its runs, so that they hold in any later comparison."""
    write_json(folder / PLAN_FILE, {"metric": metric, "baselines": list(baselines)})


def read_plan(folder: Path) -> Plan:
    """Reads the words of a recipe. Never raises: what is missing or malformed says nothing."""
    content = _json_or_none(folder / PLAN_FILE)
    if not isinstance(content, dict):
        return Plan()
    metric, baselines = content.get("metric"), content.get("baselines")
    return Plan(
        metric if isinstance(metric, str) else "",
        tuple(name for name in baselines if isinstance(name, str)) if isinstance(baselines, list) else (),
    )


def find_runs(dirs: Iterable[str | Path]) -> list[Run]:
    """Finds the run folders in and below the given folders, sorted by path, each once.

    A folder is a run when it holds `config.yaml` or `summary.json`; folders inside a run are not searched. A run
    that is still going, cut off, of an older schema or otherwise unreadable is returned with a status that says so.

    Raises:
        UsageError: One of the folders does not exist.
    """
    found: dict[str, Run] = {}
    for top in dirs:
        if not Path(top).is_dir():
            raise UsageError(
                f"no such folder of runs: {top}; give folders that hold run folders, such as runs/quickstart"
            )
        for folder, inside, files in os.walk(top):
            if "config.yaml" in files or "summary.json" in files:
                inside.clear()
                found.setdefault(os.path.realpath(folder), read_run(folder))
            else:
                inside[:] = [name for name in inside if not name.startswith(".")]
    return sorted(found.values(), key=lambda run: str(run.path))


def read_run(folder: str | Path) -> Run:
    """Reads one run folder. Never raises: what is wrong stands in the status."""
    path = Path(folder)
    try:
        summary = _json(path / "summary.json")
    except FileNotFoundError:
        return Run(path, UNFINISHED)
    except (OSError, ValueError, RecursionError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else "truncated or not JSON"
        return Run(path, f"broken: summary.json cannot be read ({why})")
    schema = summary.get("schema") if isinstance(summary, dict) else None
    if type(schema) is int and schema != SCHEMA:  # a boolean is an int too
        age = "an older" if schema < SCHEMA else "a newer"
        return Run(path, f"of {age} version: summary.json has schema {_short(schema)}, this version reads {SCHEMA}")
    wrong = _what_is_wrong(summary)
    return Run(path, f"broken: {wrong}") if wrong else Run(path, FINISHED, summary)


def _json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: It is missing, no file (a pipe would block), too large, or may not be read.
        ValueError: It is no JSON.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError("it is no file")
    if facts.st_size > LARGEST_SUMMARY:
        raise OSError(f"it is larger than {LARGEST_SUMMARY} bytes")
    return json.loads(path.read_text(encoding="utf-8"))


def _json_or_none(path: Path) -> Any:
    try:
        return _json(path)
    except (OSError, ValueError, RecursionError):
        return None


def _what_is_wrong(summary: Any) -> str:
    """The first fault of a summary in words, empty if there is none."""
    if not isinstance(summary, dict):
        return "summary.json holds no mapping"
    if type(summary.get("schema")) is not int:
        return f"summary.json: schema is {_short(summary.get('schema'))}, not a whole number"
    for key, kind in _REQUIRED.items():
        if not isinstance(summary.get(key), kind) or isinstance(summary.get(key), bool):
            return f"summary.json: {key} is {_short(summary.get(key))}, not {_kind_name(kind)}"
    for key, kind in _OPTIONAL.items():
        if summary.get(key) is not None and not isinstance(summary[key], kind):
            return f"summary.json: {key} is {_short(summary[key])}, not {_kind_name(kind)}"
    for table in ("metrics", "efficiency"):
        for key, value in (summary.get(table) or {}).items():
            if value is not None and not _is_number(value):
                return f"summary.json: {table}.{key} is {_short(value)}, not a number"
    for role, network in summary["networks"].items():
        if network is None:
            continue
        if not isinstance(network, dict) or not isinstance(network.get("class_path"), str):
            return f"summary.json: networks.{role} has no class_path"
        if network.get("params") is not None and not _is_number(network["params"]):
            return f"summary.json: networks.{role}.params is {_short(network['params'])}, not a number"
    return ""


def _kind_name(kind: _Kind) -> str:
    names: dict[_Kind, str] = {str: "a text", dict: "a mapping", int: "a whole number"}
    return names.get(kind, "a number")


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return value.bit_length() < 1024  # larger ones do not fit into a float
    return isinstance(value, float)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _step(cell: str) -> int | None:
    step = _number(cell)
    return int(step) if step is not None and math.isfinite(step) else None


def _text_or_empty(path: Path) -> str:
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > LARGEST_TEXT:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
