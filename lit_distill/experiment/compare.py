"""Comparing runs: which rows are read together, by which metric, and against which baseline.

Runs are averaged when they differ by their seed alone (`groups`). A difference to the baseline is taken seed by seed,
because runs with one seed share data order and initialisation, and the spread between seeds is often larger than the
gain. Rows of one domain and one data set are read together, by the metric that tells most about them.
"""

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lit_distill.core.errors import UsageError
from lit_distill.core.files import write_json, write_text
from lit_distill.experiment.groups import (
    LARGEST,
    Group,
    config_without_seed,
    data_name,
    data_settings,
    group_runs,
    other_data,
)
from lit_distill.experiment.runs import Plan, Run, find_runs, read_plan
from lit_distill.experiment.stats import Difference, Stat, paired_difference, stat

DEFAULT_BASELINE = "baseline"
MOST_SENTENCES = 8  # more rows than this are read in the table

# What tells most about a run whose summary and recipe do not say it, as those of earlier versions: the first of these
# that was measured. A model that has a distance of distributions or a perplexity was made for that.
_TELLING = ("fd", "fid", "mmd", "perplexity", "auroc", "acc", "kl", "nll", "loss")

_DataKind = tuple[str, tuple[str, ...]]  # domain, and the data's name


@dataclass(frozen=True)
class Comparison:
    """What was compared, and how it came out.

    Attributes:
        metric: The metric of the differences, such as `test/acc`; empty where sections have different ones.
        baseline: Stage or row that others are compared with, in words; None if there is none.
        groups: The rows, in the order in which their first runs were started.
        runs: Every run found, unfinished and broken ones included.
        notes: What the reader should know: rows kept apart, values left out.
        title: Domain and data.
        baselines: Labels of the rows that are baselines.
        sections: Comparisons of rows that are read together, if there is more than one kind of them. A baseline of
            another domain stands in the section too.
    """

    metric: str
    baseline: str | None
    groups: tuple[Group, ...]
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()
    title: str = ""
    baselines: frozenset[str] = frozenset()
    sections: tuple["Comparison", ...] = ()

    @property
    def parts(self) -> tuple["Comparison", ...]:
        """The sections; the comparison itself if it has none."""
        return self.sections or (self,)

    def is_baseline(self, group: Group) -> bool:
        """Whether the row is (one of) the baseline's."""
        return group.label in self.baselines


