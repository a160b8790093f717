"""Few-shot questions drawn from classification tasks: some tasks to learn from, others to be tested on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.loading import derived_seed
from lit_distill.llm.data.base import TokenPart
from lit_distill.llm.data.labelled import TextTask
from lit_distill.llm.data.packing import Documents
from lit_distill.llm.demonstrations import Tasks

Texts = tuple[str, str, str]


class FewShotTasks(Tasks):
    """Classification tasks as demonstrations and a question, for fine-tuning of MEND and for in-context learning.

    For each question some classes of a task are drawn, demonstrations of each class as evenly as their number allows,
    in random order, and another text of one of the classes. In training the right answer is a row; in validation and
    test every class that was drawn is one, so that the network's choice is the answer of least mean loss. No end of
    text is behind an answer: all options would share its loss, and the mean would favour long ones. A question of which
    an option is longer than `max_length` is left out.

    Questions are drawn once, by `split_seed`, so that runs with other seeds see the same ones. Parts are tasks, so
    `val_share` and `test_share` have no effect.

    Args:
        tokenizer: Folder or name of a tokenizer, as `transformers.AutoTokenizer` takes it.
        tasks: All tasks by name.
        val_tasks: Which of them are for validation; no other part sees them.
        test_tasks: Which are for testing.
        shots: Demonstrations of a question.
        ways: Classes of a question, at most.
        questions: Training questions, of all tasks that are left together.
        eval_questions: Questions of each task for validation or testing.
        kwargs: See `Tasks`.
    """

    unit = "questions"
    ends = False

    def __init__(
        self,
        tokenizer: str | Path,
        tasks: dict[str, TextTask],
        val_tasks: list[str],
        test_tasks: list[str],
        shots: int = 16,
        ways: int = 4,
        questions: int = 1000,
        eval_questions: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        check_least("data", 1, shots=shots, questions=questions, eval_questions=eval_questions)
        check_least("data", 2, ways=ways)
        if self.train_size is not None:
            raise UsageError(f"data.train_size: {self.train_size} questions are asked for by data.questions here")
        for key, names in (("val_tasks", val_tasks), ("test_tasks", test_tasks)):
            for name in names:
                if name not in tasks:
                    raise UsageError(f"data.{key}: {name} is none of the tasks; give some of {', '.join(tasks)}")
        if both := set(val_tasks) & set(test_tasks):
            raise UsageError(f"data.test_tasks: {min(both)} is among the val_tasks too; take it out of one of them")
        left = [name for name in tasks if name not in (*val_tasks, *test_tasks)]
        if not left:
            raise UsageError("data.tasks: all of them are for validation or testing; leave one to learn from")
        self.tasks = tasks
        self.shots = shots
        self.ways = ways
        self.questions = questions
        self.eval_questions = eval_questions
        self._names = {"train": left, "val": list(val_tasks), "test": list(test_tasks)}
        self._sizes: dict[str, int] = {}
        self._question: Tensor
        self._right: Tensor

    def read(self) -> list[Texts]:
        """Draws the questions of all parts, one part after another.

        Raises:
            UsageError: A source is not there, or a task has too few texts.
        """
        records: list[Texts] = []
        question: list[int] = []
        right: list[bool] = []
        asked = 0
        for part, names in self._names.items():
            before = len(records)
            for texts, answers, place in self._drawn(part, names):
                chosen = range(len(answers)) if part != "train" else [place]
                records += [self.texts(texts[:-1], texts[-1], answers[option]) for option in chosen]
                question += [asked] * len(chosen)
                right += [option == place for option in chosen]
                asked += 1
            self._sizes[part] = len(records) - before
        self._question, self._right = torch.tensor(question), torch.tensor(right)
        return records

    def _drawn(self, part: str, names: list[str]) -> Iterator[tuple[list[str], list[str], int]]:
        """Yields demonstrations and, behind them, what is asked; the options; and which of them is right."""
        random = np.random.default_rng(derived_seed("questions", part, self.split_seed))
        tasks = {name: self._by_class(name) for name in names}
        if part == "train":
            order = [names[number] for number in random.integers(len(names), size=self.questions)]
        else:
            order = [name for name in names for _ in range(self.eval_questions)]
        for name in order:
            task = tasks[name]
            words = list(task)
            count = min(self.ways, len(words))
            drawn = [words[number] for number in random.permutation(len(words))[:count]]
            place = int(random.integers(count))
            shown: list[str] = []
            for option, word in enumerate(drawn):
                own = self.shots // count + (option < self.shots % count)
                picked = random.choice(len(task[word]), own + (option == place), replace=False)
                if option == place:
                    asked, picked = task[word][picked[0]], picked[1:]
                shown += [f"{task[word][number]}\n{word}" for number in picked]
            yield [*(shown[number] for number in random.permutation(len(shown))), asked], drawn, place

    def _by_class(self, name: str) -> dict[str, list[str]]:
        key = f"data.tasks.{name}"
        texts: dict[str, list[str]] = {}
        for text, word in self.tasks[name].read(self.root, key):
            texts.setdefault(word, []).append(text)
        if len(texts) < 2:
            raise UsageError(f"{key}: there is only one class; give a task that has two or more")
        needed = -(-self.shots // min(self.ways, len(texts))) + 1
        for word, found in texts.items():
            if len(found) < needed:
                raise UsageError(
                    f"{key}: there are only {len(found)} texts of '{word}', and {self.shots} demonstrations beside a "
                    f"question take {needed}; lower data.shots, or leave the class out"
                )
        return dict(sorted(texts.items()))

    def encode(self, records: list[Texts]) -> tuple[Documents, Int[Tensor, " d"]]:
        """Tokenizes the records, and leaves out whole questions."""
        documents, splits = super().encode(records)
        kept = ~torch.isin(self._question, self._question[documents.scored() == 0])
        targets = documents.targets & kept.repeat_interleave(documents.lengths())
        return Documents(documents.ids, targets, documents.offsets), splits

    def _split(self, size: int) -> dict[str, Tensor]:
        parts = torch.arange(size).split(list(self._sizes.values()))
        return {name: index for name, index in zip(self._sizes, parts, strict=True) if len(index)}

    def options(self, part: str) -> dict[str, Tensor]:
        """Returns which question each row asks, and whether its answer is right."""
        found: TokenPart = self.part(part)
        names = list(self._sizes)
        first = sum(self._sizes[name] for name in names[: names.index(part)])
        records = first + found.numbers
        return {"questions": self._question[records], "right": self._right[records]}

    def no_part(self, name: str) -> str:
        """Returns what a user is told who asks for a part that there is not."""
        return f"data.{name}_tasks: it is empty, so there is no such part; name a task"
