import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from lit_distill.core.errors import UsageError
from lit_distill.image import KD, Supervised
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import Outputs
from lit_distill.image.methods.defensive import DefensiveDistillation


def value_and_gradient(student, teacher, temperature):
    """Loss of the method's term and its gradients, for logits."""
    loss = DefensiveDistillation(torch.nn.Identity(), torch.nn.Identity(), temperature).losses["soft_labels"]
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    batch = ImageBatch(torch.zeros(len(student), 1, 1, 1), torch.zeros(len(student)).long(), torch.arange(len(student)))
    value = loss(Outputs(student, {}), Outputs(teacher, {}), batch, 0)
    value.backward()
    return value.item(), student.grad, teacher.grad


def test_method(check_method):
    check_method(DefensiveDistillation)


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_the_loss_is_cross_entropy_to_tempered_probabilities_without_t2(step, tiny, blobs, temperature):
    teacher = tiny(6, seed=5)
    student_logits = tiny()(blobs.images[:8]).detach().double().numpy()
    teacher_logits = teacher.eval()(blobs.images[:8]).detach().double().numpy()
    targets = softmax(teacher_logits / temperature, 1)
    expected = -(targets * log_softmax(student_logits / temperature, 1)).sum(1).mean()
    _, terms = step(DefensiveDistillation(tiny(), teacher, temperature))
    assert list(terms) == ["soft_labels"]  # no labels
    assert terms["soft_labels"] == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_the_difference_of_probabilities_over_t_and_the_teacher_gets_none():
    student, teacher, temperature = torch.randn(4, 5), torch.randn(4, 5), 20.0
    _, gradient, of_teacher = value_and_gradient(student, teacher, temperature)
    p_student, p_teacher = (softmax(z.double().numpy() / temperature, 1) for z in (student, teacher))
    np.testing.assert_allclose(gradient, (p_student - p_teacher) / temperature / 4, atol=1e-7)
    assert of_teacher is None


def test_at_temperature_1_a_sure_teacher_is_plain_training(step, tiny, blobs):
    class Sure(torch.nn.Module):
        def forward(self, images):
            return 1000.0 * torch.nn.functional.one_hot(blobs.labels[: len(images)], 3)

    moved, terms = step(DefensiveDistillation(tiny(), Sure(), temperature=1.0))
    moved_plainly, plain = step(Supervised(tiny()))
    assert terms["soft_labels"] == pytest.approx(plain["ce"], rel=1e-5)
    assert moved == moved_plainly


def test_at_temperature_1_the_gradient_is_that_of_kd_without_labels():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    _, gradient, _ = value_and_gradient(student, teacher, 1.0)
    module = KD(torch.nn.Identity(), torch.nn.Identity(), temperature=1.0, kd_weight=1.0, label_weight=0.0)
    variable = student.clone().requires_grad_()
    batch = ImageBatch(torch.zeros(4, 1, 1, 1), torch.zeros(4).long(), torch.arange(4))
    module.losses["kd"](Outputs(variable, {}), Outputs(teacher, {}), batch, 0).backward()
    torch.testing.assert_close(gradient, variable.grad)


def test_half_precision_logits_are_compared_in_float32():
    student, teacher = torch.randn(64, 10).bfloat16(), torch.randn(64, 10).bfloat16()
    half, _, _ = value_and_gradient(student, teacher, 20.0)
    full, _, _ = value_and_gradient(student.float(), teacher.float(), 20.0)
    assert half == pytest.approx(full, rel=1e-6)


def test_defaults_are_the_papers(tiny):
    module = DefensiveDistillation(tiny(), tiny())
    assert (module.losses["soft_labels"].temperature, module.weights["soft_labels"], module.label_weight) == (20, 1, 0)


def test_a_temperature_that_is_not_positive_is_refused(tiny):
    with pytest.raises(UsageError, match=r"temperature is 0\.0; it must be above 0"):
        DefensiveDistillation(tiny(), tiny(), temperature=0.0)
