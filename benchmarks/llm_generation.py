"""Greedy answers with the cache of keys and values, as `CausalLM.generate` always has it, against none.

    python benchmarks/llm_generation.py [folder of a model]

The network is in training and computes activations a second time, as a student with `gradient_checkpointing` is when
its rollout begins. 8 prompts of 16 tokens, 32 new ones each. Without a folder, models/smollm2 (see
`lit_distill.llm.smollm2`), or where that is missing a random network of the same shape. Both sides must write the same.
"""

from timing import compare  # isort: skip  (before torch)

import sys
from pathlib import Path

import torch
from torch import Tensor

from lit_distill.llm.network import CausalLM

PROMPTS, LENGTH, NEW = 8, 16, 32
ROUNDS, TARGET = 2, 0.25
SMOLLM2 = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True}


def network() -> CausalLM:
    """SmolLM2, or one of its shape."""
    folder = Path(sys.argv[1] if sys.argv[1:] else "models/smollm2")
    given = {"name": str(folder)} if folder.is_dir() else {"config": SMOLLM2}
    print(
        f"{given.get('name', 'a random network of the shape of SmolLM2-135M')}, {PROMPTS} x ({LENGTH} + {NEW}) tokens"
    )
    torch.manual_seed(0)
    return CausalLM(**given, gradient_checkpointing=True).materialize().train()  # type: ignore[arg-type]  # one of both


def main() -> None:
    """Compares answers, and times in turns."""
    model = network()
    prompts = torch.randint(1000, 40_000, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
    written: dict[str, Tensor] = {}

    def with_cache() -> None:
        written["with"], _ = model.generate(prompts.tolist(), max_new_tokens=NEW, greedy=True, eos=[])

    @torch.no_grad()
    def without() -> None:
        model.eval()
        tokens = prompts
        for _ in range(NEW):
            last = model(tokens)[tokens.shape[1] - 1 :: tokens.shape[1]]  # (B, H): only these meet the head
            logits = last @ model.network.get_output_embeddings().weight.T
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        written["without"] = tokens[:, LENGTH:]
        model.train()

    compare({"with": with_cache, "without": without}, "without", ROUNDS, 0, "batch", **{"with": TARGET})
    same = (written["with"] == written["without"]).float().mean()
    print(f"{float(same):.1%} of the tokens are the same")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
