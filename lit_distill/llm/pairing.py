"""A teacher with another tokenizer: it reads its own tokens, and is cut into slices together with the student."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.llm.batch import PairedTokens, TokenBatch
from lit_distill.llm.fused import SLICE_BYTES
from lit_distill.llm.signals import Signal
from lit_distill.llm.teachers import TeacherSource
from lit_distill.llm.vocabularies import merge_groups

if TYPE_CHECKING:
    from lit_distill.llm.distillation import TokenDistiller


@dataclass
class Groups:
    """Groups of tokens of one side, in the form that `merge_groups` takes.

    Attributes:
        last: (G,) the last token of each group.
        earlier: (N,) the group of each token that is not the last of one; G of all others.
    """

    last: Int[Tensor, " g"]
    earlier: Int[Tensor, " n"]

    @classmethod
    def of(cls, begins: Int[Tensor, " g"], sizes: Int[Tensor, " g"], tokens: int) -> "Groups":
        """Makes them of the first token and the size of each."""
        number = torch.arange(len(begins)).repeat_interleave(sizes - 1)
        place = torch.arange(len(number)) - ((sizes - 1).cumsum(0) - (sizes - 1)).repeat_interleave(sizes - 1)
        earlier = torch.full((tokens,), len(begins), dtype=torch.long)
        earlier[begins.repeat_interleave(sizes - 1) + place] = number
        return cls(begins + sizes - 1, earlier)

    def cut(self, groups: slice, tokens: slice) -> "Groups":
        """Cuts out some groups, and tokens among which theirs are all that belong to a group."""
        last = self.last[groups] - tokens.start
        earlier = (self.earlier[tokens] - groups.start).clamp(max=len(last))
        return Groups(last, earlier)


@dataclass
class Slices:
    """Slices of both sides in which groups are whole.

    Attributes:
        student: Of the student's scored tokens.
        teacher: Of the teacher's.
        groups: Of the groups.
    """

    student: list[slice] = field(default_factory=list)
    teacher: list[slice] = field(default_factory=list)
    groups: list[slice] = field(default_factory=list)


def cut_groups(paired: PairedTokens, tokens: int, student_chunk: int, teacher_chunk: int) -> Slices:
    """Cuts the student's tokens into slices, so that none of them has many tokens on either side.

    Args:
        paired: The groups.
        tokens: N, scored tokens of the student.
        student_chunk: Student tokens in a slice. A group that has more is a slice of its own.
        teacher_chunk: Teacher tokens in a slice, likewise.
    """
    inside = torch.zeros(tokens + 1, dtype=torch.long)
    inside.index_add_(0, paired.begins + 1, torch.ones_like(paired.begins))
    inside.index_add_(0, paired.begins + paired.sizes, -torch.ones_like(paired.begins))
    places = (inside.cumsum(0) == 0).nonzero()[:, 0]  # where no group is cut
    groups = torch.searchsorted(paired.begins, places)
    teacher = F.pad(paired.teacher_sizes.cumsum(0), (1, 0))[groups].numpy()
    starts, numbers = places.numpy(), groups.numpy()
    found, at = Slices(), 0
    while at < len(starts) - 1:
        fits = np.searchsorted(starts, starts[at] + student_chunk, side="right") - 1
        taught = np.searchsorted(teacher, teacher[at] + teacher_chunk, side="right") - 1
        then = max(at + 1, min(int(fits), int(taught)))
        for parts, bounds in ((found.student, starts), (found.teacher, teacher), (found.groups, numbers)):
            parts.append(slice(int(bounds[at]), int(bounds[then])))
        at = then
    return found


@dataclass
class PreparedTokens(PairedTokens):
    """Paired tokens with all that would make a device wait if it were found out there.

    Attributes:
        student: Groups of the student's scored tokens.
        teacher: Groups of the teacher's.
        parts: Slices of both.
    """

    student: Groups
    teacher: Groups
    parts: Slices


def prepare(paired: PairedTokens, tokens: int, student_size: int, teacher_size: int) -> PreparedTokens:
    """Makes groups and slices of what the data say, in the main memory.

    Args:
        paired: Of a batch.
        tokens: N, scored tokens of the student.
        student_size: V, logits of a student token.
        teacher_size: W, logits of a teacher token.
    """
    chunks = (max(1, SLICE_BYTES // (4 * size)) for size in (student_size, teacher_size))
    begins = paired.teacher_sizes.cumsum(0) - paired.teacher_sizes
    return PreparedTokens(
        **vars(paired),
        student=Groups.of(paired.begins, paired.sizes, tokens),
        teacher=Groups.of(begins, paired.teacher_sizes, len(paired.targets)),
        parts=cut_groups(paired, tokens, *chunks),
    )


@dataclass
class MergedGroups:
    """A teacher's word on some groups, and where these groups are among the student's tokens.

    Attributes:
        logprobs: (g, W), see `merge_groups`.
        student: Groups of a slice of the student's scored tokens.
    """

    logprobs: Float[Tensor, "g w"]
    student: Groups


@dataclass
class PairedSignal:
    """The teacher's last hidden states at its own tokens, and its head: logits of a slice's groups when asked for it.

    Attributes:
        hidden: (M, H).
        weight: (W, H) the head.
        paired: The groups.
    """

    hidden: Float[Tensor, "m h"]
    weight: Float[Tensor, "w h"]
    paired: PreparedTokens

    @torch.no_grad()
    def __getitem__(self, rows: slice) -> Any:
        """Returns `MergedGroups` of one of the slices of the student's tokens."""
        parts = self.paired.parts
        number = parts.student.index(rows)
        tokens, groups = parts.teacher[number], parts.groups[number]
        theirs = self.paired.teacher.cut(groups, tokens)
        logits = F.linear(self.hidden[tokens], self.weight)
        merged = merge_groups(logits, self.paired.targets[tokens], last=theirs.last, earlier=theirs.earlier)
        return MergedGroups(merged, self.paired.student.cut(groups, rows))


class PairedTeacher(TeacherSource):
    """The teacher runs on each batch, on its own tokens."""

    def attach(self, module: "TokenDistiller") -> None:
        """Takes the teacher."""
        self._module = [module]  # in a list, so that it does not become part of a module that holds this source

    @torch.no_grad()
    def signal(self, batch: TokenBatch, part: str) -> Signal:
        """Runs the teacher."""
        (module,) = self._module
        assert module.teacher is not None
        paired = batch.paired
        assert isinstance(paired, PreparedTokens)
        hidden, weight = module.teacher(
            paired.input_ids, paired.position_ids, paired.scored, score=lambda hidden, weight: (hidden, weight)
        )
        return PairedSignal(hidden, weight, paired)
