"""Sweep files: what is read, what is refused, and that commands are filled in as W&B's own agent fills them in."""

import os

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from lit_distill.cli import main
from lit_distill.core.errors import UsageError
from lit_distill.experiment.sweep.file import Halving, expansions, read_sweep
from lit_distill.experiment.sweep.local import fit_words, stage
from lit_distill.experiment.sweep.record import described, short_names

SWEEP = {
    "program": "lit-distill",
    "method": "bayes",
    "metric": {"name": "val/acc", "goal": "maximize"},
    "parameters": {"model.init_args.temperature": {"min": 1.0, "max": 8.0}, "data.batch_size": {"values": [32, 64]}},
    "command": ["${env}", "${program}", "fit", "--config=a.yaml", "${args}"],
}


@pytest.fixture
def read(tmp_path):
    """Reads the sweep above with changes; None removes a key."""

    def read(**changes):
        content = {key: value for key, value in (SWEEP | changes).items() if value is not None}
        path = tmp_path / "kd.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return read_sweep(path)

    return read


def test_what_the_file_says(read):
    sweep = read(run_cap=7, early_terminate={"type": "hyperband", "min_iter": 2})
    assert (sweep.name, sweep.method, sweep.metric, sweep.goal) == ("kd", "bayes", "val/acc", "maximize")
    assert sweep.run_cap == 7
    assert sweep.halving == Halving(2, 3)  # W&B's eta
    assert read(name="mine").name == "mine"


def agents(sweep, values):
    """The command by W&B's own functions, put together as in its agent."""
    macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    macros |= {"interpreter": ["python"], "program": [sweep.program], "env": ["/usr/bin/env"]}
    words = []
    for word in create_sweep_command(list(sweep.command)):
        words += macros[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    return words


VALUES = {
    "model.temperature": 4.0, "lr": 1e-05, "flag": True, "off": False, "none": None, "sizes": [1, 2], "text": "a b",
    "model": {"lr": 0.3, "width": 16},
}  # fmt: skip


@pytest.mark.parametrize("arguments", ["${args}", "${args_no_equals}", "${args_no_boolean_flags}"])
def test_commands_are_filled_in_as_by_the_agent(read, arguments, monkeypatch):
    monkeypatch.setenv("SWEEP_TEST", "here")
    monkeypatch.delenv("SWEEP_TEST_MISSING", raising=False)
    command = ["${env}", "${interpreter}", "-m", "${program}", "fit", "--x=${envvar:SWEEP_TEST}/${envvar:SWEEP_TEST}"]
    command += ["${envvar:SWEEP_TEST_MISSING}", "--run.name=${oc.env:WANDB_RUN_ID,null}", arguments]
    parameters = {name: {"value": value} for name, value in VALUES.items()}
    parameters["model"] = {"parameters": {"lr": {"value": 0.3}, "width": {"value": 16}}}
    sweep = read(command=command, parameters=parameters)
    values = {p.name: p.distribution.value for p in sweep.parameters}
    words = sweep.words(values, os.environ)
    assert words == agents(sweep, VALUES)
    assert "--x=here/here" in words
    assert "--run.name=${oc.env:WANDB_RUN_ID,null}" in words


def test_every_macro_that_is_offered_is_one_of_the_agents(read):
    known = {f"${{{name}}}" for name in (*create_sweep_command_args({"args": {}}), "env", "interpreter", "program")}
    assert set(expansions({}, "")) <= known


def test_the_default_command_is_the_agents(read):
    sweep = read(command=None)
    assert list(sweep.command) == create_sweep_command(None)


@pytest.mark.parametrize(
    "start",
    [["lit-distill"], ["${program}"], ["${env}", "${program}"], ["${env}", "${interpreter}", "-m", "lit_distill"]],
)
def test_our_own_command_is_known_however_it_starts(read, start):
    values = {"model.init_args.temperature": 2.5, "data.batch_size": 32}
    words = fit_words(read(command=[*start, "fit", "-c", "a.yaml", "${args}"]), values)
    assert words == ["fit", "-c", "a.yaml", "--model.init_args.temperature=2.5", "--data.batch_size=32"]


@pytest.mark.parametrize(
    "start", [["${env}", "${interpreter}", "train.py"], ["lit-distill", "test"], ["torchrun", "fit"]]
)
def test_other_commands_are_refused_locally(read, start):
    with pytest.raises(UsageError, match="runs `lit-distill fit` alone"):
        fit_words(read(command=[*start, "${args}"]), {"model.init_args.temperature": 2.5, "data.batch_size": 32})


def test_a_grid_has_all_points_in_the_order_of_the_file(read):
    parameters = {"a": {"values": [1, 2]}, "b": {"value": "x"}, "c": {"parameters": {"d": {"min": 3, "max": 4}}}}
    sweep = read(method="grid", parameters=parameters)
    assert sweep.grid() == [{"a": a, "b": "x", "c.d": d} for a in (1, 2) for d in (3, 4)]
    assert sweep.words(sweep.grid()[0])[-3:] == ["--a=1", "--b=x", "--c={'d': 3}"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"min_iter": 3}, Halving(3, 3)),
        ({"min_iter": 1, "eta": 2}, Halving(1, 2)),
        ({"max_iter": 27, "s": 2}, Halving(3, 3, 27)),  # W&B's example: 9 and 3
        ({"max_iter": 12, "s": 2, "eta": 2, "strict": True}, Halving(3, 2, 12)),
    ],
)
def test_hyperband(read, spec, expected):
    assert read(early_terminate={"type": "hyperband", **spec}).halving == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"program": None}, "has no `program:`"),
        ({"parameters": None}, "has no `parameters:`"),
        ({"method": "anneal"}, "method is 'anneal'; give grid, random or bayes"),
        ({"metric": None}, "has no metric"),
        ({"metric": {"name": "val/acc"}}, "give minimize or maximize"),
        ({"metric": {"name": "val/acc", "goal": "max"}}, "goal is 'max'"),
        ({"metric": {"name": "test/acc", "goal": "maximize"}}, "choose by a val/ metric"),
        ({"method": "grid"}, "temperature is continuous"),
        ({"parametres": {}}, "did you mean parameters?"),
        ({"job": "x"}, "W&B Launch"),
        ({"parameters": {"a": 3}}, "a is 3; write {value: 3}"),
        ({"parameters": {"a b": {"value": 3}}}, "'a b' is no name"),
        ({"parameters": {"a": {"distribution": "cauchy"}}}, "'cauchy' is not known"),
        ({"command": "lit-distill fit"}, "give a list of words"),
        ({"command": ["${program}", "fit"]}, "has no ${args}"),
        ({"command": ["${program}", "${args_json}"]}, "${args_json} is not for this command line"),
        ({"early_terminate": {"type": "median"}}, "'median'; W&B knows hyperband"),
        ({"early_terminate": {"type": "hyperband"}}, "min_iter, or max_iter and s"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 4, "s": 3}}, "is below 1"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 1.5}}, "eta is 1.5"),
        ({"run_cap": 0}, "run_cap is 0"),
        ({"name": "a/b"}, "leave slashes out"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(read, changes, words):
    with pytest.raises(UsageError) as error:
        read(**changes)
    assert words in str(error.value)
    assert "kd.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "does not exist"), ("a: [", "is not YAML"), ("- a", "holds no mapping"), ("", "no mapping")],
)
def test_files_that_are_no_sweep(tmp_path, capsys, text, words):
    path = tmp_path / "s.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["sweep", str(path), "--local"]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--count", "0"], "--count is 0"),
        (["--local", "--agents", "2"], "with --local give --jobs"),
        (["--jobs", "2"], "--jobs goes with --local"),
        (["--root", "x"], "--root goes with --local"),
    ],
)
def test_options_that_do_not_fit(read, tmp_path, capsys, options, words):
    read()
    assert main(["sweep", str(tmp_path / "kd.yaml"), *options]) == 2
    assert words in capsys.readouterr().err


