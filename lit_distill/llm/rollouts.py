"""Completions that are generated anew while a student learns: from the student, the teacher, or both."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lit_distill.core.cache import weights_fingerprint
from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.strategies import distributed_rank, gathered
from lit_distill.llm.batch import TokenBatch

if TYPE_CHECKING:
    from lit_distill.llm.distillation import TokenDistiller


class Rollout(ABC):
    """Replaces the completions of a batch, or leaves it as it is.

    Sharded networks write together: every process calls `generate` as often as the others.
    """

    def attach(self, module: "TokenDistiller") -> None:  # noqa: B027 (most need nothing)
        """Takes what it needs from the networks; called once, while their weights are whole."""

    @abstractmethod
    def __call__(self, batch: TokenBatch, module: "TokenDistiller") -> TokenBatch:
        """Returns the batch to learn from. Gradients do not pass through sampling."""

    def on_validation(self, loss: float) -> None:  # noqa: B027 (most do not ask)
        """Learns the student's validation loss, `val/ce`."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint has to keep, of all processes. Called by each of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (most remember nothing)
        """Takes it back."""


class OnPolicy(Rollout):
    """With some probability, the student writes the completions itself.

    Rows must hold one document each: what stands before the first scored token is the prompt. A step's decision is the
    same for all processes.

    Args:
        share: Probability that a batch is replaced.
        max_new_tokens: Longest completion.
        temperature: Of sampling; the loss does not know it.

    Reference: Agarwal et al., On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes, 2023,
    arXiv 2306.13649.
    """

    def __init__(self, share: float = 0.5, max_new_tokens: int = 128, temperature: float = 0.9) -> None:
        if not 0 < share <= 1:
            raise UsageError(f"rollout.share is {share}; give a probability above 0, at most 1")
        if temperature <= 0:
            raise UsageError(f"rollout.temperature is {temperature}; it must be above 0")
        check_least("rollout", 1, max_new_tokens=max_new_tokens)
        self.share = share
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    def __call__(self, batch: TokenBatch, module: "TokenDistiller") -> TokenBatch:
        """Draws whether the student writes, and lets it."""
        generator = torch.Generator().manual_seed(module.step_seed("rollout"))
        if torch.rand((), generator=generator) >= self.share:
            return batch
        tokens, mask = module.student.generate(
            prompts_of(batch), max_new_tokens=self.max_new_tokens, temperature=self.temperature
        )
        return with_completions(batch, tokens, mask, module)


