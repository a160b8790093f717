import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from lit_distill.losses.relations import (
    channel_correlation,
    correlation_congruence,
    kernel_congruence,
    neuron_selectivity,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)

BETWEEN_SAMPLES = [
    similarity_preserving,
    relational_distance,
    relational_angle,
    probabilistic_transfer,
    kernel_congruence,
]
BETWEEN_CHANNELS = [channel_correlation, neuron_selectivity]


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(6, 5, generator=generator), torch.randn(6, 8, generator=generator)


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(3, 4, 5, 3, generator=generator), torch.randn(3, 6, 5, 3, generator=generator)


def rotation(size, seed=0):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def rows(matrix):
    return matrix / np.maximum(np.linalg.norm(matrix, axis=-1, keepdims=True), 1e-12)


def huber(a, b):
    d = np.abs(a - b)
    return np.where(d < 1, d**2 / 2, d - 0.5)


def similarities_by_hand(s, t):
    return ((rows(s @ s.T) - rows(t @ t.T)) ** 2).mean()


def distances_by_hand(s, t):
    s, t = (squareform(pdist(x)) for x in (s, t))
    pairs = len(s) * (len(s) - 1)
    # The mean distance is over pairs, the mean loss over all of B x B.
    return huber(s / (s.sum() / pairs), t / (t.sum() / pairs)).mean()


def angles_by_hand(s, t):
    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        return 0.0 if norms == 0 else a @ b / norms

    triplets = itertools.product(range(len(s)), repeat=3)
    return np.mean([huber(cosine(s, *triplet), cosine(t, *triplet)) for triplet in triplets])


def transfer_by_hand(s, t):
    p, q = ((rows(x) @ rows(x).T + 1) / 2 for x in (s, t))
    p, q = (similarity / similarity.sum(1, keepdims=True) for similarity in (p, q))
    return (q * np.log((q + 1e-7) / (p + 1e-7))).mean()


def kernels_by_hand(s, t):
    cosines = (rows(x) @ rows(x).T for x in (s, t))
    own, others = (math.exp(-0.8) * (1 + 0.8 * cosine + (0.8 * cosine) ** 2 / 2) for cosine in cosines)
    return ((own - others) ** 2).mean()


BY_HAND = {
    similarity_preserving: similarities_by_hand,
    relational_distance: distances_by_hand,
    relational_angle: angles_by_hand,
    probabilistic_transfer: transfer_by_hand,
    kernel_congruence: kernels_by_hand,
}


# ---- all -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", BETWEEN_SAMPLES, ids=lambda loss: loss.__name__)
def test_relations_of_samples_vanish_for_equal_networks_and_never_reach_the_teacher(loss, vectors):
    student, teacher = (x.clone().requires_grad_() for x in vectors)
    assert float(loss(student.detach(), student.detach().clone())) == pytest.approx(0.0, abs=1e-9)
    value = loss(student, teacher)
    value.backward()
    assert value.item() > 1e-4
    assert teacher.grad is None
    assert float(student.grad.norm()) > 1e-5


