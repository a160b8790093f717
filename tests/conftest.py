"""What all tests share: one thread, fixed seeds, checked shapes, and networks and data small enough to reason about."""

import jaxtyping
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

# Before anything of ours is imported: shapes in signatures are enforced in tests, and cost nothing in production.
jaxtyping.install_import_hook(
    [f"lit_distill.{part}" for part in ("losses", "image", "graph", "dataset", "llm", "diffusion")],
    "beartype.beartype",
)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    """Starts each test from the same random state, whatever ran before."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.manual_seed(0)


class Blobs(LightningDataModule):
    """Images (2, 8, 8) of three classes that differ in their mean: a network that works separates them at once.

    Not shuffled: batch i of every epoch is known.
    """

    num_classes = 3
    sample_shape = (2, 8, 8)

    def __init__(self, size=24, batch_size=8, random=False):
        super().__init__()
        self.size, self.batch_size, self.random = size, batch_size, random
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.arange(size) % 3
        noise = torch.randn(size, 2, 8, 8, generator=generator)
        self.images = noise * 0.1 + (self.labels - 1.0).view(-1, 1, 1, 1)

    def batches(self):
        from lit_distill.image.data import ImageBatch

        index = torch.arange(self.size)
        parts = zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
        return [ImageBatch(x, y, i) for (x, y), i in zip(parts, index.split(self.batch_size), strict=True)]

    def train_labels(self):
        return self.labels

    def train_dataloader(self):
        return DataLoader(self.batches(), batch_size=None)

    def ordered_loader(self):
        return self.train_dataloader()

    def val_dataloader(self):
        return self.train_dataloader()

    def test_dataloader(self):
        return self.train_dataloader()

    def fingerprint(self):
        return {"data": f"{float(self.images.sum()):.6f}", "samples": self.size, "transform": "", "random": self.random}


class TinyNet(nn.Module):
    """Two convolutional stages with BatchNorm and a linear head, for images (2, 8, 8) and three classes."""

    stages = ("stage1", "stage2")
    pre_activations = ("stage1.2@input", "stage2.2@input")
    penultimate = "pool"

    def __init__(self, width=4, num_classes=3, dropout=0.0):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.stage2 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.dropout(self.pool(self.stage2(self.stage1(images)))))


class MeanTeacher(nn.Module):
    """A teacher that is always right on `Blobs`: its logits are distances of the image's mean to -1, 0, 1."""

    stages = ("features",)

    def __init__(self):
        super().__init__()
        self.features = nn.Identity()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, images):
        mean = self.features(images).mean((1, 2, 3))
        return -self.scale * (mean[:, None] - torch.tensor([-1.0, 0.0, 1.0])).abs()


@pytest.fixture
def blobs():
    return Blobs()


@pytest.fixture
def blobs_class():
    return Blobs


@pytest.fixture
def tiny():
    """Builds a network by width, the same for the same seed."""

    def build(width=4, seed=0, **kwargs):
        torch.manual_seed(seed)
        return TinyNet(width, **kwargs)

    return build


@pytest.fixture
def mean_teacher():
    return MeanTeacher


@pytest.fixture
def trainer(tmp_path):
    """Builds a silent CPU trainer."""

    def build(**kwargs):
        options = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "max_epochs": 1,
            "default_root_dir": tmp_path,
        }
        return Trainer(**(options | kwargs))

    return build
