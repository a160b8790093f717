"""Which runs are averaged, and whether the statistics and the words about them are right."""

import json
import math
import subprocess
import sys

import pytest
from samples import CONFIG
from scipy import stats

from lit_distill.core.errors import UsageError
from lit_distill.experiment.compare import compare
from lit_distill.experiment.stats import Stat, paired_difference, stat
from lit_distill.experiment.tables import columns, sentences
from lit_distill.experiment.words import MISSING, show, show_count, show_difference

BASE = (0.90, 0.91, 0.89, 0.92, 0.90)
KD = (0.92, 0.93, 0.92, 0.93, 0.92)  # differences 2, 2, 3, 1, 2 points


@pytest.fixture
def quick(write_run):
    """Five seeds of baseline and kd."""
    for seed, (base, kd) in enumerate(zip(BASE, KD, strict=True)):
        write_run("baseline", seed, {"test/acc": base, "test/ece": 0.03}, method="lit_distill.image.Supervised")
        write_run("kd", seed, {"test/acc": kd, "test/ece": 0.02 + 0.001 * seed})


def row(comparison, label):
    return next(group for group in comparison.groups if group.label == label)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_mean_and_deviation_of_literals():
    value = stat([0.90, 0.92, 0.94])
    assert value.mean == pytest.approx(0.92)
    assert value.sd == pytest.approx(0.02)
    assert value.se == pytest.approx(0.02 / math.sqrt(3))
    assert stat([0.5]) == Stat(0.5, None, 1)


def test_paired_difference_of_literals():
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), and t = 4.302653 for two degrees of freedom.
    difference = paired_difference({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0}, "base")
    assert (difference.n, difference.mean) == (3, pytest.approx(2.0))
    assert difference.se == pytest.approx(0.577350, abs=1e-6)
    assert difference.low == pytest.approx(-0.484138, abs=1e-5)
    assert difference.high == pytest.approx(4.484138, abs=1e-5)
    assert difference.clear  # 2 > 2 * 0.577


def test_paired_difference_is_that_of_scipy():
    theirs = stats.ttest_rel(KD, BASE)
    ours = paired_difference(dict(enumerate(KD)), dict(enumerate(BASE)), "base")
    interval = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert ours.mean / ours.se == pytest.approx(theirs.statistic)


def test_only_common_seeds_are_paired():
    difference = paired_difference({0: 1.0, 1: 2.0, 5: 9.0}, {1: 1.0, 0: 0.5, 7: 3.0}, "base")
    assert difference.per_seed == {0: 0.5, 1: 1.0}


@pytest.mark.parametrize("other", [{}, {3: 1.0}, {0: 1.0}])
def test_fewer_than_two_pairs_give_no_difference(other):
    assert paired_difference({0: 1.0, 1: 2.0}, other, "base") is None


def test_a_difference_of_exactly_two_standard_errors_is_not_clear():
    # Differences 0 and 2 have mean 1 and standard error 1; 1, 3 and their like have mean 2 and standard error 1.
    assert not paired_difference({0: 0.0, 1: 2.0}, {0: 0.0, 1: 0.0}, "base").clear
    assert not paired_difference({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0}, "base").clear
    assert paired_difference({0: 1.0, 1: 2.9}, {0: 0.0, 1: 0.0}, "base").clear


# ---- what is averaged ------------------------------------------------------------------------------------------------


def test_seeds_are_averaged_and_set_against_the_baseline(quick, compared):
    comparison = compared()
    assert [(group.label, len(group.runs)) for group in comparison.groups] == [("baseline", 5), ("kd", 5)]
    assert comparison.baseline == "baseline"
    kd = row(comparison, "kd")
    assert kd.stats["test/acc"].mean == pytest.approx(0.924)
    assert kd.difference.mean == pytest.approx(0.02)
    assert kd.difference.se == pytest.approx(math.sqrt(0.5 / 5) / 100)  # variance of 2, 2, 3, 1, 2 is 0.5
    assert row(comparison, "baseline").difference is None
    assert comparison.notes == ()


@pytest.mark.parametrize(
    "other",
    [
        {"lr": 0.2},
        {"params": 2000},
        {"method": "lit_distill.image.AT"},
        {"data": "lit_distill.image.CIFAR10"},
        {"batch_size": 32},
    ],
)
def test_runs_that_differ_by_more_than_the_seed_are_not_averaged(write_run, compared, other):
    write_run("kd", 0)
    write_run("kd", 1, **other)
    comparison = compared()
    assert [len(group.runs) for group in comparison.groups] == [1, 1]
    assert "differ by more than the seed" in comparison.notes[0]


