"""A sweep on the page: what its figures say, and that they are drawn by a real browser."""

import json
import math
import shutil

import pytest

from lit_distill.cli import main
from lit_distill.experiment.comparison import compare_runs
from lit_distill.experiment.runs import find_runs
from lit_distill.experiment.sweep.figures import (
    MOST_LINES,
    importance,
    parallel_coordinates,
    sweep_figures,
    sweep_metric,
)
from lit_distill.experiment.sweep.record import Record, TrialRecord, read_record

LR, KIND = "model.init_args.optimizer.init_args.lr", "model.init_args.kind"


def record(*trials, goal="maximize", metric="val/acc", parameters=None, **changes):
    parameters = {LR: True, KIND: False} if parameters is None else parameters
    return Record("s", "bayes", metric, goal, parameters, trials, "x", **changes)


def trial(number, value, lr=0.01, kind="a", state="complete", why=""):
    return TrialRecord(f"t{number:03d}", state, {LR: lr, KIND: kind}, value, why)


THREE = (trial(0, 0.9, 1e-4), trial(1, 0.95, 1e-2, "b"), trial(2, 0.5, 1e-3, state="stopped early"))


def spec(figure):
    return figure.specs[""]


def test_lines_go_through_the_places_of_their_values():
    figure = parallel_coordinates(record(*THREE))
    lines = {line["text"].partition(":")[0]: line for line in spec(figure)["data"]}
    assert all(line["x"] == [0, 1, 2] for line in lines.values())
    # lr by its logarithm, kinds evenly, accuracy from 50 to 95 percent
    assert lines["t000"]["y"] == pytest.approx([0.0, 0.0, 40 / 45])
    assert lines["t001"]["y"] == pytest.approx([1.0, 1.0, 1.0])
    assert lines["t002"]["y"] == pytest.approx([0.5, 0.0, 0.0])
    assert spec(figure)["layout"]["xaxis"]["ticktext"] == ["lr", "kind", "val accuracy in %"]
    texts = [(note["x"], note["text"]) for note in spec(figure)["layout"]["annotations"]]
    assert (0, "0.0001") in texts
    assert (0, "0.001") in texts  # few values have a tick each
    assert (1, "b") in texts
    assert (2, "95") in texts


def test_many_values_have_ticks_at_ends_and_middle():
    trials = [trial(number, number / 10, 10 ** (-4 + number / 3)) for number in range(10)]
    notes = spec(parallel_coordinates(record(*trials)))["layout"]["annotations"]
    ticks = {axis: [(round(note["y"], 6), note["text"]) for note in notes if note["x"] == axis] for axis in (0, 2)}
    assert ticks[0] == [(0, "0.0001"), (0.5, "0.00316"), (1, "0.1")]  # the geometric mean
    assert ticks[2] == [(0, "0"), (0.5, "45"), (1, "90")]


@pytest.mark.parametrize(("goal", "best"), [("maximize", "t001"), ("minimize", "t000")])
def test_the_best_is_thick_and_stopped_ones_are_dotted(goal, best):
    lines = {
        line["text"].partition(":")[0]: line["line"]
        for line in spec(parallel_coordinates(record(*THREE, goal=goal)))["data"]
    }
    assert [name for name, line in lines.items() if line["width"] > 3] == [best]
    assert [name for name, line in lines.items() if line.get("dash")] == ["t002"]


def test_the_table_has_every_trial_the_best_first():
    failed = trial(3, None, state="failed", why="train/loss is nan")
    figure = parallel_coordinates(record(*THREE, failed))
    assert figure.head == ("trial", "lr", "kind", "val accuracy in %", "state")
    assert [row[0] for row in figure.rows] == ["t001", "t000", "t002", "t003"]
    assert figure.rows[-1][-1] == "failed: train/loss is nan"
    assert len(spec(figure)["data"]) == 3  # it has no value to draw


def test_many_trials_leave_the_worst_undrawn():
    trials = [trial(number, number / 1000) for number in range(MOST_LINES + 50)]
    figure = parallel_coordinates(record(*trials))
    assert len(spec(figure)["data"]) == MOST_LINES
    assert f"best {MOST_LINES} of {MOST_LINES + 50}" in figure.caption
    assert len(figure.rows) == MOST_LINES + 50


