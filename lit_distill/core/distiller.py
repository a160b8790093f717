"""The base of all methods: networks at rest and in training, optimizers, one iteration counter. No batch logic."""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.networks import freeze
from lit_distill.core.reference import Reference
from lit_distill.core.strategies import shard


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Builds the default optimizer: SGD with the constants of the CIFAR protocol of the KD literature."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


class Distiller(LightningModule):
    """A student, perhaps a teacher, and what every method needs around them.

    - Networks named in `frozen` stay in eval mode, get no gradient, and are left out of checkpoints: they come back
      from their own source.
    - Every network is sharded when the strategy provides a device mesh (FSDP2).
    - `iteration` counts training batches. Lightning's `global_step` advances once per optimizer, so schedules,
      alternation and logging use this counter. It is part of the checkpoint.
    - The randomness of a step (dropout, noise) is a function of (seed, iteration, rank), so that a resumed run draws
      what the uninterrupted one would have drawn.

    A subclass builds its losses in `build` (networks exist, shapes can be probed) and its loss in `training_step`.
    Terms that need no teacher are named in `label_terms`. What a run shall show beside numbers (reliability bins,
    sample grids) goes into `panels` by kind.

    Args:
        student: The network to train.
        teacher: The network to learn from, if the method has one.
        optimizer: Builds the optimizer from parameters.
        lr_scheduler: Builds a learning rate schedule from the optimizer; it steps once per `scheduler_interval`.
        scheduler_interval: "epoch" or "step".
    """

    reference: ClassVar[Reference | None] = None
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    product: ClassVar[str] = "student"
    headline: ClassVar[str] = "test/acc"  # the figure that tells most, by which comparisons go unless told otherwise
    label_terms: ClassVar[frozenset[str]] = frozenset({"ce"})
    terms_have_gradients: ClassVar[bool] = True  # or they are numbers, and `TeacherCheck` cannot ask them
    asks_data: ClassVar[str] = "methods ask the data module for num_classes"

    student: nn.Module
    teacher: nn.Module | None
    init_iterations: int = (
        0  # batches of a first phase, if a method has one, in which not all of the student is trained
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        optimizer: OptimizerCallable = sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.scheduler_interval = scheduler_interval
        self.iteration = 0
        self.terms: dict[str, Tensor] = {}
        self.panels: dict[str, Any] = {}
        self._window: dict[str, list[Tensor]] = {}
        self._watched: set[str] = set()
        self._built = False

    def build(self) -> None:
        """Makes what depends on shapes (projectors, heads, caches). Called once, before sharding and optimizers."""

    def configure_model(self) -> None:
        """Builds, freezes and, under FSDP2, shards. Lightning calls it before each of fit, validate, test, predict."""
        if self._built:
            return
        # Projectors start the same in all processes, and under all strategies, which draw numbers of their own before.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mix(_seed()))
            self.build()
        for network in self._frozen_networks():
            freeze(network)
        if self.device_mesh is not None:
            # Under FSDP2 Lightning loads before `on_load_checkpoint` can fill in the frozen networks.
            self.strict_loading = False
            for child in self.children():
                shard(child, self.device_mesh)
        self._built = True

    def on_train_start(self) -> None:
        """Warns where the run would end within the first phase."""
        if self.init_iterations >= self.trainer.estimated_stepping_batches:
            rank_zero_warn(
                f"model.init_iterations is {self.init_iterations}, and the run has only "
                f"{self.trainer.estimated_stepping_batches:.0f} batches; what follows the first phase is never trained"
            )

    def train(self, mode: bool = True) -> "Distiller":
        """Sets the mode of everything but the frozen networks, which stay in eval."""
        super().train(mode)
        for network in self._frozen_networks():
            network.eval()
        return self

    def teacher_hits(self, batch: Any) -> tuple[Tensor, float] | None:
        """Says on which samples of a validation batch the teacher is right, (B,) bool, and what chance would give.

        None where there is no such thing as right.
        """
        return None

    def example_inputs(self) -> tuple[Any, ...] | None:
        """Returns the arguments of the product network for one sample, for counting and export; None if unknown.

        Or for a batch, where samples have no one size; counts are then means over it.
        """
        return None

    def kept_with_product(self) -> dict[str, Any]:
        """Returns what a user of the product network needs besides its weights and class; of plain values."""
        return {}

    def trainable(self) -> list[nn.Parameter]:
        """Returns the parameters that the (first) optimizer trains."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def configure_optimizers(self) -> Any:
        """One optimizer over all trainable parameters. Methods with several override this."""
        return self.optimizer_with_schedule(self.trainable(), self.optimizer)

    def optimizer_with_schedule(self, parameters: list[nn.Parameter], optimizer: OptimizerCallable) -> dict[str, Any]:
        """Builds one optimizer and its learning rate schedule in the form Lightning takes."""
        built = optimizer(parameters)
        if self.lr_scheduler is None:
            return {"optimizer": built}
        schedule = {"scheduler": self.lr_scheduler(built), "interval": self.scheduler_interval}
        return {"optimizer": built, "lr_scheduler": schedule}

    def optimize(self, loss: Tensor, optimizer: int = 0, *, clip_norm: float | None = None) -> None:
        """Takes one step of one optimizer. For methods with `automatic_optimization = False`.

        Args:
            loss: Scalar to descend.
            optimizer: Position in what `configure_optimizers` returned.
            clip_norm: Largest gradient norm over this optimizer's parameters.
        """
        optimizers, schedulers = self.optimizers(), self.lr_schedulers()
        chosen = optimizers[optimizer] if isinstance(optimizers, list) else optimizers
        chosen.zero_grad()
        self.manual_backward(loss)
        if clip_norm is not None:
            parameters = [parameter for group in chosen.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        chosen.step()
        if schedulers is not None and self.scheduler_interval == "step":
            (schedulers[optimizer] if isinstance(schedulers, list) else schedulers).step()

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Adds up the weighted terms of the loss, and logs them, see `record`.

        Args:
            terms: Weighted scalar terms by name; logged as `train/<name>`, their sum as `train/loss`.

        Returns:
            The sum.

        Raises:
            RunError: The mean loss of the interval is not finite.
        """
        self.record(terms)
        first, *rest = (value.float() for value in terms.values())
        return sum(rest, start=first)

    def record(self, terms: Mapping[str, Tensor], watched: Mapping[str, Tensor] | None = None) -> None:
        """Logs the means of the weighted terms over the logging interval.

        The only host synchronisation is at the interval; there too a loss that is not finite stops the run.

        Args:
            terms: See `combine`.
            watched: Other numbers to log as `train/<name>`, which are no part of the loss.

        Raises:
            RunError: The mean loss of the interval is not finite.
        """
        self.terms = dict(terms)
        self._watched |= set(watched or ())
        for name, value in {**terms, **(watched or {})}.items():
            self._window.setdefault(name, []).append(value.detach().float())
        if (self.iteration + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # Lightning sets it late
            self._log_window()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Ties the step's randomness to (seed, iteration, rank)."""
        mixed = _mix(_seed(), self.iteration, self.global_rank)
        # Not torch.manual_seed: it visits every backend and costs 70 times as much, per step.
        torch.default_generator.manual_seed(mixed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(mixed)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts the batch."""
        self.iteration += 1

    def on_train_epoch_end(self) -> None:
        """Logs the rest of the interval; steps per-epoch schedules that Lightning leaves to the module."""
        self._log_window()
        if not self.automatic_optimization and self.scheduler_interval == "epoch":
            schedulers = self.lr_schedulers() or []
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                scheduler.step()  # type: ignore[call-arg]  # plateau schedules want a metric: automatic optimization only

    def check_finite(self) -> None:
        """Checks the weights in training, of all processes; they all raise, or none does.

        Raises:
            RunError: One is not finite.
        """
        trained = ((name, p.detach()) for name, p in self.named_parameters() if p.requires_grad)
        own = ((name, p.to_local() if isinstance(p, DTensor) else p) for name, p in trained)
        bad = next((name for name, p in own if not p.isfinite().all()), None)
        count: Any = torch.tensor(float(bad is not None), device=self.device)
        if self.trainer.strategy.reduce(count, reduce_op="sum"):
            raise RunError(
                f"{bad or 'a weight in another process'} is not finite after {self.iteration} iterations; lower the "
                "learning rate, or clip gradients (--trainer.gradient_clip_val 1.0, or the method's clip_norm); "
                "the last good checkpoint is kept"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the counter and the open logging interval, leaves the frozen networks out; see `check_finite`."""
        self.check_finite()
        # Callbacks that save at the end of a batch do so before this module has counted it.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        checkpoint["iteration"] = self.iteration + progress.processed - progress.completed
        checkpoint["window"] = self._window
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not self._is_frozen(k)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes counter and open logging interval back, and lets the frozen networks stand for what was left out."""
        self.iteration = checkpoint["iteration"]
        self._window = checkpoint.get("window", {})
        if "state_dict" in checkpoint:
            own = self.state_dict()
            checkpoint["state_dict"].update({key: value for key, value in own.items() if self._is_frozen(key)})

    def _frozen_networks(self) -> list[nn.Module]:
        networks = (getattr(self, name, None) for name in self.frozen)
        return [network for network in networks if network is not None]

    def _is_frozen(self, key: str) -> bool:
        return key.partition(".")[0] in self.frozen

    def _data(self) -> Any:
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise UsageError(f"data is missing; {self.asks_data}")
        return data

    def _log_metrics(self, metrics: Any) -> None:
        self.log_dict(metrics.compute(), sync_dist=True)
        metrics.reset()

    def _log_teacher(self, teacher: Tensor, student: Tensor, labels: Tensor) -> None:
        """Logs how often the teacher is right on a test batch, and how often the student decides as it does."""
        decided = teacher.argmax(1)
        for name, hits in (("teacher_acc", decided == labels), ("agreement", decided == student.argmax(1))):
            self.log(f"test/{name}", hits.float().mean(), batch_size=len(labels), sync_dist=True)

    def _log_window(self) -> None:
        if not self._window:
            return
        # By name, since a term comes and goes where its weight is a schedule that reaches zero.
        means = torch.stack(
            [torch.stack([v.to(self.device) for v in values]).mean() for values in self._window.values()]
        )
        means = self.trainer.strategy.reduce(means, reduce_op="mean")
        values = dict(zip(self._window, means.tolist(), strict=True))
        self._window.clear()
        for name, value in values.items():
            if not math.isfinite(value):
                raise RunError(
                    f"train/{name} is {value} at iteration {self.iteration}; lower the learning rate or the weight of "
                    "the term, or clip gradients (--trainer.gradient_clip_val 1.0, or the method's clip_norm); "
                    "the last good checkpoint is kept"
                )
        total = sum(value for name, value in values.items() if name not in self._watched)
        logged = {f"train/{name}": value for name, value in values.items()} | {"train/loss": total}
        self.log("train/loss", logged["train/loss"], prog_bar=True, logger=False)
        for logger in self.loggers:
            logger.log_metrics({**logged, "epoch": self.current_epoch}, step=self.iteration)


def _seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def _mix(*parts: int) -> int:
    """Hashes whole numbers to 63 bits (splitmix64), so that neighbouring seeds and steps share nothing."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
