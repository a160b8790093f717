"""A teacher's pass in bfloat16 against float32, and how far apart the two are.

    python benchmarks/llm_bf16.py [folder of a model]

Without a folder, models/smollm2 (see `lit_distill.llm.smollm2`). 4 rows of 128 tokens of the text of Python's `help`.
bfloat16 wins on CPUs with instructions for it; whether this one has them comes first. Last, the time to load it.
"""

from timing import compare  # isort: skip  (before torch)

import sys
import time
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import AutoTokenizer

from lit_distill.llm.losses import forward_kl
from lit_distill.llm.network import CausalLM

ROWS, LENGTH, ROUNDS, LOADS = 4, 128, 2, 3


def main() -> None:
    """Loads both, compares words, and times in turns."""
    folder = sys.argv[1] if sys.argv[1:] else "models/smollm2"
    has = [name for name, there in torch.cpu.get_capabilities().items() if "bf16" in name and there]
    print(f"instructions for bfloat16: {', '.join(has) or 'none'}")
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(topics["class"])["input_ids"][: ROWS * LENGTH])
    tokens = tokens.view(ROWS, LENGTH)
    networks = {name: CausalLM(folder, dtype=name).materialize().eval() for name in ("float32", "bfloat16")}  # type: ignore[arg-type]  # two of its names
    logits: dict[str, Tensor] = {}

    def run(name: str) -> None:
        with torch.no_grad():
            logits[name] = networks[name](tokens, score=lambda hidden, weight: hidden @ weight.T).float()

    runs = {name: (lambda name=name: run(name)) for name in networks}  # type: ignore[misc]  # a default that binds
    compare(runs, "float32", ROUNDS, 1, "pass")
    apart = forward_kl(logits["bfloat16"], logits["float32"]).mean()
    same = (logits["bfloat16"].argmax(-1) == logits["float32"].argmax(-1)).float().mean()
    print(f"KL {float(apart):.1e} nats a token, the same first choice in {float(same):.1%}")
    for _ in range(LOADS):
        start, start_cpu = time.perf_counter(), time.process_time()
        CausalLM(folder).materialize()
        print(f"loading: {time.perf_counter() - start:.2f} s, CPU {time.process_time() - start_cpu:.2f} s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
