"""Run directories -> one self-contained HTML page: facts, curves, samples, comparison, settings.

    runs/A, runs/B ─records.read_run─> Run ─┬─ facts or table of runs
                                            ├─ curves (plots.chart), by step, tokens and time
                                            ├─ comparison.json, samples.json
                                            └─ configuration, environment, events
                                                   └─page.render─> report.html

The page loads nothing, so it can be mailed, archived and opened without a network. It may be
written while the run is going on.
"""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import castalia
from castalia.config.files import write_text
from castalia.errors import UserError
from castalia.tools.page import dot, folded, heading, render, table, text
from castalia.tools.plots import Series, chart, format_number, smooth
from castalia.tools.records import Run, read_run

_SMOOTH_FROM = 60
"""Curves of fewer points are drawn as they are."""
_LOG_FROM = 2.5
"""A loss or a norm that spans more than this factor gets a logarithmic axis."""
_X_AXES = {"step": "step", "tokens": "tokens", "time": "seconds"}
_NONE = "\u2013"


def write_report(run_dirs: Sequence[Path], output: Path) -> None:
    """Write the report of one run, or of several set side by side.

    Args:
        run_dirs: run directories (docs/contracts.md, section 3); finished or still going.
        output: the HTML file, replaced if it exists.

    Raises:
        UserError: no directory is given, or one has nothing to report or is damaged.
    """
    if not run_dirs:
        raise UserError("no run is given to report on: name at least one run directory")
    runs = [read_run(Path(path)) for path in run_dirs]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.path)
    page = render(" \u00b7 ".join(run.name for run in runs), report_body(runs))
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)


def is_report(path: Path) -> bool:
    """Whether a file was written by `write_report`, and may so be replaced by it."""
    return b"<footer>Castalia " in path.read_bytes()


def report_body(runs: Sequence[Run]) -> str:
    """The page's content for `runs`, as HTML."""
    several = len(runs) > 1
    if several:
        names = ", ".join(run.name for run in runs)
        sections = [heading(f"{len(runs)} runs compared", names), _runs_table(runs), _differences(runs)]
    else:
        sections = [heading(runs[0].name, _status(runs[0])), _facts(runs[0])]
    sections.append(_curves(runs))
    for part in (_comparison, _samples, _settings):
        for run in runs:
            title, body = part(run)
            if body:
                sections.append(f"<h2>{title}{': ' + text(run.name) if several else ''}</h2>{body}")
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    sections.append(f"<footer>Castalia {text(castalia.__version__)}, written {now}</footer>")
    return "\n".join(section for section in sections if section)


# What a run came to -------------------------------------------------------------------------


def _status(run: Run) -> str:
    """One line: how far, whether it is still going, on what and when."""
    step = max((r["step"] for r in (*run.train, *run.valid, *run.test)), default=0)
    of = (run.config.get("training") or {}).get("steps")
    states = {"end": "finished", "signal": "stopped by a signal, can be resumed"}
    state = states.get(str(run.events[-1].get("event")) if run.events else "", "no end recorded yet")
    parts = [f"step {step:,}" + (f" of {of:,}" if of else "") + f", {state}", *_where(run)]
    if run.unreadable:
        parts.append(f"{run.unreadable} unreadable line(s) of metrics.jsonl left out")
    return " \u00b7 ".join(parts)


def _where(run: Run) -> list[str]:
    """Machine and date, from environment.json."""
    facts = run.environment
    devices = [str(d.get("name") or d.get("type")) for d in facts.get("devices") or []]
    names = [f"{devices.count(name)} \u00d7 {name}" for name in dict.fromkeys(devices)]
    if not names and facts.get("cpu"):
        names = [f"{facts['cpu']}, {facts.get('threads') or facts.get('cores')} threads"]
    return [*names, *([str(facts["time"])[:10]] if facts.get("time") else [])]


