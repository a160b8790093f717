"""What a local sweep tries next, and what it knows: optuna's study in the sweep's folder, and sweep.json made of it."""

import json
import os
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_distill.core.errors import UsageError
from lit_distill.experiment.sweep.file import Sweep
from lit_distill.experiment.sweep.record import COMPLETE, FAILED, RUNNING, STOPPED, Record, TrialRecord, read_record
from lit_distill.experiment.sweep.space import Number

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

LEAST_FOR_IMPORTANCE = 8  # complete trials; with fewer, forests fit noise
_STATES = {"COMPLETE": COMPLETE, "PRUNED": STOPPED, "FAIL": FAILED}


class Search:
    """The trials of a sweep.

    Args:
        sweep: The file.
        folder: Of the sweep.
        count: Trials wanted in all; of a grid all points if None.
        parallel: Whether several run at once.

    Raises:
        UsageError: optuna is missing, there is no count, or the folder holds trials of another sweep.
    """

    def __init__(self, sweep: Sweep, folder: Path, count: int | None, *, parallel: bool) -> None:
        self.sweep, self.folder = sweep, folder
        self._points = sweep.grid() if sweep.method == "grid" else None
        if self._points is not None:
            count = min(count or len(self._points), len(self._points))
        if count is None:
            raise UsageError(
                f"sweep {sweep.name}: {sweep.method} has no end by itself; give --count, or run_cap in the file"
            )
        self.count = count
        self._parallel = parallel
        earlier = read_record(folder)
        if earlier is not None and earlier.identity != sweep.identity():
            raise UsageError(
                f"{folder} holds trials of another version of the sweep {sweep.name} (the file or a configuration of "
                "its command has changed); give the file another `name:`, or remove the folder"
            )
        _check_optuna()
        self.study = _open_study(sweep, folder)
        trials = self._all()
        self.is_new = not trials
        self._interrupted = deque(trial for trial in trials if trial.state.name == "RUNNING")
        self._failed_before = {trial.number for trial in trials if trial.state.name == "FAIL"}

    @property
    def done(self) -> int:
        """Number of trials that have ended, in whatever way."""
        return sum(trial.state.is_finished() for trial in self._all())

    def next(self) -> "Trial | None":
        """Returns the next trial: an interrupted one, or else a new one; None if there are enough."""
        from optuna.trial import Trial

        while self._interrupted:
            # Public calls give no trial of an earlier process; this is what they do themselves.
            trial = Trial(self.study, self._interrupted.popleft()._trial_id)
            if not trial.user_attrs.get("stopped"):
                return trial
            self.stop(trial)
        trials = self._all()
        self.study.sampler = _sampler(self.sweep.method, len(trials), parallel=self._parallel)
        if self._points is None:
            return self.study.ask() if len(trials) < self.count else None
        # A grid is to be whole, so a point that failed is tried again by the next command.
        tried = {_key(t.user_attrs["values"]) for t in trials if t.user_attrs and t.number not in self._failed_before}
        point = next((point for point in self._points if _key(point) not in tried), None)
        if point is None or len(tried) >= self.count:
            return None
        if all(trial.state.name != "WAITING" for trial in trials):  # as a kill before the last line leaves it
            self.study.enqueue_trial(self._as_drawn(point))
        return self.study.ask()

    def values(self, trial: "Trial") -> dict[str, Any]:
        """Returns the trial's parameters, drawn now if they have not been."""
        values = trial.user_attrs.get("values")
        if values is None:
            values = self._draw(trial)
            trial.set_user_attr("values", values)
        return values

    def example(self) -> Mapping[str, Any]:
        """Returns parameters that a trial could have."""
        import optuna

        if self._points is not None:
            return self._points[0]
        return self._draw(optuna.create_study(sampler=_sampler("random", 0)).ask())

    def judge(self, trial: "Trial", series: Sequence[float]) -> bool:
        """Takes the metric's values so far; says whether the trial should be stopped.

        Args:
            trial: A running trial.
            series: All values that it has logged; those already known are passed over.
        """
        halving = self.sweep.halving
        if halving is None:
            return False
        known = len(self._all()[trial.number].intermediate_values)
        for number, value in enumerate(series[known:], known + 1):
            if halving.last is not None and number >= halving.last:
                return False
            trial.report(value, number)
            if trial.should_prune():
                trial.set_user_attr("stopped", True)  # kept, so that a kill before its end does not start it again
                return True
        return False

    def stop(self, trial: "Trial") -> float:
        """Ends a trial as stopped early; returns the last value of its metric."""
        from optuna.trial import TrialState

        return self.study.tell(trial, state=TrialState.PRUNED).value or 0.0

    def complete(self, trial: "Trial", value: float) -> None:
        """Ends a trial with a result."""
        self.study.tell(trial, value)

    def fail(self, trial: "Trial", why: str) -> None:
        """Ends a trial that failed."""
        from optuna.trial import TrialState

        trial.set_user_attr("why", why)
        self.study.tell(trial, state=TrialState.FAIL)

    def record(self, *, with_importance: bool = False) -> Record:
        """Writes sweep.json, and returns what it says."""
        sweep = self.sweep
        record = Record(
            name=sweep.name,
            method=sweep.method,
            metric=sweep.metric,
            goal=sweep.goal,
            parameters={
                p.name: isinstance(p.distribution, Number) and p.distribution.log for p in sweep.parameters if p.varies
            },
            trials=tuple(_record(trial) for trial in self._all()),
            identity=sweep.identity(),
            importance=self._importance() if with_importance else None,
        )
        record.write(self.folder)
        return record

    def _draw(self, trial: "Trial") -> dict[str, Any]:
        return {
            parameter.name: parameter.distribution.suggest(trial, parameter.name) for parameter in self.sweep.parameters
        }

    def _as_drawn(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """A point of the grid as optuna would have drawn it."""
        varying = [parameter for parameter in self.sweep.parameters if parameter.varies]
        whole = {parameter.name for parameter in varying if isinstance(parameter.distribution, Number)}
        return {p.name: point[p.name] if p.name in whole else json.dumps(point[p.name]) for p in varying}

    def _importance(self) -> dict[str, float] | None:
        """Share of each parameter in the variance of the metric, None with too few trials to say."""
        import optuna

        complete = [trial for trial in self._all() if trial.state.name == "COMPLETE"]
        if len(complete) < LEAST_FOR_IMPORTANCE or len({trial.value for trial in complete}) == 1:
            return None
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(self.study, evaluator=evaluator)
        return {name: float(share) for name, share in shares.items()}

    def _all(self) -> "list[FrozenTrial]":
        return self.study.get_trials(deepcopy=False)


def trial_name(number: int) -> str:
    """Name of a trial's run folder."""
    return f"t{number:03d}"


def _record(trial: "FrozenTrial") -> TrialRecord:
    return TrialRecord(
        name=trial_name(trial.number),
        state=_STATES.get(trial.state.name, RUNNING),
        values=trial.user_attrs.get("values", {}),
        value=trial.value if trial.state.is_finished() else None,
        why=trial.user_attrs.get("why", ""),
    )


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _check_optuna() -> None:
    try:
        import optuna
    except ImportError as error:
        raise UsageError("a local sweep needs optuna; install lit-distill[sweep]") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def _open_study(sweep: Sweep, folder: Path) -> "Study":
    import optuna
    from optuna.storages.journal import JournalFileBackend

    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if sweep.halving is not None:
        first, factor = sweep.halving.first, sweep.halving.factor
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=factor)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(_whole_journal(folder / "optuna.log"))))
    return optuna.create_study(
        storage=storage, study_name=sweep.name, direction=sweep.goal, pruner=pruner, load_if_exists=True
    )


def _whole_journal(path: Path) -> Path:
    """Takes from the journal what a kill leaves: half a line, and a lock. Nobody else has the folder now."""
    if path.is_file():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    return path


def _sampler(method: str, number: int, parallel: bool = False) -> Any:
    """What draws trial `number`: seeded by it, so that a resumed sweep draws what an uninterrupted one would have."""
    import numpy as np
    import optuna

    seed = int(np.random.SeedSequence([0, number]).generate_state(1)[0])
    if method == "bayes":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=parallel)
    return optuna.samplers.RandomSampler(seed=seed)
