"""The comparison as one HTML page that needs nothing else: no server, no network, no second file.

Figures are plain Plotly specifications (`data`, `layout`). Colours in them are names such as `@c1` or `@c1/0.2`, which
the page's script resolves from its style sheet, so that light and dark come from one place. A trace names its row in
`meta`, so that the page can hide it.
"""

from lit_distill.experiment.dashboard.figure import Figure, Look
from lit_distill.experiment.dashboard.page import render, write_dashboard

__all__ = ["Figure", "Look", "render", "write_dashboard"]