class AdaptiveReplay(Rollout):
    r"""The student writes the more often, the less validation improves; what it wrote is learned from again.

    With probability phi the batch holds the student's text, new or from a buffer; new with phi (1 - progress), or where
    the buffer is not full yet. phi begins at 0 and grows by 0.1 whenever the validation loss is at least `tolerance`
    above the last one that made it grow.

    Args:
        buffer: Rows that are kept.
        tolerance: How much worse validation has to be.
        max_new_tokens: Longest completion.
        temperature: Of sampling.

    Reference: Ko, Kim, Chen, Yun, DistiLLM, 2024, arXiv 2402.03898 (public code).
    """

    def __init__(
        self, buffer: int = 1000, tolerance: float = 0.1, max_new_tokens: int = 128, temperature: float = 1.0
    ) -> None:
        check_least("rollout", 1, buffer=buffer, max_new_tokens=max_new_tokens)
        check_least("rollout", 0, tolerance=tolerance)
        if temperature <= 0:
            raise UsageError(f"rollout.temperature is {temperature}; it must be above 0")
        self.buffer = buffer
        self.tolerance = tolerance
        self.writer = OnPolicy(share=1.0, max_new_tokens=max_new_tokens, temperature=temperature)
        self.phi = 0.0
        self.last_loss: float | None = None
        self.kept: list[tuple[list[int], list[int], int]] = []  # prompt, completion, row

    def __call__(self, batch: TokenBatch, module: "TokenDistiller") -> TokenBatch:
        """Draws what the batch is to hold."""
        generator = torch.Generator().manual_seed(module.step_seed("replay"))
        draw = float(torch.rand((), generator=generator))
        if draw >= self.phi:
            return batch
        progress = module.trainer.global_step / max(module.trainer.estimated_stepping_batches, 1)
        if draw < self.phi * (1 - progress) or len(self.kept) < self.buffer:
            fresh = self.writer(batch, module)
            self.kept = [*self.kept, *_rows(fresh)][-self.buffer :]
            return fresh
        chosen = torch.randint(len(self.kept), (len(batch),), generator=generator).tolist()
        return _from_rows([self.kept[place] for place in chosen], batch, module)

    def on_validation(self, loss: float) -> None:
        """Lets phi grow where the loss has."""
        if self.last_loss is None:
            self.last_loss = loss
        elif loss >= self.last_loss + self.tolerance:
            self.phi = min(1.0, self.phi + 0.1)
            self.last_loss = loss

    def state_dict(self) -> dict[str, Any]:
        """Returns phi, the loss that it was last moved by, and the buffer of each process."""
        return {"phi": self.phi, "last_loss": self.last_loss, "kept": gathered(self.kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes them back. Another number of processes than before deals the rows out anew."""
        self.phi, self.last_loss, kept = state["phi"], state["last_loss"], state["kept"]
        rank, world_size = distributed_rank()
        if len(kept) != world_size:
            rows = [row for buffer in kept for row in buffer]
            size = min(len(rows) // world_size, self.buffer)  # the same everywhere: how full it is decides what is done
            kept = [rows[start * size : (start + 1) * size] for start in range(world_size)]
        self.kept = kept[rank]


class TeacherWritten(Rollout):
    """The teacher writes to each prompt, once; from then on that is what the student learns from.

    What was written is appended to a file, one line a row, so that a killed run pays for nothing twice. The file begins
    with what it was written by; it is refused for another teacher, other data or other settings. Several processes tell
    each other what they wrote, and the first one keeps it: the file must be one that all of them see.

    Args:
        max_new_tokens: Longest completion.
        temperature: Of sampling; None takes the likeliest token each time.
        file: Where the completions are kept; None keeps them for this process only.

    Reference: Kim, Rush, Sequence-Level Knowledge Distillation, 2016, arXiv 1606.07947 (with beam search).
    """

    def __init__(self, max_new_tokens: int = 128, temperature: float | None = None, file: str | None = None) -> None:
        if temperature is not None and temperature <= 0:
            raise UsageError(f"rollout.temperature is {temperature}; it must be above 0, or null for the likeliest")
        check_least("rollout", 1, max_new_tokens=max_new_tokens)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.file = None if file is None else Path(file)
        self._written: dict[int, list[int]] | None = None

    def attach(self, module: "TokenDistiller") -> None:
        """Takes the teacher's fingerprint."""
        assert module.teacher is not None
        self._teacher = weights_fingerprint(module.teacher) if self.file is not None else None

    def __call__(self, batch: TokenBatch, module: "TokenDistiller") -> TokenBatch:
        """Lets the teacher write what it has not written yet."""
        written = self._open(module)
        index = batch.index.tolist()
        # All know the same rows, so all ask until none is missing anywhere, and from then on nobody does.
        if len(written) < module._data().part_size("train"):
            self._write([place for place, row in enumerate(index) if row not in written], batch, module)
        rows = [torch.tensor(written[row]) for row in index]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(batch.input_ids.device)
        lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return with_completions(batch, tokens, mask, module)

    def _write(self, missing: list[int], batch: TokenBatch, module: "TokenDistiller") -> None:
        """Lets the teacher write to some rows of the batch; all processes call it."""
        assert module.teacher is not None
        if not any(gathered(bool(missing))):
            return
        prompts = prompts_of(batch)
        asked = missing
        if not missing and isinstance(module.teacher, FSDPModule):
            asked = [0]  # its layers run in all processes at once; what it writes here is not kept
        new: dict[int, list[int]] = {}
        if asked:
            tokens, mask = module.teacher.generate(
                [prompts[place] for place in asked],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature or 1.0,
                greedy=self.temperature is None,
            )
            index = batch.index[missing].tolist()
            new = {row: text[use].tolist() for row, text, use in zip(index, tokens, mask, strict=False)}
        for found in gathered(new):
            self._append(found, module)

    def _open(self, module: "TokenDistiller") -> dict[int, list[int]]:
        if self._written is None:
            self._written = {}
            if self.file is not None:
                self._stamp = {
                    **module._data().fingerprint(),
                    "teacher": self._teacher,
                    "max_new_tokens": self.max_new_tokens,
                    "temperature": self.temperature,
                }
                if self.file.is_file():
                    self._written = read_completions(self.file, self._stamp)
        return self._written

    def _append(self, new: dict[int, list[int]], module: "TokenDistiller") -> None:
        assert self._written is not None
        self._written |= new
        if self.file is None or not new or not module.trainer.is_global_zero:
            return
        fresh = not self.file.is_file()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            if fresh:
                file.write(json.dumps({"made_by": self._stamp}))
            # Each row begins its line, so that what follows a torn one is not lost with it.
            file.writelines("\n" + json.dumps([row, tokens]) for row, tokens in new.items())


def read_completions(path: Path, stamp: Mapping[str, Any]) -> dict[int, list[int]]:
    """Reads completions by row; a last line that a killed run left unfinished is dropped.

    Raises:
        UsageError: They were written by another teacher, to other data, or with other settings.
    """
    first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    try:
        found = json.loads(first)["made_by"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"rollout.file: {path} holds no completions; name another file") from error
    for key, value in json.loads(json.dumps(dict(stamp))).items():
        if found.get(key) != value:
            raise UsageError(
                f"rollout.file: {path} was written with another {key} ({found.get(key)}, now {value}); name another "
                "file, and it is written anew"
            )
    written: dict[int, list[int]] = {}
    for line in lines:
        try:
            row, tokens = json.loads(line)
        except ValueError:
            continue
        written[row] = tokens
    return written


def prompts_of(batch: TokenBatch) -> list[list[int]]:
    """Returns what stands in each row before its first scored token.

    Waits for the device, as writing does with every token.

    Raises:
        UsageError: A row holds several documents.
    """
    length = batch.input_ids.shape[1]
    rows, columns = batch.scored // length, batch.scored % length
    first = torch.full((len(batch),), length, dtype=columns.dtype, device=columns.device)
    last = torch.full_like(first, -1)
    first = first.scatter_reduce(0, rows, columns, "amin")
    last = last.scatter_reduce(0, rows, columns, "amax")
    starts = (batch.position_ids == 0).long()
    columns_of_starts = torch.arange(length, device=starts.device) * starts
    if ((columns_of_starts > 0) & (torch.arange(length, device=starts.device) <= last[:, None])).any():
        raise UsageError("data.packing: rows with several documents have no one prompt; give data.packing none")
    ends = (first + 1).clamp(max=length).tolist()
    return [row[:end] for row, end in zip(batch.input_ids.tolist(), ends, strict=True)]


def with_completions(
    batch: TokenBatch, tokens: Int[Tensor, "b m"], mask: Bool[Tensor, "b m"], module: "TokenDistiller"
) -> TokenBatch:
    """Makes a batch of the prompts and new completions, whose tokens are scored.

    Args:
        batch: Where the prompts are taken from.
        tokens: (B, M) completions.
        mask: (B, M) which of them count: up to and with the first end of text.
        module: Says how many processes and accumulated batches a step has.
    """
    completions = [row[use].tolist() for row, use in zip(tokens, mask, strict=True)]
    rows = list(zip(prompts_of(batch), completions, batch.index.tolist(), strict=True))
    return _from_rows(rows, batch, module)


def _from_rows(rows: list[tuple[list[int], list[int], int]], batch: TokenBatch, module: "TokenDistiller") -> TokenBatch:
    """Makes a batch of (prompt, completion, row number)."""
    device = batch.input_ids.device
    length = max(len(prompt) + len(completion) for prompt, completion, _ in rows)
    input_ids = torch.zeros((len(rows), length), dtype=torch.long)
    scored: list[int] = []
    targets: list[int] = []
    for number, (prompt, completion, _) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[number, :end] = torch.tensor(prompt + completion)
        scored += range(number * length + len(prompt) - 1, number * length + end - 1)
        targets += completion
    # What other accumulated batches will hold is not known yet: each counts as much as this one.
    count = torch.tensor(len(targets), device=device)
    total = int(module.trainer.strategy.reduce(count, reduce_op="sum")) * module.trainer.accumulate_grad_batches
    return TokenBatch(
        input_ids,
        torch.arange(length).expand(len(rows), -1),
        torch.tensor(scored, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.tensor([row for _, _, row in rows]),
        total,
    ).to(device)


def _rows(batch: TokenBatch) -> list[tuple[list[int], list[int], int]]:
    """Takes a batch of prompts and completions apart."""
    prompts = prompts_of(batch)
    counts = torch.bincount(batch.scored // batch.input_ids.shape[1], minlength=len(batch)).tolist()
    completions = [part.tolist() for part in batch.targets.split(counts)]
    return list(zip(prompts, completions, batch.index.tolist(), strict=True))
