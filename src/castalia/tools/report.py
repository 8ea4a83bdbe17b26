"""Run directories -> one self-contained HTML page: facts, curves, tasks, incidents, samples, settings.

    runs/A, runs/B ─records.read_run─> Run ─┬─ facts, or a table of runs and one of what differs
                                            ├─ report_curves: by step, tokens, time and FLOPs
                                            └─ report_parts: tasks, incidents, comparison, samples, settings
                                                   └─page.render─> report.html

The page loads nothing, so it can be mailed, archived and opened without a network. It may be
written while the run is going on.
"""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import castalia
from castalia.config.compare import MEANINGS, differences
from castalia.config.fields import flat
from castalia.config.files import write_text
from castalia.errors import UserError
from castalia.tools.page import dot, heading, render, table, text
from castalia.tools.plots import format_number
from castalia.tools.records import Run, read_run
from castalia.tools.report_curves import curves
from castalia.tools.report_parts import PARTS, flatten, incidents, plain, tasks

_NONE = "\u2013"


def write_report(run_dirs: Sequence[Path], output: Path) -> None:
    """Write the report of one run, or of several set side by side.

    Args:
        run_dirs: run directories (docs/contracts.md, section 3); finished or still going. One that is named twice
            is shown once.
        output: the HTML file, replaced if it exists.

    Raises:
        UserError: no directory is given, or one has nothing to report.
    """
    if not run_dirs:
        raise UserError("no run is given to report on: name at least one run directory")
    paths = {Path(path).resolve(): Path(path) for path in run_dirs}
    runs = [read_run(path) for path in paths.values()]
    _tell_apart(runs)
    page = render(" \u00b7 ".join(run.name for run in runs), report_body(runs))
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)


def is_report(path: Path) -> bool:
    """Whether a file was written by `write_report`, and may so be replaced by it."""
    return b"<footer>Castalia " in path.read_bytes()


def _tell_apart(runs: Sequence[Run]) -> None:
    """Add to names that clash as much of the folder's path, from its end, as tells all apart."""
    names = [run.name for run in runs]
    clashing = [run for run in runs if names.count(run.name) > 1]
    parts = [run.path.resolve().parts for run in clashing]
    for length in range(1, max(map(len, parts), default=0) + 1):
        tails = ["/".join(p[-length:]).replace("//", "/") for p in parts]
        if len(set(tails)) == len(tails):
            for run, tail in zip(clashing, tails, strict=True):
                run.name = tail if tail.endswith(run.name) else f"{run.name} ({tail})"
            return


def report_body(runs: Sequence[Run]) -> str:
    """The page's content for `runs`, as HTML."""
    several = len(runs) > 1
    if several:
        names = ", ".join(run.name for run in runs)
        sections = [heading(f"{len(runs)} runs compared", names), _runs_table(runs), _remarks(runs), _differing(runs)]
    else:
        sections = [heading(runs[0].name, _status(runs[0])), _facts(runs[0])]
    sections += [curves(runs), tasks(runs), incidents(runs)]
    for part in PARTS:
        for run in runs:
            title, body = part(run)
            if body:
                sections.append(f"<h2>{title}{': ' + text(run.name) if several else ''}</h2>{body}")
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    sections.append(f"<footer>Castalia {text(castalia.__version__)}, written {now}</footer>")
    return "\n".join(section for section in sections if section)


# What a run came to -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fact:
    """A headline: `value` is what the best of several runs is chosen by, `better` how (-1 less, 1 more, 0 neither)."""

    name: str
    shown: str
    remark: str = ""
    value: float | None = None
    better: int = 0


def _steps(run: Run) -> str:
    of = run.config.training.steps if run.config else None
    return f"{run.step:,}" + (f" of {of:,}" if of else "")


def _status(run: Run) -> str:
    """One line: how far, whether it is still going, on what and when."""
    return " \u00b7 ".join([f"step {_steps(run)}, {run.state}", *_where(run), *run.remarks])


def _remarks(runs: Sequence[Run]) -> str:
    """What could not be read of each run."""
    lines = [f"<li>{text(run.name)}: {text(remark)}</li>" for run in runs for remark in run.remarks]
    return f'<ul class="soft remarks">{"".join(lines)}</ul>' if lines else ""


def _where(run: Run) -> list[str]:
    """Machine and date, from environment.json."""
    facts = run.environment
    devices = [str(d.get("name") or d.get("type")) for d in facts.get("devices") or [] if isinstance(d, dict)]
    names = [f"{devices.count(name)} \u00d7 {name}" for name in dict.fromkeys(devices)]
    if not names and facts.get("cpu"):
        threads = facts.get("threads") or facts.get("cores")
        names = [f"{facts['cpu']}, {threads} thread{'' if threads == 1 else 's'}"]
    return [*names, *([str(facts["time"])[:10]] if facts.get("time") else [])]


