"""Contrast with memory banks of the whole training set."""

from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import Outputs, Shapes
from lit_distill.image.losses.pairs import EmbeddedPair
from lit_distill.losses.contrastive import contrastive_nce, contrastive_normalizer, memory_similarity
from lit_distill.losses.precision import in_float32


class ContrastiveRepresentation(EmbeddedPair):
    """Tells the other network's embedding of the same sample from those of K samples of other classes.

    Both features are embedded by trained linear layers and brought to unit length. Of each network, a memory bank holds
    one embedding per training sample: rows read in a step are those of earlier steps, and a sample's row moves half the
    way to its new embedding afterwards. Each embedding of the batch is compared with rows of the other network's bank:
    the sample's own row and `negatives` rows of other classes.

    Negatives are drawn with replacement. (The public code avoids repeats where K is less than the number of such
    samples. The expected loss is the same.) So K may exceed the size of a small training set.

    The banks and the normalizing constants are buffers: part of the checkpoint, and the same in all processes, which
    exchange indices and embeddings for it. Rows begin as random directions, where public code has uniform numbers of
    about unit length. The constants are set by the first batch and stay. Under FSDP2, too, banks are whole.

    Args:
        student_tap: Module in the student; what it calls `penultimate` if None.
        teacher_tap: The same in the teacher.
        dimensions: Width of the embeddings, D.
        negatives: K, negatives per sample.
        temperature: tau.
        momentum: Share of a bank's row that stays.

    Attributes:
        shared: Buffers that need no synchronisation, since every process makes and moves them alike.

    Reference: Tian, Krishnan, Isola, Contrastive Representation Distillation, 2019, arXiv 1910.10699.
    """

    name = "crd"
    shared: ClassVar[tuple[str, ...]] = ("student_memory", "teacher_memory", "by_class", "class_start", "class_size")

    student_memory: Tensor
    teacher_memory: Tensor
    student_normalizer: Tensor
    teacher_normalizer: Tensor
    by_class: Tensor
    class_start: Tensor
    class_size: Tensor

    def __init__(
        self,
        student_tap: str | None = None,
        teacher_tap: str | None = None,
        dimensions: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__(student_tap, teacher_tap, dimensions)
        if negatives < 1:
            raise UsageError(f"negatives is {negatives}; give 1 or more (usual: 16384)")
        if temperature <= 0:
            raise UsageError(f"temperature is {temperature}; it must be above 0 (usual: 0.07)")
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum

    def build(self, shapes: Shapes) -> None:
        """Makes embeddings and memory banks, and sorts the training set by class."""
        super().build(shapes)
        labels = shapes.train_labels().cpu()
        sizes = torch.bincount(labels, minlength=shapes.num_classes)
        if (sizes > 0).sum() < 2:
            raise UsageError(
                "data: crd contrasts samples of different classes, and all training samples have one class"
            )
        for role in ("student", "teacher"):
            rows = F.normalize(torch.randn(len(labels), self.dimensions), dim=1)
            self.register_buffer(f"{role}_memory", rows)
            self.register_buffer(f"{role}_normalizer", torch.zeros(()))  # zero: not set yet
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)
        self.register_buffer("class_start", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("class_size", sizes, persistent=False)

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch, and moves its rows of the memory banks."""
        student_embedding, teacher_embedding = map(_unit, self.pair(student, teacher))
        rows = torch.cat([batch.index[:, None], self.draw_negatives(batch.labels)], dim=1)
        # Each network's embedding is the anchor, the other's memory what it is compared with.
        loss = self._contrast(student_embedding, self.teacher_memory, self.student_normalizer, rows)
        loss = loss + self._contrast(teacher_embedding, self.student_memory, self.teacher_normalizer, rows)
        index = _gathered(batch.index)
        self._remember(self.student_memory, index, student_embedding)
        self._remember(self.teacher_memory, index, teacher_embedding)
        return loss

    def draw_negatives(self, labels: Int[Tensor, " b"]) -> Int[Tensor, "b k"]:
        """Draws training samples of other classes than the given ones, evenly and with replacement.

        Args:
            labels: (B,) class numbers.

        Returns:
            Sample indices (B, K).
        """
        start, size = self.class_start[labels, None], self.class_size[labels, None]
        # Places among the others, in class order. 62 bits, so that the remainder is as good as even.
        others = len(self.by_class) - size
        place = torch.randint(2**62, (len(labels), self.negatives), device=labels.device) % others
        # Those from the own class's start on lie behind it.
        return self.by_class[place + size * (place >= start)]

    def _contrast(self, embedding: Tensor, memory: Tensor, normalizer: Tensor, rows: Tensor) -> Tensor:
        # A copy, since the memory is overwritten before the backward pass reads it.
        similarity = memory_similarity(embedding, memory.clone(), rows)
        samples, temperature = len(memory), self.temperature
        first = contrastive_normalizer(similarity, num_samples=samples, temperature=temperature)
        normalizer.copy_(torch.where(normalizer > 0, normalizer, _gathered(first.view(1)).mean()))
        return contrastive_nce(similarity, normalizer=normalizer, num_samples=samples, temperature=temperature)

    @torch.no_grad()
    def _remember(self, memory: Tensor, index: Tensor, embedding: Tensor) -> None:
        moved = self.momentum * memory[index] + (1 - self.momentum) * _gathered(embedding.detach())
        memory.index_copy_(0, index, F.normalize(moved, dim=1).to(memory.dtype))


@in_float32
def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1)


def _gathered(tensor: Tensor) -> Tensor:
    """Rows of all processes, in the order of their ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