def _facts_of(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, remark) of each fact worth a headline; the value is a dash where it is not known."""
    perplexity, test_bits = run.last("perplexity", "valid"), run.last("bits_per_byte", "test")
    seconds, memory = run.last("seconds", "train"), run.last("peak_memory", "train")
    rate, mfu = _median(run, "tokens_per_second"), _median(run, "mfu")
    of_loss = "nats per token" + (f", perplexity {format_number(perplexity)}" if perplexity else "")
    per_character = run.last("char_perplexity", "valid")
    of_loss += f", per character {format_number(per_character)}" if per_character else ""
    return [
        ("Parameters", _number(run.parameters), ""),
        ("Tokens seen", _number(run.last("tokens", "train")), ""),
        ("Training loss", _fixed(run.last("loss", "train")), "nats per token, last record"),
        ("Validation loss", _fixed(run.last("loss", "valid")), of_loss),
        (
            "Bits per byte",
            _fixed(run.last("bits_per_byte", "valid")),
            "validation" + (f", test {_fixed(test_bits)}" if test_bits else ""),
        ),
        ("Skipped steps", _number(run.last("skipped", "train")), "loss or gradient not finite"),
        ("Time", _NONE if seconds is None else duration(seconds), ""),
        ("Tokens per second", _number(rate), "median" + (f", MFU {mfu:.0%}" if mfu else "")),
        ("Peak memory", _NONE if memory is None else f"{memory / 2**30:.2f} GiB", ""),
    ]


def _median(run: Run, key: str) -> float | None:
    values = [v for v in run.column("train", "step", key)[1] if math.isfinite(v)]
    return statistics.median(values) if values else None


def _facts(run: Run) -> str:
    items = (
        f"<div><dt>{name}</dt><dd>{text(value)}<small>{text(remark)}</small></dd></div>"
        for name, value, remark in _facts_of(run)
        if value != _NONE
    )
    return f'<dl class="facts">{"".join(items)}</dl>'


def _runs_table(runs: Sequence[Run]) -> str:
    facts = [_facts_of(run) for run in runs]
    columns = [i for i in range(len(facts[0])) if any(f[i][1] != _NONE for f in facts)]
    head = "<th>Run</th>" + "".join(f'<th class="n">{facts[0][i][0]}</th>' for i in columns)
    rows = []
    for i, (run, f) in enumerate(zip(runs, facts, strict=True)):
        cells = "".join(f'<td class="n">{text(f[c][1])}</td>' for c in columns)
        rows.append(f"<th>{dot(i)}{text(run.name)}</th>{cells}")
    return f'<div class="card scroll">{table(head, rows)}</div>'


def _differences(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ, their names and folders aside."""
    flat = [_flatten(run.config) if run.config else {} for run in runs]
    keys = [k for k in dict.fromkeys(k for f in flat for k in f) if k not in ("name", "output")]
    keys = [k for k in keys if len({json.dumps(f.get(k)) for f in flat}) > 1]
    if not keys or not all(flat):
        return ""
    head = "<th>Setting</th>" + "".join(f"<th>{dot(i)}{text(run.name)}</th>" for i, run in enumerate(runs))
    rows = []
    for key in keys:
        cells = "".join(f"<td>{text(_plain(f.get(key)))}</td>" for f in flat)
        rows.append(f"<th>{text(key)}</th>{cells}")
    return f'<h2>What differs</h2><div class="card scroll">{table(head, rows)}</div>'


# Curves -------------------------------------------------------------------------------------

Panel = Callable[[Sequence[Run], str, int], str]


def _curves(runs: Sequence[Run]) -> str:
    """All charts, each drawn once per x axis; radio buttons choose which is seen."""
    panels: list[Panel] = [
        _loss_chart,
        _panel("Validation", "bits per byte", "bits_per_byte", kind="valid", style="marked"),
        _panel("Learning rate", "", "lr", zero=True),
        _panel("Gradient norm", "before clipping", "grad_norm", averaged=True, log=True),
        _panel("Throughput", "tokens per second", "tokens_per_second", zero=True),
    ]
    cards = []
    for draw in panels:
        whole = draw is _loss_chart
        figures = {axis: draw(runs, axis, 1070 if whole else 520) for axis in _X_AXES}
        drawn = [f'<div class="by by-{axis}">{figure}</div>' for axis, figure in figures.items() if figure]
        if drawn:
            cards.append(f'<div class="card{" whole" if whole else ""}">{"".join(drawn)}</div>')
    if not cards:
        return ""
    checked = {"step": " checked"}
    inputs = [f'<input type="radio" name="x" id="by-{a}"{checked.get(a, "")}>' for a in _X_AXES]
    labels = [f'<label for="by-{a}">by {a}</label>' for a in _X_AXES]
    switch = f'{"".join(inputs)}<div class="switch">{"".join(labels)}</div>'
    return f'<h2>Curves</h2><div class="axes">{switch}<div class="charts">{"".join(cards)}</div></div>'


def _x(runs: Sequence[Run], axis: str) -> tuple[str, float]:
    """Label and divisor of an x axis; time in the unit that suits the longest run."""
    if axis != "time":
        return axis, 1.0
    longest = max((run.last("seconds", "train") or 0.0) for run in runs)
    if longest >= 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if longest >= 180 else ("seconds", 1.0)


