"""Offline runs at W&B, read back from the files that they left."""

import csv
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
import yaml
from wandb_file import Offline

import lit_distill
from lit_distill.cli import main
from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import RunError
from lit_distill.experiment import wandb_run
from lit_distill.experiment.runs import Run
from lit_distill.experiment.wandb_media import media_of
from lit_distill.experiment.wandb_run import WandbRun, has_key

ROOT = Path(lit_distill.__file__).resolve().parents[1]
WANDB = str(ROOT / "configs" / "logger" / "wandb.yaml")
JOB = """\
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 2
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
  - class_path: lit_distill.core.callbacks.BestWeights
    init_args: {monitor: val/nll, mode: min}
model:
  class_path: lit_distill.image.Supervised
  init_args:
    student:
      class_path: lit_distill.image.models.MLP
      init_args: {in_features: 64, num_classes: 10, hidden: [8]}
data:
  class_path: lit_distill.image.DigitsDataModule
  init_args: {batch_size: 25, train_size: 100}
"""
SECRETS = {"HF_TOKEN": "hf_planted0planted0planted0", "OPENAI_API_KEY": "sk-planted1planted1planted1"}
FIT = "fit -c job.yaml -c WANDB --run.experiment demo --run.threads 1 --seed_everything 3"


def fit(*words):
    return main([WANDB if word == "WANDB" else word for word in shlex.split(FIT)] + list(words))


@pytest.fixture(scope="module")
def listener():
    """A server that counts who connects; W&B is told that it is at this address, and every proxy too."""
    callers = []
    server = socket.create_server(("127.0.0.1", 0))

    def listen():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            callers.append(connection.recv(200))
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.getsockname()[1]}", callers=callers)
    server.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory, listener):
    """A folder to run in, without an account: neither variables nor files of W&B's are there."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("NETRC", str(folder / "no-netrc"))
        patch.setenv("WANDB_CONFIG_DIR", str(folder / "no-config"))
        patch.setenv("WANDB_BASE_URL", listener.url)
        patch.setenv("HTTPS_PROXY", listener.url)
        patch.chdir(folder)
        Path("job.yaml").write_text(JOB)
        wandb.teardown()
        yield folder
        wandb.finish()
        wandb.teardown()


@pytest.fixture(autouse=True)
def _closed(place):
    yield
    wandb.finish()


@pytest.fixture(scope="module")
def whole(place):
    """A run that went well, in which two batches make a step."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        assert fit("--run.name", "whole", "--run.stage", "baseline", "--trainer.accumulate_grad_batches", "2") == 0
    folder = place / "runs/demo/whole"
    (offline,) = folder.glob("wandb/offline-run-*")
    return SimpleNamespace(folder=folder, wandb=Offline(offline))


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            yield from (((key, step), float(value)) for key, value in row.items() if value)


def test_every_metric_of_the_run_folder_is_there_once_at_its_iteration(whole):
    logged = whole.wandb.values()
    expected = dict(table(whole.folder))
    assert {key for key, _ in expected} >= {"train/loss", "val/acc", "test/acc"}
    numbers = {at: values for at, values in logged.items() if not at[0].startswith("panels/")}
    assert numbers == {at: [pytest.approx(value)] for at, value in expected.items()}
    assert [row["_step"] for row in whole.wandb.rows] == [row["iteration"] for row in whole.wandb.rows]


def test_iterations_are_batches_also_where_several_make_a_step(whole):
    assert [step for (key, step), _ in table(whole.folder) if key == "val/acc"] == [4, 8]
    assert [row["iteration"] for row in whole.wandb.rows if "val/acc" in row] == [4, 8]


def test_the_configuration_is_there_once_and_nested(whole):
    config = dict(whole.wandb.config)
    config.pop("_wandb")
    assert config == yaml.safe_load((whole.folder / "config.yaml").read_text())
    assert all(set(later) <= {"_wandb"} for later in whole.wandb.later_configs)


def test_project_group_stage_tags_and_name_come_from_the_run(whole):
    run = whole.wandb.run
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("lit-distill", "demo", "baseline", "whole")
    assert sorted(run.tags) == sorted(["image", "Supervised", "DigitsDataModule", "seed-3"])
    assert (whole.folder / "wandb_id.txt").read_text().strip() == run.run_id


