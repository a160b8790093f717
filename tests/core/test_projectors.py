import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.projectors import (
    AttentionFusion,
    MapToTokens,
    TokensToMap,
    connector,
    hint_regressor,
    token_grid,
    variational_regressor,
)


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


# ---- connectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [((4, 8, 8), (6, 8, 8), (1, 1)), ((4, 8, 8), (6, 4, 4), (3, 3)), ((4, 4, 4), (6, 8, 8), (4, 4))],
)
def test_a_connector_has_no_activation(student, teacher, kernel):
    network = connector(student, teacher)
    assert network(torch.randn(2, *student)).shape == (2, *teacher)
    assert network[0].kernel_size == kernel
    assert network[0].bias is None
    assert [type(layer) for layer in network[1:]] == [nn.BatchNorm2d]
    assert (network(torch.randn(2, *student)) < 0).any()


def test_weights_of_a_connector_have_variance_two_over_fan_out():
    weight = connector((64, 8, 8), (128, 8, 8))[0].weight
    assert weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)


@pytest.mark.parametrize(("student", "teacher"), [((5,), (7,)), ((4, 2, 2), (4, 8, 8)), ((4, 8, 8), (7,))])
def test_a_connector_needs_maps_that_can_meet(student, teacher):
    with pytest.raises(UsageError, match="no projector leads") as caught:
        connector(student, teacher)
    assert f"{student}" in str(caught.value)
    assert f"{teacher}" in str(caught.value)


def test_a_variational_regressor_is_three_convolutions():
    network = variational_regressor(4, 6)
    assert network(torch.randn(2, 4, 5, 3)).shape == (2, 6, 5, 3)
    assert [type(layer) for layer in network] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert sum(p.numel() for p in network.parameters()) == 4 * 6 + 6 * 6 + 6 * 6


# ---- fusion --------------------------------------------------------------------------------------------------------


def test_the_deepest_level_has_nothing_to_fuse():
    fusion = AttentionFusion(4, 5, (6, 8, 8), fuse=False)
    compared, handed = fusion(torch.randn(2, 4, 3, 3))
    assert compared.shape == (2, 6, 8, 8)
    assert handed.shape == (2, 5, 8, 8)
    assert fusion.attention is None


def test_fusion_weighs_both_maps_by_sigmoids():
    fusion = AttentionFusion(4, 5, (6, 8, 8), fuse=True).eval()
    feature, deeper = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 2, 2)
    with torch.no_grad():
        compared, handed = fusion(feature, deeper)
        # In eval mode BatchNorm divides by sqrt(1 + 1e-5) at the start.
        own = torch.einsum("oc,bchw->bohw", fusion.inner[0].weight[:, :, 0, 0], feature) / (1 + 1e-5) ** 0.5
        other = deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
        both = torch.cat([own, other], dim=1)
        weight, bias = fusion.attention[0].weight[:, :, 0, 0], fusion.attention[0].bias
        gates = 1 / (1 + (-torch.einsum("oc,bchw->bohw", weight, both) - bias.view(-1, 1, 1)).exp())
        fused = own * gates[:, :1] + other * gates[:, 1:]
    fused = fused.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(handed, fused)
    expected = nn.functional.conv2d(fused, fusion.outer[0].weight, padding=1) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(compared, expected)


# ---- tokens and maps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "expected"), [(16, (4, 0)), (17, (4, 1)), (198, (14, 2)), (1, (1, 0))])
def test_patches_are_told_from_class_tokens(tokens, expected):
    assert token_grid(tokens) == expected


@pytest.mark.parametrize("tokens", [0, 12, 201])
def test_tokens_that_are_no_square_are_refused(tokens):
    with pytest.raises(UsageError, match=f"{tokens} tokens are not a square grid"):
        token_grid(tokens)


def test_tokens_are_laid_out_row_by_row_without_class_token_and_back():
    tokens = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    laid_out = TokensToMap()(tokens)
    for row in range(2):
        for column in range(2):
            assert torch.equal(laid_out[:, :, row, column], tokens[:, 1 + 2 * row + column])
    assert torch.equal(MapToTokens()(laid_out), tokens[:, 1:])


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((17, 5), (6, 4, 4)), ((16, 5), (6, 8, 8)), ((16, 5), (6, 2, 2)), ((6, 4, 4), (16, 5)), ((6, 8, 8), (16, 5))],
)
def test_hints_lead_between_tokens_and_maps(student, teacher):
    assert hint_regressor(student, teacher)(torch.randn(2, *student)).shape == (2, *teacher)


@pytest.mark.parametrize(("student", "teacher"), [((4, 5), (6, 8, 8)), ((6, 4, 4), (17, 5)), ((6, 1, 1), (16, 5))])
def test_tokens_and_maps_without_a_way_are_refused(student, teacher):
    with pytest.raises(UsageError, match="no projector"):
        hint_regressor(student, teacher)
