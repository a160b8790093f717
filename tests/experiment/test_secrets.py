"""Keys, tokens and passwords never reach a file of a run."""

from pathlib import Path

import pytest
import yaml

import lit_distill
from lit_distill.cli import main
from lit_distill.core.errors import UsageError
from lit_distill.experiment.secrets import refuse_secrets, without_secrets

CONFIGS = sorted((Path(lit_distill.__file__).resolve().parents[1] / "configs").rglob("*.yaml"))
PLANTED = "planted-0123456789"

NETWORK = """\
from torch import nn

class Asking(nn.Module):
    def __init__(self, api_key: str | None = None, address: str = ""):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, images):
        return self.net(images)
"""
JOB = """\
trainer: {accelerator: cpu, max_epochs: 1, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: lit_distill.image.Supervised
  init_args:
    student:
      class_path: asking.Asking
data:
  class_path: lit_distill.image.DigitsDataModule
  init_args: {batch_size: 50, train_size: 100}
"""

SECRETS = [
    ("api_key", PLANTED),
    ("apikey", PLANTED),
    ("openai_api_key", PLANTED),
    ("AWS_SECRET_ACCESS_KEY", PLANTED),
    ("token", PLANTED),
    ("hf_token", PLANTED),
    ("use_auth_token", PLANTED),
    ("password", "x"),
    ("db_password", PLANTED),
    ("client_secret", PLANTED),
    ("secret_key", PLANTED),
    ("passphrase", PLANTED),
    ("Authorization", PLANTED),
    ("anything", "sk-abcdefghijklmnop"),
    ("anything", "see hf_abcdefghijklmnop"),
    ("anything", "glpat-abcdefghijklmnop"),
    ("anything", "AKIAABCDEFGHIJKLMNOP"),
    ("anything", "Bearer abcdefghijkl"),
    ("url", "https://me:word@host.example/v1"),
    ("url", "see https://:word@host.example/v1"),
]


@pytest.mark.parametrize(("key", "value"), SECRETS)
def test_a_secret_is_refused_by_name_or_shape_and_not_shown(key, value):
    config = {"model": {"init_args": {"sources": [{"init_args": {key: value}}]}}}
    with pytest.raises(UsageError, match=f"^model.init_args.sources.init_args.{key} holds") as caught:
        refuse_secrets(config)
    assert len(value) < 8 or value not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), SECRETS)
def test_what_is_refused_is_blanked_where_it_is_shown(key, value):
    shown = without_secrets(f"before: 1\n{key}: {value}\nafter: 2\n")
    secret = value.rpartition(" ")[2].removeprefix("https://").partition("@")[0]  # of an address, user and password
    assert f": {secret}\n" not in shown
    assert f"{secret}@" not in shown
    assert shown.count("[hidden]") == 1
    assert shown.startswith(f"before: 1\n{key}: ")
    assert shown.endswith("\nafter: 2\n")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer", "HuggingFaceTB/SmolLM2-135M"),
        ("max_tokens", "512"),
        ("eos_token", "<|endoftext|>"),
        ("token", None),
        ("token", True),
        ("api_key", ""),
        ("api_key", "OPENAI_API_KEY"),  # the variable's name
        ("api_key_env", "MY_KEY"),
        ("key", "r7437084632550e5"),
        ("url", "http://localhost:8000/v1"),
        ("tokens", ["a", "b"]),
        ("root", "data/sk-learn"),
    ],
)
def test_what_is_no_secret_passes(key, value):
    refuse_secrets({"model": {key: value}})


def test_the_value_of_a_secret_variable_is_refused_under_any_name(monkeypatch):
    monkeypatch.setenv("MY_TEAM_TOKEN", "plainwords and numbers 77")
    with pytest.raises(UsageError, match=r"^run.notes holds the value of MY_TEAM_TOKEN") as caught:
        refuse_secrets({"run": {"notes": "use plainwords and numbers 77, please"}})
    assert "plainwords" not in str(caught.value)
    monkeypatch.setenv("MY_TEAM_TOKEN", "short")
    refuse_secrets({"run": {"notes": "a short note"}})


def test_no_configuration_of_the_project_is_refused():
    assert len(CONFIGS) > 200
    for path in CONFIGS:
        refuse_secrets(yaml.safe_load(path.read_text()) or {})


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asking.py").write_text(NETWORK)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


@pytest.mark.parametrize(
    "option",
    [
        f"--model.student.api_key={PLANTED}",
        "--model.student.api_key=${oc.env:OPENAI_API_KEY}",  # resolved, it would be written as well
        "--model.student.address=https://host.example/?key=${oc.env:OPENAI_API_KEY}",
    ],
)
def test_a_run_with_a_key_is_refused_before_anything_is_written(option, place, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", PLANTED)
    before = sorted(place.rglob("*.yaml"))
    assert main(["fit", "-c", "job.yaml", option]) == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if "error" in line]
    assert "model.init_args.student.init_args." in line
    assert "config.yaml" in line
    assert PLANTED not in shown.err + shown.out
    assert sorted(place.rglob("*.yaml")) == before
    assert not (place / "runs").exists()


def test_a_variable_that_is_only_set_is_in_no_file_of_the_run(place, monkeypatch):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"{PLANTED}-{name}")
    assert main(["fit", "-c", "job.yaml", "--run.name", "x", "--model.student.api_key=OPENAI_API_KEY"]) == 0
    assert main(["compare", "runs", "--html", "page.html", "--json", "numbers.json"]) == 0
    files = [path for path in place.rglob("*") if path.is_file()]
    assert {"config.yaml", "summary.json", "page.html", "numbers.json"} <= {path.name for path in files}
    assert [path for path in files if PLANTED.encode() in path.read_bytes()] == []
