"""Training steps of the image methods that read features or keep more than logits: ours against loops by hand.

    python benchmarks/image_steps.py [method ...]

ResNet-20 to ResNet-8, batches of 64 in memory. Ours is `Trainer.fit`; the loops have the same arithmetic, with features
returned by the forward pass and copies of our projectors, and nothing around it. That both compute the same loss is
checked first.

"MB" is the most that the tensors of one step add up to beyond what is there at its start: activations, gradients, what
losses keep (torch's profiler of allocations).
"""

from image_losses import ratio  # isort: skip  (before torch)

import copy
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jobs import Halt
from lightning.pytorch import LightningDataModule, Trainer
from memory import Recorded
from timing import Pause, Turns
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import ImageDistiller
from lit_distill.image.methods.ab import AB
from lit_distill.image.methods.at import AT
from lit_distill.image.methods.cc import CC
from lit_distill.image.methods.crd import CRD
from lit_distill.image.methods.dist import DIST
from lit_distill.image.methods.dkd import DKD
from lit_distill.image.methods.fitnets import FitNets
from lit_distill.image.methods.fsp import FSP
from lit_distill.image.methods.ft import FT
from lit_distill.image.methods.ickd import ICKD
from lit_distill.image.methods.kd import KD
from lit_distill.image.methods.nst import NST
from lit_distill.image.methods.ofa import OFA
from lit_distill.image.methods.ofd import OFD
from lit_distill.image.methods.pkt import PKT
from lit_distill.image.methods.reviewkd import ReviewKD
from lit_distill.image.methods.rkd import RKD
from lit_distill.image.methods.sp import SP
from lit_distill.image.methods.vid import VID
from lit_distill.image.models import ResNetCIFAR
from lit_distill.losses import attention_transfer, forward_kl, hint_mse
from lit_distill.losses.contrastive import contrastive_nce, contrastive_normalizer, memory_similarity
from lit_distill.losses.exits import one_for_all
from lit_distill.losses.logits import decoupled_kl, pearson_relation
from lit_distill.losses.maps import (
    activation_boundary,
    factor_transfer,
    flow_of_solution,
    hierarchical_context,
    margin_relu,
    partial_l2,
    variational_information,
)
from lit_distill.losses.relations import (
    channel_correlation,
    correlation_congruence,
    neuron_selectivity,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)

BATCH, BATCHES, CLASSES, SAMPLES = 64, 32, 100, 50_000
ROUNDS, WARMUP, TARGET = 7, 1, 1.10


class Fixed(LightningDataModule):
    """Random images of CIFAR's size, in batches that are made once."""

    num_classes = CLASSES
    sample_shape = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
        index = torch.randperm(SAMPLES, generator=generator)[: BATCH * BATCHES].split(BATCH)
        images = (torch.randn(BATCH, 3, 32, 32, generator=generator) for _ in index)
        self.batches = [
            ImageBatch(x.to(memory_format=torch.channels_last), self.labels[i], i)
            for x, i in zip(images, index, strict=True)
        ]

    def train_labels(self) -> Tensor:
        """Labels of all samples, for memory banks."""
        return self.labels

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """The batches as they are."""
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]  # a list is a data set to it


# ---- by hand -------------------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """What a network computed: outputs of stem and stages, the sums before the stages' last ReLU, embedding, logits."""

    stem: Tensor
    stages: list[Tensor]
    before: list[Tensor]
    embedding: Tensor
    logits: Tensor


def said(network: ResNetCIFAR, images: Tensor, before_relu: bool) -> Said:
    """Runs a network and returns its features, those before activations only if they are wanted."""
    x = stem = F.relu(network.bn1(network.conv1(images)), inplace=True)
    stages, before = [], []
    for stage in (network.layer1, network.layer2, network.layer3):
        if before_relu:
            *blocks, last = stage
            for block in blocks:
                x = block(x)
            inner = F.relu(last.bn1(last.conv1(x)), inplace=True)
            before.append(last.bn2(last.conv2(inner)) + last.shortcut(x))
            x = F.relu(before[-1])
        else:
            x = stage(x)
        stages.append(x)
    embedding = network.pool(x)
    return Said(stem, stages, before, embedding, network.linear(embedding))


Parts = Any  # projectors of a method, by the names they have in its loss
Loss = Callable[[Parts, Said, Said, ImageBatch], Tensor]


