import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_distill.losses.diswot import (
    class_map_similarity,
    class_maps,
    head_gradient,
    relation_similarity,
    semantic_similarity,
)
from lit_distill.losses.relations import channel_correlation


@pytest.fixture
def gradients():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 6, 5, 3, generator=generator), torch.randn(4, 2, 3, 2, generator=generator)


def unit_rows(matrix):
    return matrix / np.maximum(np.linalg.norm(matrix, axis=-1, keepdims=True), 1e-12)


def semantic_by_loop(student, teacher):
    """Makes the D x D matrices, class after class."""
    total = 0.0
    for own, other in zip(student.double().numpy(), teacher.double().numpy(), strict=True):
        total += ((unit_rows(np.outer(other, other)) - unit_rows(np.outer(own, own))) ** 2).sum()
    return total / student.numel()


def gram_difference(student, teacher):
    student, teacher = (part.double().numpy().reshape(len(part), -1) for part in (student, teacher))
    return ((unit_rows(teacher @ teacher.T) - unit_rows(student @ student.T)) ** 2).sum() / len(student) ** 2


# ---- the last layer's gradient -------------------------------------------------------------------------------------


def test_head_gradient_is_autograds():
    embedding, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    head = nn.Linear(4, 3)
    logits = head(embedding)
    F.cross_entropy(logits, labels).backward()
    torch.testing.assert_close(head_gradient(logits.detach(), embedding, labels), head.weight.grad)


def test_head_gradient_by_hand():
    # One sample, two classes, p = (3/4, 1/4), label 1: residual (3/4, -3/4).
    logits = torch.tensor([[np.log(3.0), 0.0]], dtype=torch.float32)
    found = head_gradient(logits, torch.tensor([[1.0, 4.0]]), torch.tensor([1]))
    torch.testing.assert_close(found, torch.tensor([[0.75, 3.0], [-0.75, -3.0]]))


# ---- semantic ------------------------------------------------------------------------------------------------------


def test_semantic_equals_the_outer_products_class_by_class(gradients):
    assert float(semantic_similarity(*gradients)) == pytest.approx(semantic_by_loop(*gradients), rel=1e-5)


def test_semantic_equals_its_closed_form(gradients):
    student, teacher = (part.double().numpy() for part in gradients)
    cosine = (unit_rows(student) * unit_rows(teacher)).sum(1)
    signs = (np.sign(student) * np.sign(teacher)).sum(1)
    expected = (2 * 7 - 2 * cosine * signs).sum() / (5 * 7)
    assert float(semantic_similarity(*gradients)) == pytest.approx(expected, rel=1e-5)


def test_semantic_takes_zeros_as_the_outer_products_do(gradients):
    student, teacher = gradients[0].clone(), gradients[1].clone()
    student[0, 2] = teacher[0, 3] = student[1, 1] = teacher[1, 1] = 0.0
    student[2] = 0.0
    assert float(semantic_similarity(student, teacher)) == pytest.approx(semantic_by_loop(student, teacher), rel=1e-5)


def test_semantic_is_the_channel_correlation_of_the_gradient(gradients):
    expected = channel_correlation(*(part[:, :, None, None] for part in gradients))
    torch.testing.assert_close(semantic_similarity(*gradients), expected)


def test_semantic_fades_out_rows_below_eps_as_torchs_normalize_does(gradients):
    scale = torch.tensor([1e-5, 1e-6, 3e-7, 1e-8, 1e-25])[:, None]
    student, teacher = gradients[0] * scale, gradients[1] * scale.flip(0)

    def matrices(gradient):
        return F.normalize(gradient[:, :, None] * gradient[:, None, :], dim=2)

    expected = float((matrices(student) - matrices(teacher)).square().sum()) / 35
    assert float(semantic_similarity(student, teacher)) == pytest.approx(expected, rel=1e-4)
    assert float(semantic_similarity(student, teacher)) == pytest.approx(semantic_by_loop(student, teacher), rel=1e-4)


def test_semantic_of_a_network_with_itself_is_zero_and_sees_neither_scale_nor_sign(gradients):
    student, teacher = gradients
    assert float(semantic_similarity(student, student.clone())) == 0.0
    value = float(semantic_similarity(student, teacher))
    scale = torch.tensor([-1e-4, 3.0, -1.0, 1e-5, 7.0])[:, None]  # rows of 1e-10 and more
    assert float(semantic_similarity(student * scale, teacher)) == pytest.approx(value, rel=1e-5)
    assert float(semantic_similarity(student, -teacher)) == pytest.approx(value, rel=1e-5)
    # Which feature speaks for which class is what counts.
    assert float(semantic_similarity(student.roll(1, 0), teacher)) != pytest.approx(value, rel=1e-3)


