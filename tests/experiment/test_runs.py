"""Reading run folders: every state of a folder gives a status, none gives an exception."""

import json
import math

import pytest

from lit_distill.core.errors import UsageError
from lit_distill.experiment.runs import find_runs, read_run


def test_a_finished_run_tells_its_facts(write_run):
    run = read_run(write_run("kd", 3, {"test/acc": 0.95, "val/acc": None}))
    assert (run.status, run.finished) == ("finished", True)
    assert (run.experiment, run.name, run.stage, run.seed) == ("quick", "kd-s3", "kd", 3)
    assert (run.method, run.domain, run.data) == ("lit_distill.image.KD", "image", "lit_distill.image.Digits")
    assert run.networks == {"student": {"class_path": "a.Net", "params": 1000}}
    assert run.figures() == {
        "test/acc": 0.95,
        "efficiency/student_params": 1000.0,
        "efficiency/inference_samples_per_second": 5000.0,
        "seconds": 12.5,
    }


def test_a_run_without_summary_is_unfinished_and_has_a_name(write_run):
    folder = write_run()
    (folder / "summary.json").unlink()
    run = read_run(folder)
    assert (run.status, run.finished, run.summary) == ("unfinished", False, None)
    assert (run.experiment, run.name, run.stage, run.figures(), run.networks) == ("quick", "kd-s0", "", {}, {})
    assert (run.domain, run.method, run.data) == ("image", "lit_distill.image.KD", "lit_distill.image.Digits")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "truncated"),
        ('{"schema": 1, "experiment": "qu', "truncated"),
        ("\x00\x00\x00", "truncated"),
        ("[" * 100_000, "truncated"),
        ("[1, 2]", "no mapping"),
        ("{}", "schema is missing"),
        ('{"schema": "1"}', "schema is '1'"),
        ('{"schema": true}', "schema is True"),
        ('{"schema": 1}', "method is missing"),
    ],
)
def test_an_unreadable_summary_is_told_as_broken(write_run, content, why):
    folder = write_run()
    (folder / "summary.json").write_text(content)
    run = read_run(folder)
    assert run.status.startswith("broken: ")
    assert why in run.status
    assert not run.finished


@pytest.mark.parametrize(("schema", "age"), [(0, "an older"), (2, "a newer"), (-(10**30), "an older")])
def test_a_summary_of_another_version_is_told_as_such(write_run, schema, age):
    folder = write_run(schema=schema)
    run = read_run(folder)
    assert run.status.startswith(f"of {age} version: summary.json has schema {schema}")
    assert not run.finished


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        ({"metrics": [0.9]}, "metrics"),
        ({"metrics": {"test/acc": "high"}}, "metrics.test/acc"),
        ({"metrics": {"test/acc": True}}, "metrics.test/acc"),
        ({"metrics": {"test/acc": 10**400}}, "metrics.test/acc"),
        ({"efficiency": {"compression": {}}}, "efficiency.compression"),
        ({"seed": "zero"}, "seed"),
        ({"seed": None}, "seed"),
        ({"stage": 3}, "stage"),
        ({"networks": {"student": "a.Net"}}, "networks.student"),
        ({"networks": {"student": {"class_path": "a.Net", "params": "many"}}}, "networks.student.params"),
        ({"panels": []}, "panels"),
        ({"seconds": "long"}, "seconds"),
    ],
)
def test_a_wrong_type_is_told_with_its_key(write_run, edit, key):
    file = write_run() / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    assert read_run(file.parent).status.startswith(f"broken: summary.json: {key} ")


def test_an_undecodable_summary_is_broken(write_run):
    folder = write_run()
    (folder / "summary.json").write_bytes(b'{"schema": 1, "name": "\xff\xfe"}')
    assert read_run(folder).status.startswith("broken: ")


def test_runs_are_found_at_any_depth_once_and_not_inside_runs(write_run, tmp_path):
    for experiment in ("a", "b"):
        for seed in (0, 1):
            write_run("kd", seed, experiment=experiment)
    inner = tmp_path / "runs" / "a" / "kd-s0" / "checkpoints"
    inner.mkdir()
    (inner / "config.yaml").write_text("not: a run")
    (tmp_path / "runs" / ".cache").mkdir()
    (tmp_path / "runs" / ".cache" / "config.yaml").write_text("not: a run")
    runs = find_runs([tmp_path / "runs", tmp_path / "runs" / "a", tmp_path / "runs" / "a" / "kd-s0"])
    assert [(run.experiment, run.name) for run in runs] == [
        ("a", "kd-s0"),
        ("a", "kd-s1"),
        ("b", "kd-s0"),
        ("b", "kd-s1"),
    ]


def test_a_missing_folder_is_a_usage_error_that_names_it(tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        find_runs([tmp_path / "nowhere"])


def test_history_is_one_curve_for_each_metric(write_run):
    rows = "step,epoch,train/loss,val/acc\n25,0,2.5,\n50,0,1.5,0.5\n75,1,,0.75\n"
    assert read_run(write_run(history=rows)).history() == {
        "train/loss": ([25, 50], [2.5, 1.5]),
        "val/acc": ([50, 75], [0.5, 0.75]),
    }


def test_of_a_repeated_step_the_last_value_counts(write_run):
    rows = "step,epoch,train/loss,val/acc\n50,0,1.5,0.5\n75,0,1.0,0.6\n50,0,1.25,\n25,0,3.0,\n"
    assert read_run(write_run(history=rows)).history() == {
        "train/loss": ([25, 50, 75], [3.0, 1.25, 1.0]),
        "val/acc": ([50, 75], [0.5, 0.6]),
    }


def test_a_last_line_that_was_cut_off_is_left_out(write_run):
    # "0.9" may be the beginning of "0.951".
    assert read_run(write_run(history="step,epoch,val/acc\n1,0,0.5\n2,0,0.9")).history() == {"val/acc": ([1], [0.5])}


@pytest.mark.parametrize(
    "rows",
    [
        "",
        "step,epoch",
        "a,b\n1,2\n",
        "step,epoch,val/acc\nx,0,1\n1,0,high\ninf,0,1\n2\n",
        "\0\0\0\n\0",
        'step,"epoch\n1,2\n',
    ],
)
def test_a_damaged_history_gives_no_points_and_no_error(write_run, rows):
    assert read_run(write_run(history=rows)).history() == {}


def test_a_diverged_history_keeps_its_nan(write_run):
    steps, values = read_run(write_run(history="step,epoch,train/loss\n1,0,2.0\n2,0,nan\n")).history()["train/loss"]
    assert steps == [1, 2]
    assert math.isnan(values[1])


def test_unknown_keys_of_a_later_minor_version_do_no_harm(write_run):
    folder = write_run(sample_shape=[1, 8, 8], key="abc")
    assert json.loads((folder / "summary.json").read_text())["key"] == "abc"
    assert read_run(folder).finished
