"""Columns of numbers -> line charts as inline SVG, in plain Python.

    Series (x, y) ─drop what is not finite─ min/max per bucket ─scale─> <path>
                                                             └─> JSON beside it, for the read-out

No plotting library: a report must open anywhere, offline, in light and dark, and a line
chart is two scales, some ticks and a path. Colours are CSS variables (`--c0` ...), so the
page decides them. Long curves are thinned by keeping the lowest and the highest point of
each bucket, which never hides a spike as averaging or skipping would.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

HEIGHT = 260
MARGIN = {"left": 62, "right": 16, "top": 12, "bottom": 44}
COLOURS = 8
"""How many colours the page defines; further series begin again."""


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: its name in legend and read-out.
        x, y: equally long; points that are not finite leave a gap.
        colour: index of the page's colour.
        style: `line`, `faint` (a thin pale line, for raw values behind a smoothed one) or `points`
            (dashed, each point marked).
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    style: str = "line"


def nice_ticks(low: float, high: float, target: int = 6) -> list[float]:
    """Round numbers within [low, high], about `target` of them, 1, 2, 2.5 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float, target: int = 7) -> list[float]:
    """Round numbers within [low, high] for a logarithmic axis, low > 0: the richest set that is not too many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,))
    for digits in choices:
        ticks = [d * 10.0**e for e in decades for d in digits if low * (1 - 1e-9) <= d * 10.0**e <= high * (1 + 1e-9)]
        if len(ticks) <= target:
            break
    else:
        ticks = ticks[:: math.ceil(len(ticks) / target)]  # more decades than ticks
    # A span within which hardly any of them falls is nearly straight: linear ticks serve.
    return ticks if len(ticks) >= 3 else nice_ticks(low, high, 5)


def format_number(value: float, digits: int = 3) -> str:
    """A number for people: 1234 -> 1,234; 12345678 -> 12.3M; 0.0006 -> 6e-4."""
    if not math.isfinite(value):
        return "\u2013"
    if 1000 <= abs(value) < 9999.5:
        return f"{value:,.0f}"
    value = float(f"{value:.{digits}g}")  # rounded first, so that 999999 becomes 1M and not 1000k
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.{digits}g}{suffix}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0 or size >= 1e-3:
        return f"{value:.{digits}g}"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def downsample(x: Sequence[float], y: Sequence[float], buckets: int) -> tuple[list[float], list[float]]:
    """Thin a curve to at most two points per bucket, its lowest and highest, in their own order.

    Args:
        x: ascending.
        y: as long as x, finite.
        buckets: equal parts of the range of x.
    """
    if len(x) <= 2 * buckets:
        return list(x), list(y)
    span = (x[-1] - x[0]) or 1.0
    extremes: dict[int, tuple[int, int]] = {}
    for i, (xi, yi) in enumerate(zip(x, y, strict=True)):
        bucket = min(int((xi - x[0]) / span * buckets), buckets - 1)
        low, high = extremes.get(bucket, (i, i))
        extremes[bucket] = (i if yi < y[low] else low, i if yi > y[high] else high)
    kept = sorted({i for pair in extremes.values() for i in pair} | {0, len(x) - 1})
    return [x[i] for i in kept], [y[i] for i in kept]


def smooth(y: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about `span` points, without the start's bias towards zero.

    What is not finite is passed through and left out of the average.
    """
    decay = 1 - 1 / max(span, 1.0)
    total = weight = 0.0
    out = []
    for value in y:
        if math.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight if math.isfinite(value) else value)
    return out


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    """A map from data to pixels."""
    f = math.log if log else float
    a, b = f(low), f(high)
    return lambda v: start + (f(v) - a) / (b - a) * (end - start)