def test_the_summary_has_the_best_value_and_the_final_figures(whole):
    history = {key: [v for (k, _), v in table(whole.folder) if k == key] for key in ("val/acc", "val/nll")}
    assert whole.wandb.summary["best/val/acc"] == pytest.approx(max(history["val/acc"]))
    assert whole.wandb.summary["best/val/nll"] == pytest.approx(min(history["val/nll"]))
    final = json.loads((whole.folder / "summary.json").read_text())["metrics"]
    assert {key: whole.wandb.summary[key] for key in final} == pytest.approx(final)


def test_panels_are_media_with_their_colours(whole):
    (row,) = [row for row in whole.wandb.rows if "panels/reliability" in row]
    chart = whole.wandb.folder / "files" / row["panels/reliability"]["path"]
    text = chart.read_text()
    assert '"@' not in text
    assert "rgba(0,114,178,0.75)" in text  # --c1 of the page, as light as the page draws it
    drawn = json.loads((whole.folder / "summary.json").read_text())["panels"]["reliability"]
    filled = sum(count > 0 for count in drawn["count"])
    numbers = json.loads((whole.wandb.folder / "files" / row["panels/reliability/table"]["path"]).read_text())
    assert len(numbers["data"]) == filled


def test_the_student_is_an_artifact_with_the_summary(whole):
    (artifact,) = [record for record in whole.wandb.artifacts if record.type == "model"]
    assert artifact.name == "student-demo-whole"
    summary = json.loads((whole.folder / "summary.json").read_text())
    assert json.loads(artifact.metadata)["metrics"] == summary["metrics"]
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert set(files) == {"model.safetensors", "config.json"}
    assert files["model.safetensors"].read_bytes() == (whole.folder / "student/model.safetensors").read_bytes()


def test_copies_of_the_small_files_go_along(whole):
    for name in ("config.yaml", "metrics.csv", "summary.json"):
        assert f"lit_distill/{name}" in whole.wandb.saved
        copy = whole.wandb.folder / "files/lit_distill" / name
        assert copy.read_bytes() == (whole.folder / name).read_bytes()


def test_without_an_account_nothing_is_asked_and_nobody_is_called(whole, listener):
    assert whole.wandb.exits == [0]
    assert listener.callers == []


