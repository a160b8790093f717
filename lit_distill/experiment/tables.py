"""A comparison in sentences and tables, and both in the terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_distill.experiment.comparison import Comparison
from lit_distill.experiment.groups import Group
from lit_distill.experiment.pareto import costs_of, pareto_front
from lit_distill.experiment.stats import Difference, Stat
from lit_distill.experiment.words import (
    MISSING,
    decimals,
    encodable,
    heading,
    is_percent,
    lower_is_better,
    metric_name,
    scaled,
    show,
    show_count,
    show_difference,
    show_plain,
)

if TYPE_CHECKING:
    from rich.table import Table

MOST_ROWS = 40  # more rows are no longer read in a terminal
MOST_LINES = 20
MOST_SENTENCES = 8  # more rows than this are read in the table


def sentences(comparison: Comparison) -> list[str]:
    """The result in words: the main one first, then one sentence for each other row with a difference.

    Of several sections each tells its main one first, under its title, and then the others.
    """
    if not comparison.sections:
        return _sentences(comparison)
    told = [[f"{part.title}: {sentence}" for sentence in _sentences(part)] for part in comparison.sections]
    return [lead for lead, *_ in told] + [sentence for _, *others in told for sentence in others]


def _sentences(comparison: Comparison) -> list[str]:
    """The result of one section in words.

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
    """A column of the result table.

    Attributes:
        heading: Its heading.
        explanation: What it holds.
        cells: One text for each group.
        values: One number for each group, by which rows are sorted; None sorts last.
    """

    heading: str
    explanation: str
    cells: tuple[str, ...]
    values: tuple[float | None, ...]


def columns(comparison: Comparison) -> list[Column]:
    """The columns of the result table, the same for terminal, Markdown and page; empty ones are left out."""
    metric = comparison.metric
    groups = comparison.groups

    def of(name: str, explanation: str, key: str, shown: Callable[[Stat | None], str]) -> Column:
        stats = [group.stats.get(key) for group in groups]
        return Column(
            name, explanation, tuple(map(shown, stats)), tuple(None if value is None else value.mean for value in stats)
        )

    table = [
        Column(
            "seeds",
            "number of runs that differ by seed alone",
            tuple(str(len(group.runs)) for group in groups),
            tuple(float(len(group.runs)) for group in groups),
        ),
        of(heading(metric), "mean ± standard deviation over seeds", metric, lambda s: show(metric, s)),
        Column(
            f"difference to {comparison.baseline}",
            "mean paired difference ± standard error [95 % interval by Student's t]; bold beyond two standard errors",
            tuple(show_difference(metric, group.difference) for group in groups),
            tuple(None if group.difference is None else group.difference.mean for group in groups),
        ),
    ]
    if metric != "test/ece":
        ece = "expected calibration error, mean ± standard deviation"
        table.append(of(heading("test/ece"), ece, "test/ece", lambda s: show("test/ece", s)))
    table += [
        of("parameters", "parameters of the student", "efficiency/student_params", show_count),
        of(
            "compression \N{MULTIPLICATION SIGN}",
            "teacher's parameters / student's",
            "efficiency/compression",
            show_plain,
        ),
        of("steps", "sampling steps (evaluations of the network for a sample)", "test/nfe", show_plain),
        of("bytes", "bytes of the training set", "test/bytes", show_count),
        of("samples/s", "samples per second in inference", "efficiency/inference_samples_per_second", show_plain),
        of("seconds", "mean wall time of a run", "seconds", show_plain),
        _fronts(comparison),
        _networks(groups, "student"),
        _networks(groups, "teacher"),
    ]
    return [column for column in table if any(cell != MISSING for cell in column.cells)]


def _networks(groups: Sequence[Group], role: str) -> Column:
    """Class names of one network, empty unless the rows differ in them."""
    names = [group.network(role)[0].rpartition(".")[2] or MISSING for group in groups]
    if len(set(names) - {MISSING}) < 2:
        names = [MISSING] * len(groups)
    return Column(role, f"class of the {role}", tuple(names), (None,) * len(groups))


def fronts(comparison: Comparison) -> dict[str, list[str]]:
    """Label -> names of the costs on whose Pareto front the row is; those in which no rows differ are left out."""
    on: dict[str, list[str]] = {group.label: [] for group in comparison.groups}
    for cost in costs_of(comparison.groups, comparison.metric):
        for group in pareto_front(comparison.groups, comparison.metric, cost):
            on[group.label].append(cost.name)
    return on


