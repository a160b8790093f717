"""Runs of several domains and data sets in one comparison: what is read together, by which metric, against what."""

import json

import pytest

from lit_distill.core.errors import UsageError
from lit_distill.experiment.compare import compare
from lit_distill.experiment.runs import write_plan
from lit_distill.experiment.tables import columns, sentences

IMAGE = {"experiment": "a", "method": "lit_distill.image.KD", "domain": "image"}
NOISE = {
    "experiment": "noise",
    "method": "lit_distill.diffusion.DMD",
    "domain": "diffusion",
    "data": "lit_distill.diffusion.GeneratorImages",
    "metric": "test/fd",
}


@pytest.fixture
def mixed(write_run):
    """Two seeds of a baseline and a method in two domains, where the generator's accuracy is not its point."""
    for seed in (0, 1):
        write_run("baseline", seed, {"test/acc": 0.90 + 0.01 * seed}, **IMAGE)
        write_run("kd", seed, {"test/acc": 0.93 + 0.01 * seed}, **IMAGE)
        write_run("baseline", seed, {"test/fd": 0.30 + 0.1 * seed, "test/acc": 0.99}, **NOISE)
        write_run("dmd", seed, {"test/fd": 0.20 + 0.1 * seed, "test/acc": 0.97}, **NOISE)


def section(comparison, title):
    return next(part for part in comparison.sections if part.title == title)


def test_each_domain_is_read_by_its_own_metric_against_its_own_baseline(mixed, compared):
    comparison = compared()
    assert comparison.metric == ""
    pictures, noise = section(comparison, "image · Digits"), section(comparison, "diffusion · GeneratorImages")
    assert (pictures.metric, noise.metric) == ("test/acc", "test/fd")
    assert [group.label for group in noise.groups] == ["noise/baseline", "noise/dmd"]
    assert pictures.groups[1].difference.mean == pytest.approx(0.03)
    assert noise.groups[1].difference.mean == pytest.approx(-0.1)
    assert noise.groups[1].difference.baseline == "noise/baseline"
    told = sentences(comparison)
    assert told[0].startswith("image · Digits: a/kd beats a/baseline by 3.0")
    assert told[1].startswith("diffusion · GeneratorImages: noise/dmd beats noise/baseline by 0.10")


def test_a_metric_asked_for_holds_everywhere(mixed, compared):
    comparison = compared(metric="test/acc")
    assert {part.metric for part in comparison.sections} == {"test/acc"}
    assert comparison.metric == "test/acc"


def test_a_metric_that_one_domain_lacks_leaves_its_column_out(mixed, compared):
    comparison = compared(metric="test/fd")
    headings = [column.heading for column in columns(section(comparison, "image · Digits"))]
    assert "test Fréchet distance ↓" not in headings
    assert all(group.difference is None for group in section(comparison, "image · Digits").groups)


def test_the_recipe_decides_before_the_summary(write_run, compared, tmp_path):
    for seed in (0, 1):
        for stage, offset in (("plain", 0.0), ("kd", 0.02)):
            write_run(stage, seed, {"test/acc": 0.9 + offset, "test/ece": 0.05 - offset}, metric="test/acc")
    write_plan(tmp_path / "runs" / "quick", "test/ece", ["plain"])
    comparison = compared()
    assert (comparison.metric, comparison.baseline) == ("test/ece", "plain")
    kd = next(group for group in comparison.groups if group.stage == "kd")
    assert kd.difference.mean == pytest.approx(-0.02)


@pytest.mark.parametrize("content", ["", "[]", '{"metric": 3, "baselines": "x"}', '{"baselines": [1, null]}', "\0"])
def test_a_malformed_word_of_a_recipe_says_nothing(write_run, compared, tmp_path, content):
    write_run("baseline", 0)
    (tmp_path / "runs" / "quick" / "recipe.json").write_text(content)
    comparison = compared()
    assert (comparison.metric, comparison.baseline) == ("test/acc", "baseline")


def test_a_metric_of_a_recipe_that_no_run_has_is_told(write_run, compared, tmp_path):
    write_run("kd", 0)
    write_plan(tmp_path / "runs" / "quick", "test/typo", [])
    comparison = compared()
    assert comparison.metric == "test/acc"
    assert any("test/typo" in note for note in comparison.notes)


def test_without_any_word_the_more_telling_metric_is_taken(write_run, compared):
    write_run("kd", 0, {"test/zebra": 1.0, "test/acc": 0.5, "test/fd": 0.1})
    assert compared().metric == "test/fd"


def test_what_few_rows_have_is_not_taken(write_run, compared):
    write_run("odd", 0, {"test/fd": 0.1, "test/acc": 0.5})
    for number in range(3):
        write_run(f"m{number}", 0, {"test/acc": 0.5})
    assert compared().metric == "test/acc"


