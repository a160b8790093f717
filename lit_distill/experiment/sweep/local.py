"""A sweep on this machine alone: runs are forks, bad ones are stopped, everything is kept in the sweep's folder."""

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_distill.core.errors import RunError, UsageError
from lit_distill.experiment.processes import QUIET, Starter, device, find_gpus, last_error
from lit_distill.experiment.runs import read_run
from lit_distill.experiment.sweep.file import Sweep
from lit_distill.experiment.sweep.record import COMPLETE, FAILED, STOPPED, Record, described
from lit_distill.experiment.sweep.search import Search, trial_name

if TYPE_CHECKING:
    from optuna.trial import Trial

MOST_FAILURES = 3  # in a row; W&B's agents give up after as many at their start
_POLL_SECONDS = 0.5  # between looks at the metrics of running trials
_PATIENCE = 30.0  # seconds that a stopped run has to end by itself, as with W&B's agents
_SEED = "seed_everything"
_STARTS = (["lit-distill"], ["python", "-m", "lit_distill"], ["python3", "-m", "lit_distill"])


def run_locally(sweep: Sweep, count: int | None, jobs: int | None, root: str) -> int:
    """Runs a sweep without an account; finished trials are kept, interrupted ones resumed.

    Args:
        sweep: The file.
        count: Trials in all, those of earlier commands included; the file's `run_cap`, or all points of a grid, if
            None.
        jobs: Trials side by side; one for each GPU, or else for each core, if None.
        root: Folder of all runs.
    """
    folder = Path(root) / sweep.name
    gpus = find_gpus()
    at_once = jobs or len(gpus) or os.cpu_count() or 1
    with _alone(folder):
        search = Search(sweep, folder, count if count is not None else sweep.run_cap, parallel=at_once > 1)
        _Runner(search, at_once, gpus).run()
        record = search.record(with_importance=True)
    return _conclude(record, folder)


def _conclude(record: Record, folder: Path) -> int:
    """Says how it went, and writes the page."""
    states = [trial.state for trial in record.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in (COMPLETE, STOPPED, FAILED) if state in states)
    print(f"{folder}: {counts}", flush=True)
    best = record.best
    if best is None:
        why = next((f"; {trial.name}: {trial.why}" for trial in record.trials if trial.why), "")
        raise RunError(f"no trial of {record.name} is complete{why}")
    chosen = " ".join(f"--{name}={best.values[name]}" for name in record.parameters)
    print(f"best: {best.name}, {record.metric} {best.value:.4g}, with {chosen}", flush=True)
    from lit_distill.experiment.compare import compare

    return compare([str(folder)], record.metric, html=str(folder / "dashboard.html"))


@dataclass
class _Flight:
    """A trial that is running."""

    trial: "Trial"
    name: str
    process: ForkServerProcess
    gpu: str | None
    start: float
    told: float | None = None  # when it was told to end


