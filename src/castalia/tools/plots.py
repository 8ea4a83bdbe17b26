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
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

HEIGHT = 260
MARGIN = {"left": 62, "right": 16, "top": 12, "bottom": 44}
COLOURS = 8
"""How many colours the page defines; further series begin again."""
_LOG_DIGITS = (
    (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
    (1, 1.5, 2, 3, 4, 5, 6, 8),
    (1, 2, 3, 5),
    (1, 2, 5),
    (1, 3),
    (1,),
)


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: its name in legend and read-out.
        x, y: equally long; points that are not finite leave a gap.
        colour: index of the page's colour.
        style: `line`, `marked` (each point marked), `dashed` (the same, dashed), `faint` (a thin pale
            line without a legend, for raw values behind a `mean`), `mean`, or `band` (the area between `y` and
            `high`, without a legend).
        high: the upper edge of a band; an edge that is not finite goes to the edge of the chart.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    style: str = "line"
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Mark:
    """A sign on the x axis where something happened.

    Attributes:
        x: where.
        kind: the word for it in the legend.
        text: what is told when the pointer rests on it.
        colour: index of the page's colour.
    """

    x: float
    kind: str
    text: str
    colour: int = 0


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
    """Round numbers within [low, high] for a logarithmic axis: the richest set that is not too many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    low, high = low * (1 - 1e-9), high * (1 + 1e-9)
    for digits in _LOG_DIGITS:
        ticks = [d * 10.0**e for e in decades for d in digits if low <= d * 10.0**e <= high]
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


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of an axis, all of one form where it is not too long for that: 2e-4 .. 1e-3, or 0 .. 15k, or plain."""
    most = max((abs(t) for t in ticks), default=0.0)
    if most > 100 * min((abs(t) for t in ticks if t), default=most):
        return [format_number(t) for t in ticks]
    if 0 < most <= 0.01:
        return ["0" if t == 0 else re.sub(r"\.?0*e", "e", f"{t:.2e}").replace("e-0", "e-") for t in ticks]
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if most >= limit:
            scale = 1e3 if suffix == "k" else limit
            return ["0" if t == 0 else f"{t / scale:.4g}{suffix}" for t in ticks]
    return [format_number(t, 4) for t in ticks]


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


def smooth(y: Sequence[float], half_width: int) -> list[float]:
    """Average of the values at most `half_width` points away on either side.

    The window is narrower near the start (a quarter of the way back to it), where a loss falls steeply and
    a trailing or wide average would run far beside the curve. What is not finite is passed through and left
    out of the averages.
    """
    finite = [math.isfinite(value) for value in y]
    sums = [0.0, *accumulate(v if ok else 0.0 for v, ok in zip(y, finite, strict=True))]
    counts = [0, *accumulate(finite)]
    out = []
    for i, value in enumerate(y):
        half = min(half_width, i // 4)
        a, b = i - half, min(i + half + 1, len(y))
        out.append((sums[b] - sums[a]) / (counts[b] - counts[a]) if finite[i] else value)
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
        low = min(low, 0.0)
    pad = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if zero and low == 0 else low - pad), high + pad


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str = "",
    log_y: bool = False,
    zero: bool = False,
    width: int = 520,
    marks: Sequence[Mark] = (),
    legend: bool = True,
) -> str:
    """Draw curves as a self-contained `<figure>`.

    Args:
        title: heading and accessible name.
        series: what to draw, the first at the bottom.
        x_label, y_label: names of the axes; the unit belongs in them.
        log_y: logarithmic y axis; points that are not positive are left out.
        zero: the y axis begins at 0, or below if a value does.
        width: of the drawing in pixels; the page may scale it.
        marks: signs on the x axis; those outside the curves are left out.
        legend: name the curves; False where the page does, for all its charts.

    Returns:
        HTML, or an empty string if no point can be drawn.
    """
    found = drawing(series, x_label, log_y, zero, width)
    if found is None:
        return ""
    parts, data = found
    shown = {entry["label"] for entry in data["series"]}
    marks = [mark for mark in marks if data["x"][0] <= mark.x <= data["x"][1]]
    (left, right, _, bottom), (low, high) = data["box"], data["x"]
    to_x = _scale(low, high, left, right, False)
    parts += [_mark(mark, to_x(mark.x), bottom) for mark in marks]
    heading = html.escape(title)
    unit = f' <span class="unit">{html.escape(y_label)}</span>' if y_label else ""
    return "".join(
        [
            f'<figure class="chart"><figcaption><h3>{heading}{unit}</h3>',
            _legend([s for s in series if s.label in shown] if legend else [], marks),
            '</figcaption><div class="plot">',
            f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{heading}">',
            *parts,
            '<g class="cursor"></g></svg><div class="readout" hidden></div></div>',
            f'<script type="application/json">{script_json(data)}</script></figure>',
        ]
    )


