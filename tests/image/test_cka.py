import numpy as np
import pytest
import torch

from lit_distill.image.cka import linear_cka


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(30, 6, generator=generator, dtype=torch.double) + 3
    return first, first[:, :4] ** 2 + torch.randn(30, 4, generator=generator, dtype=torch.double)


def test_value_equals_the_form_in_features(features):
    x, y = ((f - f.mean(0)).numpy() for f in features)
    norm = np.linalg.norm
    expected = norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
    assert float(linear_cka(*features)) == pytest.approx(expected)
    assert 0 < expected < 0.95


def test_a_feature_is_aligned_with_itself_and_with_what_is_turned_scaled_and_shifted(features):
    first, second = features
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.double))
    assert float(linear_cka(first, first)) == pytest.approx(1.0)
    assert float(linear_cka(first, -7.0 * first @ turn + 5.0)) == pytest.approx(1.0)
    assert float(linear_cka(first @ turn, second)) == pytest.approx(float(linear_cka(first, second)))


def test_other_linear_maps_are_seen(features):
    stretch = torch.diag(torch.tensor([20.0, 1, 1, 1, 1, 1], dtype=torch.double))
    assert float(linear_cka(features[0], features[0] @ stretch)) < 0.8


def test_orthogonal_features_score_zero_and_constant_ones_too():
    first = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    second = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert float(linear_cka(first, second)) == 0.0
    assert float(linear_cka(first, torch.ones(4, 3))) == 0.0


def test_maps_can_be_compared_with_tokens():
    maps = torch.randn(8, 3, 4, 4)
    tokens = maps.flatten(2).transpose(1, 2)
    assert float(linear_cka(maps, tokens)) == pytest.approx(1.0, rel=1e-5)


def test_half_precision_is_computed_in_float32(features):
    first, second = (f.bfloat16() for f in features)
    with torch.autocast("cpu", torch.bfloat16):
        value = linear_cka(first, second)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(linear_cka(first.double(), second.double())), rel=1e-4)
