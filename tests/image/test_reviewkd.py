import copy

import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.image.methods.reviewkd import ReviewKD
from lit_distill.image.models import MLP, ResNetCIFAR


def test_method(check_method):
    module = check_method(ReviewKD, extra=("losses",))
    loss = module.losses["review"]
    assert loss.student_taps == ("stage1", "stage2", "pool")
    assert loss.teacher_taps == ("stage1.2@input", "stage2.2@input", "pool")
    # The deepest level alone has nothing to fuse.
    assert [fusion.attention is not None for fusion in loss.fusions] == [True, True, False]


def test_the_term_is_the_sum_over_levels_from_deep_to_shallow(step, tiny, blobs):
    teacher, student, images = tiny(6, seed=5).eval(), tiny(), blobs.images[:8]
    module = ReviewKD(tiny(), teacher, review_weight=3.0)
    build, kept = module.build, []
    module.build = lambda: build() or kept.append(copy.deepcopy(module.losses["review"].fusions))
    _, terms = step(module)
    with torch.no_grad():
        s1 = student.stage1(images)
        s2 = student.stage2(s1)
        t1 = teacher.stage1(images)
        targets = [teacher.stage1[:2](images), teacher.stage2[:2](t1), teacher.stage2(t1).mean((2, 3), keepdim=True)]
        deepest, handed = kept[0][2](s2.mean((2, 3), keepdim=True))
        middle, handed = kept[0][1](s2, handed)
        shallow, _ = kept[0][0](s1, handed)
    expected = 0.0
    for ours, theirs in zip((shallow, middle, deepest), targets, strict=True):
        difference = (ours - theirs).double().numpy()
        size = difference.shape[-1]
        value, weight, total = (difference**2).mean(), 1.0, 1.0
        for scale in (4, 2, 1):
            if scale < size:
                weight, cell = weight / 2, size // scale
                pooled = difference.reshape(8, 6, scale, cell, scale, cell).mean((3, 5))
                value, total = value + weight * (pooled**2).mean(), total + weight
        expected += value / total
    assert terms["review"] == pytest.approx(3 * expected, rel=1e-4)


def test_the_shallow_level_teaches_the_deep_ones_too(step, tiny):
    # Without labels the student's last layers learn through the fusions.
    moved, _ = step(ReviewKD(tiny(), tiny(6, seed=5), label_weight=0.0))
    assert {"student.stage1.0.weight", "student.stage2.1.weight"} <= moved
    assert not any(name.startswith("student.head") for name in moved)


@pytest.mark.parametrize(("most", "mid"), [(512, 64), (10, 10)])
def test_fused_maps_are_as_wide_as_the_embedding_up_to_a_limit(trainer, most, mid):
    from lightning.pytorch import LightningDataModule

    class Data(LightningDataModule):
        num_classes, sample_shape = 10, (3, 32, 32)

    module = ReviewKD(ResNetCIFAR(8, 10), ResNetCIFAR(14, 10, (16, 32, 64, 128)), max_mid_channels=most)
    module.trainer = trainer()
    module.trainer.datamodule = Data()
    module.build()
    shapes = [tuple(fusion.inner[0].weight.shape[:2]) for fusion in module.losses["review"].fusions]
    assert shapes == [(mid, 16), (mid, 32), (mid, 64), (mid, 64)]
    outer = [(fusion.outer[0].out_channels, fusion.grid) for fusion in module.losses["review"].fusions]
    assert outer == [(32, [32, 32]), (64, [16, 16]), (128, [8, 8]), (128, [1, 1])]


def test_students_without_maps_and_levels_without_a_partner_are_refused(trainer, blobs, tiny):
    with pytest.raises(
        UsageError, match=r"review: student tap 'layer1' has shape \(8,\); tap modules that return \(C, H, W\)"
    ):
        trainer().fit(ReviewKD(MLP(128, 3, [8, 8]), tiny(6)), datamodule=blobs)
    with pytest.raises(UsageError, match="review: 1 student taps and 3 teacher taps"):
        trainer().fit(ReviewKD(tiny(), tiny(6), ["stage1"]), datamodule=blobs)
    with pytest.raises(UsageError, match="Sequential names no stages; give student_taps"):
        trainer().fit(ReviewKD(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), tiny()), datamodule=blobs)
    with pytest.raises(UsageError, match="max_mid_channels is 0"):
        ReviewKD(tiny(), tiny(), max_mid_channels=0)
