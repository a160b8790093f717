"""Pictures of a distilled set: the most frequent computation trees of each class, and a molecule that has them.

SVG, in light and dark, that needs no other file. Where node labels are elements and RDKit is there (extra 'molecules'),
trees are drawn as atoms and bonds, and each class shows a training molecule with the roots of an itemset ringed.
"""

from pathlib import Path
from typing import Any

from lit_distill.core.files import write_text
from lit_distill.graph.distilled import DistilledTrees
from lit_distill.graph.pictures.drawing import draw_trees
from lit_distill.graph.pictures.words import tree_rows

FILE = "trees.svg"


def save_picture(folder: str | Path, distilled: DistilledTrees, source: Any) -> dict[str, Any]:
    """Draws a distilled set into a run's folder.

    Args:
        folder: The run's folder.
        distilled: The set.
        source: The `GraphDataModule` of the real graphs, set up.

    Returns:
        The panel for the dashboard.
    """
    names = {"node_names": source.node_names, "edge_names": source.edge_names}
    write_text(Path(folder) / FILE, draw_trees(distilled, **names, graphs=source.part("train")))
    rows = tree_rows(distilled, **names)
    size = f"{distilled.size:,} itemsets of {len(distilled.tree_start) - 1:,} computation trees"
    return {
        "file": FILE,
        "title": f"{size}, {distilled.footprint()['bytes']:,} bytes",
        "summary": "Most frequent trees: " + "; ".join(f"{name}: {tree}, {support}" for name, tree, support in rows),
        "head": ["class", "tree", "support"],
        "rows": rows,
    }


__all__ = ["FILE", "draw_trees", "save_picture", "tree_rows"]
