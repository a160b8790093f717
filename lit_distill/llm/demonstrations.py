"""Demonstrations and queries: pairs of texts of which the first is context to the second."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import EpochLoader
from lit_distill.llm.data.base import TokenDataModule, TokenLoader, TokenPart, in_chunks
from lit_distill.llm.data.packing import Documents
from lit_distill.llm.data.sources import TABLES, Record, find_files, read_hub, read_table
from lit_distill.llm.data.text import TextDataModule

_CHUNK = 500  # records that are tokenized together


@dataclass
class DemonstrationBatch:
    """Demonstrations, padded on the left, and queries, padded on the right: side by side, no gap is between them.

    Attributes:
        demonstrations: (B, D) tokens.
        queries: (B, Q) tokens, answers among them.
        positions: (B, D + Q) place of each token in its document. The padding on the left is a document of its own.
        lengths: (B,) tokens of the demonstrations.
        scored: (N,) flat positions `b * Q + i` of all tokens of the queries.
        labels: (N,) the next token where it is one of the answer, else -100.
        index: (B,) numbers of the rows among all rows.
        question: (B,) which question a row asks: rows that differ in their answer alone are the options of one.
        right: (B,) whether its answer is the right one.
        total: Tokens of the queries in the whole optimizer step, see `TokenBatch`.
        answered: Tokens of the answers in the whole optimizer step.
    """

    demonstrations: Int[Tensor, "b d"]
    queries: Int[Tensor, "b q"]
    positions: Int[Tensor, "b dq"]
    lengths: Int[Tensor, " b"]
    scored: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    index: Int[Tensor, " b"]
    question: Int[Tensor, " b"]
    right: Bool[Tensor, " b"]
    total: int
    answered: int

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.queries)

    def places(self, before: int) -> Int[Tensor, " n"]:
        """Returns `scored` where `before` more positions stand before the query in each row."""
        return self.scored + (self.scored // self.queries.shape[1] + 1) * before


class DemonstrationLoader(TokenLoader):
    """Batches of demonstrations and queries.

    Args:
        splits: (R,) tokens of each row that are the demonstrations.
        questions: (R,) and `right` (R,), see `DemonstrationBatch`.
        right: None for both: each row is a question of its own.
        args: See `TokenLoader`.
        kwargs: See `TokenLoader`.
    """

    def __init__(
        self,
        splits: Int[Tensor, " r"],
        *args: Any,
        questions: Int[Tensor, " r"] | None = None,
        right: Bool[Tensor, " r"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.splits = splits
        self.questions = torch.arange(len(splits)) if questions is None else questions
        self.right = torch.ones(len(splits), dtype=torch.bool) if right is None else right
        upto = torch.nn.functional.pad(self.rows.documents.targets.cumsum(0), (1, 0))
        starts = self.rows.starts
        self.sizes = starts.diff() - splits
        # The first token of a query is not predicted by the query.
        self.answers = upto[starts[1:]] - upto[starts[:-1] + splits + 1]

    def _batches(self, epoch: int, start: int) -> Iterator[DemonstrationBatch]:  # type: ignore[override]
        order = self.sampler.order()
        sums = [torch.nn.functional.pad(x[order].cumsum(0), (1, 0)).tolist() for x in (self.sizes, self.answers)]
        for number in range(start, len(self)):
            first, stop = self._bounds(number)
            step = self.step(number)
            begin, end = self._bounds(step[0])[0], self._bounds(step[-1])[1]
            total, answered = (upto[end] - upto[begin] for upto in sums)
            yield self._gather(order[first:stop][self._share(stop - first)], total, answered)

    def _gather(self, index: Tensor, total: int, answered: int) -> DemonstrationBatch:
        documents = self.rows.documents
        starts, splits, sizes = self.rows.starts[index, None], self.splits[index, None], self.sizes[index, None]
        width, length = int(splits.max()), int(sizes.max())
        place = torch.arange(-width, length)  # 0 is the first token of the query
        inside = (place >= -splits) & (place < sizes)
        flat = torch.where(inside, starts + splits + place, 0)
        tokens = torch.where(inside, documents.ids[flat], self.padding).long()
        positions = torch.where(place < -splits, place + width, place + splits)
        queried = inside[:, width:]
        followed = place[width:] + 1 < sizes
        behind = torch.where(followed, flat[:, width:] + 1, 0)
        labels = torch.where(followed & documents.targets[behind], documents.ids[behind].long(), -100)
        scored = queried.flatten().nonzero()[:, 0]
        return DemonstrationBatch(
            demonstrations=tokens[:, :width],
            queries=tokens[:, width:],
            positions=positions,
            lengths=splits[:, 0],
            scored=scored,
            labels=labels.flatten()[scored],
            index=index,
            question=self.questions[index],
            right=self.right[index],
            total=total,
            answered=answered,
        )


class _Pairs(TokenDataModule):
    """What both data modules of demonstrations share: one document a row, cut in two."""

    packings = ("none",)

    def splits(self, part: TokenPart) -> Int[Tensor, " r"]:
        """Returns how many tokens of each row are the demonstrations."""
        return part.prompts

    def options(self, part: str) -> dict[str, Tensor]:
        """Returns `questions` and `right` of the rows of a part, where rows are options of questions."""
        return {}

    def make_loader(self, part: str, training: bool, device: torch.device, sampling: dict[str, Any]) -> EpochLoader:
        """Makes the loader of a part."""
        found: TokenPart = self.part(part)
        loader = DemonstrationLoader(
            self.splits(found), found.rows, padding=self.padding, **self.options(part), **sampling
        )
        if training:
            loader.step = lambda number: self._step(number, len(loader))
        return loader


class TextDemonstrations(_Pairs, TextDataModule):
    """Plain text, whose first part plays the demonstrations and the rest the query: for pretraining of MEND.

    Documents longer than `max_length` are cut into pieces first.

    Args:
        tokenizer: Folder or name of a tokenizer, as `transformers.AutoTokenizer` takes it.
        share: Share of a document that plays the demonstrations.
        packing: "none" alone: a document a row.
        kwargs: See `TextDataModule`.
    """

    def __init__(self, tokenizer: str | Path, share: float = 0.8, packing: str = "none", **kwargs: Any) -> None:
        super().__init__(tokenizer, packing=packing, **kwargs)
        if not 0 < share < 1:
            raise UsageError(f"data.share: {share} is not a share of a document; give more than 0, less than 1")
        self.share = share

    def splits(self, part: TokenPart) -> Int[Tensor, " r"]:
        """Returns how many tokens of each row are the demonstrations; a query has one at least."""
        lengths = part.rows.starts.diff()
        return torch.minimum((self.share * lengths).round().long(), lengths - 1).clamp(min=1)

    def fingerprint(self, part: str = "train") -> dict[str, Any]:
        """Adds the share."""
        return super().fingerprint(part) | {"share": self.share}


class Tasks(_Pairs):
    """What data modules of tasks share: a record is demonstrations, input and output, three texts.

    Where all is longer than `max_length`, the demonstrations lose their beginning; where the query alone is, the record
    is left out.

    Args:
        tokenizer: Folder or name of a tokenizer, as `transformers.AutoTokenizer` takes it.
        separator: What stands behind each demonstration.
        kwargs: See `TokenDataModule`.
    """

    unit = "records"
    ends = True  # whether an answer has the tokenizer's end of text behind it

    def __init__(self, tokenizer: str | Path, separator: str = "\n\n\n", **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)
        self.separator = separator

    def texts(self, shown: list[str], asked: str, answer: str) -> tuple[str, str, str]:
        """Returns a record of demonstrations, input and output."""
        return "".join(f"{text}{self.separator}" for text in shown), f"{asked}\n", answer

    def encode(self, records: list[tuple[str, str, str]]) -> tuple[Documents, Int[Tensor, " d"]]:
        """Tokenizes the three texts of each record apart, and cuts demonstrations to what fits."""
        end = [self.tokenizer.eos_token_id] if self.ends and self.tokenizer.eos_token_id is not None else []
        ids, targets, splits, shortened, dropped = [], [], [], 0, 0
        for chunk in in_chunks(records, _CHUNK):
            shown, asked, answers = (
                self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
                    "input_ids"
                ]
                for texts in zip(*chunk, strict=True)
            )
            for first, question, answer in zip(shown, asked, answers, strict=True):
                query = question + answer + end
                room = self.max_length - len(query)
                fits = room >= 1
                shortened += fits and len(first) > room
                dropped += not fits
                kept = first[-room:] if fits else first[-1:]
                query = query if fits else query[: self.max_length - 1]
                ids.append(np.array(kept + query, dtype=np.int32))
                # What does not fit has no target, and so is left out.
                targets.append(np.arange(len(kept) + len(query)) >= len(kept) + len(question) + (0 if fits else 10**9))
                splits.append(len(kept))
        if dropped == len(records):
            raise UsageError(f"data.max_length: none of the {dropped} queries fits {self.max_length} tokens; give more")
        if shortened or dropped:
            rank_zero_info(
                f"data.max_length: of {len(records)} records, {shortened} lose the beginning of their demonstrations, "
                f"and {dropped} are left out, whose query is as long as {self.max_length} tokens"
            )
        offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
        documents = Documents(torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(targets)), offsets)
        return documents, torch.tensor(splits)


class TaskDemonstrations(Tasks):
    """Demonstrations of a task, and a query with its answer: for fine-tuning of MEND.

    A record has "demonstrations", "input" and "output". Demonstrations are one text, or a list of texts or of records
    with "input" and "output". Between input and output stands a line end.

    Args:
        tokenizer: Folder or name of a tokenizer, as `transformers.AutoTokenizer` takes it.
        source: A file or folder of .jsonl or .parquet, or the name of a data set that `datasets.load_dataset` knows.
        subset: Which configuration of a data set, where it has several.
        split: Which split of a data set; parts are taken from it by `val_share` and `test_share`.
        kwargs: See `Tasks`.
    """

    def __init__(
        self,
        tokenizer: str | Path,
        source: str,
        subset: str | None = None,
        split: str = "train",
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        self.source = source
        self.subset = subset
        self.split = split

    def read(self) -> list[tuple[str, str, str]]:
        """Reads demonstrations, inputs and outputs as text.

        Raises:
            UsageError: The source is not there, or a record lacks one of them.
        """
        files = find_files(self.source, self.root, TABLES)
        if files is None:
            return [self._texts(record) for record in read_hub(self.source, self.subset, self.split)]
        return [self._texts(record) for file in files for record in read_table(file)]

    def _texts(self, record: Record) -> tuple[str, str, str]:
        place, fields = record
        shown = fields.get("demonstrations")
        shown = [shown] if isinstance(shown, str) else list(shown or [])
        texts = [example(entry) if isinstance(entry, dict) else entry for entry in shown]
        asked, answer = fields.get("input"), fields.get("output")
        if not texts or not all(isinstance(text, str) and text for text in (*texts, asked, answer)):
            raise UsageError(
                f"data.source: {place} needs text in demonstrations, input and output; its fields are "
                f"{', '.join(map(str, fields))}"
            )
        return self.texts([str(text) for text in texts], str(asked), str(answer))


def example(fields: dict[str, Any]) -> str | None:
    """Returns the text of a demonstration, None if it lacks input or output."""
    return f"{fields['input']}\n{fields['output']}" if {"input", "output"} <= fields.keys() else None
