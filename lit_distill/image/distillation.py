"""The base of image classifier methods: labels plus a weighted list of losses against a frozen teacher."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from tqdm import tqdm

from lit_distill.core.cache import TeacherCache, weights_fingerprint
from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError
from lit_distill.core.files import alone
from lit_distill.core.metrics import classification_metrics, classifier_panels
from lit_distill.core.networks import freeze
from lit_distill.core.schedules import Schedule, value_at
from lit_distill.core.taps import FeatureTaps, probe
from lit_distill.image.data import ImageBatch


def _no_labels() -> Tensor:
    raise UsageError(
        "data: this loss needs the labels of the whole training set; the data module must have train_labels()"
    )


def _no_fine_labels() -> Tensor:
    raise UsageError("data: the known subclasses need finer labels; the data module must have train_fine_labels()")


class Outputs(NamedTuple):
    """What a network said about a batch.

    Attributes:
        logits: (B, K).
        features: Tapped features by module name, (B, ...).
    """

    logits: Tensor
    features: dict[str, Tensor]


class Shapes(NamedTuple):
    """What the networks' probed shapes are, for losses that build projectors.

    Attributes:
        student: Feature shape by tap, without the batch dimension.
        teacher: The same of the teacher.
        num_classes: K.
        train_labels: Returns the labels of the training set by sample index, (N,), for memory banks.
    """

    student: dict[str, tuple[int, ...]]
    teacher: dict[str, tuple[int, ...]]
    num_classes: int
    train_labels: Callable[[], Tensor] = _no_labels


class TrainingSet(NamedTuple):
    """What a loss can learn from before training. Each is a function, since each may cost a pass over the images.

    Attributes:
        teacher: Returns the teacher's outputs on all training samples, in order.
        labels: Returns their labels, (N,).
        fine_labels: Returns the labels (N,) of a finer labelling, where the data has one.
    """

    teacher: Callable[[], Outputs]
    labels: Callable[[], Tensor]
    fine_labels: Callable[[], Tensor]


class DistillationLoss(nn.Module):
    """One loss between student and teacher, with the taps it reads and the projectors it trains.

    Args:
        student_taps: Module names in the student whose outputs `forward` reads.
        teacher_taps: The same in the teacher.

    Attributes:
        name: The term's name in logs.
        teacher_free: The loss needs no teacher; what it is given as the teacher's outputs are the student's own,
            detached.
    """

    name: ClassVar[str]
    teacher_free: ClassVar[bool] = False

    def __init__(self, student_taps: Sequence[str] = (), teacher_taps: Sequence[str] = ()) -> None:
        super().__init__()
        self.student_taps = tuple(student_taps)
        self.teacher_taps = tuple(teacher_taps)

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Fills in taps that were left open from what the networks say of themselves. Called before probing."""

    def build(self, shapes: Shapes) -> None:
        """Makes projectors for the probed shapes."""

    def prepare(self, training_set: TrainingSet) -> None:
        """Learns what the loss needs to know of the training set. Called as a fit starts, also as one is resumed."""

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the unweighted loss of a batch."""
        raise AssertionError(f"{type(self).__name__} is a base class; a loss defines forward")


class Term:
    """A loss and its weight in the sum.

    Args:
        loss: The loss.
        weight: Its weight: a number, or a schedule over iterations.
    """

    def __init__(self, loss: DistillationLoss, weight: float | Schedule) -> None:
        self.loss = loss
        self.weight = weight


def stages(network: nn.Module) -> tuple[str, ...]:
    """Returns the names of a network's stages, whose outputs the feature losses read unless told otherwise.

    Raises:
        UsageError: The network does not say (`stages` attribute); the remedy is to name the taps.
    """
    return _named(network, "stages", "stages")


def penultimate(network: nn.Module) -> str:
    """Returns the name of the module whose output is the embedding (B, D) that a network classifies.

    Raises:
        UsageError: The network does not say (`penultimate` attribute); the remedy is to name the tap.
    """
    return _named(network, "penultimate", "penultimate layer")[0]


def pre_activations(network: nn.Module) -> tuple[str, ...]:
    """Returns the taps of a network's stages before their last ReLU, shallow to deep.

    Raises:
        UsageError: The network does not say (`pre_activations` attribute); the remedy is to name the taps.
    """
    return _named(network, "pre_activations", "pre-activation features")


def _named(network: nn.Module, attribute: str, what: str) -> tuple[str, ...]:
    names = getattr(network, attribute, None)
    names = (names,) if isinstance(names, str) else names
    if isinstance(names, tuple | list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    near = ", ".join(name for name, _ in network.named_children())
    raise UsageError(
        f"{type(network).__name__} names no {what}; give student_taps and teacher_taps (its modules: {near})"
    )


class ImageDistiller(Distiller):
    r"""Trains a classifier on labels and, by weighted terms, on a frozen teacher.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \sum_i w_i \, L_i(\text{student}, \text{teacher})

    Args:
        student: The classifier to train; images (B, C, H, W) to logits (B, K).
        teacher: The frozen classifier.
        terms: Losses against the teacher with their weights.
        label_weight: Weight of the cross-entropy on labels, the gamma above.
        teacher_cache: File in which the teacher's outputs on the training set are kept, so that it runs once and not in
            every epoch. Needs training images without random augmentation.
        kwargs: See `Distiller`.
    """

    asks_data: ClassVar[str] = "image methods ask the data module for sample_shape and num_classes"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        terms: Sequence[Term] = (),
        label_weight: float | Schedule = 1.0,
        teacher_cache: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, **kwargs)
        if teacher is None and not all(term.loss.teacher_free for term in terms):
            raise UsageError("model.teacher is missing; this method learns from a teacher")
        self.losses = nn.ModuleDict({term.loss.name: term.loss for term in terms})
        if len(self.losses) != len(terms):
            raise UsageError("model.terms holds the same loss twice; give each its own class")
        self.weights = {term.loss.name: term.weight for term in terms}
        self.label_weight = label_weight
        self.teacher_cache = teacher_cache
        self._cache: TeacherCache | None = None

    # ---- construction ----------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Probes both networks on the data's sample shape, checks that they fit, and builds projectors and metrics."""
        data = self._data()
        for loss in self._losses():
            loss.resolve(self.student, self.student if self.teacher is None else self.teacher)
        self._student_taps = FeatureTaps(self.student, [tap for loss in self._losses() for tap in loss.student_taps])
        logits, student_shapes = probe(self.student, data.sample_shape, self._student_taps.names)
        self.num_classes = count_classes(logits, self.student, "student")
        check_classes("student", self.num_classes, data.num_classes)
        teacher_shapes: dict[str, tuple[int, ...]] = {}
        if self.teacher is not None:
            freeze(self.teacher)
            if self.teacher_cache is not None:
                self._teacher_hash = weights_fingerprint(self.teacher)  # now, while the weights are whole
            self._teacher_taps = FeatureTaps(
                self.teacher, [tap for loss in self._losses() for tap in loss.teacher_taps]
            )
            logits, teacher_shapes = probe(self.teacher, data.sample_shape, self._teacher_taps.names)
            check_classes("teacher", count_classes(logits, self.teacher, "teacher"), data.num_classes)
        labels = getattr(data, "train_labels", _no_labels)
        shapes = Shapes(student_shapes, teacher_shapes, self.num_classes, labels)
        for loss in self._losses():
            loss.build(shapes)
        self.val_metrics = classification_metrics(self.num_classes, prefix="val/")
        self.test_metrics = classification_metrics(self.num_classes, prefix="test/")

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One image of zeros."""
        return (torch.zeros((1, *self._data().sample_shape), device=self.device),)

    def on_fit_start(self) -> None:
        """Makes or opens the teacher cache, and lets the losses learn from the training set."""
        if self.teacher_cache is not None and self.teacher is not None and self._cache is None:
            self._cache = self._open_cache(self.teacher_cache)
        data = self._data()
        training_set = TrainingSet(
            self._teacher_on_training_set,
            getattr(data, "train_labels", _no_labels),
            getattr(data, "train_fine_labels", _no_fine_labels),
        )
        for loss in self._losses():
            loss.prepare(training_set)

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Labels plus weighted terms. A term whose weight is 0 is not computed, nor a teacher that no term asks for."""
        weights = {name: value_at(weight, self.iteration) for name, weight in self.weights.items()}
        losses = [loss for loss in self._losses() if weights[loss.name]]
        # The teacher first: what it used is free again before the student's activations are kept for the backward pass.
        teacher = None if all(loss.teacher_free for loss in losses) else self.run_teacher(batch)
        student = Outputs(*self._student_taps(batch.images))
        terms: dict[str, Tensor] = {}
        if label_weight := value_at(self.label_weight, self.iteration):
            terms["ce"] = label_weight * F.cross_entropy(student.logits.float(), batch.labels)
        for loss in losses:
            target = _detached(student) if loss.teacher_free or teacher is None else teacher
            terms[loss.name] = weights[loss.name] * loss(student, target, batch, self.iteration)
        if not terms:
            raise UsageError("model.label_weight is 0 and there is no teacher term; nothing is left to train on")
        return self.combine(terms)

    @torch.no_grad()
    def run_teacher(self, batch: ImageBatch) -> Outputs:
        """Returns the frozen teacher's outputs for a training batch, from the cache if there is one."""
        if self._cache is not None:
            outputs = self._cache(batch.index)
            return Outputs(outputs.pop("logits"), outputs)
        return Outputs(*self._teacher_taps(batch.images))

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Accuracy, calibration and likelihood on validation data."""
        self.val_metrics.update(self.student(batch.images).float(), batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/*`."""
        self._log_metrics(self.val_metrics)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """The same on test data, and what the teacher says there."""
        logits = self.student(batch.images).float()
        self.test_metrics.update(logits, batch.labels)
        if self.teacher is not None:
            self._log_teacher(self.teacher(batch.images).float(), logits, batch.labels)

    def on_test_epoch_end(self) -> None:
        """Logs `test/*`, keeps the calibration and the confusion."""
        self.panels |= classifier_panels(self.test_metrics, self._data())
        self._log_metrics(self.test_metrics)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Returns index, label and class probabilities."""
        return {
            "index": batch.index,
            "label": batch.labels,
            "probabilities": self.student(batch.images).float().softmax(1),
        }

    def teacher_hits(self, batch: ImageBatch) -> tuple[Tensor, float] | None:
        """Says where the teacher is right."""
        if self.teacher is None:
            return None
        with torch.no_grad():
            return self.teacher(batch.images).argmax(1) == batch.labels, 1.0 / self.num_classes

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def _losses(self) -> list[DistillationLoss]:
        return [loss for loss in self.losses.values() if isinstance(loss, DistillationLoss)]

    def _open_cache(self, path: Path) -> TeacherCache:
        data = self._data()
        described = data.fingerprint()
        if described["random"]:
            raise UsageError(
                "model.teacher_cache: the training images are augmented at random, so one cached output per image is "
                "not the teacher's output; set data.augment to false (and strong_view), or leave the cache out"
            )
        taps = self._teacher_taps.names
        fingerprint = {"teacher": self._teacher_hash, "data": described, "outputs": ["logits", *taps]}
        waiting = f"teacher cache: waiting for another run that writes {path}"
        with alone(path, waiting) if self.trainer.is_global_zero and not path.exists() else nullcontext():
            missing = self.trainer.strategy.broadcast(not path.exists())
            # A sharded teacher runs in all processes or in none.
            if missing and (self.trainer.is_global_zero or self.device_mesh is not None):
                rank_zero_info(f"teacher cache {path}: running the teacher once over the training set")
                TeacherCache.write(path, fingerprint, self._teacher_outputs(data), size=described["samples"])
            self.trainer.strategy.barrier()
        return TeacherCache.open(path, fingerprint)

    @torch.no_grad()
    def _teacher_on_training_set(self) -> Outputs:
        if self._cache is not None:
            return Outputs(self._cache.outputs["logits"], self._cache.outputs)
        indices, found = zip(*self._teacher_outputs(self._data()), strict=True)
        order = torch.cat(indices).argsort()
        outputs = {name: torch.cat([part[name] for part in found])[order] for name in found[0]}
        return Outputs(outputs["logits"], outputs)

    @torch.no_grad()
    def _teacher_outputs(self, data: Any) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for batch in tqdm(data.ordered_loader(), desc="teacher cache", leave=False):
            logits, features = self._teacher_taps(batch.images.to(self.device))
            yield batch.index, {"logits": logits, **features}


def _detached(outputs: Outputs) -> Outputs:
    return Outputs(outputs.logits.detach(), {name: feature.detach() for name, feature in outputs.features.items()})


def count_classes(logits: Any, network: nn.Module, role: str) -> int:
    """Returns the number of classes in a network's output.

    Raises:
        UsageError: The output is not logits (B, K).
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"model.{role}: {type(network).__name__} returns {shape}; a classifier returns logits (B, K)")
    return logits.shape[1]


def check_classes(role: str, found: int, wanted: int) -> None:
    """Checks that a network has as many classes as the data.

    Raises:
        UsageError: It has not.
    """
    if found != wanted:
        raise UsageError(
            f"model.{role} has {found} classes, the data has {wanted}; "
            f"set model.{role}.init_args.num_classes to {wanted}"
        )
