"""Which figure a summary calls the most telling."""

from types import SimpleNamespace

import pytest

from lit_distill.experiment.summary import _telling_metric

MONITOR = {"class_path": "a.BestWeights", "init_args": {"monitor": "val/auroc"}}
METRICS = {"test/auroc": 0.8, "test/acc": 0.9, "val/auroc": 0.7}


@pytest.mark.parametrize(
    ("callbacks", "headline", "expected"),
    [
        ([MONITOR], "test/acc", "test/auroc"),  # what the checkpoint was chosen by
        (MONITOR, "test/acc", "test/auroc"),
        ([{"class_path": "a.EMA"}], "test/acc", "test/acc"),
        (None, "test/acc", "test/acc"),
        ([{"class_path": "a.B", "init_args": {"monitor": "train/loss"}}], "test/acc", "test/acc"),
        ([{"class_path": "a.B", "init_args": {"monitor": "val/other"}}], "test/fd", None),  # neither was measured
    ],
)
def test_the_monitored_metric_comes_before_the_methods(callbacks, headline, expected):
    model = SimpleNamespace(headline=headline)
    assert _telling_metric({"trainer": {"callbacks": callbacks}}, model, METRICS) == expected


def test_a_module_without_a_headline_names_none():
    assert _telling_metric({"trainer": {}}, SimpleNamespace(), METRICS) is None
    assert _telling_metric({}, SimpleNamespace(headline="test/acc"), METRICS) == "test/acc"