def test_the_identity_is_that_of_what_trials_depend_on(read, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("x: 1")
    command = ["lit-distill", "fit", "-c", str(config), "${args}"]
    first = read(command=command).identity()
    assert read(command=command, run_cap=9, description="more words", project="p").identity() == first
    assert read(command=command, method="random").identity() != first
    config.write_text("x: 2")
    assert read(command=command).identity() != first


def test_names_are_as_short_as_they_can_be():
    names = ["model.init_args.optimizer.init_args.lr", "model.init_args.fake_optimizer.init_args.lr", "data.batch_size"]
    assert list(short_names(names).values()) == ["optimizer.lr", "fake_optimizer.lr", "batch_size"]
    assert described({names[0]: 0.00123456, names[2]: 64, "x": "a" * 30}) == f"lr 0.00123, batch_size 64, x {'a' * 17}…"


def test_a_trial_is_called_by_its_name_or_what_seeds_have_in_common(read):
    values = {"model.init_args.temperature": 2.51111, "data.batch_size": 32}
    assert stage(read(), values, "t003") == "t003 (temperature 2.51, batch_size 32)"
    seeds = {"lr": {"values": [0.1, 0.2]}, "seed_everything": {"values": [0, 1]}}
    sweep = read(parameters=seeds)
    assert stage(sweep, {"lr": 0.1, "seed_everything": 0}, "t0") == stage(
        sweep, {"lr": 0.1, "seed_everything": 1}, "t1"
    )
    assert stage(read(parameters={"a": {"values": ["${b}", "c"]}}), {"a": "${b}"}, "t000") == "t000 (a {b})"
