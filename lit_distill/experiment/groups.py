"""Which runs are alike and may be averaged, and which rows have the same data and may be subtracted."""

import functools
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lit_distill.experiment.runs import Run
from lit_distill.experiment.stats import Difference, Stat

LARGEST = 1e100  # a value beyond has diverged, though it may be finite; its square is not


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
    def domain(self) -> str:
        """The domain, empty for a method outside the package."""
        return self.runs[0].domain

    @property
    def student(self) -> tuple[str, Any]:
        """Class path and parameter count of the student."""
        return self.network("student")

    def network(self, role: str) -> tuple[str, Any]:
        """Class path and parameter count of the network with this role; empty and None where there is none."""
        network = self.runs[0].networks.get(role, {})
        return network.get("class_path", ""), network.get("params")

    def values(self, key: str) -> dict[int, float]:
        """Seed -> value of one figure, where it is there and has not diverged."""
        figures = ((run.seed, run.figures().get(key)) for run in self.runs)
        return {seed: value for seed, value in figures if value is not None and abs(value) < LARGEST}


# The section that names the run, and lines with a comment, a seed, a place, or how the run is watched.
_RUN_SECTION = re.compile(r"^run:.*\n?(?:(?:[ \t#].*)?\n)*(?:[ \t].*)?", re.M)
_IGNORED_LINES = re.compile(
    r"^[ \t]*(?:#|(?:- )?(?:seed|seed_everything|default_root_dir|save_dir|dirpath|ckpt_path|weights_only"
    r"|enable_progress_bar|enable_model_summary|log_every_n_steps):).*\n?",
    re.M,
)


def config_without_seed(run: Run) -> tuple[str, ...]:
    """The lines of a run's configuration that may not differ between runs which are averaged.

    Left out are the seed, where things are written and how the run is watched, and the section `run`, which names it;
    the run's own name and the seed of a run folder inside a path (`teacher-s3/student`) are blanked. So is
    what is null left out, for it is as good as an option that an earlier version did not have. Works on the text, since
    parsing a thousand YAML files takes seconds; one writer wrote them all, so like configurations read alike.
    """
    text = _RUN_SECTION.sub("", run.config_text())
    if run.name in text:  # rarely: expressions made for each of a thousand runs take a second
        text = re.sub(rf"(?<![\w.-]){re.escape(run.name)}(?![\w.-])", "*", text)
    if "-s" in text:
        folder, end = _seeds_in_paths(run.path.parent.name)
        text = end.sub(r"\1*", folder.sub(r"\1*", text))
    lines = _IGNORED_LINES.sub("", text).splitlines()
    return tuple(line for line in lines if line.strip() and not line.endswith(": null"))


@functools.cache
def _seeds_in_paths(experiment: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    name = re.escape(experiment)
    return (
        re.compile(rf"((?:\b{name}/[^/\s'\"]*|/[^/\s'\"]*)-s)\d+(?=/)"),
        re.compile(rf"(\b{name}/[^/\s'\"]*-s)\d+(?=['\"]?$)", re.M),
    )


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
    apart: dict[tuple[str, str, str], list[_Kind]] = defaultdict(list)
    for kind in kinds:
        apart[kind[:3]].append(kind)
    for (folder, _, stage), rows in apart.items():
        if len(rows) > 1:
            notes.append(
                f"{stage} in {folder} stands in {len(rows)} rows, since its runs differ by more than the seed"
                f" ({_what_differs(rows)})"
            )
    groups = [
        Group(label, tuple(run for _, run in sorted(alike[kind].items())), kind.config)
        for kind, label in zip(kinds, _labels(kinds), strict=True)
    ]
    return groups, notes


def _what_differs(kinds: Sequence[_Kind]) -> str:
    """What keeps rows of one stage apart, in words."""
    fields = [name for name in ("method", "data", "networks") if len({getattr(kind, name) for kind in kinds}) > 1]
    if fields:
        return " and ".join(fields)
    common = set.intersection(*(set(kind.config) for kind in kinds))
    keys = dict.fromkeys(_key(line) for kind in kinds for line in kind.config if line not in common)
    shown = list(keys)[:4]
    return ", ".join(shown) + (f" and {len(keys) - 4} more settings" if len(keys) > 4 else "")


def _key(line: str) -> str:
    """The setting that a line of a configuration sets; the line itself, cut short, where it is a part of a list."""
    key, colon, _ = line.strip().removeprefix("- ").partition(":")
    return key if colon else key[:40]


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


# Settings of a data module that say how it is read, not what: methods may differ in them and still be compared.
_READING_LINE = re.compile(
    r"\s*(?:- )?(?:\w*batch_size|num_workers|pin_memory|persistent_workers|prefetch_factor|augment\w*):"
)
_SOURCE_LINE = re.compile(r"( +)source:$")  # an argument of the data module, or of one that it is given
_ROOT_LINE = re.compile(r"(\s*root:) *['\"]?(.*?)['\"]?$")


def other_data(group: Group, base: Group, settings: Mapping[str, Sequence[str]]) -> str:
    """Why the two rows were not trained and tested on the same data, empty if they were."""
    mine, theirs = settings[group.label], settings[base.label]
    if mine == theirs:
        return ""
    if mine[:1] != theirs[:1]:  # the class path
        return f"its data are {group.data}, those of {base.label} are {base.data}"
    ours = [line.strip() for line in mine if line not in theirs] or ["no such setting"]
    others = [line.strip() for line in theirs if line not in mine] or ["no such setting"]
    return f"its data have {', '.join(ours[:3])}, those of {base.label} have {', '.join(others[:3])}"


@functools.cache  # rows of one experiment mostly share a configuration of the data, and sweeps have many rows
def _settings_of(section: tuple[str, ...]) -> tuple[str, ...]:
    settings = []
    for line in section:
        if not _READING_LINE.match(line):
            root = _ROOT_LINE.match(line)  # where the folder lies differs by machine, its name says what it is
            settings.append(f"{root[1]} {Path(root[2]).name}" if root else line)
    return _of_source(tuple(settings))


def data_settings(config: Sequence[str]) -> tuple[str, ...]:
    """The lines of a configuration that say which data these are."""
    start = next((number for number, line in enumerate(config, 1) if line.startswith("data:")), len(config))
    inside = itertools.takewhile(lambda line: line[0].isspace() or line[0] == "-", config[start:])
    return _settings_of(tuple(inside))


def _of_source(settings: tuple[str, ...]) -> tuple[str, ...]:
    """The settings of the data that distilled ones were made from and are tested on, where there is such a source."""
    matches = ((number, _SOURCE_LINE.match(line)) for number, line in enumerate(settings, 1))
    start, found = next(((number, match) for number, match in matches if match), (0, None))
    if found is None:
        return settings
    indent = found[1]
    inside = itertools.takewhile(lambda line: line.startswith(f"{indent}  "), settings[start:])
    return tuple(line[len(indent) :] for line in inside)


_CLASS_LINE = re.compile(r"\s*class_path: *(\S+)")
_NAMING_LINE = re.compile(
    r"\s*(?:root|name|file|files|path|dataset|subset|language|task|tasks): *['\"]?(?!null)(\S.*?)['\"]?$"
)


def data_name(group: Group) -> tuple[str, ...]:
    """What data these are: the class of the module, or of the one it was made from, and the settings that name data.

    Rows with one name are read in one table. Whether they may be subtracted is decided by all settings.
    """
    settings = data_settings(group.config)
    named = next((match[1] for line in settings if (match := _CLASS_LINE.match(line))), group.data)
    return named, *(match[1] for line in settings if (match := _NAMING_LINE.match(line)))
