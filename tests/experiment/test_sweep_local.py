"""Local sweeps: which trials run, which are stopped, and that each is run once, whatever is killed.

Runs are scripted: a trial logs a few values of its metric, which are a function of its parameters, and ends.
"""

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from lit_distill.core.errors import RunError, UsageError
from lit_distill.experiment import processes
from lit_distill.experiment.sweep import local, run_sweep
from lit_distill.experiment.sweep.file import read_sweep
from lit_distill.experiment.sweep.record import read_record

COMMAND = ["lit-distill", "fit", "${args}"]
GRID = {
    "program": "lit-distill",
    "method": "grid",
    "metric": {"name": "val/acc", "goal": "maximize"},
    "parameters": {"acc": {"values": [0.5, 0.9, 0.1, 0.95, 0.93, 0.2]}},
    "command": COMMAND,
}
RANDOM = GRID | {
    "method": "random",
    "parameters": {"acc": {"min": 0.0, "max": 1.0}, "size": {"values": [1, 2, 3]}},
}


def scripted(words, log, environ, call):
    """A run: it takes up its metrics where they end, logs up to `values` of them, and writes its summary."""
    threading.Thread(target=processes._end_with_parent, daemon=True).start()
    Path(log).write_text("")
    options = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
    if call == "check_words":
        note("check", options["run.name"])
        os._exit(0)
    folder = Path(options["run.root"]) / options["run.experiment"] / options["run.name"]
    if (folder / "summary.json").exists():
        note("finished", folder.name)
        os._exit(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": options}))
    file = folder / "metrics.csv"
    lines = file.read_text().splitlines() if file.exists() else ["step,epoch,val/acc"]
    note("start" if len(lines) == 1 else "resume", folder.name, f"{os.environ.get('WANDB_MODE')} {environ}")
    accuracy = float(options["acc"])
    for step in range(len(lines), int(os.environ.get("VALUES", "2")) + 1):
        time.sleep(float(os.environ.get("SECONDS", "0")))
        lines.append(f"{step},0,{accuracy}")
        file.with_suffix(".new").write_text("\n".join(lines) + "\n")
        file.with_suffix(".new").replace(file)
        if options["acc"] in os.environ.get("HOPELESS", "").split():
            time.sleep(float(os.environ.get("WAIT", "30")))  # long enough to be stopped
    if accuracy <= float(os.environ.get("BROKEN", "-1")):
        Path(log).write_text("lit-distill: error: train/loss is nan\n")
        os._exit(1)
    summary = {
        "schema": 1, "experiment": options["run.experiment"], "name": folder.name, "stage": options["run.stage"],
        "method": "m.KD", "data": "d.Digits", "networks": {}, "seed": 0, "started": f"2026-01-01T{time.monotonic()}",
        "metrics": {"val/acc": accuracy if os.environ.get("LOGS") != "other" else None, "val/other": 1.0},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    note("end", folder.name)
    os._exit(0)


def note(event, name, more=""):
    with Path("notes.txt").open("a") as notes:
        notes.write(f"{event} {name} {time.monotonic()} {more}\n")


def events(kind):
    lines = Path("notes.txt").read_text().splitlines() if Path("notes.txt").exists() else []
    return [line.split()[1] for line in lines if line.startswith(f"{kind} ")]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch, tmp_path):
    def forks(starter, preload=()):
        """Starts runs by a plain fork, so that it is the script above that runs."""
        starter._context = multiprocessing.get_context("fork")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(processes, "_child", scripted)
    monkeypatch.setattr(processes.Starter, "__init__", forks)
    monkeypatch.setattr(local, "find_gpus", list)
    monkeypatch.setattr(local, "_POLL_SECONDS", 0.02)


@pytest.fixture
def run():
    """Writes a sweep and runs it locally."""

    def run(content, name="s", **options):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return run_sweep(f"{name}.yaml", local=True, **{"jobs": 1, **options})

    return run


def states(name="s"):
    return {trial.name: trial.state for trial in read_record(Path("runs") / name).trials}


def drawn(name="s"):
    return [dict(trial.values) for trial in read_record(Path("runs") / name).trials]


# ---- which trials --------------------------------------------------------------------------------------------------


def test_a_grid_runs_every_point_once_in_order_and_ends_in_the_page(run, capsys):
    assert run(GRID) == 0
    assert [values["acc"] for values in drawn()] == GRID["parameters"]["acc"]["values"]
    assert events("end") == [f"t{number:03d}" for number in range(6)]
    assert set(states().values()) == {"complete"}
    record = read_record(Path("runs/s"))
    assert record.best.values == {"acc": 0.95}
    said = capsys.readouterr().out
    assert "[6/6] t005 (acc 0.2): val/acc 0.2" in said
    assert "best: t003, val/acc 0.95, with --acc=0.95" in said
    assert 'id="coordinates"' in Path("runs/s/dashboard.html").read_text()


def test_a_finished_sweep_runs_nothing_again(run, capsys):
    run(GRID)
    capsys.readouterr()
    assert run(GRID) == 0
    assert len(events("start")) == 6
    assert "6 of 6 trials are finished already" in capsys.readouterr().out


def test_count_is_of_all_trials_and_may_grow(run):
    run(RANDOM, count=2)
    run(RANDOM, count=5)
    assert events("end") == [f"t{number:03d}" for number in range(5)]
    run(RANDOM | {"run_cap": 6}, name="t")  # the file's own limit
    assert len(states("t")) == 6
    assert drawn("t")[:5] == drawn("s")  # trials are those of their numbers, in however many commands


def test_a_grid_may_be_cut_short(run):
    run(GRID, count=2)
    assert [values["acc"] for values in drawn()] == [0.5, 0.9]


def test_without_an_end_nothing_is_started(run):
    with pytest.raises(UsageError, match="give --count, or run_cap"):
        run(RANDOM)
    assert not events("start")


def test_bayes_comes_closer_than_chance(run):
    space = {name: {"min": 0.0, "max": 1.0} for name in ("acc", "other")}
    run(RANDOM | {"method": "bayes", "parameters": space}, count=20)
    run(RANDOM | {"parameters": space}, name="r", count=20)
    guided, blind = ([values["acc"] for values in drawn(name)[10:]] for name in ("s", "r"))  # the first ten are random
    assert sum(guided) / 10 > sum(blind) / 10 + 0.1


# ---- early stopping ------------------------------------------------------------------------------------------------


def test_bad_trials_are_stopped_by_the_values_that_they_have_logged(run, monkeypatch, capsys):
    # Of n values at a rung the best floor(n / 2) pass, at least one: 0.5 passes alone; 0.9 is the best of 2; 0.1 is not
    # of 3; 0.95 is one of the 2 best of 4; 0.93 is the second of 5, where 2 pass; 0.2 is the fifth of 6, where 3 do.
    monkeypatch.setenv("HOPELESS", "0.1 0.2")
    expected = ["complete", "complete", "stopped early", "complete", "complete", "stopped early"]
    assert run(GRID | {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2}}) == 0
    assert list(states().values()) == expected
    assert events("end") == ["t000", "t001", "t003", "t004"]
    assert "t002 (acc 0.1): stopped early, val/acc 0.1 after 1 values" in capsys.readouterr().out
    assert "t002, t005 stopped early" in Path("runs/s/dashboard.html").read_text()
    run(GRID | {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2}})
    assert len(events("start")) == 6  # what was stopped stays stopped


