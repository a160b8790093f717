import math

import numpy as np
import pytest
import torch

from lit_distill.graph import lite_gntk as module
from lit_distill.graph.lite_gntk import dense_points, lite_gntk, sparse_points


def by_hand(first, second, depth, scale="uniform"):
    """The kernel between two graphs (X, A) by its definition: every pair of nodes is propagated at every step."""

    def gathered(graph):
        adjacency = graph[1] + 1e-4 * np.eye(len(graph[1]))
        return adjacency / adjacency.sum(1, keepdims=True) if scale == "degree" else adjacency

    def covariance(one, other):
        return gathered(one) @ (one[0] @ other[0].T + 1e-4) @ gathered(other).T

    sigma = covariance(first, second)
    own, others = np.diag(covariance(first, first)), np.diag(covariance(second, second))
    theta = np.zeros_like(sigma)
    for u in range(len(sigma)):
        for v in range(sigma.shape[1]):
            cosine = min(max(sigma[u, v] / math.sqrt(own[u] * others[v]), -0.9999), 0.9999)
            angle = math.acos(cosine)
            activated = (cosine * (math.pi - angle) + math.sqrt(1 - cosine**2)) / math.pi
            theta[u, v] = sigma[u, v] * (math.pi - angle) / math.pi + activated
    for _ in range(depth - 1):
        theta = gathered(first) @ theta @ gathered(second).T
    return theta.mean()


def random_graphs(sizes, features=3, seed=0, symmetric=True):
    rng = np.random.default_rng(seed)
    graphs = []
    for size in sizes:
        adjacency = rng.random((size, size)) * (rng.random((size, size)) < 0.5)
        if symmetric:
            adjacency = np.triu(adjacency, 1) + np.triu(adjacency, 1).T
        graphs.append((rng.normal(size=(size, features)), adjacency))
    return graphs


def padded(graphs, nodes, filling=0.0):
    """Dense tensors and the mask; what is no node holds `filling`."""
    width = graphs[0][0].shape[1]
    features = torch.full((len(graphs), nodes, width), filling, dtype=torch.double)
    adjacency = torch.full((len(graphs), nodes, nodes), filling, dtype=torch.double)
    mask = torch.zeros(len(graphs), nodes, dtype=torch.bool)
    for number, (x, a) in enumerate(graphs):
        size = len(x)
        features[number, :size] = torch.from_numpy(x)
        adjacency[number, :size, :size] = torch.from_numpy(a)
        mask[number, :size] = True
    return features, adjacency, mask


def matrix(graphs, others, depth, scale="uniform"):
    return np.array([[by_hand(a, b, depth, scale) for b in others] for a in graphs])


