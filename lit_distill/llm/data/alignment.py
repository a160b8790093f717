"""Which tokens of two tokenizers cover the same text."""

import json
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lit_distill.llm.batch import PairedTokens
from lit_distill.llm.data.packing import Documents, TokenRows

TURN = 2**32  # what lies between the marks of two turns: more characters than any of them has


def keep_white_space(tokenizer: Any) -> None:
    """Lets a fast tokenizer say where its tokens are with the white space that they begin and end with.

    Many leave it out of what they report, though the token covers it. What tokens a text has is not changed.
    """
    backend = tokenizer.backend_tokenizer
    description = json.loads(backend.to_str())
    if _set_everywhere(description["post_processor"], "trim_offsets", False):
        backend.post_processor = type(backend).from_str(json.dumps(description)).post_processor


def _set_everywhere(node: Any, key: str, value: Any) -> bool:
    found = False
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        found |= _set_everywhere(child, key, value)
    if isinstance(node, dict) and node.get(key, value) != value:
        node[key] = value
        found = True
    return found


def clean_ends(spans: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, " n"]:
    """Returns behind which character each token ends, -1 where that is inside a character or the token has no text.

    Tokenizers report characters, not bytes: the pieces of one character all have it whole. The last of them ends it.

    Args:
        spans: (n, 2) first character of each token and the one behind its last; equal for tokens without text.
    """
    if not len(spans):
        return np.empty(0, dtype=np.int64)
    ends = np.maximum.accumulate(spans[:, 1])
    empty = spans[:, 0] == spans[:, 1]
    starts = np.where(empty, ends, spans[:, 0])
    inside = np.append(starts[1:] < ends[:-1], False)
    empty[0] = False  # what begins a text ends before its first character
    return np.where(inside | empty, -1, ends).astype(np.int64)


def text_marks(spans: Int[np.ndarray, "n 2"], length: int, ended: bool) -> Int[np.ndarray, " m"]:
    """Returns the marks of a text's tokens.

    A mark is the place in the text where a token ends, -1 if there is none. Two tokenizers agree on a boundary where
    both have the same mark.

    Args:
        spans: See `clean_ends`; without the end of text.
        length: Characters of the text.
        ended: Whether an end of text follows, which is one place more.
    """
    return np.append(clean_ends(spans), [length + 1] if ended else []).astype(np.int64)


def turn_marks(spans: Int[np.ndarray, "n 2"], said: Any, text: str, contents: list[str]) -> Int[np.ndarray, " n"]:
    """Returns the marks of a conversation's tokens, the same however a template writes what is around the turns.

    In each turn places count from where its content starts; the token that ends the turn is one place more. White space
    around the content is left out, which templates treat in their own ways.

    Args:
        spans: See `clean_ends`.
        said: (n,) which tokens are the assistant's.
        text: The conversation as the template writes it.
        contents: What the assistant says in each turn. One that the template does not write word for word gets no mark.
    """
    ends = clean_ends(spans)
    marks = np.full(len(spans), -1, dtype=np.int64)
    begins = np.flatnonzero(np.diff(said.astype(np.int8), prepend=0) == 1)
    known = len(begins) == len(contents)
    behind = 0
    for turn, content in enumerate(map(str.strip, contents)):
        at = text.find(content, max(behind, int(spans[begins[turn], 0])) if known else behind)
        if at < 0 or not content:
            continue
        behind = at + len(content)
        within = (ends > at) & (ends <= behind)
        marks[within] = turn * TURN + ends[within] - at
        before = np.flatnonzero((ends >= 0) & (ends <= at))
        if len(before) and not text[ends[before[-1]] : at].strip():
            marks[before[-1]] = turn * TURN
        after = int(np.searchsorted(np.maximum.accumulate(spans[:, 0]), behind))
        if 0 < after < len(spans) and said[after - 1] and said[after]:
            silent = np.flatnonzero(~said[after:])
            ending = after + int(silent[0]) - 1 if len(silent) else len(spans) - 1
            marks[ending] = turn * TURN + len(content) + 1
    return marks


