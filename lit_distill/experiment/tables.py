"""A comparison in words and tables: numbers, sentences, terminal, Markdown, JSON."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_distill.experiment.compare import Comparison, Difference, Group, Stat

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "\N{EN DASH}"

# Words in a metric's name. Domains add theirs here, so that tables and sentences read right.
_LOWER_IS_BETTER = frozenset({
    "loss", "nll", "ece", "mce", "brier", "error", "err", "mse", "mae", "rmse", "perplexity", "ppl", "fid", "kid", "kl",
    "fd", "mmd", "lpips", "distance", "latency", "seconds", "params", "flops", "bytes",
})  # fmt: skip
_PERCENT = frozenset({"acc", "acc1", "acc5", "top1", "top5", "accuracy", "ece", "agreement"})
_WORDS = {"acc": "accuracy", "ece": "ECE", "nll": "NLL", "fid": "FID", "kl": "KL"}


def lower_is_better(metric: str) -> bool:
    """Whether a small value of this metric is a good one, judged by the words of its name."""
    return bool(_LOWER_IS_BETTER & set(re.split(r"[^a-z0-9]+", metric.lower())))


def is_percent(metric: str) -> bool:
    """Whether the metric is a fraction that reads better as a percentage."""
    return bool(_PERCENT & set(re.split(r"[^a-z0-9]+", metric.lower())))


def metric_name(metric: str) -> str:
    """The metric in words: `test/acc` -> `test accuracy`."""
    return " ".join(_WORDS.get(word, word.replace("_", " ")) for word in metric.split("/"))


def scaled(metric: str, value: float) -> float:
    """The value as it is shown: fractions in percent."""
    return 100 * value if is_percent(metric) else value


def decimals(metric: str, spread: float | None) -> int:
    """Decimals that the spread deserves: its first digit, between 1 and 2 for percentages and 2 and 4 otherwise."""
    least, most = (1, 2) if is_percent(metric) else (2, 4)
    if not spread:
        return least
    return max(least, min(most, -math.floor(math.log10(abs(scaled(metric, spread))))))


def show(metric: str, value: Stat | None) -> str:
    """`95.1 ± 0.3` for several seeds, `98.5` for one."""
    if value is None:
        return MISSING
    places = decimals(metric, value.sd)
    mean = f"{scaled(metric, value.mean):.{places}f}"
    return mean if value.sd is None else f"{mean} ± {scaled(metric, value.sd):.{places}f}"


def show_difference(metric: str, difference: Difference | None) -> str:
    """`+1.9 ± 0.4 [0.8, 3.0]`: mean, standard error, 95 % interval."""
    if difference is None:
        return MISSING
    places = decimals(metric, difference.se)
    mean, se, low, high = (scaled(metric, x) for x in (difference.mean, difference.se, difference.low, difference.high))
    return _minus(f"{mean:+.{places}f} ± {se:.{places}f} [{low:.{places}f}, {high:.{places}f}]")


def show_count(value: Stat | None) -> str:
    """A large number: `3,970`, `1.24 M`, `41.2 G`."""
    if value is None:
        return MISSING
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value.mean >= size:
            return f"{value.mean / size:.3g} {unit}"
    return f"{value.mean:,.0f}"


def show_plain(value: Stat | None) -> str:
    """A mean for reading at a glance: `0.0123`, `33.0`, `12,400`."""
    if value is None:
        return MISSING
    size = abs(value.mean)
    return f"{value.mean:,.0f}" if size >= 100 else f"{value.mean:.1f}" if size >= 1 else f"{value.mean:.3g}"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def sentences(comparison: Comparison) -> list[str]:
    """The result in words: the main one first, then one sentence for each other row with a difference.

    A row wins or loses only if its difference exceeds two standard errors, and only against a baseline that trains
    the same student.
    """
    metric = comparison.metric
    better = -1 if lower_is_better(metric) else 1
    measured = [group for group in comparison.groups if metric in group.stats]
    if not measured:
        return ["No finished run to compare yet."]
    rivals = [(group, group.difference) for group in measured if group.difference is not None and group.difference.fair]
    if not rivals:
        best = max(measured, key=lambda group: better * group.stats[metric].mean)
        mean = best.stats[metric]
        why = (
            "No row can be paired with the baseline" if comparison.baseline else "There is no baseline to compare with"
        )
        over = f" over {mean.n} seeds" if mean.n > 1 else " (one seed)"
        return [
            f"{why}; the best {metric_name(metric)} is {best.label}'s, {_with_unit(metric, show(metric, mean))}{over}."
        ]
    rivals.sort(key=lambda rival: (rival[1].clear, better * rival[1].mean), reverse=True)
    winners = [rival for rival in rivals if rival[1].clear and better * rival[1].mean > 0]
    told = [_sentence(metric, group, difference, better) for group, difference in rivals]
    if winners or len(rivals) == 1:
        return told
    if not any(difference.clear for _, difference in rivals):
        lead = (
            f"No method differs from {comparison.baseline} by more than two standard errors in {metric_name(metric)}."
        )
    else:
        lead = f"No method beats {comparison.baseline} in {metric_name(metric)}."
    return [lead, *told]


def _sentence(metric: str, group: Group, difference: Difference, better: int) -> str:
    places = decimals(metric, difference.se)
    size, se = abs(scaled(metric, difference.mean)), scaled(metric, difference.se)
    unit = " points of" if is_percent(metric) else " in"
    amount = f"{size:.{places}f} ± {se:.{places}f}{unit} {metric_name(metric)} over {difference.n} paired seeds"
    if not difference.clear:
        sign = "+" if difference.mean >= 0 else "\N{MINUS SIGN}"
        return (
            f"{group.label} and {difference.baseline} differ by {sign}{amount}, "
            "which is within two standard errors: no clear difference."
        )
    verb = "beats" if better * difference.mean > 0 else "falls behind"
    doubt = "" if difference.low * difference.high > 0 else "; with so few seeds the 95 % interval still includes zero"
    return f"{group.label} {verb} {difference.baseline} by {amount}{doubt}."


def _with_unit(metric: str, text: str) -> str:
    return f"{text} %" if is_percent(metric) else text


@dataclass(frozen=True)
class Column:
    """A column of the result table: its heading, an explanation, and one text for each group."""

    heading: str
    explanation: str
    cells: tuple[str, ...]


def columns(comparison: Comparison) -> list[Column]:
    """The columns of the result table, the same for terminal, Markdown and page; empty ones are left out."""
    metric = comparison.metric
    groups = comparison.groups

    def of(key: str, shown: Callable[[Stat | None], str]) -> tuple[str, ...]:
        return tuple(shown(group.stats.get(key)) for group in groups)

    table = [
        Column("seeds", "number of runs that differ by seed alone", tuple(str(len(group.runs)) for group in groups)),
        Column(heading(metric), "mean ± standard deviation over seeds", of(metric, lambda s: show(metric, s))),
        Column(
            f"difference to {comparison.baseline}",
            "mean paired difference ± standard error [95 % interval by Student's t]; bold beyond two standard errors",
            tuple(show_difference(metric, group.difference) for group in groups),
        ),
    ]
    if metric != "test/ece":
        ece = "expected calibration error, mean ± standard deviation"
        table.append(Column(heading("test/ece"), ece, of("test/ece", lambda s: show("test/ece", s))))
    table += [
        Column("parameters", "parameters of the student", of("efficiency/student_params", show_count)),
        Column(
            "compression \N{MULTIPLICATION SIGN}",
            "teacher's parameters / student's",
            of("efficiency/compression", show_plain),
        ),
        Column(
            "samples/s",
            "samples per second in inference",
            of("efficiency/inference_samples_per_second", show_plain),
        ),
        Column("seconds", "mean wall time of a run", of("seconds", show_plain)),
    ]
    return [column for column in table if any(cell != MISSING for cell in column.cells)]


def heading(metric: str) -> str:
    """Heading of a metric's column: name, unit, and an arrow where low is good."""
    unit = " %" if is_percent(metric) else ""
    return metric_name(metric) + unit + (" ↓" if lower_is_better(metric) else "")