@pytest.mark.parametrize("scale", ["uniform", "degree"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_it_is_the_kernel_of_the_definition(depth, scale):
    real, synthetic = random_graphs((4, 7, 5), seed=1), random_graphs((6, 6), seed=2)
    rows = dense_points(*padded(real, 7), depth=depth, scale=scale)
    columns = dense_points(*padded(synthetic, 6)[:2], depth=depth, scale=scale)
    expected = matrix(real, synthetic, depth, scale)
    np.testing.assert_allclose(lite_gntk(rows, columns).numpy(), expected, rtol=1e-9)
    assert np.ptp(expected) > 0.01 * np.abs(expected).max()


def test_adjacencies_need_not_be_symmetric():
    real, synthetic = random_graphs((4, 7), seed=1, symmetric=False), random_graphs((5, 5), seed=2, symmetric=False)
    for scale in ("uniform", "degree"):
        found = lite_gntk(
            dense_points(*padded(real, 7), depth=3, scale=scale),
            dense_points(*padded(synthetic, 5)[:2], depth=3, scale=scale),
        )
        np.testing.assert_allclose(found.numpy(), matrix(real, synthetic, 3, scale), rtol=1e-9)


def test_padding_does_not_count_whatever_stands_in_it():
    graphs, other = random_graphs((4, 7, 5), seed=3), dense_points(*padded(random_graphs((3, 3)), 3)[:2])
    for scale in ("uniform", "degree"):
        tight = lite_gntk(dense_points(*padded(graphs, 7), scale=scale), other)
        for filling in (5.0, math.nan):
            wide = lite_gntk(dense_points(*padded(graphs, 12, filling), scale=scale), other)
            torch.testing.assert_close(wide, tight, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", ["uniform", "degree"])
def test_sparse_graphs_are_the_same_as_dense_ones(random_set, scale):
    graphs = random_set(count=8, nodes=6, density=0.3)
    features = torch.nn.functional.one_hot(graphs.nodes[:, 0], 3).double()
    sparse = sparse_points(features, graphs.edge_index, graphs.node_start, depth=4, scale=scale)
    pairs = []
    for number in range(graphs.size):
        one = graphs.take(torch.tensor([number]))
        adjacency = np.zeros((len(one.nodes), len(one.nodes)))
        adjacency[one.edge_index[1], one.edge_index[0]] = 1
        pairs.append((np.eye(3)[one.nodes[:, 0]], adjacency))
    assert any((a.sum(1) == 0).any() for _, a in pairs)  # nodes without neighbors have a kernel, too
    found = lite_gntk(sparse, sparse).numpy()
    np.testing.assert_allclose(found, matrix(pairs, pairs, 4, scale), rtol=1e-9)


def test_a_directed_edge_brings_its_source_to_its_target(make_set):
    features = torch.eye(3, dtype=torch.double)
    edges = torch.tensor([[0, 1], [1, 2]])  # 0 -> 1 -> 2
    adjacency = torch.zeros(1, 3, 3, dtype=torch.double)
    adjacency[0, 1, 0] = adjacency[0, 2, 1] = 1
    for scale in ("uniform", "degree"):
        sparse = sparse_points(features, edges, torch.tensor([0, 3]), depth=3, scale=scale)
        dense = dense_points(features[None], adjacency, depth=3, scale=scale)
        torch.testing.assert_close(sparse.points[sparse.place], dense.points)
        torch.testing.assert_close(sparse.weights, dense.weights)


def test_the_kernel_of_a_set_with_itself_is_symmetric_and_positive(random_set):
    graphs = random_set(count=20, nodes=8)
    features = torch.nn.functional.one_hot(graphs.nodes[:, 0], 3).double()
    points = sparse_points(features, graphs.edge_index, graphs.node_start)
    kernel = lite_gntk(points, points)
    torch.testing.assert_close(kernel, kernel.T)
    values = torch.linalg.eigvalsh(kernel)
    # The clamped cosine takes some thousandths off the diagonal between nodes, which is all that may be missing.
    assert values.min() > -1e-5 * values.max()
    assert (kernel > 0).all()


def test_nodes_that_gather_the_same_are_one_point(random_set):
    graphs = random_set(count=20, nodes=8, labels=2, density=0.2)
    neighbors = [[] for _ in graphs.nodes]
    for source, target in graphs.edge_index.T.tolist():
        neighbors[target].append(int(graphs.nodes[source, 0]))
    kinds = {(int(own), tuple(sorted(below))) for own, below in zip(graphs.nodes[:, 0], neighbors, strict=True)}
    features = torch.nn.functional.one_hot(graphs.nodes[:, 0], 2).float()
    points = sparse_points(features, graphs.edge_index, graphs.node_start)
    assert len(points.points) == len(kinds) < len(graphs.nodes) / 2


def test_some_of_the_graphs_have_the_kernel_that_they_have_among_all(random_set):
    graphs = random_set(count=12, nodes=6)
    features = torch.nn.functional.one_hot(graphs.nodes[:, 0], 3).double()
    points = sparse_points(features, graphs.edge_index, graphs.node_start)
    index = torch.tensor([7, 0, 3])
    taken = points.take(index)
    assert taken.size == 3
    assert len(taken.points) < len(points.points)
    torch.testing.assert_close(lite_gntk(taken, points), lite_gntk(points, points)[index])


def test_the_order_of_nodes_plays_no_part():
    graphs = random_graphs((6, 6), seed=4)
    order = np.random.default_rng(0).permutation(6)
    moved = [(x[order], a[np.ix_(order, order)]) for x, a in graphs]
    other = dense_points(*padded(random_graphs((4, 4)), 4)[:2])
    found = [lite_gntk(dense_points(*padded(given, 6)[:2]), other) for given in (graphs, moved)]
    torch.testing.assert_close(found[0], found[1])


def test_large_sets_are_computed_in_blocks(monkeypatch):
    real, other = dense_points(*padded(random_graphs((6, 5, 4)), 6)), dense_points(*padded(random_graphs((3,)), 3)[:2])
    whole = lite_gntk(real, other)
    monkeypatch.setattr(module, "BLOCK", 12)  # four rows of the eighteen
    torch.testing.assert_close(lite_gntk(real, other), whole)


def test_gradients_are_those_of_the_definition_and_finite_for_equal_and_empty_nodes():
    features, adjacency, _ = padded(random_graphs((4, 4), seed=5), 4)
    other = dense_points(*padded(random_graphs((5, 3), seed=6), 5))
    inputs = features.requires_grad_(), adjacency.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a: lite_gntk(other, dense_points(x, a, depth=3)), inputs, eps=1e-6, atol=1e-5
    )
    alike = torch.zeros(1, 4, 3, requires_grad=True)
    edges = torch.zeros(1, 4, 4, requires_grad=True)
    points = dense_points(alike, edges)
    kernel = lite_gntk(points, points)
    kernel.sum().backward()
    assert float(kernel.detach()) > 0
    assert alike.grad.isfinite().all()
    assert edges.grad.isfinite().all()
