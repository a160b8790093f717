"""Runs of the command in a fork of the test process, killed at a chosen event as by a power cut.

A fork starts with everything imported, so that a run takes its training time and not five seconds more.
"""

import csv
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import sklearn.datasets  # noqa: F401 (imported here once, not in every fork)
import torch
import torch.nn.functional as F
from torch import nn

from lit_distill.cli import main
from lit_distill.image.distillation import ImageDistiller

KILLED = -signal.SIGKILL


class DropoutNet(nn.Module):
    """Everything that a resume can get wrong in a forward pass: BatchNorm's running statistics and dropout."""

    stages = ("hidden",)

    def __init__(self, width: int = 16):
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU())
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(width, 10)

    def forward(self, images):
        return self.linear(self.dropout(self.hidden(images)))


class Adversarial(ImageDistiller):
    """A student against a critic of its logits: two optimizers with schedules; one steps every second batch."""

    def __init__(self, student: nn.Module, teacher: nn.Module, **kwargs):
        super().__init__(student, teacher, **kwargs)
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(10, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 1))

    def configure_optimizers(self):
        pair = [
            self.optimizer_with_schedule(list(part.parameters()), self.optimizer)
            for part in (self.student, self.critic)
        ]
        return [one["optimizer"] for one in pair], [one["lr_scheduler"] for one in pair]

    def training_step(self, batch, batch_idx):
        student, teacher = self.student(batch.images), self.run_teacher(batch).logits
        noise = torch.randn_like(student) * 0.1
        score = self.critic(student + noise).mean()
        loss = self.combine({"ce": F.cross_entropy(student, batch.labels), "critic": -0.1 * score})
        self.optimize(loss, 0, clip_norm=1.0)
        if self.iteration % 2 == 0:
            self.optimize(self.critic(student.detach()).mean() - self.critic(teacher).mean(), 1)


# ---- events --------------------------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, count=1):
    """Kills before call number `count` of a function or method."""

    def arm():
        _on_call(owner, name, count, lambda original, args, kwargs: die())

    return arm


def after(owner, name, count=1):
    """Kills when call number `count` has returned."""

    def arm():
        def event(original, args, kwargs):
            original(*args, **kwargs)
            die()

        _on_call(owner, name, count, event)

    return arm


def halfway(owner, name, count=1, path=1):
    """Kills when call number `count` has written half of its file; `path` says which argument names the file."""

    def arm():
        def event(original, args, kwargs):
            original(*args, **kwargs)
            file = Path(args[path])
            os.truncate(file, file.stat().st_size // 2)
            die()

        _on_call(owner, name, count, event)

    return arm


def _on_call(owner, name, count, event):
    original = getattr(owner, name)
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return event(original, args, kwargs) if calls == count else original(*args, **kwargs)

    setattr(owner, name, counted)


# ---- runs ----------------------------------------------------------------------------------------------------------


def run(words, log, arm=None):
    """Runs the command in a fork and returns its exit status, -9 if it was killed; its output is in `log`."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=([str(w) for w in words], log, arm))
    process.start()
    process.join()
    return process.exitcode


def _child(words, log, arm):
    with Path(log).open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    if arm is not None:
        arm()
    sys.exit(main(words))


def result(folder):
    """Everything of a finished run that must not depend on interruptions."""
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        "student": (folder / "student" / "model.safetensors").read_bytes(),
        "metrics": summary["metrics"],
        "panels": summary["panels"],
        "rows": [{k: v for k, v in row.items() if not k.startswith("efficiency/")} for row in rows],
        "partial files": [str(path.relative_to(folder)) for path in folder.rglob("*.partial")],
    }
