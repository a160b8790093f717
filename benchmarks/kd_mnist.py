"""KD of configs/image/kd_small.yaml, whose steps are short: what the frame around a step costs.

    python benchmarks/kd_mnist.py

An epoch is 46 batches of 64 of MNIST-5k. Beside `lit-distill fit` and the loop written by hand runs the barest
Lightning module that trains the same, without callbacks, logger or checkpoints.
"""

import timing  # isort: skip  (before torch)

import itertools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from jobs import Halt, ours
from lightning.pytorch import LightningModule, Trainer

from lit_distill.core.loading import take_samples
from lit_distill.core.networks import instantiate
from lit_distill.image import MNIST5kDataModule
from lit_distill.image.augment import ImageTransform

ROUNDS = 40
CONFIGS = Path(__file__).parents[1] / "configs" / "image"
KD = yaml.safe_load((CONFIGS / "kd_small.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
TEACHER = yaml.safe_load((CONFIGS / "supervised_small.yaml").read_text(encoding="utf-8"))["model"]["init_args"][
    "student"
]
CONFIG = {
    "model": {"class_path": "lit_distill.image.KD", "init_args": {**KD, "teacher": TEACHER, "lr_scheduler": None}},
    "data": {"class_path": "lit_distill.image.MNIST5kDataModule", "init_args": {"batch_size": 64}},
}


class Batches:
    """Shuffled, normalized batches."""

    def __init__(self):
        data = MNIST5kDataModule()
        self.images, self.labels = data.part("train")
        self.transform = ImageTransform(data.normalize)
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return len(self.labels) // 64

    def __iter__(self):
        for index in torch.randperm(len(self.labels), generator=self.generator).split(64)[: len(self)]:
            yield self.transform(take_samples(self.images, index), None), self.labels[index]


def networks():
    student, teacher = instantiate(KD["student"]), instantiate(TEACHER)
    return student, teacher.eval().requires_grad_(False)


def loss_of(student, teacher, images, labels):
    with torch.no_grad():
        soft = F.log_softmax(teacher(images) / 4, 1)
    logits = student(images)
    kd = F.kl_div(F.log_softmax(logits / 4, 1), soft, log_target=True, reduction="batchmean") * 16
    return 0.1 * F.cross_entropy(logits, labels) + 0.9 * kd


def by_hand(pause):
    student, teacher = networks()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, weight_decay=0.01)
    batches = Batches()
    for _ in itertools.count():
        for images, labels in batches:
            loss = loss_of(student, teacher, images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        pause()


class Bare(LightningModule):
    """The least that Lightning trains."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = networks()

    def training_step(self, batch, batch_idx):
        """The loss of a batch."""
        return loss_of(self.student, self.teacher, *batch)

    def configure_optimizers(self):
        """The optimizer of kd_small.yaml."""
        return torch.optim.AdamW(self.student.parameters(), lr=0.01, weight_decay=0.01)


def bare_lightning(pause):
    # Lightning's import sets this, and it costs each optimizer step a search for a GPU's library; `lit-distill` unsets
    # it where there is no GPU. Here it is set in this side's turns alone.
    variable = "PYTORCH_NVML_BASED_CUDA_CHECK"

    def rest():
        os.environ.pop(variable, None)
        pause()
        os.environ[variable] = "1"

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1_000_000,
        callbacks=[Halt(rest, "epoch")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Bare(), Batches())


if __name__ == "__main__":
    sides = {"by hand": by_hand, "bare Lightning": bare_lightning, "ours": ours(CONFIG, "epoch")}
    timing.in_turns(sides, "by hand", ROUNDS, 5, "epoch", ours=1.15)