def test_no_secret_of_the_environment_is_in_any_file(whole):
    files = [path for path in whole.folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_a_failed_run_is_marked_and_goes_on_under_its_id(place, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    wandb.teardown()  # it has read the variables
    original = Distiller.on_train_batch_end

    def fail(module, *args):
        original(module, *args)
        if module.iteration == 6:
            raise RunError("the cable was pulled")

    monkeypatch.setattr(Distiller, "on_train_batch_end", fail)
    assert fit("--run.name", "pulled") == 1
    monkeypatch.setattr(Distiller, "on_train_batch_end", original)
    folder = place / "runs/demo/pulled"
    (first,) = map(Offline, folder.glob("wandb/offline-run-*"))
    assert first.exits == [1]
    assert not [record for record in first.artifacts if record.type == "model"]

    assert fit("--run.name", "pulled") == 0
    second = next(run for run in map(Offline, folder.glob("wandb/offline-run-*")) if run.file != first.file)
    assert second.run.run_id == first.run.run_id
    assert second.exits == [0]
    steps = [sorted({row["iteration"] for row in run.rows}) for run in (first, second)]
    assert steps[0][0] == 0
    assert steps[1][0] == 4  # the checkpoint was that of the first epoch, of four batches
    both = first.values() | second.values()
    assert {at: values for at, values in both.items() if not at[0].startswith("panels/")} == {
        at: [pytest.approx(value)] for at, value in table(folder)
    }
    assert second.summary["best/val/acc"] == max(value for (key, _), value in table(folder) if key == "val/acc")
    key = os.environ["WANDB_API_KEY"].encode()
    assert not [path for path in folder.rglob("*") if path.is_file() and key in path.read_bytes()]


def test_two_processes_are_one_run(place):
    words = ["fit", "-c", "job.yaml", "-c", WANDB, "--run.experiment=demo", "--run.name=two", "--run.test=false"]
    words += ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.max_epochs=1", "--data.batch_size=50"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lit_distill", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (offline,) = Path("runs/demo/two/wandb").glob("offline-run-*")
    assert list(Path.cwd().rglob("run-*.wandb")).count(next(offline.glob("*.wandb")).resolve()) == 1
    run = Offline(offline)
    assert all(len(values) == 1 for values in run.values().values())
    assert {key for key, _ in run.values()} >= {"train/loss", "val/acc"}
    assert run.exits == [0]
    assert done.stderr.count("no API key is set") == 1


# ---- without a run -------------------------------------------------------------------------------------------------


class Recorder:
    """What a logger needs of a run."""

    disabled = False

    def __init__(self, dir=None):
        self.dir, self.rows, self.summary, self.artifacts, self.ended = dir, [], {}, [], None

    def log(self, row, step):
        self.rows.append((step, row))

    def save(self, path, **options):
        assert Path(path).is_file()

    def log_artifact(self, artifact):
        self.artifacts.append((artifact.type, artifact.name, sorted(artifact.manifest.entries)))

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.mark.parametrize("wanted", [True, False])
def test_a_distilled_set_is_an_artifact_beside_the_student(wanted, write_run, tmp_path):
    folder = write_run("dm", experiment="quick set")
    (folder / "distilled" / "more").mkdir(parents=True)
    for name in ("images.safetensors", "distilled.json", "more/labels.json"):
        (folder / "distilled" / name).write_text(name)
    logger = WandbRun(artifacts=wanted)
    logger._experiment, logger.folder = run, _ = Recorder(str(tmp_path)), folder
    logger.close()
    assert run.ended == 0
    assert run.artifacts == ([
        ("model", "student-quick-set-dm-s0", ["config.json"]),
        ("dataset", "distilled-quick-set-dm-s0", ["distilled.json", "images.safetensors", "more/labels.json"]),
    ] if wanted else [])  # fmt: skip
    assert run.summary["test/acc"] == 0.9


def test_what_comes_late_is_put_to_the_latest_iteration():
    logger = WandbRun()
    logger._experiment = Recorder()
    logger.log_metrics({"train/loss": 1.0}, 5)
    logger.log_metrics({"data/captured_mass": 0.9}, 0)  # W&B would drop it
    assert logger.experiment.rows[-1] == (5, {"data/captured_mass": 0.9, "iteration": 5})


def test_best_is_as_the_callback_says_or_as_the_name_does():
    logger = WandbRun()
    logger._experiment = Recorder()
    logger.watch_best([SimpleNamespace(monitor="val/gap", mode="min"), SimpleNamespace(monitor=None, mode="max")])
    for step, value in enumerate((0.5, 0.3, 0.4)):
        logger.log_metrics({"val/gap": value, "val/nll": value, "val/acc": value, "val/temperature": value}, step)
    assert logger.experiment.summary == {"best/val/gap": 0.3, "best/val/nll": 0.3, "best/val/acc": 0.5}


def test_ids_are_kept_new_or_those_of_a_sweeps_agent(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    file = tmp_path / "wandb_id.txt"
    first = wandb_run._run_id(file)
    assert wandb_run._run_id(file) == first
    assert wandb_run._run_id(tmp_path / "other.txt") != first
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    assert wandb_run._run_id(file) == "fromagent"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert wandb_run._run_id(file) == "fromagent"


def test_a_key_is_found_where_wandb_login_puts_it(place, monkeypatch, tmp_path):
    wandb.teardown()  # which a test before may have told a key
    assert not has_key()
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1\n  login user\n  password {'k' * 40}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert has_key()
    netrc.write_text(f"machine elsewhere.example\n  login user\n  password {'k' * 40}\n")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert has_key()


def test_pictures_texts_and_charts_become_media(tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4), "red").save(tmp_path / "grid.png")
    (tmp_path / "trees.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    picture = {"title": "grid", "summary": "a grid", "head": ["class", "images"], "rows": [["0", "4"]]}
    panels = {
        "samples": {**picture, "file": "grid.png"},
        "picture": {**picture, "file": "trees.svg"},
        "text": [{"prompt": "<b>Once", "student": "upon"}],
        "unheard_of": {"x": 1},
    }
    media, files = media_of(Run(tmp_path, "finished", {"seed": 0, "panels": panels}))
    assert {key: type(value).__name__ for key, value in media.items()} == {
        "panels/samples": "Image",
        "panels/samples/table": "Table",
        "panels/picture": "Html",
        "panels/picture/table": "Table",
        "panels/text": "Table",
    }
    assert media["panels/text"].data == [["<b>Once", "upon"]]
    assert "<script" not in media["panels/picture"].html  # the picture is an image, which runs no script
    assert sorted(files) == ["grid.png", "trees.svg"]


def test_a_replaced_run_gets_another_id(tmp_path):
    from lit_distill.experiment.run_folder import clear

    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb_id.txt").write_text("old\n")
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_w_and_b_refuses_is_one_line():
    from lit_distill.experiment.messages import explain

    message, status = explain(wandb.errors.CommError("the server\nsaid no"))
    assert (message.startswith("W&B: the server said no; WANDB_MODE=offline"), status) == (True, 1)
