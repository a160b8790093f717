"""A whole training step against TRL's trainers, on the same networks and the same batch.

    python benchmarks/llm_trl.py [rows]

TRL 1.16: `pip install --no-deps trl==1.16.0`, beside transformers, accelerate and datasets. Without it there is nothing
to compare with, and the script says so.

Student and teacher are Llamas with 49,152 tokens, of 4 layers of 192 and 8 of 576; a step is 4 rows of 256 random
tokens (or `rows` of them), the symmetric Jensen-Shannon divergence, AdamW in float32. TRL's trainers run as they are,
but for what differs between libraries and not between steps: the same AdamW, no clipping, no recomputed activations.
Their batch is given, so nothing is generated or tokenized. The losses of the first step must agree.

Times are of steps in turns. "MB" is the peak of a step in tensors beyond what lies there before it, which is weights
and state of the optimizer ("at rest").
"""

import os

os.environ["KINETO_LOG_LEVEL"] = "9"  # before torch, or the profiler reports each start

from timing import Pause, Side, Turns, compare  # isort: skip  (before torch)

import logging
import sys
import tempfile
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from llm_cache import LENGTH, RandomTokens, side
from memory import Recorded
from torch.utils.data import DataLoader

from lit_distill.llm.batch import TokenBatch
from lit_distill.llm.distillation import adamw
from lit_distill.llm.methods.gkd import JSD
from lit_distill.llm.network import CausalLM

VOCABULARY = 49_152
ROWS = next((int(x) for x in sys.argv[1:]), 4)
ROUNDS, WARMUP = 2, 1
RATE = 1e-4


def network(width: int, layers: int) -> CausalLM:
    """A network from scratch, the same each time."""
    torch.manual_seed(width)
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 192, "tie_word_embeddings": True}
    sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": layers, **heads}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    return CausalLM(config={"model_type": "llama", **sizes}).materialize()


def student() -> CausalLM:
    """The one that learns."""
    return network(192, 4)


def teacher() -> CausalLM:
    """The one that is learned from."""
    return network(576, 8)


class OneBatch(RandomTokens):
    """The same rows in every step."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY)
        input_ids, position_ids, scored, targets = self.rows.gather(torch.arange(ROWS), self.padding)
        self.batch = TokenBatch(input_ids, position_ids, scored, targets, torch.arange(ROWS), len(targets))

    def train_dataloader(self) -> Any:
        """Many times the one batch."""
        return DataLoader([self.batch] * 1000, batch_size=None)


# ---- TRL -----------------------------------------------------------------------------------------------------------


def tokenizer() -> Any:
    """One that is there because a trainer asks for it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", eos_token="b", unk_token="a")


def arguments(folder: str) -> dict[str, Any]:
    """What both of TRL's trainers are told."""
    same = {"optim": "adamw_torch", "learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": 0.01}
    quiet = {"report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    plain = {"max_grad_norm": 0.0, "gradient_checkpointing": False, "bf16": False, "use_cpu": True}
    return {
        "output_dir": folder,
        "per_device_train_batch_size": ROWS,
        "max_steps": 1000,
        "beta": 0.5,
        **same,
        **quiet,
        **plain,
    }


def halting(pause: Pause) -> list[Any]:
    """Callbacks that halt a trainer after every step."""
    from transformers import TrainerCallback

    class Halt(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            pause()

    return [Halt()]


def distillation(folder: str, losses: list[float]) -> Side:
    """TRL's `DistillationTrainer`, which never has all logits."""

    def run(pause: Pause) -> None:
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        ids = OneBatch().rows.gather(torch.arange(ROWS), 0)[0]
        prompt, completion = ids[:, :1], ids[:, 1:]
        batch = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": completion,
            "completion_mask": torch.ones_like(completion),
            "num_items_in_batch": torch.tensor(float(completion.numel())),
        }

        class Given(DistillationTrainer):
            def _prepare_inputs(self, _: Any) -> dict[str, Any]:
                return batch

            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                loss = super().compute_loss(*args, **kwargs)
                losses.append(float(loss))
                return loss

        Given(
            student().network,
            teacher().network,
            DistillationConfig(**arguments(folder)),
            Dataset.from_dict({"prompt": ["a"] * 100}),
            processing_class=tokenizer(),
            callbacks=halting(pause),
        ).train()

    return run


def gkd(folder: str, losses: list[float]) -> Side:
    """TRL's `GKDTrainer` on the data as they are."""

    def run(pause: Pause) -> None:
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        ids = OneBatch().rows.gather(torch.arange(ROWS), 0)[0]
        labels = ids.clone()
        labels[:, 0] = -100
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

        class Given(GKDTrainer):
            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                loss = super().compute_loss(*args, **kwargs)
                losses.append(float(loss))
                return loss

        Given(
            student().network,
            teacher().network,
            GKDConfig(lmbda=0.0, **arguments(folder)),
            data_collator=lambda _: dict(batch),
            train_dataset=Dataset.from_dict({"messages": ["a"] * 100}),
            processing_class=tokenizer(),
            callbacks=halting(pause),
        ).train()

    return run


# ---- measuring -----------------------------------------------------------------------------------------------------


def ours(folder: str, losses: list[float]) -> Side:
    """Our method."""

    class Recording(JSD):
        def training_step(self, *args: Any) -> torch.Tensor:
            loss = super().training_step(*args)
            losses.append(float(loss.detach()))
            return loss

    return side(lambda: Recording(student(), teacher(), optimizer=lambda p: adamw(p)), folder, OneBatch)


def at_rest() -> float:
    """MB of what lies there between steps: weights of both, and two means for each of the student's."""
    own, other = (sum(x.numel() for x in made.parameters()) for made in (student(), teacher()))
    return 4 * (3 * own + other) / 1e6


def main() -> None:
    """Checks that the losses are the same, and prints times and memory."""
    if find_spec("trl") is None:
        print("trl is not installed, so there is nothing to compare with; pip install --no-deps trl==1.16.0")
        return
    makers = {"ours": ours, "TRL distillation": distillation, "TRL GKD": gkd}
    with tempfile.TemporaryDirectory() as folder:
        losses: dict[str, list[float]] = {name: [] for name in makers}
        memory = {name: Recorded() for name in makers}
        turns = {name: Turns(memory[name].around(make(folder, losses[name]))) for name, make in makers.items()}
        for turn in turns.values():
            turn.take()
        first = {name: values[0] for name, values in losses.items()}
        print("loss of the first step: " + ", ".join(f"{name} {value:.6f}" for name, value in first.items()))
        if max(first.values()) - min(first.values()) > 1e-4 * first["ours"]:
            raise AssertionError("the sides do not compute the same")
        runs = {name: turn.take for name, turn in turns.items()}
        compare(runs, "TRL distillation", ROUNDS, WARMUP, "step", ours=1.0)
        for name, turn in turns.items():
            memory[name].wanted = True
            turn.take()
            turn.take()
        rest, own = at_rest(), memory["ours"].peak / 1e6
        print(f"{'':<18} {'MB of a step':>12} {'with at rest':>12} {'ours to it':>11} {'with at rest':>12}")
        for name, recorded in memory.items():
            size = recorded.peak / 1e6
            ratios = own / size, (own + rest) / (size + rest)
            print(f"{name:<18} {size:>12.0f} {size + rest:>12.0f} {ratios[0]:>11.3f} {ratios[1]:>12.3f}")
        for turn in turns.values():
            turn.finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    main()
