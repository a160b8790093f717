"""Losses between images' networks: ours against torchdistill's on the same tensors, forward and backward.

    python benchmarks/image_losses.py [name ...]

One line for each loss that both have, at sizes of CIFAR with batches of 64. "MB" is the most that the tensors of a call
add up to beyond its inputs (torch's profiler of allocations). Needs the extra 'bench'.
"""

import os

os.environ["KINETO_LOG_LEVEL"] = "9"  # before torch, or the profiler reports each start

import timing  # isort: skip  # noqa: F401  (imported to set the threads before torch)

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from memory import peak_bytes, recorder
from torch import Tensor
from torchdistill.losses import mid_level

from lit_distill.losses import attention_transfer, forward_kl, hint_mse
from lit_distill.losses.contrastive import contrastive_nce, contrastive_normalizer, memory_similarity
from lit_distill.losses.logits import pearson_relation, standardize_logits
from lit_distill.losses.maps import (
    activation_boundary,
    factor_transfer,
    flow_of_solution,
    hierarchical_context,
    variational_information,
)
from lit_distill.losses.relations import (
    channel_correlation,
    kernel_congruence,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)

BATCH, CLASSES, SAMPLES = 64, 100, 50_000
MAPS = (64, 8, 8), (32, 16, 16)
EMBEDDINGS = (64,), (256,)
ROUNDS, WARMUP, TURN = 25, 3, 0.01
PAIR = {"pair": {"student": {"path": "s", "io": "output"}, "teacher": {"path": "t", "io": "output"}}}
LOGITS = ("s", "output", "t", "output")


class Case(NamedTuple):
    """A loss and its inputs. `ours` takes the tensors; `theirs` the student's and the teacher's in dictionaries."""

    name: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    student: Tensor
    teacher: Tensor


def cases() -> Iterator[Case]:
    """Yields all losses at all sizes."""
    labels = torch.randint(CLASSES, (BATCH,))
    logits = _pair((CLASSES,))

    def kd(student: Tensor, teacher: Tensor) -> Tensor:
        return 0.1 * F.cross_entropy(student, labels) + 0.9 * forward_kl(student, teacher, temperature=4.0)

    their_kd = mid_level.KDLoss(*LOGITS, temperature=4.0, alpha=0.1)
    yield Case("kd", kd, lambda s, t: their_kd(s, t, labels), *logits)

    def ls(student: Tensor, teacher: Tensor) -> Tensor:
        return forward_kl(standardize_logits(student), standardize_logits(teacher), temperature=2.0, scale_by_t2=False)

    yield Case("ls", ls, mid_level.LogitStdKDLoss(*LOGITS, temperature=2.0, beta=1.0), *logits)
    their_dist = mid_level.DISTLoss(*LOGITS, tau=4.0)
    yield Case("dist", lambda s, t: pearson_relation(s, t, temperature=4.0), their_dist, *logits)
    for shape in MAPS:
        yield from _of_maps(shape)
    for shape in EMBEDDINGS:
        yield from _of_embeddings(shape)
    yield _rkd(128, (512,))
    for negatives in (1024, 16_384):
        yield _crd(negatives)


