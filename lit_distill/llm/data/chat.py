"""Conversations, of which what the assistant says is scored."""

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.llm.data.alignment import turn_marks
from lit_distill.llm.data.base import TokenDataModule, in_chunks
from lit_distill.llm.data.packing import Documents
from lit_distill.llm.data.sources import TABLES, Record, find_files, read_hub, read_table

Message = dict[str, Any]
Encoded = tuple[list[int], np.ndarray, np.ndarray]  # tokens, which are the assistant's, and their marks

ROLES = ("system", "developer", "user", "assistant", "tool")

# For tokenizers without a template of their own. {end} is <|im_end|> where that is a token, else the end of text.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{end}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CHUNK = 500  # conversations that are rendered and tokenized together


class Conversation(NamedTuple):
    """A conversation that ends with what the assistant says.

    Attributes:
        place: Where it comes from.
        messages: Each has "role" and "content".
    """

    place: str
    messages: list[Message]


class ChatDataModule(TokenDataModule):
    """Conversations and instructions, as the tokenizer's chat template writes them.

    What the assistant says is scored in every turn, with the token that ends the turn and without the header before it;
    so a token counts if it has a character of a turn. Where the template marks turns (`{% generation %}`), its marks
    say which characters these are; else the conversation is rendered up to each turn. Messages behind the last turn of
    the assistant are left out.

    A teacher with another tokenizer sees the conversation as its own chat template writes it.

    Conversations longer than `max_length` lose their end. If nothing of the assistant is left then, they are left out.

    Args:
        tokenizer: Folder or name of a tokenizer, as `transformers.AutoTokenizer` takes it.
        source: A file or folder of .jsonl (also packed, .jsonl.gz) or .parquet, or the name of a data set that
            `datasets.load_dataset` knows.
        messages_field: Which field of a record holds the messages, each with "role" and "content".
        prompt_field: Where there are no messages: which field holds the prompt, a text or messages.
        completion_field: Likewise what the assistant says to that.
        chat_template: A Jinja template, or a file with one. None takes the tokenizer's own, or a small ChatML template
            if it has none.
        score: "completion", what the assistant says; "answer", the first token of that, where answers are told apart
            by it; "all", everything.
        subset: Which configuration of a data set, where it has several.
        split: Which split of a data set; parts are taken from it by `val_share` and `test_share`.
        kwargs: See `TokenDataModule`.
    """

    packings = ("none", "ffd")  # a conversation cut by blocks would have answers without their questions
    unit = "conversations"

    def __init__(
        self,
        tokenizer: str | Path,
        source: str,
        messages_field: str = "messages",
        prompt_field: str = "prompt",
        completion_field: str = "completion",
        chat_template: str | None = None,
        score: str = "completion",
        subset: str | None = None,
        split: str = "train",
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        if score not in ("completion", "answer", "all"):
            raise UsageError(f"data.score: {score} is not known; give completion, answer or all")
        self.source = source
        self.messages_field = messages_field
        self.prompt_field = prompt_field
        self.completion_field = completion_field
        self.chat_template = chat_template
        self.score = score
        self.subset = subset
        self.split = split

    @cached_property
    def _teacher(self) -> TokenDataModule:
        other = super()._teacher
        assert isinstance(other, ChatDataModule)
        other.chat_template = None
        return other

    # ---- conversations ---------------------------------------------------------------------------------------------

    def read(self) -> list[Conversation]:
        """Reads and checks the conversations.

        Raises:
            UsageError: The source is not there or not what its name says, or one of them is not a conversation.
        """
        files = find_files(self.source, self.root, TABLES)
        if files is None:
            return [self._conversation(record) for record in read_hub(self.source, self.subset, self.split)]
        return [self._conversation(record) for file in files for record in read_table(file)]

    def messages(self, index: int | Int[Tensor, " n"]) -> list[list[Message]]:
        """Returns conversations of the validation part as they were read, in the order of `prompts("val", index)`."""
        part = self.part("val")
        assert part.records is not None
        return [part.records[number].messages for number in part.numbers[self._documents(part, index)].tolist()]

    def _conversation(self, record: Record) -> Conversation:
        place, fields = record
        messages = fields.get(self.messages_field)
        if messages is None:
            prompt, completion = fields.get(self.prompt_field), fields.get(self.completion_field)
            if prompt is None or completion is None:
                raise UsageError(
                    f"data.messages_field, data.prompt_field, data.completion_field: {place} has neither "
                    f"'{self.messages_field}' nor '{self.prompt_field}' and '{self.completion_field}'; its fields are "
                    f"{', '.join(map(str, fields))}"
                )
            messages = [*_as_messages(prompt, "user"), *_as_messages(completion, "assistant")]
        return Conversation(place, _checked(place, messages))

    # ---- tokens ----------------------------------------------------------------------------------------------------

    def encode(self, records: list[Conversation]) -> tuple[Documents, Int[Tensor, " d"]]:
        """Renders and tokenizes conversations. A prompt ends where the last turn of the assistant begins.

        Raises:
            UsageError: The template refuses a conversation, or does not say where its turns are; or of none there is
                a token of the assistant within `max_length`.
        """
        template = self._template()
        marked = "{%generation" in template.replace(" ", "").replace("{%-", "{%")
        headed = marked or self._has_header(template)
        ids, targets, prompts, marks = [], [], [], []
        shortened = dropped = 0
        for chunk in in_chunks(records, _CHUNK):
            encoded = self._marked(chunk, template) if marked else self._rendered(chunk, template, headed)
            for tokens, said, places in encoded:
                shortened += len(tokens) > self.max_length
                said = said[: self.max_length]
                dropped += not said.any()
                ids.append(np.array(tokens[: self.max_length], dtype=np.int32))
                first = np.diff(said.astype(np.int8), prepend=0) == 1
                everything = np.ones_like(said) if said.any() else said
                targets.append({"completion": said, "answer": first, "all": everything}[self.score])
                begins = np.flatnonzero(first)
                prompts.append(int(begins[-1]) if len(begins) else 0)
                marks.append(places[: self.max_length])
        self._report(len(records), shortened, dropped)
        offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
        documents = Documents(
            torch.from_numpy(np.concatenate(ids)),
            torch.from_numpy(np.concatenate(targets)),
            offsets,
            None if self.teacher_tokenizer is None else torch.from_numpy(np.concatenate(marks)),
        )
        return documents, torch.tensor(prompts)

    def _report(self, total: int, shortened: int, dropped: int) -> None:
        if dropped == total:
            raise UsageError(
                f"data.max_length: within {self.max_length} tokens none of the {total} conversations comes to what the "
                "assistant says; give more"
            )
        if shortened:
            rank_zero_info(
                f"data.max_length: of {total} conversations, {shortened} are longer than {self.max_length} tokens: "
                f"{shortened - dropped} lose their end, and {dropped} are left out, whose prompts alone are as long"
            )

    def _template(self) -> str:
        """Returns the chat template in force.

        Raises:
            UsageError: The tokenizer has several and none of them is the default.
        """
        if self.chat_template is not None:
            is_text = "{" in self.chat_template
            path = Path(self.chat_template).expanduser()
            if not is_text and not path.is_file():
                raise UsageError(
                    f"data.chat_template: {path} is neither a file nor a template; correct the path, or leave it out"
                )
            return self.chat_template if is_text else path.read_text(encoding="utf-8")
        if self.tokenizer.chat_template is not None:
            try:
                return self.tokenizer.get_chat_template()
            except ValueError as error:
                raise UsageError(
                    f"data.chat_template: {self.tokenizer_name} has several and none is its default; give one"
                ) from error
        vocabulary, end = self.tokenizer.get_vocab(), self.tokenizer.eos_token
        return CHATML.replace("{end}", end if end and "<|im_end|>" not in vocabulary else "<|im_end|>")

    def _has_header(self, template: str) -> bool:
        """Says whether the template writes a header before an answer that is still to come."""
        try:
            question = [Conversation("", [{"role": "user", "content": "x"}])]
            return self._render(question, template, header=True) != self._render(question, template)
        except UsageError:
            return True  # it wants another beginning; where it stands is said when it meets the conversations

    def _marked(self, chunk: list[Conversation], template: str) -> list[Encoded]:
        """Tokenizes conversations; the template says which tokens are the assistant's."""
        aligned = self.teacher_tokenizer is not None
        encoded = self._render(
            chunk,
            template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False, "return_offsets_mapping": aligned},
        )
        masks = [np.array(mask, dtype=bool) for mask in encoded["assistant_masks"]]
        texts = self._render(chunk, template) if aligned else [""] * len(chunk)
        return self._with_marks(encoded, masks, chunk, texts)

    def _with_marks(
        self, encoded: Any, masks: list[np.ndarray], chunk: list[Conversation], texts: list[str]
    ) -> list[Encoded]:
        """Adds marks, where a teacher has another tokenizer."""
        if self.teacher_tokenizer is None:
            return [(*both, np.empty(0, dtype=np.int64)) for both in zip(encoded["input_ids"], masks, strict=True)]
        marks = [
            turn_marks(np.array(spans, dtype=np.int64).reshape(-1, 2), said, text, _said_in(talk.messages))
            for spans, said, text, talk in zip(encoded["offset_mapping"], masks, texts, chunk, strict=True)
        ]
        return list(zip(encoded["input_ids"], masks, marks, strict=True))

    def _rendered(self, chunk: list[Conversation], template: str, headed: bool) -> list[Encoded]:
        """Tokenizes conversations; how far they reach before and after a turn says which tokens are the assistant's."""
        turns = [(place, k) for place, talk in enumerate(chunk) for k in _turns(talk.messages)]
        before = self._render([_start(chunk[place], k) for place, k in turns], template, header=True)
        after = self._render([_start(chunk[place], k + 1) for place, k in turns], template)
        texts = self._render(chunk, template)
        said = [np.zeros(len(text) + 1, dtype=np.int64) for text in texts]
        for (place, k), prefix, text in zip(turns, before, after, strict=True):
            if not (texts[place].startswith(text) and text.startswith(prefix)):
                raise UsageError(
                    f"data.chat_template: it writes the beginning of {chunk[place].place} otherwise when more follows, "
                    "so turns cannot be told apart; give a template that marks them ({% generation %})"
                )
            begin = len(prefix)
            if not headed:
                begin += max(text[begin:].find(chunk[place].messages[k].get("content") or ""), 0)
            said[place][begin : self._end(text, begin)] = 1
        upto = [np.concatenate([[0], marks.cumsum()]) for marks in said]
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        spans = [np.array(pairs, dtype=np.int64).reshape(-1, 2) for pairs in encoded["offset_mapping"]]
        masks = [count[span[:, 1]] > count[span[:, 0]] for count, span in zip(upto, spans, strict=True)]
        return self._with_marks(encoded, masks, chunk, texts)

    def _end(self, text: str, begin: int) -> int:
        """Returns where the turn at the end of a text ends: behind its special token, not the white space after it."""
        stripped = text.rstrip()
        special = tuple(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return len(stripped) if len(stripped) > begin and stripped.endswith(special) else len(text)

    def _render(self, chunk: list[Conversation], template: str, *, header: bool = False, **kwargs: Any) -> Any:
        options = {"chat_template": template, "add_generation_prompt": header, "tokenize": False} | kwargs
        try:
            return self.tokenizer.apply_chat_template([talk.messages for talk in chunk], **options)
        except Exception as error:  # a template may raise whatever it likes
            if len(chunk) > 1:
                for talk in chunk:  # find out which it was
                    self._render([talk], template, header=header, **kwargs)
                raise
            raise UsageError(
                f"data.chat_template: it refuses {chunk[0].place} ({' '.join(str(error).split())}); correct the "
                "conversation or give another template"
            ) from error


def _turns(messages: list[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _said_in(messages: list[Message]) -> list[str]:
    return [messages[number].get("content") or "" for number in _turns(messages)]


def _start(talk: Conversation, messages: int) -> Conversation:
    return Conversation(talk.place, talk.messages[:messages])


def _as_messages(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _checked(place: str, messages: Any) -> list[Message]:
    """Returns the messages up to the last of the assistant, without fields that have no value.

    Raises:
        UsageError: They are no conversation, or the assistant says nothing in it.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UsageError(
            f"data.source: the messages of {place} are no list of objects with role and content; correct it"
        )
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UsageError(f"data.source: {place} has the role '{role}'; the roles are {', '.join(ROLES)}, rename it")
        if role == "assistant" and not content and not message.get("tool_calls"):
            raise UsageError(f"data.source: an assistant turn of {place} is empty; fill it in or remove the record")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise UsageError(f"data.source: a {role} message of {place} has no text as its content; correct it")
    turns = _turns(messages)
    if not turns:
        raise UsageError(f"data.source: {place} has no assistant turn, nothing to learn from; remove the record")
    if turns[0] == 0:
        raise UsageError(
            f"data.source: {place} begins with an assistant turn, which answers nothing; put a message before it"
        )
    return messages[: turns[-1] + 1]
