import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from lit_distill.core.errors import UsageError
from lit_distill.image.losses.logits import MultiLevel
from lit_distill.image.methods.mlkd import MLKD


def test_method(check_method):
    check_method(MLKD)


@pytest.mark.parametrize("unsure_only", [False, True])
def test_the_term_is_samples_batch_and_classes(step, tiny, blobs, unsure_only):
    teacher = tiny(6, seed=5).eval()
    z_s, z_t = (x(blobs.images[:8]).detach().double().numpy() for x in (tiny(), teacher))
    p = softmax(z_t, 1)
    samples = p.max(1) <= np.median(p.max(1)) if unsure_only else np.ones(8, bool)
    classes = p.sum(0) <= np.median(p.sum(0)) if unsure_only else np.ones(3, bool)
    assert unsure_only == (not samples.all())
    expected = 0.0
    for t in (1.0, 4.0):
        q, p = softmax(z_s / t, 1), softmax(z_t / t, 1)
        expected += t**2 * (rel_entr(p, q).sum(1) * samples).sum() / 8
        expected += ((q @ q.T - p @ p.T)[samples] ** 2).sum() / 8 + ((q.T @ q - p.T @ p)[classes] ** 2).sum() / 3
    _, terms = step(MLKD(tiny(), teacher, [1.0, 4.0], unsure_only, mlkd_weight=0.7))
    assert terms["mlkd"] == pytest.approx(0.7 * expected, rel=1e-3)


def test_standardized_logits_do_not_see_the_students_scale(step, tiny):
    values = []
    for scale in (1.0, 10.0):
        student = tiny()
        student.head.weight.data *= scale
        student.head.bias.data *= scale
        values.append(step(MLKD(student, tiny(6, seed=5), standardize=True))[1]["mlkd"])
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_defaults_are_the_papers(tiny):
    module = MLKD(tiny(), tiny())
    loss = module.losses["mlkd"]
    assert (loss.temperatures, loss.unsure_only, loss.standardize) == ((2.0, 3.0, 4.0, 5.0, 6.0), False, False)
    assert (module.weights["mlkd"], module.label_weight) == (0.9, 0.1)


def test_temperatures_must_be_there_and_positive():
    with pytest.raises(UsageError, match="temperatures is empty"):
        MultiLevel([])
    with pytest.raises(UsageError, match=r"temperature is -2\.0; it must be above 0"):
        MultiLevel([1.0, -2.0])
