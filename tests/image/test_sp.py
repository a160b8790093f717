import numpy as np
import pytest

from lit_distill.core.errors import UsageError
from lit_distill.image.methods.sp import SP


def difference_of_similarities(*features):
    grams = [f @ f.T for f in (feature.detach().double().numpy().reshape(8, -1) for feature in features)]
    own, others = (gram / np.linalg.norm(gram, axis=1, keepdims=True) for gram in grams)
    return ((own - others) ** 2).sum() / 64


def test_method(check_method):
    check_method(SP)


def test_the_term_is_the_weighted_difference_of_similarities_in_the_last_stage(step, tiny, blobs):
    student, teacher = tiny(), tiny(6, seed=5).eval()
    maps = (network.stage2(network.stage1(blobs.images[:8])) for network in (student, teacher))
    expected = difference_of_similarities(*maps)
    _, terms = step(SP(tiny(), teacher, sp_weight=10.0))
    assert terms["sp"] == pytest.approx(10 * expected, rel=1e-3)


def test_defaults_are_the_published_ones(tiny):
    module = SP(tiny(), tiny())
    assert (module.weights["sp"], module.label_weight) == (3000.0, 1.0)


def test_any_two_taps_can_be_compared(step, tiny, blobs):
    student, teacher, images = tiny(), tiny(6, seed=5).eval(), blobs.images[:8]
    expected = difference_of_similarities(student.stage1(images), teacher.pool(teacher.stage2(teacher.stage1(images))))
    moved, terms = step(SP(tiny(), teacher, "stage1", "pool", sp_weight=10.0, label_weight=0.0))
    assert terms["sp"] == pytest.approx(10 * expected, rel=1e-3)
    assert not any(key.startswith(("student.stage2", "student.head")) for key in moved)


def test_a_batch_of_one_has_nothing_to_relate(trainer, blobs_class, tiny):
    with pytest.raises(UsageError, match=r"data\.batch_size: sp relates the samples of a batch"):
        trainer().fit(SP(tiny(), tiny()), datamodule=blobs_class(batch_size=1))
