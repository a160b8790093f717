"""Training with cached teacher outputs against training without a teacher, and against running the teacher each time.

    python benchmarks/teacher_cache.py

ResNet-20 as student, ResNet-56 as teacher, batches of 128 images of CIFAR's size, not augmented. The filling of the
cache, one pass of the teacher, comes before the rounds.
"""

import timing  # isort: skip  (before torch)

import tempfile
from pathlib import Path

from jobs import ours

STUDENT = {"class_path": "lit_distill.image.models.ResNetCIFAR", "init_args": {"depth": 20, "num_classes": 10}}
TEACHER = {"class_path": "lit_distill.image.models.ResNetCIFAR", "init_args": {"depth": 56, "num_classes": 10}}
DATA = {"class_path": "jobs.RandomImages", "init_args": {"batch_size": 128, "images": 1024}}
ROUNDS = 24


def job(method, **init_args):
    model = {"class_path": f"lit_distill.image.{method}", "init_args": {"student": STUDENT, **init_args}}
    return ours({"model": model, "data": DATA}, "step")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "student alone": job("Supervised"),
            "cached teacher": job("KD", teacher=TEACHER, teacher_cache=str(Path(folder) / "teacher.safetensors")),
            "running teacher": job("KD", teacher=TEACHER),
        }
        timing.in_turns(sides, "student alone", ROUNDS, 3, "step", **{"cached teacher": 1.05})
