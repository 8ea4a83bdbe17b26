"""Runs -> the charts of a report, each drawn once for every x axis.

    records.Run.column ─┬─ as recorded, pale ─┐
                        └─ averaged ──────────┴─plots.chart─> one card for a quantity, runs on top of each other

Radio buttons choose the axis and whether averages are seen, by CSS alone, so the page needs no script and
prints what is seen. A quantity that no run has is left out; one that this file does not know is drawn, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from castalia.tools.page import dot, text
from castalia.tools.plots import Mark, Series, chart, smooth
from castalia.tools.records import Run

_SMOOTH_FROM = 60
"""Curves of fewer points are drawn as they are."""
_LOG_FROM = 2.5
"""A loss or a norm that spans more than this factor gets a logarithmic axis."""
AXES = {"step": "step", "tokens": "tokens", "time": "seconds", "FLOPs": "flops"}
"""What the buttons say -> a column of the records."""
_MOST_OTHERS = 16
"""Charts of quantities that this file does not know."""
_KNOWN = {
    "v", "step", "tokens", "seconds", "loss", "lr", "grad_norm", "parameter_norm", "tokens_per_second", "mfu", "hfu",
    "samples_per_second", "step_seconds", "flops_per_second", "peak_memory",
    "noise_scale", "noise_scale_low", "noise_scale_high",
}  # fmt: skip
_WHOLE, _HALF = 1070, 520  # pixels

Panel = Callable[[Sequence[Run], str, int], str]


def curves(runs: Sequence[Run]) -> str:
    """All charts, with the buttons that choose what is seen; empty if nothing can be drawn."""
    axes = [a for a, key in AXES.items() if any(math.isfinite(v) for r in runs for v in r.at_steps([r.step], key))]
    axes = ["step", *(a for a in axes if a != "step")]
    panels: list[Panel] = [
        _loss_chart,
        _panel("Validation", "bits per byte", "bits_per_byte", kind="valid", style="marked"),
        _panel("Learning rate", "", "lr", zero=True),
        _panel("Gradient norm", "before clipping", "grad_norm", averaged=True, log=True),
        _noise_chart,
        _panel("Throughput", "tokens per second", "tokens_per_second", averaged=True, zero=True),
        _panel("Model FLOPs utilisation", "per cent", "mfu", averaged=True, zero=True, factor=100),
        *_hardware(runs),
        _panel("Peak memory", "GiB", "peak_memory", zero=True, factor=2**-30),
        _panel("Norm of all parameters", "", "parameter_norm"),
        *_timers(runs),
        *_others(runs),
        *_tasks(runs),
    ]
    cards = []
    for draw in panels:
        whole = draw is _loss_chart
        figures = {axis: draw(runs, axis, _WHOLE if whole else _HALF) for axis in axes}
        drawn = [f'<div class="by by-{axis}">{figure}</div>' for axis, figure in figures.items() if figure]
        if drawn:
            cards.append(f'<div class="card{" whole" if whole else ""}">{"".join(drawn)}</div>')
    if not cards:
        return ""
    groups = [("x", [(f"by-{a}", f"by {a}") for a in axes])]
    if any('class="curve mean"' in card for card in cards):
        groups.append(("smoothing", [("averaged", "averaged"), ("raw", "as recorded")]))
    inputs, switches = "", ""
    for name, choices in groups:
        labels = ""
        for i, (key, words) in enumerate(choices):
            inputs += f'<input type="radio" name="{name}" id="{key}"{"" if i else " checked"}>'
            labels += f'<label for="{key}">{words}</label>'
        switches += f'<div class="switch">{labels}</div>'
    if len(runs) > 1:
        names = "".join(f"<li>{dot(i)}{text(run.name)}</li>" for i, run in enumerate(runs))
        switches += f'<ul class="legend">{names}</ul>'
    charts = f'<div class="charts">{"".join(cards)}</div>'
    return f'<h2>Curves</h2><div class="axes">{inputs}<div class="switches">{switches}</div>{charts}</div>'


def _x(runs: Sequence[Run], axis: str) -> tuple[str, float]:
    """Label and divisor of an x axis; time and FLOPs in the unit that suits the longest run."""
    if axis not in ("time", "FLOPs"):
        return axis, 1.0
    ends = [v for run in runs for v in run.at_steps([run.step], AXES[axis]) if math.isfinite(v)]
    longest = max(ends, default=0.0)
    if axis == "FLOPs":
        units = (("ZFLOPs", 1e21), ("EFLOPs", 1e18), ("PFLOPs", 1e15), ("TFLOPs", 1e12), ("GFLOPs", 1e9))
        unit, size = next((u for u in units if longest >= 2 * u[1]), ("FLOPs", 1.0))
        return f"{unit} of the model, forward and backward", size
    if longest >= 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if longest >= 180 else ("seconds", 1.0)


def _columns(run: Run, kind: str, axis: str, divisor: float, key: str) -> tuple[list[float], list[float]]:
    x, y = run.column(kind, AXES[axis], key)
    return [v / divisor for v in x], y


def _averaged(label: str, x: list[float], y: list[float], colour: int) -> list[Series]:
    """A curve, and if it is long its average over its pale raw values."""
    if len(y) < _SMOOTH_FROM:
        return [Series(label, x, y, colour)]
    mean = smooth(y, max(len(y) // 50, 2))
    return [Series(label, x, y, colour, "faint"), Series(label, x, mean, colour, "mean")]


def _wide_span(series: Sequence[Series]) -> bool:
    values = [v for s in series for v in s.y if math.isfinite(v) and v > 0]
    return bool(values) and max(values) > _LOG_FROM * min(values)


def _loss_chart(runs: Sequence[Run], axis: str, width: int) -> str:
    """Training and validation loss of every run, and where each was resumed or stepped around a spike."""
    label, divisor = _x(runs, axis)
    several = len(runs) > 1
    training: list[Series] = []
    validation: list[Series] = []
    marks: list[Mark] = []
    for i, run in enumerate(runs):
        training += _averaged(run.name if several else "training", *_columns(run, "train", axis, divisor, "loss"), i)
        colour = i if several else i + 1
        name = f"{run.name}, validation" if several else "validation"
        validation.append(Series(name, *_columns(run, "valid", axis, divisor, "loss"), colour, "dashed"))
        marks += _marks(run, axis, divisor, i)
    series = training + validation
    unit = "nats per token" + ("; dashed: validation" if several and any(s.x for s in validation) else "")
    log = _wide_span(series)
    return chart("Loss", series, label, unit, log_y=log, width=width, marks=marks, legend=not several)


def _marks(run: Run, axis: str, divisor: float, colour: int) -> list[Mark]:
    """Where a run was resumed, and where its guard found a spike."""
    words = {"resume": "resumed", "spike": "spike"}
    events = [e for e in run.events if e.get("event") in words and e["step"] > 0]
    steps = [float(e["step"]) for e in events]
    places = steps if axis == "step" else run.at_steps(steps, AXES[axis])
    return [
        Mark(x / divisor, words[e["event"]], f"{run.name}: {words[e['event']]} at step {e['step']}", colour)
        for x, e in zip(places, events, strict=True)
        if math.isfinite(x)
    ]


def _noise_chart(runs: Sequence[Run], axis: str, width: int) -> str:
    """The gradient noise scale in its interval; an end that is not bounded goes to the edge of the chart."""
    label, divisor = _x(runs, axis)
    bands, lines = [], []
    for i, run in enumerate(runs):
        steps = {r["step"]: r for r in run.train if "noise_scale" in r}
        x, y = _columns(run, "train", axis, divisor, "noise_scale")
        low = [float(r.get("noise_scale_low", math.nan)) for r in steps.values()]
        high = [float(r.get("noise_scale_high", math.nan)) for r in steps.values()]
        name = run.name if len(runs) > 1 else "noise scale"
        if len(x) == len(low):
            bands.append(Series(name, x, low, i, "band", high))
        lines.append(Series(name, x, y, i))
    return chart(
        "Gradient noise scale",
        [*bands, *lines],
        label,
        "sequences, with its 95% interval",
        log_y=_wide_span(lines),
        width=width,
        legend=False,
    )


def _panel(
    title: str,
    unit: str,
    key: str,
    kind: str = "train",
    style: str = "line",
    averaged: bool = False,
    log: bool = False,
    zero: bool = False,
    factor: float = 1.0,
) -> Panel:
    """A chart of one key of the records, one curve per run."""

    def draw(runs: Sequence[Run], axis: str, width: int) -> str:
        label, divisor = _x(runs, axis)
        series: list[Series] = []
        for i, run in enumerate(runs):
            x, y = _columns(run, kind, axis, divisor, key)
            y = [factor * v for v in y]
            name = run.name if len(runs) > 1 else unit or title.lower()
            series += _averaged(name, x, y, i) if averaged else [Series(name, x, y, i, style)]
        log_y = log and _wide_span(series)
        return chart(title, series, label, unit, log_y=log_y, zero=zero, width=width, legend=False)

    return draw


def _hardware(runs: Sequence[Run]) -> list[Panel]:
    """The share with what was computed again, where it differs from the model's own."""
    if all(r.get("hfu") in (None, r.get("mfu")) for run in runs for r in run.train):
        return []
    return [_panel("Hardware FLOPs utilisation", "per cent", "hfu", averaged=True, zero=True, factor=100)]


