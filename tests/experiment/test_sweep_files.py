"""Every sweep file of the repository: its keys are those of its configurations, and a few batches of it run here."""

import multiprocessing
from pathlib import Path

import optuna
import pytest
import yaml
from test_configs import DOMAINS, teachers  # noqa: F401 (a fixture)

from lit_distill.core.errors import UsageError
from lit_distill.experiment import processes
from lit_distill.experiment.launch import check_words
from lit_distill.experiment.messages import explain
from lit_distill.experiment.runs import read_run
from lit_distill.experiment.sweep import local, run_sweep
from lit_distill.experiment.sweep.file import read_sweep
from lit_distill.experiment.sweep.local import fit_words
from lit_distill.experiment.sweep.record import read_record

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "sweeps").glob("*/*.yaml"))
# Untrained teachers, and as little work as makes every metric.
LANGUAGE = ["--model.init_args.teacher.init_args.name={language}", "--data.init_args.tokenizer={language}"]
SHORT = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--trainer.limit_train_batches=2"]
STEPS = ["--trainer.max_steps=2", "--trainer.val_check_interval=1"]
LESS = {
    "image/kd": [*SHORT, "--model.init_args.teacher.init_args.weights={small}"],
    "graph/mirage": SHORT,
    "dataset/dm": [*STEPS, "--model.init_args.student_epochs=1", "--model.init_args.per_class=1"],
    "llm/taid": [*STEPS, *LANGUAGE, "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"],
    "llm/distillm": [*STEPS, *LANGUAGE, "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"],
    "diffusion/dmd2": [
        *SHORT,
        "--model.init_args.student.init_args.weights={denoiser}",
        "--model.init_args.teacher.init_args.weights={denoiser}",
        "--model.init_args.evaluation.classifier.init_args.weights={judge}",
        "--data.init_args.batch_size=16",
    ],
}


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def test_every_domain_has_a_sweep():
    assert {path.parent.name for path in FILES} == set(DOMAINS)
    assert {name_of(path) for path in FILES} == set(LESS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_is_one_for_wandb(path):
    content = yaml.safe_load(path.read_text())
    sweep = read_sweep(path)
    assert sweep.name == f"{path.parent.name}-{path.stem}"
    assert content["project"] == "lit-distill"
    assert sweep.metric.startswith("val/")
    assert list(sweep.command[:3]) == ["${env}", "${program}", "fit"]
    assert sweep.command[-1] == "${args}"  # later words win
    # On W&B the metric comes from its logger, and each run has a folder of its own.
    assert "--config=configs/logger/wandb.yaml" in sweep.command
    assert f"--run.experiment={sweep.name}" in sweep.command
    assert "--run.name=${oc.env:WANDB_RUN_ID,null}" in sweep.command
    assert sweep.method == "grid" or sweep.run_cap
    assert f"lit-distill sweep sweeps/{name_of(path)}.yaml --local" in path.read_text()


def draws(sweep):
    """Points that a sweep may send: the first and last of a grid, else two at random."""
    if sweep.method == "grid":
        return sweep.grid()[0], sweep.grid()[-1]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trials = study.ask(), study.ask()
    return tuple({p.name: p.distribution.suggest(trial, p.name) for p in sweep.parameters} for trial in trials)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_command_line_takes_every_parameter(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(path)
    first, second = draws(sweep)
    check_words(fit_words(sweep, first))
    # W&B's server sends 4.0 as 4.
    whole = {k: int(v) if isinstance(v, float) and v == round(v) else v for k, v in second.items()}
    check_words(fit_words(sweep, whole))


def test_a_parameter_that_no_configuration_has_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(ROOT / "sweeps/image/kd.yaml")
    with pytest.raises(Exception, match="temprature") as error:
        check_words([*fit_words(sweep, draws(sweep)[0]), "--model.init_args.temprature=3"])
    message, status = explain(error.value)
    assert status == 2
    assert "temprature" in message
    assert "\n" not in message


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sweep_runs_here(path, teachers, tmp_path, monkeypatch, capsys):  # noqa: F811
    if path.parent.name == "graph":
        pytest.importorskip("datamol", reason="datamol is not installed (extra 'molecules')")

    def forks(starter, preload=()):
        starter._context = multiprocessing.get_context("fork")  # everything is imported here already

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(processes.Starter, "__init__", forks)
    monkeypatch.setattr(local, "find_gpus", list)
    folders = {folder.name: str(folder) for folder in teachers.iterdir()}
    content = yaml.safe_load(path.read_text())
    content["command"][-1:] = [*(word.format(**folders) for word in LESS[name_of(path)]), "${args}"]
    file = tmp_path / path.name
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert run_sweep(str(file), local=True, count=2, jobs=1, root=str(tmp_path / "runs")) == 0
    folder = tmp_path / "runs" / content["name"]
    trials = read_record(folder).trials
    assert [trial.name for trial in trials] == ["t000", "t001"]
    assert {trial.state for trial in trials} <= {"complete", "stopped early"}
    assert trials[0].state == "complete"
    run = read_run(folder / "t000")
    assert run.figures()[content["metric"]["name"]] == trials[0].value
    assert run.history()[content["metric"]["name"]][1]  # what early stopping looks at
    for name, value in trials[0].values.items():  # the run has what the sweep chose
        node = yaml.safe_load(run.config_text())
        for key in name.split("."):
            node = node[key]
        assert node == value
    assert 'id="coordinates"' in (folder / "dashboard.html").read_text()


def test_what_wandb_calls_values_is_no_python(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text((ROOT / "sweeps/image/kd.yaml").read_text().replace("min: 1.0e-3", "min: 1e-3"))
    with pytest.raises(UsageError, match=r"write 1\.0e-4"):  # YAML 1.1 needs the dot
        read_sweep(path)
