"""Training steps of DMD2: ours against a loop by hand, per role.

    python benchmarks/diffusion_steps.py [digits | pixels ...]

"digits" has the networks and settings of `dmd2_small.yaml`, so that what is around the arithmetic weighs most;
"pixels" a UNet2DModel of 0.64 million parameters on images of 3x32x32, where arithmetic does. The fake score takes five
steps for one of the student. Ours is `Trainer.fit`; the loop has the same arithmetic, the same numbers drawn, the same
batches, and nothing around it. That both compute the same losses is checked first.

"student" is the generator's sample with its graph and the student's update; "fake and head" their update on the same
sample; "fake alone" an iteration in which the student rests, the sample without a graph and their update; "five" the
whole cycle of five iterations. "Lightning" is the loop by hand as a bare LightningModule under the same Trainer.
"""

from timing import Pause, Side, Turns  # isort: skip  (before torch)

import copy
import itertools
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jobs import Halt
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_distill.core.loading import derived_seed
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.models import ResidualMLP, small_unet
from lit_distill.diffusion.paths import EDMPath
from lit_distill.diffusion.rollout import Sample
from lit_distill.diffusion.times import Karras, LogNormal
from lit_distill.image.data import ImageBatch

FAKE_UPDATES, CLASSES, START = 5, 10, 2.5
LR, BETAS, CLIP, GAN, DISCRIMINATOR = 2e-4, (0.0, 0.999), 10.0, 1.0, 0.01
TARGET = 1.05


class Case(NamedTuple):
    """A size: the network, what it is given as time, the tap, and the network up to there by hand."""

    network: Callable[[], nn.Module]
    time_input: str
    tap: str
    trunk: Callable[..., Tensor]
    shape: tuple[int, ...]
    batch: int
    rounds: int
    warmup: int


def mlp_trunk(network: ResidualMLP, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
    """The residual perceptron up to its second block."""
    angles = time[:, None] * network.frequencies
    embedding = network.time(torch.cat([angles.cos(), angles.sin()], dim=1))
    assert network.classes is not None
    embedding = F.silu(embedding + network.classes(labels))
    hidden = network.first(x.flatten(1))
    for block in network.blocks[:2]:
        hidden = block(hidden, embedding)
    return hidden


def unet_trunk(network: nn.Module, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
    """The UNet up to its middle."""
    embedding = network.time_embedding(network.time_proj(time)) + network.class_embedding(labels)
    hidden = network.conv_in(x)
    for block in network.down_blocks:
        hidden, _ = block(hidden, embedding)
    return network.mid_block(hidden, embedding)


CASES = {
    "digits": Case(lambda: ResidualMLP(64, CLASSES), "log_noise", "network.blocks.1", mlp_trunk, (1, 8, 8), 128, 60, 5),
    "pixels": Case(
        lambda: small_unet(32, 3, CLASSES), "saturating", "network.mid_block", unet_trunk, (3, 32, 32), 32, 5, 1
    ),
}


class Fixed(LightningDataModule):
    """Random images in batches that are made once."""

    num_classes = CLASSES

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.sample_shape = case.shape
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            ImageBatch(
                torch.rand(case.batch, *case.shape, generator=generator) * 2 - 1,
                torch.randint(CLASSES, (case.batch,), generator=generator),
                torch.arange(case.batch),
            )
            for _ in range(16)
        ]

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """The batches as they are."""
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]  # a list is a data set to it


# ---- by hand -------------------------------------------------------------------------------------------------------