@pytest.mark.parametrize("loss", BETWEEN_SAMPLES, ids=lambda loss: loss.__name__)
def test_values_of_relations_are_those_of_loops_and_numpy(loss, vectors):
    expected = BY_HAND[loss](*(x.double().numpy() for x in vectors))
    assert float(loss(*vectors)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("loss", BETWEEN_SAMPLES, ids=lambda loss: loss.__name__)
def test_gradients_of_relations_equal_difference_quotients(loss, vectors):
    student, teacher = (x.double() for x in vectors)
    torch.autograd.gradcheck(lambda x: loss(x, teacher), student.requires_grad_())


@pytest.mark.parametrize("loss", BETWEEN_SAMPLES, ids=lambda loss: loss.__name__)
def test_relations_of_samples_see_neither_rotation_nor_scale(loss, vectors):
    student, teacher = vectors
    value = float(loss(student, teacher))
    assert float(loss(student @ rotation(5), teacher @ rotation(8))) == pytest.approx(value, rel=1e-4)
    assert float(loss(3.0 * student, 0.2 * teacher)) == pytest.approx(value, rel=1e-4)
    order = torch.randperm(6)
    assert float(loss(student[order], teacher[order])) == pytest.approx(value, rel=1e-4)
    assert float(loss(student[order], teacher)) != pytest.approx(value, rel=1e-2)


@pytest.mark.parametrize("loss", BETWEEN_SAMPLES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("alive", [1, 0])
def test_dead_and_coinciding_samples_have_exact_values_and_finite_gradients(loss, alive, vectors):
    student = torch.zeros(6, 5)
    student[:alive] = 1.0
    student.requires_grad_()
    value = loss(student, vectors[1])
    value.backward()
    if (loss, alive) != (relational_distance, 0):  # distances that are all 0 have no mean to be measured in
        expected = BY_HAND[loss](student.detach().double().numpy(), vectors[1].double().numpy())
        assert value.item() == pytest.approx(float(expected), rel=1e-4)
    assert math.isfinite(value.item())
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize(
    "loss", [*BETWEEN_SAMPLES, *BETWEEN_CHANNELS, correlation_congruence], ids=lambda loss: loss.__name__
)
def test_relations_are_float32_under_autocast(loss, vectors, maps):
    pair = [maps[0], maps[0].flip(0)] if loss in BETWEEN_CHANNELS else [vectors[0], vectors[0].flip(0)]
    pair = [x.bfloat16() for x in pair]
    exact = loss(*(x.float() for x in pair))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*pair)
    assert value.dtype == torch.float32
    assert float(value) == float(exact)


# ---- SP ------------------------------------------------------------------------------------------------------------


def test_similarities_of_two_samples_by_hand():
    # Student: orthogonal, rows (1, 0) and (0, 1). Teacher: Gram matrix of ones, rows (1, 1) / sqrt(2).
    student, teacher = torch.eye(2), torch.ones(2, 1)
    root = 1 / math.sqrt(2)
    expected = 2 * ((1 - root) ** 2 + root**2) / 4
    assert float(similarity_preserving(student, teacher)) == pytest.approx(expected, rel=1e-6)


def test_similarity_preserving_equals_numpys(maps):
    expected = similarities_by_hand(*(x.double().numpy().reshape(3, -1) for x in maps))
    assert float(similarity_preserving(*maps)) == pytest.approx(expected, rel=1e-5)


def test_similarity_preserving_does_not_see_the_order_of_channels(maps):
    assert float(similarity_preserving(maps[0], maps[0][:, [2, 0, 3, 1]])) == pytest.approx(0.0, abs=1e-12)


# ---- RKD -----------------------------------------------------------------------------------------------------------


def test_right_angle_and_straight_line_by_hand():
    # Corner at the origin against three points in a row: cosines (0, 1/sqrt 2, 1/sqrt 2) and (-1, 1, 1).
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[0.0], [1.0], [-1.0]])
    ell = 1 - 1 / math.sqrt(2)
    expected = (2 * 0.5 + 4 * ell**2 / 2) / 27
    assert float(relational_angle(student, teacher)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [relational_distance, relational_angle], ids=lambda loss: loss.__name__)
def test_relational_losses_do_not_see_translation(loss, vectors):
    student, teacher = vectors
    value = float(loss(student, teacher))
    assert float(loss(student + 5.0, teacher - 3.0)) == pytest.approx(value, rel=1e-3)


def test_angles_at_near_neighbors_far_from_the_origin_are_exact():
    # Through Gram matrices in float32 these distances would be lost: 1e-3 at a length of 100.
    student = 100 + 1e-3 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    near = student.float()
    s, t = near.double() - near.double()[0], torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert float(relational_angle(near, s.float())) == pytest.approx(0.0, abs=1e-6)
    assert float(relational_angle(near, t)) == pytest.approx(0.0, abs=1e-3)


# ---- PKT -----------------------------------------------------------------------------------------------------------


def test_neighbor_probabilities_of_two_samples_by_hand():
    # Student: orthogonal, probabilities (2/3, 1/3). Teacher: equal, (1/2, 1/2). The mean over four pairs.
    value = probabilistic_transfer(torch.eye(2), torch.ones(2, 1))
    expected = 2 * (0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3))) / 4
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_probabilistic_transfer_does_not_see_the_length_of_single_samples(vectors):
    lengths = torch.tensor([0.1, 1.0, 2.0, 3.0, 4.0, 50.0])[:, None]
    value = float(probabilistic_transfer(*vectors))
    assert float(probabilistic_transfer(vectors[0] * lengths, vectors[1] / lengths)) == pytest.approx(value, rel=1e-4)


# ---- CC ------------------------------------------------------------------------------------------------------------


def test_correlation_congruence_by_hand():
    student = torch.tensor([[1.0, -2.0], [3.0, 0.0], [0.0, 5.0]])
    # <(1, 2), (3, 0)> = 3 and <(3, 0), (0, 5)> = 0, over two neighborhoods.
    assert float(correlation_congruence(student, torch.zeros(3, 2))) == 1.5
    assert float(correlation_congruence(student, student.clone())) == 0.0