def test_an_option_that_is_null_is_like_one_that_an_earlier_version_did_not_have(write_run, compared):
    write_run("kd", 0, config=CONFIG.replace("    train_size: {train_size}\n", ""))
    write_run("kd", 1)
    write_run("kd", 2, train_size=500)
    assert sorted(len(group.runs) for group in compared().groups) == [1, 2]


def test_rows_of_one_stage_are_labelled_by_what_differs(write_run, compared):
    write_run("kd", 0, lr=0.1)
    write_run("kd", 1, lr=0.2)
    assert {group.label for group in compared().groups} == {"kd (lr: 0.1)", "kd (lr: 0.2)"}


def test_rows_that_differ_by_network_alone_still_have_unique_labels(write_run, compared):
    write_run("kd", 0, params=1000)
    write_run("kd", 1, params=2000)
    assert sorted(group.label for group in compared().groups) == ["kd #1", "kd #2"]


def test_a_model_name_that_looks_like_a_seed_keeps_runs_apart(write_run, compared):
    template = "model:\n  init_args:\n    name: hub/{root}\n"
    write_run("kd", 0, config=template, root="vit-s16")
    write_run("kd", 1, config=template, root="vit-s8")
    assert len(compared().groups) == 2


def test_two_experiments_are_kept_apart_and_each_has_its_own_baseline(write_run, compared):
    for experiment, gain in (("one", 0.01), ("two", 0.03)):
        for seed in (0, 1):
            write_run("baseline", seed, {"test/acc": 0.9}, experiment=experiment)
            write_run("kd", seed, {"test/acc": 0.9 + gain}, experiment=experiment)
    comparison = compared()
    assert {group.label for group in comparison.groups} == {"one/baseline", "one/kd", "two/baseline", "two/kd"}
    assert row(comparison, "one/kd").difference.mean == pytest.approx(0.01)
    assert row(comparison, "two/kd").difference.baseline == "two/baseline"


@pytest.mark.parametrize("later", ["kd-a", "kd-b"])
def test_of_two_runs_with_one_seed_the_later_counts(write_run, compared, later):
    for name in ("kd-a", "kd-b"):
        month = "02" if name == later else "01"
        accuracy = 0.7 if name == later else 0.5
        write_run("kd", 0, {"test/acc": accuracy}, name=name, finished=f"2026-{month}-01T00:00:00+00:00")
    comparison = compared()
    assert [group.stats["test/acc"].mean for group in comparison.groups] == [0.7]
    assert f"{later}, which finished later" in comparison.notes[0]


def test_a_run_without_configuration_is_averaged_with_nothing(write_run, compared):
    (write_run("kd", 0) / "config.yaml").unlink()
    (write_run("kd", 1) / "config.yaml").unlink()
    assert len(compared().groups) == 2


def test_a_diverged_seed_is_left_out_and_told(write_run, compared):
    write_run("kd", 0, {"test/acc": 0.9})
    write_run("kd", 1, {"test/acc": math.nan})
    comparison = compared()
    assert comparison.groups[0].stats["test/acc"] == Stat(0.9, None, 1)
    assert "kd-s1" in comparison.notes[0]
    assert "nan" in comparison.notes[0]


# ---- what is subtracted ----------------------------------------------------------------------------------------------


def test_a_teacher_with_one_seed_has_no_difference(quick, write_run, compared):
    write_run("teacher", 0, {"test/acc": 0.98}, params=50_000)
    teacher = row(compared(), "teacher")
    assert teacher.difference is None
    assert "1 seed" in teacher.why_none


def test_another_student_is_subtracted_but_never_the_headline(quick, write_run, compared):
    for seed in range(5):
        write_run("teacher", seed, {"test/acc": 0.98}, params=50_000)
    comparison = compared()
    assert not row(comparison, "teacher").difference.fair
    assert any("mixes size with method" in note for note in comparison.notes)
    assert all("teacher" not in sentence for sentence in sentences(comparison))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"data": "lit_distill.image.CIFAR10"}, "lit_distill.image.CIFAR10"),
        ({"root": "data/letters"}, "root: letters, those of baseline have root: digits"),
        ({"train_size": 500}, "train_size: 500, those of baseline have no such setting"),
    ],
)
def test_unlike_data_are_never_subtracted(write_run, compared, other, why):
    for seed in (0, 1):
        write_run("baseline", seed)
        write_run("kd", seed, **other)
    kd = row(compared(), "kd")
    assert kd.difference is None
    assert why in kd.why_none


