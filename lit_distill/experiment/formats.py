"""A comparison as text for other programs: Markdown, LaTeX, CSV, JSON."""

import csv
import io
import re
from typing import Any

from lit_distill.experiment.comparison import Comparison
from lit_distill.experiment.groups import Group
from lit_distill.experiment.stats import Difference
from lit_distill.experiment.tables import best, columns, fronts, is_marked, sentences
from lit_distill.experiment.words import encodable, heading

__all__ = ["as_dict", "csv_text", "encodable", "latex", "markdown"]


def markdown(comparison: Comparison) -> str:
    """A Markdown table for each section, with the sentences above and the notes below."""
    lines = sentences(comparison)
    for part in comparison.parts:
        lines += ["", *([f"### {_in_markdown(part.title)}", ""] if comparison.sections else []), *_markdown_rows(part)]
    if comparison.notes or any(not run.finished for run in comparison.runs):
        lines += ["", *(f"- {note}" for note in comparison.notes)]
        lines += [f"- {run.path}: {run.state()}" for run in comparison.runs if not run.finished]
    return "\n".join(lines) + "\n"


def _markdown_rows(part: Comparison) -> list[str]:
    shown = columns(part)
    rows = [["stage", "method", *(column.heading for column in shown)]]
    for index, group in enumerate(part.groups):
        cells = [f"**{c.cells[index]}**" if is_marked(group, c) else c.cells[index] for c in shown]
        rows.append([group.label, group.method.rpartition(".")[2], *cells])
    rows = [[_in_markdown(cell) for cell in row] for row in rows]
    rows.insert(1, ["---", "---", *["---:"] * len(shown)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _in_markdown(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").replace("<", "&lt;").split())


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\N{MINUS SIGN}": "$-$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{DOWNWARDS ARROW}": r"$\downarrow$",
    "\N{MIDDLE DOT}": r"$\cdot$",
    "\N{EN DASH}": "--",
}
_LATEX_SIGN = re.compile("|".join(map(re.escape, _LATEX)))


def latex(comparison: Comparison) -> str:
    """A LaTeX table for each section, for the package booktabs: best mean and clear differences bold."""
    tables = [_latex_table(part) for part in comparison.parts if part.groups]
    return "\n".join(["% needs \\usepackage{booktabs}", *tables])


def _latex_table(part: Comparison) -> str:
    shown = [column for column in columns(part) if column.heading != "Pareto front"]
    winner, main = best(part), heading(part.metric)
    lines = []
    for index, group in enumerate(part.groups):
        cells = [_in_latex(group.label), _in_latex(group.method.rpartition(".")[2])]
        for column in shown:
            cell = _in_latex(column.cells[index])
            is_bold = is_marked(group, column) or (column.heading == main and group.label == winner)
            cells.append(rf"\textbf{{{cell}}}" if is_bold else cell)
        lines.append(" & ".join(cells) + r" \\")
    names = " & ".join(["stage", "method", *(_in_latex(column.heading) for column in shown)])
    caption = (
        f"Means over seeds with standard deviation; differences with standard error and 95 % interval. {part.title}"
    )
    return "\n".join([
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_in_latex(caption.strip())}}}",
        rf"  \begin{{tabular}}{{ll{'r' * len(shown)}}}",
        r"    \toprule",
        rf"    {names} \\",
        r"    \midrule",
        *(f"    {line}" for line in lines),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
        "",
    ])  # fmt: skip


def _in_latex(text: str) -> str:
    return _LATEX_SIGN.sub(lambda sign: _LATEX[sign[0]], " ".join(text.split()))


_FACTS = (
    "section", "domain", "data", "experiment", "stage", "label", "method", "student", "student_params", "teacher",
    "teacher_params", "seeds", "metric", "mean", "sd", "n", "baseline", "difference", "difference_se",
    "difference_low", "difference_high", "difference_n", "same_student", "pareto_front",
)  # fmt: skip


def csv_text(comparison: Comparison) -> str:
    """One line for each row of each section, in natural units: its facts, then mean and deviation of every figure."""
    keys = sorted({key for group in comparison.groups for key in group.stats})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_FACTS, *(f"{key}:{part}" for key in keys for part in ("mean", "sd"))])
    for part in comparison.parts:
        on = fronts(part)
        for group in part.groups:
            stat, d = group.stats.get(part.metric), group.difference
            facts: list[Any] = [
                part.title,
                group.domain,
                group.data,
                group.runs[0].experiment,
                group.stage,
                group.label,
            ]
            facts += [group.method, *group.network("student"), *group.network("teacher"), len(group.runs), part.metric]
            facts += [stat.mean, stat.sd, stat.n] if stat else [None] * 3
            facts += [d.baseline, d.mean, d.se, d.low, d.high, d.n, d.fair] if d else [None] * 7
            facts.append("; ".join(on[group.label]))
            every = (group.stats.get(key) for key in keys)
            writer.writerow(
                [*map(_in_csv, facts), *(x for s in every for x in ((s.mean, s.sd) if s else (None, None)))]
            )
    return file.getvalue()


def _in_csv(value: Any) -> Any:
    """A text that a spreadsheet does not take for a formula; other values as they are."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values for JSON, in natural units (fractions, not percent)."""
    return {
        "metric": comparison.metric or None,
        "baseline": comparison.baseline,
        "sentences": sentences(comparison),
        "sections": [
            {
                "title": part.title,
                "metric": part.metric,
                "baseline": part.baseline,
                "groups": [group.label for group in part.groups],
                "pareto_front": {label: costs for label, costs in fronts(part).items() if costs},
            }
            for part in comparison.parts
        ],
        "groups": [_group(group) for group in comparison.groups],
        "notes": list(comparison.notes),
        "runs": [{"path": str(run.path), "status": run.status} for run in comparison.runs],
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "label": group.label,
        "experiment": group.runs[0].experiment,
        "stage": group.stage,
        "method": group.method,
        "domain": group.domain,
        "data": group.data,
        "networks": group.runs[0].networks,
        "seeds": [run.seed for run in group.runs],
        "runs": [str(run.path) for run in group.runs],
        "stats": {key: {"mean": s.mean, "sd": s.sd, "n": s.n} for key, s in group.stats.items()},
        "difference": None if group.difference is None else _difference(group.difference),
        "why_no_difference": group.why_none or None,
    }


def _difference(d: Difference) -> dict[str, Any]:
    return {
        "baseline": d.baseline,
        "mean": d.mean,
        "se": d.se,
        "low": d.low,
        "high": d.high,
        "n": d.n,
        "per_seed": {str(seed): value for seed, value in d.per_seed.items()},
        "same_student": d.fair,
        "exceeds_two_standard_errors": d.clear,
    }
