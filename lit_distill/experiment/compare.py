"""Comparing runs: which may be averaged, how large the differences are, and how sure that is.

Runs are averaged when they differ by their seed alone. A difference to the baseline is taken seed by seed, because
runs with one seed share data order and initialisation, and the spread between seeds is often larger than the gain.
"""

import difflib
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from lit_distill.core.errors import UsageError
from lit_distill.core.files import write_json, write_text
from lit_distill.experiment.runs import Run, find_runs

DEFAULT_BASELINE = "baseline"
MOST_SENTENCES = 8  # more rows than this are read in the table


@dataclass(frozen=True)
class Stat:
    """Mean over seeds, standard deviation (n − 1 in the denominator; None for one seed), number of seeds."""

    mean: float
    sd: float | None
    n: int

    @property
    def se(self) -> float | None:
        """Standard error of the mean, None for one seed."""
        return None if self.sd is None else self.sd / math.sqrt(self.n)


@dataclass(frozen=True)
class Difference:
    """Paired difference to the baseline over the common seeds, with its 95 % interval by Student's t.

    Attributes:
        baseline: Label of the row that was subtracted.
        per_seed: Seed -> difference.
        mean: Mean difference.
        se: Standard error of the mean difference.
        low: Lower end of the interval.
        high: Upper end of the interval.
        fair: Whether both rows train the same student; otherwise the difference mixes size with method.
    """

    baseline: str
    per_seed: Mapping[int, float]
    mean: float
    se: float
    low: float
    high: float
    fair: bool = True

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.per_seed)

    @property
    def clear(self) -> bool:
        """Whether the difference exceeds two standard errors."""
        return abs(self.mean) > 2 * self.se


@dataclass(frozen=True)
class Group:
    """Runs that differ by seed alone: one row of the comparison.

    Attributes:
        label: Short name, unique within the comparison.
        runs: One run for each seed, in the order of seeds.
        config: The lines of the configuration in which all runs agree (see `config_without_seed`).
        stats: Statistics of every figure (see `Run.figures`).
        difference: Difference to the baseline in the chosen metric, if there is one.
        why_none: Why there is no difference, in words.
    """

    label: str
    runs: tuple[Run, ...]
    config: tuple[str, ...] = ()
    stats: Mapping[str, Stat] = field(default_factory=dict)
    difference: Difference | None = None
    why_none: str = ""

    @property
    def stage(self) -> str:
        """Stage of the recipe."""
        return self.runs[0].stage

    @property
    def method(self) -> str:
        """Class path of the method."""
        return self.runs[0].method

    @property
    def data(self) -> str:
        """Class path of the data module."""
        return self.runs[0].data

    @property
    def student(self) -> tuple[str, Any]:
        """Class path and parameter count of the student."""
        student = self.runs[0].networks.get("student", {})
        return student.get("class_path", ""), student.get("params")

    def values(self, key: str) -> dict[int, float]:
        """Seed -> value of one figure, where it is there and finite."""
        figures = ((run.seed, run.figures().get(key)) for run in self.runs)
        return {seed: value for seed, value in figures if value is not None and math.isfinite(value)}


@dataclass(frozen=True)
class Comparison:
    """What was compared, and how it came out.

    Attributes:
        metric: The metric of the differences, such as `test/acc`.
        baseline: The stage or row that was asked for as the baseline, None if there is none.
        groups: The rows, in the order in which their first runs were started.
        runs: Every run found, unfinished and broken ones included.
        notes: What the reader should know: rows kept apart, values left out.
    """

    metric: str
    baseline: str | None
    groups: tuple[Group, ...]
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()

    def is_baseline(self, group: Group) -> bool:
        """Whether the row is (one of) the baseline's."""
        return self.baseline is not None and self.baseline in (group.stage, group.label)


# ---------------------------------------------------------------------------------------------------------------------
# Which runs are alike


_SEED_LINE = re.compile(r"\s*(?:- )?(?:seed|seed_everything):")
_COMFORT_LINE = re.compile(
    r"\s*(?:- )?(?:default_root_dir|save_dir|dirpath|ckpt_path|weights_only"
    r"|enable_progress_bar|enable_model_summary|log_every_n_steps):"
)


