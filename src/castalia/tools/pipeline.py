"""A pipeline's timeline -> lines of text, and a picture (SVG) that stands alone or in a page.

    rank 0  F0 F1 F2 F3 .. .. .. B0 B0 ...        ranks downwards, time to the right; a gap is a rank that waits

Colours tell the kinds apart; a deeper shade is a later one of a rank's stages.
"""

from __future__ import annotations

import html
import math
from typing import Any

from castalia.parallel.timeline import KINDS, Timeline
from castalia.tools.page import LIGHT

WIDTH, ROW, LEFT, TOP = 1080, 30, 66, 62
COLOUR = {"F": LIGHT[0], "B": LIGHT[1], "I": LIGHT[6], "W": LIGHT[2]}
COLUMNS = 150  # characters of a row, above which columns are no longer one unit each


def as_dict(line: Timeline) -> dict[str, Any]:
    """For `--json`."""
    return {
        "schedule": line.schedule,
        "ranks": line.ranks,
        "stages": line.stages,
        "micro_batches": line.micro_batches,
        "span": line.span,
        "bubble": line.bubble,
        "idle": [line.idle(rank) for rank in range(line.ranks)],
        "peak_activations": line.peaks,
        "blocks": [[[b.kind, b.stage, b.micro_batch, b.start, b.end] for b in row] for row in line.blocks],
    }


def summary(line: Timeline) -> str:
    """One sentence about the whole."""
    several = f" ({line.stages} stages)" if line.stages > line.ranks else ""
    return (
        f"{line.schedule}: {line.ranks} ranks{several}, {line.micro_batches} micro-batches, "
        f"bubble {line.bubble:.1%} of the time"
    )


def lines(line: Timeline) -> list[str]:
    """For the terminal: one row a rank, with its share of idle time and the most activations it holds."""
    unit = min(block.end - block.start for row in line.blocks for block in row if block.end > block.start)
    shares = {round((block.end - block.start) / unit, 6) for row in line.blocks for block in row}
    cell = 1 + len(str(line.micro_batches - 1)) + (line.stages > line.ranks)
    even = all(share == int(share) for share in shares)
    wide = even and cell * round(line.span / unit) <= COLUMNS
    out = [summary(line), ""]
    for rank in range(line.ranks):
        drawn = _cells(line, rank, unit, cell) if wide else _shades(line, rank)
        out.append(f"rank {rank:<3} {drawn}  waits {line.idle(rank):5.1%}, holds {line.peaks[rank]:g}")
    used = {block.kind for row in line.blocks for block in row}
    legend = ", ".join(f"{kind} {text}" for kind, text in KINDS.items() if kind in used)
    numbers = ", with its micro-batch" + (" and its stage on the rank (a, b, ...)" if line.stages > line.ranks else "")
    out += ["", f"{legend}{numbers if wide else ''}; . waits; holds: activations of so many micro-batches at most"]
    return out


def _cells(line: Timeline, rank: int, unit: float, cell: int) -> str:
    columns = [".".ljust(cell)] * round(line.span / unit)
    for block in line.blocks[rank]:
        turn = _turn(line, rank, block.stage)
        text = f"{block.kind}{block.micro_batch}" + ("abcdefghijklmnop"[turn % 16] if line.stages > line.ranks else "")
        first, end = round(block.start / unit), round(block.end / unit)
        columns[first:end] = [text.ljust(cell), *["-" * (cell - 1) + " "] * (end - first - 1)]
    return " ".join(column.rstrip().ljust(cell) for column in columns).rstrip()


def _shades(line: Timeline, rank: int) -> str:
    out, scale = ["."] * COLUMNS, COLUMNS / line.span
    for block in line.blocks[rank]:
        first, end = (math.ceil(time * scale - 0.5) for time in (block.start, block.end))
        out[first:end] = block.kind * (end - first)
    return "".join(out)


def _turn(line: Timeline, rank: int, stage: int) -> int:
    """Which of the rank's stages it is, from 0."""
    return sorted({block.stage for block in line.blocks[rank]}).index(stage)


