import math

import numpy as np
import pytest
import torch

from lit_distill.losses.contrastive import contrastive_nce, contrastive_normalizer, memory_similarity


@pytest.fixture
def similarity():
    return torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1


def by_numpy(similarity, normalizer, num_samples, temperature):
    """The loss as the paper writes it, in float64."""
    p = np.exp(similarity.double().numpy() / temperature) / normalizer
    noise = (p.shape[1] - 1) / num_samples
    h = p / (p + noise)
    return -(np.log(h[:, 0]) + np.log(1 - h[:, 1:]).sum(1)).mean()


def test_one_negative_one_sample_and_unit_constant_have_a_closed_form():
    # K = N = Z = tau = 1: h is the sigmoid of the similarity.
    value = contrastive_nce(torch.tensor([[2.0, -1.0]]), normalizer=torch.tensor(1.0), num_samples=1, temperature=1.0)
    assert float(value) == pytest.approx(math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-1.0)), rel=1e-6)


@pytest.mark.parametrize(("normalizer", "num_samples", "temperature"), [(1.0, 50, 1.0), (700.0, 20, 0.07)])
def test_the_loss_is_the_papers(similarity, normalizer, num_samples, temperature):
    options = {"num_samples": num_samples, "temperature": temperature}
    value = contrastive_nce(similarity, normalizer=torch.tensor(normalizer), **options)
    assert float(value) == pytest.approx(by_numpy(similarity, normalizer, num_samples, temperature), rel=1e-4)


def test_gradients_pull_the_positive_and_push_the_negatives(similarity):
    similarity.requires_grad_()
    normalizer = torch.tensor(100.0, requires_grad=True)
    contrastive_nce(similarity, normalizer=normalizer, num_samples=50, temperature=0.5).backward()
    p = similarity.detach().div(0.5).exp() / 100
    h = p / (p + 5 / 50)
    expected = torch.cat([h[:, :1] - 1, h[:, 1:]], dim=1) / 0.5 / 4
    torch.testing.assert_close(similarity.grad, expected)
    assert normalizer.grad is None


def test_the_loss_is_finite_where_probabilities_are_not():
    extreme = torch.tensor([[-1.0, 1.0, 1.0]], requires_grad=True)
    value = contrastive_nce(extreme, normalizer=torch.tensor(1e-3), num_samples=10, temperature=0.01)
    value.backward()
    # log h = s / tau - log(Z K / N) where h is tiny, log(1 - h) the negative of it where h is almost 1.
    assert value.item() == pytest.approx(3 * 100 - 1 * math.log(2e-4), rel=1e-5)
    assert bool(extreme.grad.isfinite().all())


def test_the_normalizer_is_the_mean_over_the_batch_times_the_number_of_samples(similarity):
    expected = np.exp(similarity.double().numpy() / 0.2).mean() * 30
    found = contrastive_normalizer(similarity.requires_grad_(), num_samples=30, temperature=0.2)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert not found.requires_grad


def test_similarities_are_those_of_the_chosen_rows():
    embedding, memory = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    index = torch.tensor([[0, 6, 6], [3, 1, 0], [2, 2, 2]])
    found = memory_similarity(embedding, memory, index)
    expected = np.einsum("bd,bkd->bk", embedding.detach().numpy(), memory.detach().numpy()[index.numpy()])
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    torch.testing.assert_close(embedding.grad, memory.detach()[index].sum(1))
    assert memory.grad is None


def test_similarities_and_loss_are_float32_under_autocast():
    embedding, memory = torch.randn(3, 64), torch.randn(7, 64)
    index = torch.randint(7, (3, 4))
    exact = memory_similarity(embedding, memory, index)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(memory_similarity(embedding, memory, index), exact)
        half = contrastive_nce(exact.bfloat16(), normalizer=torch.tensor(1.0), num_samples=7)
    assert half.dtype == torch.float32