def config_without_seed(run: Run) -> tuple[str, ...]:
    """The lines of a run's configuration that may not differ between runs which are averaged.

    Left out are the seed, where things are written and how the run is watched, and the section `run`, which names it;
    the run's own name and the seed of a run folder inside a path (`teacher-s3/student`) are blanked. Works on the text,
    since parsing a thousand YAML files takes seconds; one writer wrote them all, so like configurations read alike.
    """
    name, experiment = re.escape(run.name), re.escape(run.path.parent.name)
    text = re.sub(rf"(?<![\w.-]){name}(?![\w.-])", "*", run.config_text())
    text = re.sub(rf"((?:\b{experiment}/[^/\s'\"]*|/[^/\s'\"]*)-s)\d+(?=/)", r"\1*", text)
    text = re.sub(rf"(\b{experiment}/[^/\s'\"]*-s)\d+(?=['\"]?$)", r"\1*", text, flags=re.M)
    lines = []
    section = ""
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not line[0].isspace() and line[0] != "-":
            section = line.partition(":")[0]
        if section != "run" and not _SEED_LINE.match(line) and not _COMFORT_LINE.match(line):
            lines.append(line)
    return tuple(lines)


class _Kind(NamedTuple):
    """What runs that may be averaged have in common."""

    folder: str
    experiment: str
    stage: str
    method: str
    data: str
    networks: tuple[tuple[str, str, str], ...]
    config: tuple[str, ...]


def _kind(run: Run) -> _Kind:
    networks = sorted((role, net["class_path"], str(net.get("params"))) for role, net in run.networks.items())
    config = config_without_seed(run) or (f"run: {run.path}",)  # without a configuration a run is like no other
    return _Kind(str(run.path.parent), run.experiment, run.stage, run.method, run.data, tuple(networks), config)


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """Puts finished runs that differ by seed alone into groups.

    Runs are alike when experiment folder, stage, method, data, networks (class and parameter count) and the rest of
    the configuration agree. Of two runs that agree in the seed too, the one finished last counts.

    Returns:
        The groups in the order of their first start, and notes on what was kept apart or set aside.
    """
    notes: list[str] = []
    alike: dict[_Kind, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        if not run.finished:
            continue
        same = alike[_kind(run)]
        if run.seed in same:
            older, run = sorted((same[run.seed], run), key=_finish)
            notes.append(f"{older.path} has the seed and configuration of {run.path}, which finished later and counts")
        same[run.seed] = run

    kinds = sorted(alike, key=lambda kind: (min(run.started for run in alike[kind].values()), kind))
    for (folder, _, stage), rows in Counter(kind[:3] for kind in kinds).items():
        if rows > 1:
            notes.append(f"{stage} in {folder} stands in {rows} rows, since its runs differ by more than the seed")
    groups = [
        Group(label, tuple(run for _, run in sorted(alike[kind].items())), kind.config)
        for kind, label in zip(kinds, _labels(kinds), strict=True)
    ]
    return groups, notes


def _finish(run: Run) -> str:
    return str((run.summary or {}).get("finished") or "")


def _labels(kinds: Sequence[_Kind]) -> list[str]:
    """A unique label for each kind: the stage, with experiment and distinguishing settings where they are needed."""
    experiments = {(kind.folder, kind.experiment) for kind in kinds}
    folders = Counter(experiment for _, experiment in experiments)
    siblings: dict[tuple[str, ...], list[set[str]]] = defaultdict(list)
    for kind in kinds:
        siblings[kind[:3]].append(set(kind.config))
    common = {stage: set.intersection(*configs) for stage, configs in siblings.items()}
    labels = []
    for kind in kinds:
        where = kind.experiment if folders[kind.experiment] == 1 else kind.folder
        label = kind.stage if len(experiments) == 1 else f"{where}/{kind.stage}"
        if own := [line.strip().removeprefix("- ") for line in kind.config if line not in common[kind[:3]]]:
            label += f" ({', '.join(own[:3])})"
        labels.append(label)
    times = Counter(labels)
    numbers: Counter[str] = Counter()
    for index, label in enumerate(labels):
        if times[label] > 1:
            numbers[label] += 1
            labels[index] = f"{label} #{numbers[label]}"
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def stat(values: Iterable[float]) -> Stat:
    """Mean and standard deviation (n − 1) of at least one value."""
    values = list(values)
    n = len(values)
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return Stat(mean, sd, n)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], label: str, fair: bool = True
) -> Difference | None:
    """Difference of two rows over their common seeds.

    Args:
        values: Seed -> value of the row.
        baseline: Seed -> value of the baseline.
        label: The baseline's label.
        fair: Passed on.

    Returns:
        The difference, or None if fewer than two seeds are common, since one pair has no spread.
    """
    from scipy.special import stdtrit  # Student's t alone: scipy.stats takes most of a second to import

    common = sorted(values.keys() & baseline.keys())
    if len(common) < 2:
        return None
    per_seed = {seed: values[seed] - baseline[seed] for seed in common}
    over_seeds = stat(per_seed.values())
    mean, se = over_seeds.mean, over_seeds.se or 0.0
    reach = float(stdtrit(len(common) - 1, 0.975)) * se
    return Difference(label, per_seed, mean, se, mean - reach, mean + reach, fair)


