import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from lit_distill.core.errors import UsageError
from lit_distill.image.losses.logits import MultiLevel
from lit_distill.image.methods.mlkd import MLKD
from lit_distill.losses.logits import multi_level, multi_level_published


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


@pytest.fixture
def two_views(blobs_class):
    class TwoViews(blobs_class):
        strong_view = True

        def batches(self):
            return [batch._replace(strong=batch.images.flip(3) * 0.5) for batch in super().batches()]

    return TwoViews()


def parts(z_s, z_t, t):
    """The means over samples and classes of the loss's three parts, in float64."""
    q, p = softmax(z_s / t, 1), softmax(z_t / t, 1)
    samples = t**2 * rel_entr(p, q).sum(1).mean()
    batch, classes = ((q @ q.T - p @ p.T) ** 2).sum() / len(q), ((q.T @ q - p.T @ p) ** 2).sum() / q.shape[1]
    return samples, batch, classes


def logits_of_views(tiny, data, teacher):
    """Logits of the student in training mode, one view after the other, and of the teacher."""
    batch, student = data.batches()[0], tiny()
    views = (batch.images, batch.strong)
    return batch.labels, *([network(x).detach().double().numpy() for x in views] for network in (student, teacher))


def test_both_views_count(step, tiny, two_views):
    teacher = tiny(6, seed=5).eval()
    labels, student, target = logits_of_views(tiny, two_views, teacher)
    _, terms = step(MLKD(tiny(), teacher, [1.0, 4.0], mlkd_weight=0.7, label_weight=0.3), two_views)
    levels = sum(sum(parts(a, b, t)) for a, b in zip(student, target, strict=True) for t in (1.0, 4.0))
    nll = sum(-log_softmax(a, 1)[range(8), labels].mean() for a in student)
    assert terms["mlkd"] == pytest.approx(0.7 * levels, rel=1e-4)
    assert terms["ce"] == pytest.approx(0.3 * nll, rel=1e-4)


@pytest.mark.parametrize("standardize", [False, True])
def test_as_published_is_what_the_public_code_adds_up(step, tiny, two_views, standardize):
    teacher = tiny(6, seed=5).eval()
    _, (weak, strong), (weak_t, strong_t) = logits_of_views(tiny, two_views, teacher)
    p = softmax(weak_t, 1)
    samples = (p.max(1) <= np.percentile(p.max(1), 50)).mean()  # 4 of 8
    classes = (p.sum(0) <= np.percentile(p.sum(0), 50)).mean()  # 2 of 3
    assert (samples, classes) == (0.5, pytest.approx(2 / 3))

    def scaled(z):
        return (z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True) if standardize else z

    expected = 0.0
    for t in (2, 3, 4, 5, 6):
        _, b, c = parts(weak, weak_t, t)
        s = parts(scaled(weak), scaled(weak_t), t)[0]
        second = s if t in (2, 6) else parts(scaled(strong), scaled(strong_t), t)[0]
        expected += samples * (s + b) + classes * c + second
    _, terms = step(MLKD(tiny(), teacher, as_published=True, standardize=standardize, mlkd_weight=0.7), two_views)
    assert terms["mlkd"] == pytest.approx(0.7 * expected, rel=1e-3)


def test_each_part_counts_with_its_sign():
    # Logits far apart, unlike those of untrained networks, so that no part drowns in the others.
    weak, strong, weak_t, strong_t = (6 * np.random.default_rng(seed).normal(size=(8, 3)) for seed in range(4))
    temperatures = (2, 3, 4, 5, 6)
    each = np.array([parts(weak, weak_t, t) for t in temperatures])
    assert (each.sum(0) > 0.02 * each.sum()).all()
    tensors = [torch.tensor(z).float() for z in (weak, strong, weak_t, strong_t)]
    assert float(multi_level(tensors[0], tensors[2])) == pytest.approx(each.sum(), rel=1e-5)
    s_strong = sum(parts(strong, strong_t, t)[0] for t in (3, 4, 5))
    s_weak = sum(parts(weak, weak_t, t)[0] for t in (2, 6))
    expected = 0.5 * each[:, :2].sum() + 2 / 3 * each[:, 2].sum() + s_strong + s_weak
    assert float(multi_level_published(*tensors)) == pytest.approx(expected, rel=1e-5)


def test_the_teacher_gets_no_gradient():
    student, teacher = torch.randn(2, 6, 4).requires_grad_(), torch.randn(2, 6, 4).requires_grad_()
    multi_level_published(*student, *teacher).backward()
    assert teacher.grad is None
    assert (student.grad.flatten(1) != 0).any(1).all()


def test_as_published_wants_two_views(step, tiny, blobs):
    with pytest.raises(UsageError, match=r"takes two views; set data\.strong_view to true"):
        step(MLKD(tiny(), tiny(6), as_published=True), blobs)
