"""The look of a report: style sheet, the read-out's script, and the frame around the body.

Everything is inside the page and nothing is fetched: system fonts, colours as CSS
variables with a light and a dark set (paper takes the light one), charts switched between
step, tokens, time and FLOPs, averaged or not, by radio buttons and CSS alone. The one script
adds the read-out under the pointer; without it the page is complete.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from castalia.tools.plots import COLOURS

# Eight hues that keep apart for the common forms of colour blindness (after Okabe & Ito 2008),
# darkened for white paper and lightened for the dark.
LIGHT = ("#2563c9", "#d9660a", "#0f8a5f", "#b0307e", "#7a5bd0", "#8a6d00", "#0a8ea8", "#5c6470")
_DARK = ("#7fb0ff", "#ffa45c", "#4fd1a0", "#f08bc6", "#b9a2ff", "#e0c35a", "#5ccfe6", "#aab3c0")


def _palette(colours: tuple[str, ...]) -> str:
    return "".join(f"--c{i}:{c};" for i, c in enumerate(colours))


# The x axes that charts may be drawn by; report_curves.AXES says of what.
_CHOICES = ("step", "tokens", "time", "FLOPs")
_STYLE = (
    (
        ":root{color-scheme:light dark;--paper:#f6f7f9;--card:#fff;--ink:#1b2027;--soft:#5d6875;"
        f"--line:#e1e5ea;--grid:#eceff3;--mark:#eef3fb;--alarm:#c22b2b;{_palette(LIGHT)}}}"
        "@media screen and (prefers-color-scheme:dark){:root{"
        "--paper:#12151a;--card:#1a1e25;--ink:#e6e9ee;--soft:#98a3b1;"
        f"--line:#2c323b;--grid:#262b33;--mark:#212a38;--alarm:#ff7b72;{_palette(_DARK)}}}}}"
    )
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1140px;margin:0 auto;padding:36px 24px 56px}
h1{font-size:28px;line-height:1.2;letter-spacing:-.015em;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;letter-spacing:-.005em;margin:36px 0 12px}
h3{font-size:14px;margin:0;font-weight:600}
.unit,.soft{color:var(--soft);font-weight:400}
.soft{margin:0 0 22px}
footer{color:var(--soft);font-size:13px;margin-top:40px;border-top:1px solid var(--line);padding-top:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.facts{display:grid;grid-template-columns:repeat(4,1fr);gap:12px;margin:0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:12px 16px}
.facts dt{color:var(--soft);font-size:13px}
.facts dd{margin:2px 0 0;font-size:22px;font-weight:600;letter-spacing:-.01em;
font-variant-numeric:tabular-nums}
.facts dd small{display:block;font-size:12.5px;font-weight:400;color:var(--soft);letter-spacing:0}
.scroll{overflow-x:auto;padding:0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:8px 16px;text-align:left;border-top:1px solid var(--line);vertical-align:top}
thead th{border-top:0;color:var(--soft);font-weight:500;font-size:13px;white-space:nowrap}
tbody th{font-weight:500} th b{font-weight:700}
td.n,th.n{text-align:right;white-space:nowrap}
td.wide{width:40%;min-width:180px;vertical-align:middle}
.bar{display:block;height:10px;border-radius:3px;background:var(--soft);opacity:.55}
.bar.own{background:var(--c0);opacity:1}
td{overflow-wrap:anywhere}tbody th{overflow-wrap:break-word}
.runs th:first-child{min-width:7em;padding-left:16px}.diff th:first-child{min-width:9em}
.diff thead th{white-space:normal;min-width:7em}
.runs th,.runs td{padding:8px 9px}.runs .steps{white-space:nowrap}.runs small{white-space:normal}
.remarks{margin:10px 0 0;padding-left:18px;font-size:13px}
th.group{color:var(--soft);font-weight:500;font-size:13px;background:var(--paper)}
.best{font-weight:700}
td small{display:block;color:var(--soft);font-size:12px}
.dot{display:inline-block;width:10px;height:10px;border-radius:50%;background:var(--c);margin-right:8px}
.charts{display:grid;grid-template-columns:1fr 1fr;gap:14px}
.charts .whole{grid-column:1/-1}
.chart{margin:0}
.chart figcaption{display:flex;flex-wrap:wrap;gap:4px 18px;align-items:baseline;margin-bottom:6px}
.chart svg{display:block;width:100%;height:auto;overflow:visible}
.plot{position:relative}
.grid{stroke:var(--grid)} .axis{stroke:var(--soft);opacity:.6}
.tick,.label{font-size:11.5px;fill:var(--soft);font-variant-numeric:tabular-nums}
.curve path{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
.curve circle,.cursor circle{fill:var(--c);stroke:var(--card);stroke-width:1.2}
.curve.faint path{stroke-width:1;opacity:.4}
.band path{fill:var(--c);opacity:.14}
.mark{fill:var(--c);stroke:var(--card);stroke-width:.8}
.mark.spike{fill:var(--alarm)} .legend .spike b{color:var(--alarm)}
.curve.dashed path{stroke-dasharray:5 3.5;stroke-linecap:butt}
.cursor line{stroke:var(--soft);opacity:.7}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;margin:0;padding:0;
font-size:12.5px;color:var(--soft)}
.legend i{display:inline-block;width:18px;border-top:2.5px solid var(--c);
vertical-align:middle;margin-right:6px}
.legend .dashed i{border-top-style:dashed}
.legend .dot{width:10px;border:0;vertical-align:0}
.legend b{font-weight:400;margin-right:6px}
.readout{position:absolute;pointer-events:none;top:6px;background:var(--card);border:1px solid var(--line);
border-radius:7px;padding:6px 10px;
font-size:12.5px;line-height:1.45;white-space:nowrap;
z-index:1;
box-shadow:0 3px 14px #0002;font-variant-numeric:tabular-nums}
.readout b{font-weight:600} .readout span{float:right;margin-left:18px;font-weight:600}
.switches{display:flex;flex-wrap:wrap;align-items:center;gap:8px 14px;padding:8px 0;margin:0 0 4px;
position:sticky;top:0;z-index:2;background:var(--paper)}
.switch{display:inline-flex;border:1px solid var(--line);border-radius:8px;overflow:hidden;
background:var(--card);font-size:13px}
.switch label{padding:4px 14px;cursor:pointer;color:var(--soft)}
.switch label+label{border-left:1px solid var(--line)}
.axes{position:relative} .axes>input{position:absolute;opacity:0}
.by{display:none}
"""
    + "".join(f"#by-{a}:checked~.charts .by-{a}{{display:block}}\n" for a in _CHOICES)
    + ",".join(f"#{c}:checked~.switches [for={c}]" for c in (*(f"by-{a}" for a in _CHOICES), "averaged", "raw"))
    + """{background:var(--mark);color:var(--ink);font-weight:600}
#raw:checked~.charts .mean{display:none}
#raw:checked~.charts .faint path{opacity:1;stroke-width:1.2}
.axes>input:focus-visible~.switches{outline:2px solid var(--c0)}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;
font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.samples{display:grid;gap:12px}
.samples b{background:var(--mark);font-weight:600}
.samples p{margin:0 0 6px;font-size:13px;color:var(--soft)}
details{margin-top:12px} summary{cursor:pointer;font-weight:600} details[open] summary{margin-bottom:10px}
@media screen and (max-width:800px){main{padding:22px 14px}.charts{grid-template-columns:1fr}
.facts{grid-template-columns:1fr 1fr}.whole .plot{overflow-x:auto}.whole svg{min-width:760px}}
@media print{body{background:#fff;font-size:12px}main{max-width:none;padding:0}
.switch,.readout{display:none}.switches{position:static}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.card,.facts div,tr,.chart{break-inside:avoid}h2,summary{break-after:avoid}details.card{break-inside:auto}
.facts dd{font-size:17px}table{font-size:10px}.runs th,.runs td,th,td{padding:4px 6px}
thead th,td small{font-size:9px;white-space:normal}
.charts{gap:8px}.card{padding:8px 10px}.scroll{padding:0;overflow:visible}
.switches{background:none;padding:0}}
"""
)