def compare_runs(runs: Sequence[Run], metric: str = "test/acc", baseline: str | None = None) -> Comparison:
    """Groups runs and sets each group against the baseline.

    Args:
        runs: All runs, in any state.
        metric: The figure in which differences are taken.
        baseline: Stage or row label to compare with. None takes the stage named `baseline` if there is one.

    Raises:
        UsageError: No finished run has this metric, or no row has this baseline's name.
    """
    groups, notes = group_runs(runs)
    figures = {run.path: run.figures() for group in groups for run in group.runs}
    _check_metric(metric, {key for numbers in figures.values() for key in numbers})

    filled = []
    for group in groups:
        columns: dict[str, list[float]] = defaultdict(list)
        for run in group.runs:
            for key, value in figures[run.path].items():
                if math.isfinite(value):
                    columns[key].append(value)
                elif key == metric:
                    notes.append(f"{run.path}: {key} is {value}, left out of the mean")
        filled.append(replace(group, stats={key: stat(values) for key, values in columns.items()}))

    if baseline is None and any(group.stage == DEFAULT_BASELINE for group in filled):
        baseline = DEFAULT_BASELINE
    comparison = Comparison(metric, baseline, tuple(filled), tuple(runs), tuple(notes))
    if baseline is None:
        return comparison
    bases = [group for group in filled if comparison.is_baseline(group)]
    if filled and not bases:
        names = sorted({group.stage for group in filled} | {group.label for group in filled})
        raise UsageError(f"baseline {baseline!r} is no stage here; there are {_listed(_nearest(baseline, names))}")
    settings = {group.label: _data_settings(group.config) for group in filled}
    rows, more_notes = [], []
    for group in filled:
        row = group if comparison.is_baseline(group) else _against(group, bases, settings, metric)
        rows.append(row)
        if row.why_none:
            more_notes.append(f"{row.label} has no difference: {row.why_none}")
        elif row.difference is not None and not row.difference.fair:
            more_notes.append(
                f"{row.label} trains another student than {row.difference.baseline}: "
                "its difference mixes size with method"
            )
    return replace(comparison, groups=tuple(rows), notes=(*notes, *more_notes))


