"""Comparing runs: which rows are read together, and by which metric.

Runs are averaged when they differ by their seed alone (`groups`), and set against a baseline seed by seed
(`baselines`). Rows of one domain and one data set are read together, by the metric that tells most about them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lit_distill.core.errors import UsageError
from lit_distill.experiment.baselines import DataKind, find_baselines, with_differences
from lit_distill.experiment.groups import LARGEST, Group, data_name, group_runs
from lit_distill.experiment.runs import Plan, Run, read_plan
from lit_distill.experiment.stats import stat
from lit_distill.experiment.words import nearest

# What tells most about a run whose summary and recipe do not say it, as those of earlier versions: the first of these
# that was measured. A model that has a distance of distributions or a perplexity was made for that.
_TELLING = ("fd", "fid", "mmd", "perplexity", "auroc", "acc", "kl", "nll", "loss")


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
    kinds: dict[DataKind, list[Group]] = defaultdict(list)
    for group in filled:
        kinds[group.domain, data_name(group)].append(group)
    telling = {kind: _telling_metric(rows, plans) for kind, rows in kinds.items()}
    metrics = {kind: metric or telling[kind] for kind in kinds}
    bases = find_baselines(kinds, [baseline] if isinstance(baseline, str) else baseline or (), plans)
    base_labels = frozenset(group.label for of_kind in bases.values() for group in of_kind)
    subtracted = {
        kind: with_differences(kind, members, bases, telling, metrics[kind], notes) for kind, members in kinds.items()
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
        ", ".join(dict.fromkeys(section.baseline for section in sections if section.baseline)) or None,
        whole,
        tuple(runs),
        tuple(notes),
        baselines=base_labels,
        sections=tuple(sections),
    )


def _sections(
    kinds: Mapping[DataKind, Sequence[Group]],
    metrics: Mapping[DataKind, str],
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
                ", ".join(stages) or None,
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


def _title(kind: DataKind, kinds: Iterable[DataKind]) -> str:
    domain, (named, *values) = kind
    short = named.rpartition(".")[2].removesuffix("DataModule")
    alike = sum(other[0] == domain and other[1][0] == named for other in kinds)
    if alike > 1 and values:
        short += f" ({', '.join(values)})"
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
            notes.append(f"{group.label} averages runs of different versions of lit_distill ({', '.join(versions)})")
    return notes


def _check_metric(metric: str, known: set[str]) -> None:
    if known and metric not in known:
        raise UsageError(
            f"metric {metric!r} is in no finished run; nearest are {', '.join(nearest(metric, sorted(known)))}"
        )
