import torch

from lit_distill.losses.precision import in_float32


@in_float32
def gram(student, *, teacher):
    return (student @ student.T - teacher @ teacher.T).square().sum()


def test_matrix_products_are_in_float32_under_autocast():
    student, teacher = torch.randn(4, 300), torch.randn(4, 300)
    exact = gram(student, teacher=teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (student @ student.T).dtype == torch.bfloat16
        assert torch.equal(gram(student, teacher=teacher), exact)
        half = gram(student.bfloat16(), teacher=teacher.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, gram(student.bfloat16().float(), teacher=teacher.bfloat16().float()))


def test_double_stays_double_and_gradients_reach_half():
    student = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
    gram(student, teacher=torch.randn(3, 5)).backward()
    assert student.grad.dtype == torch.bfloat16
    assert gram(torch.randn(3, 5).double(), teacher=torch.randn(3, 5).double()).dtype == torch.float64
