"""A run in Weights & Biases: named, grouped and described by its own configuration.

The run folder stays the place where everything is kept. W&B gets a copy of what is small (configuration, metrics,
summary, pictures), from which `lit-distill compare --wandb` makes the runs again, and the student as an artifact.
"""

import netrc
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_distill.core.files import write_text
from lit_distill.experiment.runs import Run, read_run
from lit_distill.experiment.tables import is_percent, lower_is_better

STEP = "iteration"
ID_FILE = "wandb_id.txt"
COPIES = "lit_distill"  # the folder among the run's files at W&B that holds the copies
_TAG_LENGTH = 64  # W&B takes no longer ones
_NAME_LENGTH = 128


class WandbRun(WandbLogger):
    """Lightning's W&B logger for a run of `lit-distill fit`.

    - Group, job type, tags and name are the run's experiment, stage, (domain, method, data, seed) and name.
    - The configuration is sent once, nested as it is in config.yaml.
    - The x-axis is `iteration`, which is W&B's own step too: what is logged at one iteration is one row, and of what a
      resumed run repeats W&B drops the rows that it has.
    - The summary has, as `best/<metric>`, the best value of each validation metric that a callback monitors, or whose
      name says what is good.
    - A run that is resumed goes on under the id in `wandb_id.txt` of its folder. W&B's own files lie beside it, in
      `wandb/`.
    - Where neither WANDB_MODE nor an API key is set, the run is kept offline, and nothing is asked.

    Args:
        project: Project at W&B.
        entity: User or team that has the project; by default W&B's own setting (WANDB_ENTITY).
        artifacts: Whether the student, and a distilled set, are uploaded too.
    """

    def __init__(self, project: str = "lit-distill", entity: str | None = None, artifacts: bool = True) -> None:
        super().__init__(project=project, entity=entity)
        self._wandb_init.pop("anonymous", None)  # W&B warns of it, even where it is None
        self.artifacts = artifacts
        self.folder: Path | None = None
        self.counter: Callable[[], int] | None = None  # in place of the step that is passed
        self._modes: dict[str, str] = {}
        self._best: dict[str, float] = {}
        self._latest = 0
        self._closed = False

    def describe(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Takes the run's folder and resolved configuration, before the run is opened.

        Args:
            folder: The run folder.
            config: Resolved configuration of the subcommand, as plain data.
        """
        run, method = config["run"], config["model"]["class_path"]
        domain = method.split(".")[1] if method.startswith("lit_distill.") else ""
        data = config["data"]["class_path"] if config.get("data") else ""
        tags = [domain, _last(method), _last(data), f"seed-{config['seed_everything']}"]
        self.folder = folder
        self._name = run["name"]
        self._wandb_init |= {
            "name": run["name"],
            "group": run["experiment"],
            "job_type": run["stage"] or _last(method).lower(),
            "tags": [tag[:_TAG_LENGTH] for tag in tags if tag],
            "config": dict(config),
            "dir": str(folder),
        }

    def watch_best(self, callbacks: Iterable[Any]) -> None:
        """Learns from the callbacks which metrics they monitor, and whether the most or the least is best."""
        for callback in callbacks:
            monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
            if isinstance(monitor, str) and mode in ("min", "max"):
                self._modes[monitor] = mode

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run at W&B, opened when it is first asked for."""
        if self._experiment is None:
            self._experiment = self._open()
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run was opened with its whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Adds metrics to the row of an iteration. W&B drops what comes for an earlier one; it is put to the latest."""
        run = self.experiment
        if self._closed:
            return
        step = step if self.counter is None else self.counter()
        self._latest = max(self._latest, step or 0)
        run.log({**metrics, STEP: self._latest}, step=self._latest)
        for key, value in metrics.items():
            if (mode := self._mode(key)) is not None:
                best = float(value) if key not in self._best else {"min": min, "max": max}[mode](self._best[key], value)
                if best != self._best.get(key):
                    self._best[key] = best
                    run.summary[f"best/{key}"] = best

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Marks a failed run as failed. One that went well is not at its end: it is tested and summed up yet."""
        if status == "failed":
            self.close(failed=True)

    @rank_zero_only
    def close(self, *, failed: bool = False) -> None:
        """Sends the results of a finished run, and ends it at W&B in either case."""
        if self._experiment is None or self._closed:
            return
        self._closed = True
        try:
            if not failed and not self._experiment.disabled and self.folder is not None:
                self._send_results(read_run(self.folder))
        finally:
            self._experiment.finish(exit_code=int(failed))

    def _open(self) -> Any:
        import wandb

        # Said outright: once W&B's library is at work in a process, it no longer looks at the variable.
        mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
        offline = mode == "online" and not os.environ.get("WANDB_MODE") and not has_key()
        if self.folder is not None and mode != "disabled":
            self._wandb_init["id"] = self._id = _run_id(self.folder / ID_FILE)
        run = wandb.init(**{**self._wandb_init, "reinit": "finish_previous", "mode": "offline" if offline else mode})
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        if self.folder is not None and not run.disabled:
            self._copy(run, ["config.yaml"])
        if offline:
            rank_zero_info(
                "W&B: no API key is set, so this run is kept offline; `wandb sync "
                f"{self.folder or '.'}/wandb/offline-run-*` uploads it, and `wandb login` (or WANDB_MODE=online) "
                "makes later ones go online"
            )
        return run

    def _send_results(self, run: Run) -> None:
        from lit_distill.experiment.wandb_media import media_of

        wandb_run, summary, folder = self.experiment, run.summary, run.path
        if summary is None:  # interrupted: it will go on
            return
        # All of the run, the part before an interruption included.
        for key, (_, values) in run.history().items():
            if (mode := self._mode(key)) is not None:
                wandb_run.summary[f"best/{key}"] = {"min": min, "max": max}[mode](values)
        wandb_run.summary.update({key: value for key, value in run.figures().items() if key != "seconds"})
        media, files = media_of(run)
        if media:
            wandb_run.log({**media, STEP: self._latest}, step=self._latest)
        self._copy(wandb_run, ["metrics.csv", *files, "summary.json"])
        if self.artifacts:
            self._send_artifact("student", "model", folder / "student", summary)
            self._send_artifact("distilled", "dataset", folder / "distilled", summary)

    def _send_artifact(self, part: str, kind: str, content: Path, summary: Mapping[str, Any]) -> None:
        import wandb

        files = sorted(path for path in content.rglob("*") if path.is_file()) if content.is_dir() else []
        if not files:
            return
        name = re.sub(r"[^\w.-]+", "-", f"{part}-{summary['experiment']}-{summary['name']}")[:_NAME_LENGTH]
        metadata = {key: value for key, value in summary.items() if key != "panels"}
        artifact = wandb.Artifact(name, type=kind, metadata=metadata)
        for path in files:  # as they lie there: copies of large students would fill the disk
            artifact.add_file(str(path.resolve()), name=str(path.relative_to(content)), policy="immutable")
        self.experiment.log_artifact(artifact)

    def _copy(self, run: Any, names: Iterable[str]) -> None:
        """Puts copies of files of the run folder among the files that W&B keeps of the run."""
        assert self.folder is not None
        for name in names:
            source, target = self.folder / name, Path(run.dir) / COPIES / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                run.save(str(target), base_path=run.dir, policy="now", glob=False)

    def _mode(self, key: str) -> str | None:
        """Whether the least or the most is best of a metric of validation, None where that is not known."""
        if key in self._modes:
            return self._modes[key]
        if not key.startswith("val/") or not (lower_is_better(key) or is_percent(key)):
            return None
        return "min" if lower_is_better(key) else "max"


def has_key() -> bool:
    """Whether an API key, or another credential, for the W&B server is set on this machine."""
    import wandb

    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file or os.environ.get("WANDB_API_KEY"):
        return True
    file = os.environ.get("NETRC") or Path.home() / ("_netrc" if os.name == "nt" else ".netrc")
    try:
        return netrc.netrc(file).authenticators(urlsplit(settings.base_url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(file: Path) -> str:
    """The run's id at W&B: a sweep's agent gives one, else that of the interrupted run, else a new one."""
    given = os.environ.get("WANDB_RUN_ID")
    if given is None and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    new = given or uuid.uuid4().hex[:12]
    write_text(file, new + "\n")
    return new


def _last(class_path: str) -> str:
    return class_path.rpartition(".")[2]
