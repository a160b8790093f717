"""The page: what it shows, that nothing from a configuration runs in it, and that it works in a real browser."""

import base64
import html
import json
import math
import re
from types import SimpleNamespace

import pytest
from samples import HOSTILE, PICTURE, RELIABILITY, SVG

from lit_distill.experiment.dashboard import Figure, Look, render
from lit_distill.experiment.dashboard.cost import MOST_LABELLED
from lit_distill.experiment.dashboard.curves import CURVE_POINTS, mean_curve
from lit_distill.experiment.dashboard.figure import MOST_DRAWN, drawn_groups
from lit_distill.experiment.dashboard.panels import (
    LARGEST_PICTURE,
    confusion_panel,
    panel_figures,
    reliability_panel,
    robustness_panel,
)
from lit_distill.experiment.runs import find_runs
from lit_distill.experiment.secrets import without_secrets

LOOK = Look("c1", "circle", "solid")
ROBUSTNESS = {"epsilon": [0.0, 0.1, 0.2], "fgsm": [0.9, 0.7, 0.6], "rescaled": [0.9, 0.5, 0.1]}


def specs_of(text):
    return json.loads(re.search(r'<script type="application/json" id="specs">(.*?)</script>', text, re.S)[1])


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def visible(text):
    """The page without plotly.js, script and style, with tags removed and entities read."""
    text = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)))


def test_the_page_tells_result_table_runs_and_configuration(quick, page):
    text = visible(page().read_text())
    assert "kd beats baseline by 2.0 ± 0.0 points of test accuracy over 5 paired seeds." in text
    assert "16 finished, 2 not" in text
    assert re.search(r"at-s0 quick image KD Digits . . . unfinished \(last written 20", text)
    assert "broken: summary.json cannot be read" in text
    assert "lit_distill 0.1.0" in text


def test_the_figures_draw_the_values_of_the_runs(quick, page):
    specs = specs_of(page().read_text())
    assert {"dots", "differences", "curves", "cost"} <= specs.keys()
    seeds = specs["dots"][""]["data"][2]  # the baseline's seeds; before them the teacher's seed and mean
    assert seeds["x"] == pytest.approx([90.0, 90.4, 90.6, 91.0, 91.2])
    difference = specs["differences"][""]["data"][1]
    assert difference["x"] == pytest.approx([2.0])
    assert list(specs["curves"]) == ["val/acc", "val/ece", "train/loss"]
    teacher = specs["curves"]["val/acc"]["data"][0]
    assert teacher["x"] == [25, 50, 75, 100]
    assert teacher["y"] == pytest.approx([58.0, 78.0, 84.6667, 88.0])
    assert list(specs["cost"]) == ["params"]
    sizes = [trace["customdata"] for trace in specs["cost"]["params"]["data"] if trace["mode"] == "markers"]
    assert sizes == [["100,000 parameters"], *[["1,000 parameters"]] * 3]


def test_every_configuration_can_be_put_together_again(quick, page, tmp_path):
    data = data_of(page().read_text())["configs"]
    runs = find_runs([tmp_path / "runs"])
    for run, blocks in zip(runs, data["runs"], strict=True):
        lines = [data["lines"][line] for block in blocks for line in data["blocks"][block]]
        assert lines == (run.path / "config.yaml").read_text().splitlines()
    assert len(data["lines"]) == len(set(data["lines"])) < 120  # of 18 configurations with 23 lines each


def test_curves_of_single_runs_are_those_of_their_files(quick, page, tmp_path):
    data = data_of(page().read_text())
    curves, at = data["curves"], data["names"].index("teacher-s0")
    assert curves["metrics"] == ["val/acc", "train/loss", "val/ece"]
    place, values = curves["runs"][at]["0"]
    assert curves["steps"][place] == [25, 50, 75, 100]
    assert values == pytest.approx([58.0, 78.0, 84.67, 88.0])
    assert curves["titles"][0] == "val accuracy in %"
    assert len(curves["steps"]) == 1  # shared by all


def test_the_front_is_drawn_and_rows_off_it_stand_back(write_run, page):
    write_run("small", 0, {"test/acc": 0.7}, params=10)
    write_run("middle", 0, {"test/acc": 0.6}, params=100)  # larger and worse than small
    write_run("large", 0, {"test/acc": 0.9}, params=1000)
    spec = specs_of(page().read_text())["cost"]["params"]
    line = spec["data"][0]
    assert (line["x"], line["y"]) == ([10, 1000], [70, 90])
    sizes = {mark["meta"]: mark["marker"]["size"] for mark in spec["data"] if mark["mode"] == "markers"}
    assert sizes["small"] == sizes["large"] > sizes["middle"]


