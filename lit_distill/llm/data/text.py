"""Plain text, every token of which is scored."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lit_distill.core.errors import UsageError, check_least
from lit_distill.llm.data.alignment import text_marks
from lit_distill.llm.data.base import TokenDataModule, in_chunks
from lit_distill.llm.data.packing import Documents
from lit_distill.llm.data.sources import TABLES, Record, find_files, read_hub, read_table, read_text

_CHUNK = 1000  # documents that are tokenized together
_PROMPT = 32  # longest beginning of a document that samples go on from


class TextDataModule(TokenDataModule):
    """Plain text: every token is scored but the first of each document.

    Documents get the special tokens that the tokenizer gives texts, and its end of text. Those longer than `max_length`
    are cut into pieces, each a document of its own.

    Args:
        tokenizer: Folder or name of a tokenizer, as `transformers.AutoTokenizer` takes it.
        source: A file or folder of .txt, .jsonl or .parquet (the first two may be packed, .gz), or the name of a data
            set that `datasets.load_dataset` knows. None: the topics of Python's `help`, 79 English texts that come with
            Python (other versions have slightly other ones).
        field: Which field of a record holds the text.
        separator: What stands between documents in .txt files.
        subset: Which configuration of a data set, where it has several.
        split: Which split of a data set; parts are taken from it by `val_share` and `test_share`.
        max_length: Tokens of a row, at most.
        packing: As in `TokenDataModule`; or "blocks", all documents of a part one after another, cut into rows of
            `max_length` wherever one is full.
        given: First tokens of each document or piece that are not scored: with more than 1 and packing "none", prompts
            to which completions can be written.
        kwargs: See `TokenDataModule`.
    """

    def __init__(
        self,
        tokenizer: str | Path,
        source: str | None = None,
        field: str = "text",
        separator: str = "\n\n",
        subset: str | None = None,
        split: str = "train",
        max_length: int = 512,
        packing: str = "ffd",
        given: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length, packing=packing, **kwargs)
        if not separator:
            raise UsageError("data.separator: it is empty; give what stands between documents, such as two line ends")
        check_least("data", 1, given=given)
        if given >= max_length:
            raise UsageError(f"data.given: {given} tokens of a row of {max_length} leave nothing to score; lower it")
        self.given = given
        self.source = source
        self.field = field
        self.separator = separator
        self.subset = subset
        self.split = split

    def read(self) -> list[str]:
        """Reads the documents.

        Raises:
            UsageError: The source is not there, or not what its name says.
        """
        if self.source is None:
            from pydoc_data.topics import topics

            return [topics[name] for name in sorted(topics)]
        files = find_files(self.source, self.root, (".txt", *TABLES))
        if files is None:
            return [self._text(record) for record in read_hub(self.source, self.subset, self.split)]
        texts: list[str] = []
        for file in files:
            if ".txt" in file.suffixes:
                texts += [text for text in read_text(file).split(self.separator) if text.strip()]
            else:
                texts += [self._text(record) for record in read_table(file)]
        return texts

    def _text(self, record: Record) -> str:
        place, fields = record
        if not isinstance(fields.get(self.field), str):
            raise UsageError(
                f"data.field: {place} has no text in '{self.field}'; its fields are {', '.join(map(str, fields))}"
            )
        return fields[self.field]

    def encode(self, records: list[str]) -> tuple[Documents, Int[Tensor, " d"]]:
        """Tokenizes the documents; samples go on from the first half of each, 32 tokens at most."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        parts: list[np.ndarray] = []
        marks: list[np.ndarray] = []
        aligned = self.teacher_tokenizer is not None
        for chunk in in_chunks(records, _CHUNK):
            encoded = self.tokenizer(
                chunk,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=aligned,
                verbose=False,
            )
            for number, ids in enumerate(encoded["input_ids"]):
                # Some tokenizers put an end there themselves; an empty document stays empty.
                own = len(ids) - (ids[-1:] == end and bool(end))
                parts.append(np.array(ids[:own] + end if ids else ids, dtype=np.int32))
                if aligned:
                    spans = np.array(encoded["offset_mapping"][number][:own], dtype=np.int64).reshape(-1, 2)
                    marks.append(text_marks(spans, len(chunk[number]), ended=bool(end and ids)))
        lengths = torch.tensor([0, *map(len, parts)])
        ids = torch.from_numpy(np.concatenate(parts))
        places = torch.from_numpy(np.concatenate(marks)) if aligned else None
        documents = Documents(ids, torch.ones(len(ids), dtype=torch.bool), lengths.cumsum(0), places)
        return documents, (lengths[1:] // 2).clamp(max=_PROMPT)
