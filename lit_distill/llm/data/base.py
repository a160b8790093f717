"""What the data modules of language models share: tokenizer, parts, rows, batches."""

import copy
import hashlib
import json
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from lit_distill.core.data import EpochDataModule
from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.loading import EpochLoader, EpochPermutation, derived_seed
from lit_distill.llm.batch import TokenBatch
from lit_distill.llm.data.alignment import PairedRows, keep_white_space
from lit_distill.llm.data.packing import PACKINGS, Documents, TokenRows, pack

Item = TypeVar("Item")

_NAMES = {"train": "training", "val": "validation", "test": "test"}


@dataclass
class TokenPart:
    """A part of the data.

    Attributes:
        rows: Its tokens.
        prompts: (D,) tokens of each document in the rows from which a model can write on.
        numbers: (D,) which record of the part each document is, or is a piece of.
        records: The part's records, where they are kept.
        paired: The rows in the teacher's tokens, if it has a tokenizer of its own.
    """

    rows: TokenRows
    prompts: Int[Tensor, " d"]
    numbers: Int[Tensor, " d"]
    records: list[Any] | None = None
    paired: PairedRows | None = None


class TokenLoader(EpochLoader):
    """Batches of token rows.

    Args:
        rows: The rows.
        sampler: The order of rows.
        batch_size: Rows per step over all ranks.
        padding: The token behind the end of a row.
        step: Says of a batch's number which batches make one optimizer step with it. None: each is one.
        kwargs: See `EpochLoader`.

    Attributes:
        paired: The rows in the teacher's tokens, if it has a tokenizer of its own.
        teacher_padding: The token behind the end of these.
    """

    def __init__(
        self,
        rows: TokenRows,
        sampler: EpochPermutation,
        batch_size: int,
        *,
        padding: int,
        step: Callable[[int], range] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(sampler, batch_size, **kwargs)
        self.rows = rows
        self.padding = padding
        self.paired: PairedRows | None = None
        self.teacher_padding = 0
        self.step = step or (lambda number: range(number, number + 1))

    def _batches(self, epoch: int, start: int) -> Iterator[TokenBatch]:
        order = self.sampler.order()
        # Every process knows the order, so what others will score in the same step is known without asking them.
        upto = self.rows.scored[order].cumsum(0).tolist()
        for number in range(start, len(self)):
            first, stop = self._bounds(number)
            index = order[first:stop][self._share(stop - first)]
            input_ids, position_ids, scored, targets = self.rows.gather(index, self.padding)
            step = self.step(number)
            begin, end = self._bounds(step[0])[0], self._bounds(step[-1])[1]
            total = upto[end - 1] - (upto[begin - 1] if begin else 0)
            paired = None if self.paired is None else self.paired.gather(index, self.teacher_padding)
            yield TokenBatch(input_ids, position_ids, scored, targets, index, total, paired)


class TokenDataModule(EpochDataModule[Any]):
    """Base of the data modules of language models: a subclass reads records (`read`) and tokenizes them (`encode`).

    All records are tokenized once, in the main memory, and rows are made of them. Batches are selected whole and padded
    on the right to their longest row; `num_workers` has no effect. Training batches are shuffled, and what is left of
    an epoch after the last full batch is not used in that epoch. Parts are taken at random, record by record: none is
    in two of them.

    Args:
        tokenizer: Folder or name of a tokenizer, as `transformers.AutoTokenizer` takes it.
        teacher_tokenizer: Likewise that of a teacher which has another one: batches then hold each row a second time in
            its tokens, and which of them cover the same text.
        max_length: Tokens of a row, at most.
        packing: "none", one document a row; "ffd", as many as fit (first-fit decreasing). Positions restart with each
            document, so that attention can be kept within it.
        restrict_vocabulary: Number the tokens that occur in the data from 0 and forget the others. Networks cut their
            embeddings and heads by `vocabulary`. Makes small runs cheap; a teacher is then its own distribution over
            the tokens kept.
        val_share: Share of the records for validation.
        test_share: Share of the records for testing.
        root: Folder that relative paths start from.
        batch_size: Rows per step over all processes.
        eval_batch_size: Rows per evaluation step over all processes, rounded up to a multiple of their number.
        train_size: Use only so many training records. A smaller subset lies inside a larger one.
        kwargs: See `EpochDataModule`.

    Attributes:
        packings: Values that `packing` can have.
        unit: What a record is called.
        given: First tokens of each document that are not scored; there is nothing before the first.
    """

    packings: tuple[str, ...] = PACKINGS
    unit = "documents"
    given = 1

    def __init__(
        self,
        tokenizer: str | Path,
        teacher_tokenizer: str | Path | None = None,
        max_length: int = 512,
        packing: str = "none",
        restrict_vocabulary: bool = False,
        val_share: float = 0.1,
        test_share: float = 0.1,
        root: str | Path | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, batch_size=batch_size, eval_batch_size=eval_batch_size, **kwargs)
        check_least("data", 2, max_length=max_length)
        if packing not in self.packings:
            raise UsageError(f"data.packing: {packing} is not known; give {', '.join(self.packings)}")
        for key, value in {"val_share": val_share, "test_share": test_share}.items():
            if not 0 <= value < 1:
                raise UsageError(f"data.{key}: {value} is not a share of the {self.unit}; give 0 up to below 1")
        if val_share + test_share >= 1:
            raise UsageError(
                f"data.val_share, data.test_share: {val_share} and {test_share} leave nothing for training; lower them"
            )
        self.tokenizer_name = str(tokenizer)
        self._key = "tokenizer"
        self.teacher_tokenizer = None if teacher_tokenizer is None else str(teacher_tokenizer)
        self.max_length = max_length
        self.packing = packing
        self.restrict_vocabulary = restrict_vocabulary
        self.val_share = val_share
        self.test_share = test_share
        self._vocabulary: Tensor | None = None

    # ---- what subclasses do ----------------------------------------------------------------------------------------

    @abstractmethod
    def read(self) -> list[Any]:
        """Reads the records."""

    @abstractmethod
    def encode(self, records: list[Any]) -> tuple[Documents, Int[Tensor, " d"]]:
        """Makes a document of each record, which may have no target; and says how long its prompt is.

        With a `teacher_tokenizer`, documents have marks.
        """

    # ---- tokens ----------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            UsageError: It cannot be loaded, or does not say where in the text its tokens are.
        """
        from transformers import AutoTokenizer

        name = Path(self.tokenizer_name).expanduser()
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(name) if name.is_dir() else self.tokenizer_name)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(
                f"data.{self._key}: {self.tokenizer_name} cannot be loaded ({reason}); give a folder with a tokenizer, "
                "or a name that the hub has"
            ) from error
        if not tokenizer.is_fast:
            raise UsageError(
                f"data.{self._key}: {self.tokenizer_name} has no tokenizer.json; convert it to a fast tokenizer"
            )
        if self.teacher_tokenizer is not None:
            keep_white_space(tokenizer)
        return tokenizer

    @property
    def teacher(self) -> "TokenDataModule":
        """The data through the teacher's tokenizer: for its numbers of tokens; the parts are the same.

        Raises:
            UsageError: The teacher has no tokenizer of its own.
        """
        if self.teacher_tokenizer is None:
            raise UsageError(
                "data.teacher_tokenizer is missing; give the tokenizer of the teacher, often the folder that it is in"
            )
        self.setup()
        self._teacher._parts = self._parts
        return self._teacher

    @cached_property
    def _teacher(self) -> "TokenDataModule":
        other = copy.copy(self)
        other.__dict__.pop("tokenizer", None)
        other.tokenizer_name, other._key = str(self.teacher_tokenizer), "teacher_tokenizer"
        other._vocabulary = None
        other.max_length = sys.maxsize  # rows end where the student's do, however many tokens that takes
        return other

    @property
    def vocabulary(self) -> Int[Tensor, " v"] | None:
        """The tokenizer's number of each token of a restricted vocabulary, rising; None if it is not restricted."""
        if self.restrict_vocabulary:
            self.setup()
        return self._vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of tokens, as far as the data are concerned; networks often have more."""
        vocabulary = self.vocabulary
        return len(self.tokenizer) if vocabulary is None else len(vocabulary)

    @property
    def padding(self) -> int:
        """The token behind the end of rows. It counts nowhere, so any will do."""
        return self._own(self.tokenizer.pad_token_id)

    @property
    def end_of_text(self) -> int | None:
        """The tokenizer's end of text in the data's own numbers, None if it has none."""
        number = self.tokenizer.eos_token_id
        return None if number is None else self._own(number)

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of tokens, special ones included."""
        vocabulary = self.vocabulary
        return self.tokenizer.decode(tokens if vocabulary is None else vocabulary[torch.tensor(tokens).long()].tolist())

    def prompts(self, part: str, index: int | Int[Tensor, " n"]) -> list[list[int]]:
        """Returns the beginnings of documents, from which a model can write on.

        Args:
            part: "train", "val" or "test".
            index: Numbers of rows, all of whose documents are meant; or a number of documents, the first ones of the
                part.
        """
        found: TokenPart = self.part(part)
        documents, chosen = found.rows.documents, self._documents(found, index)
        starts = documents.offsets[chosen]
        spans = zip(starts.tolist(), (starts + found.prompts[chosen]).tolist(), strict=True)
        return [documents.ids[start:stop].tolist() for start, stop in spans]

    # ---- parts -----------------------------------------------------------------------------------------------------

    def read_parts(self) -> dict[str, TokenPart]:
        """Reads, splits and tokenizes the records.

        Raises:
            UsageError: The records are not what the module expects, or too few for the shares asked for.
        """
        records = self.read()
        chosen = self._split(len(records))
        ordered = [records[number] for index in chosen.values() for number in index.tolist()]
        documents, prompts = self.encode(ordered)
        if self.restrict_vocabulary:
            documents = self._restricted(documents)
        theirs = None if self.teacher_tokenizer is None else self._encode_for_teacher(ordered, documents)
        parts, start = {}, 0
        for name, index in chosen.items():
            own = torch.arange(start, start + len(index))
            start += len(index)
            rows, numbers = pack(documents.take(own), self.max_length, self.packing, self.given)
            if not len(rows):
                raise UsageError(
                    f"data: none of the {len(own)} {_NAMES[name]} {self.unit} has a token to predict; give more or "
                    "longer ones, or a larger data.max_length"
                )
            # A document has a target, so two tokens or more, of which a prompt leaves one to be written.
            shortened = torch.minimum(prompts[own][numbers], rows.documents.lengths() - 1).clamp(min=1)
            kept = [records[number] for number in index.tolist()] if name == "val" else None
            paired = None if theirs is None else PairedRows(rows, theirs.take(own), numbers)
            parts[name] = TokenPart(rows, shortened, numbers, kept, paired)
        return parts

    def _encode_for_teacher(self, records: list[Any], documents: Documents) -> Documents:
        theirs, _ = self._teacher.encode(records)
        if not bool((theirs.lengths() > 0)[documents.lengths() > 0].all()):
            raise UsageError(
                f"data.teacher_tokenizer: {self.teacher_tokenizer} has no token at all for some of the {self.unit}; "
                "name the teacher's own tokenizer"
            )
        return self._teacher._restricted(theirs) if self.restrict_vocabulary else theirs

    def _split(self, size: int) -> dict[str, Tensor]:
        shares = {"val": self.val_share, "test": self.test_share}
        sizes = {name: max(1, round(share * size)) for name, share in shares.items() if share}
        available = size - sum(sizes.values())
        if available < 1:
            raise UsageError(
                f"data: {size} {self.unit} are too few for {len(sizes) + 1} parts; give more, or set data.val_share "
                "or data.test_share to 0"
            )
        if self.train_size is not None and self.train_size > available:
            raise UsageError(f"data.train_size: {self.train_size} is more than the {available} available; lower it")
        order = torch.randperm(size, generator=torch.Generator().manual_seed(derived_seed("split", self.split_seed)))
        test, val, train = order.split([sizes.get("test", 0), sizes.get("val", 0), available])
        parts = {"train": train[: self.train_size], "val": val, "test": test}
        return {name: index.sort().values for name, index in parts.items() if len(index)}

    def _restricted(self, documents: Documents) -> Documents:
        special = [
            number for number in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id) if number is not None
        ]
        ids = documents.ids.long()
        self._vocabulary = torch.cat([ids, torch.tensor(special, dtype=torch.long)]).unique()
        own = torch.searchsorted(self._vocabulary, ids).int()
        return Documents(own, documents.targets, documents.offsets, documents.marks)

    def _own(self, token: int | None) -> int:
        """Returns the number of a special token in the data; 0 if there is no such token."""
        vocabulary = self.vocabulary
        if token is None:
            return 0
        return token if vocabulary is None else int(torch.searchsorted(vocabulary, token))

    def _documents(self, part: TokenPart, index: int | Tensor) -> Tensor:
        if isinstance(index, int):
            return torch.arange(min(index, len(part.numbers)))
        return part.rows.documents_of(index.cpu())

    def part_size(self, part: str) -> int:
        """Returns the number of rows in a part."""
        return len(self.part(part).rows)

    def no_part(self, name: str) -> str:
        """Returns what a user is told who asks for a part that there is not."""
        return f"data.{name}_share: it is 0, so there is no such part; give a share of the {self.unit}"

    def make_loader(self, part: str, training: bool, device: torch.device, sampling: dict[str, Any]) -> EpochLoader:
        """Makes the loader of a part.

        Its batches are in the main memory, where what is scored is found without waiting for a device.
        """
        found: TokenPart = self.part(part)
        loader = TokenLoader(found.rows, padding=self.padding, **sampling)
        if found.paired is not None:
            loader.paired, loader.teacher_padding = found.paired, self.teacher.padding
        if training:
            loader.step = lambda number: self._step(number, len(loader))
        return loader

    def _step(self, number: int, batches: int) -> range:
        """Returns the batches whose gradients the trainer accumulates with those of a batch."""
        if self.trainer is None:
            return range(number, number + 1)
        # Asked for each batch: both may change between epochs, and the limit is known only when training starts.
        size = self.trainer.accumulate_grad_batches
        start = number // size * size
        return range(start, max(number + 1, min(start + size, batches, int(self.trainer.num_training_batches))))

    def fingerprint(self, part: str = "train") -> dict[str, Any]:
        """Describes what a network sees, row by row.

        Returns:
            "tokenizer": hash of the tokenizer; "data": hash of the tokens, of which of them are scored, and of the rows
            they are in; "samples": number of rows; "rows": how they were made; "vocabulary": hash of a restricted
            vocabulary, or "whole"; "random": false, since rows are the same in each epoch.
        """
        rows = self.part(part).rows
        documents = rows.documents
        return {
            "tokenizer": tokenizer_hash(self.tokenizer),
            "data": _hash(documents.ids, documents.targets, documents.offsets, rows.firsts),
            "samples": len(rows),
            "rows": f"{self.packing}, at most {self.max_length} tokens",
            "vocabulary": "whole" if self._vocabulary is None else _hash(self._vocabulary),
            "random": False,
        }


def in_chunks(records: list[Item], size: int) -> Iterator[list[Item]]:
    """Yields records, `size` at a time, and shows how far they are tokenized."""
    with tqdm(total=len(records), desc="tokenizing", leave=False) as bar:
        for start in range(0, len(records), size):
            chunk = records[start : start + size]
            yield chunk
            bar.update(len(chunk))


def tokenizer_hash(tokenizer: Any) -> str:
    """Hashes what a fast tokenizer does, to 16 hex digits: how it cuts text, and the numbers of tokens."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # left over from its last use
        description.pop(setting, None)
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]
