"""A profile -> text for the terminal, and one HTML page with flames: width is the share, depth is what holds what.

    model ████████████████████████████████████████████████    a module that lies below another is a part of it;
    layers ██████████████████████████████████████ head ███    what it does not cover is the upper one's own
    0-11   ██████████████████████████████████████
    attention █████████████ mlp ██████████████████            a click widens a module to the whole page

One flame has alike layers together, another each by itself; radio buttons and CSS choose what the width measures.
The page fetches nothing, and its one script is for the click.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from castalia.tools.page import heading, render, table, text
from castalia.train.console import human
from castalia.train.profile_tree import Part, Profile, lines, merged, top

MEASURES = {
    "time": ("seconds", "time of the step"),
    "forward": ("forward_seconds", "time forward"),
    "backward": ("backward_seconds", "time backward"),
    "flops": ("flops", "FLOPs"),
    "kept": ("kept", "bytes kept for backward"),
    "parameters": ("parameters", "parameters"),
}
_ROW = 26
# A module's colour is the first of these that its name or class has; else it is that of what holds it.
_COLOURS = {"norm": 2, "attention": 0, "mlp": 1, "embed": 3, "head": 4, "expert": 5, "router": 6}
_STYLE = """<style>
.flames{position:relative}.flames>input{position:absolute;opacity:0}
.flame{position:relative;overflow:hidden;margin:6px 0 0}
.flame>div{position:absolute;inset:0;transition:width .2s,left .2s}
.flame a{position:absolute;height:24px;overflow:hidden;white-space:nowrap;text-overflow:ellipsis;cursor:pointer;
font-size:12px;line-height:24px;padding:0 5px;border-radius:3px;background:color-mix(in srgb,var(--c) 26%,var(--card));
box-shadow:inset 0 0 0 1px var(--card);color:var(--ink)}
.flame a:hover{background:color-mix(in srgb,var(--c) 48%,var(--card))}
.flame a.thin{padding:0}
.view{display:none}
.tree th,.tree td{padding:6px 9px;font-size:13.5px;white-space:nowrap;overflow-wrap:normal}
.tree td.in{padding-left:calc(12px + 14px*var(--d))}
.flames h3{margin-top:16px}
SWITCH</style>"""
_SCRIPT = """<script>
for (const flame of document.querySelectorAll('.flame')) flame.addEventListener('click', event => {
  const cell = event.target.closest('a');
  if (!cell) return;
  const inner = flame.firstElementChild, [left, width] = cell.dataset.at.split(' ').map(Number);
  inner.style.width = 100 / width * 100 + '%';
  inner.style.left = -left / width * 100 + '%';
});
</script>"""


def report(profile: Profile, depth: int | None = None, each: bool = False, count: int = 5) -> list[str]:
    """Lines for the terminal.

    Args:
        depth: of the tree; None: all of it.
        each: every layer by itself.
        count: modules to name whose own work takes longest.
    """
    p, seconds = profile, profile.step_seconds
    out = [
        f"{p.name}: {human(p.root.parameters)} parameters, {p.precision} on {p.device}; {p.data}: "
        f"{p.sequences} sequences, {human(p.tokens)} tokens in {_micro_batches(p)}",
        f"step        {1e3 * seconds:.1f} ms, {human(p.tokens / seconds)} tokens/s, "
        f"{human(p.root.measure('flops') / seconds, ' ')}FLOP/s; with clocks in it {1e3 * p.clocked_seconds:.1f} ms",
        *(["phases      " + "  ".join(f"{n} {1e3 * s:.1f} ms" for n, s in p.phases.items())] if p.phases else []),
        f"FLOPs       forward {human(p.root.flops['forward'])} ({human(p.root.flops['forward'] / 2)} MACs), "
        f"backward {human(p.root.flops['backward'])}"
        + (f", computed again {human(p.root.flops['recompute'])}" if p.root.flops["recompute"] else ""),
        "memory      "
        + "".join(f"{name} {_bytes(count)}, " for name, count in p.state_bytes.items() if count)
        + f"activations kept by a micro-batch {_bytes(p.root.kept)}; peak of the "
        + ("process " if p.device == "cpu" else "device's allocator ")
        + _bytes(p.peak_bytes),
        *(f"            {note}" for note in p.notes),
        "",
        *lines(p.root if each else merged(p.root), depth),
    ]
    if count:
        out += ["", "own work that takes longest:", *top(p.root, count)]
    return out


def page(profile: Profile) -> str:
    """The HTML page."""
    p, together = profile, merged(profile.root)
    switch = "".join(
        f"#m-{m}:checked~.view.m-{m}{{display:block}}"
        f"#m-{m}:checked~.switch [for=m-{m}]{{background:var(--mark);color:var(--ink);font-weight:600}}"
        for m in MEASURES
    )
    radios = "".join(f'<input type="radio" name="m" id="m-{m}"{" checked" if m == "time" else ""}>' for m in MEASURES)
    labels = "".join(f'<label for="m-{m}">{text(m)}</label>' for m in MEASURES)
    views = "".join(_view(m, together, p.root) for m in MEASURES)
    title = f"Profile of {p.name}"
    line = f"one step of {p.sequences} sequences, {p.tokens:,} tokens, {p.precision} on {p.device}; {p.data}"
    body = [
        _STYLE.replace("SWITCH", switch),
        heading(title, line),
        _facts(p),
        "<h2>Where it goes</h2>",
        f'<div class="flames">{radios}<div class="switch">{labels}</div>{views}</div>',
        '<h2>Modules</h2><div class="card scroll tree">',
        table(
            "".join(f"<th{' class=n' if i > 1 else ''}>{h}</th>" for i, h in enumerate(_COLUMNS)), list(_rows(together))
        ),
        "</div>",
        _phases(p.phases),
        "<footer>" + "<br>".join(text(note) for note in p.notes) + "</footer>",
        _SCRIPT,
    ]
    return render(title, "\n".join(body))


def _facts(p: Profile) -> str:
    root, seconds = p.root, p.step_seconds
    facts = [
        (
            "step",
            f"{1e3 * seconds:,.1f} ms",
            f"{human(p.tokens / seconds)} tokens/s in {_micro_batches(p)}",
        ),
        ("FLOPs", human(root.measure("flops")), f"{human(root.measure('flops') / seconds, ' ')}FLOP/s"),
        ("activations", _bytes(root.kept), f"kept by a micro-batch; peak {_bytes(p.peak_bytes)}"),
        ("parameters", human(root.parameters), f"{root.parameters:,}"),
    ]
    cells = (f"<div><dt>{a}</dt><dd>{text(b)}<small>{text(c)}</small></dd></div>" for a, b, c in facts)
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _view(measure: str, together: Part, each: Part) -> str:
    what, meaning = MEASURES[measure]
    whole = each.measure(what)
    if not whole:
        return f'<div class="view m-{measure}"><p class="soft">{text(meaning)}: nothing</p></div>'
    show = _shown(measure)
    flames = _flame(together, what, whole, show)
    if any(" x " in part.kind for _, part in together.walk()):
        flames += f"<h3>each layer by itself</h3>{_flame(each, what, whole, show)}"
    line = f'<p class="soft" style="margin:8px 0 0">{text(meaning)}: {show(whole)}</p>'
    return f'<div class="view m-{measure}">{line}{flames}</div>'


def _flame(root: Part, what: str, whole: float, show: Callable[[float], str]) -> str:
    cells = list(_cells(root, what, 0, 0.0, 7))
    deepest = max(level for level, *_ in cells) + 1
    out = []
    for level, left, width, colour, part in cells:
        value = part.measure(what)
        tip = f"{part.path or 'model'} ({part.kind}): {show(value)}, {100 * value / whole:.1f}%"
        style = f"left:{left:.4f}%;width:{width:.4f}%;top:{level * _ROW}px;--c:var(--c{colour})"
        thin = ' class="thin"' if width < 2.5 else ""
        label = text(f"{part.name} {100 * value / whole:.0f}%") if width >= 2.5 else ""
        out.append(f'<a{thin} data-at="{left:.4f} {width:.4f}" style="{style}" title="{text(tip)}">{label}</a>')
    return f'<div class="flame" style="height:{deepest * _ROW}px"><div>{"".join(out)}</div></div>'


def _cells(
    part: Part, what: str, level: int, left: float, colour: int, width: float = 100.0
) -> Iterator[tuple[int, float, float, int, Part]]:
    """Level, left edge and width in per cent, colour and part."""
    yield level, left, width, colour, part
    value = part.measure(what)
    for inner in part.parts:
        share = inner.measure(what) / value * width if value else 0.0
        if share > 0.02:
            own = next((c for k, c in _COLOURS.items() if k in inner.name or k in inner.kind.lower()), colour)
            yield from _cells(inner, what, level + 1, left, own, share)
        left += share


_COLUMNS = ("module", "kind", "parameters", "time", "of all", "forward", "backward", "FLOPs", "FLOP/s", "kept")


def _rows(root: Part) -> Iterator[str]:
    whole = root.measure("seconds") or 1.0
    for level, part in root.walk():
        seconds, flops = part.measure("seconds"), part.measure("flops")
        cells: tuple[Any, ...] = (
            f"{part.parameters:,}",
            _ms(seconds),
            f"{100 * seconds / whole:.1f}%",
            _ms(part.seconds["forward"]),
            _ms(seconds - part.seconds["forward"]),
            human(flops) if flops else "",
            human(flops / seconds) if flops and seconds else "",
            _bytes(part.kept) if part.kept else "",
        )
        first = f'<td class="in" style="--d:{level}">{text(part.name)}</td><td>{text(part.kind)}</td>'
        yield first + "".join(f'<td class="n">{text(cell)}</td>' for cell in cells)


def _phases(phases: dict[str, float]) -> str:
    if not phases:
        return ""
    whole, rows = sum(phases.values()) or 1.0, []
    for name, seconds in phases.items():
        bar = f'<span class="bar own" style="width:{100 * seconds / whole:.1f}%"></span>'
        rows.append(f'<th>{text(name)}</th><td class="n">{_ms(seconds)}</td><td class="wide">{bar}</td>')
    return f'<h2>Phases of the step</h2><div class="card scroll">{table("", rows)}</div>'


def _shown(measure: str) -> Callable[[float], str]:
    shown: dict[str, Callable[[float], str]] = {"kept": _bytes, "flops": human, "parameters": human}
    return shown.get(measure, _ms)


def _micro_batches(p: Profile) -> str:
    return f"{p.micro_batches} micro-batch{'es' if p.micro_batches > 1 else ''}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.2f} ms"


def _bytes(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