def drawing(many: list[Timeline]) -> str:
    """Several schedules below each other, all to the scale of the longest.

    Returns:
        an SVG document with its own white ground.
    """
    span = max(line.span for line in many)
    scale = (WIDTH - LEFT - 190) / span
    heights = [TOP + ROW * line.ranks + 14 for line in many]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {sum(heights) + 26}" role="img" '
        f'aria-label="{html.escape("; ".join(summary(line) for line in many))}">',
        "<style>text{font-family:system-ui,'Segoe UI',Helvetica,Arial,sans-serif;font-size:12px;fill:#5d6875}"
        ".title{font-size:14px;font-weight:600;fill:#1b2027}.n{font-size:10.5px;fill:#fff;text-anchor:middle}</style>",
        f'<rect width="{WIDTH}" height="{sum(heights) + 26}" fill="#fff"/>',
    ]
    top = 0
    for line, height in zip(many, heights, strict=True):
        out += _panel(line, top, scale)
        top += height
    x = float(LEFT)
    for kind in [k for k in KINDS if any(b.kind == k for line in many for row in line.blocks for b in row)]:
        out.append(f'<rect x="{x:g}" y="{top}" width="14" height="14" rx="2" fill="{COLOUR[kind]}"/>')
        out.append(f'<text x="{x + 20:g}" y="{top + 12}">{KINDS[kind]}</text>')
        x += 46 + 6.6 * len(KINDS[kind])
    return "\n".join([*out, "</svg>"]) + "\n"


def _panel(line: Timeline, top: int, scale: float) -> list[str]:
    out = [f'<text class="title" x="{LEFT}" y="{top + 28}">{html.escape(summary(line))}</text>']
    right = LEFT + line.span * scale + 12
    out.append(f'<text x="{right:.1f}" y="{top + TOP - 8}">waits</text>')
    out.append(f'<text x="{right + 56:.1f}" y="{top + TOP - 8}">holds at most</text>')
    turns = line.stages // line.ranks
    for rank, row in enumerate(line.blocks):
        y = top + TOP + ROW * rank
        out.append(f'<text x="12" y="{y + 18}">rank {rank}</text>')
        out.append(
            f'<rect x="{LEFT}" y="{y}" width="{line.span * scale:.2f}" height="{ROW - 5}" fill="#eef0f3" rx="2"/>'
        )
        for b in row:
            x, width = LEFT + b.start * scale, (b.end - b.start) * scale
            opacity = 1 - 0.38 * _turn(line, rank, b.stage) / max(turns - 1, 1)
            told = f"{KINDS[b.kind]}, micro-batch {b.micro_batch}, stage {b.stage}: {b.start:g} to {b.end:g}"
            out.append(
                f'<rect x="{x + 0.5:.2f}" y="{y}" width="{max(width - 1, 0.5):.2f}" height="{ROW - 5}" rx="2" '
                f'fill="{COLOUR[b.kind]}" fill-opacity="{opacity:.2f}"><title>{told}</title></rect>'
            )
            if width > 7 * len(str(b.micro_batch)) + 2:
                out.append(f'<text class="n" x="{x + width / 2:.2f}" y="{y + 16}">{b.micro_batch}</text>')
        out.append(f'<text x="{right:.1f}" y="{y + 17}">{line.idle(rank):.1%}</text>')
        many = "micro-batch" if line.peaks[rank] == 1 else "micro-batches"
        out.append(f'<text x="{right + 56:.1f}" y="{y + 17}">{line.peaks[rank]:g} {many}</text>')
    return out


def page(many: list[Timeline]) -> str:
    """A page with the picture and its numbers."""
    from castalia.tools.page import heading, render, table

    rows = [
        f"<tr><th>{html.escape(line.schedule)}</th><td>{line.ranks}</td><td>{line.stages}</td>"
        f"<td>{line.micro_batches}</td><td>{line.span:g}</td><td>{line.bubble:.2%}</td>"
        f"<td>{', '.join(f'{peak:g}' for peak in line.peaks)}</td></tr>"
        for line in many
    ]
    head = "".join(
        f"<th>{name}</th>"
        for name in ("schedule", "ranks", "stages", "micro-batches", "time", "bubble", "activations held, by rank")
    )
    said = "played from the tables that torch.distributed.pipelining executes; a number is a micro-batch"
    body = heading("Pipeline", said) + f'<div class="card scroll">{drawing(many)}</div><h2>Numbers</h2>'
    return render("Pipeline", body + table(head, rows))