DISTILLED = """seed_everything: {seed}
model:
  class_path: {method}
data:
  class_path: {data}
  init_args:
    source:
      class_path: lit_distill.image.Digits
      init_args:
        root: {root}
        batch_size: 7
        train_size: {train_size}
        seed: {seed}
    depth: 3
"""
RELABELLED = DISTILLED.replace(
    DISTILLED[DISTILLED.index("    source:") : DISTILLED.index("    depth")],
    """    images:
      class_path: lit_distill.dataset.RandomSubset
      init_args:
        source:
          class_path: lit_distill.image.Digits
          init_args:
            root: {root}
            batch_size: 7
            train_size: {train_size}
            seed: {seed}
        per_class: 1
""",
)


@pytest.mark.parametrize("config", [DISTILLED, RELABELLED], ids=["source", "source of images"])
@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"root": "elsewhere/digits"}, ""),
        ({"root": "data/letters"}, "its data have root: letters, those of baseline have root: digits"),
    ],
)
def test_distilled_data_are_compared_with_others_of_the_same_source(write_run, compared, config, other, why):
    for seed in (0, 1):
        write_run("baseline", seed)
        write_run("mirage", seed, data="lit_distill.graph.Mirage", config=config, **other)
    mirage = row(compared(), "mirage")
    assert (mirage.difference is None) == bool(why)
    assert why in (mirage.why_none or "")


def test_the_same_data_in_another_place_are_subtracted(write_run, compared):
    for seed in (0, 1):
        write_run("baseline", seed, root="data/digits")
        write_run("kd", seed, root="/mnt/disk/digits", batch_size=32)
    assert row(compared(), "kd").difference.n == 2


def test_a_named_baseline_replaces_the_default(quick, compared):
    comparison = compared(baseline="kd")
    assert row(comparison, "baseline").difference.mean == pytest.approx(-0.02)
    assert row(comparison, "kd").difference is None


def test_two_possible_baselines_are_not_chosen_between(write_run, compared):
    for seed in (0, 1):
        write_run("baseline", seed, lr=0.1, name=f"base-a-s{seed}")
        write_run("baseline", seed, lr=0.2, name=f"base-b-s{seed}")
        write_run("kd", seed)
    kd = row(compared(), "kd")
    assert kd.difference is None
    assert "--baseline" in kd.why_none
    assert row(compared(baseline="baseline (lr: 0.2)"), "kd").difference.n == 2


def test_without_a_baseline_nothing_is_subtracted(write_run, compared):
    write_run("kd", 0)
    comparison = compared()
    assert comparison.baseline is None
    assert all("difference" not in column.heading for column in columns(comparison))


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_an_unknown_metric_is_told_with_its_neighbours(quick, compared):
    with pytest.raises(UsageError, match=r"'test/accuracy'.*test/acc"):
        compared(metric="test/accuracy")


def test_an_unknown_baseline_is_told_with_its_neighbours(quick, compared):
    with pytest.raises(UsageError, match=r"'baselin'.*baseline"):
        compared(baseline="baselin")


def test_a_folder_without_runs_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        compare([str(tmp_path / "empty")])


# ---- words -----------------------------------------------------------------------------------------------------------


def test_the_headline_states_a_clear_gain(quick, compared):
    assert sentences(compared()) == ["kd beats baseline by 2.0 ± 0.3 points of test accuracy over 5 paired seeds."]


def test_the_headline_of_a_lower_is_better_metric_turns_the_sign(quick, compared):
    (sentence,) = sentences(compared(metric="test/ece"))
    assert sentence.startswith("kd beats baseline by 0.80 ± 0.07 points of test ECE")


def test_a_gain_within_noise_is_not_called_a_gain(write_run, compared):
    for seed, kd in enumerate((0.90, 0.93, 0.88)):
        write_run("baseline", seed, {"test/acc": 0.9})
        write_run("kd", seed, {"test/acc": kd})
    text = " ".join(sentences(compared()))
    assert "no clear difference" in text
    assert "beats" not in text