class _Runner:
    """Keeps trials running, `at_once` side by side, until there are enough."""

    def __init__(self, search: Search, at_once: int, gpus: list[str]) -> None:
        self.search, self.at_once, self.free = search, at_once, list(gpus)
        self.sweep, self.folder = search.sweep, search.folder
        self.starter = Starter(_domains(self.sweep))
        self.running: list[_Flight] = []

    def run(self) -> None:
        """Runs what is left.

        Raises:
            UsageError: The command line refuses the command.
            RunError: Several trials in a row failed.
        """
        if self.search.is_new:
            self._check()
        elif self.search.done:
            print(f"{self.search.done} of {self.search.count} trials are finished already", flush=True)
        in_a_row = 0
        try:
            while True:
                while len(self.running) < self.at_once and in_a_row < MOST_FAILURES and (trial := self.search.next()):
                    self.running.append(self._start(trial))
                    self.search.record()
                if not self.running:
                    break
                wait([flight.process.sentinel for flight in self.running], timeout=_POLL_SECONDS)
                for flight in list(self.running):
                    if flight.process.is_alive():
                        self._watch(flight)
                    else:
                        in_a_row = in_a_row + 1 if self._finish(flight) == FAILED else 0
                        self.search.record()
        finally:
            for flight in self.running:
                flight.process.terminate()
            for flight in self.running:
                flight.process.join()
        if in_a_row >= MOST_FAILURES:
            raise RunError(
                f"{in_a_row} trials in a row failed (logs in {self.folder / 'logs'}); when the cause is mended, the "
                "same command goes on"
            )

    def _check(self) -> None:
        """Parses the command of one trial, so that a wrong key is told before anything runs."""
        log = self._log("check")
        process = self.starter.start(self._words(self.search.example(), "check"), log, call="check_words")
        process.join()
        if process.exitcode != 0:
            raise UsageError(f"sweep {self.sweep.name}: its command is refused: {last_error(log)}")

    def _start(self, trial: "Trial") -> _Flight:
        name = trial_name(trial.number)
        gpu = self.free.pop(0) if self.free else None
        # What is logged to W&B in a sweep on W&B stays here, unless the user says otherwise.
        environ = {**device(gpu), "WANDB_MODE": os.environ.get("WANDB_MODE", "disabled")}
        words = self._words(self.search.values(trial), name)
        process = self.starter.start([*words, *QUIET], self._log(name), environ)
        return _Flight(trial, name, process, gpu, time.monotonic())

    def _words(self, values: Mapping[str, Any], name: str) -> list[str]:
        fit, *rest = fit_words(self.sweep, values)
        where = [f"--run.root={self.folder.parent}", f"--run.experiment={self.folder.name}", f"--run.name={name}"]
        # The number of threads comes first, so that the file may say otherwise.
        return [fit, "--run.threads=1", *rest, *where, f"--run.stage={stage(self.sweep, values, name)}"]

    def _watch(self, flight: _Flight) -> None:
        """Ends a running trial that is not worth its time."""
        if flight.told is None and self.search.judge(flight.trial, self._series(flight)):
            flight.process.terminate()
            flight.told = time.monotonic()
        elif flight.told is not None and time.monotonic() - flight.told > _PATIENCE:
            flight.process.kill()

    def _finish(self, flight: _Flight) -> str:
        """Keeps the result of a trial whose process has ended; returns its state."""
        flight.process.join()
        self.running.remove(flight)
        if flight.gpu is not None:
            self.free.append(flight.gpu)
        series = self._series(flight)
        self.search.judge(flight.trial, series)  # whatever it says: later trials are compared with this one
        run = read_run(self.folder / flight.name)
        seconds = f"{time.monotonic() - flight.start:.0f} s"
        metric = self.sweep.metric
        if flight.told is not None and not run.finished:
            last = self.search.stop(flight.trial)
            self._say(flight, f"stopped early, {metric} {last:.4g} after {len(series)} values ({seconds})")
            return STOPPED
        value = run.figures().get(metric)
        if flight.process.exitcode != 0:
            why = last_error(self._log(flight.name))
        elif value is None:
            logged = ", ".join(sorted(key for key in run.figures() if key.startswith("val/")))
            why = f"the run has no {metric}; it has {logged or 'no val/ metric'}"
        elif value - value != 0:  # infinite, or no number
            why = f"{metric} is {value}"
        else:
            self.search.complete(flight.trial, value)
            best = self.search.study.best_trial
            self._say(flight, f"{metric} {value:.4g} ({seconds}); best {trial_name(best.number)} {best.value:.4g}")
            return COMPLETE
        self.search.fail(flight.trial, why)
        self._say(flight, f"failed: {why}", file=sys.stderr)
        return FAILED

    def _series(self, flight: _Flight) -> list[float]:
        return read_run(self.folder / flight.name).history().get(self.sweep.metric, ([], []))[1]

    def _say(self, flight: _Flight, line: str, file: Any = None) -> None:
        values = self.search.values(flight.trial)
        text = described({p.name: values[p.name] for p in self.sweep.parameters if p.varies})
        print(f"[{self.search.done}/{self.search.count}] {flight.name} ({text}): {line}", file=file, flush=True)

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.txt"


def fit_words(sweep: Sweep, values: Mapping[str, Any]) -> list[str]:
    """Returns a trial's command from `fit` on.

    Raises:
        UsageError: The command is none of ours, whose folder and metrics are known.
    """
    words = sweep.words(values)
    own = words[1:] if words[:1] == ["/usr/bin/env"] else words
    for start in _STARTS:
        if own[: len(start) + 1] == [*start, "fit"]:
            return own[len(start) :]
    raise UsageError(
        f"sweep {sweep.name}: its command is `{' '.join(words[:4])} ...`; --local runs `lit-distill fit` "
        "alone, written as ${env} ${program} fit ... with `program: lit-distill`"
    )


def stage(sweep: Sweep, values: Mapping[str, Any], name: str) -> str:
    """What a trial is called in the comparison: name and parameters, or where seeds vary, whatever else does."""
    varying = [parameter.name for parameter in sweep.parameters if parameter.varies]
    text = described({key: values[key] for key in varying if key != _SEED})
    # The command line would look for what ${ names.
    return (text or sweep.name if _SEED in varying else f"{name} ({text})").replace("${", "{")


def _domains(sweep: Sweep) -> list[str]:
    """The packages that the command's configurations name, to be imported once for all trials."""
    texts = [path.read_text(encoding="utf-8") for path in sweep.configs()]
    return sorted({f"lit_distill.{name}" for text in texts for name in re.findall(r"\blit_distill\.(\w+)\.", text)})


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder, so that no second runner works in it; a kill lets go of it."""
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise UsageError("a local sweep needs filelock; install lit-distill[sweep]") from error

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise UsageError(f"{folder} is in use by another `lit-distill sweep`; wait for it, or stop it") from error
