"""Sets in the raw text layout of the TU collection."""

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_distill.core.errors import RunError, UsageError
from lit_distill.graph.data.base import GraphDataModule, GraphSource
from lit_distill.graph.graphs import GraphSet

# A line for each line of another file.
BESIDE = {
    "node_labels": "graph_indicator",
    "node_attributes": "graph_indicator",
    "edge_labels": "A",
    "edge_attributes": "A",
}


class TUDataModule(GraphDataModule):
    """Graphs in the raw layout of the TU collection (Morris et al., 2020, arXiv 2007.08663), your own or published.

    The files `NAME_A.txt`, `NAME_graph_indicator.txt`, `NAME_graph_labels.txt` and perhaps `NAME_node_labels.txt`,
    `NAME_edge_labels.txt` are looked for in `root/NAME/raw`, `root/NAME`, `root`, and in `root/NAME.zip`. Continuous
    node attributes (`NAME_node_attributes.txt`) are left out unless `bins` is given, those of edges always.

    Edges from a node to itself are left out, with a warning.

    Labels are counted from the smallest of the set, as torch-geometric does it: a part of a set, written out by itself,
    may have other numbers. What they stand for is read from `README.txt` or `NAME_label_readme.txt` beside the files,
    where these say so, as they do for MUTAG and PTC_MR (elements and kinds of bonds) and not for NCI1: lines of a
    number and a name below "Node labels", "Edge labels". Pictures show the names.

    Args:
        root: Folder of the data.
        name: NAME, such as "PROTEINS".
        download: Fetch the set, through torch-geometric, where no file is found.
        kwargs: See `GraphDataModule`.
    """

    def __init__(self, root: str | Path, name: str, download: bool = False, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        self._set = name
        self.download = download

    def prepare_data(self) -> None:
        """Downloads the set if it is not there and `download` says so."""
        assert self.root is not None
        if self._folder() is None and self._archive() is None and self.download:
            from torch_geometric.datasets import TUDataset  # here: it takes a second to import

            TUDataset(str(self.root), self._set)

    def read(self) -> GraphSource:
        """Reads the text files, by torch-geometric's own reader."""
        folder, archive = self._folder(), self._archive()
        if folder is not None:
            return _read(folder, self._set)
        if archive is None:
            raise UsageError(
                f"data.root: {self.root} holds neither {self._set}/raw/{self._set}_A.txt nor {self._set}.zip; correct "
                "it, or set data.download to true"
            )
        with tempfile.TemporaryDirectory() as place:
            try:
                with zipfile.ZipFile(archive) as content:
                    for member in content.infolist():
                        if not member.is_dir() and member.filename.endswith(".txt"):
                            Path(place, Path(member.filename).name).write_bytes(content.read(member))
            except (zipfile.BadZipFile, OSError) as error:
                raise RunError(f"data.root: {archive} cannot be read ({error}); get it again") from error
            return _read(Path(place), self._set)

    def _folder(self) -> Path | None:
        assert self.root is not None
        folders = (self.root / self._set / "raw", self.root / self._set, self.root)
        return next((folder for folder in folders if (folder / f"{self._set}_A.txt").is_file()), None)

    def _archive(self) -> Path | None:
        assert self.root is not None
        archive = self.root / f"{self._set}.zip"
        return archive if archive.is_file() else None


def _read(folder: Path, name: str) -> GraphSource:
    from torch_geometric.io import read_tu_data, read_txt_array  # here: they take a second to import

    for part in ("graph_indicator", "graph_labels"):
        if not (folder / f"{name}_{part}.txt").is_file():
            raise UsageError(f"data.root: {folder} holds no {name}_{part}.txt; a classifier needs it, so add it")
    with (folder / f"{name}_A.txt").open(encoding="utf-8", errors="replace") as file:
        if not any(map(str.strip, file)):
            raise UsageError(
                f"data.root: {folder}/{name}_A.txt is empty; graph networks learn from edges, so write them there, one "
                "a line"
            )
    for part in ("A", "graph_indicator", "graph_labels", *BESIDE):
        file_of_part = folder / f"{name}_{part}.txt"
        if file_of_part.is_file() and file_of_part.read_bytes()[-1:] not in (b"", b"\n"):
            raise UsageError(
                f"data.root: {file_of_part} does not end with a line break, and its last line would be lost; add one"
            )
    try:
        data, slices, sizes = read_tu_data(str(folder), name)
    except (ValueError, IndexError, RuntimeError) as error:
        raise _unreadable(folder, name, str(error)) from error
    labels, edge_start = data.y.long(), slices["edge_index"]
    ends = read_txt_array(str(folder / f"{name}_A.txt"), sep=",", dtype=torch.long)
    if loops := int((ends[:, 0] == ends[:, 1]).sum()):
        rank_zero_warn(f"data.root: {loops} edges of {name} lead from a node to itself; they are left out")
    if "x" in slices:
        node_start = slices["x"]
    else:
        indicator = read_txt_array(str(folder / f"{name}_graph_indicator.txt"), dtype=torch.long) - 1
        node_start = torch.cat([torch.zeros(1, dtype=torch.long), indicator.bincount().cumsum(0)])
    if len(labels) != len(node_start) - 1:
        raise RunError(
            f"data.root: {name} has {len(node_start) - 1} graphs in {folder}/{name}_graph_indicator.txt and "
            f"{len(labels)} labels in {name}_graph_labels.txt; get them again"
        )
    # torch-geometric's reader stops counting at the last graph that has edges.
    edge_start = torch.cat([edge_start, edge_start[-1:].expand(len(node_start) - len(edge_start))])
    graph_of_edge = torch.arange(len(labels)).repeat_interleave(edge_start.diff())
    total = int(node_start[-1])
    if data.x is not None and len(data.x) != total:
        raise _unreadable(folder, name, f"{len(data.x)} nodes have labels or attributes, of {total}")
    nodes = _whole_numbers(data.x, sizes["num_node_attributes"], total)
    edges = _whole_numbers(data.edge_attr, sizes["num_edge_attributes"], data.edge_index.shape[1])
    graphs = GraphSet(
        labels=labels,
        nodes=nodes,
        edge_index=data.edge_index + node_start[:-1][graph_of_edge],
        edges=edges,
        node_start=node_start,
        edge_start=edge_start,
        roots=torch.ones(total, dtype=torch.bool),
    )
    count = sizes["num_node_attributes"]
    return GraphSource(
        tuple(str(number) for number in range(int(labels.max()) + 1)),
        graphs,
        attributes=data.x[:, :count] if count else None,
        node_names=_names(folder, name, "node"),
        edge_names=_names(folder, name, "edge"),
    )


def _unreadable(folder: Path, name: str, reason: str) -> RunError:
    """Says what is wrong with files; the given reason, if nothing is found."""
    reason = _wrong(folder, name) or reason.partition("\n")[0]
    return RunError(
        f"data.root: the files of {name} in {folder} cannot be read ({reason}); correct it, or get them again"
    )


def _wrong(folder: Path, name: str) -> str | None:
    """Finds a line that is not numbers, a node that there is not, or another number of lines than needed."""
    lines: dict[str, int] = {}
    largest = 0.0
    for part in ("A", "graph_indicator", "graph_labels", *BESIDE):
        file = folder / f"{name}_{part}.txt"
        if not file.is_file():
            continue
        for lines[part], line in enumerate(file.read_text(encoding="utf-8", errors="replace").strip().split("\n"), 1):
            try:
                numbers = [float(number) for number in line.split(",")]
            except ValueError:
                return f"line {lines[part]} of {file.name} is '{line.strip()[:40]}', numbers are expected"
            if part == "A":
                largest = max(largest, *numbers)
    if largest > lines["graph_indicator"]:
        return f"{name}_A.txt has node {largest:.0f}, {name}_graph_indicator.txt has {lines['graph_indicator']} lines"
    for part, other in BESIDE.items():
        if part in lines and lines[part] != lines[other]:
            return f"{name}_{part}.txt has {lines[part]} lines, {name}_{other}.txt has {lines[other]}"
    return None


def _names(folder: Path, name: str, kind: str) -> tuple[str, ...]:
    """Reads how the labels of nodes or edges are called, from the smallest on; empty if nothing says so."""
    from torch_geometric.io import read_txt_array

    texts = [folder / "README.txt", folder / f"{name}_label_readme.txt"]
    called: dict[int, str] = {}
    for text in texts:
        if text.is_file():
            called |= _called(text.read_text(encoding="utf-8", errors="replace"), kind)
    file = folder / f"{name}_{kind}_labels.txt"
    if not called or not file.is_file():
        return ()
    labels = read_txt_array(str(file), sep=",", dtype=torch.long)
    if labels.dim() > 1:  # several labels each, which stand as one
        return ()
    return tuple(called.get(number, str(number)) for number in range(int(labels.min()), int(labels.max()) + 1))


def _called(text: str, kind: str) -> dict[int, str]:
    """Finds the lines "number name" or "name number" below a heading such as "Node labels:"."""
    called, inside = {}, False
    for line in text.splitlines():
        words = line.split()
        if len(words) == 2 and any(word.isdecimal() for word in words):
            number, own = words if words[0].isdecimal() else reversed(words)
            if inside:
                called[int(number)] = own
        elif words and words[0] != "Component":
            inside = line.strip().lower().startswith(f"{kind} labels")
    return called


def _whole_numbers(features: Tensor | None, attributes: int, count: int) -> Tensor:
    """Turns one-hot labels, which stand behind continuous attributes, into a column of numbers, if there are any."""
    if features is None or features.shape[1] == attributes:
        return torch.zeros((count, 0), dtype=torch.long)
    one_hot = features[:, attributes:]
    if bool((one_hot.sum(1) == 1).all()):
        return one_hot.argmax(1, keepdim=True)
    return torch.unique(one_hot, dim=0, return_inverse=True)[1][:, None]  # several labels each
