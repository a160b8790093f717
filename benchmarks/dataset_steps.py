"""Training steps of data set distillation: ours against loops by hand.

    python benchmarks/dataset_steps.py [method ...]

ConvNet-3 of 32 channels on random images of CIFAR's size, ten images of each of ten classes, 32 real ones each; less
than the published settings, so that what is around the arithmetic weighs more. Ours is `Trainer.fit`; the loops have
the same arithmetic, with real images normalized beforehand, and nothing around it. Both draw the same numbers, and that
they compute the same loss is checked first.
"""

from image_losses import ratio  # isort: skip  (before torch)

import copy
import logging
import sys
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jobs import Halt, RandomImages
from lightning.pytorch import Trainer
from timing import Pause, Side, Turns
from torch import Tensor

from lit_distill.core.distiller import _mix
from lit_distill.core.networks import redraw
from lit_distill.dataset.methods.dc import GradientMatching
from lit_distill.dataset.methods.dm import DistributionMatching
from lit_distill.dataset.models import DistillationConvNet
from lit_distill.dataset.synthesizer import DatasetSynthesizer
from lit_distill.losses.gradients import gradient_distance

CLASSES, PER_CLASS, REAL, WIDTH = 10, 10, 32, 32
OUTER, INNER = 1000, 1  # one network all along: what is drawn anew costs little
ROUNDS, WARMUP, TARGET = 15, 2, 1.05


class Loop:
    """What a loop by hand begins with: copies of our images and network, and real images of each class."""

    def __init__(self, module: DatasetSynthesizer, data: RandomImages) -> None:
        self.images = module.images.detach().clone().requires_grad_()
        network = module.network if isinstance(module, GradientMatching) else module.student
        assert isinstance(network, DistillationConvNet)
        self.network = copy.deepcopy(network).train()
        self.augment = module.augmentation
        self.labels = torch.arange(CLASSES).repeat_interleave(PER_CLASS)
        self.optimizer = torch.optim.SGD([self.images], lr=0.1, momentum=0.5)
        pixels, labels = data.part("train")
        self.pixels = data.normalize(pixels)
        self.pools = [(labels == number).nonzero()[:, 0] for number in range(CLASSES)]

    def real(self, number: int) -> Tensor:
        """Draws real images."""
        pool = self.pools[number]
        index = pool[torch.randperm(len(pool))[:REAL]]
        return self.pixels.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)

    def own(self, number: int) -> slice:
        """Says where the images of a class lie."""
        return slice(number * PER_CLASS, (number + 1) * PER_CLASS)


def dm(loop: Loop) -> Tensor:
    """A step of DM."""
    redraw(loop.network)
    loop.network.requires_grad_(False)
    total = torch.zeros(())
    for number in range(CLASSES):
        draws = loop.augment.draw(1)
        with torch.no_grad():
            real = loop.network.embed(loop.augment(loop.real(number), draws)).mean(0)
        mean = loop.network.embed(loop.augment(loop.images[loop.own(number)], draws)).mean(0)
        total = total + (mean - real).square().sum()
    loop.optimizer.zero_grad()
    total.backward()
    loop.optimizer.step()
    return total.detach()


def dc(loop: Loop) -> Tensor:
    """A step of DC, which trains the network first."""
    network, parameters = loop.network.requires_grad_(True), list(loop.network.parameters())
    for _ in range(INNER):
        index = torch.randperm(len(loop.labels))
        images = loop.augment(loop.images.detach()[index], loop.augment.draw(len(index)))
        gradients = torch.autograd.grad(F.cross_entropy(network(images), loop.labels[index]), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=0.01)
    total = torch.zeros(())
    found = []
    for number in range(CLASSES):
        draws = loop.augment.draw(1)
        real = loop.augment(loop.real(number), draws)
        target = torch.autograd.grad(F.cross_entropy(network(real), torch.full((REAL,), number)), parameters)
        own = loop.images[loop.own(number)].detach().requires_grad_()
        loss = F.cross_entropy(network(loop.augment(own, draws)), loop.labels[loop.own(number)])
        matched = torch.autograd.grad(loss, parameters, create_graph=True)
        distance = gradient_distance(matched, target, metric="rows")
        found.append(torch.autograd.grad(distance, own)[0])
        total += distance.detach()
    loop.images.grad = torch.cat(found)
    loop.optimizer.step()
    return total


def build_dm(student: DistillationConvNet, operations: str) -> DatasetSynthesizer:
    """Our DM."""
    return DistributionMatching(student, real_batch=REAL, operations=operations)


def build_dc(student: DistillationConvNet, operations: str) -> DatasetSynthesizer:
    """Our DC, or with operations DSA."""
    return GradientMatching(student, OUTER, INNER, real_batch=REAL, operations=operations)


ALL = "color_crop_cutout_flip_scale_rotate"
METHODS = {"DM": (build_dm, dm, ALL), "DC": (build_dc, dc, "none"), "DSA": (build_dc, dc, ALL)}


def by_hand(loop: Loop, step: Callable[[Loop], Tensor], iteration: int, values: list[Tensor]) -> Side:
    """A loop that draws what ours draws, from an iteration on."""

    def run(pause: Pause) -> None:
        number = iteration
        while True:
            pause()
            torch.default_generator.manual_seed(_mix(0, number, 0))
            values.append(step(loop))
            number += 1

    return run


def report(name: str) -> None:
    """Measures one method and prints its line."""
    build, step, operations = METHODS[name]
    torch.manual_seed(0)
    module, data = build(DistillationConvNet(CLASSES, WIDTH), operations), RandomImages(1024)

    def fit(pause: Pause) -> None:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1000,
            limit_val_batches=0,
            logger=False,
            callbacks=[Halt(pause, "step")],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)

    ours = Turns(fit)
    ours.take()
    ours.take()  # the first step, in which DC draws its network
    loop = Loop(module, data)
    loop.optimizer.load_state_dict(copy.deepcopy(module.trainer.optimizers[0].state_dict()))
    values: list[Tensor] = []
    hand = Turns(by_hand(loop, step, 1, values))
    hand.take()
    for _ in range(3):
        hand.take()
        ours.take()
        expected, own = float(values[-1]), float(sum(module.terms.values()))
        if abs(own - expected) > 1e-5 * abs(expected):
            raise AssertionError(f"{name}: our loss is {own}, by hand it is {expected}")
    measured = ratio(ours.take, hand.take, ROUNDS, WARMUP)
    ours.finish()
    hand.finish()
    own_ms, hand_ms = (1000 * seconds for seconds in measured.seconds)
    print(f"{name:<10} {own_ms:>8.1f} {hand_ms:>8.1f} {measured} {TARGET:>7}", flush=True)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of Lightning, about short runs: they would stand between the lines of the table
    print(f"{ROUNDS} rounds; ratios of ours to the loop by hand within a round")
    print(f"{'':<10} {'ours ms':>8} {'hand ms':>8} {'ratio':>7} {'min':>7} {'max':>7} {'CPU':>7} {'target':>7}")
    for chosen in sys.argv[1:] or METHODS:
        report(chosen)
