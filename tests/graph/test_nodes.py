import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from given_nodes import Given, adam, sage, source, with_other_hidden_nodes
from scipy.sparse import csr_matrix
from sklearn.datasets import load_digits
from torch_geometric.nn.models import GCN, MLP

from lit_distill.core.errors import RunError, UsageError
from lit_distill.graph.nodes import (
    DigitsNodesDataModule,
    NodeClassifier,
    NodeGraph,
    NodeSource,
    PlanetoidDataModule,
    node_logits,
    reads_edges,
)

# ---- splits --------------------------------------------------------------------------------------------------------


def test_parts_have_so_many_of_each_class_share_nothing_and_are_the_same_for_every_seed():
    data = [Given(source(), seed=seed) for seed in (0, 1)]
    parts = {name: data[0].part(name) for name in ("train", "val", "test")}
    assert [part.labels.bincount().tolist() for part in parts.values()] == [[5, 5], [5, 5], [20, 20]]
    assert sorted(torch.cat([part.index for part in parts.values()]).tolist()) == list(range(60))
    assert all(torch.equal(part.index, data[1].part(name).index) for name, part in parts.items())
    assert not torch.equal(Given(source(), split_seed=1).part("train").index, parts["train"].index)
    few = Given(source(), train_size=4).part("train")
    assert few.labels.bincount().tolist() == [2, 2]
    assert set(few.index.tolist()) < set(parts["train"].index.tolist())


