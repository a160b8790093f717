"""Documents as flat tensors of tokens, and how rows are made of them."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

PACKINGS = ("none", "ffd", "blocks")


@dataclass
class Documents:
    """Tokens of documents, one after another.

    Attributes:
        ids: (L,) int32 tokens.
        targets: (L,) which tokens are to be predicted; the first of a document never is, since nothing precedes it.
        offsets: (D + 1,) int64 where each document starts, and the end.
        marks: (L,) int64 where in its text each token ends, see `alignment.text_marks`; None if nobody asks.
    """

    ids: Int[Tensor, " l"]
    targets: Bool[Tensor, " l"]
    offsets: Int[Tensor, " d_and_end"]
    marks: Int[Tensor, " l"] | None = None

    def __post_init__(self) -> None:
        self.targets = self.targets.index_fill(0, self.offsets[:-1][self.lengths() > 0], False)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def lengths(self) -> Int[Tensor, " d"]:
        """Returns the number of tokens of each document."""
        return self.offsets.diff()

    def scored(self) -> Int[Tensor, " d"]:
        """Returns the number of targets of each document."""
        return _with_zero(self.targets.cumsum(0))[self.offsets].diff()

    def positions(self) -> Int[Tensor, " l"]:
        """Returns the place of each token in its document, int32 from 0."""
        return (torch.arange(len(self.ids)) - self.offsets[:-1].repeat_interleave(self.lengths())).int()

    def take(self, index: Int[Tensor, " n"]) -> "Documents":
        """Returns some documents, in the order asked for."""
        lengths = self.lengths()[index]
        offsets = _with_zero(lengths.cumsum(0))
        places = torch.arange(int(offsets[-1])) + (self.offsets[index] - offsets[:-1]).repeat_interleave(lengths)
        marks = None if self.marks is None else self.marks[places]
        return Documents(self.ids[places], self.targets[places], offsets, marks)

    def given(self, count: int) -> "Documents":
        """Returns the documents with their first `count` tokens given, not to be predicted."""
        return Documents(self.ids, self.targets & (self.positions() >= count), self.offsets, self.marks)

    def cut(self, length: int) -> "Documents":
        """Cuts each document into pieces of at most `length` tokens, which are documents of their own from then on."""
        return self._parted((self.positions() % length == 0).nonzero()[:, 0])

    def cut_stream(self, length: int) -> "Documents":
        """Cuts wherever `length` tokens of all documents are full, so that each piece lies in one block."""
        starts = self.offsets[:-1][self.lengths() > 0]
        return self._parted(torch.cat([starts, torch.arange(0, len(self.ids), length)]).unique())

    def _parted(self, starts: Tensor) -> "Documents":
        return Documents(self.ids, self.targets, torch.cat([starts, self.offsets[-1:]]), self.marks)


class TokenRows:
    """Rows of tokens, each of one or several documents.

    Args:
        documents: In the order in which they stand in the rows.
        sizes: (R,) number of documents of each row.

    Attributes:
        documents: The argument.
        firsts: (R + 1,) number of the document that each row starts with, and the number of all.
        starts: (R + 1,) place of the token that each row starts with, and the number of all.
        scored: (R,) number of targets of each row.
    """

    def __init__(self, documents: Documents, sizes: Int[Tensor, " r"]) -> None:
        self.documents = documents
        self.firsts = _with_zero(sizes.cumsum(0))
        self.starts = documents.offsets[self.firsts]
        self.scored = _with_zero(documents.scored().cumsum(0))[self.firsts].diff()
        self._positions = documents.positions()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    def documents_of(self, index: Int[Tensor, " n"]) -> Int[Tensor, " d"]:
        """Returns the numbers of the documents in some rows, row after row."""
        sizes = self.firsts.diff()[index]
        return torch.arange(int(sizes.sum())) + (self.firsts[index] - (sizes.cumsum(0) - sizes)).repeat_interleave(
            sizes
        )

    def gather(
        self, index: Int[Tensor, " b"], padding: int
    ) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"], Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Puts rows under one another, padded on the right to the longest of them.

        What counts follows from lengths alone; `padding` may be a token that the rows hold too.

        Args:
            index: Numbers of rows.
            padding: The token behind the end of a row.

        Returns:
            Tokens; their positions in their documents, the padding counting on; flat positions `b * T + i`
            whose next token is a target; these targets.
        """
        starts = self.starts[index, None]
        lengths = self.starts[index + 1, None] - starts
        place = torch.arange(int(lengths.max()))
        inside = place < lengths
        flat = torch.where(inside, starts + place, 0)
        input_ids = torch.where(inside, self.documents.ids[flat], padding).long()
        behind = self._positions[self.starts[index + 1] - 1, None] + 1 + place - lengths
        position_ids = torch.where(inside, self._positions[flat], behind).long()
        targets = (self.documents.targets[flat] & inside).flatten().nonzero()[:, 0]
        # A target is never the first token of its document, so what is left of it belongs to the same document.
        return input_ids, position_ids, targets - 1, input_ids.flatten()[targets]


