"""What a user can get wrong: one line that names the key, the value and the remedy, an exit status, nothing lost.

A row is a command, typed in a folder that holds the configurations below and one finished run. The command runs in this
process, since starting a new one costs seconds.
"""

import errno
import io
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lit_distill.cli import main
from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.loading import EpochPermutation, TensorLoader
from lit_distill.experiment.messages import explain

JOB = """\
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
model:
  class_path: lit_distill.image.Supervised
  init_args:
    student:
      class_path: lit_distill.image.models.MLP
      init_args:
        in_features: 64
        num_classes: 10
        hidden: [8]
    optimizer:
      class_path: torch.optim.SGD
      init_args:
        lr: 0.1
data:
  class_path: lit_distill.image.DigitsDataModule
  init_args:
    batch_size: 50
    train_size: 100
"""
TEACHER = """\
    teacher:
      class_path: lit_distill.core.pretrained
      init_args:
        weights: runs/demo/teacher
    optimizer:
"""
KD = JOB.replace("image.Supervised", "image.KD").replace("    optimizer:\n", TEACHER)
FITNETS = JOB.replace("image.Supervised", "image.FitNets").replace("    optimizer:\n", TEACHER)
# The same for other methods: their files are named after them, in small letters.
METHODS = (
    "AB",
    "BAN",
    "BDKD",
    "CRD",
    "CTKD",
    "DefensiveDistillation",
    "DIST",
    "DKD",
    "DML",
    "FT",
    "LELP",
    "MLKD",
    "NST",
    "OFA",
    "OFD",
    "ReviewKD",
    "RKD",
    "SP",
    "TfKD",
    "VID",
)
TEACHERS = JOB.replace("image.Supervised", "image.MultiTeacherKD").replace(
    "    optimizer:\n",
    """\
    teachers:
    - {class_path: lit_distill.core.pretrained, init_args: {weights: runs/demo/teacher}}
    - {class_path: lit_distill.image.models.MLP, init_args: {in_features: 64, num_classes: 7, hidden: [8]}}
    optimizer:
""",
)
CIFAR = """\
model:
  class_path: lit_distill.image.Supervised
  init_args:
    student:
      class_path: lit_distill.image.models.MLP
      init_args: {in_features: 3072, num_classes: 10, hidden: [4]}
"""
FOLDER = """\
data:
  class_path: lit_distill.image.ImageFolderDataModule
  init_args: {root: images, batch_size: 2, num_workers: 0, image_size: 8}
"""
# Twenty graphs of three nodes: paths, and triangles. No network is trained on them here.
GRAPHS = """\
model:
  class_path: lit_distill.graph.GraphClassifier
  init_args:
    student: &network
      class_path: lit_distill.graph.GraphNetwork
      init_args:
        gnn:
          class_path: torch_geometric.nn.models.GIN
          init_args: {in_channels: 4, hidden_channels: 4, num_layers: 1}
        node_values: [3]
        num_classes: 2
data:
  class_path: lit_distill.graph.TUDataModule
  init_args: {root: tu, name: TINY, batch_size: 4}
"""
GRAPH_KD = GRAPHS.replace("GraphClassifier", "KD").replace("data:\n", "    teacher: *network\ndata:\n")
GRAPH_LSP = GRAPH_KD.replace("graph.KD", "graph.LSP")
SOURCE = """\
    source:
      class_path: lit_distill.graph.TUDataModule
      init_args: {root: tu, name: TINY}
"""
FROM_GRAPHS = {
    name: GRAPHS.partition("data:")[0] + f"data:\n  class_path: lit_distill.graph.{name}\n  init_args:\n{SOURCE}{rest}"
    for name, rest in {
        "Mirage": "    depth: 1\n    threshold: [0.5, 0.5]\n",
        "RandomSubset": "    per_class: 2\n",
        "KCenter": "    per_class: 2\n    network: *network\n",
        "DistilledGraphs": "    folder: distilled\n",
    }.items()
}
NETWORK = """\
      class_path: lit_distill.dataset.DistillationConvNet
      init_args: {num_classes: 10, width: 4, depth: 2, image_size: 8, in_channels: 1}
"""
DIGITS = "class_path: lit_distill.image.DigitsDataModule"
SYNTHESIS = {
    name: f"model:\n  class_path: lit_distill.dataset.{kind}\n  init_args:\n    student: &network\n{NETWORK}"
    f"    student_epochs: 1\n{rest}data:\n  {DIGITS}\n"
    for name, (kind, rest) in {
        "dm": ("DistributionMatching", ""),
        "mtt": ("TrajectoryMatching", "    experts: experts\n"),
        "sre2l": ("SRe2L", "    teacher: *network\n"),
        "cvdd": ("CommitteeRecovery", "    members: [*network, *network]\n"),
    }.items()
}
EVALUATION = f"model:\n  class_path: lit_distill.dataset.DistilledSetEvaluation\n  init_args:\n    student:\n{NETWORK}"
FROM_IMAGES = {
    name: f"{EVALUATION}data:\n  class_path: lit_distill.dataset.{kind}\n  init_args:\n{rest}"
    for name, (kind, rest) in {
        "few": ("RandomSubset", f"    source: {{{DIGITS}}}\n    per_class: 2\n"),
        "distilled": ("DistilledImages", f"    source: {{{DIGITS}}}\n    folder: nothing\n"),
        "relabelled": (
            "RelabelledImages",
            f"    images: {{class_path: lit_distill.dataset.RandomSubset, init_args: {{source: {{{DIGITS}}}}}}}\n"
            "    teachers: []\n",
        ),
    }.items()
}
RECIPE = """\
experiment: chain
configs: [job.yaml]
stages:
  one: {}
  two:
    configs: [kd.yaml]
    set: {model.init_args.teacher.init_args.weights: "${stage:one}"}
"""
FIT = "fit -c job.yaml"
WEIGHTS = Path("runs/demo/teacher/student/model.safetensors")
LAST = Path("checkpoints/last.ckpt")