class Loop:
    """DMD2 by hand, from copies of the networks of a module."""

    def __init__(self, case: Case, module: DMD2, batches: list[ImageBatch]) -> None:
        networks = (copy.deepcopy(each.network) for each in (module.student, module.teacher, module.fake))
        self.student, self.teacher, self.fake = networks
        assert module.head is not None
        self.head = copy.deepcopy(module.head.heads[0])
        self.case, self.batches, self.std = case, batches, module.student.data_std
        self.critics = [*self.fake.parameters(), *self.head.parameters()]
        self.optimizers = [
            torch.optim.Adam(parameters, LR, BETAS) for parameters in (self.student.parameters(), self.critics)
        ]
        for own, other in zip(self.optimizers, module.trainer.optimizers, strict=True):
            own.load_state_dict(copy.deepcopy(other.state_dict()))
        self.values: list[Tensor] = []

    def time(self, r: Tensor) -> Tensor:
        """What networks are given as time."""
        return r.log() / 4 if self.case.time_input == "log_noise" else 1000 * r / (1 + r)

    def denoise(self, network: nn.Module, x: Tensor, r: Tensor, labels: Tensor) -> Tensor:
        """EDM's denoiser."""
        level = r.view(-1, 1, 1, 1)
        spread = level.square() + self.std**2
        given = x / spread.sqrt()
        if isinstance(network, ResidualMLP):
            out = network(given, self.time(r), labels)
        else:
            out = network(given, self.time(r), class_labels=labels, return_dict=False)[0]
        return self.std**2 / spread * x + level * self.std / spread.sqrt() * out

    def logits(self, x: Tensor, r: Tensor, labels: Tensor) -> Tensor:
        """The discriminator's."""
        spread = r.view(-1, 1, 1, 1).square() + self.std**2
        return self.head(self.case.trunk(self.fake, x / spread.sqrt(), self.time(r), labels))

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        """Descends a loss."""
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()

    def run(self, pause: Pause, iteration: int) -> None:
        """Runs from an iteration on, which is the student's turn."""
        for number in itertools.count(iteration):
            pause()
            self.iterate(number, self.batches[number % len(self.batches)], pause)

    def iterate(self, number: int, batch: ImageBatch, pause: Pause) -> None:
        """One iteration; pauses between two updates."""
        students = list(self.student.parameters())
        generator = torch.Generator().manual_seed(derived_seed("step", 0, number))
        count, shape = len(batch.images), batch.images.shape

        def noised(x: Tensor, r: Tensor, generator: torch.Generator = generator) -> Tensor:
            return x + r.view(-1, 1, 1, 1) * torch.randn(x.shape, generator=generator)

        def log_normal(count: int = count, generator: torch.Generator = generator) -> Tensor:
            drawn = torch.randn(count, generator=generator, dtype=torch.float64)
            return (-1.0 + 1.4 * drawn).exp().clamp(0.002, 80).float()

        def karras(count: int = count, generator: torch.Generator = generator) -> Tensor:
            u = 0.02 + 0.96 * torch.rand(count, generator=generator, dtype=torch.float64)
            low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
            return ((low + u * (high - low)) ** 7).float()

        labels = torch.randint(CLASSES, (count,), generator=generator)
        noise = START * torch.randn(shape, generator=generator)
        first = torch.full((count,), START)
        if number % FAKE_UPDATES == 0:
            x = self.denoise(self.student, noise, first, labels)
            r = karras()
            with torch.no_grad():
                x_t = noised(x, r)
                real = self.denoise(self.teacher, x_t, r, labels)
                fake = self.denoise(self.fake, x_t, r, labels)
                gradient = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
            surrogate = 0.5 * (x - (x - gradient).detach()).square().mean()
            for parameter in self.critics:
                parameter.requires_grad_(False)
            r = log_normal()
            gan = GAN * F.softplus(-self.logits(noised(x, r), r, labels)).mean()
            self.step(surrogate + gan, self.optimizers[0], students)
            for parameter in self.critics:
                parameter.requires_grad_(True)
            self.values = [surrogate.detach(), gan.detach()]
            x = x.detach()
            pause()
        else:
            self.values = []
            with torch.no_grad():
                x = self.denoise(self.student, noise, first, labels)
        r = log_normal()
        error = (self.denoise(self.fake, noised(x, r), r, labels) - x).square().mean((1, 2, 3))
        fake_loss = ((r**-2 + self.std**-2) * error).mean()
        r = log_normal()
        made = noised(x, r)
        r_real = log_normal()
        both = torch.cat([made, noised(batch.images, r_real)])
        logits = self.logits(both, torch.cat([r, r_real]), torch.cat([labels, batch.labels]))
        generated, true = logits.chunk(2)
        discriminator = DISCRIMINATOR * (F.softplus(generated).mean() + F.softplus(-true).mean())
        self.step(fake_loss + discriminator, self.optimizers[1], self.critics)
        self.values += [fake_loss.detach(), discriminator.detach()]


