"""What all graph data modules share: splits, labels by degree or by quantile, checks."""

from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_distill.core.data import EpochDataModule, stratified_order
from lit_distill.core.errors import UsageError
from lit_distill.core.loading import EpochLoader
from lit_distill.graph.graphs import GraphLoader, GraphSet


class GraphSource(NamedTuple):
    """A set of graphs as it comes.

    Attributes:
        classes: Names of the classes.
        graphs: The graphs; without node features (c = 0) where the set has none.
        split: Positions of "train", "val" and "test", where the set has a split of its own.
        attributes: Continuous node attributes, (n, a), which `bins` makes whole numbers of.
        node_values: Number of values of each node feature, where more are known than the graphs have.
        edge_values: The same of each edge feature.
        node_names: How the values of a single node feature read, where that is known.
        edge_names: The same of a single edge feature.
    """

    classes: tuple[str, ...]
    graphs: GraphSet
    split: dict[str, Int[Tensor, " n"]] | None = None
    attributes: Float[Tensor, "n a"] | None = None
    node_values: tuple[int, ...] | None = None
    edge_values: tuple[int, ...] | None = None
    node_names: tuple[str, ...] = ()
    edge_names: tuple[str, ...] = ()


class GraphDataModule(EpochDataModule[GraphSet]):
    """Base of the graph data modules: a subclass says what the data are (`read`), this class splits and serves them.

    Training, validation and test graphs have the same share of every class, unless the set has a split of its own.
    Graphs lie in memory on the device that trains, and whole batches are selected; `num_workers` has no effect. The
    last batch of an epoch may be smaller than the others.

    Nodes without labels get their degree, up to the largest degree of the training part. Continuous node attributes are
    left out, unless `bins` makes labels of them: each is then in one of so many ranges, between quantiles of the
    training part's nodes. Beside labels of the set they are further features.

    A label that no training graph has is no mistake, it counts among `node_values`: a network has an embedding for it,
    which no gradient reaches in training. Every bin has training nodes.

    Args:
        val_share: Share of the graphs for validation, where the set has no split.
        test_share: Share of the graphs for testing, likewise.
        bins: Ranges for each continuous node attribute, 2 or more; fewer where values repeat. None leaves attributes
            out.
        kwargs: See `EpochDataModule`.

    Attributes:
        node_values: Number of values of each node feature in all parts, known after `setup`.
        edge_values: The same of each edge feature.
        node_names: How the values of a single node feature read, in pictures; empty where that is not known.
        edge_names: The same of a single edge feature.
    """

    drop_last = False
    node_values: tuple[int, ...]
    edge_values: tuple[int, ...]
    node_names: tuple[str, ...]
    edge_names: tuple[str, ...]

    def __init__(self, val_share: float = 0.1, test_share: float = 0.1, bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for key, value in {"val_share": val_share, "test_share": test_share}.items():
            if not 0 <= value < 1:
                raise UsageError(f"data.{key}: {value} is not a share of the graphs; give 0 up to below 1")
        if val_share + test_share >= 1:
            raise UsageError(
                f"data.val_share, data.test_share: {val_share} and {test_share} leave nothing for training; lower them"
            )
        if bins is not None and bins < 2:
            raise UsageError(f"data.bins is {bins}; give 2 or more, or leave it out")
        self.val_share = val_share
        self.test_share = test_share
        self.bins = bins

    @abstractmethod
    def read(self) -> GraphSource:
        """Reads the set."""

    def read_parts(self) -> dict[str, GraphSet]:
        """Reads, checks and splits the graphs.

        Raises:
            UsageError: The graphs are not what the module expects, or too few for the shares asked for.
        """
        source = self.read()
        graphs = source.graphs
        _check(source)
        split = source.split or self._split(graphs.labels)
        if self.train_size is not None:
            train = split["train"]
            if self.train_size > len(train):
                raise UsageError(
                    f"data.train_size: {self.train_size} is more than the {len(train)} available; lower it"
                )
            split["train"] = train[stratified_order(graphs.labels[train], self.split_seed)][: self.train_size]
        if self.bins is not None:
            graphs = _labelled_by_quantile(graphs, source.attributes, split["train"], self.bins)
        elif not graphs.nodes.shape[1] and source.attributes is not None:
            raise UsageError(
                "data: the nodes have continuous attributes and no labels, so that each would be the only one of its "
                "kind; set data.bins, such as to 5, to take the quantiles between which a value lies"
            )
        if not graphs.nodes.shape[1]:
            graphs = _labelled_by_degree(graphs, split["train"])
        self.classes = source.classes
        self.num_classes = len(source.classes)
        known = source.node_values or ()
        self.node_values = known + _values(graphs.nodes)[len(known) :]  # behind them, bins
        self.edge_values = source.edge_values or _values(graphs.edges)
        self.node_names = source.node_names if self.bins is None else ()  # bins are further features
        self.edge_names = source.edge_names
        parts = {name: graphs.take(index) for name, index in split.items() if len(index)}
        if missing := _missing(parts["train"], self.classes):
            raise UsageError(
                f"data: no training graph is of class {missing}; take more graphs (data.train_size) or another "
                "split_seed"
            )
        for name in ("val", "test"):
            if name in parts and (missing := _missing(parts[name], self.classes)):
                rank_zero_warn(
                    f"data: no {name} graph is of class {missing}, which counts as 0 in means over classes; raise "
                    f"data.{name}_share, or leave so small a class out"
                )
        return parts

    def _split(self, labels: Int[Tensor, " g"]) -> dict[str, Int[Tensor, " n"]]:
        order = stratified_order(labels, self.split_seed)
        test, val = round(self.test_share * len(labels)), round(self.val_share * len(labels))
        if test + val >= len(labels):
            raise UsageError(f"data: {len(labels)} graphs are too few to split; lower data.val_share, data.test_share")
        return {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}

    def no_part(self, name: str) -> str:
        """Returns what a user is told who asks for a part that there is not."""
        return f"data.{name}_share: it is 0, so there is no such part; give a share of the graphs"

    def footprint(self) -> dict[str, int]:
        """Counts what the training set weighs: "bytes" to keep it, "bytes_expanded" as it is trained on."""
        size = self.part("train").stored_bytes()
        return {"bytes": size, "bytes_expanded": size}

    def make_loader(self, part: str, training: bool, device: torch.device, sampling: dict[str, Any]) -> EpochLoader:
        """Makes the loader of a part."""
        return GraphLoader(self.part(part), device=device, **sampling)


def _values(features: Tensor) -> tuple[int, ...]:
    return tuple((features.amax(0) + 1).tolist()) if len(features) else (0,) * features.shape[1]


def _labelled_by_degree(graphs: GraphSet, train: Tensor) -> GraphSet:
    degrees = torch.bincount(graphs.edge_index[1], minlength=len(graphs.roots))
    largest = degrees[_nodes_of(graphs, train)].max()
    return GraphSet(**{**vars(graphs), "nodes": degrees.clamp(max=largest)[:, None]})


def _labelled_by_quantile(graphs: GraphSet, attributes: Tensor | None, train: Tensor, bins: int) -> GraphSet:
    if attributes is None:
        raise UsageError(f"data.bins is {bins}, and the nodes have no continuous attributes; leave it out")
    if not attributes.isfinite().all():
        place = int((~attributes.isfinite()).any(1).nonzero()[0])
        raise UsageError(
            f"data.bins: an attribute of node {place - int(graphs.node_start[graphs.graph()[place]])} of graph "
            f"{int(graphs.graph()[place])} is not a finite number; replace it"
        )
    known = attributes[_nodes_of(graphs, train)].double().numpy()
    # Edges are values of training nodes, and none is the largest: so each range has such a node, its upper edge.
    edges = np.quantile(known, np.arange(1, bins) / bins, axis=0, method="inverted_cdf")
    columns = [
        np.searchsorted(np.unique(own[own < largest]), column)
        for own, largest, column in zip(edges.T, known.max(0), attributes.double().numpy().T, strict=True)
    ]
    nodes = torch.cat([graphs.nodes, torch.from_numpy(np.stack(columns, axis=1))], dim=1)
    return GraphSet(**{**vars(graphs), "nodes": nodes})


def _nodes_of(graphs: GraphSet, index: Tensor) -> Tensor:
    """Says of each node whether it is in one of the given graphs."""
    chosen = torch.zeros(graphs.size, dtype=torch.bool)
    chosen[index] = True
    return chosen[graphs.graph()]


def _check(given: GraphSource) -> None:
    graphs, num_classes = given.graphs, len(given.classes)
    if not graphs.size:
        raise UsageError("data: there are no graphs; check data.root")
    if graphs.labels.min() < 0 or graphs.labels.max() >= num_classes:
        raise UsageError(
            f"data: the graphs' classes run from {int(graphs.labels.min())} to {int(graphs.labels.max())}; 0 to "
            f"{num_classes - 1} is expected"
        )
    empty = graphs.node_start.diff() == 0
    if empty.any():
        raise UsageError(f"data: graph {int(empty.nonzero()[0])} has no nodes; leave it out")
    if (graphs.nodes.numel() and graphs.nodes.min() < 0) or (graphs.edges.numel() and graphs.edges.min() < 0):
        raise UsageError("data: node and edge labels must be whole numbers from 0; a negative one was found")
    for kind, features, values in (
        ("node", graphs.nodes, given.node_values),
        ("edge", graphs.edges, given.edge_values),
    ):
        for column, (most, there) in enumerate(zip(_values(features), values or (), strict=False)):
            if most > there:
                raise UsageError(
                    f"data: {kind} feature {column} has the value {most - 1}; 0 to {there - 1} is expected, correct it"
                )
    source, target = graphs.edge_index
    graph_of = graphs.graph()
    across = graph_of[source] != graph_of[target]
    if across.any():
        first = int(across.nonzero()[0])
        raise UsageError(
            f"data: an edge leads from graph {int(graph_of[source[first]])} to graph {int(graph_of[target[first]])}; "
            "graphs have no edges between them, correct it"
        )
    loops = source == target
    if loops.any():
        node = int(source[loops][0])
        graph = int(graph_of[node])
        raise UsageError(
            f"data: graph {graph} has {int(loops.sum())} edges from a node to itself in the set, the first at its node "
            f"{node - int(graphs.node_start[graph])}; remove them (torch_geometric.utils.remove_self_loops)"
        )
    there, back = source * len(graphs.nodes) + target, target * len(graphs.nodes) + source
    one_way = ~torch.isin(there, back)
    if one_way.any():
        first = int(one_way.nonzero()[0])
        graph = int(graph_of[source[first]])
        begin = int(graphs.node_start[graph])
        raise UsageError(
            f"data: graph {graph} is directed: it has an edge from node {int(source[first]) - begin} to "
            f"{int(target[first]) - begin} and none back; add the way back (torch_geometric.utils.to_undirected)"
        )


def _missing(graphs: GraphSet, classes: tuple[str, ...]) -> str:
    """Names the classes that no graph is of."""
    counts = graphs.labels.bincount(minlength=len(classes))
    return ", ".join(f"'{classes[number]}'" for number in (counts == 0).nonzero()[:, 0].tolist())
