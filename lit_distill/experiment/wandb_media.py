"""The panels of a run as W&B media: what the dashboard draws of it, kind by kind."""

import re
from functools import cache
from importlib.resources import files
from typing import Any

from lit_distill.experiment.dashboard import Figure, Look
from lit_distill.experiment.dashboard.panels import panel_figures
from lit_distill.experiment.groups import Group
from lit_distill.experiment.runs import Run

_COLOUR = re.compile(r"^@([\w-]+)(?:/([\d.]+))?$")


def media_of(run: Run) -> tuple[dict[str, Any], list[str]]:
    """Draws the panels of a finished run.

    A figure becomes a Plotly chart, a PNG an image, an SVG a page that shows it as an image, in which no script runs.
    The numbers or texts behind each are a table.

    Returns:
        W&B media by key, such as `panels/reliability`, and the names of the pictures in the run folder.
    """
    figures, _ = panel_figures([Group(run.name, (run,))], {run.name: Look("c1", "circle", "solid")})
    media: dict[str, Any] = {}
    pictures = []
    for figure in figures:
        key = f"panels/{figure.kind}"
        drawn = _drawn(figure)
        if drawn is not None:
            media[key] = drawn
        if figure.rows:
            media[f"{key}/table" if drawn is not None else key] = _table(figure)
        if figure.image:
            pictures.append(str(run.panels[figure.kind]["file"]))
    return media, pictures


def _drawn(figure: Figure) -> Any:
    import wandb

    if figure.image.startswith("data:image/svg"):
        return wandb.Html(f'<img alt="" src="{figure.image}">', inject=False)
    if figure.image:
        import base64
        import io

        from PIL import Image

        content = base64.b64decode(figure.image.partition(",")[2])
        return wandb.Image(Image.open(io.BytesIO(content)), caption=figure.title)
    if figure.specs:
        from plotly.graph_objects import Figure as Plot

        plot = Plot(_coloured(next(iter(figure.specs.values()))))
        plot.update_layout(title=figure.title, showlegend=False)
        return wandb.Plotly(plot)
    return None


def _table(figure: Figure) -> Any:
    import wandb

    return wandb.Table(columns=[str(name) for name in figure.head], data=[list(row) for row in figure.rows])


def _coloured(value: Any) -> Any:
    """The specification with the page's colours, which it has by name, written out."""
    if isinstance(value, dict):
        return {key: _coloured(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_coloured(entry) for entry in value]
    if not isinstance(value, str) or not (match := _COLOUR.match(value)):
        return value
    red, green, blue = (int(_palette().get(match[1], "#5a636c")[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{match[2] or 1})"


@cache
def _palette() -> dict[str, str]:
    """The colours of the page's style sheet, those of its light version."""
    style = (files("lit_distill.experiment") / "templates" / "dashboard.css").read_text(encoding="utf-8")
    found = re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", style)
    return dict(reversed(found))  # the light ones stand first
