"""The teacher's classes, split into pseudo-subclasses by its embedding, as targets."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import DistillationLoss, Outputs, Shapes, TrainingSet, penultimate
from lit_distill.image.subclasses import PrincipalDirections, SubclassClassifier, SubclassSplitter
from lit_distill.losses.subclass import subclass_cross_entropy, subclass_targets


class SubclassCrossEntropy(DistillationLoss):
    """Cross-entropy of the student's C * S outputs, see `lit_distill.losses.subclass`.

    Targets are computed from the teacher's outputs in each step, so that they follow augmented images. What they need
    beside is learnt once, in `prepare`.

    Args:
        splitter: How the embedding splits a class; LELP's principal directions if None.
        temperature: tau, of the teacher's class probabilities.
        subclass_temperature: beta, of the split within a class.
        membership: The class whose split a sample helps to find: its label's, or the one the teacher says (which needs
            no labels).
        teacher_tap: Module in the teacher whose output is the embedding (D,) that its last linear layer reads; what the
            teacher calls `penultimate` if None.
    """

    name: ClassVar[str] = "lelp"

    def __init__(
        self,
        splitter: SubclassSplitter | None = None,
        temperature: float = 1.0,
        subclass_temperature: float = 1.0,
        membership: Literal["labels", "teacher"] = "labels",
        teacher_tap: str | None = None,
    ) -> None:
        super().__init__(["network"], [teacher_tap] if teacher_tap else [])
        for key, value in {"temperature": temperature, "subclass_temperature": subclass_temperature}.items():
            if value <= 0:
                raise UsageError(f"model.{key}: {value}; it must be above 0 (usual: 0.3 to 3)")
        self.splitter = splitter or PrincipalDirections()
        self.temperature = temperature
        self.subclass_temperature = subclass_temperature
        self.membership = membership

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes the teacher's penultimate layer where no tap was given, and keeps the weights of its head."""
        if not isinstance(student, SubclassClassifier):
            raise UsageError(
                f"model.student is {type(student).__name__}; put it as `network` into "
                "lit_distill.image.subclasses.SubclassClassifier, with C * S outputs and `subclasses: S`"
            )
        self.teacher_taps = self.teacher_taps or (_embedding(teacher),)
        self._subclasses = student.subclasses
        # Now, while the weights are whole; a sharded teacher has only parts of them.
        linear = [module for module in teacher.modules() if isinstance(module, nn.Linear)]
        self._head = linear[-1].weight.detach().clone() if linear else None

    def build(self, shapes: Shapes) -> None:
        """Checks that the teacher has an embedding and a head over it, and lets the splitter draw and make buffers."""
        tap = self.teacher_taps[0]
        shape = shapes.teacher[tap]
        if len(shape) != 1:
            raise UsageError(f"model.teacher_tap: '{tap}' has shape {shape}; tap the module that returns (D,)")
        wanted = (shapes.num_classes, *shape)
        if self.splitter.needs_head and (self._head is None or tuple(self._head.shape) != wanted):
            found = "no linear layer" if self._head is None else f"a last linear layer of {tuple(self._head.shape)}"
            raise UsageError(
                f"model.teacher has {found}, where a head of {wanted} over '{tap}' is needed; name the module before "
                "the head in teacher_tap, or use a splitter with null_space: false"
            )
        self.splitter.build(shapes.num_classes, self._subclasses, shape[0], lambda: len(shapes.train_labels()))

    @torch.no_grad()
    def prepare(self, training_set: TrainingSet) -> None:
        """Fits the splitter, unless a checkpoint has brought it back."""
        if self.splitter.fitted:
            return
        outputs = training_set.teacher()
        labels = training_set.labels() if self.membership == "labels" else outputs.logits.argmax(1)
        embeddings = outputs.features[self.teacher_taps[0]].cpu()
        head = None if self._head is None else self._head.cpu()
        self.splitter.fit(embeddings, labels.cpu(), head, training_set.fine_labels)

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        targets = subclass_targets(
            teacher.logits,
            self.splitter(teacher.features[self.teacher_taps[0]], batch.index),
            temperature=self.temperature,
            subclass_temperature=self.subclass_temperature,
        )
        return subclass_cross_entropy(student.features["network"], targets)


def _embedding(teacher: nn.Module) -> str:
    try:
        return penultimate(teacher)
    except UsageError:
        near = ", ".join(name for name, _ in teacher.named_children())
        raise UsageError(
            f"{type(teacher).__name__} names no penultimate layer; give teacher_tap (its modules: {near})"
        ) from None
