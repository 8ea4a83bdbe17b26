"""A coordinate check -> a table for the terminal, an object for programs, a page with muP and standard side by side."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

from castalia.tools.mup import Check, Measures, Row
from castalia.tools.page import heading, render, table
from castalia.tools.plots import COLOURS, Series, chart

_TITLES = {
    "start": "after initialisation",
    "change": "change by the updates",
    "end": "attention scores after the updates",
    "decay": "weight decay of one update",
}


def lines(check: Check) -> list[str]:
    """The rows as text, and the verdict; decays that are as they should be are counted in one line."""
    width = max(len(row.part) for row in check.rows)
    out = [f"{'':6}  {'slope of log |x| by log width':<{width}}     muP  standard"]
    out += [
        f"{row.kind:6}  {row.part:<{width}}  {row.mup:6.2f}  {row.standard:8.2f}{'' if row.good else '  FAILS'}"
        for row in check.rows
        if row.kind != "decay" or not row.good
    ]
    decays = [row for row in check.rows if row.kind == "decay"]
    if decays and all(row.good for row in decays):
        out.append(f"decay   the same at all widths, of {len(decays)} weights")
    return [*out, verdict(check)]


def verdict(check: Check) -> str:
    """One sentence, which names the part of the model that goes wrong first."""
    at = f"widths {', '.join(map(str, check.widths))}"
    bad = [row for row in check.rows if not row.good]
    if not bad:
        return f"passed at {at}: nothing grows or vanishes with the width"
    first = bad[0]
    return f"FAILED at {at}: {first.part} ({_TITLES[first.kind]}) goes as width^{first.mup:.2f}, first of {len(bad)}"


def values(check: Check) -> dict[str, Any]:
    """For --json."""
    return {
        "good": check.good,
        "verdict": verdict(check),
        "widths": check.widths,
        "rows": [_row(check, row) for row in check.rows],
    }


def _row(check: Check, row: Row) -> dict[str, Any]:
    key = row.kind, row.part
    return {
        "kind": row.kind,
        "part": row.part,
        "good": row.good,
        "slope": {"mup": _number(row.mup), "standard": _number(row.standard)},
        "values": {name: [_number(v) for v in of[key]] for name, of in _both(check).items()},
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _both(check: Check) -> Mapping[str, Measures]:
    return {"mup": check.mup, "standard": check.standard}


def page(check: Check) -> str:
    """One HTML page that needs nothing else."""
    x = [math.log2(width) for width in check.widths]
    body = [heading("muP over widths", verdict(check))]
    for kind, title in _TITLES.items():
        parts = [row.part for row in check.rows if row.kind == kind]
        if kind == "decay" or not parts:
            continue
        body.append(f"<h2>{title}</h2>")
        for name, of in (("muP", check.mup), ("standard", check.standard)):
            series = [Series(part, x, of[kind, part], i % COLOURS, "marked") for i, part in enumerate(parts)]
            body.append(
                f'<div class="card">{chart(name, series, "log2 of the hidden size", "mean |x|", log_y=True)}</div>'
            )
    cells = [
        f"<td>{row.kind}</td><td>{html.escape(row.part)}</td><td>{row.mup:.2f}</td><td>{row.standard:.2f}</td>"
        f"<td>{'' if row.good else 'fails'}</td>"
        for row in check.rows
    ]
    head = "<th></th><th>part</th><th>muP</th><th>standard</th><th></th>"
    body.append("<h2>Slopes of log |x| by log width</h2>" + table(head, cells))
    return render("muP over widths", "".join(body))
