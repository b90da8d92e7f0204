"""Figures: curves and confusion matrices, and what all pictures are drawn on and written with; no display needed.

matplotlib is imported on first use and only through figure objects with the Agg canvas, so nothing here touches
pyplot's global state or a caller's backend.
"""
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ewa3d.files import atomic_write

__all__ = ['INK', 'MUTED', 'PALETTE', 'as_numpy', 'draw_confusion', 'draw_curves', 'new_figure', 'save_figure',
           'write_heading']

INK, MUTED = '#23272f', '#8a919c'
# Twelve colours that stay apart in print and for most colour-blind readers; more labels repeat them.
PALETTE = ('#3a6ea5', '#e07b39', '#1f8a70', '#d1495b', '#7b5ea7', '#d4a017', '#4aa8c0', '#8c564b', '#6b8e23', '#c770a8',
           '#5b6c8f', '#b35c1e')
NO_DATE = {'.png': 'Software', '.svg': 'Date', '.pdf': 'CreationDate'}  # suffix → what changes from file to file


def draw_curves(panels: Mapping[str, Mapping], path, *, xlabel: str = 'epoch', heading: str = '',
                columns: int = 4) -> Path:
    """Line plots side by side, so many ``columns`` in a row, as a PNG, SVG or PDF.

    Args:
        panels: what the y axis shows → name of a curve → ``y`` values, or a pair ``(x, y)``. Non-finite values leave
            a gap. A name has the same colour in every panel.

    Raises:
        ValueError: nothing to draw, or another suffix.
    """
    if not panels or not all(panels.values()):
        raise ValueError('panels is empty or has a panel without curves; expected {"loss": {"run": values}}')
    from matplotlib.ticker import MaxNLocator
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    tint = dict(zip(names, (PALETTE[i % len(PALETTE)] for i in range(len(names)))))
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.4 * columns, 3.2 * rows)
    for i, (ylabel, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for name, values in curves.items():
            x, y = _curve(values, f'panels[{ylabel!r}][{name!r}]')
            marker = 'o' if len(x) < 25 else ''
            axes.plot(x, y, color=tint[name], label=name, linewidth=1.8, marker=marker, markersize=3)
        axes.set_xlabel(xlabel, color=INK)
        axes.set_ylabel(ylabel, color=INK)
        if all(float(x).is_integer() for line in axes.lines for x in line.get_xdata()):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color='#e4e7eb', linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[['top', 'right']].set_visible(False)
        axes.spines[['left', 'bottom']].set_color(MUTED)
        axes.tick_params(colors=MUTED, labelcolor=INK)
        axes.legend(frameon=False, fontsize='medium' if len(curves) < 5 else 'x-small')
    if heading:
        figure.suptitle(heading, color=INK, weight='bold')
    _plain_text(figure).tight_layout()
    return save_figure(figure, path)


def draw_confusion(matrix, classes: Sequence[str], path, *, heading: str = '') -> Path:
    """A confusion matrix of counts, rows the truth, columns the prediction, shaded by the share of its row.

    Args:
        path: where to, ``*.png``, ``*.svg`` or ``*.pdf``.

    Shape:
        - matrix: ``(K, K)`` non-negative counts, with ``K = len(classes)``.

    Raises:
        ValueError: another shape, entries that are no counts, or another suffix.
    """
    counts = as_numpy(matrix)
    size = len(classes)
    if counts.shape != (size, size) or size == 0:
        raise ValueError(f'matrix has shape {counts.shape}; expected {(size, size)} for {size} classes')
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError('matrix has negative or non-finite entries; expected counts')
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    inches = max(3.2, 1.6 + 0.42 * size)
    figure = new_figure(inches, inches)
    axes = figure.add_subplot()
    axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
    if size <= 25:  # beyond that the numbers do not fit into the cells
        for i, j in zip(*np.nonzero(counts)):
            axes.text(j, i, f'{counts[i, j]:g}', ha='center', va='center', fontsize=7.5,
                      color='white' if share[i, j] > 0.55 else INK)
    axes.set_xticks(range(size), classes, rotation=45, ha='right', rotation_mode='anchor')
    axes.set_yticks(range(size), classes)
    axes.set_xlabel('predicted', color=INK)
    axes.set_ylabel('true', color=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=INK, labelsize=9 if size <= 25 else 6)
    axes.set_title(heading, color=INK, weight='bold')
    _plain_text(figure).tight_layout()
    return save_figure(figure, path)


def _curve(values, name: str) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(values, tuple) and len(values) == 2:
        x, y = (as_numpy(v).astype(np.float64) for v in values)
    else:
        y = as_numpy(values).astype(np.float64)
        x = np.arange(1, len(y) + 1) if y.ndim == 1 else y
    if y.ndim != 1 or x.shape != y.shape or len(y) == 0:
        raise ValueError(f'{name} has x {x.shape} and y {y.shape}; expected two non-empty lists of the same length')
    return x, y


def as_numpy(value) -> np.ndarray:
    """An array of what may be a tensor on any device."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def new_figure(width: float, height: float):
    """A figure of this size in inches, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), facecolor='white')
    FigureCanvasAgg(figure)
    return figure


def write_heading(figure, text: str, width: float, height: float) -> None:
    """In bold at the top, as large as fits into the width in inches."""
    size = min(12., 105 * width / len(text))
    figure.text(0.5, 1 - 0.15 / height, text, ha='center', va='top', fontsize=size, color=INK, weight='bold')


def _plain_text(figure):
    """``figure`` with every text drawn as it is written: a ``$`` in a class name begins no formula."""
    from matplotlib.text import Text
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def save_figure(figure, path) -> Path:
    """Write a figure; the same one gives the same file.

    Raises:
        ValueError: a suffix that is none of a picture.
    """
    path = Path(path)
    if path.suffix.lower() not in NO_DATE:
        raise ValueError(f'{path}: expected a file name that ends in {", ".join(NO_DATE)}')
    buffer, kind = io.BytesIO(), path.suffix.lower()
    # without the metadata, the same PNG has the same bytes
    _plain_text(figure).savefig(buffer, format=kind[1:], dpi=130, metadata={NO_DATE[kind]: None})
    return atomic_write(path, buffer.getvalue())