_SCRIPT = """
for (const figure of document.querySelectorAll('.chart')) {
  const data = JSON.parse(figure.querySelector('script').textContent);
  const svg = figure.querySelector('svg'), cursor = svg.querySelector('.cursor');
  const readout = figure.querySelector('.readout'), [left, right, top, bottom] = data.box;
  const f = data.log ? Math.log : v => v;
  const px = x => left + (x - data.x[0]) / (data.x[1] - data.x[0]) * (right - left);
  const py = y => bottom + (f(y) - f(data.y[0])) / (f(data.y[1]) - f(data.y[0])) * (top - bottom);
  const nearest = (xs, x) => {
    let a = 0, b = xs.length - 1;
    while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] < x) a = m; else b = m; }
    return Math.abs(xs[a] - x) <= Math.abs(xs[b] - x) ? a : b;
  };
  const number = v => Math.abs(v) >= 1000 ? Math.round(v).toLocaleString('en')
    : v && Math.abs(v) < 1e-3 ? v.toExponential(3) : String(+v.toPrecision(5));
  const hide = () => { cursor.replaceChildren(); readout.hidden = true; };
  const make = (name, set) => {
    const e = document.createElementNS('http://www.w3.org/2000/svg', name);
    for (const key in set) e.setAttribute(key, set[key]);
    return e;
  };
  const raw = document.getElementById('raw');
  svg.addEventListener('pointerleave', hide);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), zoom = svg.viewBox.baseVal.width / box.width;
    const at = (event.clientX - box.left) * zoom;
    if (at < left - 6 || at > right + 6) return hide();
    const wanted = data.x[0] + (at - left) / (right - left) * (data.x[1] - data.x[0]);
    // A curve that has ended, or not begun, says nothing here.
    const slack = (data.x[1] - data.x[0]) / 100;
    const unseen = raw && raw.checked ? 'mean' : 'faint';
    const found = data.series.filter(s => s.style !== unseen)
      .filter(s => wanted >= s.x[0] - slack && wanted <= s.x[s.x.length - 1] + slack)
      .map(s => [s, nearest(s.x, wanted)]);
    if (!found.length) return hide();
    // The line stands on a measured point: the one nearest to the pointer.
    const away = v => Math.abs(v - wanted);
    const x = found.map(([s, i]) => s.x[i]).reduce((a, b) => away(b) < away(a) ? b : a);
    cursor.replaceChildren(make('line', {x1: px(x), x2: px(x), y1: top, y2: bottom}));
    const rows = [document.createElement('div')];
    rows[0].textContent = data.unit + ' ' + number(x);
    for (const [s, i] of found) {
      const colour = '--c:var(--c' + s.colour + ')', row = document.createElement('div');
      cursor.append(make('circle', {cx: px(s.x[i]), cy: py(s.y[i]), r: 3.5, style: colour}));
      const dot = document.createElement('i'), value = document.createElement('span');
      dot.className = 'dot'; dot.style.cssText = colour;
      value.textContent = number(s.y[i]);
      row.append(dot, s.label, value);
      rows.push(row);
    }
    readout.replaceChildren(...rows);
    readout.hidden = false;
    const place = px(x) / zoom, flip = place > box.width / 2;
    readout.style.left = flip ? 'auto' : place + 12 + 'px';
    readout.style.right = flip ? box.width - place + 12 + 'px' : 'auto';
  });
}
"""


def text(value: Any) -> str:
    """Any value as text that is safe inside HTML."""
    return html.escape(str(value))


def heading(title: str, line: str) -> str:
    """The page's title and the line below it."""
    return f'<h1>{text(title)}</h1><p class="soft">{text(line)}</p>'


def table(head: str, rows: Sequence[str]) -> str:
    """A table of rows whose cells are HTML already; `head` is the heading's cells, or empty."""
    thead = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table>{thead}<tbody>{body}</tbody></table>"


def folded(title: str, body: str) -> str:
    """A section that opens on a click."""
    return f'<details class="card"><summary>{text(title)}</summary>{body}</details>'


def dot(colour: int) -> str:
    """A dot in a curve's colour, in front of the name of its run."""
    return f'<i class="dot" style="--c:var(--c{colour % COLOURS})"></i>'


def render(title: str, body: str) -> str:
    """A whole HTML page around `body`, which is HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # An empty icon: otherwise a browser asks the server for one.
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main>\n<script>{_SCRIPT}</script></body></html>\n"
    )