def pack(documents: Documents, max_length: int, packing: str, given: int = 1) -> tuple[TokenRows, Int[Tensor, " n"]]:
    """Makes rows of at most `max_length` tokens. Documents without a target are left out; longer ones are cut.

    Args:
        documents: D documents.
        max_length: Tokens of a row, at most.
        packing: "none", a document (or piece of one) a row; "ffd", as many as fit, see `first_fit_decreasing`;
            "blocks", all documents one after another, cut wherever a row is full.
        given: First tokens of each document or piece that are no targets.

    Returns:
        The rows, and of each document in them, which one of the D it is or is a piece of.
    """
    pieces = documents.cut_stream(max_length) if packing == "blocks" else documents.cut(max_length)
    pieces = pieces.given(given)
    kept = pieces.scored().nonzero()[:, 0]
    starts = pieces.offsets[kept]
    if packing == "blocks":
        row = starts // max_length
    elif packing == "ffd":
        row = first_fit_decreasing(pieces.lengths()[kept], max_length)
    else:
        row = torch.arange(len(kept))
    order = row.argsort(stable=True)
    rows = TokenRows(pieces.take(kept[order]), row.unique(return_counts=True)[1])
    return rows, torch.searchsorted(documents.offsets, starts[order], right=True) - 1


def first_fit_decreasing(lengths: Int[Tensor, " d"], capacity: int) -> Int[Tensor, " d"]:
    """Distributes documents over rows: the longest first, each into the first row that still has room for it.

    Documents of one length go together: rows are filled with them from the first on, as one by one would. So the work
    grows with the number of lengths that there are.

    Args:
        lengths: Tokens of each document, 1 to `capacity`.
        capacity: Tokens of a row, at most.

    Returns:
        The row of each document. Rows are numbered from 0 without a gap.

    Reference: Johnson, Near-optimal bin packing algorithms, 1973.
    """
    order = lengths.argsort(descending=True, stable=True)
    values, counts = lengths[order].unique_consecutive(return_counts=True)
    room = np.full(len(lengths), capacity)
    rows, used = [np.empty(0, dtype=np.int64)], 0
    for length, count in zip(values.tolist(), counts.tolist(), strict=True):
        filled = (room[:used] // length).cumsum()
        found = np.searchsorted(filled, np.arange(min(count, filled[-1] if used else 0)), side="right")
        opened = used + np.arange(count - len(found)) // (capacity // length)
        for taken in (found, opened):
            rows.append(taken)
        room -= length * np.bincount(np.concatenate(rows[-2:]), minlength=len(room))
        used = max(used, int(opened[-1]) + 1) if len(opened) else used
    return torch.empty_like(order).index_copy(0, order, torch.from_numpy(np.concatenate(rows)))


def _with_zero(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (1, 0))
