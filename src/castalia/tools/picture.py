"""Charts -> one SVG that stands alone: for a README, where no page gives the colours.

    panels ─plots.drawing─> axes and curves, one panel below the other ─> colours and sizes written out

Curves that lie on each other would show the last alone. So in a panel that is `stacked` each is drawn
narrower than the one below it, and all are seen.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from castalia.tools.page import LIGHT
from castalia.tools.plots import Series, drawing

HEAD = 58  # pixels above a panel, for its title and its legend
_STYLE = """<style>
text{font-family:system-ui,"Segoe UI",Helvetica,Arial,sans-serif;font-size:13px;fill:#5d6875}
.title{font-weight:600;fill:#1b2027}
.grid{stroke:#e1e5ea}.axis{stroke:#5d6875}
.curve path{fill:none;stroke:currentColor;stroke-width:1.7;stroke-linejoin:round}
.curve circle{fill:currentColor}
</style>"""


@dataclass(frozen=True)
class Panel:
    """One chart of a picture.

    Attributes:
        title: heading, with the unit.
        series: what to draw, the first at the bottom.
        log_y: logarithmic y axis; points that are not positive are left out.
        stacked: the curves are expected on top of each other.
    """

    title: str
    series: Sequence[Series]
    log_y: bool = False
    stacked: bool = False


def picture(name: str, panels: Sequence[Panel], x_label: str, width: int = 820, height: int = 260) -> str:
    """Draw panels below each other.

    Args:
        name: what a reader who sees no pictures is told.
        panels: at least one, each with a point that can be drawn.
        x_label: name of their common axis, with its unit.
        width, height: of each panel in pixels, without its title.

    Returns:
        An SVG document.

    Raises:
        ValueError: a panel has nothing to draw.
    """
    whole = len(panels) * (HEAD + height)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {whole}" role="img" '
        f'aria-label="{html.escape(name)}">',
        _STYLE,
        f'<rect width="{width}" height="{whole}" fill="#fff"/>',
    ]
    for number, panel in enumerate(panels):
        found = drawing(panel.series, x_label, panel.log_y, False, width, height)
        if found is None:
            raise ValueError(f"'{panel.title}' has nothing to draw")
        widths = _widths(panel)
        out.append(f'<g transform="translate(0 {number * (HEAD + height)})">')
        out.append(f'<text class="title" x="62" y="24">{html.escape(panel.title)}</text>')
        out += _legend(panel.series, widths)
        out.append(f'<g transform="translate(0 {HEAD})">')
        thick = iter(widths)
        for part in found[0]:
            if '"curve' in part:
                part = part.replace("<path ", f'<path style="stroke-width:{next(thick):g}" ')
            out.append(part)
        out.append("</g></g>")
    text = "\n".join([*out, "</svg>"]) + "\n"
    return re.sub(r'style="--c:var\(--c(\d)\)"', lambda found: f'color="{LIGHT[int(found[1])]}"', text)


def _widths(panel: Panel) -> list[float]:
    if not panel.stacked:
        return [1.7] * len(panel.series)
    return [1.2 + 2.2 * i for i in reversed(range(len(panel.series)))]


def _legend(series: Sequence[Series], widths: Sequence[float]) -> list[str]:
    out, x = [], 62.0
    for s, thick in zip(series, widths, strict=True):
        out.append(
            f'<line x1="{x:g}" x2="{x + 22:g}" y1="44" y2="44" stroke="{LIGHT[s.colour]}" stroke-width="{thick:g}"/>'
            f'<text x="{x + 28:g}" y="48">{html.escape(s.label)}</text>'
        )
        x += 50 + 7.2 * len(s.label)
    return out
