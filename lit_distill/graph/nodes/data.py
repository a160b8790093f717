"""One graph whose nodes are the samples: few of them labelled, some of them unseen until the test."""

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_distill.core.data import EpochDataModule, stratified_order
from lit_distill.core.errors import UsageError
from lit_distill.core.loading import EpochLoader, TensorLoader, derived_seed

UNLABELLED = -100  # what torch's cross-entropy leaves out


class NodeGraph(NamedTuple):
    """A graph as networks take it: `network(*graph)`.

    Attributes:
        features: Node features, (n, d) float32.
        edge_index: Source and target of each edge, (2, e). An undirected edge stands there in both directions.
    """

    features: Float[Tensor, "n d"]
    edge_index: Int[Tensor, "2 e"]

    def to(self, device: torch.device) -> "NodeGraph":
        """Returns the same on a device."""
        return NodeGraph(self.features.to(device), self.edge_index.to(device))


class NodeBatch(NamedTuple):
    """Some nodes, and the graph in which they are seen.

    Attributes:
        labels: Class of each node, (b,); -100 where training may not know it.
        features: Their features, (b, d), for networks that look at nothing else.
        place: Where they are in `graph`, (b,).
        graph: The graph in which they are seen, whole.
        unseen: Which of them were hidden in training, (b,).
        index: Their numbers in the data set, (b,).
    """

    labels: Int[Tensor, " b"]
    features: Float[Tensor, "b d"]
    place: Int[Tensor, " b"]
    graph: NodeGraph
    unseen: Bool[Tensor, " b"]
    index: Int[Tensor, " b"]  # type: ignore[assignment]  # tuple has a method of this name; nobody searches a batch


class NodePart(NamedTuple):
    """The nodes of a part, without a copy of their features. Attributes are those of `NodeBatch`."""

    labels: Int[Tensor, " k"]
    place: Int[Tensor, " k"]
    graph: NodeGraph
    unseen: Bool[Tensor, " k"]
    index: Int[Tensor, " k"]  # type: ignore[assignment]  # tuple has a method of this name

    @property
    def features(self) -> Float[Tensor, "k d"]:
        """Features of the nodes."""
        return self.graph.features[self.place]


class NodeSource(NamedTuple):
    """A graph as it comes.

    Attributes:
        classes: Names of the classes.
        graph: The graph.
        labels: Class of each node, (n,).
        split: Positions of "train", "val" and "test", where the set has a split of its own. Nodes of no part belong to
            the graph, without a label.
    """

    classes: tuple[str, ...]
    graph: NodeGraph
    labels: Int[Tensor, " n"]
    split: dict[str, Int[Tensor, " k"]] | None = None


