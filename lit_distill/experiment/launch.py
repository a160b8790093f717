"""LightningCLI with a run folder: one configuration in, one folder with everything about the run out."""

import contextlib
import ctypes
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save_file

from lit_distill.core.callbacks import BestWeights, Efficiency, TeacherCheck
from lit_distill.core.checkpoint_io import AtomicCheckpointIO
from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError
from lit_distill.core.files import atomic_path
from lit_distill.core.strategies import full_state
from lit_distill.experiment.confighash import config_hash
from lit_distill.experiment.export import save_student
from lit_distill.experiment.logger import RunLogger
from lit_distill.experiment.resume_point import ResumePoint
from lit_distill.experiment.run_folder import LAST_CHECKPOINT, AlreadyFinishedError, open_folder
from lit_distill.experiment.secrets import refuse_secrets
from lit_distill.experiment.summary import write_summary
from lit_distill.experiment.wandb_run import WandbRun

SUBCOMMANDS = ("fit", "validate", "test", "predict")


@dataclass
class RunOptions:
    """Where the run is kept, and what happens around it.

    Args:
        root: Folder of all runs.
        experiment: Folder of this experiment, inside root.
        name: Folder of this run, inside the experiment. If left out, the method's name and a hash of the configuration,
            so that the same command finds its run again and a changed one gets a new folder.
        stage: What runs that differ by seed alone have in common; the comparison groups by it. The method if left out.
        test: Whether fit ends with a test on the test split.
        overwrite: Whether another run's folder of the same name may be replaced.
        threads: Number of CPU threads; torch's own choice if left out.
        checkpoint_steps: Batches between resume points, for long epochs; the end of each epoch is one in any case.
        key: Set by recipes, to know their runs again.
    """

    root: str = "runs"
    experiment: str = "default"
    name: str | None = None
    stage: str | None = None
    test: bool = True
    overwrite: bool = False
    threads: int | None = None
    checkpoint_steps: int | None = None
    key: str | None = None