class Bare(LightningModule):
    """The same loop as a Lightning module that does nothing else."""

    def __init__(self, loop: Loop, pause: Pause) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.networks = nn.ModuleList([loop.student, loop.fake, loop.head])
        self.loop, self.halt, self.number = loop, pause, FAKE_UPDATES
        loop.step = self.descend  # type: ignore[method-assign]  # as Lightning wants it

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of the loop."""
        return self.loop.optimizers

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        """Descends a loss."""
        chosen = self.optimizers()[self.loop.optimizers.index(optimizer)]
        chosen.zero_grad()
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        chosen.step()

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """One iteration."""
        self.loop.iterate(self.number, batch, self.halt)
        self.number += 1


# ---- ours ----------------------------------------------------------------------------------------------------------


def ours(case: Case, data: Fixed) -> tuple[DMD2, Side]:
    """Our module, and its training, which pauses where the loop by hand does."""
    halt: list[Pause] = []

    class Halted(DMD2):
        def fake_loss(self, sample: Sample, condition: Tensor, draws: object) -> Tensor:
            if self.is_student_turn():
                halt[0]()
            return super().fake_loss(sample, condition, draws)

    torch.manual_seed(0)
    network = case.network()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # layers that begin at zero would hide what is before them
    student, teacher = (
        Denoiser(copy.deepcopy(network), EDMPath(), "edm", CLASSES, 0.75, case.time_input) for _ in range(2)
    )
    module = Halted(
        student,
        teacher,
        [START],
        fake_updates=FAKE_UPDATES,
        taps=[case.tap],
        gan_weight=GAN,
        discriminator_weight=DISCRIMINATOR,
        student_times=Karras(),
        fake_times=LogNormal(-1.0, 1.4),
        gan_times=LogNormal(-1.0, 1.4),
        clip_norm=CLIP,
        optimizer=lambda parameters: torch.optim.Adam(parameters, LR, BETAS),
    )

    def run(pause: Pause) -> None:
        halt.append(pause)
        fit(module, data, pause)

    return module, run


def fit(module: LightningModule, data: Fixed, pause: Pause) -> None:
    """Trains with nothing around."""
    Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=100_000,
        limit_val_batches=0,
        logger=False,
        callbacks=[Halt(pause, "step")],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=data)


# ---- measuring -----------------------------------------------------------------------------------------------------

UNITS = ("student", "fake and head", *("fake alone",) * (FAKE_UPDATES - 1))


def check(module: DMD2, loop: Loop, names: list[str]) -> None:
    """Compares the losses of the last iteration.

    Not of later ones: a head of a map normalizes groups of two numbers, which makes them +1 and -1, so that what
    float32 rounds away grows from step to step.
    """
    own = [float(module.terms[name]) for name in names]
    hand = [float(value) for value in loop.values]
    if any(abs(a - b) > 1e-4 * abs(b) for a, b in zip(own, hand, strict=True)):
        raise AssertionError(f"our losses are {own}, by hand they are {hand}")


def report(name: str, case: Case) -> None:
    """Measures one size and prints its lines."""
    data = Fixed(case)
    module, run = ours(case, data)
    us = Turns(run)
    for _ in range(len(UNITS) + 1):  # to the end of the first cycle; the copies are made there
        us.take()
    loop = Loop(case, module, data.batches)
    hand = Turns(lambda pause: loop.run(pause, FAKE_UPDATES))
    hand.take()
    bare_loop = Loop(case, module, data.batches)
    bare = Turns(lambda pause: fit(Bare(bare_loop, pause), data, pause))
    bare.take()
    sides = {"ours": us, "Lightning": bare, "hand": hand}
    # Wall and CPU seconds of each unit of each cycle, per side.
    seconds: dict[str, list[list[tuple[float, float]]]] = {side: [] for side in sides}
    for number in range(case.warmup + case.rounds):
        for cycles in seconds.values():
            cycles.append([])
        for unit in range(len(UNITS)):
            order = list(sides) if (number + unit) % 2 else list(reversed(sides))
            for side in order:
                start, start_cpu = time.perf_counter(), time.process_time()
                sides[side].take()
                seconds[side][-1].append((time.perf_counter() - start, time.process_time() - start_cpu))
            if number == 0 and unit == 1:
                check(module, loop, ["surrogate", "gan", "fake", "discriminator"])
    for side in sides.values():
        side.finish()
    for side, role in itertools.product(("ours", "Lightning"), ("student", "fake and head", "fake alone", "five")):
        chosen = [unit for unit, own in enumerate(UNITS) if role in (own, "five")]
        totals = {
            key: [[sum(cycle[unit][kind] for unit in chosen) for cycle in cycles[case.warmup :]] for kind in (0, 1)]
            for key, cycles in seconds.items()
        }
        wall, cpu = ([a / b for a, b in zip(totals[side][kind], totals["hand"][kind], strict=True)] for kind in (0, 1))
        share = 1000 if role == "five" else 1000 / len(chosen)
        own_ms, hand_ms = (share * statistics.median(totals[key][1]) for key in (side, "hand"))
        print(
            f"{name:<8} {side:<10} {role:<14} {own_ms:>9.2f} {hand_ms:>9.2f} {statistics.median(wall):>7.3f} "
            f"{min(wall):>7.3f} {max(wall):>7.3f} {statistics.median(cpu):>7.3f} {min(cpu):>7.3f} {max(cpu):>7.3f} "
            f"{TARGET if side == 'ours' else '':>7}",
            flush=True,
        )


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of Lightning, about short runs: they would stand between the lines of the table
    print("ratios to the loop by hand within a cycle; ms are of CPU time, medians")
    print(f"{'':<34} {'CPU ms':>9} {'by hand':>9} {'wall':>7} {'min':>7} {'max':>7}", end="")
    print(f" {'CPU':>7} {'min':>7} {'max':>7} {'target':>7}", flush=True)
    for chosen in sys.argv[1:] or CASES:
        report(chosen, CASES[chosen])
