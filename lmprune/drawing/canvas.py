"""What all pictures share: the palette, whole-numbered axes, and how a figure becomes a file.

Colours are the Okabe-Ito set, safe for colour-blind eyes; lines differ in their marks as well.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKS = ("o", "s", "^", "D", "v", "P")
GREY = "#7f7f7f"
MAP = "cividis"
_UNDATED: Mapping[str, Mapping[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def render(figure: Figure, kind: str, salt: str, *, dpi: int = 150, transparent: bool = False) -> bytes:
    """The figure as a file of that kind, such as ``svg``; the same figure and salt give the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=dpi, transparent=transparent, metadata=dict(_UNDATED.get(kind, {})))
        return out.getvalue()


def whole_numbers(*axes: Axis, ticks: int | None = None) -> None:
    """Have these axes count in whole numbers."""
    how: dict[str, Any] = {} if ticks is None else {"nbins": ticks, "min_n_ticks": 1}
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, **how))


@dataclass(frozen=True)
class Picture:
    """A figure for a page.

    Attributes:
        name: of its file and of its ids.
        alt: what it shows, for those who do not see it.
        marks: id of a mark that a reader may ask about -> what it says.
        frame: left, top, width and height of the axes as shares of the picture, for pointing at a map.
    """

    name: str
    title: str
    alt: str
    figure: Figure
    marks: Mapping[str, str]
    frame: tuple[float, float, float, float] | None = None

    def svg(self) -> str:
        """The picture to stand inside a page: it takes the page's colours, and its ids are its own."""
        text = render(self.figure, "svg", self.name, transparent=True).decode("utf-8")
        text = text[text.index("<svg") :]
        text = re.sub(r'\sid="([^"]+)"', rf' id="{self.name}-\1"', text)
        text = re.sub(r"url\(#", f"url(#{self.name}-", text)
        text = re.sub(r'href="#', f'href="#{self.name}-', text)
        text = text.replace("#000000", "currentColor")
        for i, colour in enumerate(COLOURS):
            text = text.replace(colour.lower(), f"var(--curve{i})")
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)

    def png(self) -> bytes:
        """The picture as a file."""
        return render(self.figure, "png", self.name)
