import pytest
import torch
from scipy.special import rel_entr, softmax
from scipy.stats import entropy

from lit_distill.core.errors import UsageError
from lit_distill.image.methods.bdkd import BDKD
from lit_distill.image.methods.dml import DML


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture
def logits(tiny, blobs):
    """What student and teacher say of the first batch, before the first step."""
    return tuple(net(blobs.images[:8]).detach().double().numpy() for net in (tiny(), tiny(6, seed=5)))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_terms_are_the_two_objectives(step, tiny, logits, temperature):
    p_s, p_t = (softmax(values / temperature, 1) for values in logits)
    surer = entropy(p_s, axis=1) < entropy(p_t, axis=1)
    forward, reverse = rel_entr(p_t, p_s).sum(1), rel_entr(p_s, p_t).sum(1)
    balanced = ((1 + 2 * surer) * forward + (3 - 2 * surer) * reverse).mean()
    module = BDKD(
        tiny(),
        tiny(6, seed=5),
        nu=3.0,
        temperature=temperature,
        divergence_weight=0.7,
        teacher_divergence_weight=0.4,
    )
    _, terms = step(module)
    assert terms["divergence"] == pytest.approx(0.7 * temperature**2 * balanced, rel=1e-3)
    assert terms["teacher_divergence"] == pytest.approx(0.7 * 0.4 * temperature**2 * reverse.mean(), rel=1e-3)


def test_the_rule_reaches_the_loss(step, tiny):
    found = {rule: step(BDKD(tiny(), tiny(6, seed=5), rule=rule))[1] for rule in ("entropy", "entropy_swapped")}
    assert found["entropy"]["divergence"] != pytest.approx(found["entropy_swapped"]["divergence"], rel=1e-4)
    assert found["entropy"]["teacher_divergence"] == found["entropy_swapped"]["teacher_divergence"]


def test_the_teachers_divergence_can_be_turned_and_left_out(step, tiny, logits):
    p_s, p_t = (softmax(values, 1) for values in logits)
    _, terms = step(BDKD(tiny(), tiny(6, seed=5), teacher_divergence="teacher_first"))
    assert terms["teacher_divergence"] == pytest.approx(rel_entr(p_t, p_s).sum(1).mean(), rel=1e-3)
    moved, terms = step(BDKD(tiny(), tiny(6, seed=5), teacher_divergence="none"))
    assert set(terms) == {"ce", "divergence", "teacher_ce"}
    assert "teacher.head.weight" in moved


def test_with_the_forward_divergence_alone_a_step_is_one_of_dml(trainer, blobs, tiny):
    # The rule gives the forward divergence a weight of 1 + nu = 2.
    options = {"rule": "forward", "nu": 1.0, "divergence_weight": 0.5, "teacher_divergence_weight": 2.0}
    balanced = BDKD(tiny(), tiny(6, seed=5), **options, optimizer=sgd)
    mutual = DML(tiny(), [tiny(6, seed=5)], sequential=False, optimizer=sgd)
    for module in (balanced, mutual):
        trainer(max_steps=1).fit(module, datamodule=blobs)
    for found, expected in ((balanced.student, mutual.student), (balanced.teacher, mutual.peers[0])):
        for left, right in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(left, right)


def test_defaults_are_stated(tiny):
    module = BDKD(tiny(), tiny(6))
    assert (module.rule, module.nu, module.temperature) == ("entropy", 2.0, 1.0)
    assert (module.teacher_divergence, module.teacher_divergence_weight) == ("student_target", 1.0)
    assert (module.divergence_weight, module.sequential) == (1.0, False)
    assert module.reference.reconstruction


def test_a_weight_that_is_not_positive_is_refused(tiny):
    with pytest.raises(UsageError, match=r"model\.nu is 0\.0; it must be above 0"):
        BDKD(tiny(), tiny(), nu=0.0)
