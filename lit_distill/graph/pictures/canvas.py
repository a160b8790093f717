"""An SVG: rectangles, texts, and the nodes and edges of graphs."""

from collections.abc import Sequence
from xml.etree import ElementTree as Xml

import numpy as np

WIDTH = 960.0
STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-size:11px}"
    ".page{fill:#fff}.card{fill:#f7f7f5;stroke:#e3e5e7}.ink{fill:#1b1f23}.muted{fill:#5a636c}.own{fill:#0072b2}"
    ".rest{fill:#9aa3ab}.track{fill:#e3e5e7}.edge{stroke:#7d868e;stroke-width:1.8}"
    "@media(prefers-color-scheme:dark){.page{fill:#1a1e21}.card{fill:#23292d;stroke:#2e3438}.ink{fill:#e7eaec}"
    ".muted{fill:#a2abb3}.own{fill:#56b4e9}.rest{fill:#7d868e}.track{fill:#2e3438}.edge{stroke:#a2abb3}}"
)


class Canvas:
    """An SVG that is being drawn."""

    def __init__(self) -> None:
        self.root = Xml.Element("svg", xmlns="http://www.w3.org/2000/svg")
        Xml.SubElement(self.root, "style").text = STYLE
        self.page = self.rect(0.0, 0.0, WIDTH, 0.0, "page", rx="10")

    def add(self, tag: str, **attributes: float | str) -> Xml.Element:
        """Adds an element; `stroke_width` stands for `stroke-width`, `class_` for `class`."""
        written = {name.rstrip("_").replace("_", "-"): _number(value) for name, value in attributes.items()}
        return Xml.SubElement(self.root, tag, written)

    def rect(self, x: float, y: float, width: float, height: float, kind: str, rx: str = "2") -> Xml.Element:
        """Adds a rectangle of a class of the style, its corners rounded by rx."""
        return self.add("rect", class_=kind, x=x, y=y, width=width, height=height, rx=rx)

    def text(self, x: float, y: float, text: str, kind: str = "ink", **attributes: float | str) -> Xml.Element:
        """Adds a text of a class of the style; x and y are where its first line starts, or as `text_anchor` says."""
        element = self.add("text", class_=kind, x=x, y=y, **attributes)
        element.text = text
        return element

    def node(self, x: float, y: float, label: str, color: str, radius: float, ring: str | None = None) -> None:
        """Adds a node with its label, and a ring of a color around it; the label is left out where it would be tiny."""
        if ring:
            self.add("circle", cx=x, cy=y, r=radius + 3.5, fill="none", stroke=ring, stroke_width="3")
        self.add("circle", cx=x, cy=y, r=radius, fill=color)
        size = min(radius * 1.05, 2.6 * radius / max(len(label), 1))
        if size >= 4:
            style = f"font-size:{size:.1f}px;fill:{_letters(color)}"
            self.text(x, y + 0.36 * size, label, text_anchor="middle", style=style)

    def edge(self, start: tuple[float, float], end: tuple[float, float], lines: Sequence[tuple[float, str]]) -> None:
        """Adds an edge of one or more parallel lines, given by how far each is from the middle and by its dashes."""
        across = np.array([start[1] - end[1], end[0] - start[0]])
        across /= max(float(np.hypot(*across)), 1e-9)
        for offset, dashes in lines:
            dx, dy = (offset * across).tolist()
            ends = {"x1": start[0] + dx, "y1": start[1] + dy, "x2": end[0] + dx, "y2": end[1] + dy}
            self.add("line", class_="edge", **ends, **({"stroke_dasharray": dashes} if dashes else {}))

    def finished(self, height: float) -> str:
        """Writes the SVG out, cut to a height."""
        self.page.set("height", f"{height:.0f}")
        self.root.set("viewBox", f"0 0 {WIDTH:.0f} {height:.0f}")
        self.root.set("width", f"{WIDTH:.0f}")
        self.root.set("height", f"{height:.0f}")
        return Xml.tostring(self.root, encoding="unicode") + "\n"


def _number(value: float | str) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def _letters(color: str) -> str:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "#fff"
