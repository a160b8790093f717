"""Classification as text: a record's label, written out in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_distill.core.errors import UsageError
from lit_distill.llm.data.chat import ChatDataModule, Conversation
from lit_distill.llm.data.sources import TABLES, Record, find_files, read_table


@dataclass
class TextTask:
    """A classification task.

    Attributes:
        source: A file or folder of .jsonl (also packed, .jsonl.gz) or .parquet: a text and its label in each record.
        classes: What each label is called. Left out, labels are words themselves, "_" standing for a space.
        text_field: Which field of a record holds the text.
        label_field: Which field holds the label.
    """

    source: str
    classes: dict[str, str] | None = None
    text_field: str = "text"
    label_field: str = "label"

    def read(self, root: Path | None, key: str) -> list[tuple[str, str]]:
        """Reads texts and the words of their labels.

        Args:
            root: Folder that a relative path starts from.
            key: What the task is called in messages.

        Raises:
            UsageError: The source is not there, or a record is not of the task.
        """
        files = find_files(self.source, root, TABLES)
        if files is None:
            raise UsageError(f"{key}: {self.source} is neither a file nor a folder; give one of .jsonl or .parquet")
        return [self.pair(record, key) for file in files for record in read_table(file)]

    def pair(self, record: Record, key: str) -> tuple[str, str]:
        """Returns text and word of a record.

        Raises:
            UsageError: It has none, or another label.
        """
        place, fields = record
        text, label = fields.get(self.text_field), fields.get(self.label_field)
        if not isinstance(text, str) or not text or not isinstance(label, str | int):
            raise UsageError(
                f"{key}: {place} needs a text in '{self.text_field}' and a label in '{self.label_field}'; its fields "
                f"are {', '.join(map(str, fields))}"
            )
        if self.classes is None:
            return text.strip(), str(label).replace("_", " ")
        if str(label) not in self.classes:
            raise UsageError(
                f"{key}: {place} has the label {label}; classes has {', '.join(self.classes)}; add it, or remove the "
                "record"
            )
        return text.strip(), self.classes[str(label)]


class ClassificationDataModule(ChatDataModule):
    """A classification task as conversations: the text is asked, the word of its label is the answer.

    The first token of the answer is scored and nothing else, so that accuracy and calibration of tokens are those of
    answers; it differs from class to class.

    Args:
        tokenizer: Folder or name of a tokenizer, as `transformers.AutoTokenizer` takes it.
        source: See `TextTask`.
        classes: See `TextTask`.
        question: What is asked; `{text}` stands for the text.
        text_field: See `TextTask`.
        label_field: See `TextTask`.
        kwargs: See `ChatDataModule`, of which the fields do not matter here.
    """

    unit = "texts"

    def __init__(
        self,
        tokenizer: str | Path,
        source: str,
        classes: dict[str, str] | None = None,
        question: str = "{text}",
        text_field: str = "text",
        label_field: str = "label",
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, source, score="answer", **kwargs)
        if "{text}" not in question:
            raise UsageError("data.question: it asks without the text; put {text} where it shall stand")
        self.task = TextTask(source, classes, text_field, label_field)
        self.question = question

    def read(self) -> list[Conversation]:
        """Reads the texts.

        Raises:
            UsageError: The source is not there, a record is not of the task, or the first tokens of two classes are
                the same.
        """
        conversations = super().read()
        words = sorted({talk.messages[-1]["content"] for talk in conversations})
        check_first_tokens(self.tokenizer, words)
        return conversations

    def _conversation(self, record: Record) -> Conversation:
        text, word = self.task.pair(record, "data.source")
        asked = self.question.replace("{text}", text)
        return Conversation(record[0], [{"role": "user", "content": asked}, {"role": "assistant", "content": word}])


def check_first_tokens(tokenizer: Any, words: Sequence[str]) -> None:
    """Checks that words differ in their first tokens.

    Raises:
        UsageError: Two do not.
    """
    seen: dict[int, str] = {}
    for word in words:
        first = tokenizer(word, add_special_tokens=False)["input_ids"][0]
        if first in seen:
            raise UsageError(
                f"data.classes: '{seen[first]}' and '{word}' begin with the same token, so the first token of an "
                "answer does not tell them apart; rename one of them"
            )
        seen[first] = word
