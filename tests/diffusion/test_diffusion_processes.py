"""DMD2 with three networks and a discriminator on two processes (FSDP2, gloo) against one."""

import csv
import os
import subprocess
import sys

import pytest

from lit_distill.experiment.export import save_student

CONFIG = """\
seed_everything: 3
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
run:
  test: false
model:
  class_path: lit_distill.diffusion.DMD2
  init_args:
    student: {class_path: lit_distill.diffusion.pretrained, init_args: {weights: first}}
    teacher: {class_path: lit_distill.diffusion.pretrained, init_args: {weights: second}}
    steps: [2.5, 0.8]
    guidance: 1.5
    fake_updates: 2
    taps: [network.blocks.0, network.blocks.1]
    evaluation: {samples: 20, val_samples: 20, real_samples: 30}
    optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.002, betas: [0.0, 0.999]}}
data:
  class_path: lit_distill.diffusion.GeneratorImages
  init_args:
    source: {class_path: lit_distill.image.DigitsDataModule, init_args: {mean: [0.5], std: [0.5]}}
    epoch_batches: 6
    batch_size: 16
"""
SPEC = {
    "class_path": "lit_distill.diffusion.Denoiser",
    "init_args": {
        "network": {"class_path": "lit_distill.diffusion.ResidualMLP", "init_args": {"width": 16, "depth": 2}},
        "path": {"class_path": "lit_distill.diffusion.EDMPath"},
        "num_classes": 10,
    },
}


@pytest.fixture
def fit(tmp_path, make_denoiser):
    """Runs the command in processes of its own, and returns step -> row of metrics.csv as numbers."""
    (tmp_path / "small.yaml").write_text(CONFIG)
    for seed, name in enumerate(("first", "second")):
        save_student(make_denoiser(seed).state_dict(), SPEC, tmp_path / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}

    def run(name, *options):
        command = [sys.executable, "-m", "lit_distill", "fit", "-c", "small.yaml", "--run.name", name, *options]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        with (tmp_path / "runs" / "default" / name / "metrics.csv").open() as file:
            return {int(row["step"]): {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)}

    return run


def curve(rows, key):
    return [row[key] for _, row in sorted(rows.items()) if key in row]


def test_fsdp2_on_two_processes_is_one_process(fit):
    one = fit("one")
    two = fit("two", "--trainer.strategy", "fsdp2", "--trainer.devices", "2")
    for key, count in (("surrogate", 3), ("gan", 3), ("fake", 6), ("discriminator", 6)):
        found = curve(one, f"train/{key}")
        assert len(found) == count
        assert len(set(found)) == count
        assert curve(two, f"train/{key}") == pytest.approx(found, rel=1e-3, abs=1e-6)
    assert curve(two, "val/mmd") == pytest.approx(curve(one, "val/mmd"), rel=1e-3)