class NodeDataModule(EpochDataModule[NodePart]):
    """Base of the node data modules: a subclass says what the graph is (`read`), this class splits and serves it.

    Two protocols. Transductive (`unseen_share: 0`): features and edges of all nodes are there in training, labels of
    few. Production: a share of the test nodes is hidden from training, with all their edges. What is left is the
    *observed graph*; training and validation know no other. A test node that was visible is tested in the observed
    graph, a hidden one in the whole graph.

    Training batches are of labelled nodes, or of all visible ones for methods in which a teacher labels them
    (`train_part`). The graph lies in memory on the device that trains; `num_workers` has no effect. The last batch of
    an epoch may be smaller than the others.

    Args:
        labels_per_class: Training nodes of each class. None takes the set's own split; 20, the
            number in use since Planetoid, where it has none.
        val_per_class: Validation nodes of each class, where a split is drawn. All others are test nodes.
        unseen_share: Share of the test nodes that are hidden in training.
        batch_size: Training nodes per step over all processes. A network that reads edges computes the whole graph in
            each step, so give it all labelled nodes at once.
        split_seed: Seed of the split and of the choice of hidden nodes. None takes that of the run, so that runs with
            other seeds see other splits, as is usual where labels are few; a teacher must then be of the same seed.
        kwargs: See `EpochDataModule`.

    Attributes:
        num_features: d.
        train_part: Part that makes the training batches: "train", the labelled nodes, or "visible", all of the observed
            graph, the labels of the others as -100. The method sets it.
        observed: The observed graph, known after `setup`.

    Reference: Zhang, Liu, Sun, Shah, Graph-less Neural Networks, 2021, arXiv 2110.08727 (the production setting).
    """

    drop_last = False
    num_features: int
    train_part = "train"
    observed: NodeGraph

    def __init__(
        self,
        labels_per_class: int | None = None,
        val_per_class: int = 30,
        unseen_share: float = 0.2,
        batch_size: int = 512,
        split_seed: int | None = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        self.split_seed = self.run_seed if split_seed is None else split_seed
        for key, value in {"labels_per_class": labels_per_class, "val_per_class": val_per_class}.items():
            if value is not None and value < 1:
                raise UsageError(f"data.{key}: {value} is not a number of nodes; give 1 or more")
        if not 0 <= unseen_share < 1:
            raise UsageError(
                f"data.unseen_share: {unseen_share} is not a share of the test nodes; give 0 up to below 1"
            )
        self.labels_per_class = labels_per_class
        self.val_per_class = val_per_class
        self.unseen_share = unseen_share

    @abstractmethod
    def read(self) -> NodeSource:
        """Reads the graph."""

    def read_parts(self) -> dict[str, NodePart]:
        """Reads, checks and splits the graph, and hides nodes. There is also a part "visible", see `train_part`.

        Raises:
            UsageError: The graph is not what the module expects, or has too few nodes for the split asked for.
        """
        source = self.read()
        _check(source)
        split = self._split(source)
        _check_training(source.labels[split["train"]], source.classes)
        self.classes, self.num_classes = source.classes, len(source.classes)
        self.num_features = source.graph.features.shape[1]

        count = len(source.labels)
        generator = torch.Generator().manual_seed(derived_seed("unseen", self.split_seed))
        order = torch.randperm(len(split["test"]), generator=generator)
        unseen = torch.zeros(count, dtype=torch.bool)
        unseen[split["test"][order[: round(self.unseen_share * len(order))]]] = True
        place = (~unseen).cumsum(0) - 1  # of the visible nodes in the observed graph
        self.observed = _subgraph(source.graph, ~unseen, place)
        # Side by side, so that one pass sees every test node in the graph that is its own.
        both, place_in_both = self.observed, place
        if unseen.any():
            both = _side_by_side(self.observed, source.graph)
            place_in_both = torch.where(unseen, len(self.observed.features) + torch.arange(count), place)

        known = torch.full_like(source.labels, UNLABELLED)
        known[split["train"]] = source.labels[split["train"]]

        def nodes(index: Tensor, labels: Tensor, graph: NodeGraph, place: Tensor) -> NodePart:
            return NodePart(labels[index], place[index], graph, unseen[index], index)

        visible = (~unseen).nonzero()[:, 0]
        parts = {"visible": nodes(visible, known, self.observed, place)}
        for name, index in split.items():
            if len(index):
                views = (both, place_in_both) if name == "test" else (self.observed, place)
                parts[name] = nodes(index, source.labels, *views)
        return parts

    def _split(self, source: NodeSource) -> dict[str, Tensor]:
        if source.split is None or self.labels_per_class is not None:
            split = _few_per_class(source.labels, self.labels_per_class or 20, self.val_per_class, self.split_seed)
        else:
            split = dict(source.split)
        if self.train_size is not None:
            train = split["train"]
            if self.train_size > len(train):
                raise UsageError(
                    f"data.train_size: {self.train_size} is more than the {len(train)} available; lower it"
                )
            split["train"] = train[stratified_order(source.labels[train], self.split_seed)][: self.train_size]
        return split

    def no_part(self, name: str) -> str:
        """Returns what a user is told who asks for a part that there is not."""
        return f"data: the graph has no {name} nodes; set data.labels_per_class to draw a split"

    def train_dataloader(self) -> EpochLoader:
        """Shuffled batches of labelled nodes, or of all visible ones, see `train_part`."""
        return self._loader(self.train_part, training=True)

    def make_loader(self, part: str, training: bool, device: torch.device, sampling: dict[str, Any]) -> EpochLoader:
        """Makes the loader of a part."""
        nodes = self.part(part)
        graph = nodes.graph.to(device)

        def make_batch(place: Tensor, number: Tensor, index: Tensor, **rest: Tensor) -> NodeBatch:
            return NodeBatch(features=graph.features[place], place=place, graph=graph, index=number, **rest)

        tensors = {"labels": nodes.labels, "place": nodes.place, "unseen": nodes.unseen, "number": nodes.index}
        return TensorLoader(tensors, make_batch=make_batch, device=device, **sampling)


def _subgraph(graph: NodeGraph, kept: Bool[Tensor, " n"], place: Int[Tensor, " n"]) -> NodeGraph:
    """Takes nodes out of a graph with all their edges; `place` are the new numbers of those kept."""
    source, target = graph.edge_index
    return NodeGraph(graph.features[kept], place[graph.edge_index[:, kept[source] & kept[target]]])


def _side_by_side(first: NodeGraph, second: NodeGraph) -> NodeGraph:
    edges = torch.cat([first.edge_index, second.edge_index + len(first.features)], dim=1)
    return NodeGraph(torch.cat([first.features, second.features]), edges)


def _few_per_class(labels: Int[Tensor, " n"], train: int, val: int, seed: int) -> dict[str, Tensor]:
    counts = labels.bincount()
    if counts.min() <= train + val:
        raise UsageError(
            f"data.labels_per_class, data.val_per_class: {train} and {val} leave no test node of the smallest class, "
            f"which has {int(counts.min())}; lower them"
        )
    generator = torch.Generator().manual_seed(derived_seed("split", seed))
    shuffled = torch.randperm(len(labels), generator=generator)
    grouped = shuffled[labels[shuffled].argsort(stable=True)]  # shuffled within each class, class after class
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[grouped]]
    parts = {"train": rank < train, "val": (train <= rank) & (rank < train + val), "test": train + val <= rank}
    return {name: grouped[chosen].sort().values for name, chosen in parts.items()}


def _check(source: NodeSource) -> None:
    features, edges = source.graph
    if len(features) != len(source.labels):
        raise UsageError(f"data: {len(features)} nodes have features and {len(source.labels)} a label; make them equal")
    if not features.isfinite().all():
        node = int((~features.isfinite()).any(1).nonzero()[0])
        raise UsageError(f"data: node {node} has a feature that is not finite; fill it in, or leave the node out")
    if source.labels.min() < 0 or source.labels.max() >= len(source.classes):
        raise UsageError(
            f"data: the nodes' classes run from {int(source.labels.min())} to {int(source.labels.max())}; 0 to "
            f"{len(source.classes) - 1} is expected"
        )
    if edges.numel() and (edges.min() < 0 or edges.max() >= len(features)):
        raise UsageError(
            f"data: edges name nodes from {int(edges.min())} to {int(edges.max())}; 0 to {len(features) - 1} is "
            "expected"
        )


def _check_training(labels: Int[Tensor, " k"], classes: tuple[str, ...]) -> None:
    counts = labels.bincount(minlength=len(classes))
    if (counts == 0).any():
        missing = ", ".join(f"'{classes[number]}'" for number in (counts == 0).nonzero()[:, 0].tolist())
        raise UsageError(
            f"data: no training node is of class {missing}; take more (data.train_size) or set data.labels_per_class"
        )
