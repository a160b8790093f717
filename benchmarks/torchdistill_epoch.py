"""An epoch of KD on CIFAR-10, ResNet-56 to ResNet-20, batches of 128, against torchdistill.

    pip install -e '.[bench]'; python benchmarks/torchdistill_epoch.py [FOLDER_OF_CIFAR10]

torchdistill trains in its own distillation box, with its own KD loss, on images that its usual chain of torchvision
transforms makes one by one. Networks, images, augmentation, optimizer and loss are the same. 512 images an epoch: four
steps. Where CIFAR-10 is not found, pixels are random.
"""

import timing  # isort: skip  (before torch)

import logging
import sys
from pathlib import Path

import torch
from jobs import RandomImages, ours
from PIL import Image
from torch.utils.data import Dataset
from torchdistill.core.distillation import DistillationBox
from torchvision import transforms

from lit_distill.image import CIFAR10DataModule
from lit_distill.image.models import ResNetCIFAR

ROOT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "shared" / "data"
IMAGES, BATCH, ROUNDS = 512, 128, 7
FOUND = any((ROOT / name).exists() for name in ("cifar10.npz", "cifar10/cifar10.npz", "cifar-10-batches-py"))
STUDENT = {"class_path": "lit_distill.image.models.ResNetCIFAR", "init_args": {"depth": 20, "num_classes": 10}}
TEACHER = {"class_path": "lit_distill.image.models.ResNetCIFAR", "init_args": {"depth": 56, "num_classes": 10}}
SIZES = {"batch_size": BATCH, "train_size": IMAGES, "augment": True}
DATA = {
    "class_path": "lit_distill.image.CIFAR10DataModule" if FOUND else "jobs.RandomImages",
    "init_args": {**SIZES, "root": str(ROOT)} if FOUND else SIZES,
}
CONFIG = {
    "model": {"class_path": "lit_distill.image.KD", "init_args": {"student": STUDENT, "teacher": TEACHER}},
    "data": DATA,
}
LOSS = {
    "key": "WeightedSumLoss",
    "kwargs": {
        "sub_terms": {
            "kd": {
                "criterion": {
                    "key": "KDLoss",
                    "kwargs": {
                        "student_module_path": ".",
                        "student_module_io": "output",
                        "teacher_module_path": ".",
                        "teacher_module_io": "output",
                        "temperature": 4.0,
                        "alpha": 0.1,
                        "reduction": "batchmean",
                    },
                },
                "weight": 1.0,
            }
        }
    },
}


class PILImages(Dataset):
    """Images and labels the way torchvision's CIFAR10 gives them."""

    def __init__(self, data):
        images, labels = data.part("train")
        self.pixels, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, 4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.normalize.mean, data.normalize.std),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def torchdistill(pause):
    data = CIFAR10DataModule(ROOT, **SIZES) if FOUND else RandomImages(**SIZES)
    loader = {
        "dataset_id": "train",
        "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": {}},
        "kwargs": {"batch_size": BATCH, "num_workers": 0, "drop_last": True},
    }
    config = {
        "num_epochs": 1,
        "train_data_loader": loader,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}},
        "criterion": LOSS,
    }
    teacher, student = ResNetCIFAR(56, 10).eval(), ResNetCIFAR(20, 10)
    box = DistillationBox(teacher, student, {"train": PILImages(data)}, config, torch.device("cpu"), None, False, 1)
    epoch = 0
    while True:
        box.pre_epoch_process(epoch=epoch)
        for images, labels, extra in box.train_data_loader:
            box.pre_forward_process()
            box.post_forward_process(loss=box.forward_process(images, labels, extra))
        box.post_epoch_process()
        epoch += 1
        pause()


if __name__ == "__main__":
    logging.disable(logging.INFO)
    sides = {"torchdistill": torchdistill, "ours": ours(CONFIG, "epoch")}
    timing.in_turns(sides, "torchdistill", ROUNDS, 1, "epoch", ours=0.9)
