"""All checkpoints of a run, measured alike -> a table and a page of curves.

    checkpoints/step-* ──measure──> {metric: value} ──> dynamics.csv, dynamics.json, dynamics.html

The files are written anew after each checkpoint, so that a long campaign can be watched, and one that
was interrupted leaves what it had found.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from castalia.checkpoint import find_checkpoint
from castalia.checkpoint.layout import step_of
from castalia.config.files import write_text
from castalia.errors import UserError
from castalia.tools import page
from castalia.tools.plots import COLOURS, Series, chart

Row = dict[str, Any]
"""`step`, `tokens`, and a value for each metric."""


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of a run's whole checkpoints, ascending; contents are verified when they are loaded.

    Raises:
        UserError: there is none.
    """
    folder = run / "checkpoints"
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    steps = [step for name in names if (step := step_of(name)) is not None]
    whole = [step for step in steps if find_checkpoint(folder, step, verify=False) is not None]
    if not whole:
        raise UserError(f"{run} has no checkpoint: train it, with checkpoint.keep_last=null to keep them all")
    return sorted(whole)


def measure_all(
    run: Path,
    measure: Callable[[int], dict[str, float]],
    output: Path,
    write: bool = True,
    say: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure every checkpoint and write the table.

    Args:
        run: the run's folder.
        measure: step -> metrics of that checkpoint.
        output: folder of the three files.
        write: whether this process is the one that writes.
        say: called with each row.
    """
    rows: list[Row] = []
    for step in checkpoint_steps(run):
        found = find_checkpoint(run / "checkpoints", step, verify=False)
        tokens = found.state["tokens"] if found is not None else None
        rows.append({"step": step, "tokens": tokens, **measure(step)})
        if write:
            output.mkdir(parents=True, exist_ok=True)
            write_text(output / "dynamics.json", json.dumps({"run": str(run), "rows": rows}, indent=1) + "\n")
            write_text(output / "dynamics.csv", to_csv(rows))
            write_text(output / "dynamics.html", to_html(str(run), rows))
        if say is not None:
            say(rows[-1])
    return rows


def columns(rows: Sequence[Row]) -> list[str]:
    """Names of all columns, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def to_csv(rows: Sequence[Row]) -> str:
    """One line for each checkpoint; a metric that a checkpoint does not have is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_html(name: str, rows: Sequence[Row]) -> str:
    """A page with a curve for each metric, and the table."""
    names = [c for c in columns(rows) if c not in ("step", "tokens")]
    charts = []
    for number, metric in enumerate(names):
        having = [row for row in rows if metric in row]
        series = Series(
            metric, [row["step"] for row in having], [row[metric] for row in having], number % COLOURS, "marked"
        )
        charts.append(chart(metric.replace("_", " "), [series], "step"))
    head = "".join(f"<th>{page.text(c)}</th>" for c in ("step", "tokens", *names))
    cells = ["".join(f"<td>{page.text(_shown(row.get(c)))}</td>" for c in ("step", "tokens", *names)) for row in rows]
    body = page.heading(name, f"{len(rows)} checkpoints, each measured alike")
    body += f'<div class="charts">{"".join(charts)}</div>' + page.table(head, cells)
    return page.render(f"{name}: learning dynamics", body)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else f"{value:,}"
