import pytest
import torch
from torch.nn.functional import avg_pool2d

from lit_distill.core.errors import UsageError
from lit_distill.image import AT


def test_method(check_method):
    # The head gets its gradient from labels, everything before it from both.
    check_method(AT)


def test_the_term_is_the_sum_over_stages_of_two_minus_two_cosines(step, tiny, blobs):
    teacher, images = tiny(6, seed=5).eval(), blobs.images[:8]
    student, expected = tiny(), 0.0
    with torch.no_grad():
        s1, t1 = student.stage1(images), teacher.stage1(images)
        for s, t in ((s1, t1), (student.stage2(s1), teacher.stage2(t1))):
            cosine = torch.cosine_similarity(s.square().mean(1).flatten(1), t.square().mean(1).flatten(1))
            expected += float((2 - 2 * cosine).mean()) / s[0, 0].numel()
    _, terms = step(AT(tiny(), teacher, at_weight=10.0))
    assert terms["at"] == pytest.approx(10 * expected, rel=1e-3)


def test_taps_without_a_partner_or_a_grid_are_refused(trainer, blobs, tiny):
    with pytest.raises(UsageError, match="1 student taps and 2 teacher taps"):
        trainer().fit(AT(tiny(), tiny(), student_taps=["stage1"]), datamodule=blobs)
    with pytest.raises(UsageError, match=r"at: student tap 'head' has shape \(3,\)"):
        trainer().fit(AT(tiny(), tiny(), ["stage1", "head"], ["stage1", "head"]), datamodule=blobs)


def test_networks_of_other_grids_can_be_paired(step, tiny, blobs):
    student, teacher, images = tiny(), tiny(6, seed=5).eval(), blobs.images[:8]
    with torch.no_grad():
        own, others = avg_pool2d(student.stage1(images), 2), teacher.stage2(teacher.stage1(images))
    cosine = torch.cosine_similarity(*(maps.square().mean(1).flatten(1) for maps in (own, others)))
    moved, terms = step(AT(tiny(), teacher, ["stage1"], ["stage2"], at_weight=10.0, label_weight=0.0))
    assert terms["at"] == pytest.approx(10 * float((2 - 2 * cosine).mean()) / 16, rel=1e-3)  # a grid of 4 x 4
    assert "student.stage1.0.weight" in moved
    assert "student.head.weight" not in moved