def _facts_of(run: Run) -> list[_Fact]:
    """What is worth a headline; a dash where it is not known."""
    perplexity, test_bits = run.last("perplexity", "valid"), run.last("bits_per_byte", "test")
    loss, valid, bits = run.last("loss", "train"), run.last("loss", "valid"), run.last("bits_per_byte", "valid")
    seconds, memory, tokens = (run.last(key, "train") for key in ("seconds", "peak_memory", "tokens"))
    rate, mfu = _median(run, "tokens_per_second"), _median(run, "mfu")
    of_loss = "nats per token" + (f", perplexity {format_number(perplexity)}" if perplexity else "")
    per_character = run.last("char_perplexity", "valid")
    of_loss += f", per character {format_number(per_character)}" if per_character else ""
    steps, losses = run.column("valid", "step", "loss")
    lowest = min(zip(losses, steps, strict=True), default=None)
    if lowest and valid is not None and lowest[0] < valid:
        of_loss += f"; lowest {_fixed(lowest[0])} at step {lowest[1]:,.0f}"
    flops = tokens * run.flops_per_token if tokens and run.flops_per_token else None
    return [
        _Fact("Parameters", _number(run.parameters)),
        _Fact("Tokens seen", _number(tokens), "" if flops is None else f"{flops:.3g} FLOPs"),
        _Fact("Training loss", _fixed(loss), "nats per token, last record", loss, -1),
        _Fact("Validation loss", _fixed(valid), of_loss, valid, -1),
        _Fact(
            "Bits per byte",
            _fixed(bits),
            "validation" + (f", test {_fixed(test_bits)}" if test_bits else ""),
            bits,
            -1,
        ),
        _Fact("Skipped steps", _number(run.last("skipped", "train")), "loss or gradient not finite"),
        _Fact("Time", _NONE if seconds is None else duration(seconds)),
        _Fact("Tokens per second", _number(rate), "median" + (f", MFU {mfu:.0%}" if mfu else ""), rate, 1),
        _Fact("Peak memory", _NONE if memory is None else f"{memory / 2**30:.2f} GiB", "", memory, -1),
    ]


def _median(run: Run, key: str) -> float | None:
    values = [v for v in run.column("train", "step", key)[1] if math.isfinite(v)]
    return statistics.median(values) if values else None


def _facts(run: Run) -> str:
    items = (
        f"<div><dt>{fact.name}</dt><dd>{text(fact.shown)}<small>{text(fact.remark)}</small></dd></div>"
        for fact in _facts_of(run)
        if fact.shown != _NONE
    )
    return f'<dl class="facts">{"".join(items)}</dl>'


def _runs_table(runs: Sequence[Run]) -> str:
    """A run in each row, the best value of a column in bold."""
    facts = [_facts_of(run) for run in runs]
    columns = [i for i in range(len(facts[0])) if any(f[i].shown != _NONE for f in facts)]
    head = "<th>Run</th><th>Steps</th>" + "".join(f'<th class="n">{facts[0][i].name}</th>' for i in columns)
    best: dict[int, float] = {}
    for i in columns:
        values = [f[i].value for f in facts]
        known = [v for v in values if v is not None]
        if facts[0][i].better and len({f[i].shown for f in facts if f[i].value is not None}) > 1:
            best[i] = max(known) if facts[0][i].better > 0 else min(known)
    rows = []
    for number, (run, f) in enumerate(zip(runs, facts, strict=True)):
        cells = f'<td class="steps">{_steps(run)}<small>{text(run.state)}</small></td>'
        for i in columns:
            kind = "n best" if i in best and f[i].value == best[i] else "n"
            cells += f'<td class="{kind}" title="{text(f[i].remark)}">{text(f[i].shown)}</td>'
        rows.append(f"<th>{dot(number)}{text(run.name)}</th>{cells}")
    return f'<div class="card scroll runs">{table(head, rows)}</div>'


# What differs -------------------------------------------------------------------------------

_OWN = ("name", "output")
"""Settings that always differ."""
_OF_MACHINE = ("time", "command", "hostname", "notes", "pid")
"""Facts of an environment that tell sittings apart, and not machines or programs."""


def _differing(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ, by what a difference changes, and their environments."""
    head = "<th>Setting</th>" + "".join(f"<th>{dot(i)}{text(run.name)}</th>" for i, run in enumerate(runs))
    rows: list[str] = []

    def group(title: str, lines: dict[str, list[Any]]) -> None:
        if lines:
            rows.append(f'<th class="group" colspan="{len(runs) + 1}">{text(title)}</th>')
        for key, values in lines.items():
            cells = "".join(f"<td>{_NONE if v is None else text(plain(v))}</td>" for v in values)
            rows.append(f"<th>{text(key)}</th>{cells}")

    configs = [run.config for run in runs]
    first = next((c for c in configs if c is not None), None)
    kinds: dict[str, str] = {}
    for config in configs:
        if config is not None and first is not None:
            kinds |= {d.key: d.kind for d in differences(first, config) if d.key not in _OWN}
    values = [None if c is None else flat(c) for c in configs]
    for kind, meaning in MEANINGS.items():
        keys = [key for key, of in kinds.items() if of == kind]
        group(_said(meaning), {key: ["null" if v and v[key] is None else v and v[key] for v in values] for key in keys})
    environments = [flatten(run.environment) for run in runs]
    known = [e for e in environments if e]
    names = dict.fromkeys(k for e in known for k in e if k.partition(".")[0] not in _OF_MACHINE)
    other = [k for k in names if len({json.dumps(e.get(k)) for e in known}) > 1]
    group("machine and versions", {key: [e.get(key) for e in environments] for key in other})
    if not rows:
        return '<p class="soft">No setting differs.</p>' if all(configs) else ""
    return f'<h2>What differs</h2><div class="card scroll diff">{table(head, rows)}</div>'


def _said(meaning: str) -> str:
    """A kind of difference as a heading; what follows for a resumed run does not matter here."""
    return meaning.partition(";")[0]


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
