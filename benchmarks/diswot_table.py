"""Training-free scores of the 64 networks of the space S0 against their published accuracy after distillation.

    python benchmarks/diswot_table.py [--root FOLDER_WITH_CIFAR10] [--init normal] [--seeds 0 1 2]

Kendall's tau with the accuracy on CIFAR-100 after KD (from the authors' repository, `published_s0.csv`), which no score
has seen. Beside them stand parameters and FLOPs: what a score is worth is what it adds to them. Images are digits of
MNIST-5k, padded to 32x32 pixels and three channels, or of CIFAR-10; the labels are theirs, the heads have 100 classes.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import csv
import statistics
import time
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau, rankdata

from lit_distill.image import AttentionTransfer, CIFAR10DataModule, Hint, ImageBatch, LogitKL, MNIST5kDataModule
from lit_distill.image.losses.diswot import RelationSimilarity, SemanticSimilarity
from lit_distill.image.models import ResNetCIFAR
from lit_distill.image.search import ClassMapSimilarity, ResNetSpace, TrainingFreeScores, size

LOSSES = (SemanticSimilarity, RelationSimilarity, ClassMapSimilarity, LogitKL, AttentionTransfer, Hint)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of CIFAR-10; digits if left out")
    parser.add_argument("--init", choices=("own", "normal"), default="own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=100, help="outputs of all networks")
    options = parser.parse_args()
    torch.set_num_threads(1)

    published = read_published()
    space = ResNetSpace(options.classes)
    scores = TrainingFreeScores(
        lambda: ResNetCIFAR(56, options.classes),
        [loss() for loss in LOSSES],
        images(options.root, options.batch_size),
        options.seeds,
        options.init,
    )
    start = time.perf_counter()
    sizes, runs = [], []
    for architecture in space.architectures():
        sizes.append(size(lambda a=architecture: space.build(a), (3, 32, 32)))
        runs.append(scores.by_seed(lambda a=architecture: space.build(a)))
    seconds = time.perf_counter() - start

    kd = [published[architecture[:3]][0] for architecture in space.architectures()]
    vanilla = [published[architecture[:3]][1] for architecture in space.architectures()]
    names = [loss.name for loss in LOSSES]
    table = np.array([[[run[name] for name in names] for run in seeds] for seeds in runs])  # architecture, seed, score
    semantic, relation = table[..., 0], table[..., 1]
    columns = {
        "semantic": semantic,
        "relation": relation,
        "semantic + relation": semantic + relation,
        "rank sum of the two": rankdata(semantic, axis=0) + rankdata(relation, axis=0),
        **{f"minus {name}": table[..., place] for place, name in enumerate(names) if place > 1},
    }
    source = f"CIFAR-10 in {options.root}" if options.root else "MNIST-5k"
    print(
        f"{source}, batch {options.batch_size}, {options.classes} outputs, init '{options.init}', seeds {options.seeds}"
    )
    print(f"{seconds:.0f} s for {len(kd)} networks, {len(options.seeds)} seeds, {len(LOSSES)} losses; one thread")
    print("projectors, so less meaningful: " + (", ".join(sorted(scores.with_projectors)) or "none"))
    print("\n| score | tau, mean over seeds ± sd | tau of the mean score | its best network: KD accuracy |")
    print("|---|---|---|---|")
    for name, values in columns.items():
        taus = [tau(values[:, seed], kd) for seed in range(values.shape[1])]
        spread = statistics.stdev(taus) if len(taus) > 1 else float("nan")
        pooled = values.mean(1)
        print(row(name, f"{statistics.mean(taus):+.3f} ± {spread:.3f}", pooled, kd))
    for name in ("params", "flops"):
        print(row(name, "-", np.array([entry[name] for entry in sizes]), kd))
    print(row("published accuracy without KD", "-", np.array(vanilla), kd))


def row(name: str, by_seed: str, values: np.ndarray, kd: Sequence[float]) -> str:
    return f"| {name} | {by_seed} | {tau(values, kd):+.3f} | {kd[int(np.argmax(values))]:.2f} of {max(kd):.2f} |"


def tau(values: Sequence[float] | np.ndarray, kd: Sequence[float]) -> float:
    return float(kendalltau(values, kd).statistic)


def read_published() -> dict[tuple[int, ...], tuple[float, float]]:
    text = (files("lit_distill.image.search") / "published_s0.csv").read_text(encoding="utf-8")
    lines = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return {tuple(map(int, line["depths"])): (float(line["kd"]), float(line["vanilla"])) for line in lines}


def images(root: str | None, count: int) -> ImageBatch:
    """The first training images in the data module's order; digits are padded and repeated to 3x32x32."""
    data = CIFAR10DataModule(root=root, batch_size=count) if root else MNIST5kDataModule(batch_size=count)
    batch = next(iter(data.train_dataloader()))
    if root:
        return batch
    return batch._replace(images=F.pad(batch.images, (2, 2, 2, 2), value=float(batch.images.min())).repeat(1, 3, 1, 1))


if __name__ == "__main__":
    main()
