import csv
import os

import pytest

from lit_distill.core.errors import RunError
from lit_distill.experiment.logger import RunLogger


@pytest.fixture
def logger(tmp_path):
    """Builds a logger of the same run each time, as a run that starts again does."""
    return lambda **kwargs: RunLogger(str(tmp_path), name="quick", version="kd-s0", **kwargs)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "quick" / "kd-s0" / "metrics.csv"


def read(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_what_is_logged_at_one_iteration_is_one_row(logger, file):
    run = logger()
    run.log_metrics({"train/loss": 2.5, "epoch": 0}, step=10)
    run.log_metrics({"train/loss": 1.5, "epoch": 1}, step=20)
    run.log_metrics({"val/acc": 0.25}, step=10)
    run.save()
    assert file.read_text() == "step,epoch,train/loss,val/acc\n10,0,2.5,0.25\n20,1,1.5,\n"


def test_a_run_that_starts_again_keeps_its_rows_and_replaces_those_it_repeats(logger, file):
    first = logger()
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": float(step)}, step=step)
    first.finalize("success")
    second = logger()
    second.log_metrics({"train/loss": 30.0}, step=3)
    second.log_metrics({"train/loss": 40.0}, step=4)
    second.save()
    assert [(row["step"], row["train/loss"]) for row in read(file)] == [
        ("1", "1.0"),
        ("2", "2.0"),
        ("3", "30.0"),
        ("4", "40.0"),
    ]


def test_a_metric_that_comes_later_gets_its_column(logger, file):
    first = logger()
    first.log_metrics({"train/loss": 2.0}, step=1)
    first.save()
    second = logger()
    second.log_metrics({"test/acc": 0.5}, step=2)
    second.save()
    rows = read(file)
    assert [row["train/loss"] for row in rows] == ["2.0", ""]
    assert [row["test/acc"] for row in rows] == ["", "0.5"]


def test_numbers_come_back_bit_for_bit(logger, file):
    value = 0.1 + 0.2  # 17 digits
    first = logger()
    first.log_metrics({"val/nll": value}, step=1)
    first.save()
    second = logger()
    second.log_metrics({"val/nll": 1.0}, step=2)
    second.save()
    assert float(read(file)[0]["val/nll"]) == value


def test_rows_are_on_the_disk_after_so_many(logger, file):
    run = logger(flush_logs_every_n_steps=3)
    run.log_metrics({"a": 1.0}, step=1)
    run.log_metrics({"a": 1.0}, step=2)
    assert not file.exists()
    run.log_metrics({"a": 1.0}, step=3)
    assert len(read(file)) == 3


def test_a_full_disk_leaves_the_file_as_it_was(logger, file, monkeypatch):
    run = logger()
    run.log_metrics({"a": 1.0}, step=1)
    run.save()
    before = file.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run.log_metrics({"a": 2.0}, step=2)
    with pytest.raises(RunError, match="No space left"):
        run.save()
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["metrics.csv"]


def test_the_run_folder_is_the_log_folder_and_nothing_else_is_written_to_it(logger, file, tmp_path):
    run = logger()
    run.log_hyperparams({"lr": 0.1})
    run.log_metrics({"a": 1.0}, step=1)
    run.finalize("success")
    assert run.log_dir == str(file.parent)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
