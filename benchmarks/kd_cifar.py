"""KD of CIFAR's size, ResNet-56 to ResNet-20, batches of 128: `lit-distill fit` against a loop written by hand.

    python benchmarks/kd_cifar.py

Both select, crop, mirror and normalize the same way and compute the same losses.
"""

import timing  # isort: skip  (before torch)

import itertools

import torch
import torch.nn.functional as F
from jobs import RandomImages, ours

from lit_distill.core.loading import take_samples
from lit_distill.image.augment import ImageTransform
from lit_distill.image.models import ResNetCIFAR

BATCH, ROUNDS = 128, 24
CONFIG = {
    "model": {
        "class_path": "lit_distill.image.KD",
        "init_args": {
            "student": {
                "class_path": "lit_distill.image.models.ResNetCIFAR",
                "init_args": {"depth": 20, "num_classes": 10},
            },
            "teacher": {
                "class_path": "lit_distill.image.models.ResNetCIFAR",
                "init_args": {"depth": 56, "num_classes": 10},
            },
        },
    },
    "data": {"class_path": "jobs.RandomImages", "init_args": {"batch_size": BATCH, "augment": True}},
}


def by_hand(pause):
    """The same training with nothing around it."""
    data = RandomImages()
    images, labels = data.part("train")
    transform = ImageTransform(data.normalize, data.augmentation)
    student = ResNetCIFAR(20, 10).to(memory_format=torch.channels_last)
    teacher = ResNetCIFAR(56, 10).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in itertools.count():
        for index in torch.randperm(len(labels), generator=generator).split(BATCH):
            batch = transform(take_samples(images, index), transform.draw(BATCH, generator))
            with torch.no_grad():
                soft = F.log_softmax(teacher(batch) / 4, 1)
            logits = student(batch)
            kd = F.kl_div(F.log_softmax(logits / 4, 1), soft, log_target=True, reduction="batchmean") * 16
            loss = 0.1 * F.cross_entropy(logits, labels[index]) + 0.9 * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pause()


if __name__ == "__main__":
    timing.in_turns({"by hand": by_hand, "ours": ours(CONFIG, "step")}, "by hand", ROUNDS, 3, "step", ours=1.05)
