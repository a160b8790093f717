import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.projectors import hint_regressor


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "kernel"),
    [
        ((4, 8, 8), (6, 8, 8), nn.Conv2d, (1, 1)),
        ((4, 8, 8), (6, 5, 6), nn.Conv2d, (4, 3)),
        ((4, 8, 8), (6, 4, 4), nn.Conv2d, (3, 3)),
        ((4, 4, 4), (6, 8, 8), nn.ConvTranspose2d, (4, 4)),
    ],
)
def test_maps_arrive_on_the_teachers_grid(student, teacher, kind, kernel):
    regressor = hint_regressor(student, teacher)
    assert regressor(torch.randn(2, *student)).shape == (2, *teacher)
    assert isinstance(regressor[0], kind)
    assert regressor[0].kernel_size == kernel
    assert [type(layer) for layer in regressor[1:]] == [nn.BatchNorm2d, nn.ReLU]


@pytest.mark.parametrize(("student", "teacher"), [((5,), (7,)), ((9, 5), (9, 7))])
def test_vectors_and_tokens_go_through_a_linear_map(student, teacher):
    regressor = hint_regressor(student, teacher)
    assert isinstance(regressor, nn.Linear)
    assert regressor(torch.randn(2, *student)).shape == (2, *teacher)


@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 2, 2), (4, 8, 8)), ((4, 8, 8), (7,)), ((9, 5), (8, 5)), ((4, 8, 2), (4, 4, 4))]
)
def test_shapes_without_a_way_are_refused(student, teacher):
    with pytest.raises(UsageError, match="no projector"):
        hint_regressor(student, teacher)
