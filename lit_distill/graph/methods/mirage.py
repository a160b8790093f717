"""Mirage: frequent computation trees as the training set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_distill.core.errors import check_least
from lit_distill.core.reference import Reference
from lit_distill.core.synthesis import DISTILLED
from lit_distill.graph.data.base import GraphDataModule
from lit_distill.graph.data.distilled import TreesModule
from lit_distill.graph.distilled import DistilledTrees
from lit_distill.graph.itemsets import Kind
from lit_distill.graph.mirage import distil


class Mirage(TreesModule):
    """A network of L layers sees of a graph the computation trees of its nodes, and few trees cover most nodes.

    A data module: it distils the training graphs of its source when it is set up (`lit_distill.graph.mirage.distil`),
    and serves one synthetic graph for each frequent set of trees. No network takes part in that, so one distilled set
    serves all of them. A run keeps it in its folder, as `distilled/`; `DistilledGraphs` trains others on it.

    Args:
        source: The real graphs.
        depth: L, hops of the trees; as many as the student has layers, or more, for the student to see in the trees
            exactly what it sees in the graphs.
        threshold: Of each class, or one for all: the least share of its graphs (below 1) or number of them (from 1 on)
            that have an itemset.
        kind: "all" frequent itemsets as in the paper, the "closed" or the "maximal" ones.
        max_size: Most trees in an itemset.
        max_itemsets: Where to give up, for each class.
        exclusive: Leave out itemsets that are frequent in more than one class.
        kwargs: See `TreesModule`.
    """

    reference = Reference(
        title="Mirage: Model-Agnostic Graph Distillation for Graph Classification",
        authors="Gupta, Manchanda, Kodamana, Ranu",
        year=2023,
        arxiv="2310.09486",
    )

    def __init__(
        self,
        source: GraphDataModule,
        depth: int,
        threshold: float | int | Sequence[float | int],
        kind: Kind = "all",
        max_size: int | None = None,
        max_itemsets: int = 10_000,
        exclusive: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(source, **kwargs)
        check_least("data", 0, depth=depth)
        self.depth = depth
        self.threshold = threshold
        self.options: dict[str, Any] = {
            "kind": kind,
            "max_size": max_size,
            "max_itemsets": max_itemsets,
            "exclusive": exclusive,
        }

    def trees(self) -> DistilledTrees:
        """Distils the training graphs of the source, and keeps the result in the run's folder, if there is a run."""
        source = self.source
        own = self.threshold
        distilled = distil(
            source.part("train"),
            source.classes,
            depth=self.depth,
            threshold=[own] * source.num_classes if isinstance(own, int | float) else list(own),
            node_values=source.node_values,
            edge_values=source.edge_values,
            description={"graphs": source.part_size("train"), "source_bytes": source.part("train").stored_bytes()},
            **self.options,
        )
        trainer = self.trainer
        if trainer is not None:
            self._check_depth(trainer.lightning_module)
            folder = trainer.log_dir if trainer.training else None  # asked by all processes: one tells the others
            if folder and trainer.is_global_zero:
                distilled.save(Path(folder) / DISTILLED)
        return distilled

    def _check_depth(self, module: Any) -> None:
        student = getattr(module, "student", None)
        layers = getattr(getattr(student, "gnn", None), "num_layers", None)
        if isinstance(layers, int) and layers > self.depth:
            rank_zero_warn(
                f"data.depth is {self.depth} and the student has {layers} layers: in a real graph it sees more than "
                f"the trees have. For the exact case set data.depth to {layers}"
            )
