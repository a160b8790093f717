"""Two processes on the CPU (gloo) against one: the same batches, the same losses."""

import csv
import os
import subprocess
import sys

import pytest
import torch

from lit_distill.cli import main
from lit_distill.core.strategies import shard

CONFIG = """\
seed_everything: 3
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  limit_train_batches: 4
  limit_val_batches: 1
  limit_test_batches: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
model:
  class_path: lit_distill.image.Combined
  init_args:
    student:
      class_path: lit_distill.image.models.MLP
      init_args: {in_features: 64, num_classes: 10, hidden: [12, 12]}
    teacher:
      class_path: lit_distill.image.models.MLP
      init_args: {in_features: 64, num_classes: 10, hidden: [16, 16]}
    terms:
    - class_path: lit_distill.image.Term
      init_args: {loss: {class_path: lit_distill.image.LogitKL}, weight: 0.5}
    - class_path: lit_distill.image.Term
      init_args: {loss: {class_path: lit_distill.image.Hint}, weight: 10.0}
    optimizer:
      class_path: torch.optim.AdamW
      init_args: {lr: 0.01}
data:
  class_path: lit_distill.image.DigitsDataModule
  init_args: {batch_size: 32}
"""


TWO = """\
from lit_distill.cli import main

fsdp2 = ["--trainer.strategy", "fsdp2", "--trainer.devices", "2", "--run.test", "false"]
for name, options in {
    # The teacher cache makes a sharded teacher run outside of training, in both processes.
    "fsdp2": [*fsdp2, "--model.init_args.teacher_cache", "teacher.safetensors", "--trainer.max_epochs", "2"],
    "fsdp2-on": [
        *[*fsdp2, "--trainer.max_epochs", "3", "--trainer.precision", "bf16-mixed"],
        *["--ckpt_path", "runs/default/fsdp2/checkpoints/last.ckpt"],
    ],
    "ddp": ["--trainer.strategy", "ddp", "--trainer.devices", "2"],
}.items():
    assert main(["fit", "-c", "small.yaml", "--run.name", name, *options]) == 0, name
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strategies")
    (folder / "small.yaml").write_text(CONFIG)
    (folder / "two.py").write_text(TWO)
    return folder


def rows(folder, name):
    """Step -> row of metrics.csv as numbers."""
    with (folder / "runs" / "default" / name / "metrics.csv").open() as file:
        return {int(row["step"]): {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def fit(folder):
    """Runs the command in this process."""

    def run(name, *options):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("PL_GLOBAL_SEED", "3")  # the command sets it; so it is gone afterwards
            assert main(["fit", "-c", "small.yaml", "--run.name", name, *options]) == 0
        return rows(folder, name)

    return run


@pytest.fixture(scope="module")
def two(folder):
    """Runs three commands one after the other in two processes, which cost more to start than the commands."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "two.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: rows(folder, name) for name in ("fsdp2", "fsdp2-on", "ddp")}


def curve(rows, key="train/loss"):
    return [row[key] for _, row in sorted(rows.items()) if key in row]


@pytest.fixture(scope="module")
def alone(fit):
    return fit("alone", "--trainer.max_epochs", "2")


def test_one_process_learns(alone):
    losses = curve(alone)
    assert len(losses) == 8
    assert losses[-1] < losses[0]


def test_ddp_on_two_processes_is_one_process(two, alone):
    for key in ("train/loss", "train/kd", "train/hint", "train/ce"):
        assert curve(two["ddp"], key) == pytest.approx(curve(alone, key)[:4], abs=1e-5)
    assert curve(two["ddp"], "test/acc") != []


def test_fsdp2_on_two_processes_is_one_process_and_resumes(two, alone, folder):
    for key in ("train/loss", "train/kd", "train/hint", "train/ce"):
        assert curve(two["fsdp2"], key) == pytest.approx(curve(alone, key), abs=1e-5)
    saved = torch.load(folder / "runs/default/fsdp2/checkpoints/last.ckpt", weights_only=True)
    assert saved["iteration"] == 8
    shapes = {key: tuple(value.shape) for key, value in saved["state_dict"].items()}
    assert shapes["student.layer1.0.weight"] == (12, 64)  # whole, not one process's part
    assert not any(key.startswith("teacher") for key in shapes)
    on = two["fsdp2-on"]
    assert sorted(on)[0] == 8
    # In bfloat16 from here on: the loss goes on where it was.
    assert on[8]["train/loss"] == pytest.approx(curve(alone)[-1], rel=0.3)


def test_bf16_mixed_follows_float32(fit, alone):
    half = fit("bf16", "--trainer.precision", "bf16-mixed", "--run.test", "false")
    assert curve(half) == pytest.approx(curve(alone)[:4], rel=0.02)
    assert curve(half) != curve(alone)[:4]


def test_containers_without_parameters_are_left_alone():
    losses = torch.nn.ModuleDict({"kd": torch.nn.Identity()})
    shard(losses, None)  # needs no mesh, since there is nothing to shard
    assert type(losses["kd"]) is torch.nn.Identity
