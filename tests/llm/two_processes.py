"""Methods as a run under some strategy has them: in the test's own process, or as a script in each of two."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback
from tiny_language import language_model, sgd, trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lit_distill.core.errors import UsageError
from lit_distill.core.strategies import FSDP2Strategy, full_state, gathered, shard
from lit_distill.llm.cached import CachedTeacher
from lit_distill.llm.data import TextDataModule
from lit_distill.llm.demonstrations import TaskDemonstrations
from lit_distill.llm.methods.first import FIRST
from lit_distill.llm.methods.hidden import MiniLM, TinyBERT
from lit_distill.llm.methods.kl import ForwardKL, ReverseKL
from lit_distill.llm.methods.mend import MEND
from lit_distill.llm.methods.minillm import MiniLLM
from lit_distill.llm.methods.speculative import SpeculativeKD
from lit_distill.llm.methods.supervised import SequenceKD
from lit_distill.llm.methods.taid import TAID
from lit_distill.llm.methods.uld import GOLD, ULD
from lit_distill.llm.mixed import TeacherMixed
from lit_distill.llm.network import CausalLM
from lit_distill.llm.rollouts import OnPolicy, TeacherWritten
from lit_distill.llm.speculative import SpeculativeRollout

STEPS = 3
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
ALMOST_GREEDY = 1e-4  # a temperature: each process draws for itself, and all draw the likeliest


def student(**options):
    return language_model(0, vocab_size=120, **options)


def teacher():
    return language_model(1, vocab_size=120, hidden_size=24, num_attention_heads=3)


def adapted(folder):
    torch.manual_seed(0)
    lora = {**LORA, "init_lora_weights": False}
    return CausalLM(f"{folder}/base", lora=lora, gradient_checkpointing=True)


def minillm(folder):
    """Writes greedily: at its temperature of 1 each process would draw something else."""
    corpus = TextDataModule(f"{folder}/tokenizer", source=f"{folder}/texts.jsonl", max_length=40, batch_size=4)
    module = MiniLLM(
        student(), teacher(), rollout=TeacherMixed(0.0, max_new_tokens=6), ppo_epochs=2, corpus=corpus, optimizer=sgd
    )
    module.student.generate = partial(module.student.generate, greedy=True)
    return module


def shortened(folder):
    """What the teacher wrote before, without its last row: then one process lacks a row that the other need not."""
    file = Path(folder) / "shortened.jsonl"
    if not dist.is_initialized() or dist.get_rank() == 0:
        file.write_text((Path(folder) / "written.jsonl").read_text().rpartition("\n")[0])
    if dist.is_initialized():
        dist.barrier()
    return str(file)


class Calibrated(FIRST):
    """Keeps what the search of c saw."""

    def find_c(self):
        found = super().find_c()
        self.moving = found[2]
        return found


# By name: what builds the module, options of the data, options of the trainer.
CASES = {
    "online": (
        lambda folder: ForwardKL(student(), teacher(), label_weight=0.5, optimizer=sgd),
        {"packing": "ffd"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ),
    "adapters": (lambda folder: ReverseKL(adapted(folder), teacher(), optimizer=sgd), {}, {}),
    "cached": (
        lambda folder: ForwardKL(
            student(), teacher(), source=CachedTeacher(f"{folder}/kept", dtype="float32", batch_size=3), optimizer=sgd
        ),
        {},
        {},
    ),
    "on_policy": (
        lambda folder: ReverseKL(
            student(), teacher(), rollout=OnPolicy(1.0, max_new_tokens=6, temperature=ALMOST_GREEDY), optimizer=sgd
        ),
        {},
        {},
    ),
    "teacher_written": (
        lambda folder: SequenceKD(
            student(), teacher(), rollout=TeacherWritten(6, file=f"{folder}/written.jsonl"), optimizer=sgd
        ),
        {},
        {},
    ),
    "teacher_goes_on": (
        lambda folder: SequenceKD(
            student(), teacher(), rollout=TeacherWritten(6, file=shortened(folder)), optimizer=sgd
        ),
        {},
        {},
    ),
    "taid": (
        lambda folder: TAID(student(), teacher(), t_start=0.1, t_end=0.9, alpha=0.9, beta=0.5, optimizer=sgd),
        {},
        {"accumulate_grad_batches": 2},
    ),
    "first": (lambda folder: Calibrated(student(), teacher(), optimizer=sgd), {"eval_batch_size": 3}, {}),
    "tinybert": (lambda folder: TinyBERT(student(), teacher(), attention=False, optimizer=sgd), {}, {}),
    "minilm": (lambda folder: MiniLM(student(), teacher(), relation_heads=2, optimizer=sgd), {}, {}),
    "mend": (
        lambda folder: MEND(student(), teacher(), vectors=3, phase="finetune", optimizer=sgd),
        {},
        {},
    ),
    "minillm": (minillm, {}, {"max_steps": 2 * STEPS}),
    "uld": (lambda folder: ULD(student(), teacher(), optimizer=sgd), {"teacher_tokenizer": "{folder}/other"}, {}),
    "gold": (
        lambda folder: GOLD(student(), teacher(), label_weight=0.5, optimizer=sgd),
        {"teacher_tokenizer": "{folder}/other", "packing": "ffd"},
        {},
    ),
    "speculative": (  # needs whole weights
        lambda folder: SpeculativeKD(
            student(), teacher(), rollout=SpeculativeRollout(k=1, draft=3, max_new_tokens=6), optimizer=sgd
        ),
        {},
        {"strategy": "ddp"},
    ),
}

# What some of them leave on the disk.
KEPT = {
    "cached": "kept/train/manifest.json",
    "teacher_written": "written.jsonl",
    "teacher_goes_on": "shortened.jsonl",
}


class Watch(Callback):
    """Keeps the loss of each batch, over all processes, and what a method moves beside the weights."""

    def __init__(self):
        self.found = {"loss": [], "moved": []}

    def on_train_batch_end(self, trainer, module, *rest):
        loss = sum(value.detach() for value in module.terms.values())
        self.found["loss"].append(float(trainer.strategy.reduce(loss, reduce_op="mean")))
        moving = (getattr(module, name, None) for name in ("t", "last_loss", "moving"))
        self.found["moved"] += [float(value) for value in moving if value is not None]


def fit(name, folder, **options):
    """Fits a case, and returns losses and the student's weights; these in the first process only."""
    build, data, own = CASES[name]
    if options and "strategy" not in own:
        options["strategy"] = FSDP2Strategy()
    source = f"{folder}/{'tasks' if name == 'mend' else 'texts'}.jsonl"
    kind = TaskDemonstrations if name == "mend" else TextDataModule
    given = {"given": 3, "packing": "none"} if kind is TextDataModule else {}
    data = {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in data.items()}
    data = kind(f"{folder}/tokenizer", source=source, max_length=40, batch_size=4, **(given | data))
    watch = Watch()
    module = build(folder)
    runner = trainer(folder, callbacks=[watch], **({"max_steps": STEPS} | own | options))
    runner.fit(module, data)
    if isinstance(options.get("strategy"), FSDP2Strategy):
        for network in (module.student, module.teacher):
            assert isinstance(network, FSDPModule), name
            assert all(isinstance(weight, DTensor) for weight in network.parameters()), name
    text = (Path(folder) / KEPT[name]).read_text() if name in KEPT else None
    found = {**watch.found, "text": text, "state": full_state(module.student)}
    (tested,) = runner.test(module, data, verbose=False) if name == "first" else ({},)
    return {**found, "tested": tested}