def test_the_goal_decides_which_are_bad(run, monkeypatch):
    monkeypatch.setenv("HOPELESS", "0.9")
    content = GRID | {
        "metric": {"name": "val/acc", "goal": "minimize"},
        "parameters": {"acc": {"values": [0.5, 0.9, 0.1]}},
        "early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2},
    }
    run(content)
    assert list(states().values()) == ["complete", "stopped early", "complete"]
    assert read_record(Path("runs/s")).best.values == {"acc": 0.1}


def test_the_last_values_stop_nothing(run, monkeypatch):
    monkeypatch.setenv("HOPELESS", "0.1")
    monkeypatch.setenv("WAIT", "2")
    run(GRID | {"early_terminate": {"type": "hyperband", "max_iter": 2, "s": 1, "eta": 2}}, name="first", count=3)
    assert list(states("first").values()) == ["complete", "complete", "stopped early"]
    # Two values are looked at after 3 of 6: never.
    run(GRID | {"early_terminate": {"type": "hyperband", "max_iter": 6, "s": 1, "eta": 2}}, name="later", count=3)
    assert set(states("later").values()) == {"complete"}


# ---- failures ------------------------------------------------------------------------------------------------------


def test_failures_are_told_and_the_sweep_goes_on(run, monkeypatch, capsys):
    monkeypatch.setenv("BROKEN", "0.2")
    assert run(GRID) == 0
    assert [name for name, state in states().items() if state == "failed"] == ["t002", "t005"]
    said = capsys.readouterr()
    assert "t002 (acc 0.1): failed: train/loss is nan" in said.err
    assert "4 complete, 2 failed" in said.out
    monkeypatch.delenv("BROKEN")
    assert run(GRID) == 0  # points of the grid that failed are tried again, and no others
    assert events("resume") == []
    assert [values["acc"] for values in drawn()[6:]] == [0.1, 0.2]