def test_a_caller_may_add_figures(write_run, page, compared, tmp_path):
    write_run("kd", 0)
    spec = {"data": [{"type": "parcoords"}], "layout": {}}
    extra = Figure("parallel", "Parameters", "One line for each trial.", "3 trials", {"": spec}, ("trial",), [("1",)])
    text = render(compared(), tmp_path, [extra])
    assert specs_of(text)["parallel"][""] == spec
    assert "One line for each trial." in visible(text)


def test_distilled_data_are_drawn_against_their_bytes(write_run, page):
    for seed in (0, 1):
        write_run("full", seed, {"test/acc": 0.9, "test/bytes": 5000.0})
        write_run("mirage", seed, {"test/acc": 0.8, "test/bytes": 40.0})
    specs = specs_of(page(baseline="full").read_text())
    data, axis = specs["cost"]["bytes"]["data"], specs["cost"]["bytes"]["layout"]["xaxis"]
    assert sorted(trace["x"][0] for trace in data if trace["mode"] == "markers") == pytest.approx([40, 5000])
    assert axis["title"]["text"] == "bytes of the training set"
    assert axis["ticktext"] == ["30 B", "100 B", "300 B", "1 kB", "3 kB"]
    assert axis["tickvals"] == [30, 100, 300, 1000, 3000]


def size_data(page, **options):
    data = specs_of(page(**options).read_text())["cost"]["bytes"]["data"]
    return ([trace for trace in data if trace["mode"] == mode and "meta" in trace] for mode in ("markers", "text"))


def test_sizes_that_differ_between_seeds_have_error_bars(write_run, page):
    write_run("full", 0, {"test/acc": 0.95, "test/bytes": 5000.0}, started="2026-01-01")
    for seed, size in enumerate((30.0, 50.0)):
        write_run("random", seed, {"test/acc": 0.8 + 0.1 * seed, "test/bytes": size})
    (_, mark), _ = size_data(page)
    # Two values that differ by d have the standard error d / 2.
    assert mark["error_x"]["array"] == pytest.approx([20.0])
    assert mark["error_y"]["array"] == pytest.approx([10.0])


def test_marks_of_one_size_stand_side_by_side_and_labels_off_each_other(write_run, page):
    for name, accuracy in (("a", 0.800), ("b", 0.801), ("c", 0.9)):
        write_run(name, 0, {"test/acc": accuracy, "test/bytes": 5000.0})
    write_run("full", 0, {"test/acc": 0.95, "test/bytes": 500_000.0})
    marks, labels = size_data(page)
    places = {mark["meta"]: mark["x"][0] for mark in marks}
    assert places["a"] < places["b"] < places["c"]
    assert places["b"] == pytest.approx(5000)
    assert places["full"] == pytest.approx(500_000)
    assert {mark["customdata"][0] for mark in marks} == {"5,000 bytes", "500,000 bytes"}
    heights = {label["meta"]: label["y"][0] for label in labels}
    assert (heights["a"], heights["c"], heights["full"]) == pytest.approx((80, 90, 95))
    assert heights["b"] > 80.5  # moved up: a line of text is about 0.8 here
    sides = {label["meta"]: label["textposition"] for label in labels}
    assert sides == {"a": "middle right", "b": "middle right", "c": "middle right", "full": "middle left"}


def test_many_points_are_told_by_the_legend_alone(write_run, page):
    for number in range(MOST_LABELLED + 1):
        write_run(f"m{number}", 0, {"test/acc": 0.5 + 0.01 * number, "test/bytes": 10.0 + 100 * number})
    marks, labels = size_data(page)
    assert (len(list(marks)), list(labels)) == (MOST_LABELLED + 1, [])


def test_hostile_text_never_appears_unescaped(hostile, page):
    path = page(baseline=HOSTILE[0])
    text = path.read_text()
    for attempt in HOSTILE[:3]:
        assert attempt not in text
    for start in ("<img", "<svg onload", "<b>", "alert(1)</script>"):
        assert start not in text.replace(_plotly(), "")
    assert len(re.findall("<script", text.replace(_plotly(), ""))) == 6  # two of data, plotly.js, and three of ours
    assert html.escape(HOSTILE[1], quote=False) in text  # it is there, escaped
    labels = specs_of(text)["s0-dots"][""]["layout"]["yaxis"]["ticktext"]
    assert not any("<" in label for label in labels)  # Plotly reads tags in labels