def test_without_a_seed_of_its_own_the_split_follows_the_run(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    wanted = Given(source(), split_seed=7)
    for data in (Given(source(), split_seed=None), Given(source(), split_seed=None, seed=7)):
        for part in ("train", "visible"):
            assert torch.equal(data.part(part).index, wanted.part(part).index)
    assert not torch.equal(Given(source()).part("train").index, wanted.part("train").index)


def test_a_share_of_the_test_nodes_is_taken_out_of_the_observed_graph_with_its_edges():
    given = source()
    data = Given(given, unseen_share=0.25)
    test = data.part("test")
    hidden = set(test.index[test.unseen].tolist())
    assert len(hidden) == 10
    visible = [node for node in range(60) if node not in hidden]
    assert torch.equal(data.observed.features, given.graph.features[visible])
    number = {node: place for place, node in enumerate(visible)}
    wanted = [(number[u], number[v]) for u, v in given.graph.edge_index.T.tolist() if not {u, v} & hidden]
    assert data.observed.edge_index.T.tolist() == [list(pair) for pair in wanted]
    for name in ("train", "val", "visible"):
        part = data.part(name)
        assert part.graph is data.observed
        assert not part.unseen.any()
        assert torch.equal(part.features, given.graph.features[part.index])
    assert data.part("visible").index.tolist() == visible
    labels = data.part("visible").labels
    known = torch.isin(data.part("visible").index, data.part("train").index)
    assert (labels[~known] == -100).all()
    assert torch.equal(labels[known], given.labels[data.part("visible").index][known])


def test_a_test_node_is_seen_in_the_observed_graph_or_if_it_was_hidden_in_the_whole_one():
    given = source()
    data = Given(given)
    data.setup()
    network = sage().eval()
    whole, observed = network(*given.graph), network(*data.observed)
    batch = next(iter(data.test_dataloader()))
    rank = {node: place for place, node in enumerate(data.part("visible").index.tolist())}
    wanted = [whole[n] if u else observed[rank[n]] for n, u in zip(batch.index.tolist(), batch.unseen, strict=True)]
    assert torch.allclose(node_logits(network, batch), torch.stack(wanted), atol=1e-6)
    assert torch.equal(batch.features, given.graph.features[batch.index])
    assert not torch.allclose(whole[batch.index], torch.stack(wanted), atol=1e-3)  # the two graphs do differ


def test_without_hidden_nodes_there_is_one_graph():
    given = source()
    data = Given(given, unseen_share=0.0)
    assert data.part("test").graph is data.observed
    assert torch.equal(data.observed.edge_index, given.graph.edge_index)
    assert data.part("test").place.tolist() == data.part("test").index.tolist()


def test_a_set_s_own_split_is_taken_unless_another_is_asked_for():
    split = {"train": torch.tensor([0, 1]), "val": torch.tensor([2]), "test": torch.tensor([3, 4, 5])}
    own = Given(source(split=split), labels_per_class=None, unseen_share=0.34)
    assert {name: own.part(name).index.tolist() for name in split} == {k: v.tolist() for k, v in split.items()}
    assert own.part_size("visible") == 59  # nodes of no part are there too
    assert Given(source(split=split)).part_size("train") == 10


# ---- the classifier ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [sage, lambda: MLP([5, 8, 2], norm=None)], ids=["edges", "features"])
def test_it_learns_and_reports_each_protocol_and_their_mix(trainer, build):
    data = Given(source(count=200))
    module = NodeClassifier(build(), optimizer=adam)
    fit = trainer(max_epochs=30, limit_val_batches=1.0)
    fit.fit(module, datamodule=data)
    assert "val/acc" in fit.callback_metrics
    found = fit.test(module, datamodule=data, verbose=False)[0]
    assert found["test/acc"] > 0.7
    assert {"test/auroc", "test/ece", "test/nll"} <= set(found)
    rows = fit.predict(module, datamodule=data)
    hits = torch.cat([row["probabilities"].argmax(1) == row["label"] for row in rows])
    assert torch.cat([row["label"] for row in rows]).tolist() == data.given.labels[rows[0]["index"]].tolist()
    unseen = data.part("test").unseen
    seen, hidden = float(hits[~unseen].float().mean()), float(hits[unseen].float().mean())
    assert found["test/acc_transductive"] == pytest.approx(seen)
    assert found["test/acc_inductive"] == pytest.approx(hidden)
    assert found["test/acc_production"] == pytest.approx(0.8 * seen + 0.2 * hidden)
    assert found["test/acc_production"] == pytest.approx(found["test/acc"])  # 36 of 180: an exact fifth


def test_transductive_runs_report_one_figure(trainer):
    data = Given(source(), unseen_share=0.0)
    found = trainer().test(NodeClassifier(sage()), datamodule=data, verbose=False)[0]
    assert {key for key in found if key.startswith("test/acc_")} == {"test/acc_balanced"}


def test_the_loss_is_the_cross_entropy_of_the_labelled_nodes_within_their_graph(trainer):
    data = Given(source())
    train = data.part("train")
    with torch.no_grad():
        logits = sage()(*data.observed)[train.place].double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    module = NodeClassifier(sage())
    trainer().fit(module, datamodule=data)
    assert module.iteration == 1  # all labelled nodes at once
    assert module.terms["ce"].item() == pytest.approx(-log_p[np.arange(10), train.labels].mean(), rel=1e-5)


def test_hidden_nodes_change_nothing_in_training(trainer):
    weights = []
    for given in (source(), with_other_hidden_nodes()):
        # Batch normalization is over all nodes of the graph, so nodes without edges would still be felt.
        module = NodeClassifier(sage(norm="batch_norm"), optimizer=adam)
        trainer(max_epochs=3).fit(module, datamodule=Given(given))
        weights.append(module.student.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_resumed_run_ends_as_the_uninterrupted_one(trainer, tmp_path):
    def module():
        return NodeClassifier(sage(dropout=0.5), optimizer=adam)

    whole, half, resumed = module(), module(), module()
    options = {"batch_size": 4, "seed": 3}
    trainer(max_epochs=3).fit(whole, datamodule=Given(source(), **options))
    first = trainer(max_epochs=1)
    first.fit(half, datamodule=Given(source(), **options))
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(max_epochs=3).fit(resumed, datamodule=Given(source(), **options), ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_networks_say_whether_they_read_edges(trainer):
    assert reads_edges(sage())
    assert reads_edges(GCN(5, 8, 2, 2))
    assert not reads_edges(MLP([5, 8, 2]))
    modules = [NodeClassifier(network) for network in (sage(), MLP([5, 8, 2]))]
    for module in modules:
        module.trainer = SimpleNamespace(datamodule=SimpleNamespace(num_features=5))
    assert modules[0].example_inputs() is None
    assert [tensor.shape for tensor in modules[1].example_inputs()] == [(1, 5)]


# ---- sets ----------------------------------------------------------------------------------------------------------


def test_digits_are_joined_to_their_nearest():
    data = DigitsNodesDataModule(neighbors=3, labels_per_class=10, unseen_share=0.0)
    assert [data.part_size(part) for part in ("train", "val", "test")] == [100, 300, 1397]
    assert (data.num_features, data.num_classes) == (64, 10)
    digits = load_digits()
    assert torch.equal(data.observed.features, torch.from_numpy(digits.images.reshape(-1, 64) / 16).float())
    distances = ((digits.data[:, None, :8] - digits.data[None, :, :8]) ** 2).sum(2)  # by columns, to save memory
    for first in range(8, 64, 8):
        distances += ((digits.data[:, None, first : first + 8] - digits.data[None, :, first : first + 8]) ** 2).sum(2)
    np.fill_diagonal(distances, np.inf)
    third = np.sort(distances, 1)[:, 2]
    edges = data.observed.edge_index.numpy()
    assert (distances[edges[0], edges[1]] <= np.maximum(third[edges[0]], third[edges[1]])).all()
    pairs = set(zip(*edges.tolist(), strict=True))
    assert len(pairs) == edges.shape[1]
    assert all((v, u) in pairs for u, v in pairs)
    assert np.bincount(edges[0]).min() >= 3


def write_planetoid(folder, name="cora", missing=()):
    """Ten labelled nodes, 510 in all that are not of the test, and 20 test nodes out of order; features name the node.

    Returns features and classes in the order of the nodes, and the test nodes.
    """
    folder.mkdir(parents=True)
    count = 530
    features, labels = np.zeros((count, 4), dtype=np.float32), np.arange(count) % 3
    features[:, 0] = np.arange(count)
    one_hot = np.eye(3, dtype=np.int32)[labels]
    test = np.random.default_rng(0).permutation(np.arange(510, 530))
    ring = {node: [(node + 1) % count, (node - 1) % count, node] for node in range(count)}  # with loops
    files = {
        "x": csr_matrix(features[:10]),
        "y": one_hot[:10],
        "allx": csr_matrix(features[:510]),
        "ally": one_hot[:510],
        "tx": csr_matrix(features[test]),
        "ty": one_hot[test],
        "graph": ring,
    }
    for part, content in files.items():
        if part not in missing:
            (folder / f"ind.{name}.{part}").write_bytes(pickle.dumps(content))
    (folder / f"ind.{name}.test.index").write_text("\n".join(map(str, test)) + "\n")
    return features, labels, test


@pytest.mark.parametrize("place", ["Cora/raw", "Cora", "."])
def test_planetoid_files_are_read_where_they_may_lie(tmp_path, place):
    features, labels, test = write_planetoid(tmp_path / "root" / place)
    data = PlanetoidDataModule(tmp_path / "root", "Cora", unseen_share=0.0)
    data.setup()
    assert [data.part_size(part) for part in ("train", "val", "test")] == [10, 500, 20]
    assert data.part("test").index.tolist() == sorted(test.tolist())
    assert torch.equal(data.observed.features, torch.from_numpy(features))
    for part in ("train", "val", "test"):
        assert data.part(part).labels.tolist() == labels[data.part(part).index].tolist()
    edges = set(zip(*data.observed.edge_index.tolist(), strict=True))
    assert edges == {pair for node in range(530) for pair in ((node, (node + 1) % 530), ((node + 1) % 530, node))}
    drawn = PlanetoidDataModule(tmp_path / "root", "Cora", labels_per_class=20)
    assert [drawn.part_size(part) for part in ("train", "val", "test", "visible")] == [60, 90, 380, 454]


def test_planetoid_files_that_are_missing_or_broken_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"data\.root: .*Cora/raw holds no ind\.cora\.x; put the eight files .*github"):
        PlanetoidDataModule(tmp_path).setup()
    write_planetoid(tmp_path / "Pubmed", name="pubmed", missing=("ally",))
    with pytest.raises(UsageError, match=r"Pubmed holds no ind\.pubmed\.ally"):
        PlanetoidDataModule(tmp_path, "Pubmed").setup()
    write_planetoid(tmp_path / "Cora")
    for content in (b"", b"\x80\x04 half of a file", pickle.dumps(np.zeros((3, 3)))):
        (tmp_path / "Cora/ind.cora.tx").write_bytes(content)
        with pytest.raises(RunError, match=r"the files of Cora in .* cannot be read .*; get them again"):
            PlanetoidDataModule(tmp_path).setup()
    with pytest.raises(UsageError, match=r"data\.name is 'Core'; give one of Cora, Citeseer, Pubmed"):
        PlanetoidDataModule(tmp_path, "Core")


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_graphs_that_make_no_data_are_refused():
    given = source()
    with pytest.raises(UsageError, match="60 nodes have features and 59 a label"):
        Given(given._replace(labels=given.labels[:-1])).setup()
    with pytest.raises(UsageError, match="classes run from 0 to 1; 0 to 0 is expected"):
        Given(given._replace(classes=("a",))).setup()
    with pytest.raises(UsageError, match="edges name nodes from 0 to 59; 0 to 49 is expected"):
        Given(
            NodeSource(("a", "b"), NodeGraph(given.graph.features[:50], given.graph.edge_index), given.labels[:50])
        ).setup()
    split = {"train": torch.tensor([0, 2]), "test": torch.tensor([1])}
    with pytest.raises(UsageError, match="no training node is of class 'b'"):
        Given(source(split=split), labels_per_class=None).setup()
    given.graph.features[7, 2] = torch.nan
    with pytest.raises(UsageError, match="node 7 has a feature that is not finite"):
        Given(given).setup()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"unseen_share": 1.0}, r"data\.unseen_share: 1\.0 is not a share"),
        ({"labels_per_class": 0}, r"data\.labels_per_class: 0 is not a number of nodes"),
        ({"val_per_class": 0}, r"data\.val_per_class: 0 is not a number of nodes"),
        ({"labels_per_class": 25}, r"25 and 5 leave no test node of the smallest class, which has 30; lower them"),
        ({"train_size": 11}, r"data\.train_size: 11 is more than the 10 available"),
    ],
)
def test_splits_that_make_no_sense_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        Given(source(), **options).setup()


def test_parts_and_neighbors_that_are_not_there_are_refused():
    split = {"train": torch.tensor([0, 1]), "val": torch.tensor([2]), "test": torch.tensor([], dtype=torch.long)}
    with pytest.raises(UsageError, match=r"the graph has no test nodes; set data\.labels_per_class"):
        Given(source(split=split), labels_per_class=None).part("test")
    with pytest.raises(UsageError, match=r"data\.neighbors: 0 is not a number"):
        DigitsNodesDataModule(neighbors=0)


def test_networks_of_another_width_are_refused(trainer):
    with pytest.raises(UsageError, match=r"model\.student has 4 features, the data 5; set in_channels to 5"):
        trainer().fit(NodeClassifier(sage(width=4)), datamodule=Given(source()))
    with pytest.raises(UsageError, match=r"model\.student has 3 classes, the data 2; set out_channels to 2"):
        trainer().fit(NodeClassifier(sage(classes=3)), datamodule=Given(source()))
    with pytest.raises(UsageError, match="data is missing"):
        trainer().fit(NodeClassifier(sage()), train_dataloaders=[0])