class DistillCLI(LightningCLI):
    """LightningCLI in subclass mode, plus a run folder that resumes.

    `fit` writes `runs/<experiment>/<name>/`; the same command again resumes an interrupted run or says that it is
    finished. `validate`, `test` and `predict` with a run's `config.yaml` take its last checkpoint.
    """

    config_sha: str = ""
    config_text: str = ""
    folder: Path

    def __init__(self, args: list[str]) -> None:
        _quieten()
        if not torch.cuda.is_available():
            # Lightning's import sets it; with it each step of an optimizer searches the disk for a GPU's library.
            os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
        jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        options = {"parser_mode": "omegaconf+", "exit_on_error": False}
        self._started = time.time()
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={**options, **{name: dict(options) for name in SUBCOMMANDS}},
            args=args,
        )

    # ---- parsing ---------------------------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--run.*`."""
        parser.add_class_arguments(RunOptions, "run", instantiate=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, without LightningCLI's warning about two sources of arguments: `main` always passes them."""
        try:
            self.config = parser.parse_args(args)
        except Exception:  # whatever it was, it is raised again; only a broken file gets a better message
            _check_yaml(args)
            raise

    def _parse_ckpt_path(self) -> None:
        """Does not read the checkpoint for hyperparameters: the configuration has them, and the file may be large."""

    # ---- before the run --------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Finds the run folder, refuses what would lose something, and sets what follows from the folder."""
        config = self.config[self.subcommand]
        run = config.run
        for key in ("threads", "checkpoint_steps"):
            if run[key] is not None and run[key] < 1:
                raise UsageError(f"--run.{key} is {run[key]}; give at least 1")
        if run.name is not None and Path(run.name).name != run.name:
            raise UsageError(
                f"--run.name is '{run.name}'; give the name of one folder (--run.experiment is that above)"
            )
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        _keep_freed_memory()
        text = self._parser(self.subcommand).dump(config, skip_none=False)
        refuse_secrets(yaml.safe_load(text))
        self.config_sha = config_hash(text)
        if run.name is None:
            run.name = f"{_last(config.model.class_path).lower()}-{self.config_sha[:8]}"
            text = self._parser(self.subcommand).dump(config, skip_none=False)
        self.config_text = text
        self.folder = Path(run.root) / run.experiment / run.name
        if self.subcommand == "fit":
            self._open_folder(config, text)
        elif config.ckpt_path is None and (self.folder / LAST_CHECKPOINT).is_file():
            config.ckpt_path = str(self.folder / LAST_CHECKPOINT)
            _say(f"using {config.ckpt_path}")
        elif config.ckpt_path is None:
            _say(f"no checkpoint in {self.folder} and no --ckpt_path: the networks are taken as configured")
        self._check_checkpoint(config)

    def _open_folder(self, config: Any, text: str) -> None:
        folder = self.folder
        if _rank() == 0:
            open_folder(folder, text, self.config_sha, overwrite=config.run.overwrite)
        if config.ckpt_path is None and (folder / LAST_CHECKPOINT).is_file():
            config.ckpt_path = str(folder / LAST_CHECKPOINT)
            _say(f"resuming {folder} from its last checkpoint")

    def _check_checkpoint(self, config: Any) -> None:
        path = config.ckpt_path
        if path is not None and path not in ("best", "last", "hpc", "registry") and not Path(path).exists():
            raise UsageError(f"--ckpt_path: {path} does not exist")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the run's logger, resume points, efficiency figures and the teacher check."""
        config = dict(self._get(self.config_init, "trainer", default={}))
        fitting = self.subcommand == "fit"
        config["default_root_dir"] = config.get("default_root_dir") or str(self.folder)
        config["logger"] = self._loggers(config.get("logger")) if fitting else _without_wandb(config.get("logger"))
        if not _is_sharding(config.get("strategy")):
            config["plugins"] = [*_as_list(config.get("plugins")), AtomicCheckpointIO()]
        self.efficiency = Efficiency()
        callbacks: list[Callback] = []
        if fitting and config.get("enable_checkpointing") is not False and not config.get("fast_dev_run"):
            steps = self.config[self.subcommand].run.checkpoint_steps
            callbacks.append(ResumePoint(self.folder / LAST_CHECKPOINT, steps))
        if fitting:
            callbacks += [TeacherCheck(), self.efficiency]
        return self._instantiate_trainer({**config, **kwargs}, callbacks)

    def _loggers(self, logger: Any) -> Any:
        if logger is False:
            return False
        loggers = [entry for entry in _as_list(logger) if entry is not True]
        if any(isinstance(entry, RunLogger) for entry in loggers):
            return loggers
        run = self.config[self.subcommand].run
        # First, so that Lightning takes the run folder as its log_dir.
        others = [entry for entry in loggers if not isinstance(entry, CSVLogger)]
        if any(isinstance(entry, TensorBoardLogger) for entry in others):
            others.sort(key=lambda entry: isinstance(entry, TensorBoardLogger))
        return [RunLogger(run.root, name=run.experiment, version=run.name), *others]

    def before_fit(self) -> None:
        """Tells W&B, where it is asked for, what run this is; and lets the loggers count batches as the method does."""
        for run in self._wandb_runs():
            run.describe(self.folder, yaml.safe_load(self.config_text))
            run.watch_best(self.trainer.callbacks)  # type: ignore[attr-defined]  # Lightning sets it late
        model = self.model
        if self.trainer.accumulate_grad_batches > 1 and isinstance(model, Distiller):
            for logger in self.trainer.loggers:
                if isinstance(logger, RunLogger | WandbRun):
                    logger.counter = lambda: model.iteration  # Lightning counts the batches that end with a step

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs, and ends the run at W&B as it went."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            for logger in self._wandb_runs():
                logger.close(failed=True)
            raise
        for logger in self._wandb_runs():
            logger.close(failed=self.trainer.interrupted)

    def _wandb_runs(self) -> list[WandbRun]:
        return [logger for logger in self.trainer.loggers if isinstance(logger, WandbRun)]

    # ---- after the run ---------------------------------------------------------------------------------------------

    def after_fit(self) -> None:
        """Keeps the student, tests it, and writes the summary: from here on the run is finished."""
        trainer, config = self.trainer, self.config[self.subcommand]
        if config.trainer.fast_dev_run or trainer.interrupted:
            return
        metrics = {k: v for log in trainer.loggers if isinstance(log, RunLogger) for k, v in log.last("val/").items()}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it late
            if isinstance(callback, BestWeights):
                metrics |= callback.metrics
        fit_model = self.model
        student = getattr(fit_model, fit_model.product, None) if isinstance(fit_model, Distiller) else None
        state = None if student is None else full_state(student)
        if state is not None and trainer.is_global_zero:
            spec = plain(config.model.init_args[fit_model.product])
            save_student(state, spec, self.folder / "student", kept=fit_model.kept_with_product())
        if config.run.test and _has_test_data(self.datamodule, fit_model):
            results = trainer.test(fit_model, datamodule=self.datamodule, verbose=False)
            metrics |= {key: float(value) for row in results for key, value in row.items() if key.startswith("test/")}
        if trainer.is_global_zero:
            write_summary(
                self.folder,
                config=plain(config),
                model=fit_model,
                datamodule=self.datamodule,
                metrics=metrics,
                efficiency=self.efficiency.values,
                config_hash=self.config_sha,
                started=self._started,
            )
            _say(f"{self.folder}: " + ", ".join(f"{key} {value:.4f}" for key, value in sorted(metrics.items())))

    def predict(self, **kwargs: Any) -> None:
        """Predicts and keeps the outputs in `predictions.safetensors` of the run folder."""
        outputs = self.trainer.predict(**kwargs)
        rows = [row for row in outputs or [] if isinstance(row, dict)]
        if rows and self.trainer.is_global_zero:
            tensors = {key: torch.cat([row[key].cpu() for row in rows]).contiguous() for key in rows[0]}
            file = self.folder / "predictions.safetensors"
            with atomic_path(file) as path:
                save_file(tensors, path)
            _say(f"predictions of {len(next(iter(tensors.values())))} samples in {file}")


def run_lightning(words: list[str]) -> int:
    """Runs one of fit, validate, test, predict; the words are the command and its arguments."""
    if str(Path.cwd()) not in sys.path:  # so that `class_path: mine.Net` finds mine.py beside the user
        sys.path.insert(0, str(Path.cwd()))
    try:
        DistillCLI(words)
    except AlreadyFinishedError as finished:
        _say(f"lit-distill: {finished}")
    return 0


class ParsingCLI(DistillCLI):
    """Parses, and does nothing of what is asked."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        """Leaves the folder alone."""

    def instantiate_classes(self) -> None:
        """Builds nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def check_words(words: list[str]) -> int:
    """Checks a command of `run_lightning` as far as parsing does, and runs nothing."""
    ParsingCLI(words)
    return 0


def _keep_freed_memory() -> None:
    """Lets glibc keep what torch frees on the CPU, where it can be told to.

    As it comes, large activations are given back to the kernel, which clears their pages anew in the next step. That is
    a tenth and more of the time of small convolutional networks on large batches.
    """
    trim_threshold, mmap_threshold, largest = -1, -3, 32 * 2**20  # names and limits of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(trim_threshold, 2**30)
        library.mallopt(mmap_threshold, largest)


def _check_yaml(words: list[str]) -> None:
    """Refuses the first configuration file that is no YAML mapping, by its name."""
    names = [name for word, name in pairwise(words) if word in ("-c", "--config")]
    names += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    for path in map(Path, names):
        if not path.is_file():
            continue
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UsageError(f"--config: {path} is no text; give a YAML file") from error
        except yaml.YAMLError as error:
            place = getattr(error, "problem_mark", None)
            line = f" (line {place.line + 1}: {getattr(error, 'problem', '')})" if place is not None else ""
            raise UsageError(f"--config: {path} is not YAML{line}; correct it") from error
        if not isinstance(content, dict):
            found = "is empty" if content is None else f"holds {type(content).__name__} '{content}'"
            raise UsageError(f"--config: {path} {found}; write keys such as `model:` and `data:` into it")


def _quieten() -> None:
    """Silences what a user of this command can do nothing about."""
    ignored = (
        r".*`isinstance\(treespec, LeafSpec\)`",  # Lightning 2.6 with a newer torch
        r".*module\(s\) in eval mode at the start of training",  # the frozen teacher, on purpose
        r".*does not have many workers",  # in-memory data needs none
        r".*smaller than the logging interval",  # the end of an epoch logs too
        r".*Checkpoint directory .* exists and is not empty",  # a resumed run
        r"Be aware that when using `ckpt_path`, callbacks used to create",  # resume points are for fit alone
        r".*`?`?dump`?`? was deprecated",  # jsonargparse's newer name is newer than our lower bound
        r".*`?`?instantiate_classes`?`? was deprecated",  # the same, called by Lightning
    )
    for message in ignored:
        warnings.filterwarnings("ignore", message=message)
    for place, words in (
        ("utilities.rank_zero", "litlogger"),
        ("trainer.connectors.checkpoint_connector", "`weights_only` was not set"),  # at each resume point
    ):
        logging.getLogger(f"lightning.pytorch.{place}").addFilter(_without(words))


def _without(words: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: words not in record.getMessage()


def _has_test_data(datamodule: Any, model: Any) -> bool:
    overridden = type(datamodule).test_dataloader is not LightningDataModule.test_dataloader
    return datamodule is not None and overridden and type(model).test_step is not LightningModule.test_step


def _rank() -> int:
    """This process among those of the run, before Lightning has connected them; 0 in the one that starts the others."""
    return int(getattr(rank_zero_only, "rank", None) or 0)


def _is_sharding(strategy: Any) -> bool:
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    return "fsdp" in name.lower() or "modelparallel" in name.lower() or "deepspeed" in name.lower()


def plain(value: Any) -> Any:
    """The value in types of JSON, as a configuration is written down; of others what they say of themselves."""
    if isinstance(value, jsonargparse.Namespace):
        return {key: plain(entry) for key, entry in vars(value).items()}
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def _without_wandb(logger: Any) -> Any:
    """The loggers of a validation or a test: the run at W&B is that of fit."""
    return [entry for entry in _as_list(logger) if entry and not isinstance(entry, WandbRun)] or False


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _last(class_path: str) -> str:
    return class_path.rpartition(".")[2]


@rank_zero_only
def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
