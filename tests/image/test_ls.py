import pytest
from scipy.special import rel_entr, softmax
from scipy.stats import zscore

from lit_distill.image.losses.logits import LogitKL
from lit_distill.image.methods.ls import LS


def test_method(check_method):
    check_method(LS)


def test_the_term_is_the_divergence_of_standardized_logits(step, tiny, blobs):
    teacher = tiny(6, seed=5).eval()
    q, p = (
        softmax(zscore(x(blobs.images[:8]).detach().double().numpy(), axis=1, ddof=1) / 3, 1) for x in (tiny(), teacher)
    )
    _, terms = step(LS(tiny(), teacher, 3.0, kd_weight=0.7))
    assert terms["kd"] == pytest.approx(0.7 * 9 * rel_entr(p, q).sum(1).mean(), rel=1e-3)


def test_defaults_are_the_papers(tiny):
    module = LS(tiny(), tiny())
    assert module.losses["kd"].standardize
    assert not LogitKL().standardize
    assert (module.losses["kd"].temperature, module.weights["kd"], module.label_weight) == (2.0, 9.0, 0.1)
