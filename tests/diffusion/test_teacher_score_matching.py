"""Teacher score matching: the loss by hand, its end, and what does not fit."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.methods.teacher_score_matching import TeacherScoreMatching


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


def test_score_matching_is_the_squared_difference_in_the_output_of_the_teacher(trainer, digits, make_denoiser, little):
    """In EDM's output F the weight is one: x0 = c_skip x + c_out F."""
    student, teacher = make_denoiser(1), make_denoiser(0)
    module = TeacherScoreMatching(copy.deepcopy(student), teacher, evaluation=little, optimizer=sgd)
    seen = []
    noised = module.student.forward
    module.student.forward = lambda x, t, c: seen.append((x, t, c)) or noised(x, t, c)
    trainer(limit_train_batches=1).fit(module, datamodule=digits)
    (x, t, labels), *_ = seen
    scale = (t.float().view(-1, 1, 1, 1) ** 2 + 0.75**2).sqrt()
    outputs = [d.network(x / scale, t.float().log() / 4, labels) for d in (student, teacher)]
    expected = (outputs[0] - outputs[1].detach()).square().mean()
    torch.testing.assert_close(module.terms["tsm"], expected, rtol=1e-3, atol=1e-5)
    gradients = torch.autograd.grad(expected, list(student.network.parameters()))
    for old, new, gradient in zip(
        student.network.parameters(), module.student.network.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(new, old - 0.01 * gradient, rtol=1e-3, atol=1e-5)


def test_score_matching_is_done_where_the_student_is_the_teacher(trainer, digits, make_denoiser, little):
    module = TeacherScoreMatching(make_denoiser(0), make_denoiser(0), evaluation=little, optimizer=sgd)
    before = copy.deepcopy(module.student.state_dict())
    trainer(limit_train_batches=2).fit(module, datamodule=digits)
    assert module.terms["tsm"].item() == 0
    assert all(torch.equal(value, before[name]) for name, value in module.student.state_dict().items())


def test_score_matching_resumes(trainer, digits, make_denoiser, little, tmp_path):
    def build(seed=1):
        return TeacherScoreMatching(make_denoiser(seed), make_denoiser(0), evaluation=little)

    whole = build()
    trainer().fit(whole, datamodule=copy.deepcopy(digits))
    keep = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=1, save_top_k=1)
    trainer(max_steps=3, callbacks=[keep], enable_checkpointing=True).fit(build(), datamodule=copy.deepcopy(digits))
    again = build(seed=7)
    trainer().fit(again, datamodule=copy.deepcopy(digits), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for key, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key


def test_score_matching_wants_the_classes_of_the_teacher(trainer, digits, make_denoiser, little):
    module = TeacherScoreMatching(make_denoiser(1, num_classes=3), make_denoiser(0), evaluation=little)
    with pytest.raises(UsageError, match=r"model.student: it knows 3 classes, the teacher 10"):
        trainer().fit(module, datamodule=digits)