def _averaged(label: str, x: list[float], y: list[float], colour: int) -> list[Series]:
    """A curve, and if it is long its average over its pale raw values."""
    if len(y) < _SMOOTH_FROM:
        return [Series(label, x, y, colour)]
    mean = smooth(y, max(len(y) // 50, 2))
    return [Series(f"{label}, as recorded", x, y, colour, "faint"), Series(label, x, mean, colour)]


def _unit(unit: str, series: Sequence[Series]) -> str:
    """The unit, and what the two kinds of line are where curves are averaged."""
    return unit + ("; averaged, pale as recorded" if any(s.style == "faint" for s in series) else "")


def _wide_span(series: Sequence[Series]) -> bool:
    values = [v for s in series for v in s.y if math.isfinite(v) and v > 0]
    return bool(values) and max(values) > _LOG_FROM * min(values)


def _loss_chart(runs: Sequence[Run], axis: str, width: int) -> str:
    """Training and validation loss of every run."""
    label, divisor = _x(runs, axis)
    several = len(runs) > 1
    training: list[Series] = []
    validation: list[Series] = []
    for i, run in enumerate(runs):
        x, y = run.column("train", _X_AXES[axis], "loss")
        training += _averaged(run.name if several else "training", [v / divisor for v in x], y, i)
        x, y = run.column("valid", _X_AXES[axis], "loss")
        colour = i if several else i + 1
        name = f"{run.name}, validation" if several else "validation"
        validation.append(Series(name, [v / divisor for v in x], y, colour, "dashed"))
    series = training + validation
    unit = _unit("nats per token", series)
    return chart("Loss", series, label, unit, log_y=_wide_span(series), width=width)


def _panel(
    title: str,
    unit: str,
    key: str,
    kind: str = "train",
    style: str = "line",
    averaged: bool = False,
    log: bool = False,
    zero: bool = False,
) -> Panel:
    """A chart of one key of the records, one curve per run."""

    def draw(runs: Sequence[Run], axis: str, width: int) -> str:
        label, divisor = _x(runs, axis)
        series: list[Series] = []
        for i, run in enumerate(runs):
            x, y = run.column(kind, _X_AXES[axis], key)
            x = [v / divisor for v in x]
            name = run.name if len(runs) > 1 else unit or title.lower()
            series += _averaged(name, x, y, i) if averaged else [Series(name, x, y, i, style)]
        log_y = log and _wide_span(series)
        return chart(title, series, label, _unit(unit, series), log_y=log_y, zero=zero, width=width)

    return draw


# Comparison, samples, settings: each gives a title and a body, the body empty where there is none --


def _comparison(run: Run) -> tuple[str, str]:
    """Bits per byte beside general compressors, best first."""
    title = "Beside general compressors"
    rows = [dict(row) for row in (run.comparison or {}).get("rows", [])]
    if not rows or run.comparison is None:
        return title, ""
    if not any(row.get("model") for row in rows):
        kind = "test" if run.last("bits_per_byte", "test") is not None else "valid"
        bits = run.last("bits_per_byte", kind)
        if bits is not None:
            note = "this run, " + {"valid": "validation text", "test": "test text"}[kind]
            rows.append({"name": run.name, "bits_per_byte": bits, "note": note, "model": True})
    rows.sort(key=lambda row: row["bits_per_byte"])
    most = max(row["bits_per_byte"] for row in rows)
    cells = []
    for row in rows:
        bits = row["bits_per_byte"]
        kind = "bar own" if row.get("model") else "bar"
        bar = f'<span class="{kind}" style="width:{100 * bits / most:.1f}%"></span>'
        name = f"<b>{text(row['name'])}</b>" if row.get("model") else text(row["name"])
        names = f"<th>{name}</th><td>{text(row.get('note', ''))}</td>"
        cells.append(f'{names}<td class="n">{bits:.3f}</td><td class="wide">{bar}</td>')
    sizes = [
        f"{run.comparison[key] / 1e6:,.2f} MB of {what} text"
        for key, what in (("train_bytes", "training"), ("valid_bytes", "unseen"))
        if run.comparison.get(key)
    ]
    head = '<th>Compressor</th><th></th><th class="n">bits per byte</th><th>less is better</th>'
    remark = f'<p class="soft">{text(", ".join(sizes))}</p>' if sizes else ""
    return title, f'{remark}<div class="card scroll">{table(head, cells)}</div>'


def _samples(run: Run) -> tuple[str, str]:
    """Generated text, the prompt marked."""
    blocks = []
    for sample in run.samples:
        keys = ("step", "temperature", "top_k", "top_p", "seed")
        remarks = [f"{key} {sample[key]}" for key in keys if sample.get(key) is not None]
        remark = f"<p>{text(', '.join(remarks))}</p>" if remarks else ""
        prompt, continuation = text(sample.get("prompt", "")), text(sample.get("text", ""))
        blocks.append(f'<div class="card">{remark}<pre><b>{prompt}</b>{continuation}</pre></div>')
    return "Samples", f'<div class="samples">{"".join(blocks)}</div>' if blocks else ""


def _settings(run: Run) -> tuple[str, str]:
    """Configuration, environment and events, folded away."""
    parts = []
    if run.config_text is not None:
        parts.append(folded("Configuration", f"<pre>{text(run.config_text)}</pre>"))
    if run.environment:
        facts = _flatten(run.environment)
        rows = [f"<th>{text(k)}</th><td>{text(_plain(v))}</td>" for k, v in facts.items()]
        parts.append(folded("Environment", table("", rows)))
    if run.events:
        rows = []
        for r in run.events:
            what = f"<th>{text(r.get('event', ''))}</th><td>{text(r.get('text', ''))}</td>"
            rows.append(f'<td class="n">{text(r["step"])}</td>{what}')
        parts.append(folded("Events", table('<th class="n">Step</th><th>Event</th><th></th>', rows)))
    return "Settings", "".join(parts)


# Small things -------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """42 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    whole = round(seconds)
    for big, small, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {big}" + (f" {rest} {small}" if rest else "")
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def _number(value: float | None) -> str:
    return _NONE if value is None else format_number(value)


def _fixed(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4f}"


def _plain(value: Any) -> str:
    """A setting's value as YAML would have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out
