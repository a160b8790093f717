import pytest
import torch
from torch.nn.functional import avg_pool2d, normalize

from lit_distill.core.errors import UsageError
from lit_distill.image.methods.nst import NST


def discrepancy(*maps):
    s, t = (normalize(x.double().flatten(2), dim=2) for x in maps)
    within, between = lambda x: (x @ x.mT).square().mean(), (s @ t.mT).square().mean()
    return float(within(s) + within(t) - 2 * between)


def test_method(check_method):
    check_method(NST)


def test_the_term_is_the_sum_over_stages_of_the_discrepancy(step, tiny, blobs):
    teacher, images = tiny(6, seed=5).eval(), blobs.images[:8]
    student, expected = tiny(), 0.0
    with torch.no_grad():
        s1, t1 = student.stage1(images), teacher.stage1(images)
        for s, t in ((s1, t1), (student.stage2(s1), teacher.stage2(t1))):
            expected += discrepancy(s, t)
    _, terms = step(NST(tiny(), teacher))
    assert terms["nst"] == pytest.approx(50 * expected, rel=1e-3)


def test_networks_of_other_grids_can_be_paired(step, tiny, blobs):
    student, teacher, images = tiny(), tiny(6, seed=5).eval(), blobs.images[:8]
    with torch.no_grad():
        expected = discrepancy(avg_pool2d(student.stage1(images), 2), teacher.stage2(teacher.stage1(images)))
    moved, terms = step(NST(tiny(), teacher, ["stage1"], ["stage2"], label_weight=0.0))
    assert terms["nst"] == pytest.approx(50 * expected, rel=1e-3)
    assert "student.stage1.0.weight" in moved
    assert "student.head.weight" not in moved


def test_taps_without_a_partner_or_a_grid_are_refused(trainer, blobs, tiny):
    with pytest.raises(UsageError, match="nst: 1 student taps and 2 teacher taps"):
        trainer().fit(NST(tiny(), tiny(), student_taps=["stage1"]), datamodule=blobs)
    with pytest.raises(UsageError, match=r"nst: student tap 'head' has shape \(3,\)"):
        trainer().fit(NST(tiny(), tiny(), ["stage1", "head"], ["stage1", "head"]), datamodule=blobs)
