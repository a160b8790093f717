"""Run folders written as literals, so that tests of readers do not lean on the writer."""

import json
from pathlib import Path

import pytest
from samples import CONFIG, HOSTILE, RELIABILITY, history

from lit_distill.experiment.comparison import compare_runs
from lit_distill.experiment.dashboard import write_dashboard
from lit_distill.experiment.runs import find_runs


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


@pytest.fixture
def compared(tmp_path):
    """Compares all runs written so far."""

    def run(**options):
        return compare_runs(find_runs([tmp_path / "runs"]), **options)

    return run


@pytest.fixture
def page(compared, tmp_path):
    """Writes the page of all runs written so far and returns its path."""

    def write(**options):
        path = tmp_path / "page.html"
        write_dashboard(compared(**options), path)
        return path

    return write


@pytest.fixture
def quick(write_run):
    """Five seeds of three stages, one teacher, one unfinished and one broken run."""
    write_run("teacher", 0, {"test/acc": 0.98}, params=100_000, history=history(0.98), started="2026-01-01T00:00:00")
    for seed in range(5):
        for stage, gain in (("baseline", 0.0), ("kd", 0.02), ("fitnets", 0.001 * (-1) ** seed)):
            accuracy = 0.9 + 0.003 * seed + gain + 0.001 * (seed % 2)
            metrics = {"test/acc": accuracy, "test/ece": 0.03}
            started = {"baseline": "2026-01-02", "kd": "2026-01-03", "fitnets": "2026-01-04"}[stage]
            panels = {"reliability": RELIABILITY}
            write_run(stage, seed, metrics, history=history(accuracy), panels=panels, started=started)
    (write_run("at", 0) / "summary.json").unlink()
    (write_run("at", 1) / "summary.json").write_text("{")


@pytest.fixture
def hostile(write_run):
    """Runs whose every name, key and setting is an attempt to run a script."""
    for at, text in enumerate(HOSTILE):
        for seed in (0, 1):
            write_run(
                text,
                seed,
                {"test/acc": 0.9, f"val/{text}": 0.1},
                name=f"run{at}-s{seed}",
                history=f'step,epoch,"val/{text.replace(chr(34), chr(34) * 2)}"\n1,0,0.5\n',
                config=f"model: {text}\n".replace("{", "{{").replace("}", "}}"),
                experiment="quick",
                method=f"evil.{text}",
                data=f"evil.{text}",
                versions={text: text},
                panels={text: 1, "reliability": {text: text}},
            )
    (write_run("x", 0, name="unread") / "summary.json").write_text(json.dumps({"schema": HOSTILE[1]}))