def test_data_of_other_names_have_tables_of_their_own(write_run, compared):
    for root in ("letters", "digits"):
        for seed in (0, 1):
            write_run("baseline", seed, root=f"data/{root}", experiment=root)
            write_run("kd", seed, root=f"/elsewhere/{root}", experiment=root)
    comparison = compared()
    assert [part.title for part in comparison.sections] == ["image · Digits (digits)", "image · Digits (letters)"]
    assert all(part.groups[1].difference.n == 2 for part in comparison.sections)


def test_a_baseline_of_another_domain_is_lent(write_run, compared):
    for seed in (0, 1):
        write_run("full", seed, {"test/acc": 0.9}, started="2026-01-01", domain="image")
        write_run("dc", seed, {"test/acc": 0.8}, method="lit_distill.dataset.DC", domain="dataset")
    comparison = compared(baseline="full")
    assert comparison.sections == ()  # the baseline's own table would say nothing more
    assert comparison.title == "dataset · Digits"
    assert [group.label for group in comparison.groups] == ["full", "dc"]
    assert comparison.groups[1].difference.baseline == "full"


@pytest.mark.parametrize("metric", [None, "test/acc"])
def test_a_baseline_that_is_told_by_another_metric_is_not_lent(write_run, compared, metric):
    for seed in (0, 1):
        write_run("dmd", seed, {"test/fd": 0.1, "test/acc": 0.99}, started="2026-01-01", domain="diffusion")
        write_run("classifier", seed, {"test/acc": 0.9}, domain="image")
    comparison = compared(baseline="dmd", metric=metric)
    classifier = next(group for group in comparison.groups if group.stage == "classifier")
    assert classifier.difference is None
    assert classifier.why_none == "dmd is of another domain, and told by another metric"


def test_one_baseline_for_each_data_set(mixed, write_run, compared):
    for seed in (0, 1):
        write_run("teacher", seed, {"test/fd": 0.1}, **NOISE)
    comparison = compared(baseline=["noise/teacher", "image/kd"])
    assert {label for part in comparison.sections for label in part.baselines} == {"noise/teacher", "a/kd"}
    noise = section(comparison, "diffusion · GeneratorImages")
    assert {group.label for group in noise.groups if group.difference} == {"noise/baseline", "noise/dmd"}


def test_a_baseline_named_for_one_data_set_leaves_the_default_to_others(mixed, compared):
    comparison = compared(baseline="noise/dmd")
    assert section(comparison, "image · Digits").baseline == "baseline"
    assert section(comparison, "diffusion · GeneratorImages").baseline == "dmd"


def test_a_baseline_that_is_nowhere_is_a_mistake(mixed, compared):
    with pytest.raises(UsageError, match=r"'noise/teacherr'"):
        compared(baseline=["image/kd", "noise/teacherr"])


def test_data_without_a_baseline_are_told_once(mixed, write_run, compared):
    for name in ("a", "b"):
        write_run(name, 0, {"test/perplexity": 5.0}, data="lit_distill.llm.Text", experiment="words", domain="llm")
    notes = [note for note in compared().notes if "no baseline" in note]
    assert len(notes) == 1
    start = "llm · Text has no baseline of its own, and its rows no difference (its data are lit_distill.llm.Text"
    assert notes[0].startswith(start)


def test_what_is_kept_apart_is_told_with_the_setting(write_run, compared):
    write_run("kd", 0, lr=0.1)
    write_run("kd", 1, lr=0.2)
    (note,) = compared().notes
    assert note.endswith("kd in " + str(compared().runs[0].path.parent) + " stands in 2 rows, since its runs differ by "
                         "more than the seed (lr)")  # fmt: skip


def test_runs_of_two_versions_are_averaged_and_told(write_run, compared):
    write_run("kd", 0, versions={"lit_distill": "0.1.0"})
    write_run("kd", 1, versions={"lit_distill": "0.2.0"})
    comparison = compared()
    assert len(comparison.groups[0].runs) == 2
    assert comparison.notes == ("kd averages runs of different versions of lit_distill (0.1.0, 0.2.0)",)


def test_the_files_have_a_table_for_each_section(mixed, tmp_path, capsys):
    files = {kind: tmp_path / f"c.{kind}" for kind in ("json", "markdown", "csv", "latex", "html")}
    compare([str(tmp_path / "runs")], **{kind: str(path) for kind, path in files.items()})
    out = capsys.readouterr().out
    assert "image · Digits: test accuracy by stage" in out
    assert "diffusion · GeneratorImages: test Fréchet distance by stage" in out
    values = json.loads(files["json"].read_text())
    assert [(part["title"], part["metric"]) for part in values["sections"]] == [
        ("image · Digits", "test/acc"),
        ("diffusion · GeneratorImages", "test/fd"),
    ]
    assert files["markdown"].read_text().count("\n### ") == 2
    assert files["latex"].read_text().count(r"\toprule") == 2
    assert 'id="s1-section"' in files["html"].read_text()
