"""A training step with a teacher whose hidden states are kept, against plain fine-tuning of the same student.

    python benchmarks/llm_cache.py

Student and teacher have 4 layers of 192 and 5,000 tokens; a step is 4 rows of 256 random tokens. What the cache adds is
the look-up, the teacher's logits from its kept hidden states, and the divergence. "online" runs the teacher instead.
Before that, caches of few and of many rows are written: the peak of tensors in this must not grow with the rows.
"""

import os

os.environ["KINETO_LOG_LEVEL"] = "9"  # before torch, or the profiler reports each start

from timing import Pause, Side, in_turns  # isort: skip  (before torch)

import logging
import tempfile
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from memory import peak_bytes, recorder

from lit_distill.core.loading import EpochPermutation
from lit_distill.llm.cached import CachedTeacher
from lit_distill.llm.data.base import TokenLoader
from lit_distill.llm.data.packing import Documents, TokenRows
from lit_distill.llm.distillation import TokenDistiller
from lit_distill.llm.methods.kl import ForwardKL
from lit_distill.llm.methods.supervised import SupervisedFineTuning
from lit_distill.llm.network import CausalLM

VOCABULARY, WIDTH, LAYERS = 5_000, 192, 4
ROWS, LENGTH, BATCH = 64, 257, 4  # 256 tokens of a row are scored
WRITTEN = (32, 256)  # rows of the caches whose writing is measured
ROUNDS, WARMUP, TARGET = 8, 1, 1.15


class RandomTokens(LightningDataModule):
    """Rows of random tokens."""

    max_length, vocabulary, padding = LENGTH, None, 0

    def __init__(self, vocab_size: int = VOCABULARY, rows: int = ROWS) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        ids = torch.randint(vocab_size, (rows * LENGTH,), generator=torch.Generator().manual_seed(0)).int()
        documents = Documents(ids, torch.ones(len(ids), dtype=torch.bool), torch.arange(rows + 1) * LENGTH)
        self.rows = TokenRows(documents, torch.ones(rows, dtype=torch.long))

    def part(self, name: str) -> Any:
        """The rows."""
        return SimpleNamespace(rows=self.rows)

    def has_part(self, name: str) -> bool:
        """There are training rows only."""
        return name == "train"

    def fingerprint(self, part: str) -> dict[str, Any]:
        """They are always the same."""
        return {"data": "random tokens", "samples": len(self.rows)}

    def train_dataloader(self) -> TokenLoader:
        """Shuffled."""
        return TokenLoader(self.rows, EpochPermutation(len(self.rows)), BATCH, padding=0, drop_last=True)


def network(seed: int) -> CausalLM:
    """A network from scratch."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 3}
    heads = {"num_key_value_heads": 3, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    return CausalLM(config={"model_type": "llama", **sizes, **heads}).materialize()


def trainer(folder: str, **options: Any) -> Trainer:
    """One that does nothing but train."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        default_root_dir=folder,
        **options,
    )


def side(make: Callable[[], TokenDistiller], folder: str, data: type[RandomTokens] = RandomTokens) -> Side:
    """A training that halts after every step."""

    def run(pause: Pause) -> None:
        module = make()
        module.on_train_batch_end = _halting(module.on_train_batch_end, pause)  # type: ignore[method-assign]
        trainer(folder, max_steps=10**6).fit(module, data())

    return run


def _halting(end: Callable[..., None], pause: Pause) -> Callable[..., None]:
    def halt(*args: Any) -> None:
        end(*args)
        pause()

    return halt


class Measured(CachedTeacher):
    """Takes the peak of tensors in writing."""

    def fill(self, *given: Any) -> None:
        """Writes."""
        with recorder() as recorded:
            super().fill(*given)
        self.peak = peak_bytes(recorded) / 1e6


def report_writing(rows: int) -> None:
    """Prints the memory of writing a cache of so many rows."""
    with tempfile.TemporaryDirectory() as folder:
        source = Measured(f"{folder}/kept")
        module = ForwardKL(network(0), network(1), source=source)
        trainer(folder, max_steps=1).fit(module, RandomTokens(rows=rows))
        size = sum(file.stat().st_size for file in source.opened("train").folder.iterdir()) / 1e6
        print(f"writing {rows} rows, {size:.0f} MB on disk: peak of tensors {source.peak:.1f} MB", flush=True)


def main() -> None:
    """Makes the caches, prints bytes and times."""
    for rows in WRITTEN:
        report_writing(rows)
    with tempfile.TemporaryDirectory() as folder:
        source = CachedTeacher(f"{folder}/kept")
        sides = {
            "fine-tuning": side(lambda: SupervisedFineTuning(network(0)), folder),
            "cached": side(lambda: ForwardKL(network(0), network(1), source=source), folder),
            "online": side(lambda: ForwardKL(network(0), network(1)), folder),
        }
        in_turns(sides, "fine-tuning", ROUNDS, WARMUP, "step", cached=TARGET)
        print(f"{source.opened('train').bytes_per_token} bytes per token; 2 H is {2 * WIDTH}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    main()