def drawing(
    series: Sequence[Series], x_label: str, log_y: bool, zero: bool, width: int, height: int = HEIGHT
) -> tuple[list[str], dict[str, Any]] | None:
    """Axes and curves as SVG elements, and the numbers behind them for the read-out; None if no point can be drawn.

    Args:
        series, x_label, log_y, zero, width: as for `chart`.
        height: of the drawing in pixels.
    """
    # Many curves share the points that a page can carry.
    buckets = max(width // 4 * 4 // max(len(series), 4), 60)
    bands = [s for s in series if s.style == "band"]
    # An average moves slowly.
    drawn = [
        (s, _segments(s, log_y, buckets // 3 if s.style == "mean" else buckets)) for s in series if s.style != "band"
    ]
    drawn = [(s, segments) for s, segments in drawn if segments]
    if not drawn:
        return None
    xs = [x for _, segments in drawn for seg_x, _ in segments for x in (seg_x[0], seg_x[-1])]
    ys = [y for _, segments in drawn for _, seg_y in segments for y in seg_y]
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high <= 0:
        x_high = x_low + 1
    elif 0 < x_low < 0.25 * x_high or x_low == x_high:
        x_low = 0.0  # the run began at 0, if its first record did not
    ys += _edges(bands, min(ys), max(ys), log_y)
    y_low, y_high = _y_range(ys, log_y, zero)
    left, right = MARGIN["left"], width - MARGIN["right"]
    top, bottom = MARGIN["top"], height - MARGIN["bottom"]
    to_x = _scale(x_low, x_high, left, right, False)
    to_y = _scale(y_low, y_high, bottom, top, log_y)

    parts = []
    y_ticks = log_ticks(y_low, y_high) if log_y else nice_ticks(y_low, y_high, 5)
    for value, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = f"{to_y(value):.1f}"
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y}" dy="4" text-anchor="end">{label}</text>')
    x_ticks = nice_ticks(x_low, x_high, max(width // 100, 3))
    for value, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = f"{to_x(value):.1f}"
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    name = f'<text class="label" x="{(left + right) / 2}" y="{height - 8}" text-anchor="middle">'
    parts.append(f"{name}{html.escape(x_label)}</text>")
    parts += [_band(s, to_x, to_y, y_low, y_high) for s in bands]
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
                "style": s.style,
                "colour": s.colour % COLOURS,
                "x": [_short(x, 7 if x == int(x) else 5) for seg_x, _ in segments for x in seg_x],
                "y": [_short(y, 5) for _, seg_y in segments for y in seg_y],
            }
            for s, segments in drawn
        ],
    }
    return parts, data


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


def _edges(bands: Sequence[Series], low: float, high: float, log: bool) -> list[float]:
    """Edges of bands that the y axis makes room for; of those far outside the curves' range only a part is seen."""
    if log:
        low, high = low / 4, high * 4
    else:
        low, high = low - (high - low), high + (high - low)
    values = (v for s in bands for edge in (s.y, s.high) for v in edge if math.isfinite(v))
    return [min(max(v, low), high) for v in values]


def _band(
    series: Series, to_x: Callable[[float], float], to_y: Callable[[float], float], y_low: float, y_high: float
) -> str:
    """The area between two edges, which end where the chart does."""

    def path(edge: Sequence[float], otherwise: float) -> list[str]:
        inside = (min(max(v, y_low), y_high) if math.isfinite(v) else otherwise for v in edge)
        points = list(zip(series.x, inside, strict=True))
        every = math.ceil(len(points) / 200) or 1
        kept = points[:-1:every] + points[-1:]
        return [f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in kept]

    points = path(series.y, y_low) + path(series.high, y_high)[::-1]
    style = f'style="--c:var(--c{series.colour % COLOURS})"'
    return f'<g class="band" {style}><path d="M{"L".join(points)}Z"/></g>' if points else ""


def _mark(mark: Mark, x: float, bottom: float) -> str:
    """A small triangle that stands on the axis."""
    where = f'd="M{x:.1f} {bottom - 8}l4.5 8h-9z" style="--c:var(--c{mark.colour % COLOURS})"'
    sign = "mark " + mark.kind.replace(" ", "-")
    return f'<path class="{html.escape(sign)}" {where}><title>{html.escape(mark.text)}</title></path>'


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
        points = [(round(10 * to_x(x)), round(10 * to_y(y))) for x, y in zip(xs, ys, strict=True)]
        # Each point from the one before, which takes half as many characters; in whole tenths, nothing adds up.
        steps = (f"{_tenths(c - a)} {_tenths(d - b)}" for (a, b), (c, d) in pairwise(points))
        path.append(f"M{_tenths(points[0][0])} {_tenths(points[0][1])}l" + " ".join(steps).replace(" -", "-"))
        if series.style in ("marked", "dashed") or len(points) == 1:
            dots += [(_tenths(x), _tenths(y)) for x, y in points]
    circles = "".join(f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in dots)
    return f'<g class="curve {series.style}" {style}><path d="{"".join(path)}"/>{circles}</g>'


def _tenths(value: int) -> str:
    """A tenth of a whole number, as short as it goes."""
    text = f"{abs(value) / 10:g}"
    return ("-" if value < 0 else "") + (text.removeprefix("0") or "0" if "." in text else text)


def _legend(series: Sequence[Series], marks: Sequence[Mark]) -> str:
    """Names of the curves and of the signs; none for a chart of one curve."""
    series = [s for s in series if s.style not in ("faint", "band")]
    if len(series) < 2 and not marks:
        return ""
    entries = [
        f'<li class="{s.style}" style="--c:var(--c{s.colour % COLOURS})"><i></i>{html.escape(s.label)}</li>'
        for s in series
    ]
    for kind in dict.fromkeys(mark.kind for mark in marks):
        entries.append(f'<li class="{html.escape(kind)}"><b>\u25b2</b>{html.escape(kind)}</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'