def test_gradients_of_correlation_congruence_reach_both_embeddings_with_opposite_sign(vectors):
    student, teacher = vectors[0].clone().requires_grad_(), vectors[0].flip(0).requires_grad_()
    correlation_congruence(student, teacher).backward()
    assert float(student.grad.norm()) > 0
    torch.testing.assert_close(teacher.grad, -student.grad)


def test_kernel_congruence_approaches_the_gaussian_kernel(vectors):
    kernels = [np.exp(-0.4 * squareform(pdist(rows(x.double().numpy()), "sqeuclidean"))) for x in vectors]
    expected = ((kernels[0] - kernels[1]) ** 2).mean()
    assert float(kernel_congruence(*vectors, order=12)) == pytest.approx(expected, rel=1e-4)
    assert float(kernel_congruence(*vectors, order=2)) == pytest.approx(expected, rel=0.1)


def test_kernel_congruence_of_second_order_by_hand():
    # Cosines 0 and 1 in the off-diagonal: they differ by e^(-2g) (2g + (2g)^2 / 2) with g = 0.4.
    expected = (math.exp(-0.8) * (0.8 + 0.32)) ** 2 / 2
    assert float(kernel_congruence(torch.eye(2), torch.ones(2, 1))) == pytest.approx(expected, rel=1e-5)


# ---- ICKD ----------------------------------------------------------------------------------------------------------


def test_channel_correlation_equals_numpys_on_other_grids(maps):
    student, teacher = maps[0], maps[1][:, :4, :3]
    expected = []
    for s, t in zip(student.double().numpy(), teacher.double().numpy(), strict=True):
        s, t = s.reshape(4, -1), t.reshape(4, -1)
        expected.append(((rows(s @ s.T) - rows(t @ t.T)) ** 2).sum() / 4)
    np.testing.assert_allclose(channel_correlation(student, teacher, reduction="none"), expected, rtol=1e-4)
    assert float(channel_correlation(student, teacher)) == pytest.approx(np.mean(expected), rel=1e-5)


def test_channel_correlation_sees_the_order_of_channels_and_not_that_of_positions(maps):
    student = maps[0]
    assert float(channel_correlation(student, -2.0 * student.flip(2))) == pytest.approx(0.0, abs=1e-10)
    assert float(channel_correlation(student, student[:, [1, 0, 2, 3]])) > 1e-2


# ---- NST -----------------------------------------------------------------------------------------------------------


def discrepancy(student, teacher):
    """Squared MMD of two sets of channels by the definition, (C, HW) each."""
    s, t = rows(student.reshape(len(student), -1)), rows(teacher.reshape(len(teacher), -1))
    mean = lambda a, b: np.mean([[(x @ y) ** 2 for y in b] for x in a])  # noqa: E731
    return mean(s, s) + mean(t, t) - 2 * mean(s, t)


@pytest.mark.parametrize("height", [5, 1])
def test_neuron_selectivity_is_the_discrepancy_between_channels_or_positions(maps, height):
    # 15 positions: by channels. 3 positions: by positions.
    student, teacher = (x[:, :, :height] for x in maps)
    pairs = zip(student.double().numpy(), teacher.double().numpy(), strict=True)
    expected = [discrepancy(s, t) for s, t in pairs]
    np.testing.assert_allclose(neuron_selectivity(student, teacher, reduction="none"), expected, rtol=1e-4)
    assert float(neuron_selectivity(student, teacher)) == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_neuron_selectivity_pools_to_the_smaller_grid(maps, larger):
    large = maps[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    pair = (large, maps[1]) if larger == "student" else (maps[1], large)
    pairs = zip(maps[0].double().numpy(), maps[1].double().numpy(), strict=True)
    expected = np.mean([discrepancy(s, t) for s, t in pairs])
    assert float(neuron_selectivity(*pair)) == pytest.approx(expected, rel=1e-4)


def test_neuron_selectivity_sees_neither_order_nor_scale_nor_copies_of_channels(maps):
    student = maps[0]
    same = torch.cat([student.flip(1), -3.0 * student], dim=1)
    assert float(neuron_selectivity(student, same)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss", BETWEEN_CHANNELS, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("height", [5, 1])
def test_gradients_between_channels_equal_difference_quotients_and_never_reach_the_teacher(loss, height, maps):
    student, teacher = (x[:, :4, :height].double().requires_grad_() for x in maps)
    torch.autograd.gradcheck(lambda x: loss(x, teacher), student)
    (gradient,) = torch.autograd.grad(loss(student, teacher), teacher, allow_unused=True)
    assert gradient is None