def _y_range(values: Sequence[float], log: bool, zero: bool) -> tuple[float, float]:
    """Limits with a little air, never of zero height."""
    low, high = min(values), max(values)
    if log:
        pad = (high / low) ** 0.04 if high > low else 1.1
        return low / pad, high * pad
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    pad = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if zero and low == 0 else low - pad), (high if zero and high == 0 else high + pad)


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str = "",
    log_y: bool = False,
    zero: bool = False,
    width: int = 520,
) -> str:
    """Draw curves as a self-contained `<figure>`.

    Args:
        title: heading and accessible name.
        series: what to draw, the first at the bottom.
        x_label, y_label: names of the axes; the unit belongs in them.
        log_y: logarithmic y axis; points that are not positive are left out.
        zero: the y axis includes 0.
        width: of the drawing in pixels; the page may scale it.

    Returns:
        HTML, or an empty string if no point can be drawn.
    """
    drawn = [(s, _segments(s, log_y, max(width // 3, 60))) for s in series]
    drawn = [(s, segments) for s, segments in drawn if segments]
    if not drawn:
        return ""
    xs = [x for _, segments in drawn for seg_x, _ in segments for x in (seg_x[0], seg_x[-1])]
    ys = [y for _, segments in drawn for _, seg_y in segments for y in seg_y]
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    elif 0 < x_low < 0.1 * x_high:
        x_low = 0.0  # a run that starts at its first logged step starts at the axis
    y_low, y_high = _y_range(ys, log_y, zero)
    left, right = MARGIN["left"], width - MARGIN["right"]
    top, bottom = MARGIN["top"], HEIGHT - MARGIN["bottom"]
    to_x = _scale(x_low, x_high, left, right, False)
    to_y = _scale(y_low, y_high, bottom, top, log_y)

    parts = []
    for value in log_ticks(y_low, y_high) if log_y else nice_ticks(y_low, y_high, 5):
        y = to_y(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{format_number(value)}</text>')
    for value in nice_ticks(x_low, x_high, max(width // 100, 3)):
        x = to_x(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        label = format_number(value, 4)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (left + right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>')
    for s, segments in drawn:
        parts.append(_curve(s, segments, to_x, to_y))
    data = {
        "box": [left, right, top, bottom],
        "x": [x_low, x_high],
        "y": [y_low, y_high],
        "log": log_y,
        "unit": x_label,
        "series": [
            {
                "label": s.label,
                "colour": s.colour % COLOURS,
                "x": [_short(x, 7) for seg_x, _ in segments for x in seg_x],
                "y": [_short(y, 5) for _, seg_y in segments for y in seg_y],
            }
            for s, segments in drawn
        ],
    }
    heading = html.escape(title)
    unit = f' <span class="unit">{html.escape(y_label)}</span>' if y_label else ""
    return (
        f'<figure class="chart"><figcaption><h3>{heading}{unit}</h3>{_legend([s for s, _ in drawn])}</figcaption>'
        f'<div class="plot"><svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{heading}">{"".join(parts)}'
        f'<g class="cursor"></g></svg><div class="readout" hidden></div></div>'
        f'<script type="application/json">{script_json(data)}</script></figure>'
    )


def script_json(data: Any) -> str:
    """JSON that may stand inside `<script>`: no closing tag can appear in it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _short(value: float, digits: int) -> float | int:
    """A number rounded to significant digits, so that its JSON is short."""
    value = float(f"{value:.{digits}g}")
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def _segments(series: Series, log: bool, buckets: int) -> list[tuple[list[float], list[float]]]:
    """The drawable stretches of a curve: broken where a point is missing, thinned."""
    segments: list[tuple[list[float], list[float]]] = [([], [])]
    for x, y in zip(series.x, series.y, strict=True):
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log):
            segments[-1][0].append(x)
            segments[-1][1].append(y)
        elif segments[-1][0]:
            segments.append(([], []))
    # Buckets are shared out by length, so that many gaps do not make many points.
    total = sum(len(x) for x, _ in segments)
    return [downsample(x, y, max(buckets * len(x) // total, 1)) for x, y in segments if x]


def _curve(
    series: Series,
    segments: list[tuple[list[float], list[float]]],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
) -> str:
    """Path and, for single points or `points`, markers."""
    style = f'style="--c:var(--c{series.colour % COLOURS})"'
    path, dots = [], []
    for xs, ys in segments:
        points = [f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in zip(xs, ys, strict=True)]
        path.append("M" + "L".join(points))
        if series.style == "points" or len(points) == 1:
            dots += [p.split() for p in points]
    circles = "".join(f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in dots)
    return f'<g class="curve {series.style}" {style}><path d="{"".join(path)}"/>{circles}</g>'


def _legend(series: Sequence[Series]) -> str:
    """Names of the curves; none for a chart of one."""
    if len(series) < 2:
        return ""
    entries = (
        f'<li class="{s.style}" style="--c:var(--c{s.colour % COLOURS})"><i></i>{html.escape(s.label)}</li>'
        for s in series
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'
