"""Memory of FSDP2 on two CPU processes against the formula of `lit_distill.core.memory`.

A teacher and a student (Llamas drawn anew) are sharded as methods shard them, and take two steps of AdamW on the KL
divergence. Counted are bytes of storage: of each process's shards of parameters, gradients and optimizer states, and of
what is whole after a step. Beside them stands how far the memory of the process rose in the steps (on Linux alone).
"""

import argparse
import ctypes
import os
from functools import partial
from pathlib import Path

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from lit_distill.core.memory import footprint, transformer_activations
from lit_distill.core.networks import freeze
from lit_distill.core.strategies import shard

MIB = 2**20
PAIRS = {  # width, layers, tokens of the vocabulary: of the teacher and of the student
    "wide": ((768, 8, 8000), (384, 6, 8000)),
    "many tokens": ((512, 4, 32000), (256, 4, 32000)),
}
ROWS, TOKENS = 2, 32


def build(width: int, layers: int, vocabulary: int) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=vocabulary, tie_word_embeddings=False))


def storage(tensors) -> int:
    """Bytes of what tensors stand on, each once; of sharded ones what this process has."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in local if each.numel()}
    return sum(held.values())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def steps(teacher: nn.Module, student: nn.Module, vocabulary: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        ids = torch.randint(vocabulary, (ROWS, TOKENS))
        with torch.no_grad():
            wanted = teacher(ids).logits.log_softmax(-1)
        said = student(ids).logits.log_softmax(-1)
        F.kl_div(said, wanted, log_target=True, reduction="sum").div(ids.numel()).backward()
        optimizer.step()
    return optimizer


def process(rank: int, devices: int, pair: str, results) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", RANK=str(rank), WORLD_SIZE=str(devices))
    distributed.init_process_group("gloo", rank=rank, world_size=devices)
    mesh = init_device_mesh("cpu", (devices,), mesh_dim_names=("data_parallel",))

    def sharded(sizes) -> nn.Module:
        network = build(*sizes)
        shard(network, mesh)
        return network

    steps(freeze(sharded((64, 1, 100))), sharded((64, 1, 100)), 100)  # loads and makes what every step needs
    teacher, student = (sharded(sizes) for sizes in PAIRS[pair])
    freeze(teacher)
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what building left behind
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident()
    optimizer = steps(teacher, student, PAIRS[pair][0][2])
    risen = peak() - before
    kept = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    weights = list(student.parameters())
    counted = {
        "student, parameters": storage(weights),
        "student, gradients": storage(weight.grad for weight in weights),
        "student, optimizer": storage(kept),
    }
    # What is registered, shards or the whole, is what is used; the shards are kept beside the whole.
    counted["teacher, whole after a step"] = storage(w for w in teacher.parameters() if not isinstance(w, DTensor))
    teacher.reshard()
    counted["teacher, parameters"] = storage(teacher.parameters())
    counted["process, risen in the steps"] = risen
    results.put((rank, counted))
    distributed.barrier()
    distributed.destroy_process_group()


def expected(pair: str, devices: int) -> dict[str, int]:
    with torch.device("meta"):
        teacher, student = (build(*sizes) for sizes in PAIRS[pair])
    at_rest, trained = footprint(teacher, devices, trained=False), footprint(student, devices)
    root = 4 * 2 * PAIRS[pair][0][2] * PAIRS[pair][0][0] + 4 * PAIRS[pair][0][0]
    width, layers, vocabulary = PAIRS[pair][1]
    logits = 4 * 4 * ROWS * TOKENS * vocabulary  # of both, their logarithms, and gradients
    activations = transformer_activations(ROWS, TOKENS, width, layers, itemsize=4)
    return {
        "student, parameters": trained.parameters,
        "student, gradients": trained.gradients,
        "student, optimizer": trained.optimizer,
        "teacher, whole after a step": root,
        "teacher, parameters": at_rest.parameters,
        "process, risen in the steps": trained.total - trained.parameters + root + logits + activations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=2)
    devices = parser.parse_args().devices
    os.environ["MALLOC_MMAP_THRESHOLD_"] = (
        "65536"  # glibc shall give back at once what is freed, or the peak is of holes
    )
    for pair in PAIRS:
        context = mp.get_context("spawn")
        results = context.Queue()
        runs = [context.Process(target=partial(process, rank, devices, pair, results)) for rank in range(devices)]
        for run in runs:
            run.start()
        found = dict(results.get(timeout=600) for _ in runs)
        for run in runs:
            run.join()
        ranks = sorted(found)
        print(f"\n{pair}: {devices} processes, MiB of each")
        print(f"{'':30}{'formula':>10}" + "".join(f"{f'rank {rank}':>10}" for rank in ranks))
        for name, value in expected(pair, devices).items():
            print(f"{name:30}{value / MIB:10.2f}" + "".join(f"{found[rank][name] / MIB:10.2f}" for rank in ranks))


if __name__ == "__main__":
    main()
