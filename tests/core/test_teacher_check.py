import warnings

import torch

from lit_distill.core.callbacks import TeacherCheck
from lit_distill.core.schedules import Linear
from lit_distill.image import KD


def said(trainer, blobs, student, teacher, **kwargs):
    module = KD(student, teacher, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callbacks=[TeacherCheck()]).fit(module, datamodule=blobs)
    return [str(warning.message) for warning in caught if "the teacher" in str(warning.message)], module


def test_a_good_teacher_passes_in_silence(trainer, blobs, tiny, mean_teacher):
    messages, _ = said(trainer, blobs, tiny(), mean_teacher())
    assert messages == []


def test_a_teacher_at_chance_is_reported_with_both_rates(trainer, blobs, tiny, mean_teacher):
    class Shifted(mean_teacher):
        def forward(self, images):
            return super().forward(images).roll(1, dims=1)

    messages, _ = said(trainer, blobs, tiny(), Shifted())
    assert len(messages) == 1
    assert "the teacher is right on 0.0% of 24 validation samples, chance is 33.3%" in messages[0]


def test_a_weight_of_zero_is_reported(trainer, blobs, tiny, mean_teacher):
    messages, _ = said(trainer, blobs, tiny(), mean_teacher(), kd_weight=0.0)
    assert messages == ["the teacher has no effect: no term of it was part of the loss; check the weights"]


def test_a_term_without_gradient_is_reported(trainer, blobs, tiny, mean_teacher):
    class Detached(KD):
        def combine(self, terms):
            return super().combine({**terms, "kd": terms["kd"].detach()})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callbacks=[TeacherCheck()]).fit(Detached(tiny(), mean_teacher()), datamodule=blobs)
    messages = [str(warning.message) for warning in caught if "no effect" in str(warning.message)]
    assert len(messages) == 1
    assert "its terms (kd) give the student no gradient" in messages[0]


def test_a_teacher_that_comes_in_by_schedule_passes_in_silence(trainer, blobs, tiny, mean_teacher):
    messages, _ = said(trainer, blobs, tiny(), mean_teacher(), kd_weight=Linear(0.0, 0.9, 2))
    assert messages == []


def test_checking_changes_nothing(trainer, blobs, tiny, mean_teacher):
    _, checked = said(trainer, blobs, tiny(), mean_teacher())
    plain = KD(tiny(), mean_teacher())
    trainer().fit(plain, datamodule=blobs)
    for key, value in checked.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key
