from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from lit_distill.experiment.recipe import read_recipe
from lit_distill.image.methods.ban import BAN


@pytest.mark.parametrize("variant", ["kl", "cwtm", "dkpp"])
def test_method(check_method, variant):
    check_method(lambda student, teacher: BAN(student, teacher, variant))


@pytest.fixture
def logits(tiny, blobs):
    return [x(blobs.images[:8]).detach().double().numpy() for x in (tiny(), tiny(6, seed=5).eval())]


def test_a_generation_learns_from_the_teachers_probabilities_at_temperature_one(step, tiny, logits):
    _, terms = step(BAN(tiny(), tiny(6, seed=5), ban_weight=0.7))
    assert terms == {
        "kd": pytest.approx(0.7 * rel_entr(softmax(logits[1], 1), softmax(logits[0], 1)).sum(1).mean(), rel=1e-3)
    }
    _, terms = step(BAN(tiny(), tiny(6, seed=5), label_weight=0.5))
    labels = [0, 1, 2, 0, 1, 2, 0, 1]  # of the first batch
    expected = -np.log(softmax(logits[0], 1)[np.arange(8), labels]).mean()
    assert terms["ce"] == pytest.approx(0.5 * expected, rel=1e-3)


def test_cwtm_weighs_labels_by_the_teachers_confidence(step, tiny, blobs, logits):
    teacher = tiny(6, seed=5)
    teacher.head.weight.data *= 20  # sure of some samples more than of others
    w = softmax(teacher.eval()(blobs.images[:8]).detach().double().numpy(), 1).max(1)
    ce = -log_softmax(logits[0], 1)[np.arange(8), blobs.labels[:8]]
    _, terms = step(BAN(tiny(), teacher, "cwtm", ban_weight=0.7))
    expected = (w * ce).sum() / w.sum()
    assert abs(expected - ce.mean()) > 1e-3
    assert terms["cwtm"] == pytest.approx(0.7 * expected, rel=1e-4)


def test_dkpp_shuffles_the_classes_after_the_first(step, tiny, logits):
    _, terms = step(BAN(tiny(), tiny(6, seed=5), "dkpp"))
    # Of three classes, two can be swapped: each sample's divergence is one of two.
    q, p = softmax(logits[0], 1), softmax(logits[1], 1)
    as_is = rel_entr(p, q).sum(1)
    swapped = p.copy()
    for row in swapped:
        a, b = np.argsort(row)[:2]
        row[[a, b]] = row[[b, a]]
    swapped = rel_entr(swapped, q).sum(1)
    sums = [np.where([bits >> i & 1 for i in range(8)], swapped, as_is).mean() for bits in range(256)]
    assert min(abs(np.array(sums) - terms["dkpp"])) < 1e-6
    assert abs(terms["dkpp"] - as_is.mean()) > 1e-6


def test_dkpp_draws_from_the_randomness_of_the_step(trainer, tiny, blobs):
    def run(noise):
        module = BAN(tiny(), tiny(6, seed=5), "dkpp")
        torch.manual_seed(noise)
        trainer(max_epochs=2).fit(module, datamodule=blobs)
        return module.student.head.weight.detach()

    assert torch.equal(run(noise=1), run(noise=2))


def test_defaults_are_the_teacher_alone(tiny):
    module = BAN(tiny(), tiny())
    assert (module.losses["kd"].temperature, module.weights["kd"], module.label_weight) == (1.0, 1.0, 0.0)


def test_a_variant_that_is_not_there_is_refused(tiny):
    with pytest.raises(Exception, match=r"cwtm"):
        BAN(tiny(), tiny(), "max")


def test_no_student_of_the_recipe_has_the_seed_of_its_teacher(tmp_path):
    # The same seed is the same initialization and order of batches: the student would be a copy.
    jobs = read_recipe(str(Path(__file__).parents[2] / "configs/recipes/born_again.yaml")).jobs(tmp_path)
    pairs = [(job.seed, need.seed) for job in jobs for need in job.needs]
    assert len(pairs) == 32
    assert all(student != teacher for student, teacher in pairs)
