import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import pearsonr

from lit_distill.core.errors import UsageError
from lit_distill.image.losses.logits import PearsonRelation
from lit_distill.image.methods.dist import DIST


def test_method(check_method):
    check_method(DIST)


def test_the_term_is_two_mean_correlations(step, tiny, blobs):
    teacher = tiny(6, seed=5).eval()
    q, p = (softmax(x(blobs.images[:8]).detach().double().numpy() / 3, 1) for x in (tiny(), teacher))
    rows, columns = (
        np.mean([pearsonr(*pair).statistic for pair in zip(a, b, strict=True)]) for a, b in ((q, p), (q.T, p.T))
    )
    expected = 9 * (2 * (1 - rows) + 5 * (1 - columns))
    _, terms = step(DIST(tiny(), teacher, 3.0, 2.0, 5.0, dist_weight=0.7))
    assert terms["dist"] == pytest.approx(0.7 * expected, rel=1e-3)


def test_defaults_are_the_papers(tiny):
    module = DIST(tiny(), tiny())
    loss = module.losses["dist"]
    assert (loss.temperature, loss.inter_weight, loss.intra_weight) == (4.0, 1.0, 1.0)
    assert (module.weights["dist"], module.label_weight) == (2.0, 1.0)


def test_a_batch_of_one_has_no_relation_within_classes(trainer, step, blobs_class, tiny):
    with pytest.raises(UsageError, match=r"data\.batch_size: dist relates the samples of a batch"):
        trainer(max_steps=1).fit(DIST(tiny(), tiny(6)), datamodule=blobs_class(batch_size=1))
    teacher, data = tiny(6).eval(), blobs_class(batch_size=1)
    # TinyNet's batch statistics are fine with one image: they run over pixels.
    q, p = (softmax(network(data.images[:1]).detach().double().numpy() / 4, 1) for network in (tiny(), teacher))
    _, terms = step(DIST(tiny(), teacher, intra_weight=0.0, dist_weight=0.5), data)
    assert terms["dist"] == pytest.approx(0.5 * 16 * (1 - pearsonr(q[0], p[0]).statistic), rel=1e-3)


@pytest.mark.parametrize("weights", [{"inter_weight": -1.0}, {"intra_weight": -1.0}])
def test_negative_weights_are_refused(weights):
    with pytest.raises(UsageError, match=f"{next(iter(weights))} is -1.0; a weight must be 0 or more"):
        PearsonRelation(**weights)
