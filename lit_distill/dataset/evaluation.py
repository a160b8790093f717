"""The evaluation: fresh networks of several kinds, several of each, trained on a set and tested on real images."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.loading import derived_seed
from lit_distill.core.metrics import classifier_panels
from lit_distill.core.networks import check_redrawable, redraw
from lit_distill.dataset.scores import augmentation_robust_score, label_robust_score
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import ImageDistiller

Objective = Literal["kl", "cross_entropy", "mse"]
RUNS = ("real", "hard", "random", "plain", "random_plain")


def soft_label_loss(
    student_logits: Float[Tensor, "b k"],
    target_logits: Float[Tensor, "b k"],
    *,
    objective: Objective = "kl",
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Compares a network's logits with soft labels.

    .. math:: \mathrm{KL}\big(\mathrm{softmax}(t / T) \,\Vert\, \mathrm{softmax}(s / T)\big), \qquad
        -\sum_k \mathrm{softmax}(t)_k \log \mathrm{softmax}(s)_k, \qquad \lVert s - t \rVert^2 / K

    The first has no factor T^2, as in the public codes of this field: at T = 20 its gradients are 400 times smaller
    than in knowledge distillation, which AdamW hides and SGD does not.

    Args:
        student_logits: s.
        target_logits: t.
        objective: Which of the three.
        temperature: T, of the first.
    """
    student, target = student_logits.float(), target_logits.detach().float()
    if objective == "mse":
        return F.mse_loss(student, target)
    if objective == "cross_entropy":
        return F.cross_entropy(student, target.softmax(1))
    log_student, log_target = (logits.div(temperature).log_softmax(1) for logits in (student, target))
    return F.kl_div(log_student, log_target, reduction="batchmean", log_target=True)


