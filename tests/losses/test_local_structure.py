import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch_geometric.utils import softmax as scatter_softmax

from lit_distill.losses.local_structure import local_structure_kl

SIMILARITIES = {
    "rbf": lambda a, b: np.exp(-((a - b) ** 2).sum() / (2 * 1.5)),
    "linear": lambda a, b: a @ b,
    "polynomial": lambda a, b: (a @ b) ** 2,
    "euclidean": lambda a, b: np.sqrt(((a - b) ** 2).sum()),
}
# Node 0 has the neighbors 1, 2, 3; node 1 has 0 and 2; node 2 has one neighbor; node 3 has none.
EDGES = torch.tensor([[1, 0, 2, 2, 3, 0], [0, 1, 0, 1, 0, 2]])


def embeddings(seed=0, nodes=4, width=3):
    return torch.randn(nodes, width, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def by_hand(student, teacher, kernel, edges=EDGES):
    values = [0.0] * len(student)
    for node in edges[1].unique().tolist():
        own = edges[0][edges[1] == node].tolist()
        p, q = (
            log_softmax([SIMILARITIES[kernel](z[node], z[j]) for j in own]) for z in (teacher.numpy(), student.numpy())
        )
        values[node] = (np.exp(p) * (p - q)).sum()
    return values


@pytest.mark.parametrize("kernel", SIMILARITIES)
def test_value_is_that_of_a_loop_over_nodes(kernel):
    student, teacher = embeddings(), embeddings(1, width=5)
    each = local_structure_kl(student, teacher, EDGES, kernel=kernel, sigma=1.5, reduction="none")
    expected = by_hand(student, teacher, kernel)
    assert each.numpy() == pytest.approx(expected, abs=1e-12)
    assert expected[0] > 0
    assert expected[2:] == [0, 0]
    mean = local_structure_kl(student, teacher, EDGES, kernel=kernel, sigma=1.5)
    assert float(mean) == pytest.approx(np.mean(expected))  # all nodes count, those without a choice of neighbors too


def test_value_is_that_of_the_scatter_softmax_of_torch_geometric():
    generator = torch.Generator().manual_seed(2)
    student, teacher = embeddings(3, 50), embeddings(4, 50)
    edges = torch.randint(50, (2, 400), generator=generator)
    p, q = (scatter_softmax((z[edges[0]] * z[edges[1]]).sum(1), edges[1]) for z in (teacher, student))
    expected = (p * (p.log() - q.log())).sum() / 50
    assert float(local_structure_kl(student, teacher, edges, kernel="linear")) == pytest.approx(float(expected))


@pytest.mark.parametrize("kernel", SIMILARITIES)
def test_equal_embeddings_cost_nothing(kernel):
    nodes = embeddings()
    assert float(local_structure_kl(nodes, nodes.clone(), EDGES, kernel=kernel)) == 0.0


@pytest.mark.parametrize("kernel", ["rbf", "euclidean"])
def test_kernels_of_distances_see_neither_where_the_origin_is_nor_rotations(kernel):
    student, teacher = embeddings(), embeddings(1)
    rotation, _ = torch.linalg.qr(embeddings(5, 3))
    moved = student @ rotation + 7.0
    options = {"kernel": kernel, "sigma": 1.0}
    expected = float(local_structure_kl(student, teacher, EDGES, **options))
    assert expected > 1e-3
    assert float(local_structure_kl(moved, teacher, EDGES, **options)) == pytest.approx(expected)


def test_gradient_with_respect_to_similarities_is_the_difference_of_the_distributions():
    # Node 0 at (1, 0), its neighbors anywhere: with the linear kernel their first entries are the similarities.
    student = torch.tensor([[1.0, 0.0], [0.3, 0.0], [-0.2, 0.0], [1.1, 0.0]], dtype=torch.double)
    teacher = torch.tensor([[1.0, 0.0], [0.9, 0.0], [0.1, 0.0], [-0.4, 0.0]], dtype=torch.double)
    student.requires_grad_()
    teacher.requires_grad_()
    edges = torch.tensor([[1, 2, 3], [0, 0, 0]])
    local_structure_kl(student, teacher, edges, kernel="linear", reduction="sum").backward()
    difference = softmax([0.3, -0.2, 1.1]) - softmax([0.9, 0.1, -0.4])
    assert student.grad[1:, 0].numpy() == pytest.approx(difference)
    assert teacher.grad is None


def test_neighbors_are_the_sources_of_the_edges_that_end_in_a_node():
    student, teacher = embeddings(), embeddings(1)
    inward, outward = torch.tensor([[1, 2, 3], [0, 0, 0]]), torch.tensor([[0, 0, 0], [1, 2, 3]])
    expected = by_hand(student, teacher, "linear", inward)
    assert expected[0] > 0.01
    each = local_structure_kl(student, teacher, inward, kernel="linear", reduction="none")
    assert each.tolist() == pytest.approx(expected)
    assert float(local_structure_kl(student, teacher, outward, kernel="linear")) == 0


@pytest.mark.parametrize("kernel", SIMILARITIES)
def test_values_stay_exact_and_gradients_finite_for_far_and_for_equal_neighbors(kernel):
    student, teacher = 100 * embeddings().float(), 100 * embeddings(1).float()
    student[1], student[2] = student[0], 0.0
    student.requires_grad_()
    loss = local_structure_kl(student, teacher, EDGES, kernel=kernel, sigma=1.5)
    loss.backward()
    assert loss.item() == pytest.approx(np.mean(by_hand(student.detach().double(), teacher.double(), kernel)), rel=1e-5)
    assert student.grad.isfinite().all()


def test_half_precision_is_computed_in_float32():
    student, teacher = embeddings().bfloat16(), embeddings(1).bfloat16()
    loss = local_structure_kl(student, teacher, EDGES, kernel="polynomial")
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(
        float(np.mean(by_hand(student.double(), teacher.double(), "polynomial"))), rel=1e-5
    )


def test_graphs_without_edges_cost_nothing_and_other_words_are_refused():
    nodes, none = embeddings(), torch.zeros((2, 0), dtype=torch.long)
    assert float(local_structure_kl(nodes, embeddings(1), none)) == 0.0
    with pytest.raises(Exception, match="kernel"):
        local_structure_kl(nodes, nodes, EDGES, kernel="cosine")