def _against(group: Group, bases: Sequence[Group], settings: Mapping[str, Sequence[str]], metric: str) -> Group:
    """The group with its difference to the fitting baseline, or with the reason why there is none."""
    reasons = {base.label: _other_data(group, base, settings) for base in bases}
    fitting = [base for base in bases if not reasons[base.label]]
    if not fitting:
        return replace(group, why_none=next(iter(reasons.values())))
    # The nearest baseline: same experiment first, then same student.
    nearness = [
        (base.runs[0].path.parent == group.runs[0].path.parent, base.student == group.student) for base in fitting
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


# Settings of a data module that say how it is read, not what: methods may differ in them and still be compared.
_READING_LINE = re.compile(
    r"\s*(?:- )?(?:\w*batch_size|num_workers|pin_memory|persistent_workers|prefetch_factor|augment\w*):"
)
_SOURCE_LINE = re.compile(r"( +)source:$")  # an argument of the data module, or of one that it is given
_ROOT_LINE = re.compile(r"(\s*root:) *['\"]?(.*?)['\"]?$")


def _other_data(group: Group, base: Group, settings: Mapping[str, Sequence[str]]) -> str:
    """Why the two rows were not trained and tested on the same data, empty if they were."""
    mine, theirs = settings[group.label], settings[base.label]
    if mine == theirs:
        return ""
    if mine[:1] != theirs[:1]:  # the class path
        return f"its data are {group.data}, those of {base.label} are {base.data}"
    ours = [line.strip() for line in mine if line not in theirs] or ["fewer settings"]
    others = [line.strip() for line in theirs if line not in mine] or ["fewer settings"]
    return f"its data have {_listed(ours[:3])}, those of {base.label} have {_listed(others[:3])}"


def _data_settings(config: tuple[str, ...]) -> list[str]:
    settings = []
    section = ""
    for line in config:
        if not line[0].isspace() and line[0] != "-":
            section = line.partition(":")[0]
        elif section == "data" and not _READING_LINE.match(line):
            root = _ROOT_LINE.match(line)  # where the folder lies differs by machine, its name says what it is
            settings.append(f"{root[1]} {Path(root[2]).name}" if root else line)
    return _of_source(settings)


def _of_source(settings: list[str]) -> list[str]:
    """The settings of the data that distilled ones were made from and are tested on, where there is such a source."""
    matches = ((number, _SOURCE_LINE.match(line)) for number, line in enumerate(settings, 1))
    start, found = next(((number, match) for number, match in matches if match), (0, None))
    if found is None:
        return settings
    indent = found[1]
    inside = itertools.takewhile(lambda line: line.startswith(f"{indent}  "), settings[start:])
    return [line[len(indent) :] for line in inside]


def _check_metric(metric: str, known: set[str]) -> None:
    if known and metric not in known:
        raise UsageError(
            f"metric {metric!r} is in no finished run; nearest are {_listed(_nearest(metric, sorted(known)))}"
        )


def _nearest(word: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(word, known, n=5, cutoff=0.4) or list(known[:8])


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


def compare(
    dirs: list[str],
    metric: str = "test/acc",
    baseline: str | None = None,
    html: str | None = None,
    json: str | None = None,
    markdown: str | None = None,
    wandb: str | None = None,
) -> int:
    """Compares the runs below the given folders: a table in the terminal, and files where asked for.

    Args:
        dirs: Folders that hold runs, at any depth.
        metric: The figure in which differences are taken.
        baseline: Stage or row to compare with; by default the stage named `baseline`.
        html: Where to write the dashboard, one self-contained page.
        json: Where to write the numbers.
        markdown: Where to write the table as Markdown.
        wandb: ENTITY/PROJECT at W&B, whose runs are compared too, and which gets a report.

    Returns:
        Exit status 0.

    Raises:
        UsageError: No run is there, or metric or baseline are unknown.
    """
    from rich.console import Console
    from rich.text import Text

    from lit_distill.experiment import tables

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
    comparison = compare_runs(runs, metric, baseline)

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; wrapped cells would be hard to read by eye and by grep
    if comparison.groups:
        console.print(tables.terminal_table(comparison))
    told = tables.sentences(comparison)
    for line in told[:MOST_SENTENCES]:
        console.print(Text(line, style="bold"), soft_wrap=True)
    if len(told) > MOST_SENTENCES:
        console.print(Text(f"and {len(told) - MOST_SENTENCES} more in the table"))
    for note in (*comparison.notes, *left_out):
        console.print(Text(f"note: {note}"), soft_wrap=True)
    for run in runs:
        if not run.finished:
            console.print(Text(f"{run.path}: {run.status}"), soft_wrap=True)
    if json is not None:
        write_json(json, tables.as_dict(comparison))
    if markdown is not None:
        write_text(markdown, tables.markdown_table(comparison))
    if html is not None:
        from lit_distill.experiment.dashboard import write_dashboard

        write_dashboard(comparison, html)
        console.print(Text(f"dashboard: {html}"), soft_wrap=True)
    if wandb is not None:
        from lit_distill.experiment.wandb_report import write_report

        report = write_report(comparison, wandb, tables.markdown_table(comparison))
        console.print(Text(f"report: {report}"), soft_wrap=True)
    return 0