# What writes on whole weights only.
REFUSED = {
    "minillm": lambda: MiniLLM(student(), teacher(), rollout=TeacherMixed(0.2, max_new_tokens=6)),
    "speculative": lambda: SpeculativeKD(student(), teacher(), rollout=SpeculativeRollout(max_new_tokens=6)),
}


def refusal(name, folder):
    """What is said of a method under FSDP2."""
    data = TextDataModule(f"{folder}/tokenizer", source=f"{folder}/texts.jsonl", max_length=40, given=3, packing="none")
    try:
        trainer(folder, devices=2, strategy=FSDP2Strategy()).fit(REFUSED[name](), data)
    except UsageError as error:
        return str(error)
    return "nothing"


# ---- a network by itself --------------------------------------------------------------------------------------------

NETWORKS = {"plain": {}, "adapters": {"lora": LORA}, "checkpointing": {"gradient_checkpointing": True}}


def sharded(name, folder, rank):
    """Each process takes a row of tokens: its greedy answer, the sum of losses, whole gradients and weights."""
    tokens, end = (torch.load(f"{folder}/{part}.pt") for part in ("tokens", "end"))
    row = tokens[rank][None]

    def score(hidden, head):
        assert not isinstance(head, DTensor)
        assert head.shape == (61, 16)
        return F.cross_entropy(F.linear(hidden, head), row[0, 1:], reduction="sum")

    torch.manual_seed(0)
    network = CausalLM(f"{folder}/network", **NETWORKS[name]).materialize()
    shard(network, init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",)))
    assert isinstance(network.network.model.layers[0], FSDPModule)
    assert isinstance(network.network.model.embed_tokens.weight, DTensor)
    added, mask = network.generate(row[:, :3].tolist(), max_new_tokens=6, greedy=True, eos=end)
    loss = network(row, None, torch.arange(8), score)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    gradients = {key: x.grad.full_tensor() for key, x in network.named_parameters() if x.grad is not None}
    return {
        "answers": gathered(added[mask].tolist()),
        "loss": total,
        "gradients": gradients,
        "state": full_state(network),
    }


# ---- two processes --------------------------------------------------------------------------------------------------


def launch(folder):
    """Runs all cases in two processes, and returns what the first one found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**environment, "LOCAL_RANK": str(rank)},  # so Lightning knows that it is one of them
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=500)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error[-3000:] for error in errors)
    return torch.load(Path(folder) / "found.pt")


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = sys.argv[1]
    found = {name: fit(name, f"{folder}/two", devices=2) for name in CASES}
    rank = dist.get_rank()
    found["networks"] = {name: sharded(name, folder, rank) for name in NETWORKS}
    found["refused"] = {name: refusal(name, f"{folder}/two") for name in REFUSED}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()
