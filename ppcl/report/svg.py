"""matplotlib figures as inline SVG that takes its colours and typeface from the page.

A figure is drawn in stand-in colours, one a role; here each becomes the page's CSS variable of that role, so the same
figure is right in light and in dark mode. Text stays text: it can be read aloud, searched and copied.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

SERIES = 8  # hues; further series repeat them with another dash
ROLES = ("ink", "soft", "faint", "rule", "mark", "paper", *(f"series-{i}" for i in range(SERIES)))
COLOURS = {role: f"#1f00{index:02x}" for index, role in enumerate(ROLES, start=1)}
_VARIABLES = {colour: f"var(--{role})" for role, colour in COLOURS.items()}

_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ppcl",
    "font.family": "DejaVu Sans",  # comes with matplotlib and is wide: what fits in it fits in the page's typeface
    "font.size": 11,
    "axes.titlesize": 11,
    "text.parse_math": False,  # a name with two dollar signs is a name
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.edgecolor": COLOURS["rule"],
    "axes.facecolor": "none",
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["rule"],
    "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["soft"],
    "ytick.labelcolor": COLOURS["soft"],
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@contextmanager
def canvas(width: int, height: int) -> Iterator[Figure]:
    """A figure of that many pixels to draw on in the page's style. Its text is never read as mathematics."""
    with matplotlib.rc_context(_RC):
        yield Figure(figsize=(width / 72, height / 72), layout="constrained")


def inline(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an `<svg>` element; `name` keeps its ids apart from other figures', `label` is its alt text."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ET.fromstring(buffer.getvalue())
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", buffer.getvalue()))
    used = {first or second for first, second in used}
    for parent in root.iter():
        for child in list(parent):
            # Metadata names outside vocabularies; a style element would rule the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text = element.text if element.tag == "text" else None  # indentation
        element.tail = None
        element.attrib = {
            key.rpartition("}")[2]: _rewritten(key.rpartition("}")[2], value, name)
            for key, value in element.attrib.items()
            if key != "id" or value in used
        }
    width, height = root.get("viewBox", "").split()[2:]
    root.attrib = {
        "viewBox": f"0 0 {width} {height}",
        "width": width,
        "height": height,
        "role": "img",
        "aria-label": label,
    }
    return Markup(ET.tostring(root, encoding="unicode"))


def _rewritten(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value[1:]}" if value.startswith("#") else "".join(value.split())
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    if key == "style":
        value = re.sub(r"#1f00[0-9a-f]{2}", lambda found: _VARIABLES[found[0]], value)
        value = re.sub(r"font-family:[^;]*;?", "", value)
    return value
