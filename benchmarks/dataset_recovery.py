"""A step of recovery (SRe2L, CV-DD): ours against loops by hand with the same arithmetic.

    python benchmarks/dataset_recovery.py [rounds]

Images of CIFAR's size, one of each of ten classes, from small networks. Ours is `Trainer.fit`; the loops have the same
augmentation, hooks that stay, Adam, the schedule and the cut-off of pixels, and nothing around it. "var_mean" is the
loop with mean and variance by torch's own function, where ours has a gradient of its own.
"""

from timing import Pause, Side, in_turns  # isort: skip  (before torch)

import logging
import math
import sys
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jobs import Halt, RandomImages
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torchvision.transforms import v2

from lit_distill.dataset.batchnorm import channel_moments
from lit_distill.dataset.methods.cvdd import CommitteeRecovery
from lit_distill.dataset.methods.sre2l import SRe2L
from lit_distill.dataset.models import DistillationConvNet
from lit_distill.image.models import ResNetCIFAR, ShuffleNetV2CIFAR

CLASSES, BLOCKS, ITERATIONS = 10, 1, 4000
ROUNDS, WARMUP, TARGET = 20, 3, 1.05

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]


def members(count: int) -> list[nn.Module]:
    """Networks of two kinds."""
    torch.manual_seed(0)
    made = [ResNetCIFAR(20, CLASSES), ShuffleNetV2CIFAR(CLASSES)][:count]
    return [network.requires_grad_(False).eval() for network in made]


def var_mean(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance."""
    variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0)
    return mean, variance


def ours(count: int) -> Side:
    """`Trainer.fit`, halted after every step."""

    def run(pause: Pause) -> None:
        student, options = (
            DistillationConvNet(CLASSES, width=8),
            {"per_class": BLOCKS, "recover_iterations": ITERATIONS},
        )
        networks = members(count)
        if count == 1:
            module: SRe2L | CommitteeRecovery = SRe2L(student, networks[0], **options)
        else:
            module = CommitteeRecovery(student, networks, [60.0, 50.0], **options)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=BLOCKS * ITERATIONS,
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            callbacks=[Halt(pause, "step")],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=RandomImages(batch_size=1))

    return run


def by_hand(count: int, moments: Moments) -> Side:
    """The loop."""

    def run(pause: Pause) -> None:
        networks, found = members(count), []

        def watch(layer: nn.BatchNorm2d, weight: float) -> None:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                mean, variance = moments(args[0])
                distance = (layer.running_mean - mean).norm() + (layer.running_var - variance).norm()
                found.append(weight * distance)

            layer.register_forward_pre_hook(hook)

        for network in networks:
            layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
            for number, layer in enumerate(layers):
                watch(layer, 10.0 if number == 0 else 1.0)
        weights = torch.tensor([60.0, 50.0][:count]).div(5).softmax(0).tolist()
        augment = v2.Compose([v2.RandomResizedCrop(32, antialias=False), v2.RandomHorizontalFlip()])
        pixels = torch.randn(CLASSES, 3, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
        labels, lower, upper = torch.arange(CLASSES), torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0)
        optimizer = torch.optim.Adam([pixels], lr=0.25, betas=(0.5, 0.9))
        for step in range(ITERATIONS):
            pause()
            optimizer.param_groups[0]["lr"] = 0.125 * (1 + math.cos(math.pi * step / ITERATIONS))
            images = augment(pixels).roll(torch.randint(5, (2,)).tolist(), (2, 3))
            losses = []
            for network, weight in zip(networks, weights, strict=True):
                found.clear()
                ce = F.cross_entropy(network(images), labels)
                losses.append(weight * (ce + 0.01 * torch.stack(found).sum()))
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            with torch.no_grad():
                pixels.clamp_(lower, upper)

    return run


def main() -> None:
    """Prints a table for one network and one for two."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of Lightning, about short runs: they would stand between the lines of the table
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    for count in (1, 2):
        print(f"{count} network{'s' * (count > 1)}")
        sides = {"ours": ours(count), "by hand": by_hand(count, channel_moments), "var_mean": by_hand(count, var_mean)}
        in_turns(sides, "by hand", rounds, WARMUP, "step", ours=TARGET)


if __name__ == "__main__":
    main()
