"""Parts of the training graphs as the training set, by number or by bytes."""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lit_distill.core.errors import UsageError, check_least
from lit_distill.graph.data.base import GraphDataModule
from lit_distill.graph.data.distilled import ReplacedTraining
from lit_distill.graph.graphs import GraphSet


class Subset(ReplacedTraining):
    """Base of data modules that keep some training graphs: a subclass says in which order, this class how many.

    For a fair comparison with a distilled set the budget is that set's bytes. Graphs are added class by class in turn;
    one that does not fit any more ends the turn of its class.

    Args:
        source: The real graphs.
        per_class: Graphs of each class; leave out if `bytes` is given.
        bytes: What the subset may weigh, see `GraphSet.stored_bytes`; leave out for `per_class`. The first graph
            of each class is taken even if it weighs more: without it nothing could be learnt of that class.
        kwargs: See `ReplacedTraining`.
    """

    def __init__(
        self,
        source: GraphDataModule,
        per_class: int | None = None,
        bytes: int | None = None,  # the word for it
        **kwargs: Any,
    ) -> None:
        super().__init__(source, **kwargs)
        if (per_class is None) == (bytes is None):
            raise UsageError("data.per_class, data.bytes: give one of the two")
        check_least("data", 1, per_class=per_class, bytes=bytes)
        self.per_class = per_class
        self.bytes = bytes

    @abstractmethod
    def orders(self, train: GraphSet) -> list[Int[Tensor, " _"]]:
        """Returns the positions of the training graphs of each class, the ones to take first at the beginning."""

    def replace(self) -> GraphSet:
        """Takes the first of each class."""
        train = self.source.part("train")
        orders = self.orders(train)
        if self.per_class is not None:
            fewest = min(len(order) for order in orders)
            if self.per_class > fewest:
                raise UsageError(
                    f"data.per_class is {self.per_class}; the smallest class has {fewest} graphs, lower it"
                )
            return train.take(torch.cat([order[: self.per_class] for order in orders]))
        assert self.bytes is not None
        return train.take(within_budget(train, orders, self.bytes))


def within_budget(graphs: GraphSet, orders: list[Int[Tensor, " _"]], budget: int) -> Int[Tensor, " taken"]:
    """Takes graphs of each class in turn while they fit.

    Args:
        graphs: The set.
        orders: Positions of graphs, one list for each class. The first of each is taken in any case.
        budget: Bytes, by the measure of `GraphSet.stored_bytes`.

    Returns:
        Positions of the graphs taken.
    """
    nodes, edges = graphs.node_start.diff(), graphs.edge_start.diff()
    weights = 4 * nodes * graphs.nodes.shape[1] + (8 + 4 * graphs.edges.shape[1]) * edges
    taken = [int(order[0]) for order in orders]
    left = budget - int(weights[taken].sum())
    queues = [order[1:].tolist() for order in orders]
    while any(queues):
        for queue in queues:
            if queue and weights[queue[0]] <= left:
                taken.append(queue.pop(0))
                left -= int(weights[taken[-1]])
            else:
                queue.clear()
    return torch.tensor(taken)
