"""Small denoisers of digits, and real digits to go with them."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lit_distill.diffusion.data import GeneratorImages
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.evaluation import GenerationEvaluation
from lit_distill.diffusion.models import ResidualMLP
from lit_distill.diffusion.paths import EDMPath
from lit_distill.image import DigitsDataModule


@pytest.fixture
def make_denoiser():
    """Builds a denoiser of 8x8 digits with random weights, none of them zero."""

    def build(seed=0, path=None, prediction="edm", num_classes=10):
        torch.manual_seed(seed)
        network = ResidualMLP(64, num_classes or 0, width=16, depth=2)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.15)
        return Denoiser(network, path or EDMPath(), prediction, num_classes, data_std=0.75)

    return build


@pytest.fixture
def digits():
    """Digits in [-1, 1], eight to a batch."""
    return GeneratorImages(DigitsDataModule(mean=(0.5,), std=(0.5,)), epoch_batches=6, batch_size=8, seed=0)


@pytest.fixture
def little():
    """An evaluation that costs nothing."""
    return GenerationEvaluation(samples=20, val_samples=20, real_samples=30)


@pytest.fixture
def check_resumed(trainer, digits, tmp_path):
    """Checks that a run that stops after four of six batches, and goes on from its checkpoint, is the whole run."""

    def check(build):
        whole, half, again = (build() for _ in range(3))
        trainer().fit(whole, datamodule=copy.deepcopy(digits))
        keep = ModelCheckpoint(tmp_path, filename="half", save_top_k=-1, every_n_train_steps=4)
        if not half.automatic_optimization:  # counts the steps of all optimizers
            keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        fit = trainer(callbacks=[keep], enable_checkpointing=True, limit_train_batches=6)
        fit.fit(half, datamodule=copy.deepcopy(digits))
        files = {torch.load(file, weights_only=True)["iteration"]: file for file in tmp_path.glob("*.ckpt")}
        torch.manual_seed(99)
        trainer().fit(again, datamodule=copy.deepcopy(digits), ckpt_path=files[4], weights_only=True)
        assert again.iteration == 6
        for name, value in again.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), name
        return whole

    return check