def _of_maps(shape: tuple[int, ...]) -> Iterator[Case]:
    maps, variance = _pair(shape), torch.rand(shape[0]) + 0.5
    hint = mid_level.SimpleLossWrapper(
        torch.nn.MSELoss(),
        input={"is_from_teacher": False, "module_path": "s", "io": "output"},
        target={"is_from_teacher": True, "module_path": "t", "io": "output"},
    )
    yield Case("hint", hint_mse, lambda s, t: hint(s, t, None), *maps)
    yield Case("at", attention_transfer, mid_level.ATLoss(PAIR, mode="code"), *maps)
    yield Case("sp", similarity_preserving, mid_level.SPKDLoss("s", "t", reduction="batchmean"), *maps)
    yield Case("ickd", channel_correlation, mid_level.ChSimLoss(PAIR), *maps)

    their_vid, their_variance = mid_level.VIDLoss(PAIR), variance.view(1, -1, 1, 1)
    yield Case(
        "vid",
        lambda s, t: variational_information(s, t, variance),
        lambda s, t: their_vid({"s": {"output": (s["s"]["output"], their_variance)}}, t),
        *maps,
    )
    yield Case("ft", factor_transfer, mid_level.FTLoss(paraphraser_path="t", translator_path="s"), *maps)
    yield Case("ab", activation_boundary, mid_level.AltActTransferLoss(PAIR, margin=1.0, reduction="mean"), *maps)

    hcl = mid_level.HierarchicalContextLoss(*LOGITS)
    yield Case("hcl", hierarchical_context, lambda s, t: hcl({"s": {"output": (s["s"]["output"], None)}}, t), *maps)

    # The deeper map has half the grid and twice the channels.
    deep_student, deep_teacher = (x.detach() for x in _pair((2 * shape[0], shape[1] // 2, shape[2] // 2)))
    taps = {"student_first": "s", "student_second": "d", "teacher_first": "t", "teacher_second": "d"}
    fsp = mid_level.FSPLoss({"pair": {key: {"path": path, "io": "output"} for key, path in taps.items()}})
    deep = {"output": deep_student}, {"output": deep_teacher}
    yield Case(
        "fsp",
        lambda s, t: flow_of_solution(s, deep_student, t, deep_teacher),
        lambda s, t: fsp(s | {"d": deep[0]}, t | {"d": deep[1]}),
        *maps,
    )


def _of_embeddings(shape: tuple[int, ...]) -> Iterator[Case]:
    yield _rkd(BATCH, shape)
    yield Case("pkt", probabilistic_transfer, mid_level.PKTLoss(*LOGITS), *_pair(shape))
    kernel = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
    yield Case("cc (kernel)", kernel_congruence, mid_level.CCKDLoss("s", "t", kernel, reduction="sum"), *_pair(shape))


def _rkd(batch: int, shape: tuple[int, ...]) -> Case:
    def rkd(student: Tensor, teacher: Tensor) -> Tensor:
        return 25 * relational_distance(student, teacher) + 50 * relational_angle(student, teacher)

    return Case("rkd", rkd, mid_level.RKDLoss("s", "t", 25.0, 50.0, reduction="mean"), *_pair(shape, batch))


def _crd(negatives: int, width: int = 128) -> Case:
    """With the same rows for both: theirs cannot draw them. The banks are moved, as in a step."""
    student, teacher = (F.normalize(x.detach(), dim=1) for x in _pair((width,)))
    rows = torch.randint(SAMPLES, (BATCH, negatives + 1))
    rows[:, 0] = torch.randperm(SAMPLES)[:BATCH]
    loss = mid_level.CRDLoss("s", "e", "t", width, SAMPLES, negatives, SAMPLES)
    known = {"e": {"input": {"pos_idx": rows[:, 0], "contrast_idx": rows}}}
    banks = [F.normalize(torch.randn(SAMPLES, width), dim=1) for _ in range(2)]

    def crd(student: Tensor, teacher: Tensor) -> Tensor:
        values = []
        for anchor, bank in ((student, banks[1]), (teacher, banks[0])):
            similarity = memory_similarity(anchor, bank.clone(), rows)
            normalizer = contrastive_normalizer(similarity, num_samples=SAMPLES)
            values.append(contrastive_nce(similarity, normalizer=normalizer, num_samples=SAMPLES))
        for embedding, bank in ((student, banks[0]), (teacher, banks[1])):
            moved = F.normalize(0.5 * bank[rows[:, 0]] + 0.5 * embedding.detach(), dim=1)
            bank.index_copy_(0, rows[:, 0], moved)
        return values[0] + values[1]

    return Case(
        f"crd K={negatives}", crd, lambda s, t: loss(s | known, t), student.requires_grad_(), teacher.requires_grad_()
    )


def _pair(shape: tuple[int, ...], batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, *shape, requires_grad=True), torch.randn(batch, *shape)


# ---- measuring -----------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """Medians of two sides in seconds, and the ratios of the first to the second within a round."""

    seconds: tuple[float, float]
    wall: list[float]
    cpu: list[float]

    def __str__(self) -> str:
        median = statistics.median
        return f"{median(self.wall):>7.3f} {min(self.wall):>7.3f} {max(self.wall):>7.3f} {median(self.cpu):>7.3f}"


def ratio(ours: Callable[[], None], theirs: Callable[[], None], rounds: int, warmup: int) -> Ratio:
    """Runs two sides in turns, as `timing.compare` does, for a table with one line for both."""
    seconds: list[list[tuple[float, float]]] = [[], []]
    for number in range(warmup + rounds):
        for side, run in list(enumerate((ours, theirs)))[:: 1 if number % 2 else -1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            if number >= warmup:
                seconds[side].append((time.perf_counter() - start, time.process_time() - start_cpu))
    wall = [a[0] / b[0] for a, b in zip(*seconds, strict=True)]
    cpu = [a[1] / b[1] for a, b in zip(*seconds, strict=True)]
    return Ratio(tuple(statistics.median(x for x, _ in side) for side in seconds), wall, cpu)  # type: ignore[arg-type]  # always two sides


def _memory(run: Callable[[], None]) -> float:
    with recorder() as recorded:
        run()
    return peak_bytes(recorded) / 1e6


def _report(case: Case) -> None:
    leaves = [x for x in (case.student, case.teacher) if x.requires_grad]
    outputs = {"s": {"output": case.student}}, {"t": {"output": case.teacher}}

    def once(loss: Callable[..., Tensor], inputs: tuple[object, ...]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(loss(*inputs), leaves)

        return run

    ours, theirs = once(case.ours, (case.student, case.teacher)), once(case.theirs, outputs)
    theirs()
    start = time.perf_counter()
    ours()
    calls = max(1, round(TURN / (time.perf_counter() - start)))

    def repeated(run: Callable[[], None]) -> Callable[[], None]:
        def turn() -> None:
            for _ in range(calls):
                run()

        return turn

    rounds = ROUNDS if calls > 1 else 7
    measured = ratio(repeated(ours), repeated(theirs), rounds, WARMUP if calls > 1 else 1)
    own, other = (1e6 * seconds / calls for seconds in measured.seconds)
    name = f"{case.name} {tuple(case.student.shape)}"
    print(
        f"{name:<26} {own:>10.0f} {other:>10.0f} {measured} {_memory(ours):>9.2f} {_memory(theirs):>9.2f}", flush=True
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{'':<26} {'ours us':>10} {'theirs us':>10} {'ratio':>7} {'min':>7} {'max':>7} {'CPU':>7}", end="")
    print(f" {'ours MB':>9} {'theirs MB':>9}")
    for chosen in cases():
        if len(sys.argv) == 1 or chosen.name.split()[0] in sys.argv[1:]:
            _report(chosen)
