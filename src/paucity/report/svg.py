"""Matplotlib figures as SVG for a page: small, deterministic, and coloured by the page's CSS variables.

A figure is drawn in the stand-in colours of `INK`; in the SVG each becomes ``var(--name)``, so that light mode, dark
mode and print need one drawing only. Text stays text, in the page's font.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INK = {
    "ink": "#010101",
    "muted": "#020202",
    "rule": "#030303",
    "dense": "#040404",
    "sparse": "#050505",
    "heat": "#060606",
    "card": "#070707",
} | {f"series-{i}": f"#0{i}0a0b" for i in range(8)}
WIDTH = 4.4
"""Inches of every figure: 317 CSS pixels, what a phone shows, so that text is never scaled below its size."""
_KEPT = {"clip-path", "d", "height", "href", "id", "style", "transform", "viewBox", "width", "x", "y"}
_DROPPED = ("font-family", "stroke-linejoin", "stroke-linecap", "stroke-miterlimit")


@contextmanager
def canvas(height: float) -> Iterator[Any]:
    """A `matplotlib.figure.Figure` of ``WIDTH`` by ``height`` inches, under the page's settings; no global state."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.hashsalt": "paucity",
        "svg.fonttype": "none",
        "text.parse_math": False,
        "axes.unicode_minus": True,
        "font.family": "DejaVu Sans",
        "font.size": 9.0,
        "axes.labelsize": 9.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK["rule"],
        "axes.labelcolor": INK["muted"],
        "text.color": INK["ink"],
        "xtick.color": INK["rule"],
        "ytick.color": INK["rule"],
        "xtick.labelcolor": INK["muted"],
        "ytick.labelcolor": INK["muted"],
        "grid.color": INK["rule"],
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has the glyphs that measuring lacks
        yield Figure(figsize=(WIDTH, height), layout="constrained")


def to_svg(figure: Any, name: str, alt: str) -> str:
    """``<svg>`` of ``figure`` to stand in a page; ``name`` keeps its ids apart from those of other figures."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    root = ET.fromstring(buffer.getvalue())
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w.-]+)", buffer.getvalue()))
    _clean(root, name, used)
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": name, "role": "img", "aria-label": alt}
    return ET.tostring(root, encoding="unicode")


def label(text: str, limit: int = 26) -> str:
    """``text`` as it may stand in a figure: printable, and cut in the middle when longer than ``limit``."""
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    half = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


def _clean(element: ET.Element, name: str, used: set[str]) -> None:
    """Drop namespaces, the style sheet and ids that nothing refers to; give colours their CSS variables."""
    element.tag = element.tag.rpartition("}")[2]
    attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    element.attrib = {key: _attribute(key, value, name) for key, value in attributes.items() if key in _KEPT}
    if attributes.get("id") not in used:
        element.attrib.pop("id", None)
    if element.attrib.get("style") == "":
        del element.attrib["style"]
    if element.tag != "text":
        element.text = None
    element.tail = None
    for child in list(element):
        if child.tag.rpartition("}")[2] in ("style", "metadata"):
            element.remove(child)
        else:
            _clean(child, name, used)


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value[1:]}"
    if key == "clip-path":
        return value.replace("url(#", f"url(#{name}-")
    if key == "d":
        return " ".join(re.sub(r"(\.\d{2})\d+", r"\1", value).split())
    if key == "transform" and value.startswith("rotate(-0 "):
        return ""
    if key != "style":
        return value
    rules = [rule.strip() for rule in value.split(";")]
    style = "; ".join(rule for rule in rules if rule and not rule.startswith(_DROPPED))
    for variable, color in INK.items():
        style = style.replace(color, f"var(--{variable})")
    return style
