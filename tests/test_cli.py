"""The command as a whole: what it lists, what it writes, and how it meets its own runs again."""

import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lit_distill
from lit_distill.cli import main
from lit_distill.core import pretrained
from lit_distill.core.errors import UsageError
from lit_distill.image.models import MLP

ROOT = Path(lit_distill.__file__).resolve().parents[1]
JOB = """\
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
model:
  class_path: lit_distill.image.Supervised
  init_args:
    student:
      class_path: lit_distill.image.models.MLP
      init_args:
        in_features: 64
        num_classes: 10
        hidden: [8]
data:
  class_path: lit_distill.image.DigitsDataModule
  init_args:
    batch_size: 50
    train_size: 100
"""
FIT = "fit -c job.yaml --run.experiment demo --run.name first"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which one run was trained."""
    folder = tmp_path_factory.mktemp("place")
    before = Path.cwd()
    os.chdir(folder)
    try:
        Path("job.yaml").write_text(JOB)
        assert main(shlex.split(FIT)) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def lit(place, monkeypatch, capsys):
    """Types a command in that folder; gives status, stdout and stderr."""
    monkeypatch.chdir(place)

    def typed(command):
        status = main(shlex.split(command))
        return status, *capsys.readouterr()

    return typed


def _seconds(*words):
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, cwd=ROOT)
    return time.perf_counter() - start, done.stdout


# ---- before anything heavy is imported -----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--version"], ["methods"], ["methods", "--json"]])
def test_answers_in_half_a_second(words):
    # The best of five: other processes of this machine can only make it slower. Where Python itself takes more than
    # 20 ms to start, the machine is slow or busy, and more is allowed; importing torch alone would be 80 times as much.
    ours, bare = (min(_seconds(*start)[0] for _ in range(5)) for start in (["-m", "lit_distill", *words], ["-c", ""]))
    assert ours < max(0.5, 25 * bare)


@pytest.mark.parametrize("words", ["--version", "--help", "methods", "methods --json", "compare --help", "run --help"])
def test_imports_no_torch(words):
    code = (
        "import sys; from lit_distill.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules)))"
    )
    assert _seconds("-c", code, *words.split())[1].splitlines()[-1] == "[]"


def test_module_and_script_are_the_same_program():
    assert _seconds("-m", "lit_distill", "--version")[1] == f"lit-distill {lit_distill.__version__}\n"
    script = Path(sys.executable).with_name("lit-distill")
    if script.exists():
        assert subprocess.check_output([script, "--version"], text=True) == f"lit-distill {lit_distill.__version__}\n"


# ---- lists and help ------------------------------------------------------------------------------------------------


def test_methods_json_describes_methods_that_exist(capsys):
    assert main(["methods", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)
    assert {"KD", "FitNets", "AT", "Supervised"} <= {method["name"] for method in methods}
    for method in methods:
        assert set(method) == {"name", "domain", "title", "authors", "year", "arxiv", "class_path", "configs"}
        module, _, name = method["class_path"].rpartition(".")
        assert getattr(importlib.import_module(module), name).__name__ == method["name"]
        assert method["configs"], method["name"]
        assert [config for config in method["configs"] if not (ROOT / config).is_file()] == []


def test_methods_of_a_domain_and_their_papers(capsys):
    assert main(["methods", "--json", "--domain", "image"]) == 0
    kd = next(method for method in json.loads(capsys.readouterr().out) if method["name"] == "KD")
    assert (kd["authors"], kd["year"], kd["arxiv"]) == ("Hinton, Vinyals, Dean", 2015, "1503.02531")


def test_methods_as_a_table_names_each_configuration(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["methods"]) == 0
    assert "configs/image/kd_small.yaml" in capsys.readouterr().out


def test_no_command_shows_the_usage_and_counts_as_wrong(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: lit-distill COMMAND")
    assert main(["--help"]) == 0


def test_help_of_fit_lists_the_options_of_the_run_folder(lit):
    status, out, _ = lit("fit --help")
    assert status == 0
    for option in ("root", "experiment", "name", "stage", "overwrite", "threads", "checkpoint_steps"):
        assert f"--run.{option}" in out


def test_print_config_is_a_configuration_with_the_overrides_and_writes_nothing(lit, place):
    before = set(place.rglob("*"))
    status, out, _ = lit("fit -c job.yaml --data.batch_size 20 --print_config")
    assert status == 0
    assert "batch_size: 20" in out
    assert "class_path: lit_distill.image.models.MLP" in out
    assert set(place.rglob("*")) == before


def test_debug_shows_the_traceback_of_a_mistake():
    with pytest.raises(UsageError, match="fitt"):
        main(["fitt", "--debug"])


# ---- a run and what follows ----------------------------------------------------------------------------------------


def test_fit_leaves_a_whole_run_folder(place):
    folder = place / "runs/demo/first"
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "metrics.csv", "summary.json", "student"}
    assert (folder / "checkpoints/last.ckpt").is_file()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["networks"]["student"]["params"] == 64 * 8 + 8 + 8 * 10 + 10
    assert 0 <= summary["metrics"]["test/acc"] <= 1


def test_same_command_says_that_the_run_is_finished_and_changes_nothing(lit, place):
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    status, _, err = lit(FIT)
    assert status == 0
    assert "runs/demo/first is finished" in err
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == before


def test_changed_configuration_under_the_same_name_is_refused(lit):
    status, _, err = lit(f"{FIT} --data.batch_size 25")
    assert status == 2
    assert "data.init_args.batch_size was 50, now 25" in err


def test_without_a_name_the_configuration_decides_the_folder(lit, place):
    assert lit("fit -c job.yaml --run.experiment unnamed")[0] == 0
    assert "is finished" in lit("fit -c job.yaml --run.experiment unnamed")[2]
    assert lit("fit -c job.yaml --run.experiment unnamed --data.batch_size 25")[0] == 0
    assert len(list((place / "runs/unnamed").iterdir())) == 2


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_with_a_runs_configuration_finds_its_checkpoint(command, lit):
    status, _, err = lit(f"{command} -c runs/demo/first/config.yaml")
    assert status == 0
    assert "using runs/demo/first/checkpoints/last.ckpt" in err


def test_test_command_repeats_the_figures_of_the_run(lit, place):
    _, out, _ = lit("test -c runs/demo/first/config.yaml")
    accuracy = json.loads((place / "runs/demo/first/summary.json").read_text())["metrics"]["test/acc"]
    line = next(line for line in out.splitlines() if "test/acc" in line)
    assert float(line.split()[-2]) == pytest.approx(accuracy, abs=1e-6)


def test_predictions_are_those_of_the_exported_weights(lit, place):
    assert lit("predict -c runs/demo/first/config.yaml")[0] == 0
    predictions = load_file(place / "runs/demo/first/predictions.safetensors")
    summary = json.loads((place / "runs/demo/first/summary.json").read_text())
    right = (predictions["probabilities"].argmax(1) == predictions["label"]).double().mean().item()
    assert len(predictions["index"]) == 300
    assert right == pytest.approx(summary["metrics"]["test/acc"], abs=1e-6)


def test_exported_student_gives_the_logits_of_the_trained_one_bit_for_bit(lit, place):
    status, out, _ = lit("export runs/demo/first --to exported")
    assert status == 0
    assert "exported" in out
    exported = pretrained(str(place / "exported")).eval()
    # The reference comes from the checkpoint, by torch alone.
    state = torch.load(place / "runs/demo/first/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    trained = MLP(in_features=64, num_classes=10, hidden=[8]).eval()
    trained.load_state_dict({k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")})
    images = torch.randn(16, 1, 8, 8)
    assert torch.equal(exported(images), trained(images))


def test_exported_onnx_gives_the_logits_of_the_student_for_any_batch_size(lit, place):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert lit("export runs/demo/first --to as-onnx --format onnx")[0] == 0
    session = onnxruntime.InferenceSession(place / "as-onnx/model.onnx")
    student = pretrained(str(place / "runs/demo/first")).eval()
    for count in (1, 7):
        images = torch.randn(count, 1, 8, 8)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert torch.allclose(torch.from_numpy(logits), student(images), atol=1e-5)
