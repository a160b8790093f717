import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch_geometric.nn.models import GIN

from lit_distill.core.errors import UsageError
from lit_distill.graph import DeepSets, GraphNetwork
from lit_distill.graph.methods.lsp import LSP


def network(seed=0, width=6, kind=GIN):
    torch.manual_seed(seed)
    return GraphNetwork(kind(width, width, 2), [3], 2)


def structures(own, batch, sigma):
    """Distributions over neighbors, node by node."""
    with torch.no_grad():
        nodes = own.embed_nodes(batch).double().numpy()
    source, target = batch.edge_index.numpy()
    neighbors = [source[target == node] for node in range(len(nodes))]
    distances = [((nodes[j] - nodes[node]) ** 2).sum(1) for node, j in enumerate(neighbors)]
    return [softmax(np.exp(-own / (2 * sigma))) if len(own) else np.ones(1) for own in distances]


@pytest.mark.parametrize("kind", [GIN, DeepSets])
def test_terms_are_those_of_the_formula(trainer, data, kind):
    module = LSP(network(kind=kind), network(1, 8), structure_weight=3.0, sigma=0.5, kd_weight=0.2, label_weight=0.1)
    trainer().fit(module, datamodule=data)
    batch = data.part("train").batch(torch.arange(data.part_size("train")))
    pairs = zip(structures(network(1, 8), batch, 0.5), structures(network(kind=kind), batch, 0.5), strict=True)
    expected = 3.0 * np.mean([(p * np.log(p / q)).sum() for p, q in pairs])
    assert set(module.terms) == {"ce", "kd", "structure"}
    assert expected > 1e-3
    assert float(module.terms["structure"]) == pytest.approx(expected, rel=1e-4)


def test_structure_alone_leaves_the_head_and_is_learnt(trainer, data):
    module = LSP(network(), network(1, 8), structure_weight=1.0, kernel="linear", label_weight=0.0)
    module.optimizer = lambda parameters: torch.optim.Adam(parameters, lr=0.01)
    seen = []
    combine = module.combine
    module.combine = lambda terms: seen.append(float(terms["structure"])) or combine(terms)
    before = {key: value.clone() for key, value in module.teacher.state_dict().items()}
    trainer(max_epochs=60).fit(module, datamodule=data)
    assert seen[-1] < 0.3 * seen[0]
    for moved, first in zip(module.student.head.parameters(), network().head.parameters(), strict=True):
        assert torch.equal(moved, first)
    assert all(torch.equal(value, before[key]) for key, value in module.teacher.state_dict().items())


def test_the_kernel_is_the_one_that_was_asked_for(trainer, data):
    losses = []
    for kernel in ("rbf", "linear", "polynomial", "euclidean"):
        module = LSP(network(), network(1, 8), kernel=kernel, sigma=0.5)
        trainer().fit(module, datamodule=data)
        losses.append(float(module.terms["structure"]))
    assert len(set(losses)) == 4


def test_a_width_that_is_none_is_refused():
    with pytest.raises(UsageError, match=r"model\.sigma is 0\.0; it must be above 0"):
        LSP(network(), network(), sigma=0.0)
