"""Damaged run folders of every kind are listed with what is wrong, and never stop a comparison."""

import json
import os
import random
import shutil

import pytest
from samples import RELIABILITY, history

from lit_distill.experiment.compare import compare
from lit_distill.experiment.comparison import compare_runs
from lit_distill.experiment.runs import find_runs, read_run

FILES = ("config.yaml", "metrics.csv", "summary.json", "trees.svg")
PICTURE = {"file": "trees.svg", "title": "t", "summary": "s", "head": ["class", "tree"], "rows": [["a", "C"]]}
PANELS = {"picture": PICTURE, "reliability": RELIABILITY, "text": [{"prompt": "a", "student": "b"}]}


@pytest.fixture
def good(write_run):
    """Two good seeds of a baseline and a method; gives the folder that is to be damaged."""
    for stage in ("baseline", "kd"):
        for seed in (0, 1):
            folder = write_run(stage, seed, {"test/acc": 0.9}, history=history(0.9), panels=PANELS)
            (folder / "trees.svg").write_text("<svg/>")
    return folder.parent / "kd-s0"  # the one whose pictures and texts are shown


@pytest.fixture
def compared(tmp_path, good, capsys):
    """Compares with every output; the good runs must come out whole. Returns the status of the damaged one."""

    def run():
        paths = {kind: str(tmp_path / f"c.{kind}") for kind in ("json", "markdown", "csv", "latex", "html")}
        assert compare([str(tmp_path / "runs")], **paths) == 0
        values = json.loads((tmp_path / "c.json").read_text())
        baseline = next(group for group in values["groups"] if group["label"] == "baseline")
        assert (baseline["stats"]["test/acc"]["mean"], baseline["seeds"]) == (0.9, [0, 1])
        assert "kd-s0" in (tmp_path / "c.html").read_text(encoding="utf-8")
        assert len(values["runs"]) == 4
        return next(entry["status"] for entry in values["runs"] if entry["path"].endswith("kd-s0"))

    return run


@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.7, 0.98])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_off(good, compared, name, share):
    content = (good / name).read_bytes()
    (good / name).write_bytes(content[: int(len(content) * share)])
    status = compared()
    assert status.startswith("broken") if name == "summary.json" else status == "finished"


def test_a_summary_cut_off_anywhere_is_broken(good):
    content = (good / "summary.json").read_bytes().rstrip()
    for length in range(len(content)):
        (good / "summary.json").write_bytes(content[:length])
        assert read_run(good).status.startswith("broken"), length


@pytest.mark.parametrize("name", FILES)
def test_binary_garbage(good, compared, name):
    (good / name).write_bytes(random.Random(0).randbytes(5000))
    status = compared()
    assert status.startswith("broken") if name == "summary.json" else status == "finished"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(good, compared, name):
    (good / name).unlink()
    assert compared() == ("unfinished" if name == "summary.json" else "finished")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["loop", "folder", "pipe", "dangling link"])
def test_what_is_no_file(good, compared, name, kind):
    (good / name).unlink()
    if kind == "loop":
        (good / name).symlink_to(good / name)
    elif kind == "dangling link":
        (good / name).symlink_to(good / "nowhere")
    elif kind == "folder":
        (good / name).mkdir()
    else:
        os.mkfifo(good / name)  # reading it would wait for ever
    status = compared()
    if name == "summary.json":
        assert (
            status == "unfinished" if kind == "dangling link" else status.startswith("broken: summary.json cannot be")
        )


def test_a_link_that_leads_in_a_circle_is_not_followed(good, compared):
    (good.parent / "again").symlink_to(good.parent)
    assert compared() == "finished"


def test_an_unreadable_file_is_told(good, compared, monkeypatch):
    from pathlib import Path

    read = Path.read_text

    def refuse(self, *args, **kwargs):
        if self.parent == good and self.name in FILES:
            raise PermissionError(13, "Permission denied")
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert compared() == "broken: summary.json cannot be read (Permission denied)"


WRONG = [None, True, 0, -1, 10**30, 1e308, float("inf"), "", "x" * 3000, "\ud800", "</script>", [], [[]], {}, {"": {}}]
KEYS = [
    "schema", "experiment", "name", "stage", "method", "domain", "data", "networks", "seed", "metric", "metrics",
    "efficiency", "panels", "versions", "machine", "started", "finished", "seconds", "config_hash",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_any_type_in_any_key(good, tmp_path, key):
    content = json.loads((good / "summary.json").read_text())
    for wrong in WRONG:
        (good / "summary.json").write_text(json.dumps(content | {key: wrong}))
        comparison = compare_runs(find_runs([tmp_path / "runs"]))
        status = next(run.status for run in comparison.runs if run.path == good)
        assert status == "finished" or status.startswith(("broken: summary.json: ", "of a")), (key, wrong)
        baseline = next(group for group in comparison.groups if group.label.endswith("baseline"))
        assert baseline.stats["test/acc"].mean == 0.9


@pytest.mark.parametrize("wrong", WRONG)
def test_a_page_of_wrong_values_one_level_down(good, compared, wrong):
    content = json.loads((good / "summary.json").read_text())
    content["metrics"] = {"test/acc": 0.9, "test/new": wrong}
    content["panels"] = {
        "picture": wrong,
        "text": wrong,
        "reliability": RELIABILITY | {"count": wrong},
        "samples": [wrong],
    }
    content["versions"] = {"torch": wrong}
    content["machine"] = {"gpu": wrong}
    (good / "summary.json").write_text(json.dumps(content))
    compared()


def test_values_beyond_all_measure_are_left_out_of_the_mean(good, compared, tmp_path):
    content = json.loads((good / "summary.json").read_text())
    (good / "summary.json").write_text(json.dumps(content | {"metrics": {"test/acc": 1e308}}))
    assert compared() == "finished"
    assert "test/acc is 1e+308, left out of the mean" in (tmp_path / "c.markdown").read_text()


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_within_a_summary(good, tmp_path, seed):
    rng = random.Random(seed)
    content = bytearray((good / "summary.json").read_bytes())
    for _ in range(rng.randrange(1, 6)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    (good / "summary.json").write_bytes(content)
    from lit_distill.experiment.dashboard import write_dashboard

    write_dashboard(compare_runs(find_runs([tmp_path / "runs"])), tmp_path / "c.html")


def test_a_folder_in_another_encoding(good, compared, tmp_path):
    name = os.fsdecode(b"gr\xfc\xdfe-s0")  # Latin-1
    try:
        shutil.copytree(good, good.parent / name)
    except OSError:
        pytest.skip("this file system has no such names")
    shutil.rmtree(good.parent / "kd-s1")
    assert compared() == "finished"


@pytest.mark.parametrize(
    "text", ["step,a\n1,0.5\n2,\n", "a,step\n0.5\n", "step,a\n" + "x" * 200_000 + ",1\n", "a\n1\n"]
)
def test_odd_tables_of_metrics(good, compared, text):
    (good / "metrics.csv").write_text(text)
    assert compared() == "finished"