def compare_runs(
    runs: Sequence[Run], metric: str | None = None, baseline: str | Sequence[str] | None = None
) -> Comparison:
    """Groups runs and sets each group against the baseline.

    Args:
        runs: All runs, in any state.
        metric: The figure in which differences are taken. None takes, for each domain and data set, the one that most
            of its rows name: their recipe's, else their summary's, else the first of a short list.
        baseline: Stages or row labels to compare with, with the experiment or domain before a slash where that is
            needed. Data without any of them take their recipe's baseline, or else the stage named `baseline`.

    Raises:
        UsageError: No finished run has this metric, or no row has this baseline's name.
    """
    groups, notes = group_runs(runs)
    filled = [_with_stats(group, metric, notes) for group in groups]
    if metric is not None:
        _check_metric(metric, {key for group in filled for run in group.runs for key in run.figures()})

    plans = {folder: read_plan(folder) for folder in {group.runs[0].path.parent for group in filled}}
    kinds: dict[_DataKind, list[Group]] = defaultdict(list)
    for group in filled:
        kinds[group.domain, data_name(group)].append(group)
    telling = {kind: _telling_metric(rows, plans) for kind, rows in kinds.items()}
    metrics = {kind: metric or telling[kind] for kind in kinds}
    bases = _baselines(kinds, [baseline] if isinstance(baseline, str) else baseline or (), plans)
    base_labels = frozenset(group.label for of_kind in bases.values() for group in of_kind)
    subtracted = {
        kind: _subtracted(kind, members, bases, telling, metrics[kind], notes) for kind, members in kinds.items()
    }
    for kind, members in subtracted.items():
        if bases and kind not in bases and all(group.why_none for group in members):
            notes.append(
                f"{_title(kind, kinds)} has no baseline of its own, and its rows no difference "
                f"({members[0].why_none}); name one with --baseline"
            )
    rows = {group.label: group for members in subtracted.values() for group in members}
    sections = _sections(subtracted, metrics, base_labels, rows)
    for folder, plan in plans.items():
        if plan.metric and not any(
            plan.metric in group.stats for group in filled if group.runs[0].path.parent == folder
        ):
            notes.append(f"the metric of the recipe of {folder}, {plan.metric}, is in none of its finished runs")
    notes += _notes_on_versions(filled)
    whole = tuple(rows[group.label] for group in filled)
    if len(sections) == 1:
        return replace(sections[0], groups=whole, runs=tuple(runs), notes=tuple(notes))
    different = {section.metric for section in sections}
    return Comparison(
        different.pop() if len(different) == 1 else metric or "",
        _listed(dict.fromkeys(section.baseline for section in sections if section.baseline)) or None,
        whole,
        tuple(runs),
        tuple(notes),
        baselines=base_labels,
        sections=tuple(sections),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is read together


def _sections(
    kinds: Mapping[_DataKind, Sequence[Group]],
    metrics: Mapping[_DataKind, str],
    baselines: frozenset[str],
    rows: Mapping[str, Group],
) -> list[Comparison]:
    """One comparison for each domain and data set; a baseline that another domain lends stands first."""
    sections = []
    lent: set[str] = set()
    for kind, members in kinds.items():
        own = {group.label for group in members}
        borrowed = dict.fromkeys(
            group.difference.baseline
            for group in members
            if group.difference is not None and group.difference.baseline not in own
        )
        lent |= set(borrowed)
        groups = (*(rows[label] for label in borrowed), *members)
        stages = dict.fromkeys(group.stage for group in groups if group.label in baselines)
        sections.append(
            Comparison(
                metrics[kind],
                _listed(stages) or None,
                groups,
                tuple(run for group in groups for run in group.runs),
                title=_title(kind, kinds),
                baselines=baselines & {group.label for group in groups},
            )
        )
    # Rows that only serve another section need none of their own.
    kept = [
        section
        for section, members in zip(sections, kinds.values(), strict=True)
        if not {group.label for group in members} <= lent
    ]
    kept.sort(key=lambda section: not section.baselines)  # what has nothing to be compared with is read last
    return kept or [Comparison("", None, (), ())]


def _title(kind: _DataKind, kinds: Iterable[_DataKind]) -> str:
    domain, (named, *values) = kind
    short = named.rpartition(".")[2].removesuffix("DataModule")
    alike = sum(other[0] == domain and other[1][0] == named for other in kinds)
    if alike > 1 and values:
        short += f" ({_listed(values)})"
    return " · ".join(word for word in (domain, short) if word)


def _telling_metric(groups: Sequence[Group], plans: Mapping[Path, Plan]) -> str:
    """The metric that most rows name and have."""
    named: Counter[str] = Counter()
    for group in groups:
        words = (plans[group.runs[0].path.parent].metric, group.runs[0].metric)
        named.update([name for name in words if name in group.stats][:1])
    if named:
        return named.most_common(1)[0][0]
    known = Counter(key for group in groups for key in group.stats)
    keys = [f"{split}/{word}" for split in ("test", "val") for word in _TELLING]
    keys += sorted(key for key in known if key.startswith(("test/", "val/")))
    return max((key for key in keys if key in known), key=lambda key: known[key] > len(groups) / 2, default="test/acc")


def _baselines(
    kinds: Mapping[_DataKind, Sequence[Group]], wanted: Sequence[str], plans: Mapping[Path, Plan]
) -> dict[_DataKind, list[Group]]:
    """The rows to compare with, for each domain and data set that has any: those asked for, else the default ones."""
    groups = [group for members in kinds.values() for group in members]
    answers = {
        group.label: {
            group.label,
            group.stage,
            f"{group.runs[0].experiment}/{group.stage}",
            f"{group.domain}/{group.stage}",
        }
        for group in groups
    }
    for name in wanted:
        if groups and not any(name in words for words in answers.values()):
            known = sorted({group.stage for group in groups} | answers.keys())
            raise UsageError(f"baseline {name!r} is no stage here; there are {_listed(_nearest(name, known))}")
    found = {}
    named_data = {
        kind[1] for kind, members in kinds.items() for group in members if not answers[group.label].isdisjoint(wanted)
    }
    for kind, members in kinds.items():
        if kind[1] in named_data:
            own = [group for group in members if not answers[group.label].isdisjoint(wanted)]
        else:
            own = [
                group
                for group in members
                if group.stage in (plans[group.runs[0].path.parent].baselines or (DEFAULT_BASELINE,))
            ]
        if own:
            found[kind] = own
    return found


def _subtracted(
    kind: _DataKind,
    members: Sequence[Group],
    bases: Mapping[_DataKind, Sequence[Group]],
    telling: Mapping[_DataKind, str],
    metric: str,
    notes: list[str],
) -> list[Group]:
    """The rows of one domain and data set with their differences; what should be known of them is added to `notes`.

    A domain that has no baseline of its own borrows one of another with the same data, if both are told by one metric:
    the accuracy of a classifier is not that of generated images.
    """
    near = bases.get(kind) or [
        base
        for other, of_kind in bases.items()
        if other[1] == kind[1] and telling[other] == telling[kind]
        for base in of_kind
    ]
    elsewhere = [base for of_kind in bases.values() for base in of_kind]
    if not elsewhere:
        return list(members)
    own = {base.label for base in near}
    rows = []
    for group in members:
        if group.label in own:
            rows.append(group)
            continue
        if not near:
            why = other_data(group, elsewhere[0], {g.label: data_settings(g.config) for g in (group, elsewhere[0])})
            why = why or f"{elsewhere[0].label} is of another domain, and told by another metric"
            rows.append(replace(group, why_none=why))
            continue
        group = _against(group, near, metric)
        if group.why_none:
            notes.append(f"{group.label} has no difference: {group.why_none}")
        elif group.difference is not None and not group.difference.fair:
            notes.append(
                f"{group.label} trains another student than {group.difference.baseline}: "
                "its difference mixes size with method"
            )
        rows.append(group)
    return rows


def _against(group: Group, bases: Sequence[Group], metric: str) -> Group:
    """The group with its difference to the fitting baseline, or with the reason why there is none."""
    settings = {row.label: data_settings(row.config) for row in (group, *bases)}
    reasons = {base.label: other_data(group, base, settings) for base in bases}
    fitting = [base for base in bases if not reasons[base.label]]
    if not fitting:
        return replace(group, why_none=next(iter(reasons.values())))
    # The nearest baseline: same experiment first, then same domain, then same student.
    nearness = [
        (
            base.runs[0].path.parent == group.runs[0].path.parent,
            base.domain == group.domain,
            base.student == group.student,
        )
        for base in fitting
    ]
    nearest = [base for base, near in zip(fitting, nearness, strict=True) if near == max(nearness)]
    if len(nearest) > 1:
        names = _listed(base.label for base in nearest)
        return replace(group, why_none=f"{len(nearest)} rows could be its baseline ({names}); name one with --baseline")
    base = nearest[0]
    values, others = group.values(metric), base.values(metric)
    difference = paired_difference(values, others, base.label, fair=base.student == group.student)
    if difference is None:
        n = len(values.keys() & others.keys())
        return replace(
            group, why_none=f"{n or 'no'} seed{'s' if n != 1 else ''} with {metric} in common with {base.label}"
        )
    return replace(group, difference=difference)


def _with_stats(group: Group, metric: str | None, notes: list[str]) -> Group:
    """The group with statistics of every figure; values that have diverged are left out, and told in `notes`."""
    columns: dict[str, list[float]] = defaultdict(list)
    for run in group.runs:
        for key, value in run.figures().items():
            if abs(value) < LARGEST:
                columns[key].append(value)
            elif key == metric or (metric is None and key.startswith("test/")):
                notes.append(f"{run.path}: {key} is {value:g}, left out of the mean")
    return replace(group, stats={key: stat(values) for key, values in columns.items()})


def _notes_on_versions(groups: Iterable[Group]) -> list[str]:
    """Rows whose runs were made by different versions of this package: averaged, but told."""
    notes = []
    for group in groups:
        versions = dict.fromkeys(
            str(((run.summary or {}).get("versions") or {}).get("lit_distill")) for run in group.runs
        )
        if len(versions) > 1:
            notes.append(f"{group.label} averages runs of different versions of lit_distill ({_listed(versions)})")
    return notes


def _check_metric(metric: str, known: set[str]) -> None:
    if known and metric not in known:
        raise UsageError(
            f"metric {metric!r} is in no finished run; nearest are {_listed(_nearest(metric, sorted(known)))}"
        )


def _nearest(word: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(word, known, n=5, cutoff=0.4) or list(known[:8])


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def compare(
    dirs: list[str],
    metric: str | None = None,
    baseline: str | Sequence[str] | None = None,
    html: str | None = None,
    json: str | None = None,
    markdown: str | None = None,
    csv: str | None = None,
    latex: str | None = None,
    wandb: str | None = None,
) -> int:
    """Compares the runs below the given folders: a table in the terminal, and files where asked for.

    Args:
        dirs: Folders that hold runs, at any depth.
        metric: The figure in which differences are taken; by default that of a sweep, or what the runs themselves name.
        baseline: Stages or rows to compare with; by default their recipe's, or the stage named `baseline`.
        html: Where to write the dashboard, one self-contained page.
        json: Where to write the numbers.
        markdown: Where to write the table as Markdown.
        csv: Where to write the numbers as CSV.
        latex: Where to write the table as LaTeX.
        wandb: ENTITY/PROJECT at W&B, whose runs are compared too, and which gets a report.

    Returns:
        Exit status 0.

    Raises:
        UsageError: No run is there, or metric or baseline are unknown.
    """
    from lit_distill.experiment import formats, tables

    left_out: list[str] = []
    if wandb is not None:
        from lit_distill.experiment.wandb_runs import mirror

        place, left_out = mirror(wandb)
        dirs = [*dirs, str(place)]
    elif not dirs:
        raise UsageError(
            "compare: no DIR is named; give folders that hold runs, or --wandb ENTITY/PROJECT; "
            "`lit-distill compare --help` explains"
        )
    runs = find_runs(dirs)
    if not runs:
        raise UsageError(f"no runs under {_listed(map(str, dirs))}; a run is a folder with config.yaml or summary.json")
    from lit_distill.experiment.sweep.figures import sweep_figures, sweep_metric

    comparison = compare_runs(runs, metric or sweep_metric(runs), baseline)
    sweep, notes = sweep_figures(comparison)
    comparison = replace(comparison, notes=(*comparison.notes, *notes, *left_out))
    tables.print_comparison(comparison)
    if json is not None:
        write_json(json, formats.as_dict(comparison))
    for path, form in ((markdown, formats.markdown), (csv, formats.csv_text), (latex, formats.latex)):
        if path is not None:
            write_text(path, formats.encodable(form(comparison)))
    if html is not None:
        from lit_distill.experiment.dashboard import write_dashboard

        write_dashboard(comparison, html, sweep)
        print(f"dashboard: {html}")
    if wandb is not None:
        from lit_distill.experiment.wandb_report import write_report

        print(f"report: {write_report(comparison, wandb, formats.markdown(comparison))}")
    return 0


__all__ = [
    "Comparison",
    "Difference",
    "Group",
    "Stat",
    "compare",
    "compare_runs",
    "config_without_seed",
    "group_runs",
    "paired_difference",
    "stat",
]
