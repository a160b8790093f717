import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from lit_distill.core.errors import UsageError
from lit_distill.core.schedules import Linear
from lit_distill.image.distillation import Shapes
from lit_distill.image.losses.logits import DecoupledKL
from lit_distill.image.methods.dkd import DKD


def test_method(check_method):
    check_method(DKD)


@pytest.mark.parametrize("standardize", [False, True])
def test_the_term_weighs_the_label_and_the_others(step, tiny, blobs, standardize):
    images, labels, teacher = blobs.images[:8], blobs.labels[:8].numpy(), tiny(6, seed=5).eval()
    networks = [x(images).detach().double().numpy() for x in (tiny(), teacher)]
    ce = -log_softmax(networks[0], 1)[np.arange(8), labels].mean()
    if standardize:
        networks = [(z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True, ddof=1) for z in networks]
    q, p = (softmax(z / 2, 1) for z in networks)
    expected = 0.0
    for q_i, p_i, y in zip(q, p, labels, strict=True):
        rests = [np.delete(x, y) / (1 - x[y]) for x in (p_i, q_i)]
        target = rel_entr([p_i[y], 1 - p_i[y]], [q_i[y], 1 - q_i[y]]).sum()
        expected += 4 * (3 * target + 5 * rel_entr(*rests).sum()) / 8
    module = DKD(tiny(), teacher, 2.0, 3.0, 5.0, standardize, dkd_weight=0.7, label_weight=0.2)
    _, terms = step(module)
    assert terms["dkd"] == pytest.approx(0.7 * expected, rel=1e-3)
    assert terms["ce"] == pytest.approx(0.2 * ce, rel=1e-4)


def test_published_warm_up_is_the_epoch_over_twenty():
    weight = Linear(0.05, 1.0, 19 * 781)
    assert [weight(781 * (epoch - 1)) for epoch in (1, 2, 10, 20, 30)] == pytest.approx([0.05, 0.1, 0.5, 1.0, 1.0])


def test_defaults_are_the_papers(tiny):
    module = DKD(tiny(), tiny())
    loss = module.losses["dkd"]
    assert (loss.temperature, loss.alpha, loss.beta, loss.standardize) == (4.0, 1.0, 8.0, False)
    assert (module.weights["dkd"], module.label_weight) == (1.0, 1.0)


def test_values_without_a_meaning_are_refused():
    with pytest.raises(UsageError, match=r"temperature is 0\.0; it must be above 0"):
        DecoupledKL(temperature=0.0)
    with pytest.raises(UsageError, match=r"beta is -1\.0; a weight must be 0 or more"):
        DecoupledKL(beta=-1.0)
    with pytest.raises(UsageError, match="data has 1 class; dkd compares classes"):
        DecoupledKL().build(Shapes({}, {}, 1))
