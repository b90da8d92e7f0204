"""Point clouds to turn and zoom: in a page, one HTML file with all that it needs, or in a window of open3d."""
import base64
import html
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ewa3d.datasets.io import import_open3d
from ewa3d.files import atomic_write
from ewa3d.registry import nearest
from ewa3d.visualization import PLAIN, UP_AXES, cloud_array, listed, per_cloud, point_colors

__all__ = ['show_clouds', 'write_html']


def write_html(clouds: Sequence, path, *, titles: Sequence[str] | None = None, colors: Sequence | None = None,
               columns: int = 3, heading: str = '', up: str = 'z', legend: Mapping[str, str] | None = None) -> Path:
    """A grid of point clouds as an interactive page; dragging turns all of them together, the wheel zooms.

    Args:
        clouds, titles, colors, up, legend: as in :func:`ewa3d.visualization.draw_clouds`.
        columns: of the grid.

    Raises:
        ValueError: no cloud, an empty one, coordinates that are not finite, lists of different lengths, another axis.
    """
    if up not in UP_AXES:
        raise ValueError(f'up = {up!r}; {nearest(up, UP_AXES)}')
    if columns < 1:
        raise ValueError(f'columns = {columns}; expected a positive number')
    arrays = [cloud_array(cloud, f'clouds[{i}]') for i, cloud in enumerate(listed(clouds, 'clouds'))]
    titles = per_cloud(titles, len(arrays), '', 'titles')
    colors = per_cloud(colors, len(arrays), PLAIN, 'colors')
    figures = [_figure(points, point_colors(color, len(points), f'colors[{i}]'), title, up)
               for i, (points, color, title) in enumerate(zip(arrays, colors, titles))]
    marks = ' '.join(f'<span style="color: {html.escape(color)}">■ {html.escape(name)}</span>'
                     for name, color in (legend or {}).items())
    return atomic_write(path, PAGE.format(heading=html.escape(heading), columns=columns, figures='\n'.join(figures),
                                          legend=f'<p>{marks}</p>\n' if marks else '', script=SCRIPT))


def show_clouds(clouds: Sequence, colors: Sequence | None = None, heading: str = '') -> None:
    """Clouds side by side in a window of open3d, until it is closed.

    Args:
        clouds: ``(N_i, 3 + F)``. colors: as in :func:`ewa3d.visualization.draw_clouds`. heading: of the window.

    Raises:
        ImportError: open3d is not there. OSError: there is no display.
    """
    o3d = import_open3d()
    if sys.platform == 'linux' and not (os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')):
        raise OSError('a window needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set')
    arrays = [cloud_array(cloud, f'clouds[{i}]') for i, cloud in enumerate(listed(clouds, 'clouds'))]
    shown, right = [], 0.
    for i, (points, color) in enumerate(zip(arrays, per_cloud(colors, len(arrays), PLAIN, 'colors'))):
        low, high = points.min(0), points.max(0)
        made = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points - low + (right, 0, 0)))
        made.colors = o3d.utility.Vector3dVector(point_colors(color, len(points), f'colors[{i}]'))
        shown.append(made)
        right += 1.2 * float(high[0] - low[0])
    o3d.visualization.draw_geometries(shown, window_name=heading or 'ewa3d')


def _figure(points: np.ndarray, rgb: np.ndarray, title: str, up: str) -> str:
    points = points[:, list(UP_AXES[up])]  # z is up now
    low, high = points.min(0), points.max(0)
    radius = max(float(np.linalg.norm(points - (low + high) / 2, axis=1).max()), 1e-12)
    placed = np.rint((points - (low + high) / 2) / radius * 32767).astype('<i2')
    packed = (base64.b64encode(array.tobytes()).decode('ascii')
              for array in (placed, np.rint(rgb * 255).astype(np.uint8)))
    return '<figure><canvas data-points="{}" data-colors="{}"></canvas><figcaption>{}</figcaption></figure>'.format(
        *packed, html.escape(title))


PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{heading}</title>
<style>
body {{ font: 14px system-ui, sans-serif; color: #23272f; margin: 1.5em; }}
.grid {{ display: grid; grid-template-columns: repeat({columns}, minmax(0, 1fr)); gap: 8px; max-width: 1200px; }}
figure {{ margin: 0; text-align: center; }}
canvas {{ width: 100%; aspect-ratio: 1; cursor: grab; touch-action: none; background: #f7f8fa; border-radius: 6px; }}
figcaption {{ padding: 4px; }}
</style></head>
<body><h1>{heading}</h1><p>Drag to turn, wheel to zoom.</p>
{legend}<div class="grid">
{figures}
</div>
<script>{script}</script></body></html>
"""

SCRIPT = """
'use strict';
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const view = {azimuth: 0.7, elevation: 0.38, zoom: 0.9};
const clouds = Array.from(document.querySelectorAll('canvas'), canvas => {
  const points = new Int16Array(bytes(canvas.dataset.points).buffer);
  const colors = bytes(canvas.dataset.colors);
  const count = points.length / 3;
  const order = Uint32Array.from({length: count}, (_, i) => i);
  return {canvas, points, colors, count, order, depth: new Float32Array(count)};
});

function draw({canvas, points, colors, count, depth, order}) {
  const size = canvas.width = canvas.height = canvas.clientWidth * (window.devicePixelRatio || 1);
  const context = canvas.getContext('2d');
  const [ca, sa] = [Math.cos(view.azimuth), Math.sin(view.azimuth)];
  const [ce, se] = [Math.cos(view.elevation), Math.sin(view.elevation)];
  const scale = size / 2 * view.zoom;
  const x = new Float32Array(count), y = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const [px, py, pz] = [points[3 * i] / 32767, points[3 * i + 1] / 32767, points[3 * i + 2] / 32767];
    const toward = px * ca + py * sa;
    x[i] = -px * sa + py * ca;
    y[i] = pz * ce - toward * se;
    depth[i] = toward * ce + pz * se;
  }
  order.sort((a, b) => depth[a] - depth[b]);
  context.clearRect(0, 0, size, size);
  const dot = Math.max(1.5, size * Math.min(0.02, 0.6 / Math.sqrt(count)) * Math.sqrt(view.zoom));
  for (const i of order) {
    const fade = 0.55 * Math.min(1, Math.max(0, 0.5 - depth[i] / 2));
    const mix = channel => Math.round(channel + (247 - channel) * fade);
    context.fillStyle = `rgb(${mix(colors[3 * i])},${mix(colors[3 * i + 1])},${mix(colors[3 * i + 2])})`;
    context.fillRect(size / 2 + scale * x[i] - dot / 2, size / 2 - scale * y[i] - dot / 2, dot, dot);
  }
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; clouds.forEach(draw); });
}
for (const {canvas} of clouds) {
  canvas.addEventListener('pointerdown', event => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener('pointermove', event => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    view.azimuth -= event.movementX * 0.01;
    view.elevation = Math.min(1.57, Math.max(-1.57, view.elevation + event.movementY * 0.01));
    redraw();
  });
  canvas.addEventListener('wheel', event => {
    event.preventDefault();
    view.zoom = Math.min(8, Math.max(0.2, view.zoom * Math.exp(-event.deltaY * 0.001)));
    redraw();
  }, {passive: false});
}
window.addEventListener('resize', redraw);
redraw();
"""
