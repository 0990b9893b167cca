"""A figure, and the forms it is written in."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from gpuxent.evaluation.reports.figures.style import PALETTE, SETTINGS, WIDTH, shown

if TYPE_CHECKING:
    import matplotlib.figure

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
DPI = 200
HEIGHT = 3.4  # inches
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}


@dataclass(frozen=True)
class Figure:
    """What is shown, in columns, in words (the description, for who cannot see it), and how it is drawn."""

    name: str  # of a file, without its suffix
    title: str
    description: str
    columns: Mapping[str, Sequence[Any]]
    draw: Callable[[matplotlib.figure.Figure], None]
    subject: str = ""  # the run, if it is of a single one: a second part of the title where the figure stands alone
    height: float = HEIGHT  # inches; WIDTH wide
    tips: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of a line's id: what each of its marks says


def to_csv(figure: Figure) -> str:
    """Its data under a line of names; `nan` is what is not known, too."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(figure.columns)
    columns = [c.tolist() if isinstance(c, np.ndarray) else c for c in figure.columns.values()]
    writer.writerows(zip(*columns, strict=True))
    return file.getvalue()


def to_png(figure: Figure) -> bytes:
    """A picture in light colours, 1000 pixels wide, the same bytes every time."""
    file = io.BytesIO()
    with _drawn(figure, titled=True) as drawing:
        drawing.savefig(file, format="png", dpi=DPI, metadata={"Title": figure.title, "Software": None})
    return file.getvalue()


def to_svg(figure: Figure) -> str:
    """A drawing in light colours, whose text is text, with title and description; the same every time."""
    root = _parsed(figure, titled=True)
    _describe(root, figure)
    root.set("role", "img")
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def to_html_svg(figure: Figure) -> str:
    """A drawing to put into a page: as wide as there is room, in colours that are the page's variables, named in
    PALETTE, and in the page's letters. Its ids begin with figure- and its name."""
    root = _parsed(figure, titled=False)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    _describe(root, figure)
    root.set("role", "img")
    for element in root.iter():
        _for_page(element, f"figure-{figure.name}")
    background = root.find(f".//*[@id='figure-{figure.name}-patch_1']")
    if background is not None:  # the page has its own
        background.clear()
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt; font-variant-numeric: tabular-nums")
    return ElementTree.tostring(root, encoding="unicode")


@contextmanager
def _drawn(figure: Figure, titled: bool) -> Iterator[matplotlib.figure.Figure]:
    try:
        from matplotlib import style
        from matplotlib.figure import Figure as Drawing
    except ImportError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'gpuxent[report]'") from error
    with style.context(["default", SETTINGS]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s)Glyph .* missing from")  # a name in letters that the font lacks
        drawing = Drawing(figsize=(WIDTH, figure.height), layout="constrained")
        if titled:
            title = figure.title + (f": {shown(figure.subject)}" if figure.subject else "")
            drawing.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        figure.draw(drawing)
        yield drawing


def _parsed(figure: Figure, titled: bool) -> ElementTree.Element:
    """Without what matplotlib says of itself, and its style sheet, which would be the whole page's."""
    file = io.StringIO()
    with _drawn(figure, titled) as drawing:
        drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    for line, tips in figure.tips.items():
        _add_tips(root, line, tips)
    return root


def _add_tips(root: ElementTree.Element, line: str, tips: Sequence[str]) -> None:
    """What a browser shows beside the pointer."""
    marks = root.findall(f".//*[@id='{line}']//{{{SVG}}}use")
    if len(marks) == len(tips):
        for mark, tip in zip(marks, tips, strict=True):
            ElementTree.SubElement(mark, f"{{{SVG}}}title").text = tip


def _describe(root: ElementTree.Element, figure: Figure) -> None:
    for place, (tag, text) in enumerate((("title", figure.title), ("desc", figure.description))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": tag})
        element.text = text
        element.tail = "\n "
        root.insert(place, element)
    root.set("aria-labelledby", "title desc")


def _for_page(element: ElementTree.Element, prefix: str) -> None:
    """Its ids, the references to them and its colours, as they are in a page."""
    for name, value in element.attrib.items():
        if name == "id":
            element.set(name, f"{prefix}-{value}")
        elif name == "aria-labelledby":
            element.set(name, " ".join(f"{prefix}-{part}" for part in value.split()))
        elif name in ("href", f"{{{XLINK}}}href"):
            element.set(name, value.replace("#", f"#{prefix}-", 1))
        elif name == "clip-path":
            element.set(name, value.replace("url(#", f"url(#{prefix}-"))
        elif name == "style":
            element.set(name, _page_style(value))


def _page_style(style: str) -> str:
    style = re.sub(r"#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), style)
    style = re.sub(r"font-family: [^;]*;? ?", "", style)
    return re.sub(r"font: [^;]*?(\d+(?:\.\d+)?px) [^;]*", r"font-size: \1", style)  # as matplotlib 3.9 has it
