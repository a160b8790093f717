"""The scores, against their formulas by hand."""

import pytest

from lit_distill.core.errors import UsageError
from lit_distill.dataset.evaluation import accuracy_of, scores
from lit_distill.dataset.scores import augmentation_robust_score, label_robust_score


def test_limits():
    assert label_robust_score(hard_label_recovery=-1.0, improvement_over_random=1.0) == pytest.approx(1.0)
    assert label_robust_score(hard_label_recovery=1.0, improvement_over_random=-1.0) == pytest.approx(0.0)
    # As good as real data, no better than random: (1 - 1/e) / (e - 1/e).
    assert label_robust_score(hard_label_recovery=0.0, improvement_over_random=0.0) == pytest.approx(0.26894, abs=1e-5)


def test_values_by_hand():
    # a = 0.5 * 0.2 - 0.5 * 0.4 = -0.1: (0.904837 - 0.367879) / (2.718282 - 0.367879)
    assert label_robust_score(hard_label_recovery=0.4, improvement_over_random=0.2) == pytest.approx(0.228453, abs=1e-5)
    # b = 0.25 * 0.4 + 0.75 * 0.2 = 0.25: (1.284025 - 0.367879) / 2.350402
    found = augmentation_robust_score(with_augmentation=0.4, without_augmentation=0.2, weight=0.25)
    assert found == pytest.approx(0.389783, abs=1e-5)


def test_percent_is_refused():
    with pytest.raises(ValueError, match="not percent"):
        label_robust_score(hard_label_recovery=40.0, improvement_over_random=0.2)
    with pytest.raises(ValueError, match="not percent"):
        augmentation_robust_score(with_augmentation=0.1, without_augmentation=12.0)


def test_which_scores_there_are():
    assert scores(0.5, {}) == {}
    assert scores(0.5, {"real": 0.9}) == {"hlr": pytest.approx(0.4)}
    full = scores(0.5, {"real": 0.9, "hard": 0.45, "random": 0.3, "plain": 0.4, "random_plain": 0.35})
    assert full["hlr"] == pytest.approx(0.45)
    assert full["ior"] == pytest.approx(0.2)
    assert full["lrs"] == label_robust_score(hard_label_recovery=0.45, improvement_over_random=0.2)
    assert full["ars"] == pytest.approx(augmentation_robust_score(with_augmentation=0.2, without_augmentation=0.05))


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="no finished run"):
        accuracy_of(tmp_path)
    (tmp_path / "summary.json").write_text('{"metrics": {}}')
    with pytest.raises(UsageError, match="no finished run"):
        accuracy_of(tmp_path)
    (tmp_path / "summary.json").write_text('{"metrics": {"test/acc": 0.25}}')
    assert accuracy_of(tmp_path) == 0.25
