"""Sweeps on W&B, with W&B's module-level calls replaced: what is created, and which agents are started."""

import os
import sys
from pathlib import Path

import pytest
import wandb
import yaml

from lit_distill.cli import main
from lit_distill.experiment.sweep import online

SWEEP = {
    "program": "lit-distill",
    "project": "distilling",
    "entity": "team",
    "method": "random",
    "metric": {"name": "val/acc", "goal": "maximize"},
    "parameters": {"acc": {"min": 0.0, "max": 1.0}},
    "command": ["${program}", "fit", "${args}"],
}


class Agents:
    """Takes the place of `subprocess.Popen`."""

    def __init__(self):
        self.started = []
        self.codes = []

    def __call__(self, command, env):
        self.started.append((command, env))
        return self

    def wait(self):
        return self.codes.pop(0) if self.codes else 0


@pytest.fixture
def agents(monkeypatch):
    agents = Agents()
    monkeypatch.setattr(online.subprocess, "Popen", agents)
    monkeypatch.setattr(online, "find_gpus", list)
    return agents


@pytest.fixture
def created(monkeypatch):
    created = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(wandb, "sweep", lambda content: created.append(content) or "abc123")
    return created


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    return str(path)


def test_the_sweep_is_created_as_the_file_has_it_and_an_agent_works_on_it(file, created, agents):
    assert main(["sweep", file]) == 0
    assert created == [SWEEP]
    (command, env) = agents.started[0]
    expected = ["-m", "wandb", "agent", "--forward-signals", "--project=distilling", "--entity=team", "abc123"]
    assert command == [sys.executable, *expected]
    assert len(agents.started) == 1
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)  # where `lit-distill` and `python` are
    assert env.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_wandb_understands_the_agents_command():
    from click.testing import CliRunner
    from wandb.cli.cli import cli

    words = ["agent", "--forward-signals", "--project=p", "--entity=e", "--count=3"]
    said = CliRunner().invoke(cli, [*words, "--help"]).output
    assert all(word.partition("=")[0] in said for word in words[1:])


def test_agents_share_the_trials(file, created, agents):
    assert main(["sweep", file, "--agents", "3", "--count", "7"]) == 0
    shares = [word for command, _ in agents.started for word in command if word.startswith("--count")]
    assert shares == ["--count=3", "--count=2", "--count=2"]
    agents.started.clear()
    main(["sweep", file, "--agents", "3", "--count", "2"])
    assert len(agents.started) == 2  # `--count=0` would mean as many as there are


def test_agents_have_a_gpu_each(file, created, agents, monkeypatch):
    monkeypatch.setattr(online, "find_gpus", lambda: ["0", "2"])
    main(["sweep", file])
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in agents.started] == ["0", "2"]
    agents.started.clear()
    main(["sweep", file, "--agents", "3"])
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in agents.started] == ["0", "2", "0"]


def test_an_agent_that_fails_is_told(file, created, agents, capsys):
    agents.codes = [0, 1]
    assert main(["sweep", file, "--agents", "2"]) == 1
    assert "1 of 2 agents failed" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["no key", "offline"])
def test_without_an_account_a_line_says_what_to_do(file, agents, monkeypatch, capsys, how):
    monkeypatch.setattr(wandb, "login", lambda prompt: how == "offline")
    monkeypatch.setattr(wandb, "sweep", lambda content: pytest.fail("created"))
    monkeypatch.setenv("WANDB_MODE", "offline" if how == "offline" else "online")
    assert main(["sweep", file]) == 2
    said = capsys.readouterr().err
    assert "`wandb login`" in said
    assert "--local" in said
    assert said.count("\n") == 1
    assert not agents.started


def test_what_wandb_refuses_is_told(file, agents, created, monkeypatch, capsys):
    def refuse(content):
        raise wandb.errors.CommError("no such project")

    monkeypatch.setattr(wandb, "sweep", refuse)
    assert main(["sweep", file]) == 1
    assert "W&B did not take the sweep s: no such project" in capsys.readouterr().err
    assert not agents.started
