"""What a report shows below its curves: tasks, incidents, compressors, samples and settings.

`tasks` and `incidents` set all runs side by side in one table. Each of `PARTS` takes one run and gives a title
and a body, which is empty where the run has nothing of the kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from castalia.tools.page import dot, folded, table, text
from castalia.tools.records import Run

_LESS = ("loss", "perplexity", "bits_per_byte", "memorised")
"""Parts of the names of metrics of which less is better."""
_SHOWN = 12
"""Documents of an incident that are named."""


def tasks(runs: Sequence[Run]) -> str:
    """Downstream tasks: each run's last value of each metric, the best in bold."""
    names = list(dict.fromkeys(k for run in runs for k in run.keys("tasks") if k.startswith("eval/")))
    if not names:
        return ""
    head = "<th>Metric</th>" + "".join(
        f'<th class="n">{dot(i)}{text(run.name)}</th>' if len(runs) > 1 else '<th class="n">last value</th>'
        for i, run in enumerate(runs)
    )
    rows = []
    for name in names:
        values = [run.last(name, "tasks") for run in runs]
        known = [v for v in values if v is not None]
        least = any(part in name for part in _LESS)
        best = (min if least else max)(known) if len(set(known)) > 1 else None
        cells = ""
        for run, value in zip(runs, values, strict=True):
            step = run.column("tasks", "step", name)[0]
            where = f"<small>step {step[-1]:,.0f}</small>" if step else ""
            kind = "n best" if value is not None and value == best else "n"
            cells += f'<td class="{kind}">{chr(0x2013) if value is None else f"{value:.4f}"}{where}</td>'
        rows.append(f"<th>{text(name.removeprefix('eval/'))}</th>{cells}")
    return f'<h2>Downstream tasks</h2><div class="card scroll">{table(head, rows)}</div>'


def incidents(runs: Sequence[Run]) -> str:
    """What the guard of each run found, did, and left out; and steps that were not finite."""
    rows = []
    for i, run in enumerate(runs):
        name = f"<th>{dot(i)}{text(run.name)}</th>" if len(runs) > 1 else ""
        for incident in run.incidents:
            batches = [b for b in incident.get("left_out") or [] if isinstance(b, dict)]
            documents = list(dict.fromkeys(_documents(batches)))
            more = f" and {len(documents) - _SHOWN} more" if len(documents) > _SHOWN else ""
            left = f"{len(batches)} batch(es), {len(documents)} document(s)"
            named = f"<small>{text(', '.join(documents[:_SHOWN]))}{more}; {text(incident['file'])}</small>"
            what = f"{text(incident.get('why', ''))}<small>{text(incident.get('action', ''))}</small>"
            rows.append(
                f'{name}<td class="n">{text(incident.get("step", ""))}</td><td>{what}</td><td>{left}{named}</td>'
            )
        if not run.incidents:
            for event in run.events:
                if event.get("event") == "spike":
                    cells = f'<td class="n">{text(event["step"])}</td><td>{text(event.get("text", ""))}</td><td></td>'
                    rows.append(f"{name}{cells}")
    if not rows:
        return ""
    head = (
        "<th>Run</th>" if len(runs) > 1 else ""
    ) + '<th class="n">Step</th><th>What the guard found</th><th>Left out</th>'
    return f'<h2>Incidents</h2><div class="card scroll">{table(head, rows)}</div>'


def _documents(batches: Sequence[dict[str, Any]]) -> list[str]:
    """Documents of the batches, as NAME:NUMBER."""
    return [
        f"{str(d.get('data', '')).rpartition('/')[2]}:{d.get('document', '?')}"
        for batch in batches
        for sample in batch.get("samples") or []
        for d in (sample.get("documents") or [] if isinstance(sample, dict) else [])
        if isinstance(d, dict)
    ]


def _comparison(run: Run) -> tuple[str, str]:
    """Bits per byte beside general compressors, best first."""
    title = "Beside general compressors"
    given = (run.comparison or {}).get("rows")
    rows = [dict(r) for r in given or [] if isinstance(r, dict) and isinstance(r.get("bits_per_byte"), (int, float))]
    if not rows or run.comparison is None:
        return title, ""
    if not any(row.get("model") for row in rows):
        kind = "test" if run.last("bits_per_byte", "test") is not None else "valid"
        bits = run.last("bits_per_byte", kind)
        if bits is not None:
            note = "this run, " + {"valid": "validation text", "test": "test text"}[kind]
            rows.append({"name": run.name, "bits_per_byte": bits, "note": note, "model": True})
    rows.sort(key=lambda row: row["bits_per_byte"])
    most = max(row["bits_per_byte"] for row in rows) or 1.0
    cells = []
    for row in rows:
        bits = row["bits_per_byte"]
        kind = "bar own" if row.get("model") else "bar"
        bar = f'<span class="{kind}" style="width:{100 * bits / most:.1f}%"></span>'
        shown = text(row.get("name", ""))
        name = f"<b>{shown}</b>" if row.get("model") else shown
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
    """Generated text, the prompt marked: the newest seen, those of earlier steps folded away."""
    newest = max((s["step"] for s in run.samples if isinstance(s.get("step"), int)), default=None)
    blocks: list[str] = []
    earlier: dict[Any, list[str]] = {}
    for sample in run.samples:
        keys = ("step", "temperature", "top_k", "top_p", "seed")
        remarks = [f"{key} {sample[key]}" for key in keys if sample.get(key) is not None]
        remark = f"<p>{text(', '.join(remarks))}</p>" if remarks else ""
        prompt, continuation = text(sample.get("prompt") or ""), text(sample.get("text") or "")
        block = f'<div class="card">{remark}<pre><b>{prompt}</b>{continuation}</pre></div>'
        of = sample.get("step")
        (blocks if of is None or of == newest else earlier.setdefault(of, [])).append(block)
    if not blocks:
        return "Samples", ""
    body = f'<div class="samples">{"".join(blocks)}</div>'
    before = "".join(
        f'<div class="samples">{"".join(found)}</div>' for _, found in sorted(earlier.items(), reverse=True)
    )
    return "Samples", body + (folded("Of earlier steps", before) if before else "")


def _settings(run: Run) -> tuple[str, str]:
    """Configuration, environment and events, folded away."""
    parts = []
    if run.config_text is not None:
        parts.append(folded("Configuration", f"<pre>{text(run.config_text)}</pre>"))
    if run.environment:
        facts = flatten(run.environment)
        rows = [f"<th>{text(k)}</th><td>{text(plain(v))}</td>" for k, v in facts.items()]
        parts.append(folded("Environment", table("", rows)))
    if run.events:
        rows = []
        for r in run.events:
            what = f"<th>{text(r.get('event', ''))}</th><td>{text(r.get('text', ''))}</td>"
            rows.append(f'<td class="n">{text(r["step"])}</td>{what}')
        parts.append(folded("Events", table('<th class="n">Step</th><th>Event</th><th></th>', rows)))
    return "Settings", "".join(parts)


PARTS: tuple[Callable[[Run], tuple[str, str]], ...] = (_comparison, _samples, _settings)


def plain(value: Any) -> str:
    """A setting's value as YAML would have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out
