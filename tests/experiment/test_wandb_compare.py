"""Runs of a W&B project and the report written there, with recordings in place of W&B."""

import importlib.machinery
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import wandb

from lit_distill.cli import main
from lit_distill.core.errors import RunError, UsageError
from lit_distill.experiment import wandb_runs
from lit_distill.experiment.comparison import compare_runs
from lit_distill.experiment.formats import markdown as markdown_table
from lit_distill.experiment.runs import find_runs
from lit_distill.experiment.wandb_runs import fetch, mirror_folder

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # W&B's library for reports

PROJECT = "team/distil"
HISTORY = "step,epoch,train/loss,val/acc\n10,0,1.5,\n20,0,1.0,0.8\n"


class RecordedFile:
    """A file as W&B lists it; `source` is what a download gives."""

    def __init__(self, name, source, size=None):
        self.name, self.source = name, source
        self.size = source.stat().st_size if size is None else size

    def download(self, root=".", replace=False):
        assert replace
        target = Path(root) / self.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.source, target)
        return target.open()


class RecordedRun:
    """A run as `wandb.Api().runs()` gives it, made from a run folder; a foreign one has no folder."""

    def __init__(self, id, folder=None, *, group="quick", name=None, state="finished", heartbeat="2026-03-01T10:00:00"):
        self.id, self.group, self.state, self.heartbeatAt = id, group, state, heartbeat
        self.name = name or (folder.name if folder else id)
        self.recorded = [] if folder is None else [
            RecordedFile(f"lit_distill/{file.name}", file) for file in sorted(folder.iterdir()) if file.is_file()
        ]  # fmt: skip
        self.listings = 0

    def files(self, pattern):
        assert pattern == "lit_distill/%"
        self.listings += 1
        return self.recorded


class RecordedApi:
    """What W&B answers: runs and reports of one project, and what reports of its own library are sent."""

    def __init__(self, runs=(), reports=()):
        self._runs, self._reports, self.sent = list(runs), list(reports), []
        self._service_api = SimpleNamespace(execute_graphql=self.graphql, app_url="https://wandb.example")

    def __call__(self, timeout=None):
        return self

    def runs(self, path):
        assert path == PROJECT
        return self._runs

    def reports(self, path):
        assert path == PROJECT
        return self._reports

    def projects(self, entity):
        return [SimpleNamespace(name="distil")]

    def graphql(self, query, variables):
        if "upsertView" in query:
            self.sent.append(variables)
            view = {"id": variables["id"] or "Vmlldzo5", "name": "n", "displayName": variables["displayName"]}
            project = {"name": "distil", "entityName": "team"}
            spec = variables["spec"]
            return {"upsertView": {"view": {**view, "description": "", "project": project, "spec": spec}}}
        return {"project": {"internalId": "UHJvamVjdDox"}}


