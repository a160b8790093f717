"""`sweep.json`: what a sweep's folder says of its trials, for the page that shows them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_distill.core.files import write_json

RECORD_FILE = "sweep.json"
SCHEMA = 1
_LONGEST = 18  # characters of a value in a label

COMPLETE, STOPPED, FAILED, RUNNING = "complete", "stopped early", "failed", "unfinished"


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        name: Of its run folder.
        state: "complete", "stopped early", "failed" or "unfinished".
        values: Value of each parameter.
        value: The metric; the last one where the trial was stopped early, None where there is none.
        why: What it failed of.
    """

    name: str
    state: str
    values: Mapping[str, Any]
    value: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Record:
    """All of a sweep.

    Attributes:
        name: Its name.
        method: grid, random or bayes.
        metric: What is optimised.
        goal: minimize or maximize.
        parameters: Names of those that vary -> whether numbers are drawn by their logarithm.
        trials: In the order of their start.
        identity: See `Sweep.identity`.
        importance: Share of each parameter in the metric's variance, by fANOVA; None if it was not computed.
    """

    name: str
    method: str
    metric: str
    goal: str
    parameters: Mapping[str, bool]
    trials: tuple[TrialRecord, ...]
    identity: str
    importance: Mapping[str, float] | None = None

    @property
    def best(self) -> TrialRecord | None:
        """The trial with the best metric among the complete ones."""
        sign = 1 if self.goal == "maximize" else -1
        complete = [trial for trial in self.trials if trial.state == COMPLETE and trial.value is not None]
        return max(complete, key=lambda trial: sign * (trial.value or 0.0), default=None)

    def write(self, folder: Path) -> None:
        """Writes the record into the sweep's folder, atomically."""
        write_json(folder / RECORD_FILE, {"schema": SCHEMA, **asdict(self)})


def read_record(folder: Path) -> Record | None:
    """Reads the record of a sweep's folder; None if there is none that this version can read."""
    try:
        content = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        if content.pop("schema") != SCHEMA:
            return None
        trials = tuple(TrialRecord(**trial) for trial in content.pop("trials"))
        return Record(**content, trials=trials)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Shortens dotted names to their last parts, as many as tell them apart, without `init_args`."""
    parts = {name: [part for part in name.split(".") if part != "init_args"] for name in names}
    short = {}
    for name, own in parts.items():
        size = next(
            (n for n in range(1, len(own)) if sum(other[-n:] == own[-n:] for other in parts.values()) == 1), len(own)
        )
        short[name] = ".".join(own[-size:])
    return short


def show_value(value: Any) -> str:
    """A value in a few characters."""
    text = f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def described(values: Mapping[str, Any]) -> str:
    """Parameters in a line: `temperature 3.9, lr 0.0135`."""
    short = short_names(list(values))
    return ", ".join(f"{short[name]} {show_value(value)}" for name, value in values.items())
