"""Distilled sets as training data, with validation and test on real graphs."""

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import EpochLoader
from lit_distill.graph.condensed import KIND, CondensedGraphs
from lit_distill.graph.data.base import GraphDataModule, GraphSource
from lit_distill.graph.distilled import DESCRIPTION, DistilledTrees
from lit_distill.graph.graphs import GraphLoader, GraphSet, WeightedSampler
from lit_distill.graph.pictures import save_picture

Sampling = Literal["uniform", "frequency"]


class ReplacedTraining(GraphDataModule):
    """Base of data modules whose training graphs stand in for those of another one, the source.

    Args:
        source: The real graphs. Its validation and test parts are used as they are.
        batch_size: Training graphs per step over all processes.
        seed: Seed of data order. None takes the run's seed.
    """

    def __init__(self, source: GraphDataModule, batch_size: int = 64, seed: int | None = None) -> None:
        super().__init__(batch_size=batch_size, seed=seed, eval_batch_size=source.eval_batch_size)
        self.source = source

    def prepare_data(self) -> None:
        """Prepares the source."""
        self.source.prepare_data()

    def read(self) -> GraphSource:
        """Not called: there is nothing to split."""
        raise AssertionError("the source reads")

    @abstractmethod
    def replace(self) -> GraphSet:
        """Makes the training graphs from those of the source."""

    def read_parts(self) -> dict[str, GraphSet]:
        """Sets the source up, and makes the training graphs."""
        self.source.setup()
        self.classes, self.num_classes = self.source.classes, self.source.num_classes
        self.node_values, self.edge_values = self.source.node_values, self.source.edge_values
        self.node_names, self.edge_names = self.source.node_names, self.source.edge_names
        real = {name: self.source.part(name) for name in ("val", "test") if self.source.has_part(name)}
        return {**real, "train": self.replace()}


class TreesModule(ReplacedTraining):
    """Base of data modules that train on a `DistilledTrees`, or on a `CondensedGraphs`.

    Args:
        source: The real graphs.
        sampling: "uniform": every itemset once an epoch, as the public code does it. "frequency": as many draws as
            there are itemsets, classes evenly and within a class by support, as the paper says. Condensed graphs have
            no supports.
        kwargs: See `ReplacedTraining`.
    """

    def __init__(self, source: GraphDataModule, sampling: Sampling = "uniform", **kwargs: Any) -> None:
        super().__init__(source, **kwargs)
        self.sampling = sampling
        self.distilled: DistilledTrees | CondensedGraphs | None = None
        self.panels: dict[str, Any] = {}

    @abstractmethod
    def trees(self) -> DistilledTrees | CondensedGraphs:
        """Returns the distilled set."""

    def replace(self) -> GraphSet:
        """Returns the synthetic graphs of the distilled set; a run keeps a picture of trees in its folder."""
        self.distilled = self.trees()
        self.edge_values = self.distilled.edge_values
        trainer = self.trainer
        if trainer is not None and trainer.training and isinstance(self.distilled, DistilledTrees):
            folder = trainer.log_dir  # asked by all processes: one tells the others
            if folder and trainer.is_global_zero:
                self.panels["picture"] = save_picture(folder, self.distilled, self.source)
        return self.distilled.graphs()

    def footprint(self) -> dict[str, int]:
        """Counts what the training set weighs, see `DistilledTrees.footprint` and `CondensedGraphs.footprint`."""
        assert self.distilled is not None
        return self.distilled.footprint()

    def make_loader(self, part: str, training: bool, device: torch.device, sampling: dict[str, Any]) -> EpochLoader:
        """Makes the loader of a part."""
        if training and self.sampling == "frequency":
            assert isinstance(self.distilled, DistilledTrees)
            sampling["sampler"] = WeightedSampler(self.distilled.frequencies(), self.run_seed)
        return GraphLoader(self.part(part), device=device, **sampling)


class DistilledGraphs(TreesModule):
    """A distilled set from disk: any student trains on it without the data that it was made from.

    Condensed graphs have no edge labels, whatever the real ones have; a student must not ask for them.

    Args:
        folder: Folder that holds `distilled.json`, such as `runs/mirage/gin-s0/distilled`.
        source: Real graphs with the same classes and labels, for validation and test.
        kwargs: See `TreesModule`.
    """

    def __init__(self, folder: str | Path, source: GraphDataModule, **kwargs: Any) -> None:
        super().__init__(source, **kwargs)
        self.folder = Path(folder)

    def trees(self) -> DistilledTrees | CondensedGraphs:
        """Reads the set, and checks that the source's graphs have the same labels and classes."""
        distilled = load_distilled(self.folder)
        keys = ["classes", "node_values"]
        if isinstance(distilled, DistilledTrees):
            keys.append("edge_values")
        elif self.sampling == "frequency":
            raise UsageError(f"data.sampling is frequency; the graphs of {self.folder} have no supports, take uniform")
        for key in keys:
            own, other = getattr(distilled, key), tuple(getattr(self.source, key))
            if own != other:
                raise UsageError(
                    f"data.folder: {self.folder} was distilled from graphs with {key} {list(own)}, data.source has "
                    f"{list(other)}; give the source that it was made from"
                )
        return distilled


def load_distilled(folder: Path) -> DistilledTrees | CondensedGraphs:
    """Reads a distilled set of either kind.

    Raises:
        UsageError: There is none, or it is of another kind or version.
        RunError: A file cannot be read.
    """
    try:
        kind = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None  # the reader of trees says what is wrong with the file
    return CondensedGraphs.load(folder) if kind == KIND else DistilledTrees.load(folder)