def test_gradient_of_semantic_is_that_of_the_cosines_and_never_reaches_the_teacher(gradients):
    student, teacher = gradients[0].requires_grad_(), gradients[1].requires_grad_()
    semantic_similarity(student, teacher).backward()
    assert teacher.grad is None
    own = student.detach().clone().requires_grad_()
    signs = (own.detach().sign() * teacher.detach().sign()).sum(1)
    (-2 * signs * torch.cosine_similarity(own, teacher.detach())).sum().div(35).backward()
    torch.testing.assert_close(student.grad, own.grad)


def test_semantic_follows_the_loss_of_a_head_to_its_logits_and_embedding():
    logits, embedding, teacher = (torch.randn(*shape, dtype=torch.double) for shape in ((6, 3), (6, 4), (3, 4)))
    inputs = logits.requires_grad_(), embedding.requires_grad_()

    def loss(logits, embedding):
        return semantic_similarity(head_gradient(logits, embedding, torch.tensor([0, 1, 2, 0, 1, 2])), teacher)

    assert all(gradient.norm() > 1e-3 for gradient in torch.autograd.grad(loss(*inputs), inputs))
    assert torch.autograd.gradcheck(loss, inputs)


# ---- relation ------------------------------------------------------------------------------------------------------


def test_relation_equals_the_gram_matrices_by_numpy(maps):
    assert float(relation_similarity(*maps)) == pytest.approx(gram_difference(*maps), rel=1e-5)


def test_relation_by_hand():
    # Teacher: orthogonal samples, Gram = identity. Student: equal samples, rows (1, 1) / sqrt 2.
    teacher, student = torch.eye(2), torch.ones(2, 1)
    expected = 2 * ((1 - 0.5**0.5) ** 2 + 0.5) / 4
    assert float(relation_similarity(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_relation_sees_neither_rotation_nor_scale_and_uses_every_sample(maps):
    student, teacher = maps[0].flatten(1), maps[1]
    value = float(relation_similarity(student, teacher))
    rotation = torch.linalg.qr(torch.randn(student.shape[1], student.shape[1]))[0]
    assert float(relation_similarity(5.0 * student @ rotation, teacher)) == pytest.approx(value, rel=1e-4)
    assert float(relation_similarity(student, student @ rotation)) == pytest.approx(0.0, abs=1e-9)
    for sample in range(4):  # a loss that looked at sample 0 alone would not notice the others
        moved = student.clone()
        moved[sample] = moved[sample].flip(0)
        assert float(relation_similarity(moved, teacher)) != pytest.approx(value, rel=1e-4)


def test_gradient_of_relation_is_orthogonal_to_the_feature_and_never_reaches_the_teacher(maps):
    student, teacher = maps[0].requires_grad_(), maps[1].requires_grad_()
    relation_similarity(student, teacher).backward()
    assert teacher.grad is None
    assert float(student.grad.norm()) > 1e-4
    assert (student.grad * student).sum().item() == pytest.approx(0.0, abs=1e-7)


# ---- class maps ----------------------------------------------------------------------------------------------------


def test_class_maps_pool_to_the_logits(maps):
    head = nn.Linear(6, 3, bias=False)
    found = class_maps(maps[0], head.weight.detach())
    assert found.shape == (4, 3, 5, 3)
    torch.testing.assert_close(found.mean((2, 3)), head(maps[0].mean((2, 3))).detach())


def test_class_map_similarity_compares_classes_over_samples_and_pixels():
    student, teacher = torch.randn(4, 3, 5, 3), torch.randn(4, 3, 2, 2)
    expected = gram_difference(student.transpose(0, 1), teacher.transpose(0, 1))
    assert float(class_map_similarity(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(class_map_similarity(student, 3 * student)) == pytest.approx(0.0, abs=1e-12)


def test_class_map_similarity_leaves_the_teacher_alone():
    student, teacher = torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(2, 3, 2, 2, requires_grad=True)
    class_map_similarity(student, teacher).backward()
    assert teacher.grad is None
    assert float(student.grad.norm()) > 0


@pytest.mark.parametrize("loss", [semantic_similarity, relation_similarity])
def test_losses_are_float32_under_autocast(loss, gradients):
    student, teacher = (part.bfloat16() for part in gradients)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    reference = semantic_by_loop if loss is semantic_similarity else gram_difference
    assert float(value) == pytest.approx(reference(student.float(), teacher.float()), rel=1e-5)