def test_several_failures_in_a_row_end_it(run, monkeypatch):
    monkeypatch.setenv("BROKEN", "1.0")
    with pytest.raises(RunError, match="3 trials in a row failed"):
        run(RANDOM, count=20)
    assert len(events("start")) == 3


def test_a_metric_that_is_not_there_is_a_failure_that_says_what_is(run, monkeypatch, capsys):
    monkeypatch.setenv("LOGS", "other")
    with pytest.raises(RunError):
        run(GRID)
    assert "the run has no val/acc; it has val/other" in capsys.readouterr().err


def test_no_complete_trial_is_an_error(run, monkeypatch):
    monkeypatch.setenv("BROKEN", "1.0")
    with pytest.raises(RunError, match="no trial of s is complete; t000: train/loss is nan"):
        run(GRID, count=2)


# ---- kills ---------------------------------------------------------------------------------------------------------


def start_sweep(file, **options):
    """Runs a sweep in a process of its own, which may be killed."""

    def target():
        os.setsid()  # as a shell does
        run_sweep(file, local=True, **options)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("content", [GRID, RANDOM], ids=["grid", "random"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_sweep_goes_on_and_each_trial_ends_once(run, monkeypatch, content, jobs):
    run(content, name="whole", count=6)
    Path("notes.txt").unlink()
    monkeypatch.setenv("SECONDS", "0.2")
    monkeypatch.setenv("VALUES", "4")
    Path("s.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for _ in range(2):
        earlier = len(list(Path("runs").glob("s/t*")))
        runner = start_sweep("s.yaml", jobs=jobs, count=6)
        # A trial has begun and logged something.
        wait_for(lambda earlier=earlier: len(list(Path("runs").glob("s/t*/metrics.csv"))) > earlier)
        os.kill(runner.pid, signal.SIGKILL)
        runner.join()
        time.sleep(1.0)  # its runs end with it
        lines = Path("notes.txt").read_text()
        time.sleep(0.5)
        assert Path("notes.txt").read_text() == lines
    run(content, count=6, jobs=jobs)
    assert sorted(events("end")) == [f"t{number:03d}" for number in range(6)]
    assert events("resume")
    assert drawn("s") == drawn("whole")  # as if it had never been killed
    assert set(states().values()) == {"complete"}


def test_a_kill_between_stopping_a_trial_and_noting_it_does_not_start_it_again(run, monkeypatch):
    def die(search, trial):
        os.kill(os.getpid(), signal.SIGKILL)

    content = GRID | {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2}}
    Path("s.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setenv("HOPELESS", "0.1 0.2")
    with monkeypatch.context() as patch:
        patch.setattr("lit_distill.experiment.sweep.search.Search.stop", die)
        runner = start_sweep("s.yaml", jobs=1)
        runner.join()
        assert runner.exitcode == -signal.SIGKILL
    run(content)
    assert events("start").count("t002") == 1
    assert "t002" not in events("resume")
    assert states()["t002"] == "stopped early"


def test_a_kill_while_a_trial_is_drawn_loses_no_point(run, monkeypatch):
    def die(trial, name, value):
        os.kill(os.getpid(), signal.SIGKILL)

    Path("s.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    for function in ("optuna.trial.Trial.set_user_attr", "optuna.study.Study.ask"):
        with monkeypatch.context() as patch:
            patch.setattr(function, die if "set_user_attr" in function else lambda study: die(study, "", None))
            runner = start_sweep("s.yaml", jobs=1)
            runner.join()
            assert runner.exitcode == -signal.SIGKILL
    run(GRID)
    assert [values["acc"] for values in drawn()] == GRID["parameters"]["acc"]["values"]


# ---- side by side --------------------------------------------------------------------------------------------------


def test_jobs_run_side_by_side(run, monkeypatch):
    monkeypatch.setenv("SECONDS", "0.5")
    run(GRID, jobs=3)
    order = [line.split()[:2] for line in Path("notes.txt").read_text().splitlines() if not line.startswith("check")]
    running, most = 0, 0
    for event, _ in order:
        running += 1 if event == "start" else -1
        most = max(most, running)
    assert most == 3
    assert sorted(events("end")) == [f"t{number:03d}" for number in range(6)]
    assert [values["acc"] for values in drawn()] == GRID["parameters"]["acc"]["values"]


def test_each_job_has_a_gpu_of_its_own(run, monkeypatch):
    monkeypatch.setattr(local, "find_gpus", lambda: ["3", "5"])
    monkeypatch.setenv("SECONDS", "0.1")
    run(GRID, jobs=None)
    starts = [line for line in Path("notes.txt").read_text().splitlines() if line.startswith("start")]
    devices = [line.partition("CUDA_VISIBLE_DEVICES': '")[2][0] for line in starts]
    assert {*devices[:2]} == {"3", "5"}
    assert {*devices} == {"3", "5"}


def test_a_second_runner_of_the_same_folder_is_refused(run, monkeypatch):
    monkeypatch.setenv("SECONDS", "0.3")
    Path("s.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    runner = start_sweep("s.yaml", jobs=1)
    try:
        wait_for(lambda: events("start"))
        with pytest.raises(UsageError, match="in use by another"):
            run(GRID)
    finally:
        os.kill(runner.pid, signal.SIGKILL)
        runner.join()


# ---- what a trial is told ------------------------------------------------------------------------------------------


def test_words_of_a_trial(run, monkeypatch):
    """Where it lies, what it is called; W&B is off and one thread is used unless the user says otherwise."""
    run(GRID, count=1)
    options = yaml.safe_load(Path("runs/s/t000/config.yaml").read_text())["run"]
    assert options["run.threads"] == "1"
    assert (options["run.root"], options["run.experiment"], options["run.name"]) == ("runs", "s", "t000")
    assert options["run.stage"] == "t000 (acc 0.5)"
    assert "'WANDB_MODE': 'disabled'" in Path("notes.txt").read_text()
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(GRID, name="t", count=1)
    assert "'WANDB_MODE': 'offline'" in Path("notes.txt").read_text()
    run(GRID | {"command": [*COMMAND, "--run.threads=4", "--run.name=x"]}, name="u", count=1)
    assert yaml.safe_load(Path("runs/u/t000/config.yaml").read_text())["run"]["run.threads"] == "4"


def test_trials_of_another_file_are_not_mixed_in(run):
    run(GRID, count=1)
    with pytest.raises(UsageError, match="another version of the sweep s"):
        run(GRID | {"parameters": {"acc": {"values": [0.3, 0.4]}}})


def test_a_command_that_is_refused_starts_nothing(run, monkeypatch):
    def refuse(words, log, environ, call):
        assert call == "check_words"
        Path(log).write_text("lit-distill: error: the key acc is not known\n")
        os._exit(2)

    monkeypatch.setattr(processes, "_child", refuse)
    with pytest.raises(UsageError, match="its command is refused: the key acc is not known"):
        run(GRID)
    assert read_record(Path("runs/s")) is None


def test_importance_is_of_what_matters(run):
    run(RANDOM, count=12)
    record = read_record(Path("runs/s"))
    assert record.importance["acc"] > 0.9
    assert math.isclose(sum(record.importance.values()), 1.0)
    run(RANDOM, name="few", count=7)
    assert read_record(Path("runs/few")).importance is None


def test_the_file_is_read_before_anything_is_imported():
    Path("s.yaml").write_text(yaml.safe_dump(GRID | {"method": "x"}))
    with pytest.raises(UsageError, match="method"):
        read_sweep("s.yaml")
