"""Interning of computation trees and mining: seconds, memory, and their growth.

    python benchmarks/graph_trees.py [--root data/tu] [--peer SCRIPT]

Sets of the TU collection where `root` has them, and two synthetic families: one random graph of average degree 4 with
ten labels, and many rings of four nodes with three labels. "MB" is the peak of allocations beyond the input.

`--peer` is a script of Mirage's authors (NCI1/graph-nci-finalize-reduce-curr.py of their repository); its functions
that expand and label trees in pure Python are run on the same graphs of NCI1, from the graph objects that they take.
"""

import timing  # isort: skip  # noqa: F401  (imported to set the threads before numpy)

import argparse
import ast
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lit_distill.core.errors import UsageError
from lit_distill.graph.data import TUDataModule
from lit_distill.graph.graphs import GraphSet
from lit_distill.graph.mirage import distil
from lit_distill.graph.trees import TreeTable, computation_trees, computation_trees_by_graph

PEER = ("get_MPTree", "get_labels", "get_can_lab_tree")
SETS = (("NCI1", 2, 0.3), ("NCI1", 3, 0.15), ("PROTEINS", 1, 0.35), ("PROTEINS", 2, 0.08), ("IMDB-BINARY", 2, 0.02))


def random_graph(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """One graph of average degree 4."""
    rng = np.random.default_rng(0)
    ends = rng.integers(0, nodes, (2, 2 * nodes))
    return rng.integers(0, 10, nodes), np.concatenate([ends, ends[::-1]], axis=1)


def rings(graphs: int) -> tuple[np.ndarray, np.ndarray]:
    """Many rings of four nodes, the edges of a ring together."""
    rng = np.random.default_rng(0)
    first = np.arange(4 * graphs)
    there = np.stack([first, first // 4 * 4 + (first + 1) % 4]).reshape(2, graphs, 4)
    return rng.integers(0, 3, 4 * graphs), np.concatenate([there, there[::-1]], axis=2).reshape(2, -1)


def by_graph(labels: np.ndarray, edges: np.ndarray) -> tuple[TreeTable, np.ndarray]:
    """Interns rings graph after graph."""
    starts = {"node_start": np.arange(0, len(labels) + 1, 4), "edge_start": np.arange(0, edges.shape[1] + 1, 8)}
    return computation_trees_by_graph(labels, edges, None, 3, **starts)


def measured(work: Callable[[], object]) -> tuple[object, float, float]:
    """Returns what the work returns, its seconds, and in a run of its own its peak memory in MB."""
    start = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, seconds, peak / 1e6


def synthetic() -> None:
    """Prints the growth over synthetic sets."""
    for name, make, sizes in (("one graph", random_graph, (10**4, 10**5, 10**6)), ("rings", rings, (10**5, 10**6))):
        for size in sizes:
            labels, edges = make(size)
            ways = {"": lambda n=labels, e=edges: computation_trees(n, e, None, 3)}
            if make is rings:
                ways[", in parts"] = lambda n=labels, e=edges: by_graph(n, e)
            for way, work in ways.items():
                report(f"{name} x {size:,}{way}", len(labels), 3, work)


def report(name: str, nodes: int, depth: int, work: Callable[[], object]) -> None:
    """Measures one piece of work and prints its line."""
    (table, _), seconds, peak = measured(work)
    distinct = int(table.level[-1] - table.level[-2])
    print(f"{name:<32}{nodes:>12,}{depth:>6}{seconds:>10.3f}{peak:>10.1f}{distinct:>12,}", flush=True)


def real(root: Path) -> None:
    """Prints interning and mining of published sets."""
    for name, depth, share in SETS:
        try:
            data = TUDataModule(root, name)
            data.setup()
        except UsageError as error:
            print(f"{name:<24} left out: {error}")
            continue
        graphs = data.part("train")
        labels, edges = graphs.nodes[:, 0].numpy(), graphs.edge_index.numpy()
        report(name, len(labels), depth, lambda n=labels, e=edges, d=depth: computation_trees(n, e, None, d))
        start = time.perf_counter()
        found = distil(
            graphs,
            data.classes,
            depth=depth,
            threshold=[share] * data.num_classes,
            node_values=data.node_values,
            kind="closed",
        )
        print(
            f"   with mining {time.perf_counter() - start:.2f} s, {found.size} closed itemsets at {share}", flush=True
        )


def peer(root: Path, script: Path, graphs: int = 300) -> None:
    """Prints the ratio to the authors' functions on the first graphs of NCI1."""
    import networkx as nx

    tree = ast.parse(script.read_text(encoding="utf-8"))
    chosen = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in PEER]
    theirs: dict = {"nx": nx, "np": np}
    # Their script would run on import; so only its functions are taken, of a file that the user has named.
    exec(compile(ast.Module(chosen, []), str(script), "exec"), theirs)
    data = TUDataModule(root, "NCI1")
    some = data.part("train").take(torch.arange(graphs))
    drawn = [as_networkx(some, number) for number in range(graphs)]

    def label_all() -> list[list[int]]:
        return [
            [theirs["get_can_lab_tree"](theirs["get_MPTree"](graph, node, 2)) for node in graph.nodes]
            for graph in map(theirs["get_labels"], drawn)
        ]

    start = time.perf_counter()
    codes = [code for graph in label_all() for code in graph]
    their_seconds = time.perf_counter() - start
    labels, edges = some.nodes[:, 0].numpy(), some.edge_index.numpy()
    start = time.perf_counter()
    _, ids = computation_trees(labels, edges, None, 2)
    seconds = time.perf_counter() - start
    print(
        f"NCI1, {graphs} graphs, 2 hops: ours {1000 * seconds:.1f} ms, theirs {their_seconds:.2f} s, "
        f"{their_seconds / seconds:.0f} times; distinct trees {len(set(ids.tolist()))} and {len(set(codes))}"
    )


def as_networkx(graphs: GraphSet, number: int):
    """Returns one graph as the authors' functions want it: one-hot arrays on nodes and edges."""
    import networkx as nx

    one = graphs.take(torch.tensor([number]))
    drawn = nx.DiGraph()
    for node, label in enumerate(one.nodes[:, 0].tolist()):
        drawn.add_node(node, x=np.eye(37)[label])
    drawn.add_edges_from((u, v, {"edge_attr": np.ones(1)}) for u, v in one.edge_index.T.tolist())
    return drawn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data/tu"))
    parser.add_argument("--peer", type=Path)
    options = parser.parse_args()
    print(f"{'':<32}{'nodes':>12}{'hops':>6}{'seconds':>10}{'MB':>10}{'trees':>12}")
    real(options.root)
    synthetic()
    if options.peer is not None:
        peer(options.root, options.peer)