def test_nothing_to_draw_is_no_figure():
    assert parallel_coordinates(record()) is None
    assert parallel_coordinates(record(trial(0, math.nan))) is None
    assert parallel_coordinates(record(trial(0, 0.5), parameters={})) is None
    assert importance(record(*THREE)) is None


def test_names_from_a_file_are_text():
    evil = trial(0, 0.5, kind="<b>%{x}</b>")
    figure = parallel_coordinates(record(evil, *THREE))
    assert "<b>" not in json.dumps(spec(figure))
    assert not any("%{" in line["text"] for line in spec(figure)["data"])


def test_bars_are_shares():
    figure = importance(record(*THREE, importance={LR: 0.25, KIND: 0.75}))
    assert spec(figure)["data"][0]["y"] == ["lr", "kind"]
    assert spec(figure)["data"][0]["x"] == [25, 75]
    assert figure.rows == [("kind", "75.0"), ("lr", "25.0")]


@pytest.fixture
def folder(write_run, tmp_path):
    """A sweep of fifty trials on disk, of which some were stopped early and one failed."""
    trials = []
    for number in range(50):
        state = "failed" if number == 7 else "stopped early" if number % 5 == 2 else "complete"
        value = None if state == "failed" else 0.8 + number / 1000
        made = trial(
            number, value, 10 ** (-4 + number / 25), "ab"[number % 2], state, "nan" if state == "failed" else ""
        )
        history = f"step,epoch,val/acc\n10,0,{0.5}\n20,1,{value}\n"
        run = write_run(
            f"{made.name} (lr {made.values[LR]:.3g})", 0, {"val/acc": value or 0.0, "test/acc": 0.7}, name=made.name,
            experiment="s", lr=made.values[LR], history=history, started=f"2026-01-01T00:00:{number:02d}",
        )  # fmt: skip
        if state != "complete":
            (run / "summary.json").unlink()
        trials.append(made)
    record(*trials, importance={LR: 0.9, KIND: 0.1}).write(tmp_path / "runs/s")
    return tmp_path / "runs/s"


def test_the_record_is_read_as_it_was_written(folder):
    again = read_record(folder)
    again.write(folder)
    assert read_record(folder) == again
    assert again.best.name == "t049"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 2}', '{"schema": 1, "trials": [{}]}'])
def test_a_record_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    assert read_record(tmp_path) is None
    assert read_record(tmp_path / "missing") is None


def test_a_comparison_finds_the_sweep_its_metric_and_its_trials(folder, tmp_path, write_run):
    runs = find_runs([folder])
    assert sweep_metric(runs) == "val/acc"
    figures, notes = sweep_figures(compare_runs(runs, "val/acc"))
    assert [figure.id for figure in figures] == ["coordinates", "importance"]
    lines = spec(figures[0])["data"]
    rows = {line["text"].partition(":")[0]: line["meta"] for line in lines}
    assert rows["t049"].startswith("t049 (lr")  # hides with its row
    assert rows["t002"] is None
    assert any("t002, t012" in note and "stopped early" in note for note in notes)
    assert any("t007 failed: nan" in note for note in notes)
    write_run("kd", 0, experiment="other")
    assert sweep_metric(find_runs([tmp_path / "runs"])) is None


def test_too_few_trials_for_importance_are_noted(folder):
    record(*THREE).write(folder)
    _, notes = sweep_figures(compare_runs(find_runs([folder]), "val/acc"))
    assert any("there are 2" in note for note in notes)


def test_the_page_is_drawn_by_a_browser(folder, tmp_path):
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("needs chromium and chromedriver")
    selenium = pytest.importorskip("selenium.webdriver")
    page = tmp_path / "page.html"
    assert main(["compare", str(folder), "--html", str(page)]) == 0
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with selenium.Chrome(options=options, service=selenium.ChromeService(driver)) as chrome:
        chrome.get(page.as_uri())
        count = "return document.querySelectorAll('#coordinates .scatterlayer .trace').length"
        assert chrome.execute_script(count) == 49
        assert chrome.execute_script("return document.querySelectorAll('#importance .bars .point').length") == 2
        assert chrome.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        button = next(b for b in chrome.find_elements("css selector", ".legend button") if b.text.startswith("t049"))
        chrome.execute_script("arguments[0].click()", button)
        assert chrome.execute_script(count) == 48
        assert chrome.get_log("browser") == []
