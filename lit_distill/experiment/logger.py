"""The run's own metrics file: one row per iteration, kept across interruptions."""

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_distill.core.files import write_text

METRICS_FILE = "metrics.csv"


class RunLogger(CSVLogger):
    """Lightning's CSV logger, made to survive.

    Lightning's own file is deleted when a run starts again. This one takes up the rows of the interrupted run, writes
    the file atomically, and puts what is logged at one iteration into one row.

    Args:
        save_dir: `runs/`.
        name: The experiment.
        version: The run's name; the file is `save_dir/name/version/metrics.csv`.
        flush_logs_every_n_steps: Rows between writes to the disk; the end of an epoch writes too.
    """

    def __init__(
        self, save_dir: str, name: str = "default", version: str = "run", flush_logs_every_n_steps: int = 100
    ) -> None:
        super().__init__(save_dir, name=name, version=version, flush_logs_every_n_steps=flush_logs_every_n_steps)
        self.counter: Callable[[], int] | None = None  # in place of the step that is passed
        self._rows: dict[int, dict[str, Any]] | None = None
        self._unsaved = 0

    @property
    def experiment(self) -> Any:
        """This logger itself: Lightning's own writer would delete the file of an interrupted run."""
        return self

    @property
    def path(self) -> Path:
        """Where the metrics lie."""
        return Path(self.log_dir) / METRICS_FILE

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the resolved config.yaml of the run holds the hyperparameters."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Adds metrics to the row of an iteration."""
        rows = self._load()
        step = step if self.counter is None else self.counter()
        row = rows.setdefault(step if step is not None else len(rows), {})
        row.update({key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()})
        self._unsaved += 1
        if self._unsaved >= self._flush_logs_every_n_steps:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Writes all rows."""
        if not self._unsaved:
            return
        rows = self._load()
        keys = sorted({key for row in rows.values() for key in row} - {"epoch"})
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", "epoch", *keys], restval="", lineterminator="\n")
        writer.writeheader()
        for step in sorted(rows):
            writer.writerow({"step": step, **rows[step]})
        write_text(self.path, text.getvalue())
        self._unsaved = 0

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes what is left."""
        self.save()

    def last(self, prefix: str) -> dict[str, float]:
        """Returns the last value of each metric whose name starts so, those of an interrupted part included."""
        rows = self._load()
        return {k: float(v) for step in sorted(rows) for k, v in rows[step].items() if k.startswith(prefix)}

    def _load(self) -> dict[int, dict[str, Any]]:
        if self._rows is None:
            self._rows = {}
            if self.path.is_file():
                with self.path.open(newline="", encoding="utf-8") as file:
                    for row in csv.DictReader(file):
                        step = int(row.pop("step"))
                        self._rows[step] = {key: value for key, value in row.items() if value not in ("", None)}
        return self._rows
