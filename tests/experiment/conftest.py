"""Run folders written as literals, so that tests of readers do not lean on the writer."""

import json
from pathlib import Path

import pytest

CONFIG = """seed_everything: {seed}
run:
  root: runs
  experiment: {experiment}
  name: {name}
trainer:
  max_steps: 100
  default_root_dir: runs/{experiment}/{name}
  logger:
  - class_path: lit_distill.experiment.logger.RunLogger
    init_args:
      save_dir: runs
      version: {name}
model:
  class_path: {method}
  init_args:
    teacher: runs/{experiment}/teacher-s{seed}
    lr: {lr}
data:
  class_path: {data}
  init_args:
    root: {root}
    batch_size: {batch_size}
    train_size: {train_size}
    seed: {seed}
"""


@pytest.fixture
def write_run(tmp_path):
    """Writes one finished run folder below tmp_path/runs and returns its path; `edit` changes the summary."""

    def write(
        stage="kd",
        seed=0,
        metrics=None,
        *,
        experiment="quick",
        method="lit_distill.image.KD",
        data="lit_distill.image.Digits",
        params=1000,
        lr=0.1,
        batch_size=64,
        train_size="null",
        root="data/digits",
        name=None,
        history="",
        config=CONFIG,
        **edit,
    ) -> Path:
        name = name or f"{stage}-s{seed}"
        folder = tmp_path / "runs" / experiment / name
        (folder / "student").mkdir(parents=True)
        (folder / "student" / "config.json").write_text("{}")
        fields = {"seed": seed, "experiment": experiment, "name": name, "method": method, "lr": lr, "data": data}
        (folder / "config.yaml").write_text(
            config.format(**fields, batch_size=batch_size, train_size=train_size, root=root)
        )
        if history:
            (folder / "metrics.csv").write_text(history)
        summary = {
            "schema": 1,
            "experiment": experiment,
            "name": name,
            "stage": stage,
            "method": method,
            "domain": "image",
            "data": data,
            "networks": {"student": {"class_path": "a.Net", "params": params}, "teacher": None},
            "seed": seed,
            "metrics": {"test/acc": 0.9, "test/ece": 0.02} if metrics is None else metrics,
            "efficiency": {"student_params": params, "compression": None, "inference_samples_per_second": 5000.0},
            "panels": {},
            "config_hash": f"{seed:016x}",
            "versions": {"lit_distill": "0.1.0"},
            "machine": {"system": "Linux", "gpu": None},
            "started": f"2026-03-01T10:00:{seed:02d}+00:00",
            "finished": f"2026-03-01T10:01:{seed:02d}+00:00",
            "seconds": 12.5,
        }
        (folder / "summary.json").write_text(json.dumps(summary | edit))
        return folder

    return write
