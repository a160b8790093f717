"""What a figure of the page is, and what all figures share: how rows look, how axes and labels read."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_distill.experiment.comparison import Comparison
from lit_distill.experiment.groups import Group
from lit_distill.experiment.tables import short_labels, shortened
from lit_distill.experiment.words import is_percent, lower_is_better, metric_name

Spec = dict[str, Any]

MOST_DRAWN = 24  # more rows than this cannot be told apart in a plot

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
_DASHES = ("solid", "dash", "dashdot", "longdash", "longdashdot")  # "dot" is the baseline's
_COLOURS = 7


@dataclass(frozen=True)
class Look:
    """How a row is drawn and called, the same in every figure of a section: colour name, marker, dash, name."""

    colour: str
    symbol: str
    dash: str
    name: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure of the page, with what a reader who cannot see it needs.

    Attributes:
        id: Identifier, unique on the page.
        title: Heading.
        caption: What is drawn and how to read it.
        summary: The content in a sentence, for screen readers.
        specs: Name -> Plotly specification; with several, the page offers a choice.
        head: Column names of the numbers behind the figure.
        rows: The numbers behind the figure, as text.
        height: Height in pixels.
        image: A picture as a `data:` address, in place of specifications.
        row: The row that the figure is about, if it is about a single one.
        kind: The kind of panel, for panels; of other figures a name for the style sheet.
        choice: What the names of the specifications are.
    """

    id: str
    title: str
    caption: str
    summary: str
    specs: Mapping[str, Spec]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    height: int = 340
    image: str = ""
    row: str = ""
    kind: str = ""
    choice: str = "metric"


def drawn_groups(comparison: Comparison) -> list[Group]:
    """The rows that figures show: all if they are few, else the baseline and the best in the metric."""
    return shortened(comparison, MOST_DRAWN)


def looks_of(comparison: Comparison) -> dict[str, Look]:
    """The baseline is neutral, other rows take colours in turn; markers and dashes differ too, for print."""
    looks = {}
    names = short_labels(comparison)
    coloured = 0
    for group in comparison.groups:
        if comparison.is_baseline(group):
            looks[group.label] = Look("neutral", "circle", "dot", names[group.label])
            continue
        coloured += 1
        looks[group.label] = Look(
            f"c{(coloured - 1) % _COLOURS + 1}",
            _SYMBOLS[coloured % len(_SYMBOLS)],
            _DASHES[(coloured - 1) % len(_DASHES)],
            names[group.label],
        )
    return looks


def axis_title(metric: str) -> str:
    """Title of an axis: the metric in words, its unit, and an arrow where low is good."""
    return metric_name(metric) + (" in %" if is_percent(metric) else "") + (" ↓" if lower_is_better(metric) else "")


def plain(text: str) -> str:
    """Text for Plotly, which reads a few HTML tags and `%{...}`; neither may come from a name."""
    return html.escape(text).replace("%{", "% {")


def axis_label(label: str, longest: int = 22) -> str:
    """The label for an axis: stage and distinguishing settings on a line each, cut to fit a phone."""
    stage, _, settings = label.partition(" (")
    lines = [line for line in (stage, settings.removesuffix(")")) if line]
    return "<br>".join(plain(line if len(line) <= longest else line[: longest - 1] + "…") for line in lines)


def clean(value: Any) -> Any:
    """The value for JSON: floats with six digits, None for what JSON cannot write."""
    kind = type(value)
    if kind is float:
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if kind is str or kind is int:
        return value
    if isinstance(value, Mapping):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return clean(float(value)) if isinstance(value, float) else value
