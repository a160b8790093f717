"""Scores of networks that nobody has trained: minus a distillation loss between random networks, and their size."""

import copy
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_distill.core.errors import UsageError
from lit_distill.core.networks import count_parameters
from lit_distill.core.taps import FeatureTaps
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import DistillationLoss, Outputs, Shapes, stages
from lit_distill.losses.diswot import class_map_similarity, class_maps

Init = Literal["own", "normal"]
NetworkFactory = Callable[[], nn.Module]


class TrainingFreeScores:
    """Scores random networks by distillation losses against a random teacher: minus the loss, so higher is better.

    Teacher, batch and seeds are the same for all candidates; with seed s, candidate and teacher are both initialized
    from s, so a candidate that is the teacher's architecture is the teacher itself. Networks run in train mode: without
    statistics of its own, BatchNorm needs those of the batch.

    Any `DistillationLoss` will do. One with projectors has further random weights between the networks, so its score
    says less; `with_projectors` names such losses.

    Args:
        teacher: Builds the teacher's architecture.
        losses: The losses, each of another name. They are copied for every candidate.
        batch: The images and labels.
        seeds: Seeds to average over.
        init: "own": as the networks' classes initialize themselves; "normal": weights of all convolutions and linear
            layers anew from N(0, 1), as the public code does.

    Reference: Dong, Li, Wei, DisWOT, 2023, arXiv 2303.15678.
    """

    def __init__(
        self,
        teacher: NetworkFactory,
        losses: Sequence[DistillationLoss],
        batch: ImageBatch,
        seeds: Sequence[int] = (0, 1, 2),
        init: Init = "own",
    ) -> None:
        if not losses or not seeds:
            raise UsageError("proxies: give one loss and one seed at least")
        if len({loss.name for loss in losses}) < len(losses):
            raise UsageError("proxies holds the same loss twice; give each its own class")
        self.teacher = teacher
        self.losses = tuple(losses)
        # The batch is all there is to train on: a memory bank has its samples, in its order.
        self.batch = batch._replace(index=torch.arange(len(batch.labels), device=batch.labels.device))
        self.seeds = tuple(seeds)
        self.init: Init = init
        self.with_projectors: frozenset[str] = frozenset()
        self._teachers: dict[int, nn.Module] = {}
        self._teacher_outputs: dict[tuple[int, tuple[str, ...]], Outputs] = {}

    def __call__(self, student: NetworkFactory) -> dict[str, float]:
        """Scores a candidate: the mean over seeds by name of the loss."""
        runs = self.by_seed(student)
        return {loss.name: sum(run[loss.name] for run in runs) / len(runs) for loss in self.losses}

    @torch.no_grad()
    def by_seed(self, student: NetworkFactory) -> list[dict[str, float]]:
        """Scores a candidate once for each seed."""
        return [self._score(student, seed) for seed in self.seeds]

    def _score(self, build: NetworkFactory, seed: int) -> dict[str, float]:
        if seed not in self._teachers:
            self._teachers[seed] = self._network(self.teacher, seed)
        student, teacher = self._network(build, seed), self._teachers[seed]
        losses = [copy.deepcopy(loss) for loss in self.losses]
        for loss in losses:
            loss.resolve(student, teacher)
        said = self._run(student, [tap for loss in losses for tap in loss.student_taps])
        # The teacher of a seed is the same for all candidates, and so is what it says.
        key = (seed, tuple(tap for loss in losses for tap in loss.teacher_taps))
        if key not in self._teacher_outputs:
            self._teacher_outputs[key] = self._run(teacher, key[1])
        taught = self._teacher_outputs[key]
        shapes = Shapes(_shapes(said), _shapes(taught), said.logits.shape[1], lambda: self.batch.labels)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for loss in losses:
                loss.build(shapes)
                loss.to(said.logits.device).train()
        self.with_projectors = frozenset(loss.name for loss in losses if any(True for _ in loss.parameters()))
        return {loss.name: -float(loss(said, taught, self.batch, 0)) for loss in losses}

    def _network(self, build: NetworkFactory, seed: int) -> nn.Module:
        # Drawn on the CPU, so that all devices see the same networks.
        return seeded(build, seed, self.init).to(self.batch.images.device).train()

    def _run(self, network: nn.Module, taps: Sequence[str]) -> Outputs:
        return Outputs(*FeatureTaps(network, taps)(self.batch.images))


class ClassMapSimilarity(DistillationLoss):
    """The semantic metric as the paper's text has it, between networks that are not trained.

    It reads the weights of both last layers once, in `resolve`; so it scores networks at rest and cannot train one.

    See `lit_distill.losses.diswot.class_map_similarity`.
    """

    name: ClassVar[str] = "class_map"

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes the last stages and the last linear layers' weights."""
        self.student_taps, self.teacher_taps = stages(student)[-1:], stages(teacher)[-1:]
        self._student_weight, self._teacher_weight = _head(student), _head(teacher)

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        return class_map_similarity(
            class_maps(student.features[self.student_taps[0]], self._student_weight),
            class_maps(teacher.features[self.teacher_taps[0]], self._teacher_weight),
        )


def seeded(build: NetworkFactory, seed: int, init: Init = "own") -> nn.Module:
    """Builds a network from a seed and leaves the random state of the process as it was.

    Args:
        build: Builds the network.
        seed: The seed.
        init: See `TrainingFreeScores`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = build()
        if init == "normal":
            for module in network.modules():
                if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
                    nn.init.normal_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
    return network


def size(build: NetworkFactory, sample_shape: Sequence[int]) -> dict[str, float]:
    """Counts parameters ("params") and FLOPs of one image ("flops"), multiply and add as two.

    Nothing is computed: the network is made on torch's meta device.

    Args:
        build: Builds the network.
        sample_shape: (C, H, W).
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        network = build().eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, *sample_shape))
    return {"params": float(count_parameters(network)), "flops": float(counter.get_total_flops())}


def _shapes(outputs: Outputs) -> dict[str, tuple[int, ...]]:
    return {tap: tuple(feature.shape[1:]) for tap, feature in outputs.features.items()}


def _head(network: nn.Module) -> Tensor:
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UsageError(f"{type(network).__name__} has no linear layer; class maps are made of the last one's weight")
    return layers[-1].weight.detach()