def _timers(runs: Sequence[Run]) -> list[Panel]:
    """What the parts of a step take: of one run all in one chart, of several a chart for each part."""
    names = list(dict.fromkeys(k for run in runs for k in run.keys("train") if k.startswith("timers/")))
    if not names:
        return []
    if len(runs) > 1:
        return [
            _panel(f"Time of {name.removeprefix('timers/')}", "seconds", name, averaged=True, zero=True)
            for name in names
        ]

    def draw(runs: Sequence[Run], axis: str, width: int) -> str:
        label, divisor = _x(runs, axis)
        columns = {name.removeprefix("timers/"): _columns(runs[0], "train", axis, divisor, name) for name in names}
        most = max(len(x) for x, _ in columns.values())
        # What happens once in a while is points.
        styles = {name: "dashed" if 2 * len(x) < most else "line" for name, (x, _) in columns.items()}
        series = [Series(name, x, y, i, styles[name]) for i, (name, (x, y)) in enumerate(columns.items())]
        return chart("Timers", series, label, "seconds", zero=True, width=width)

    return [draw]


def _others(runs: Sequence[Run]) -> list[Panel]:
    """Whatever else the training records count and is not the same throughout: loss scale, experts' balance, ..."""
    found: dict[str, set[float]] = {}
    for run in runs:
        for record in run.train:
            for key, value in record.items():
                if key not in _KNOWN and not key.startswith("timers/") and isinstance(value, (int, float)):
                    found.setdefault(key, set()).add(float(value))
    varying = [key for key, values in found.items() if len(values) > 1]
    return [_panel(_title(key), "", key, averaged=True) for key in varying[:_MOST_OTHERS]]


def _title(key: str) -> str:
    """A key as a heading; a group's name in it keeps its letters."""
    return key[:1].upper() + key[1:].replace("_", " ")


def _tasks(runs: Sequence[Run]) -> list[Panel]:
    """Downstream tasks that were measured more than once."""
    names = dict.fromkeys(k for run in runs for k in run.keys("tasks") if k.startswith("eval/"))
    again = [n for n in names if any(len(run.column("tasks", "step", n)[0]) > 1 for run in runs)]
    return [_panel(n.removeprefix("eval/"), "", n, kind="tasks", style="marked") for n in again[:_MOST_OTHERS]]