def _fronts(comparison: Comparison) -> Column:
    on = fronts(comparison)
    return Column(
        "Pareto front",
        "costs at which no other row is as good and cheaper, or better and as cheap, by means",
        tuple(", ".join(on[group.label]) or MISSING for group in comparison.groups),
        tuple(float(len(on[group.label])) for group in comparison.groups),
    )


def is_marked(group: Group, column: Column) -> bool:
    """Whether the cell of this group is a difference beyond two standard errors."""
    return column.heading.startswith("difference") and group.difference is not None and group.difference.clear


def best(comparison: Comparison) -> str:
    """Label of the row with the best mean of the metric, empty if none has it."""
    ranked = ranking(comparison)
    return ranked[0].label if ranked and comparison.metric in ranked[0].stats else ""


def ranking(comparison: Comparison) -> list[Group]:
    """The rows from the best mean of the metric to the worst, and those without it."""
    metric = comparison.metric
    sign = 1 if lower_is_better(metric) else -1
    return sorted(
        comparison.groups,
        key=lambda group: sign * stat.mean if (stat := group.stats.get(metric)) is not None else float("inf"),
    )


def short_labels(comparison: Comparison) -> dict[str, str]:
    """Label of each row -> the label without its experiment, where all rows of the section have the same."""
    stems = {group.label: group.label.partition(f"/{group.stage}")[0] for group in comparison.groups}
    is_common = len(set(stems.values())) == 1 and not any(label == stem for label, stem in stems.items())
    return {label: label[len(stem) + 1 :] if is_common else label for label, stem in stems.items()}


def shortened(comparison: Comparison, most: int) -> list[Group]:
    """The rows, or if they are more, the baselines and the best ones, in their order."""
    if len(comparison.groups) <= most:
        return list(comparison.groups)
    ranked = sorted(ranking(comparison), key=comparison.is_baseline, reverse=True)
    kept = {group.label for group in ranked[:most]}
    return [group for group in comparison.groups if group.label in kept]


# ---------------------------------------------------------------------------------------------------------------------
# In the terminal


def print_comparison(comparison: Comparison) -> None:
    """Prints tables, sentences, notes, and the runs that are not finished."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; wrapped cells would be hard to read by eye and by grep

    def say(text: str, style: str = "") -> None:
        console.print(Text(encodable(text), style=style), soft_wrap=True)

    for part in comparison.parts:
        if part.groups:
            console.print(terminal_table(part))
    told = sentences(comparison)
    for line in told[:MOST_SENTENCES]:
        say(line, "bold")
    if len(told) > MOST_SENTENCES:
        say(f"and {len(told) - MOST_SENTENCES} more in the table")
    unread = [f"{run.path}: {run.state()}" for run in comparison.runs if not run.finished]
    for what, lines in (("notes", [f"note: {note}" for note in comparison.notes]), ("runs", unread)):
        for line in lines[:MOST_LINES]:
            say(line)
        if len(lines) > MOST_LINES:
            say(f"and {len(lines) - MOST_LINES} more {what}, in the files of --markdown, --json and --html")


def terminal_table(comparison: Comparison) -> "Table":
    """The result as a rich table. Clear differences are bold and carry a star, which a pipe keeps."""
    from rich.table import Table
    from rich.text import Text

    title = f"{metric_name(comparison.metric)} by stage"
    table = Table(title=encodable(f"{comparison.title}: {title}" if comparison.title else title), title_justify="left")
    rows = shortened(comparison, MOST_ROWS)
    kept, names = {group.label for group in rows}, short_labels(comparison)
    places = [index for index, group in enumerate(comparison.groups) if group.label in kept]
    shown = columns(comparison)
    table.add_column("stage", overflow="fold", min_width=min(40, max(len(group.label) for group in rows)))
    table.add_column("method")
    for column in shown:
        table.add_column(Text(encodable(column.heading)), justify="right")
    for index in places:
        group = comparison.groups[index]
        cells = [
            Text(f"{column.cells[index]} *", style="bold")
            if is_marked(group, column)
            else Text(encodable(column.cells[index]))
            for column in shown
        ]
        table.add_row(Text(encodable(names[group.label])), Text(encodable(group.method.rpartition(".")[2])), *cells)
    captions = []
    if any(is_marked(group, column) for group in rows for column in shown):
        captions.append("* more than two standard errors")
    if len(rows) < len(comparison.groups):
        captions.append(f"the baselines and the best of {len(comparison.groups)} rows")
    if captions:
        table.caption = "; ".join(captions)
        table.caption_justify = "left"
    return table
