import copy

import pytest
import torch

from lit_distill.image import KD
from lit_distill.image.methods.takd import TAKD


def test_method(check_method):
    check_method(TAKD)


def test_a_step_is_that_of_kd(step, tiny):
    moved, terms = step(TAKD(tiny(), tiny(6, seed=5), temperature=2.0, kd_weight=0.7, label_weight=0.2))
    moved_by_kd, of_kd = step(KD(tiny(), tiny(6, seed=5), temperature=2.0, kd_weight=0.7, label_weight=0.2))
    assert moved == moved_by_kd
    assert terms == pytest.approx(of_kd)


def test_a_chain_ends_in_a_student_that_agrees_with_a_teacher_it_never_saw(trainer, tiny, mean_teacher, blobs):
    teacher = mean_teacher()
    for width in (8, 6):  # the assistant, then the student
        module = TAKD(
            tiny(width),
            copy.deepcopy(teacher),
            label_weight=0.0,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
        )
        fit = trainer(max_epochs=20)
        fit.fit(module, datamodule=blobs)
        teacher = module.student
    assert fit.test(module, datamodule=blobs, verbose=False)[0]["test/agreement"] == 1.0
    student = module.student.eval()
    assert torch.equal(student(blobs.images).argmax(1), mean_teacher()(blobs.images).argmax(1))
