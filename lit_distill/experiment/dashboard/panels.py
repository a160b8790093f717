"""Panels: what a summary holds beyond numbers. A new kind is a function and a line in PANELS."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lit_distill.experiment.dashboard.figure import Figure, Look, Spec
from lit_distill.experiment.groups import Group
from lit_distill.experiment.words import show

PICTURE_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
LARGEST_PICTURE = 2_000_000  # bytes; the page holds it
MOST_PICTURES = 16_000_000  # bytes of all of them in the page's text
LONGEST_TEXT = 4000  # characters of one generated text


def reliability_panel(group: Group, panels: Sequence[Any], look: Look) -> Figure:
    """Reliability diagram, pooled over seeds: accuracy in each bin of confidence, above the share of samples in it."""
    import numpy as np

    confidence, accuracy, count = (
        np.array([panel[key] for panel in panels], float) for key in ("confidence", "accuracy", "count")
    )
    if not (confidence.shape == accuracy.shape == count.shape) or confidence.ndim != 2 or not count.sum() > 0:
        raise ValueError("bins of unequal number, or empty")
    confidence, accuracy = np.where(count > 0, confidence, 0), np.where(count > 0, accuracy, 0)
    gap = np.abs(confidence - accuracy)
    ece = ((count * gap).sum(axis=1) / count.sum(axis=1)).mean()
    total = count.sum(axis=0)
    weight = np.maximum(total, 1)
    mean_accuracy = [
        float(a) if n else None for a, n in zip((count * accuracy).sum(axis=0) / weight, total, strict=True)
    ]
    mean_confidence = (count * confidence).sum(axis=0) / weight
    share = (100 * total / total.sum()).tolist()
    bins = len(total)
    centres = [(i + 0.5) / bins for i in range(bins)]
    counts = [f"{n:,.0f}" for n in total]
    width = 0.9 / bins
    data: list[Spec] = [
        {
            "type": "bar",
            "x": centres,
            "y": mean_accuracy,
            "width": width,
            "marker": {"color": f"@{look.colour}/0.75"},
            "customdata": counts,
            "hovertemplate": "confidence %{x:.2f}: accuracy %{y:.3f}, %{customdata} samples<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "x": [0, 1],
            "y": [0, 1],
            "line": {"color": "@ink", "width": 1.5, "dash": "dash"},
            "hoverinfo": "skip",
        },
        {
            "type": "bar",
            "x": centres,
            "y": share,
            "width": width,
            "yaxis": "y2",
            "marker": {"color": "@muted/0.6"},
            "customdata": counts,
            "hovertemplate": "confidence %{x:.2f}: %{customdata} samples, %{y:.1f} %<extra></extra>",
        },
    ]
    layout = {
        "xaxis": {"title": {"text": "confidence"}, "range": [0, 1], "dtick": 0.25, "anchor": "y2"},
        "yaxis": {"title": {"text": "accuracy"}, "range": [0, 1], "dtick": 0.25, "domain": [0.34, 1]},
        "yaxis2": {"title": {"text": "% samples"}, "domain": [0, 0.24], "rangemode": "tozero", "nticks": 3},
        "bargap": 0,
    }
    stat = group.stats.get("test/ece")
    shown = show("test/ece", stat) if stat is not None else f"{100 * ece:.1f}"
    return Figure(
        "",
        f"{look.name or group.label}: ECE {shown} %",
        f"{len(panels)} seed{'s' if len(panels) != 1 else ''}, {total.sum():,.0f} samples",
        f"Reliability diagram. Expected calibration error {shown} percent",
        {"": {"data": data, "layout": layout}},
        ("bin", "mean confidence", "accuracy", "samples"),
        [
            (f"{i / bins:.2f} to {(i + 1) / bins:.2f}", f"{mean_confidence[i]:.3f}", f"{accuracy_:.3f}", counts[i])
            for i, accuracy_ in enumerate(mean_accuracy)
            if accuracy_ is not None
        ],
        height=330,
        row=group.label,
    )


def robustness_panel(group: Group, panels: Sequence[Any], look: Look) -> Figure:
    """Accuracy under FGSM against its size, mean over seeds: attacked as it is, and with logits rescaled."""
    import numpy as np

    epsilon = [float(value) for value in panels[0]["epsilon"]]
    curves = {name: np.array([panel[name] for panel in panels], float) for name in ("fgsm", "rescaled")}
    if any([float(value) for value in panel["epsilon"]] != epsilon for panel in panels):
        raise ValueError("sizes that differ between seeds")
    if any(curve.shape != (len(panels), len(epsilon)) or not np.isfinite(curve).all() for curve in curves.values()):
        raise ValueError("curves of another length than the sizes, or not finite")
    data: list[Spec] = []
    for name, words, dash, symbol in (
        ("fgsm", "FGSM", "solid", look.symbol),
        ("rescaled", "FGSM on rescaled logits", "dot", f"{look.symbol}-open"),
    ):
        error = curves[name].std(axis=0, ddof=1) / math.sqrt(len(panels)) if len(panels) > 1 else np.zeros(len(epsilon))
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": epsilon,
                "y": curves[name].mean(axis=0).tolist(),
                "error_y": {"type": "data", "array": (2 * error).tolist(), "thickness": 1.5, "width": 4},
                "line": {"color": f"@{look.colour}", "width": 2, "dash": dash},
                "marker": {"symbol": symbol, "size": 8},
                "hovertemplate": f"{words}, size %{{x}}: accuracy %{{y:.3f}}<extra></extra>",
            }
        )
    attacked, rescaled = (curve.mean(axis=0) for curve in curves.values())
    worst = f"{100 * attacked[-1]:.1f} % at {epsilon[-1]:g}, rescaled {100 * rescaled[-1]:.1f} %"
    return Figure(
        "",
        f"{look.name or group.label}: {worst}",
        f"{len(panels)} seed{'s' if len(panels) != 1 else ''}; solid: FGSM, dotted: FGSM on rescaled logits",
        f"Accuracy under FGSM falls from {100 * attacked[0]:.1f} percent to {100 * attacked[-1]:.1f} percent at size "
        f"{epsilon[-1]:g}; with rescaled logits to {100 * rescaled[-1]:.1f} percent",
        {
            "": {
                "data": data,
                "layout": {
                    "xaxis": {
                        "title": {"text": "epsilon, of pixels in [0, 1]"},
                        "rangemode": "tozero",
                    },
                    "yaxis": {"title": {"text": "accuracy"}, "range": [-0.02, 1.02], "dtick": 0.25},
                },
            }
        },
        ("size", "accuracy under FGSM", "with rescaled logits"),
        [(f"{e:g}", f"{a:.3f}", f"{r:.3f}") for e, a, r in zip(epsilon, attacked, rescaled, strict=True)],
        height=330,
        row=group.label,
    )


def confusion_panel(group: Group, panels: Sequence[Any], look: Look) -> Figure:
    """Confusion matrix, pooled over seeds: of the samples of each label, how many percent got which decision."""
    import numpy as np

    classes = [str(name) for name in panels[0]["classes"]]
    if any([str(name) for name in panel["classes"]] != classes for panel in panels):
        raise ValueError("runs of different classes")
    counts = np.array([panel["counts"] for panel in panels], float).sum(axis=0)
    if counts.shape != (len(classes), len(classes)) or not counts.sum() > 0:
        raise ValueError("no square of counts, or an empty one")
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = np.where(np.eye(len(classes), dtype=bool), 0, counts)
    row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
    axis = {"tickvals": list(range(len(classes))), "ticktext": classes, "showgrid": False, "zeroline": False}
    spec = {
        "data": [
            {
                "type": "heatmap",
                "z": share.round(1).tolist(),
                "customdata": counts.astype(int).tolist(),
                "zmin": 0,
                "zmax": 100,
                "colorscale": [[0, f"@{look.colour}/0"], [0.1, f"@{look.colour}/0.35"], [1, f"@{look.colour}/1"]],
                "showscale": False,
                "hovertemplate": "%{y} taken for %{x}: %{z:.1f} %, %{customdata} samples<extra></extra>",
            }
        ],
        "layout": {
            "xaxis": {**axis, "title": {"text": "decision"}},
            "yaxis": {**axis, "title": {"text": "label"}, "autorange": "reversed"},
        },
    }
    most = f"{classes[row]} is taken for {classes[column]} most often ({wrong[row, column]:,.0f} times)"
    return Figure(
        "",
        f"{look.name or group.label}: confusion",
        "Each row is a label, each column a decision; the darker, the more of the label's samples. Pooled over seeds.",
        f"{100 * counts.trace() / counts.sum():.1f} % are right; {most}" if wrong.any() else "all are right",
        {"": spec},
        ("label", *classes),
        [(name, *(f"{n:,.0f}" for n in line)) for name, line in zip(classes, counts, strict=True)],
        row=group.label,
    )


def picture_panel(group: Group, panels: Sequence[Any], look: Look, kind: str = "picture") -> Figure:
    """A picture that the first run left in its folder: SVG or PNG, shown as an image, in which no script runs."""
    run, panel = next((run, run.panels[kind]) for run in group.runs if kind in run.panels)
    file = Path(str(panel["file"]))
    if file.suffix not in PICTURE_TYPES or file.is_absolute() or ".." in file.parts:
        raise ValueError("a picture is an SVG or PNG file in the run's folder")
    place = run.path / file
    try:
        if not place.is_file():  # a pipe would block
            raise ValueError(f"{place} is no file")
        if place.stat().st_size > LARGEST_PICTURE:
            raise ValueError(f"{place} is larger than {LARGEST_PICTURE} bytes")
        content = place.read_bytes()
    except OSError as error:
        raise ValueError(f"{place} cannot be read") from error
    rows = [tuple(str(cell) for cell in row) for row in panel["rows"]]
    return Figure(
        "",
        f"{look.name or group.label}: {panel['title']}",
        f"As in the run {run.name}, whose folder has it as {file}.",
        str(panel["summary"]),
        {},
        tuple(str(name) for name in panel["head"]),
        rows,
        image=f"data:{PICTURE_TYPES[file.suffix]};base64,{base64.b64encode(content).decode()}",
        row=group.label,
    )


def text_panel(group: Group, panels: Sequence[Any], look: Look) -> Figure:
    """Continuations that the networks of the first run wrote to a few prompts."""
    run, rows = next((run, run.panels["text"]) for run in group.runs if "text" in run.panels)
    head = [str(name) for name in rows[0]]
    return Figure(
        "",
        f"{look.name or group.label}: continuations",
        f"As the networks of the run {run.name} wrote them.",
        f"{len(rows)} prompts",
        {},
        tuple(head),
        [tuple(_cut(str(row[name])) for name in head) for row in rows],
        row=group.label,
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …"


@dataclass(frozen=True)
class PanelKind:
    """A kind of panel: heading and explanation of its section, and what draws it for a row."""

    title: str
    about: str
    draw: Callable[[Group, Sequence[Any], Look], Figure]


PANELS = {
    "picture": PanelKind(
        "Distilled data", "What the student was trained on, or the most frequent parts of it.", picture_panel
    ),
    "samples": PanelKind(
        "Samples", "What the generators make of the same noise.", partial(picture_panel, kind="samples")
    ),
    "text": PanelKind(
        "Text", "What student and teacher write to the same prompts, word by word the likeliest.", text_panel
    ),
    "reliability": PanelKind(
        "Calibration",
        "How often a prediction is right (bars) at each confidence; a calibrated model follows the dashed line. Below, "
        "the share of samples in each bin, pooled over seeds.",
        reliability_panel,
    ),
    "confusion": PanelKind(
        "Confusion", "Which classes are taken for which, in percent of the samples of each label.", confusion_panel
    ),
    "robustness": PanelKind(
        "Robustness",
        "Accuracy on all test images after an attack by the gradient's sign (FGSM), with two standard errors. Where "
        "the dotted line, the same attack with rescaled logits, lies far below the solid one, the gradient is masked "
        "and the network is not robust.",
        robustness_panel,
    ),
}


def panel_figures(
    groups: Sequence[Group], looks: Mapping[str, Look], most: int = MOST_PICTURES
) -> tuple[list[Figure], list[str]]:
    """All panels of the drawn rows, and notes on what could not be shown.

    Args:
        groups: The drawn rows.
        looks: How they are drawn.
        most: Bytes that all pictures together may take.
    """
    spent = left_out = 0
    figures: list[Figure] = []
    notes: list[str] = []
    unknown: set[str] = set()
    for group in groups:
        for kind in sorted({kind for run in group.runs for kind in run.panels}):
            known = PANELS.get(kind)
            if known is None:
                unknown.add(kind)
                continue
            try:
                drawn = known.draw(
                    group, [run.panels[kind] for run in group.runs if kind in run.panels], looks[group.label]
                )
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                notes.append(f"{group.label}: panel {kind!r} is left out, its data are malformed ({error})")
                continue
            spent += len(drawn.image)
            if drawn.image and spent > most:
                left_out += 1
                spent -= len(drawn.image)
                continue
            figures.append(Figure(**{**vars(drawn), "id": f"panel-{len(figures)}", "kind": kind}))
    if left_out:
        notes.append(f"{left_out} pictures are left out to keep the page small; they lie in the folders of their runs")
    notes += [f"panel {kind!r} is left out: this version cannot draw it" for kind in sorted(unknown)]
    return figures, notes
