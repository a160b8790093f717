"""Recipes: order, references, what is skipped, resumed, run again, and what a failure stops."""

import json
import multiprocessing
import os
import shlex
import signal
import time

import pytest
import yaml
from jsonargparse import Namespace

from lit_distill.cli import main
from lit_distill.core.errors import UsageError
from lit_distill.experiment import processes, recipe
from lit_distill.experiment.launch import DistillCLI
from lit_distill.experiment.recipe import read_recipe, run_recipe

METHOD = """
model:
  class_path: lit_distill.image.Supervised
  init_args:
    student: {class_path: lit_distill.image.models.MLP, init_args: {in_features: 64, num_classes: 10, hidden: [8]}}
data:
  class_path: lit_distill.image.DigitsDataModule
  init_args: {batch_size: 128}
trainer: {accelerator: cpu, max_epochs: 2}
"""
# Written with the last stage first: the order comes from the references.
CHAIN = {
    "experiment": "chain",
    "seeds": [0, 1, 2],
    "stages": {
        "kd": {"configs": ["method.yaml"], "set": {"a.weights": "${stage:teacher}", "b.path": "${stage:peer}/student"}},
        "alone": {"configs": ["method.yaml"]},
        "peer": {"configs": ["method.yaml"], "set": {"c": "${stage:teacher}"}},
        "teacher": {"configs": ["method.yaml"], "seeds": [5]},
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory with one method's configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "method.yaml").write_text(METHOD)
    return tmp_path


@pytest.fixture
def write(folder):
    """Writes a recipe and returns its name."""

    def write(content):
        (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return "recipe.yaml"

    return write


@pytest.fixture
def scripted(monkeypatch, folder):
    """Replaces training by a script: a run takes note, then fails, is killed or writes its summary.

    The first entry of `script` for a run's name is what its next start does; the default is to finish.
    """
    script = {}

    def child(words, log, environ, call):
        options = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
        run = folder / options["run.root"] / options["run.experiment"] / options["run.name"]
        with (folder / "notes.txt").open("a") as notes:
            notes.write(f"start {run.name} {options.get('run.overwrite', '')}\n")
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(yaml.safe_dump({"run": {"key": options["run.key"]}}))
        time.sleep(script.get("sleep", 0))
        todo = script.get(run.name)
        if todo == "fail":
            with open(log, "w") as file:  # noqa: PTH123
                file.write("lit-distill: error: train/loss is nan\n")
            os._exit(1)
        if todo == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        (run / "summary.json").write_text(json.dumps({"key": options["run.key"], "metrics": {"test/acc": 0.5}}))
        with (folder / "notes.txt").open("a") as notes:
            notes.write(f"end {run.name}\n")
        os._exit(0)

    class Forks:
        """Starts a run by a plain fork, so that it is the script above that runs."""

        Process = multiprocessing.get_context("fork").Process

        @staticmethod
        def set_forkserver_preload(modules):
            pass

    monkeypatch.setattr(processes, "_child", child)
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda kind: Forks)
    monkeypatch.setattr(recipe, "find_gpus", list)
    monkeypatch.setattr("lit_distill.experiment.compare.compare", lambda *args, **kwargs: 0)
    return script


@pytest.fixture
def notes(folder):
    """Returns what the scripted runs did since the last call, as (event, run) pairs."""

    def read(event="start"):
        file = folder / "notes.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line.split(" ", 1)[1].strip() for line in lines if line.startswith(event)]

    return read


def words_of(jobs, name):
    return next(job.words for job in jobs if job.name == name)


# ---- planning ------------------------------------------------------------------------------------------------------


def test_runs_come_after_what_they_refer_to(write, folder):
    names = [job.name for job in read_recipe(write(CHAIN)).jobs(folder)]
    assert len(names) == len(set(names)) == 10
    assert names.index("teacher-s5") < names.index("peer-s0") < names.index("kd-s0")


def test_a_reference_is_the_run_of_the_same_seed_or_else_the_only_one(write, folder):
    words = words_of(read_recipe(write(CHAIN)).jobs(folder), "kd-s2")
    assert f"--a.weights={folder}/chain/teacher-s5" in words
    assert f"--b.path={folder}/chain/peer-s2/student" in words
    assert "--seed_everything=2" in words


def test_a_stage_in_a_folder_is_of_an_experiment_of_its_own(write, folder):
    stage = {"configs": ["method.yaml"], "seeds": [3]}
    stages = {"a/x": {**stage, "set": {"w": "${stage:b/x}/student"}}, "b/x": stage, "x": stage}
    jobs = read_recipe(write({"experiment": "tour", "stages": stages})).jobs(folder)
    assert [job.name for job in jobs] == ["b/x-s3", "a/x-s3", "x-s3"]
    assert [job.folder for job in jobs] == [folder / "tour" / place for place in ("b/x-s3", "a/x-s3", "x-s3")]
    words = words_of(jobs, "a/x-s3")
    assert f"--w={folder}/tour/b/x-s3/student" in words
    assert {"--run.experiment=tour/a", "--run.stage=x", "--run.name=x-s3"} <= set(words)
    assert jobs[1].log == folder / "tour/a/logs/x-s3.txt"


@pytest.mark.parametrize("name", ["/x", "a//x", "../x", "a/", "."])
def test_a_stage_stays_inside_its_experiment(write, name):
    with pytest.raises(UsageError, match="is no name of a folder"):
        read_recipe(write({"stages": {name: {"configs": ["method.yaml"]}}}))


def test_a_stage_may_name_its_own_folder(write, folder):
    stage = {"configs": ["method.yaml"], "seeds": [0, 1], "set": {"w": "${stage:a}/kept"}}
    for job in read_recipe(write({"experiment": "own", "stages": {"a": stage}})).jobs(folder):
        assert f"--w={job.folder}/kept" in job.words
        assert job.needs == []


def test_only_brings_along_what_the_stage_needs(write, folder):
    plan = read_recipe(write(CHAIN))
    assert {job.stage.name for job in plan.jobs(folder, only=["peer"])} == {"peer", "teacher"}
    assert {job.stage.name for job in plan.jobs(folder, only=["kd"])} == {"kd", "peer", "teacher"}
    with pytest.raises(UsageError, match="'kdd' is no stage of the recipe; there are"):
        plan.jobs(folder, only=["kdd"])


def test_seeds_takes_the_first_of_each_stage(write, folder):
    names = {job.name for job in read_recipe(write(CHAIN)).jobs(folder, seeds=2)}
    assert names == {"teacher-s5", "peer-s0", "peer-s1", "kd-s0", "kd-s1", "alone-s0", "alone-s1"}


def test_a_changed_teacher_changes_the_keys_of_all_that_depend_on_it_and_no_other(write, folder):
    def keys(content):
        return {job.name: job.key for job in read_recipe(write(content)).jobs(folder, seeds=1)}

    changed = json.loads(json.dumps(CHAIN))
    changed["stages"]["teacher"]["set"] = {"lr": 0.5}
    before, after = keys(CHAIN), keys(changed)
    assert {name for name in before if before[name] != after[name]} == {"teacher-s5", "peer-s0", "kd-s0"}


def test_a_key_is_never_read_as_a_number(write, folder):
    stages = {"a": {"configs": ["method.yaml"], "seeds": list(range(300))}}
    keys = [job.key for job in read_recipe(write({"experiment": "keys", "stages": stages})).jobs(folder)]
    assert len(set(keys)) == 300
    assert all(key[0].isalpha() for key in keys)


def test_a_changed_configuration_file_changes_the_key(write, folder):
    plan = write(CHAIN)
    before = [job.key for job in read_recipe(plan).jobs(folder)]
    (folder / "method.yaml").write_text(METHOD.replace("128", "64"))
    assert not set(before) & {job.key for job in read_recipe(plan).jobs(folder)}


def test_dry_run_prints_commands_that_parse_and_runs_none(write, folder, capsys):
    content = {"experiment": "dry", "stages": {"a": {"configs": ["method.yaml"], "set": {"data.batch_size": 32}}}}
    assert main(["run", write(content), "--dry-run"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    program, *words = shlex.split(line)
    assert program == "lit-distill"
    cli = object.__new__(DistillCLI)
    assert _parse(cli, words).data.init_args.batch_size == 32
    assert not (folder / "runs").exists()


def _parse(cli, words) -> Namespace:
    """Parses as the command does, without running."""

    class ParsedError(Exception):
        pass

    def stop(self):
        raise ParsedError

    original = DistillCLI.before_instantiate_classes
    DistillCLI.before_instantiate_classes = stop
    try:
        with pytest.raises(ParsedError):
            cli.__init__(words)
    finally:
        DistillCLI.before_instantiate_classes = original
    return cli.config.fit


# ---- running, scripted ---------------------------------------------------------------------------------------------


def test_finished_runs_are_skipped(write, scripted, notes):
    plan = write(CHAIN)
    assert run_recipe(plan, jobs=1) == 0
    assert len(notes()) == 10
    assert run_recipe(plan, jobs=1) == 0
    assert notes() == []


def test_stages_in_folders_run_and_are_found_again(write, scripted, folder):
    stage = {"configs": ["method.yaml"]}
    plan = write({"experiment": "tour", "stages": {"a/x": stage, "b/x": {**stage, "set": {"w": "${stage:a/x}"}}}})
    assert run_recipe(plan, jobs=2) == 0
    assert {job.finished for job in read_recipe(plan).jobs(folder / "runs")} == {True}


def test_after_a_change_of_the_teacher_its_dependants_run_again_and_may_replace_their_folders(write, scripted, notes):
    run_recipe(write(CHAIN), seeds=1, jobs=1)
    notes()
    changed = json.loads(json.dumps(CHAIN))
    changed["stages"]["teacher"]["set"] = {"lr": 0.5}
    assert run_recipe(write(changed), seeds=1, jobs=1) == 0
    assert notes() == ["teacher-s5 true", "peer-s0 true", "kd-s0 true"]


def test_a_failure_stops_its_dependants_and_no_others(write, scripted, notes, capsys):
    scripted["peer-s0"] = "fail"
    assert main(["run", write(CHAIN), "--seeds", "1", "--jobs", "1"]) == 1
    assert sorted(notes("end")) == ["alone-s0", "teacher-s5"]
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("lit-distill: error: 2 of 4 runs failed: ")
    assert "peer-s0 (train/loss is nan; log in runs/chain/logs/peer-s0.txt)" in message
    assert "and 1 more" in message  # kd-s0, which needs it


def test_a_killed_run_is_started_again_without_leave_to_replace_it(write, scripted, notes):
    scripted["teacher-s5"] = "kill"
    assert main(["run", write(CHAIN), "--only", "teacher"]) == 1
    assert notes() == ["teacher-s5"]
    del scripted["teacher-s5"]
    assert main(["run", "recipe.yaml", "--only", "teacher"]) == 0
    assert notes() == ["teacher-s5"]


def test_jobs_run_side_by_side_and_never_more_than_allowed(write, scripted, folder):
    scripted["sleep"] = 0.2
    run_recipe(write({**CHAIN, "stages": {"alone": {"configs": ["method.yaml"], "seeds": [0, 1, 2, 3]}}}), jobs=2)
    running, most = 0, 0
    for line in (folder / "notes.txt").read_text().splitlines():
        running += 1 if line.startswith("start") else -1
        most = max(most, running)
    assert most == 2


# ---- running, for real ---------------------------------------------------------------------------------------------


def test_a_chain_of_real_runs_trains_and_a_changed_teacher_makes_a_new_cache(write, folder, capsys):
    stage = {"configs": ["method.yaml"]}
    content = {
        "experiment": "real",
        "stages": {
            "teacher": {**stage, "set": {"trainer.max_epochs": 3}},
            "kd": {
                **stage,
                "set": {
                    "model": "lit_distill.image.KD",
                    "model.init_args.teacher": "lit_distill.core.pretrained",
                    "model.init_args.teacher.init_args.weights": "${stage:teacher}",
                    "model.init_args.teacher_cache": "${stage:teacher}/cache.safetensors",
                },
            },
        },
    }
    teacher = folder / "runs" / "real" / "teacher-s0" / "student" / "model.safetensors"

    def metrics():
        summary = json.loads((folder / "runs" / "real" / "kd-s0" / "summary.json").read_text())
        return summary["metrics"]["test/teacher_acc"], teacher.read_bytes()

    assert main(["run", write(content), "--only", "kd", "--jobs", "1"]) == 0, capsys.readouterr().err
    first = metrics()
    content["stages"]["teacher"]["set"]["trainer.max_epochs"] = 1
    assert main(["run", write(content), "--only", "kd", "--jobs", "1"]) == 0, capsys.readouterr().err
    second = metrics()
    assert first[1] != second[1]
    assert first[0] > second[0]
