"""Charts as text: line plots in SVG and confusion matrices in HTML, for pages that load nothing and need no script.

They take milliseconds and a few kilobytes, so every run can have a page with them.
"""
import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from ewa3d.figures import INK, MUTED, PALETTE

__all__ = ['STYLE', 'confusion_table', 'line_chart', 'line_charts', 'page', 'table']

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 260, 58, 12, 14, 40
MAX_POINTS = 400  # of a curve: more are thinned
MAX_CLASSES, MAX_NUMBERS = 60, 25  # of a matrix that is drawn, and of one whose counts are written into it

STYLE = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; margin: 2em auto; max-width: 1360px; padding: 0 1em; }}
h1 {{ font-size: 1.5em; margin-bottom: 0; }} h2 {{ font-size: 1.15em; margin-top: 1.8em; }}
.muted {{ color: {MUTED}; }} .charts {{ display: flex; flex-wrap: wrap; gap: 12px 24px; }}
figure {{ margin: 0; }} figcaption {{ font-weight: 600; }} svg text {{ font: 11px system-ui, sans-serif; fill: {INK}; }}
table {{ border-collapse: collapse; }} td, th {{ padding: 2px 10px; text-align: left; }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; }} tr + tr td {{ border-top: 1px solid #e4e7eb; }}
table.matrix td {{ text-align: center; padding: 2px 4px; font-size: 12px; min-width: 1.6em; border: 1px solid white; }}
table.matrix th {{ font-weight: 400; font-size: 12px; white-space: nowrap; padding: 2px 6px; }}
table.matrix thead th {{ writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; }}
pre {{ background: #f7f8fa; padding: 10px; white-space: pre-wrap; font-size: 12.5px; border-radius: 6px; }}
img {{ max-width: 100%; }} summary {{ cursor: pointer; font-weight: 600; margin: 0.6em 0; }}
.legend span {{ margin-right: 1em; white-space: nowrap; font-size: 12px; }}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document; nothing in it is loaded from elsewhere."""
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-'
            f'width"><link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{STYLE}</style></head>\n'
            f'<body>\n{body}\n</body></html>\n')


def table(rows: Sequence[Sequence], head: Sequence[str] = ()) -> str:
    """Rows as an HTML table; numbers are set to the right, with four digits where they are not whole."""
    def cell(tag: str, value) -> str:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        text = f'{value:.4g}' if isinstance(value, float) and abs(value) < 1 else f'{value:.2f}' \
            if isinstance(value, float) else '' if value is None else str(value)
        return f'<{tag}{" class=n" if number else ""}>{html.escape(text)}</{tag}>'
    first = f'<thead><tr>{"".join(cell("th", name) for name in head)}</tr></thead>' if head else ''
    lines = '\n'.join(f'<tr>{"".join(cell("td", value) for value in row)}</tr>' for row in rows)
    return f'<table>{first}<tbody>\n{lines}\n</tbody></table>'


def line_charts(panels: Mapping[str, Mapping], xlabel: str = 'epoch') -> str:
    """A chart for each panel, see :func:`ewa3d.visualization.draw_curves`; a name has one colour in all of them."""
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    tint = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    charts = '\n'.join(line_chart(curves, title, xlabel, tint) for title, curves in panels.items())
    return f'<div class="charts">\n{charts}\n</div>'


def line_chart(curves: Mapping, title: str, xlabel: str = 'epoch', tint: Mapping[str, str] | None = None) -> str:
    """Lines as SVG; the mouse over a point tells its name and value.

    Args:
        curves: name → ``(x, y)``, finite or not (those leave a gap). tint: name → colour.
    """
    tint = tint or {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(curves)}
    drawn = {name: _thinned(*map(np.asarray, xy)) for name, xy in curves.items()}
    x = np.concatenate([xy[0] for xy in drawn.values()]).astype(float)
    y = np.concatenate([xy[1] for xy in drawn.values()]).astype(float)
    y = y[np.isfinite(y)]
    xs, ys = _ticks(x.min(), x.max(), whole=True), _ticks(*((y.min(), y.max()) if len(y) else (0., 1.)))
    low, high = (x.min(), ys[0]), (max(x.max(), xs[-1]), ys[-1])

    def px(value: float) -> float:
        return LEFT + (value - low[0]) / max(high[0] - low[0], 1e-12) * (WIDTH - LEFT - RIGHT)

    def py(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low[1]) / max(high[1] - low[1], 1e-12) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ys:
        parts.append(f'<path d="M{LEFT} {py(tick):.1f}H{WIDTH - RIGHT}" stroke="#e4e7eb"/>'
                     f'<text x="{LEFT - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in xs:
        parts.append(f'<text x="{px(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(xlabel)}'
                 '</text>')
    for name, (xv, yv) in drawn.items():
        label = html.escape(name)
        good = np.isfinite(yv.astype(float))
        path = ''.join(f'{"L" if i and good[i - 1] else "M"}{px(a):.1f} {py(b):.1f}'
                       for i, (a, b) in enumerate(zip(xv, yv)) if good[i])
        parts.append(f'<path d="{path}" fill="none" stroke="{tint[name]}" stroke-width="1.8"/>')
        small = 2.5 if len(xv) < 25 else 0
        parts += [f'<g><circle cx="{px(a):.1f}" cy="{py(b):.1f}" r="{small}" fill="{tint[name]}"/><circle '
                  f'cx="{px(a):.1f}" cy="{py(b):.1f}" r="6" fill="transparent"><title>{label}: {b:.5g} '
                  f'({html.escape(xlabel)} {a:g})</title></circle></g>'
                  for i, (a, b) in enumerate(zip(xv, yv)) if good[i]]
    key = ''.join(f'<span><span style="color:{tint[name]};margin:0">●</span> {html.escape(name)}</span>'
                  for name in drawn)
    return (f'<figure style="max-width:{WIDTH}px"><figcaption>{html.escape(title)}</figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(parts)}</svg>'
            f'<div class="legend">{key}</div></figure>')


def confusion_table(counts, classes: Sequence[str]) -> str:
    """Counts, rows the truth, as a table shaded by the share of the row, and the most frequent confusions.

    Shape:
        - counts: ``(K, K)`` with ``K = len(classes)``.

    Raises:
        ValueError: another shape.
    """
    counts = np.asarray(counts, dtype=np.int64)
    if counts.shape != (len(classes),) * 2 or not len(classes):
        raise ValueError(f'counts has shape {counts.shape}; expected {(len(classes),) * 2} for {len(classes)} classes')
    names = [html.escape(str(name)) for name in classes]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    wrong = counts * (1 - np.eye(len(classes), dtype=np.int64))
    worst = [(int(k // len(classes)), int(k % len(classes))) for k in np.argsort(-wrong, axis=None, kind='stable')[:10]]
    rows = [(str(classes[i]), str(classes[j]), int(wrong[i, j]), f'{100 * share[i, j]:.1f} %') for i, j in worst
            if wrong[i, j]]
    listed = table(rows, ('true', 'predicted', 'how often', 'of the class')) if rows else '<p>No confusion.</p>'
    if len(classes) > MAX_CLASSES:
        return listed
    body = []
    for i, name in enumerate(names):
        cells = (f'<td style="background:{_blue(share[i, j])};color:{"white" if share[i, j] > 0.55 else INK}" '
                 f'title="{name} as {names[j]}: {counts[i, j]}">'
                 f'{counts[i, j] if counts[i, j] and len(names) <= MAX_NUMBERS else ""}</td>'
                 for j in range(len(names)))
        body.append(f'<tr><th>{name}</th>{"".join(cells)}</tr>')
    head = ''.join(f'<th>{name}</th>' for name in names)
    return ('<p class="muted">Rows: truth; columns: prediction; shaded by the share of the row.</p>'
            f'<table class="matrix"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>\n'
            f'<h3>Most frequent confusions</h3>{listed}')


def _blue(share: float) -> str:
    """From white to a dark blue."""
    ends = ((250, 8), (252, 72), (255, 136))
    return '#' + ''.join(f'{round(a + (b - a) * float(share)):02x}' for a, b in ends)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    step = math.ceil(len(x) / MAX_POINTS)
    kept = np.unique([*range(0, len(x), step), len(x) - 1])
    return x[kept], y[kept]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to six round numbers that span the values."""
    if high <= low:
        low, high = (low - 0.5 * abs(low), low + 0.5 * abs(low)) if low and not whole else (low, low + 1)
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 2.5, 5, 10) if (high - low) / (k * step) <= 5)
    step = max(1, math.ceil(step)) if whole else step
    first = math.ceil(low / step - 1e-9) if whole else math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f'{k * step:.10g}') for k in range(first, max(last, first + 1) + 1) if not whole or k * step <= high]