class DistilledSetEvaluation(ImageDistiller):
    r"""Trains fresh networks on a set, of distilled, random, or all images, and tests them on real ones.

    All networks see the same batches and are trained side by side: the sum of their losses has for each the gradient of
    its own. They differ by the weights they are drawn with. What the set is, and whether labels are soft, is said by
    the data module; so runs on a distilled set, on random images, and on everything differ by that alone.

    Logged are the mean and the standard deviation over networks, `test/acc` and `test/acc_std` of the student's kind,
    `test/<name>_acc` of others. Given the runs to compare with, there are also

    - `test/hlr` = acc(`real`) - acc(`hard`): what is lost under hard labels;
    - `test/ior` = acc - acc(`random`): what is gained over random images with the same labels and recipe;
    - `test/lrs`, see `label_robust_score`, if both are there;
    - `test/ars`, see `augmentation_robust_score`, from `random`, `plain` and `random_plain`: the last two are runs on
      the set and on random images without augmentation, this run and `random` have it.

    A learning rate that was learned with the set (`SyntheticSet.lr`) takes the place of the optimizer's. With `lrs`
    there are `repeats` networks of each kind at each of these rates. Of each kind those count whose mean accuracy on
    the validation images is the best at the end; their rate is `test/lr`, `test/<name>_lr`. DD-Ranking searches 0.001,
    0.005, 0.01, 0.05 and 0.1 like this, but on the test images and at the best of several epochs. Here test data pick
    nothing: the figures are those of the last epoch.

    Args:
        student: A network; its weights are drawn anew.
        repeats: Networks of each kind.
        others: Networks of other kinds, by name: how well the set serves architectures that it was not made with.
        objective: How soft labels are compared, see `soft_label_loss`.
        temperature: Its temperature.
        label_weight: Weight of the cross-entropy on hard labels, beside soft ones; where there are none it is 1.
        parts: A batch is given to the networks in so many equal parts, whose gradients are averaged, so that batch
            normalization sees what it saw when the soft labels were made.
        lrs: Learning rates to choose from, in place of the optimizer's. The student that a run keeps has the first one.
        runs: Folders of runs to compare with, by what they are: real, hard, random, plain, random_plain.
        kwargs: See `Distiller`.
    """

    chosen: Tensor

    def __init__(
        self,
        student: nn.Module,
        repeats: int = 5,
        others: dict[str, nn.Module] | None = None,
        objective: Objective = "kl",
        temperature: float = 1.0,
        label_weight: float = 0.0,
        parts: int = 1,
        lrs: Sequence[float] | None = None,
        runs: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)
        check_least("model", 1, repeats=repeats, parts=parts)
        if temperature <= 0:
            raise UsageError(f"model.temperature is {temperature}; it must be above 0 (usual: 20)")
        for name in runs or {}:
            if name not in RUNS:
                raise UsageError(f"model.runs: there is no '{name}'; known are {', '.join(RUNS)}")
        for name in others or {}:
            if not name.isidentifier() or name == "student":
                raise UsageError(f"model.others: '{name}' is no name for a network; take letters, such as resnet18")
        if lrs is not None and (not lrs or min(lrs) <= 0):
            raise UsageError(f"model.lrs is {list(lrs)}; give learning rates above 0, or leave it out")
        self.lrs = None if lrs is None else tuple(lrs)
        self.repeats = repeats
        self.kinds = {"student": student, **(others or {})}
        self.objective: Objective = objective
        self.temperature = temperature
        self.hard_weight = label_weight
        self.parts = parts
        self.runs = dict(runs or {})

    def build(self) -> None:
        """Makes the networks."""
        super().build()
        seed = self._data().run_seed
        for name, network in self.kinds.items():
            check_redrawable(network, "student" if name == "student" else f"others.{name}")
        self.rest = nn.ModuleList(
            copy.deepcopy(network)
            for name, network in self.kinds.items()
            for _ in range(self._of_a_kind() - (name == "student"))
        )
        for number, network in enumerate(self.networks()):
            # The same ones for each learning rate.
            number = number // self._of_a_kind() * self.repeats + number % self.repeats
            torch.manual_seed(derived_seed("network", seed, number))
            redraw(network)
        if self.lrs is not None and not self._data().has_part("val"):
            raise UsageError("model.lrs: the data has no validation images to choose by; give some, or leave it out")
        # Which learning rate counts, by kind; -1 until validation has said it.
        self.register_buffer("chosen", torch.full((len(self.kinds),), 0 if self.lrs is None else -1))
        self.accuracies = nn.ModuleDict(
            {
                part: nn.ModuleList(MulticlassAccuracy(self.num_classes, average="micro") for _ in self.networks())
                for part in ("val", "test")
            }
        )
        self.references = {name: accuracy_of(Path(folder)) for name, folder in self.runs.items()}

    def networks(self) -> list[nn.Module]:
        """Returns all networks: those of the student's kind, then the others'."""
        return [self.student, *self.rest]

    def _of_a_kind(self) -> int:
        return self.repeats * len(self.lrs or (None,))

    # ---- training --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """One optimizer for all networks, at the learning rate that the set has learned, if it has, or at `lrs`."""
        if self.lrs is not None:
            groups = [
                {"params": [p for network in networks for p in network.parameters() if p.requires_grad], "lr": lr}
                for lr, networks in zip(self.lrs, self._by_rate(), strict=True)
            ]
            return self.optimizer_with_schedule(groups, self.optimizer)  # type: ignore[arg-type]  # groups are as good
        return self.optimizer_with_schedule(self.trainable(), self._optimizer_of_set)

    def _by_rate(self) -> list[list[nn.Module]]:
        """Returns the networks of each learning rate."""
        networks, count = self.networks(), len(self.lrs or (None,))
        return [
            [n for place, n in enumerate(networks) if place // self.repeats % count == rate] for rate in range(count)
        ]

    def _optimizer_of_set(self, parameters: Any) -> Optimizer:
        optimizer = self.optimizer(parameters)
        learned = getattr(getattr(self._data(), "distilled", None), "lr", None)
        for group in optimizer.param_groups if learned is not None else ():
            group["lr"] = learned
        return optimizer

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Trains all networks on the batch."""
        networks = self.networks()
        means = [self.batch_loss(network, batch) for network in networks]
        # The mean is logged; the sum is what gives each network its own gradient.
        return len(networks) * self.combine({"match": torch.stack(means).mean()})

    def batch_loss(self, network: nn.Module, batch: ImageBatch) -> Float[Tensor, ""]:
        """Computes the loss of one network, part by part."""
        count = min(self.parts, len(batch.labels))
        targets = [None] * count if batch.targets is None else batch.targets.tensor_split(count)
        losses = [
            self.part_loss(network(images).float(), labels, soft) * (len(labels) / len(batch.labels))
            for images, labels, soft in zip(
                batch.images.tensor_split(count), batch.labels.tensor_split(count), targets, strict=True
            )
        ]
        return torch.stack(losses).sum()

    def part_loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Float[Tensor, ""]:
        """Compares logits with soft labels, and with hard ones where there is a weight or nothing else."""
        if targets is None:
            return F.cross_entropy(logits, labels)
        loss = soft_label_loss(logits, targets, objective=self.objective, temperature=self.temperature)
        return loss + self.hard_weight * F.cross_entropy(logits, labels) if self.hard_weight else loss

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Counts what each network has right."""
        for network, accuracy in zip(self.networks(), self._accuracies("val"), strict=True):
            accuracy.update(network(batch.images), batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/*`."""
        self._log_accuracies("val")

    def on_test_start(self) -> None:
        """Checks that it is known which learning rate counts.

        Raises:
            UsageError: No validation has said it.
        """
        super().on_test_start()
        if (self.chosen < 0).any():
            raise UsageError("model.lrs: no validation has chosen; validate at the end (check_val_every_n_epoch)")

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Counts what each network has right; the first one's probabilities are judged, too."""
        for number, (network, accuracy) in enumerate(zip(self.networks(), self._accuracies("test"), strict=True)):
            logits = network(batch.images).float()
            accuracy.update(logits, batch.labels)
            if number == int(self.chosen[0]) * self.repeats:
                self.test_metrics.update(logits, batch.labels)

    def on_test_epoch_end(self) -> None:
        """Logs `test/*`, with what the training set weighs, and the scores."""
        self.panels |= classifier_panels(self.test_metrics, self._data())
        first = self.test_metrics.compute()
        self.log_dict({name: value for name, value in first.items() if name != "test/acc"}, sync_dist=True)
        self.test_metrics.reset()
        accuracy = self._log_accuracies("test")
        footprint = getattr(self._data(), "footprint", None)
        if footprint is not None:
            for name, value in footprint().items():
                self.log(f"test/{name}", float(value))
        for name, value in scores(accuracy, self.references).items():
            self.log(f"test/{name}", value)

    def on_fit_end(self) -> None:
        """Lets the data module keep its set, if it made one, in the run's folder."""
        keep = getattr(self._data(), "keep", None)
        folder = self.trainer.log_dir  # asked by all processes: one tells the others
        if keep and folder and self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it late
            keep(Path(folder) / "distilled")

    def _accuracies(self, part: str) -> list[MulticlassAccuracy]:
        return list(cast(Any, self.accuracies[part]))  # a list of modules hides their type

    def _log_accuracies(self, part: str) -> float:
        accuracies = self._accuracies(part)
        values = torch.stack([accuracy.compute() for accuracy in accuracies]).view(len(self.kinds), -1, self.repeats)
        for accuracy in accuracies:
            accuracy.reset()
        if self.lrs is not None and part == "val" and not self.trainer.sanity_checking:
            self.chosen.copy_(values.mean(2).argmax(1))
        for kind, (name, rows) in enumerate(zip(self.kinds, values, strict=True)):
            row = rows[self.chosen[kind]]
            name = "" if name == "student" else f"{name}_"
            self.log(f"{part}/{name}acc", row.mean())
            if self.repeats > 1:
                self.log(f"{part}/{name}acc_std", row.std())
            if self.lrs is not None:
                self.log(f"{part}/{name}lr", self.lrs[int(self.chosen[kind])])
        return float(values[0, self.chosen[0]].mean())


def accuracy_of(folder: Path) -> float:
    """Returns the test accuracy of a finished run, a share.

    Raises:
        UsageError: There is no such run, or it has no test accuracy.
    """
    try:
        return float(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["metrics"]["test/acc"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"model.runs: {folder} is no finished run with a test accuracy; run it first") from error


def scores(accuracy: float, references: Mapping[str, float]) -> dict[str, float]:
    """Computes the scores that the given runs allow.

    Args:
        accuracy: Of the set under its own labels and recipe, a share.
        references: Accuracies of other runs by what they are, see `DistilledSetEvaluation`.
    """
    found = {}
    if "real" in references:
        found["hlr"] = references["real"] - references.get("hard", accuracy)
    if "random" in references:
        found["ior"] = accuracy - references["random"]
    if len(found) == 2:
        found["lrs"] = label_robust_score(hard_label_recovery=found["hlr"], improvement_over_random=found["ior"])
    if {"random", "plain", "random_plain"} <= references.keys():
        found["ars"] = augmentation_robust_score(
            with_augmentation=accuracy - references["random"],
            without_augmentation=references["plain"] - references["random_plain"],
        )
    return found