def _kd(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    return 0.9 * forward_kl(s.logits, t.logits, temperature=4.0)


def _dkd(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    return decoupled_kl(s.logits, t.logits, batch.labels, temperature=4.0, alpha=1.0, beta=8.0)


def _dist(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    return 2 * pearson_relation(s.logits, t.logits, temperature=4.0)


def _fitnets(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    return 100 * hint_mse(parts.regressor(s.stages[1]), t.stages[1])


def _at(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    return 1000 * sum(map(attention_transfer, s.stages, t.stages))


def _sp(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    return 3000 * similarity_preserving(s.stages[2], t.stages[2])


def _rkd(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    return 25 * relational_distance(s.embedding, t.embedding) + 50 * relational_angle(s.embedding, t.embedding)


def _pkt(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    return 30000 * probabilistic_transfer(s.embedding, t.embedding)


def _cc(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    embedded = parts.student_embedding(s.embedding), parts.teacher_embedding(t.embedding)
    return 0.02 * correlation_congruence(*embedded)


def _nst(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    return 50 * sum(map(neuron_selectivity, s.stages, t.stages))


def _ickd(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    return 2.5 * channel_correlation(parts.connector(s.stages[2]), t.stages[2])


def _vid(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    means = [regress(x) for regress, x in zip(parts.regressors, s.stages, strict=True)]
    return sum(map(variational_information, means, t.stages, [F.softplus(a) + 1e-5 for a in parts.scales]))


def _ft(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    with torch.no_grad():
        factor = parts.paraphraser[0](t.stages[2])
    return 200 * factor_transfer(parts.translator(s.stages[2]), factor)


def _fsp(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    pairs = pairwise(zip([s.stem, *s.stages], [t.stem, *t.stages], strict=True))
    return sum(flow_of_solution(s1, s2, t1, t2) for (s1, t1), (s2, t2) in pairs)


def _ab(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    maps = zip((0.25, 0.5, 1.0), parts.connectors, s.before, t.before, strict=True)
    return 3 / 1000 * sum(weight * activation_boundary(connect(own), other) for weight, connect, own, other in maps)


def _ofd(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    margins = parts.margin0, parts.margin1, parts.margin2
    targets = map(margin_relu, t.before, margins)
    maps = zip((0.25, 0.5, 1.0), parts.connectors, s.before, targets, strict=True)
    return 0.001 * sum(weight * partial_l2(connect(own), target) for weight, connect, own, target in maps)


def _reviewkd(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    own = [*s.stages, s.embedding[:, :, None, None]]
    targets = [*t.before, t.embedding[:, :, None, None]]
    total, deeper = torch.zeros(()), None
    for level in (3, 2, 1, 0):
        fused, deeper = parts.fusions[level](own[level], deeper)
        total = total + hierarchical_context(fused, targets[level])
    return total


def _ofa(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    exits = [branch(x) for branch, x in zip(parts.exits, s.stages, strict=True)]
    return sum(one_for_all(logits, t.logits, batch.labels) for logits in (s.logits, *exits))


def _crd(parts: Parts, s: Said, t: Said, batch: ImageBatch) -> Tensor:
    own = F.normalize(parts.student_embedding(s.embedding), dim=1)
    others = F.normalize(parts.teacher_embedding(t.embedding), dim=1)
    start, size = parts.class_start[batch.labels, None], parts.class_size[batch.labels, None]
    place = torch.randint(2**62, (BATCH, 16_384)) % (SAMPLES - size)
    rows = torch.cat([batch.index[:, None], parts.by_class[place + size * (place >= start)]], dim=1)
    total = torch.zeros(())
    for anchor, memory, normalizer in (
        (own, parts.teacher_memory, parts.student_normalizer),
        (others, parts.student_memory, parts.teacher_normalizer),
    ):
        similarity = memory_similarity(anchor, memory.clone(), rows)
        first = contrastive_normalizer(similarity, num_samples=SAMPLES)
        normalizer.copy_(torch.where(normalizer > 0, normalizer, first))
        total = total + contrastive_nce(similarity, normalizer=normalizer, num_samples=SAMPLES)
    with torch.no_grad():
        for memory, embedding in ((parts.student_memory, own), (parts.teacher_memory, others)):
            moved = F.normalize(0.5 * memory[batch.index] + 0.5 * embedding, dim=1)
            memory.index_copy_(0, batch.index, moved)
    return 0.8 * total


class Method(NamedTuple):
    """A method, its teacher term by hand, and what that reads."""

    build: Callable[[nn.Module, nn.Module], ImageDistiller]
    loss: Loss
    student_before: bool = False
    teacher_before: bool = False
    label_weight: float = 1.0


METHODS = {
    "KD": Method(KD, _kd, label_weight=0.1),
    "DKD": Method(DKD, _dkd),
    "DIST": Method(DIST, _dist),
    "FitNets": Method(FitNets, _fitnets),
    "AT": Method(AT, _at),
    "SP": Method(SP, _sp),
    "RKD": Method(RKD, _rkd),
    "PKT": Method(PKT, _pkt),
    "CC": Method(CC, _cc),
    "NST": Method(NST, _nst),
    "ICKD": Method(ICKD, _ickd),
    "VID": Method(VID, _vid),
    "CRD": Method(CRD, _crd),
    # Its second phase; of AB and FSP the first, in which they read features.
    "FT": Method(lambda student, teacher: FT(student, teacher, init_iterations=1), _ft),
    "FSP": Method(FSP, _fsp, label_weight=0.0),
    "AB": Method(AB, _ab, student_before=True, teacher_before=True, label_weight=0.0),
    "OFD": Method(OFD, _ofd, student_before=True, teacher_before=True),
    "ReviewKD": Method(ReviewKD, _reviewkd, teacher_before=True),
    "OFA": Method(OFA, _ofa),
}


def by_hand(method: Method, distiller: ImageDistiller, batches: Iterator[ImageBatch], values: list[Tensor]) -> Turns:
    """A plain loop that goes on from copies of the networks and projectors of a distiller."""
    student, teacher = copy.deepcopy(distiller.student), distiller.teacher
    losses = copy.deepcopy(distiller.losses)
    parts = list(losses.values())[-1]
    if hasattr(parts, "paraphraser"):
        parts.paraphraser.eval()
    parameters = [*student.parameters(), *losses.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)

    def run(pause: Pause) -> None:
        for batch in batches:
            pause()
            with torch.no_grad():
                target = said(teacher, batch.images, method.teacher_before)  # type: ignore[arg-type]  # set where used
            own = said(student, batch.images, method.student_before)
            loss = method.loss(parts, own, target, batch)
            if method.label_weight:
                loss = loss + method.label_weight * F.cross_entropy(own.logits, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.detach())

    return run  # type: ignore[return-value]  # a closure of this very form


# ---- measuring -----------------------------------------------------------------------------------------------------


def report(name: str, method: Method, data: Fixed) -> None:
    """Measures one method and prints its line."""
    torch.manual_seed(0)
    distiller = method.build(ResNetCIFAR(8, CLASSES), ResNetCIFAR(20, CLASSES))

    def fit(pause: Pause) -> None:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1000,
            logger=False,
            callbacks=[Halt(pause, "step")],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(distiller, datamodule=data)

    memory, hand_memory = Recorded(), Recorded()
    ours = Turns(memory.around(fit))
    ours.take()
    ours.take()  # the first step; the copies are made before the second
    values: list[Tensor] = []
    batches = itertools.islice(itertools.cycle(data.batches), 1, None)
    hand = Turns(hand_memory.around(by_hand(method, distiller, batches, values)))
    hand.take()
    hand.take()
    ours.take()
    expected, own = float(values[0]), float(sum(distiller.terms.values()))
    # Negatives of CRD are drawn, so its loss differs a little.
    if abs(own - expected) > (1e-2 if name == "CRD" else 1e-4) * abs(expected):
        raise AssertionError(f"{name}: our loss is {own}, by hand it is {expected}")
    measured = ratio(ours.take, hand.take, ROUNDS, WARMUP)
    memory.wanted = hand_memory.wanted = True
    for _ in range(2):
        ours.take()
        hand.take()
    ours.finish()
    hand.finish()
    own_ms, hand_ms = (1000 * seconds for seconds in measured.seconds)
    print(f"{name:<10} {own_ms:>8.1f} {hand_ms:>8.1f} {measured} {TARGET:>7}", end="")
    print(f" {memory.peak / 1e6:>8.1f} {hand_memory.peak / 1e6:>8.1f}", flush=True)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of Lightning, about short runs: they would stand between the lines of the table
    fixed = Fixed()
    print(f"{ROUNDS} rounds; ratios of ours to the loop by hand within a round")
    print(f"{'':<10} {'ours ms':>8} {'hand ms':>8} {'ratio':>7} {'min':>7} {'max':>7} {'CPU':>7} {'target':>7}", end="")
    print(f" {'ours MB':>8} {'hand MB':>8}")
    for chosen in sys.argv[1:] or METHODS:
        report(chosen, METHODS[chosen], fixed)