@pytest.fixture
def at_wandb(tmp_path, monkeypatch):
    """Sets an account, and recordings in place of W&B; W&B's own variables and cache are left out."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)

    def record(runs=(), reports=()):
        api = RecordedApi(runs, reports)
        monkeypatch.setattr(wandb, "Api", api)
        return api

    return record


@pytest.fixture
def library(monkeypatch):
    """Lets the library for reports seem installed."""
    stub = ModuleType("wandb_workspaces")
    stub.__spec__ = importlib.machinery.ModuleSpec("wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", stub)


@pytest.fixture
def quick(write_run):
    """Run folders of a baseline and a method, two seeds each, as recorded runs; the folders are gone."""
    values = {("baseline", 0): 0.80, ("baseline", 1): 0.82, ("kd", 0): 0.85, ("kd", 1): 0.88}
    folders = {
        f"{stage}{seed}": write_run(stage, seed, {"test/acc": value}, history=HISTORY)
        for (stage, seed), value in values.items()
    }
    return [RecordedRun(id, folder) for id, folder in folders.items()]


def test_runs_of_a_project_are_the_runs_that_were_logged(quick, tmp_path):
    assert fetch(quick, tmp_path / "mirror") == []
    here, there = (find_runs([tmp_path / place]) for place in ("runs", "mirror"))
    assert [run.name for run in there] == ["baseline-s0", "baseline-s1", "kd-s0", "kd-s1"]
    for local, remote in zip(here, there, strict=True):
        assert remote.summary == local.summary
        assert remote.config_text() == local.config_text()
        assert remote.history() == local.history() == {"train/loss": ([10, 20], [1.5, 1.0]), "val/acc": ([20], [0.8])}


def test_only_what_changed_is_fetched_again(quick, tmp_path):
    folder = tmp_path / "mirror"
    fetch(quick, folder)
    quick[0].heartbeatAt = "2026-03-02T10:00:00"
    quick[1].state = "running"
    fetch(quick, folder)
    fetch(quick, folder)
    assert [run.listings for run in quick] == [2, 3, 1, 1]


def test_a_run_that_left_the_project_leaves_the_comparison(quick, tmp_path):
    fetch(quick, tmp_path / "mirror")
    fetch(quick[:3], tmp_path / "mirror")
    assert [run.name for run in find_runs([tmp_path / "mirror"])] == ["baseline-s0", "baseline-s1", "kd-s0"]


def test_runs_of_one_name_are_both_kept(quick, tmp_path):
    again = RecordedRun("other", quick[0].recorded[0].source.parent)
    fetch([*quick, again], tmp_path / "mirror")
    assert [run.name for run in find_runs([tmp_path / "mirror"])][:2] == ["baseline-s0", "baseline-s0~other"]


def test_foreign_running_and_unsafe_runs(quick, tmp_path):
    running = RecordedRun("live", quick[0].recorded[0].source.parent, name="live", state="running")
    running.recorded = [file for file in running.recorded if file.name.endswith("config.yaml")]
    huge = RecordedFile("lit_distill/metrics.csv", quick[0].recorded[0].source, size=10**9)
    quick[3].recorded = [file for file in quick[3].recorded if not file.name.endswith("metrics.csv")] + [huge]
    climbing = RecordedRun("climb", quick[0].recorded[0].source.parent, group="../x", name="../../.ssh")
    notes = fetch([*quick, running, RecordedRun("alien"), climbing], tmp_path / "mirror")
    assert notes == ["1 runs at W&B were not logged by lit-distill and are left out (alien)"]
    runs = {run.name: run for run in find_runs([tmp_path / "mirror"])}
    assert runs["_.._.ssh"].path.parent.parent == tmp_path / "mirror"
    assert runs["live"].status == "unfinished"
    assert runs["kd-s1"].finished
    assert runs["kd-s1"].history() == {}
    assert all((tmp_path / "mirror") in run.path.resolve().parents for run in runs.values())
    assert {path.name for path in tmp_path.iterdir()} == {"mirror", "runs"}


def test_compare_reads_the_project_and_names_its_report(quick, at_wandb, library, tmp_path, monkeypatch, capsys):
    at_wandb([*quick, RecordedRun("alien")])
    written = []

    def write_report(comparison, project, table):
        written.append((project, [group.label for group in comparison.groups]))
        return "https://wandb.example/report"

    monkeypatch.setattr("lit_distill.experiment.wandb_report.write_report", write_report)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert main(["compare", "--wandb", PROJECT]) == 0
    shown = capsys.readouterr().out
    assert written == [(PROJECT, ["baseline", "kd"])]
    assert "report: https://wandb.example/report" in shown
    assert "1 runs at W&B were not logged" in shown
    # 0.05 and 0.06 over the baseline: the mean difference is 5.5 points
    assert "5.5" in shown


def test_folders_and_a_project_are_compared_together(quick, at_wandb, library, tmp_path, monkeypatch, capsys):
    at_wandb([run for run in quick if run.name.startswith("baseline")])
    labels = []
    monkeypatch.setattr(
        "lit_distill.experiment.wandb_report.write_report",
        lambda comparison, project, table: labels.extend(group.label for group in comparison.groups) or "URL",
    )
    here = tmp_path / "mine" / "quick"
    for run in quick[2:]:
        shutil.copytree(run.recorded[0].source.parent, here / run.name)
    assert main(["compare", str(here), "--wandb", PROJECT]) == 0
    assert len(labels) == 2
    assert "5.5" in capsys.readouterr().out  # the method here, its baseline there, paired by seed


# ---- the report ----------------------------------------------------------------------------------------------------


@pytest.fixture
def comparison(quick, tmp_path, at_wandb):
    at_wandb()
    fetch(quick, mirror_folder(PROJECT))
    broken = mirror_folder(PROJECT) / "quick" / "cut-s0"
    broken.mkdir()
    (broken / "config.yaml").write_text("run: {}")
    return compare_runs(find_runs([mirror_folder(PROJECT)]))


def blocks(spec, kind):
    return [block for block in spec["blocks"] if block["type"] == kind]


def test_the_report_has_table_curves_and_differences_of_configuration(comparison, at_wandb, tmp_path):
    pytest.importorskip("wandb_workspaces")
    from lit_distill.experiment.wandb_report import write_report

    api = at_wandb(reports=[SimpleNamespace(display_name="another", id="Vmlldzox")])
    url = write_report(comparison, PROJECT, markdown_table(comparison))
    (sent,) = api.sent
    assert (sent["id"], sent["entityName"], sent["projectName"]) == (None, "team", "distil")
    assert sent["displayName"] == "lit-distill: quick"
    assert url.startswith("https://wandb.example/team/distil/reports/")
    spec = json.loads(sent["spec"])
    (table,) = blocks(spec, "markdown-block")
    assert "| kd | KD |" in table["content"]
    assert "quick/cut-s0: unfinished" in table["content"]
    assert str(tmp_path) not in sent["spec"]  # nobody else shall read how folders are called here
    grids = blocks(spec, "panel-grid")
    for grid in grids:
        (runs,) = grid["metadata"]["runSets"]
        assert [key["name"] for key in runs["grouping"]] == ["group", "jobType"]
        assert (runs["project"]["entityName"], runs["project"]["name"]) == ("team", "distil")
    panels = [panel for grid in grids for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]]
    curves = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert [(curve["xAxis"], curve["metrics"]) for curve in curves] == [
        ("iteration", ["val/acc"]),
        ("iteration", ["train/loss"]),
    ]
    assert [panel["config"]["metrics"] for panel in panels if panel["viewType"] == "Bar Chart"] == [["test/acc"]]
    assert [panel["config"] for panel in panels if panel["viewType"] == "Run Comparer"] == [{"diffOnly": "split"}]


def test_the_report_that_is_there_is_brought_up_to_date(comparison, at_wandb):
    pytest.importorskip("wandb_workspaces")
    from lit_distill.experiment.wandb_report import write_report

    api = at_wandb(reports=[SimpleNamespace(display_name="lit-distill: quick", id="Vmlldzo3")])
    write_report(comparison, PROJECT, "table")
    assert [sent["id"] for sent in api.sent] == ["Vmlldzo3"]


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["compare", "--wandb", PROJECT], ["compare", "runs", "--wandb", PROJECT]])
def test_without_an_account_it_says_so_in_one_line(words, at_wandb, monkeypatch, tmp_path, capsys):
    at_wandb()
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "none"))
    wandb.teardown()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "lit-distill: error: --wandb team/distil needs an account at W&B, and no API key is set here;"
    )
    assert "wandb login" in line


@pytest.mark.parametrize("project", ["distil", "team/", "a/b/c", "https://wandb.ai/team/distil", "team/dis til"])
def test_a_project_has_two_parts(project, capsys):
    assert main(["compare", "--wandb", project]) == 2
    assert f"--wandb is '{project}'; give ENTITY/PROJECT" in capsys.readouterr().err


def test_without_the_library_it_says_so_before_it_fetches(at_wandb, monkeypatch, capsys):
    at_wandb()
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["compare", "--wandb", PROJECT]) == 2
    assert "pip install 'lit-distill[wandb]'" in capsys.readouterr().err


def test_a_project_without_runs_of_ours(at_wandb, library):
    at_wandb([RecordedRun("alien")])
    with pytest.raises(UsageError, match="team/distil has no runs of lit-distill"):
        wandb_runs.mirror(PROJECT)


@pytest.mark.parametrize(
    "error", [wandb.errors.CommError("denied"), ValueError("Could not find project distil"), Exception("not logged in")]
)
def test_what_w_and_b_says_is_one_line(error):
    with pytest.raises(RunError, match=f"W&B and team/distil: {type(error).__name__}: "), wandb_runs.reaching(PROJECT):
        raise error


def test_nothing_to_compare(capsys):
    assert main(["compare"]) == 2
    assert "give folders that hold runs, or --wandb ENTITY/PROJECT" in capsys.readouterr().err
