"""Methods as a run under some strategy has them: in the test's own process, or as a script in each of two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.tensor import DTensor

import lit_distill.core.strategies  # noqa: F401 (registers fsdp2)
from lit_distill.core.callbacks import EMA
from lit_distill.diffusion import (
    DMD2,
    LADD,
    MSD,
    Denoiser,
    EDMPath,
    GenerationEvaluation,
    GeneratorImages,
    LoRA,
    PartitionedImages,
    ResidualMLP,
    StudentRouter,
    SwiftBrush,
)
from lit_distill.image import DigitsDataModule

BATCHES, EPOCHS = 4, 2
TAPS = ["network.blocks.0", "network.blocks.1"]


def denoiser(seed):
    torch.manual_seed(seed)
    network = ResidualMLP(64, 10, width=16, depth=2)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.15)
    return Denoiser(network, EDMPath(), "edm", 10, data_std=0.75)


def options(**more):
    little = GenerationEvaluation(samples=20, val_samples=20, real_samples=30)
    return {"evaluation": little, "optimizer": lambda p: torch.optim.Adam(p, 0.002, (0.0, 0.999)), **more}


def dmd2():
    return DMD2(denoiser(0), denoiser(1), [2.5, 0.8], guidance=1.5, taps=TAPS, **options(fake_updates=2))


def swiftbrush():
    # Adapters begin at zero: the student's first gradients are of rounding alone, which Adam would blow up.
    optimizers = {"optimizer": lambda p: torch.optim.SGD(p, 1000.0), "fake_optimizer": options()["optimizer"]}
    return SwiftBrush(denoiser(0), denoiser(1), [2.5], guidance=2.0, fake=LoRA(2, 2.0), **options(**optimizers))


def msd():
    students = StudentRouter(denoiser(0), 2)
    return MSD(students, denoiser(1), [2.5], taps=TAPS, **options(fake_updates=2))


def ladd():
    return LADD(denoiser(0), denoiser(1), [2.5, 0.8], taps=TAPS, r1_weight=1.0, **options())


def digits(kind=GeneratorImages, **more):
    source = DigitsDataModule(mean=(0.5,), std=(0.5,))
    return kind(source, epoch_batches=BATCHES, batch_size=16, seed=0, **more)


# By name: what builds the module and the data, and the strategy of two processes.
CASES = {
    "dmd2": (dmd2, digits, "fsdp2"),
    "swiftbrush": (swiftbrush, digits, "fsdp2"),
    "msd": (msd, lambda: digits(PartitionedImages, parts=2, turn=2), "fsdp2"),
    "ladd": (ladd, digits, "fsdp2"),
    "dmd2 under ddp": (dmd2, digits, "ddp_find_unused_parameters_true"),
}


class Keep(Callback):
    """Keeps the terms of each step, averaged over the processes, and what validation measures."""

    def __init__(self):
        self.rows, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        means = {name: trainer.strategy.reduce(v.detach(), reduce_op="mean") for name, v in pl_module.terms.items()}
        self.rows.append({name: float(value) for name, value in means.items()})

    def on_validation_epoch_end(self, trainer, pl_module):
        self.validated.append(float(trainer.callback_metrics["val/mmd"]))


def fit(name, devices=1, keep=None, path=None):
    """Trains a method with an average of its student; keeps checkpoints in a folder, or goes on from one."""
    build, data, strategy = CASES[name]
    seen = Keep()
    callbacks = [EMA(0.5), seen]
    if keep is not None:
        callbacks.append(ModelCheckpoint(keep, filename="{epoch}", save_top_k=-1))
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy if devices > 1 else "auto",
        max_epochs=EPOCHS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=keep is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    module = build()
    trainer.fit(module, datamodule=data(), ckpt_path=path, weights_only=True)
    networks = {role: getattr(module, role, None) for role in ("student", "fake", "head")}
    state = {
        f"{role}.{key}": value.full_tensor() if isinstance(value, DTensor) else value
        for role, network in networks.items()
        if network is not None
        for key, value in network.state_dict().items()
    }
    return {"rows": seen.rows, "validated": seen.validated, "state": state}


def launch(folder):
    """Runs all cases in two processes, and returns what the first one found."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = sys.argv[1]
    found = {name: fit(name, devices=2, keep=folder if name == "dmd2" else None) for name in CASES}
    found["resumed"] = fit("dmd2", devices=2, path=f"{folder}/epoch=0.ckpt")
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(found, f"{folder}/found.pt")