def _write_graphs():
    for name, text in {"graphs": GRAPHS, "graph_kd": GRAPH_KD, "graph_lsp": GRAPH_LSP, **FROM_GRAPHS}.items():
        Path(f"{name.lower()}.yaml").write_text(f"{JOB.partition('model:')[0]}{text}")
    count = 20
    edges = [(3 * g + a, 3 * g + b) for g in range(count) for a, b in ((1, 2), (2, 3), (3, 1))[: 2 + g % 2]]
    lines = {
        "A": [f"{a}, {b}" for pair in edges for a, b in (pair, pair[::-1])],
        "graph_indicator": [g + 1 for g in range(count) for _ in range(3)],
        "graph_labels": [g % 2 for g in range(count)],
        "node_labels": [label for _ in range(count) for label in range(3)],
    }
    Path("tu/TINY").mkdir(parents=True)
    for part, values in lines.items():
        Path(f"tu/TINY/TINY_{part}.txt").write_text("".join(f"{value}\n" for value in values))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which a teacher was trained."""
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name, text in {"job": JOB, "kd": KD, "fitnets": FITNETS, "cifar": CIFAR, "recipe": RECIPE}.items():
            Path(f"{name}.yaml").write_text(text)
        for name in METHODS:
            Path(f"{name.lower()}.yaml").write_text(KD.replace("image.KD", f"image.{name}"))
        Path("teachers.yaml").write_text(TEACHERS)
        _write_graphs()
        for name, text in {**SYNTHESIS, **FROM_IMAGES}.items():
            Path(f"{name}.yaml").write_text(f"{JOB.partition('model:')[0]}{text}")
        assert main(shlex.split("fit -c job.yaml --run.experiment demo --run.name teacher")) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def workplace(finished, tmp_path, monkeypatch):
    """A copy of that folder, as the working directory."""
    place = tmp_path / "place"
    shutil.copytree(finished, place)
    monkeypatch.chdir(place)
    return place


# ---- preparations: what lies in the working directory before the command -------------------------------------------


def _write(name: str, content: str | bytes) -> Callable[[pytest.MonkeyPatch], None]:
    def prepare(monkeypatch):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def _change(name: str, old: str, new: str) -> Callable[[pytest.MonkeyPatch], None]:
    def prepare(monkeypatch):
        text = Path(name).read_text()
        assert old in text
        Path(name).write_text(text.replace(old, new))

    return prepare


def _cut(path: Path) -> Callable[[pytest.MonkeyPatch], None]:
    def prepare(monkeypatch):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return prepare


def _killed(monkeypatch):
    """The run was killed after its first epoch; its last checkpoint is half of one."""
    (Path("runs/demo/teacher") / "summary.json").unlink()
    _cut(Path("runs/demo/teacher") / LAST)(monkeypatch)


def _unfinished(monkeypatch):
    (Path("runs/demo/teacher") / "summary.json").unlink()
    shutil.rmtree("runs/demo/teacher/student")


def _other_weights(monkeypatch):
    shutil.copy(WEIGHTS, "teacher.safetensors")


def _one_class(monkeypatch):
    Path("folder.yaml").write_text(FOLDER)
    for number in range(4):
        Path("images/train/cat").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(f"images/train/cat/{number}.png")


def _no_images(monkeypatch):
    Path("folder.yaml").write_text(FOLDER)
    for name in ("cat", "dog"):
        Path("images/train", name).mkdir(parents=True)


def _labels_out_of_range(monkeypatch):
    """An archive of two images with the labels 3 and 10."""
    strip = io.BytesIO()
    Image.new("RGB", (32, 64)).save(strip, "webp", lossless=True)
    webp = np.frombuffer(strip.getvalue(), np.uint8)
    part = {"webp": webp, "offsets": np.array([0, len(webp)]), "labels": np.array([3, 10])}
    arrays = {f"{split}_{key}": value for split in ("train", "test") for key, value in part.items()}
    np.savez("cifar10.npz", classes=np.array([str(number) for number in range(10)]), **arrays)


def _no_shape(monkeypatch):
    """The run was one on samples without one shape, such as graphs."""
    path = Path("runs/demo/teacher/summary.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_shape": None}))


def _stale_cache(monkeypatch):
    """A cache that says of itself that it was made from other data."""
    save_file({"logits": torch.zeros(100, 10)}, "cache.st", metadata={"fingerprint": json.dumps({"teacher": "other"})})


def _full_disk(monkeypatch, checkpoints: int = 0):
    """The disk fills up after so many checkpoints, when the next one is flushed."""
    flush, left = os.fsync, [None] * checkpoints

    def fsync(handle):
        if "last.ckpt" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left.pop()
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def _full_disk_in_torch(monkeypatch):
    """The disk is full when torch writes, which torch reports in a way of its own."""

    def save(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(torch, "save", save)


class Mistake(NamedTuple):
    """A wrong command, the exit status, what its line says, and what is done to the working directory before."""

    name: str
    command: str
    status: int
    says: tuple[str, ...]
    prepare: Callable[[pytest.MonkeyPatch], None] | None = None


def _recipe(name: str, old: str, new: str, *says: str, command: str = "run recipe.yaml --dry-run") -> Mistake:
    return Mistake(name, command, 2, says, _change("recipe.yaml", old, new) if old else None)


MISTAKES = [
    Mistake("no images", "fit -c dm.yaml --model.per_class 0", 2, ("model.per_class is 0", "1 or more")),
    Mistake(
        "more images than there are", "fit -c dm.yaml --model.per_class 900", 2, ("model.per_class is 900", "lower it")
    ),
    Mistake(
        "unknown augmentation", "fit -c dm.yaml --model.operations color_blur", 2, ("'color_blur'", "no 'blur'", "flip")
    ),
    Mistake("no real batch", "fit -c dm.yaml --model.real_batch 0", 2, ("model.real_batch is 0", "1 or more")),
    Mistake("subset too large", "fit -c few.yaml --data.per_class 900", 2, ("data.per_class is 900", "smallest class")),
    Mistake("unknown reference run", "fit -c few.yaml --model.runs.best x", 2, ("no 'best'", "real, hard, random")),
    Mistake(
        "reference run is none", "fit -c few.yaml --model.runs.real x", 2, ("x is no finished run", "run it first")
    ),
    Mistake("no distilled images", "fit -c distilled.yaml", 2, ("nothing holds no distilled images", "distilled/")),
    Mistake("no teachers for labels", "fit -c relabelled.yaml", 2, ("data.teachers is empty", "data.label_folder")),
    Mistake("no experts", "fit -c mtt.yaml", 2, ("experts holds no experts", "ExpertTrajectories")),
    Mistake("step size", "fit -c mtt.yaml --model.step_size 0", 2, ("model.step_size is 0", "above 0")),
    Mistake("statistics of a network without them", "fit -c sre2l.yaml", 2, ("no BatchNorm2d", "model.bn_weight to 0")),
    Mistake(
        "steps that end within a block",
        "fit -c sre2l.yaml --model.bn_weight 0 --model.recover_iterations 7",
        2,
        ("trainer.max_steps is -1", "set it to 70"),
    ),
    Mistake("committee without priors", "fit -c cvdd.yaml", 2, ("model.priors is missing", "'equal'")),
    Mistake(
        "priors that are shares", "fit -c cvdd.yaml --model.priors [0.6,0.5]", 2, ("[0.6, 0.5]", "percent, not shares")
    ),
    # The command line.
    Mistake("command", "fitt -c job.yaml", 2, ("'fitt'", "did you mean 'fit'")),
    Mistake("no-configuration", "fit", 2, ("model", "data", "-c FILE")),
    Mistake("no-dashes", "fit job.yaml", 2, ("'job.yaml'", "two dashes")),
    Mistake("top-level-key", f"{FIT} --trainr.max_epochs 1", 2, ("trainr.max_epochs", "mean trainer.max_epochs?")),
    Mistake("key-of-trainer", f"{FIT} --trainer.maxepochs 1", 2, ("trainer.maxepochs ", "mean trainer.max_epochs?")),
    Mistake("key-of-run", f"{FIT} --run.nme x", 2, ("run.nme", "mean run.name?")),
    Mistake("key-of-model", f"{FIT} --model.studnt x", 2, ("model.studnt", "Supervised", "mean model.student?")),
    Mistake("key-far-off", f"{FIT} --model.zzz 1", 2, ("model.zzz", "Supervised takes student, temperature,")),
    Mistake("key-of-network", f"{FIT} --model.student.in_feature 64", 2, ("MLP", "mean model.student.in_features?")),
    Mistake("key-of-optimizer", f"{FIT} --model.optimizer.momentm 1", 2, ("SGD", "mean model.optimizer.momentum?")),
    Mistake("type-of-rate", f"{FIT} --model.optimizer.lr fast", 2, ("model.optimizer.lr: 'fast'", "a number")),
    Mistake("type-of-epochs", f"{FIT} --trainer.max_epochs many", 2, ("max_epochs: 'many'", "whole number or null")),
    Mistake("type-of-batch", f"{FIT} --data.batch_size 1.5", 2, ("data.batch_size: '1.5'", "give a whole number")),
    Mistake(
        "type-in-a-list",
        "fit -c kd.yaml --model lit_distill.image.Combined --model.terms "
        """'[{loss: {class_path: lit_distill.image.LogitKL}, weight: heavy}]'""",
        2,
        ("model.terms.weight: 'heavy'", "a number", "class path"),
    ),
    Mistake("type-of-list", f"{FIT} --model.student.hidden 8", 2, ("model.student.hidden: '8'", "give a list")),
    Mistake("precision", f"{FIT} --trainer.precision bf61", 2, ("trainer.precision: 'bf61'", "bf16", "16-mixed")),
    Mistake("strategy", f"{FIT} --trainer.strategy fsdp3", 2, ("trainer.strategy: 'fsdp3'", "fsdp2")),
    Mistake("accelerator", f"{FIT} --trainer.accelerator gpuu", 2, ("trainer.accelerator: 'gpuu'", "cpu")),
    Mistake("no-gpu", f"{FIT} --trainer.accelerator gpu", 2, ("trainer.accelerator", "no gpu", "cpu")),
    Mistake("no-devices", f"{FIT} --trainer.devices 0", 2, ("trainer.devices: 0", "1 or more")),
    Mistake("no-threads", f"{FIT} --run.threads 0", 2, ("--run.threads is 0", "at least 1")),
    Mistake("no-nodes", f"{FIT} --trainer.num_nodes 0", 2, ("trainer.num_nodes: 0", "1 or more")),
    Mistake("negative-devices", f"{FIT} --trainer.devices -2", 2, ("trainer.devices", "1 or more")),
    Mistake("negative-seed", f"{FIT} --seed_everything -1", 2, ("seed_everything: -1", "from 0")),
    Mistake("checkpoint-steps", f"{FIT} --run.checkpoint_steps 0", 2, ("--run.checkpoint_steps is 0", "at least 1")),
    Mistake("run-name", f"{FIT} --run.name a/b", 2, ("--run.name is 'a/b'", "--run.experiment")),
    Mistake("no-value", f"{FIT} --run.name", 2, ("--run.name", "expected one argument")),
    Mistake(
        "key-inside-a-list",
        "fit -c kd.yaml --model lit_distill.image.Combined --model.terms "
        """'[{loss: {class_path: lit_distill.image.LogitKL, init_args: {temperatur: 1.0}}, weight: 1.0}]'""",
        2,
        ("LogitKL", "mean model.terms.loss.temperature?"),
    ),
    Mistake(
        "argument-missing",
        f"{FIT} --model.lr_scheduler torch.optim.lr_scheduler.StepLR",
        2,
        ("model.lr_scheduler.init_args.step_size missing", "StepLR"),
    ),
    Mistake("brace-missing", f"{FIT} '--data.train_size=${{data'", 2, ("data.init_args.train_size", "'${data'")),
    Mistake(
        "interpolation",
        f"{FIT} '--data.train_size=${{data.init_args.nope}}'",
        2,
        ("data.init_args.train_size", "${data.init_args.nope}", "in full"),
    ),
    # Class paths and module names.
    Mistake("module", f"{FIT} --model lit_distill.imag.KD", 2, ("model: lit_distill.imag.KD", "lit_distill.image.KD?")),
    Mistake("package", f"{FIT} --model lit_distil.KD", 2, ("model: lit_distil.KD", "no package 'lit_distil'")),
    Mistake("method", f"{FIT} --model lit_distill.image.Supervized", 2, ("model", "lit_distill.image.Supervised?")),
    Mistake("network", f"{FIT} --model.student lit_distill.image.models.MPL", 2, ("model.student: ", "models.MLP?")),
    Mistake("optimizer", f"{FIT} --model.optimizer torch.optim.Adm", 2, ("model.optimizer", "torch.optim.Adam?")),
    Mistake("data-as-model", f"{FIT} --model lit_distill.image.DigitsDataModule", 2, ("model", "no LightningModule")),
    Mistake("tap", "fit -c fitnets.yaml --model.student_tap layer7", 2, ("'layer7'", "MLP", "layer1")),
    # Configuration files.
    Mistake("config-missing", "fit -c absent.yaml", 2, ("--config", "absent.yaml", "working directory")),
    Mistake("config-no-yaml", "fit -c a.yaml", 2, ("a.yaml", "line 2", "correct"), _write("a.yaml", "a: [1\nb: c: d")),
    Mistake("config-empty", "fit -c a.yaml", 2, ("a.yaml is empty", "`model:`"), _write("a.yaml", "")),
    Mistake("config-prose", "fit -c a.yaml", 2, ("a.yaml", "'hello'", "`model:`"), _write("a.yaml", "hello")),
    Mistake("config-binary", "fit -c a.yaml", 2, ("a.yaml", "no text", "YAML"), _write("a.yaml", b"\x80\xff")),
    Mistake(
        "config-key",
        FIT,
        2,
        ("model.student.numclasses", "model.student.num_classes?"),
        _change("job.yaml", "num_classes", "numclasses"),
    ),
    # Weights and checkpoints.
    Mistake("weights-missing", "fit -c kd.yaml --model.teacher.weights runs/x", 2, ("weights: runs/x", "run folder")),
    Mistake("weights-corrupt", "fit -c kd.yaml", 1, ("weights", str(WEIGHTS), "truncated"), _cut(WEIGHTS)),
    Mistake(
        "weights-without-network",
        "fit -c kd.yaml --model.teacher.weights teacher.safetensors",
        2,
        ("teacher.safetensors", "add `network:`"),
        _other_weights,
    ),
    Mistake(
        "weights-of-another-depth",
        "fit -c kd.yaml --model.teacher.network lit_distill.image.models.MLP --model.teacher.network.in_features 64 "
        "--model.teacher.network.num_classes 10 --model.teacher.network.hidden [8,8]",
        2,
        ("runs/demo/teacher", "layer2", "depth"),
    ),
    Mistake("checkpoint-missing", f"{FIT} --ckpt_path a.ckpt", 2, ("--ckpt_path: a.ckpt", "does not exist")),
    Mistake(
        "checkpoint-truncated",
        f"{FIT} --run.name new --ckpt_path runs/demo/teacher/{LAST}",
        1,
        ("ckpt_path", str(LAST), "truncated", "delete"),
        _cut(Path("runs/demo/teacher") / LAST),
    ),
    Mistake(
        "own-checkpoint-truncated",
        f"{FIT} --run.experiment demo --run.name teacher",
        1,
        (f"runs/demo/teacher/{LAST}", "truncated", "delete"),
        _killed,
    ),
    Mistake(
        "checkpoint-of-another-kind",
        f"test -c runs/demo/teacher/config.yaml --ckpt_path {WEIGHTS}",
        2,
        ("--ckpt_path", "not a checkpoint", "lit_distill.core.pretrained"),
    ),
    # Networks and data that do not fit.
    Mistake("teacher-missing", "fit -c kd.yaml --model.teacher null", 2, ("model.init_args.teacher", "KD")),
    Mistake("student-classes", f"{FIT} --model.student.num_classes 9", 2, ("model.student has 9", "num_classes to 10")),
    Mistake(
        "teacher-classes",
        "fit -c kd.yaml --model.teacher lit_distill.image.models.MLP --model.teacher.in_features 64 "
        "--model.teacher.num_classes 7",
        2,
        ("model.teacher has 7", "num_classes to 10"),
    ),
    Mistake("input-size", f"{FIT} --model.student.in_features 63", 2, ("MLP", "(1, 8, 8)", "63")),
    Mistake("data-missing", f"{FIT} -c a.yaml", 2, ("data.root", "images", "train/"), _write("a.yaml", FOLDER)),
    Mistake("data-one-class", f"{FIT} -c folder.yaml", 2, ("images/train", "1 class", "two"), _one_class),
    Mistake("data-empty", f"{FIT} -c folder.yaml", 2, ("data.root", "images/train", "add images"), _no_images),
    Mistake("batch-zero", f"{FIT} --data.batch_size 0", 2, ("data.batch_size: 0", "1 or more")),
    Mistake("batch-negative", f"{FIT} --data.batch_size -3", 2, ("data.batch_size: -3", "1 or more")),
    Mistake("batch-too-large", f"{FIT} --data.batch_size 101", 2, ("data.batch_size: 101", "100", "lower")),
    Mistake("train-size", f"{FIT} --data.train_size 9999", 2, ("data.train_size: 9999", "1197", "lower")),
    Mistake("val-size", f"{FIT} --data.val_size 1797", 2, ("data.val_size", "1797", "lower")),
    Mistake(
        "root-missing",
        "fit -c job.yaml -c cifar.yaml --data lit_distill.image.CIFAR10DataModule --data.root nowhere",
        2,
        ("data.root: nowhere", "cifar10.npz", "data.download"),
    ),
    Mistake(
        "labels-out-of-range",
        "fit -c job.yaml -c cifar.yaml --data lit_distill.image.CIFAR10DataModule --data.root .",
        2,
        ("labels", "3 to 10", "0 to 9"),
        _labels_out_of_range,
    ),
    # Graphs.
    Mistake("graphs-unknown", "fit -c graphs.yaml --data.name TINI", 2, ("data.root: tu", "TINI.zip", "data.download")),
    Mistake("graphs-missing", "fit -c graphs.yaml --data.root nowhere", 2, ("data.root: nowhere", "data.download")),
    Mistake("graph-classes", "fit -c graphs.yaml --model.student.num_classes 3", 2, ("student has 3", "the data 2")),
    Mistake(
        "graph-labels",
        "fit -c graphs.yaml --model.student.node_values [2]",
        2,
        ("model.student.node_values is [2]", "have [3]", "set it"),
    ),
    Mistake(
        "no-graph-network",
        "fit -c graphs.yaml --model.student torch_geometric.nn.models.GIN --model.student.in_channels 4 "
        "--model.student.hidden_channels 4 --model.student.num_layers 1",
        2,
        ("model.student is GIN", "`gnn`", "GraphNetwork"),
    ),
    Mistake("graph-temperature", "fit -c graph_kd.yaml --model.temperature 0.0", 2, ("temperature is 0", "above 0")),
    Mistake("graph-teacher-missing", "fit -c graph_kd.yaml --model.teacher null", 2, ("model.init_args.teacher", "KD")),
    Mistake("kernel-width", "fit -c graph_lsp.yaml --model.sigma 0.0", 2, ("model.sigma is 0.0", "above 0")),
    Mistake(
        "thresholds", "fit -c mirage.yaml --data.threshold [0.5,0.5,0.5]", 2, ("threshold has 3 values", "2 classes")
    ),
    Mistake(
        "threshold-too-high",
        "fit -c mirage.yaml --data.threshold [2,9]",
        2,
        ("9 or more of the 8 graphs of class '1'", "is in 8", "lower the threshold"),
    ),
    Mistake(
        "too-many-itemsets",
        "fit -c mirage.yaml --data.max_itemsets 3",
        2,
        ("more than 3 itemsets", "support of 4", "raise max_itemsets"),
    ),
    Mistake("depth", "fit -c mirage.yaml --data.depth -1", 2, ("data.depth is -1", "0 or more")),
    Mistake("distilled-missing", "fit -c distilledgraphs.yaml", 2, ("distilled holds no distilled.json", "RUN/")),
    Mistake(
        "distilled-version",
        "fit -c distilledgraphs.yaml",
        2,
        ("distilled", "version 99", "version 1", "distil again"),
        _write("distilled/distilled.json", '{"kind": "trees", "version": 99}'),
    ),
    Mistake(
        "distilled-corrupt",
        "fit -c distilledgraphs.yaml",
        1,
        ("distilled/distilled.json", "cannot be read", "distil again"),
        _write("distilled/distilled.json", '{"kind": "trees"'),
    ),
    Mistake(
        "budget",
        "fit -c randomsubset.yaml --data.per_class null --data.bytes 0",
        2,
        ("data.bytes is 0", "1 or more"),
    ),
    Mistake("per-class", "fit -c randomsubset.yaml --data.per_class 9", 2, ("data.per_class is 9", "has 8", "lower")),
    Mistake(
        "network-of-other-labels",
        "fit -c kcenter.yaml --data.network.node_values [2]",
        2,
        ("data.network.node_values is [2]", "have [3]"),
    ),
    # Values that make no sense.
    Mistake("diverged", f"{FIT} --model.optimizer.lr 1e30", 1, ("train/ce is nan", "learning rate", "gradient_clip")),
    Mistake("temperature", "fit -c kd.yaml --model.temperature 0", 2, ("temperature is 0", "above 0")),
    *(
        Mistake(
            f"temperature of {name}", f"fit -c {name}.yaml --model.temperature 0.0", 2, ("temperature is 0", "above 0")
        )
        for name in ("dkd", "tfkd", "ofa", "bdkd", "defensivedistillation")
    ),
    Mistake(
        "relation tap", "fit -c rkd.yaml --model.student_tap layr1", 2, ("'layr1' is not a module of MLP", "layer1")
    ),
    Mistake("maps of a perceptron", "fit -c nst.yaml", 2, ("nst", "'layer1' has shape (8,)", "(C, H, W)")),
    Mistake(
        "unpaired taps", "fit -c vid.yaml --model.teacher_taps [layer1,linear]", 2, ("1 student taps", "2 teacher taps")
    ),
    Mistake("decoupled weight", "fit -c dkd.yaml --model.beta -1.0", 2, ("beta is -1.0", "0 or more")),
    Mistake("no temperatures", "fit -c mlkd.yaml --model.temperatures []", 2, ("temperatures is empty", "[2, 3")),
    Mistake("curriculum", "fit -c ctkd.yaml --model.minimum 0.0", 2, ("minimum is 0.0", "above 0")),
    Mistake("classes of one sample", "fit -c dist.yaml --data.batch_size 1", 2, ("data.batch_size", "2 or more")),
    Mistake("relations of one sample", "fit -c sp.yaml --data.batch_size 1", 2, ("data.batch_size", "sp", "2 or more")),
    Mistake("one subclass", "fit -c lelp.yaml", 2, ("model.student is MLP", "SubclassClassifier")),
    Mistake("no peers", f"{FIT} --model lit_distill.image.DML --model.peers []", 2, ("model.peers is empty",)),
    Mistake("balance", "fit -c bdkd.yaml --model.nu 0.0", 2, ("model.nu is 0.0", "above 0")),
    Mistake("first phase", "fit -c ft.yaml --model.init_iterations 0", 2, ("init_iterations is 0", "at least 1")),
    Mistake("levels of a perceptron", "fit -c reviewkd.yaml", 2, ("review", "'layer1' has shape (8,)", "(C, H, W)")),
    Mistake("margins unknown", "fit -c ofd.yaml", 2, ("ofd", "BatchNorm", "margins")),
    Mistake("variant", "fit -c ban.yaml --model.variant best", 2, ("model.variant", "best")),
    Mistake("label noise", f"{FIT} --data.label_noise 1.5", 2, ("data.label_noise", "1.5", "0 to 1")),
    Mistake(
        "timm name",
        f"{FIT} --model.student lit_distill.image.models.TimmClassifier --model.student.name resnet1 "
        "--model.student.num_classes 10",
        2,
        ("timm has no model 'resnet1'", "nearest"),
    ),
    Mistake("negatives", "fit -c crd.yaml --model.negatives 0", 2, ("negatives is 0", "1 or more")),
    Mistake("exponent", "fit -c ofa.yaml --model.exponent 0.5", 2, ("exponent is 0.5", "1 or more")),
    Mistake("teachers of other classes", "fit -c teachers.yaml", 2, ("10, 7 classes", "same classes")),
    Mistake(
        "one teacher",
        "fit -c teachers.yaml --model.teachers "
        """'[{"class_path": "lit_distill.core.pretrained", "init_args": {"weights": "runs/demo/teacher"}}]'""",
        2,
        ("model.teachers holds 1 network", "two or more"),
    ),
    Mistake(
        "schedule",
        "fit -c kd.yaml --model.temperature lit_distill.core.Linear --model.temperature.start 1.0 "
        "--model.temperature.end 2.0 --model.temperature.iterations -5",
        2,
        ("iterations is -5", "at least 1"),
    ),
    Mistake("nothing-to-train-on", f"{FIT} --model.label_weight 0.0", 2, ("model.label_weight is 0", "no teacher")),
    Mistake(
        "cache-stale", "fit -c kd.yaml --model.teacher_cache cache.st", 2, ("cache.st is stale", "delete"), _stale_cache
    ),
    Mistake(
        "cache-corrupt",
        "fit -c kd.yaml --model.teacher_cache a.st",
        1,
        ("a.st is corrupt", "delete"),
        _write("a.st", b"half of a cache"),
    ),
    Mistake(
        "cache-with-augmentation",
        "fit -c kd.yaml --model.teacher_cache new.st --data.augment true",
        2,
        ("model.teacher_cache", "augmented", "data.augment to false"),
    ),
    # The run folder.
    Mistake("folder-below-a-file", f"{FIT} --run.root job.yaml/runs", 2, ("job.yaml/runs", "Not a directory", "path")),
    Mistake(
        "other-configuration",
        f"{FIT} --run.experiment demo --run.name teacher --model.optimizer.lr 0.2",
        2,
        ("runs/demo/teacher", "optimizer.init_args.lr was 0.1, now 0.2", "--run.name"),
    ),
    Mistake(
        "foreign-files",
        f"{FIT} --run.name mine",
        2,
        ("runs/default/mine", "--run.name"),
        _write("runs/default/mine/thesis.tex", "years of work"),
    ),
    # Recipes.
    Mistake("recipe-missing", "run absent.yaml", 2, ("absent.yaml", "configs/")),
    Mistake("recipe-no-yaml", "run a.yaml", 2, ("a.yaml", "not YAML"), _write("a.yaml", "a: [1\nb: c: d")),
    Mistake("recipe-no-stages", "run job.yaml", 2, ("job.yaml", "no stages", "`stages:`")),
    _recipe("recipe-reference", "stage:one", "stage:uno", "'two'", "'uno'", "one, two"),
    _recipe("recipe-circle", "stage:one", "stage:two", "two", "circle", "remove"),
    _recipe("recipe-key", "experiment:", "experimnt:", "'experimnt'", "experiment"),
    _recipe("recipe-stage-key", "    set:", "    st:", "'two'", "'st'", "configs, seeds, set"),
    _recipe("recipe-config", "kd.yaml", "dk.yaml", "'two'", "dk.yaml", "configs/"),
    _recipe("recipe-seeds", "configs: [job", "seeds: [a]\nconfigs: [job", "seeds is ['a']", "[0, 1, 2]"),
    _recipe("recipe-only", "", "", "--only", "'three'", "one, two", command="run recipe.yaml --only three"),
    _recipe("recipe-no-seeds", "", "", "--seeds is 0", "at least 1", command="run recipe.yaml --seeds 0"),
    # Results.
    Mistake("compare-nothing", "compare", 2, ("DIR", "--help")),
    Mistake("compare-no-folder", "compare absent", 2, ("absent", "runs/quickstart")),
    Mistake("compare-no-runs", "compare empty", 2, ("empty", "config.yaml"), _write("empty/readme.txt", "")),
    Mistake("compare-metric", "compare runs --metric test/accc", 2, ("'test/accc'", "test/acc")),
    Mistake("export-nothing", "export", 2, ("RUN", "--to", "--help")),
    Mistake("export-unfinished", "export runs/demo/teacher --to new", 2, ("runs/demo/teacher", "finish"), _unfinished),
    Mistake("export-into-files", "export runs/demo/teacher --to runs", 2, ("--to: runs", "not empty", "new folder")),
    Mistake("export-format", "export runs/demo/teacher --to new --format tflite", 2, ("'tflite'", "safetensors")),
    Mistake(
        "export-without-shape",
        "export runs/demo/teacher --to new --format onnx",
        2,
        ("--format onnx", "runs/demo/teacher", "no one shape", "safetensors"),
        _no_shape,
    ),
    Mistake("methods-option", "methods --jsn", 2, ("--jsn", "--help")),
    Mistake("export-below-a-file", "export runs/demo/teacher --to job.yaml/new", 1, ("job.yaml/new", "choose another")),
    Mistake("compare-below-a-file", "compare runs --html job.yaml/a.html", 1, ("job.yaml/a.html", "choose another")),
    Mistake("run-below-a-file", "run recipe.yaml --root job.yaml", 2, ("job.yaml/chain", "Not a directory", "path")),
    # What the machine may do to a run.
    Mistake("disk-full", FIT, 1, ("last.ckpt", "No space left", "free space"), _full_disk),
    Mistake("disk-full-in-torch", FIT, 1, ("last.ckpt", "free space"), _full_disk_in_torch),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_mistake_gives_one_line_with_key_value_and_remedy_and_loses_nothing(mistake, workplace, monkeypatch, capsys):
    if mistake.prepare is not None:
        mistake.prepare(monkeypatch)
    before = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}

    status = main(shlex.split(mistake.command))

    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if "error: " in line]
    assert status == mistake.status, told.err
    assert len(lines) == 1, told.err
    assert lines[0].startswith("lit-distill: error: ")
    assert [part for part in mistake.says if part not in lines[0]] == [], lines[0]
    assert "Traceback" not in told.err + told.out
    assert {path: path.read_bytes() for path in before} == before


def test_full_disk_keeps_the_earlier_checkpoint_and_the_same_command_goes_on_from_it(workplace, capsys):
    words = shlex.split(f"{FIT} --trainer.max_epochs 3 --run.name new")
    with pytest.MonkeyPatch.context() as patch:
        _full_disk(patch, checkpoints=1)
        assert main(words) == 1

    folder = Path("runs/default/new")
    assert torch.load(folder / LAST, weights_only=True)["epoch"] == 0
    assert list(folder.rglob("*.partial")) == []
    assert main(words) == 0
    assert "resuming" in capsys.readouterr().err
    assert torch.load(folder / LAST, weights_only=True)["epoch"] == 2


def test_batch_that_processes_cannot_share_names_the_number_to_divide_by():
    with pytest.raises(UsageError, match=r"data\.batch_size: 50 .* 4 processes.*multiple of 4"):
        TensorLoader({"images": torch.zeros(100, 2)}, EpochPermutation(100), batch_size=50, world_size=4)


def test_every_kind_of_mistake_is_there_and_names_are_unique():
    names = [mistake.name for mistake in MISTAKES]
    assert len(set(names)) == len(names) >= 40


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.ckpt"), 1, "no space left on the disk (a.ckpt)"),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), 2, "/data: Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 1, "lower data.batch_size"),
        (ZeroDivisionError("division\nby zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_errors_of_the_machine_become_one_line(error, status, says):
    line, code = explain(error)
    assert code == status
    assert says in line
    assert "\n" not in line


def test_our_error_is_found_inside_the_one_that_a_library_wrapped_around_it():
    outer = ValueError("Problem with given class_path")
    outer.__cause__ = RunError("weights: a.safetensors is truncated")
    assert explain(outer) == ("weights: a.safetensors is truncated", 1)
