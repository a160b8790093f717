"""What defensive distillation does and does not do, on real data, two seeds. Slow: `make test-claims`."""

import statistics

import pytest
from claims import results_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    pytest.importorskip("foolbox", reason="needs foolbox (pip install 'lit-distill[robustness]')")
    found = results_of("defensive", tmp_path_factory.mktemp("claims"))
    return {
        stage: {key: statistics.mean(metrics[key] for metrics in seeds.values()) for key in next(iter(seeds.values()))}
        for stage, seeds in found.items()
    }


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_a_high_temperature_looks_like_robustness_to_fgsm(results, network):
    plain, warm, hot = (results[f"{network}-t{t}"]["test/fgsm_acc_eps0.3"] for t in (1, 20, 100))
    assert warm > plain + 0.2
    assert hot > warm + 0.05


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_the_reason_is_gradients_of_exactly_zero(results, network):
    plain, warm, hot = (results[f"{network}-t{t}"]["test/zero_gradient"] for t in (1, 20, 100))
    assert plain < 0.05
    assert warm > plain + 0.3
    assert hot > warm + 0.05


@pytest.mark.parametrize("network", ["teacher", "student"])
@pytest.mark.parametrize("temperature", [20, 100])
def test_with_rescaled_logits_the_robustness_is_gone(results, network, temperature):
    metrics = results[f"{network}-t{temperature}"]
    assert metrics["test/fgsm_rescaled_acc_eps0.3"] < 0.2
    assert metrics["test/fgsm_rescaled_acc_eps0.3"] < metrics["test/fgsm_acc_eps0.3"] - 0.3


def test_carlini_wagner_succeeds_on_every_image_at_every_temperature(results):
    assert [metrics["test/cw_success"] for metrics in results.values()] == [1.0] * 6