class PairedRows:
    """Rows in the teacher's tokens, with the groups of tokens that cover the same text as the student's.

    A group lies between two places of a text at which both tokenizers cut, and that have no other such place between
    them. It counts if all of its student tokens are targets.

    Args:
        rows: The rows in the student's tokens.
        teacher: The records in the teacher's tokens.
        numbers: (D,) of which record each document of the rows is (a piece).
    """

    def __init__(self, rows: TokenRows, teacher: Documents, numbers: Int[Tensor, " d"]) -> None:
        student = rows.documents
        assert student.marks is not None
        assert teacher.marks is not None
        stride = int(torch.cat([student.marks, teacher.marks]).max()) + 2
        pieces = _pieces(student, teacher, numbers, stride)
        assert pieces.marks is not None
        ours, theirs = _common(_keys(student, stride), _keys(pieces, stride))
        key = _keys(student, stride)[ours]
        # Both places in one text, and in one turn of it.
        document = key // stride
        turn = document * stride + (key % stride - 1) // TURN
        sizes, teacher_sizes = ours.diff(), theirs.diff()
        counted = torch.nn.functional.pad(student.targets.cumsum(0), (1, 0))
        begins = counted[ours[:-1] + 1]
        whole = (turn.diff() == 0) & (counted[ours[1:] + 1] - begins == sizes)
        runs = torch.nn.functional.pad(~whole, (1, 0))[:-1].cumsum(0)  # groups without a gap between them

        last = theirs[1:][whole]
        taught = torch.zeros(len(pieces.ids) + 1, dtype=torch.long)
        taught.index_add_(0, last + 1 - teacher_sizes[whole], torch.ones_like(last))
        taught.index_add_(0, last + 1, -torch.ones_like(last))
        self.rows = TokenRows(Documents(pieces.ids, taught.cumsum(0)[:-1] > 0, pieces.offsets), rows.firsts.diff())
        self.scored = rows.scored
        row = torch.searchsorted(rows.firsts, document[1:][whole], right=True) - 1
        self.begins = begins[whole] - (rows.scored.cumsum(0) - rows.scored)[row]
        self.sizes = sizes[whole]
        self.teacher_sizes = teacher_sizes[whole]
        self.runs = runs[whole]
        self.firsts = torch.searchsorted(row, torch.arange(len(rows) + 1))

    def gather(self, index: Int[Tensor, " b"], padding: int) -> PairedTokens:
        """Puts rows under one another, as `TokenRows.gather` does with the student's."""
        counts = self.firsts.diff()[index]
        groups = torch.arange(int(counts.sum())) + (self.firsts[index] - (counts.cumsum(0) - counts)).repeat_interleave(
            counts
        )
        scored = self.scored[index]
        base = (scored.cumsum(0) - scored).repeat_interleave(counts)
        return PairedTokens(
            *self.rows.gather(index, padding),
            begins=self.begins[groups] + base,
            sizes=self.sizes[groups],
            teacher_sizes=self.teacher_sizes[groups],
            runs=self.runs[groups],
        )


def _keys(documents: Documents, stride: int) -> Tensor:
    """Marks of all documents on one axis, -1 where there is none."""
    assert documents.marks is not None
    number = torch.arange(len(documents)).repeat_interleave(documents.lengths())
    return torch.where(documents.marks < 0, -1, number * stride + documents.marks + 1)


def _common(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens behind which both cut."""
    places, others = (ours >= 0).nonzero()[:, 0], (theirs >= 0).nonzero()[:, 0]
    if not len(places) or not len(others):
        return places[:0], others[:0]
    found = torch.searchsorted(theirs[others], ours[places]).clamp(max=len(others) - 1)
    same = theirs[others][found] == ours[places]
    return places[same], others[found[same]]


def _pieces(student: Documents, teacher: Documents, numbers: Tensor, stride: int) -> Documents:
    """Cuts the teacher's records where the student's are cut.

    The first piece of a record starts where the record does, with whatever comes before its text. Any other starts with
    the teacher's token that ends where the student's first one does, or the one before that place.
    """
    assert student.marks is not None
    assert teacher.marks is not None
    number = torch.arange(len(student)).repeat_interleave(student.lengths())
    there = student.marks >= 0
    first = torch.full((len(student),), stride, dtype=torch.long)
    first = first.scatter_reduce(0, number[there], student.marks[there], "amin")
    last = torch.full_like(first, -1).scatter_reduce(0, number[there], student.marks[there], "amax")
    earliest = torch.full((len(teacher),), stride, dtype=torch.long).scatter_reduce(0, numbers, first, "amin")

    record = torch.arange(len(teacher)).repeat_interleave(teacher.lengths())
    upto = (record * stride + teacher.marks + 1).cummax(0).values

    def token(marks: Tensor) -> Tensor:
        """The last token of each record that ends at a place or before it, and has a mark."""
        found = torch.searchsorted(upto, numbers * stride + marks + 1, right=True) - 1
        return torch.searchsorted(upto, upto[found.clamp(min=0)])

    begin, end = teacher.offsets[numbers], teacher.offsets[numbers + 1]
    start = torch.where(first == earliest[numbers], begin, token(first.clamp(max=stride - 2)))
    start = torch.minimum(torch.maximum(start, begin), end - 1)
    stop = torch.minimum(torch.maximum(token(last) + 1, start + 1), end)
    lengths = stop - start
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    places = torch.arange(int(offsets[-1])) + (start - offsets[:-1]).repeat_interleave(lengths)
    return Documents(teacher.ids[places], teacher.targets[places], offsets, teacher.marks[places])


def token_texts(tokenizer: Any) -> dict[bytes | str, int]:
    """Returns a fast tokenizer's tokens by the bytes that they stand for, and special ones by their name.

    The end of text has the empty name, whatever the tokenizer calls it.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    by_byte = '"ByteLevel"' in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    letters = {letter: number for number, letter in bytes_to_unicode().items()}
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: dict[bytes | str, int] = {}
    plain: dict[bytes | str, int] = {}
    for token, number in tokenizer.get_vocab().items():
        if number == tokenizer.eos_token_id:
            found[""] = number
        elif number in special:
            found[token] = number
        elif by_byte and all(letter in letters for letter in token):
            plain[bytes(letters[letter] for letter in token)] = number
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found[bytes([int(token[3:5], 16)])] = number  # a byte that no other token begins with
        else:
            plain[token.replace("▁", " ").encode()] = number
    return found | plain
