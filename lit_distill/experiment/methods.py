"""The list of methods, read from the source text: no registry, and no import of torch."""

import ast
import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


def config_root() -> Path:
    """Returns the folder of the configurations: beside the package in a checkout, inside it when installed."""
    beside = PACKAGE.parent / "configs"
    return beside if beside.is_dir() else PACKAGE / "configs"


def find_methods(domain: str | None = None) -> list[dict[str, Any]]:
    """Lists methods: each public class of `lit_distill/<domain>/methods/*.py` with its paper and configurations.

    Args:
        domain: One domain only.
    """
    found = []
    for file in sorted(PACKAGE.glob("*/methods/*.py")):
        own = file.parts[-3]
        if file.stem.startswith("_") or (domain is not None and own != domain):
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.append(_describe(node, own, file.stem))
    return found


def _describe(node: ast.ClassDef, domain: str, stem: str) -> dict[str, Any]:
    root = config_root()
    paths = sorted({*root.glob(f"{domain}/{stem}.yaml"), *root.glob(f"{domain}/{stem}_*.yaml")})
    reference = _reference(node)
    return {
        "name": node.name,
        "domain": domain,
        "title": reference.get("title", ast.get_docstring(node, clean=True).partition("\n")[0]),  # type: ignore[union-attr]
        "authors": reference.get("authors"),
        "year": reference.get("year"),
        "arxiv": reference.get("arxiv"),
        "class_path": f"lit_distill.{domain}.{node.name}",
        "configs": [path.relative_to(root.parent).as_posix() for path in paths],
    }


def _reference(node: ast.ClassDef) -> dict[str, Any]:
    for statement in node.body:
        if (
            isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
            and statement.targets[0].id == "reference"
            and isinstance(statement.value, ast.Call)
        ):
            return {word.arg: ast.literal_eval(word.value) for word in statement.value.keywords if word.arg}
    return {}


def show_methods(domain: str | None = None, as_json: bool = False) -> int:
    """Prints the methods as a table, or as JSON."""
    methods = find_methods(domain)
    if as_json:
        print(json.dumps(methods, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "domain", "paper", "year", "arXiv", "configs", box=None, header_style="bold")
    for method in methods:
        paper = method["title"] if not method["authors"] else f"{method['title']} [dim]({method['authors']})[/dim]"
        configs = "\n".join(method["configs"])
        table.add_row(
            method["name"], method["domain"], paper, str(method["year"] or ""), method["arxiv"] or "", configs
        )
    Console().print(table)
    return 0