def is_marked(group: Group, column: Column) -> bool:
    """Whether the cell of this group is a difference beyond two standard errors."""
    return column.heading.startswith("difference") and group.difference is not None and group.difference.clear


def terminal_table(comparison: Comparison) -> "Table":
    """The result as a rich table. Clear differences are bold and carry a star, which a pipe keeps."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{metric_name(comparison.metric)} by stage", title_justify="left")
    shown = columns(comparison)
    table.add_column("stage")
    table.add_column("method")
    for column in shown:
        table.add_column(column.heading, justify="right")
    for index, group in enumerate(comparison.groups):
        cells = [
            Text(f"{column.cells[index]} *", style="bold") if is_marked(group, column) else Text(column.cells[index])
            for column in shown
        ]
        table.add_row(Text(group.label), Text(group.method.rpartition(".")[2]), *cells)
    if any(is_marked(group, column) for group in comparison.groups for column in shown):
        table.caption = "* more than two standard errors"
        table.caption_justify = "left"
    return table


def markdown_table(comparison: Comparison) -> str:
    """The result as a Markdown table, with the sentences above and the notes below."""
    shown = columns(comparison)
    rows = [["stage", "method", *(column.heading for column in shown)]]
    for index, group in enumerate(comparison.groups):
        cells = [f"**{c.cells[index]}**" if is_marked(group, c) else c.cells[index] for c in shown]
        rows.append([group.label, group.method.rpartition(".")[2], *cells])
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    rows.insert(1, ["---", "---", *["---:"] * len(shown)])
    lines = [*sentences(comparison), "", *(f"| {' | '.join(row)} |" for row in rows)]
    if comparison.notes or any(not run.finished for run in comparison.runs):
        lines += ["", *(f"- {note}" for note in comparison.notes)]
        lines += [f"- {run.path}: {run.status}" for run in comparison.runs if not run.finished]
    return "\n".join(lines) + "\n"


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values for JSON, in natural units (fractions, not percent)."""
    return {
        "metric": comparison.metric,
        "baseline": comparison.baseline,
        "sentences": sentences(comparison),
        "groups": [
            {
                "label": group.label,
                "experiment": group.runs[0].experiment,
                "stage": group.stage,
                "method": group.method,
                "data": group.data,
                "networks": group.runs[0].networks,
                "seeds": [run.seed for run in group.runs],
                "runs": [str(run.path) for run in group.runs],
                "stats": {key: {"mean": s.mean, "sd": s.sd, "n": s.n} for key, s in group.stats.items()},
                "difference": None
                if (d := group.difference) is None
                else {
                    "baseline": d.baseline,
                    "mean": d.mean,
                    "se": d.se,
                    "low": d.low,
                    "high": d.high,
                    "n": d.n,
                    "per_seed": {str(seed): value for seed, value in d.per_seed.items()},
                    "same_student": d.fair,
                    "exceeds_two_standard_errors": d.clear,
                },
                "why_no_difference": group.why_none or None,
            }
            for group in comparison.groups
        ],
        "notes": list(comparison.notes),
        "runs": [{"path": str(run.path), "status": run.status} for run in comparison.runs],
    }