def test_a_loss_is_told_as_a_loss(write_run, compared):
    for seed in range(3):
        write_run("baseline", seed, {"test/acc": 0.9})
        write_run("kd", seed, {"test/acc": 0.8 + 0.001 * seed})
        write_run("at", seed, {"test/acc": 0.7 + 0.001 * seed})
    lead, *others = sentences(compared())
    assert lead == "No method beats baseline in test accuracy."
    assert others[0].startswith("kd falls behind baseline by 9.9")


def test_two_seeds_say_that_the_interval_includes_zero(write_run, compared):
    for seed, kd in enumerate((0.91, 0.92)):  # 1.5 ± 0.5 points: beyond two standard errors, yet t is 12.7
        write_run("baseline", seed, {"test/acc": 0.9})
        write_run("kd", seed, {"test/acc": kd})
    assert "still includes zero" in sentences(compared())[0]


def test_without_a_baseline_the_best_is_named_as_unpaired(write_run, compared):
    write_run("kd", 0, {"test/acc": 0.951})
    assert sentences(compared()) == [
        "There is no baseline to compare with; the best test accuracy is kd's, 95.1 % (one seed)."
    ]


def test_numbers_are_shown_as_a_reader_expects():
    assert show("test/acc", Stat(0.95123, 0.0031, 5)) == "95.1 ± 0.3"
    assert show("test/acc", Stat(0.95123, 0.00031, 5)) == "95.12 ± 0.03"
    assert show("test/nll", Stat(0.1234, None, 1)) == "0.12"
    assert show("test/acc", None) == MISSING
    assert [show_count(Stat(n, None, 1)) for n in (3970, 1.24e6, 4.12e10)] == ["3,970", "1.24 M", "41.2 G"]
    difference = paired_difference({0: -0.01, 1: -0.02, 2: -0.03}, {0: 0.0, 1: 0.0, 2: 0.0}, "base")
    assert show_difference("test/acc", difference) == "−2.0 ± 0.6 [−4.5, 0.5]"  # noqa: RUF001


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_results_and_every_state(quick, write_run, tmp_path, capsys):
    write_run("teacher", 0, {"test/acc": 0.98})
    (write_run("at", 0) / "summary.json").unlink()
    (write_run("at", 1) / "summary.json").write_text("{")
    for seed in range(5):
        write_run("noise", seed, {"test/acc": BASE[seed] + (-1) ** seed * 0.01})
    assert compare([str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (kd,) = [line for line in lines if "│ kd " in line]
    assert "92.4 ± 0.5" in kd
    assert "+2.0 ± 0.3 [1.1, 2.9] *" in kd
    (noise,) = [line for line in lines if "│ noise " in line]
    assert "*" not in noise
    (teacher,) = [line for line in lines if "│ teacher " in line]
    assert MISSING in teacher
    assert any("at-s0: unfinished (last written 20" in line for line in lines)
    assert any("at-s1: broken: " in line for line in lines)


def test_the_command_lists_unfinished_runs_alone(write_run, tmp_path, capsys):
    (write_run("kd", 0) / "summary.json").unlink()
    assert compare([str(tmp_path / "runs")], html=str(tmp_path / "page.html")) == 0
    assert "kd-s0: unfinished" in capsys.readouterr().out
    assert "kd-s0" in (tmp_path / "page.html").read_text()


def test_the_files_hold_the_same_numbers(quick, tmp_path, capsys):
    compare([str(tmp_path / "runs")], json=str(tmp_path / "c.json"), markdown=str(tmp_path / "c.md"))
    values = json.loads((tmp_path / "c.json").read_text())
    kd = next(group for group in values["groups"] if group["label"] == "kd")
    assert kd["difference"]["mean"] == pytest.approx(0.02)
    assert kd["difference"]["exceeds_two_standard_errors"] is True
    assert kd["seeds"] == [0, 1, 2, 3, 4]
    markdown = (tmp_path / "c.md").read_text().splitlines()
    assert markdown[0].startswith("kd beats baseline")
    assert any(line.startswith("| kd | KD | 5 | 92.4 ± 0.5 | **+2.0 ± 0.3 [1.1, 2.9]** |") for line in markdown)


def test_comparing_imports_neither_torch_nor_plotting():
    code = (
        "import sys, lit_distill.experiment.compare, lit_distill.experiment.dashboard, lit_distill.experiment.tables; "
        "print([m for m in ('torch', 'lightning', 'scipy', 'numpy', 'plotly', 'jinja2', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