def _plotly():
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def test_the_page_is_one_file_of_modest_size(quick, page):
    path = page()
    text = path.read_text().replace(_plotly(), "")
    assert path.stat().st_size < 6e6
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(""", text)
    assert "default-src 'none'" in text


def test_secrets_of_a_configuration_are_hidden():
    config = (
        "logger:\n  api_key: abc123\n  token: 't0p'\n  wandb_token: xyz\nHF: hf_abcdefghijklmnop1234\n"
        "max_tokens: 12\ntokenizer: gpt2\npassword: p\nsecret: null\n"
    )
    hidden = without_secrets(config)
    for secret in ("abc123", "t0p", "xyz", "hf_abc", "password: p"):
        assert secret not in hidden
    assert "max_tokens: 12\ntokenizer: gpt2\n" in hidden
    assert "  api_key: [hidden]\n" in hidden


SECRETS = {
    "api_key: |\n  first line\n  second line\nlr: 1\n": "api_key: [hidden]\nlr: 1\n",
    "credentials:\n- one\n- two\nlr: 1\n": "credentials: [hidden]\nlr: 1\n",
    "- secret: 'a\n\n    b'\n- lr: 1\n": "- secret: [hidden]\n- lr: 1\n",
    "'OPENAI_API_KEY': x\n": "'OPENAI_API_KEY': [hidden]\n",
    "url: https://me:pass@host/v1\n": "url: https://[hidden]@host/v1\n",
    "text: see ghp_abcdefghijklmnop for more\n": "text: see [hidden] for more\n",
    "eos_token: </s>\npad_token: <pad>\nmonkey: 3\nmax_new_tokens: 5\n": None,
}


@pytest.mark.parametrize("config", SECRETS)
def test_secrets_on_several_lines_and_in_values_are_hidden(config):
    assert without_secrets(config) == (SECRETS[config] or config)


def test_no_secret_reaches_the_page_not_even_in_a_label_or_a_text(write_run, page):
    template = "model:\n  init_args:\n    api_key: {root}\n    lr: {lr}\n"
    for lr in (1, 2):
        text = [{"prompt": "my key", "student": "is hf_abcdefghijklmnopqrst"}]
        write_run("kd", lr, config=template, root=f"key-number-{lr}", lr=lr, panels={"text": text})
    text = page().read_text()
    assert "key-number" not in text
    assert "hf_abcdefghijklmnopqrst" not in text
    assert "kd (lr: 1)" in text


def test_without_finished_runs_the_page_still_lists_them(write_run, page):
    (write_run("kd", 0) / "summary.json").unlink()
    text = visible(page().read_text())
    assert "No finished run to compare yet." in text
    assert "kd-s0" in text


def test_links_lead_from_the_page_to_the_run(write_run, page, tmp_path):
    write_run("kd", 0, name="a b#c-s0")
    (link,) = re.findall(r'<a href="(runs[^"]*)">', page().read_text())
    assert link == "runs/quick/a%20b%23c-s0/"


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_a_mean_curve_of_equal_steps_is_the_mean_at_each_step():
    steps, mean, sd = mean_curve([([1, 2], [1.0, 3.0]), ([1, 2], [3.0, 3.0])])
    assert (steps, mean) == ([1, 2], [2.0, 3.0])
    assert sd == pytest.approx([math.sqrt(2), 0.0])


def test_a_mean_curve_reaches_as_far_as_all_seeds_and_interpolates():
    steps, mean, _ = mean_curve([([0, 10, 20, 30], [0.0, 1.0, 2.0, 3.0]), ([0, 20], [0.0, 4.0])])
    assert (steps, mean) == ([0, 10, 20], [0.0, 1.5, 3.0])


def test_a_mean_curve_without_common_steps_or_finite_values_is_none():
    assert mean_curve([([0, 1], [0.0, 1.0]), ([5, 6], [0.0, 1.0])]) is None
    assert mean_curve([([0, 1], [math.nan, math.inf])]) is None
    assert mean_curve([]) is None


def test_a_long_curve_is_thinned_but_keeps_its_ends():
    steps, mean, sd = mean_curve([(list(range(10_000)), [float(i) for i in range(10_000)])])
    assert (len(steps), steps[0], steps[-1], mean[-1], sd) == (CURVE_POINTS, 0, 9999, 9999.0, None)


def test_reliability_is_pooled_by_the_samples_in_each_bin():
    other = {"confidence": [0.25, 0.75], "accuracy": [0.0, 1.0], "count": [30, 10]}
    group = SimpleNamespace(label="kd", stats={})
    figure = reliability_panel(group, [RELIABILITY, other], LOOK)
    bars = figure.specs[""]["data"][0]
    assert bars["y"] == pytest.approx([(10 * 0.5 + 30 * 0.0) / 40, (30 * 0.75 + 10 * 1.0) / 40])
    assert bars["customdata"] == ["40", "40"]
    # ECE of the first: 10/40 * 0.25 + 0; of the second: 30/40 * 0.25 + 10/40 * 0.25; their mean is 15.625 %.
    assert figure.title == "kd: ECE 15.6 %"


def test_an_empty_bin_is_not_drawn_as_zero_accuracy():
    panel = {"confidence": [0.0, 0.75], "accuracy": [math.nan, 0.75], "count": [0, 30]}
    figure = reliability_panel(SimpleNamespace(label="kd", stats={}), [panel], LOOK)
    assert figure.specs[""]["data"][0]["y"] == [None, 0.75]
    assert figure.title == "kd: ECE 0.0 %"
    assert len(figure.rows) == 1


@pytest.mark.parametrize(
    "panel",
    [[], {}, "text", {"confidence": [0.1], "accuracy": [1, 2], "count": [1]}, RELIABILITY | {"count": [0, 0]}],
)
def test_a_malformed_panel_is_a_note(write_run, compared, panel):
    write_run(panels={"reliability": panel})
    groups = compared().groups
    figures, notes = panel_figures(groups, {"kd": LOOK})
    assert figures == []
    assert "malformed" in notes[0]


CONFUSION = {"classes": ["cat", "dog"], "counts": [[8, 2], [0, 10]]}


def test_confusion_is_pooled_over_seeds_in_percent_of_each_label():
    other = {"classes": ["cat", "dog"], "counts": [[2, 8], [1, 9]]}
    figure = confusion_panel(SimpleNamespace(label="kd"), [CONFUSION, other], LOOK)
    (heat,) = figure.specs[""]["data"]
    assert heat["z"] == [[50.0, 50.0], [5.0, 95.0]]
    assert heat["customdata"] == [[10, 10], [1, 19]]
    assert figure.specs[""]["layout"]["yaxis"]["ticktext"] == ["cat", "dog"]
    assert figure.summary == "72.5 % are right; cat is taken for dog most often (10 times)"
    assert figure.rows == [("cat", "10", "10"), ("dog", "1", "19")]


@pytest.mark.parametrize(
    "panel",
    [{}, CONFUSION | {"classes": ["cat"]}, CONFUSION | {"counts": [[0, 0], [0, 0]]}, CONFUSION | {"counts": "x"}],
)
def test_a_malformed_confusion_is_a_note(write_run, compared, panel):
    write_run(panels={"confusion": panel})
    figures, notes = panel_figures(compared().groups, {"kd": LOOK})
    assert figures == []
    assert "malformed" in notes[0]


def test_robustness_is_the_mean_over_seeds_with_two_standard_errors():
    other = {"epsilon": [0.0, 0.1, 0.2], "fgsm": [0.9, 0.5, 0.2], "rescaled": [0.9, 0.3, 0.1]}
    figure = robustness_panel(SimpleNamespace(label="kd"), [ROBUSTNESS, other], LOOK)
    attacked, rescaled = figure.specs[""]["data"]
    assert attacked["x"] == rescaled["x"] == [0.0, 0.1, 0.2]
    assert attacked["y"] == pytest.approx([0.9, 0.6, 0.4])
    assert rescaled["y"] == pytest.approx([0.9, 0.4, 0.1])
    # Two values that differ by d have the standard error d / 2.
    assert attacked["error_y"]["array"] == pytest.approx([0.0, 0.2, 0.4])
    assert figure.title == "kd: 40.0 % at 0.2, rescaled 10.0 %"
    assert figure.rows[2] == ("0.2", "0.400", "0.100")


@pytest.mark.parametrize(
    "panel",
    [
        [],
        {},
        "text",
        ROBUSTNESS | {"fgsm": [0.9]},
        ROBUSTNESS | {"fgsm": [0.9, None, 0.1]},
        ROBUSTNESS | {"epsilon": ["a", "b", "c"]},
    ],
)
def test_a_malformed_robustness_panel_is_a_note(write_run, compared, panel):
    write_run(seed=0, panels={"robustness": ROBUSTNESS})
    write_run(seed=1, panels={"robustness": panel})
    figures, notes = panel_figures(compared().groups, {"kd": LOOK})
    assert figures == []
    assert "panel 'robustness' is left out, its data are malformed" in notes[0]


def test_continuations_stand_open_and_escaped(write_run, page):
    rows = [{"prompt": "The sea", "student": "is <b>blue</b>", "teacher": "is wide"}]
    for seed in (0, 1):
        write_run("kl", seed, panels={"text": rows})
    text = page().read_text()
    assert "is &lt;b&gt;blue&lt;/b&gt;" in text
    assert '<details class="numbers" open>' in text
    assert not any(name.startswith("panel") for name in specs_of(text))  # nothing for Plotly to draw


def test_a_picture_of_the_first_run_is_shown_as_an_image(write_run, page):
    for seed in (0, 1):
        folder = write_run("kd", seed, panels={"picture": PICTURE})
    (folder.parent / "kd-s0" / "trees.svg").write_text(SVG)
    text = page().read_text()
    assert f'<img src="data:image/svg+xml;base64,{base64.b64encode(SVG.encode()).decode()}"' in text
    assert 'alt="kd: 2 trees. a: C(O)"' in text
    assert "As in the run kd-s0" in visible(text)
    assert not any(name.startswith("panel") for name in specs_of(text))  # nothing for Plotly to draw


def test_a_grid_of_images_is_shown_from_a_folder_of_the_run(write_run, page):
    folder = write_run(panels={"picture": PICTURE | {"file": "distilled/images.png"}})
    (folder / "distilled").mkdir()
    (folder / "distilled" / "images.png").write_bytes(b"not looked into")
    expected = base64.b64encode(b"not looked into").decode()
    assert f'<img src="data:image/png;base64,{expected}"' in page().read_text()


@pytest.mark.parametrize(
    ("panel", "content"),
    [
        (PICTURE, None),
        (PICTURE | {"file": "distilled/../../trees.svg"}, SVG),
        (PICTURE | {"file": "../trees.svg"}, SVG),
        (PICTURE | {"file": "/trees.svg"}, SVG),
        (PICTURE | {"file": "config.yaml"}, SVG),
        (PICTURE | {"rows": 1}, SVG),
        (PICTURE, " " * (LARGEST_PICTURE + 1)),
        ("text", SVG),
    ],
)
def test_a_picture_that_cannot_be_shown_is_a_note(write_run, compared, panel, content):
    folder = write_run(panels={"picture": panel})
    if content is not None:
        for place in (folder, folder.parent):
            (place / "trees.svg").write_text(content)
    figures, notes = panel_figures(compared().groups, {"kd": LOOK})
    assert figures == []
    assert "panel 'picture' is left out" in notes[0]


def test_each_kind_of_panel_has_its_own_section(write_run, page):
    for seed in (0, 1):
        write_run("kd", seed, panels={"reliability": RELIABILITY, "robustness": ROBUSTNESS})
    text = page().read_text()
    calibration, robustness = text.index(">Calibration</h2>"), text.index(">Robustness</h2>")
    assert calibration < text.index("kd: ECE") < robustness < text.index("kd: 60.0 % at 0.2, rescaled 10.0 %")
    assert {"panel-0", "panel-1"} <= specs_of(text).keys()


def test_an_unknown_panel_is_a_note(write_run, compared):
    write_run(panels={"tree": {}, "reliability": RELIABILITY})
    figures, notes = panel_figures(compared().groups, {"kd": LOOK})
    assert len(figures) == 1
    assert notes == ["panel 'tree' is left out: this version cannot draw it"]


def test_many_rows_are_thinned_to_the_best_and_the_baseline(write_run, compared):
    write_run("baseline", 0, {"test/acc": 0.1})
    for i in range(MOST_DRAWN + 5):
        write_run(f"m{i}", 0, {"test/acc": 0.5 + 0.01 * i})
    labels = [group.label for group in drawn_groups(compared())]
    assert len(labels) == MOST_DRAWN
    assert "baseline" in labels
    assert f"m{MOST_DRAWN + 4}" in labels
    assert "m0" not in labels
