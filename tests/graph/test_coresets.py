import itertools

import pytest
import torch
from given import Given
from torch_geometric.nn.models import GIN

from lit_distill.core.coresets import herding, k_center
from lit_distill.core.errors import UsageError
from lit_distill.graph import GraphNetwork, Herding, KCenter
from lit_distill.graph.methods.coresets import embed


@pytest.fixture
def points():
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


def test_each_of_the_herd_is_the_best_next_one(points):
    chosen = herding(points, 8).tolist()
    assert sorted(chosen) == list(range(8))
    mean = points.double().mean(0)
    for k in range(1, 9):
        before, rest = chosen[: k - 1], [i for i in range(8) if i not in chosen[: k - 1]]
        errors = {i: float((k * mean - points[[*before, i]].double().sum(0)).norm()) for i in rest}
        assert chosen[k - 1] == min(errors, key=errors.get)


def test_centers_are_the_farthest_next_and_within_twice_the_best_radius(points):
    distances = torch.cdist(points, points)
    chosen = k_center(points, 8).tolist()
    assert sorted(chosen) == list(range(8))
    radii = [float(distances[:, chosen[:k]].amin(1).max()) for k in range(1, 9)]
    assert radii == sorted(radii, reverse=True)
    for k in range(1, 8):
        nearest = distances[:, chosen[:k]].amin(1)
        assert float(nearest[chosen[k]]) == pytest.approx(float(nearest.max()))
        best = min(float(distances[:, list(c)].amin(1).max()) for c in itertools.combinations(range(8), k))
        assert radii[k - 1] <= 2 * best + 1e-6


def test_both_begin_with_the_point_nearest_to_the_mean(points):
    first = int((points - points.mean(0)).norm(dim=1).argmin())
    assert herding(points, 1).tolist() == k_center(points, 1).tolist() == [first]
    alike = torch.zeros(4, 2)
    assert sorted(k_center(alike, 4).tolist()) == sorted(herding(alike, 4).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [Herding, KCenter])
def test_graphs_of_each_class_are_chosen_by_the_network_s_readout(random_set, kind):
    network = GraphNetwork(GIN(8, 8, 2, norm="batch_norm"), [3], 2)
    data = kind(Given(random_set(count=60)), network, per_class=3)
    train = data.part("train")
    assert train.labels.tolist() == [0] * 3 + [1] * 3
    assert network.training
    whole = data.source.part("train")
    own = (whole.labels == 1).nonzero()[:, 0]
    select = herding if kind is Herding else k_center
    # By hand: in eval mode, each graph is embedded as it is alone.
    network.eval()
    with torch.no_grad():
        alone = torch.cat([network.embed(whole.batch(own[i : i + 1])) for i in range(len(own))])
    torch.testing.assert_close(embed(network.train(), whole)[own], alone)
    wanted = whole.take(own[select(alone, 3)])
    assert torch.equal(wanted.nodes, train.take(torch.tensor([3, 4, 5])).nodes)
    budget = kind(Given(random_set(count=60)), network, bytes=3000)
    assert 2000 < budget.footprint()["bytes"] <= 3000


def test_networks_that_do_not_know_the_data_are_refused(random_set):
    with pytest.raises(UsageError, match=r"data\.network has 4 classes, the data 2"):
        Herding(Given(random_set(count=60)), GraphNetwork(GIN(8, 8, 1), [3], 4), per_class=1).setup()
    with pytest.raises(UsageError, match=r"data\.per_class is 99; the smallest class has 18"):
        KCenter(Given(random_set(count=60)), GraphNetwork(GIN(8, 8, 1), [3], 2), per_class=99).setup()
