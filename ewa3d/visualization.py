"""Pictures of clouds, images and predictions as PNG, clouds as PLY; no display needed. Curves: :mod:`ewa3d.figures`.

Clouds are drawn by an own orthographic projection: rotate, sort by depth, scatter. That is quicker than a 3-D axis and
keeps the aspect equal. matplotlib is imported on first use and only through figure objects with the Agg canvas, so
nothing here touches pyplot's global state or a caller's backend.

Every writer returns the path, creates missing folders and replaces the file in one step: a reader sees the old file
or the new one, never half of one.
"""
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ewa3d.figures import (
    INK,
    PALETTE,
    as_numpy,
    draw_confusion,
    draw_curves,
    new_figure,
    save_figure,
    write_heading,
)
from ewa3d.files import atomic_write
from ewa3d.registry import nearest

__all__ = ['draw_clouds', 'draw_images', 'draw_predictions', 'draw_reconstructions', 'draw_curves',
           'draw_confusion', 'part_cells', 'write_ply', 'palette']

RIGHT, WRONG, PLAIN, MADE, GREY = '#1f8a70', '#d1495b', '#3a6ea5', '#e07b39', '#b9bec6'
UP_AXES = {'x': (1, 2, 0), 'y': (2, 0, 1), 'z': (0, 1, 2)}  # even permutations: no mirror image


def draw_clouds(clouds: Sequence, path, *, titles: Sequence[str] | None = None, colors: Sequence | None = None,
                title_colors: Sequence[str] | None = None, columns: int | None = None, heading: str = '',
                frames: Sequence | None = None, up: str = 'z', azimuth: float = 40., elevation: float = 22.,
                size: float = 2.2, legend: Mapping[str, str] | None = None) -> Path:
    """A grid of point clouds, each centred and scaled to its cell, as a PNG.

    Args:
        clouds: arrays or tensors ``(N_i, 3 + F)``; the first three columns are drawn.
        titles: a line below each cloud, its end left out where it is longer. title_colors: its colour.
        colors: by cloud, a colour for all points, or ``(N_i, 3)`` RGB in [0, 1] or uint8, or ``(N_i,)`` integer labels.
        columns: of the grid; by default as square as it gets, at most 8.
        frames: by cloud, the points that fill the cell; the cloud's own unless given. What is outside is cut off.
        up: the data's vertical axis, ``'x'``, ``'y'`` or ``'z'``.
        azimuth, elevation: degrees; where the viewer stands. size: inches of a cell.
        legend: what colours mean, name → colour, below the heading.

    Raises:
        ValueError: no cloud, an empty one, non-finite coordinates, or lists of different lengths.
    """
    arrays = [cloud_array(cloud, f'clouds[{i}]') for i, cloud in enumerate(listed(clouds, 'clouds'))]
    count = len(arrays)
    titles = per_cloud(titles, count, '', 'titles')
    title_colors = per_cloud(title_colors, count, INK, 'title_colors')
    colors = per_cloud(colors, count, PLAIN, 'colors')
    frames = arrays if frames is None else \
        [cloud_array(frame, f'frames[{i}]') for i, frame in enumerate(per_cloud(frames, count, None, 'frames'))]
    view = _view(up, azimuth, elevation)
    columns = columns or min(8, math.ceil(math.sqrt(count)))
    if columns < 1:
        raise ValueError(f'columns = {columns}; expected a positive number')
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    line = 0.30 if any(titles) else 0.0
    room = max(2, int(14 * size))  # letters of this size in a cell
    width = columns * size
    each = max(1, int(width / 1.2))  # entries of the legend in a line
    top = (0.45 if heading else 0.08) + 0.2 * math.ceil(len(legend or ()) / each)
    height = rows * (size + line) + top
    figure = new_figure(width, height)
    for i, points in enumerate(arrays):
        row, column = divmod(i, columns)
        bottom = height - top - (row + 1) * (size + line) + line
        axes = figure.add_axes((column * size / width, bottom / height, size / width, size / height))
        _scatter(axes, points @ view.T, point_colors(colors[i], len(points), f'colors[{i}]'), size, frames[i] @ view.T)
        if titles[i]:
            title = titles[i] if len(titles[i]) <= room else f'{titles[i][:room - 1]}…'
            figure.text((column + 0.5) * size / width, (bottom - 0.04) / height, title, color=title_colors[i],
                        ha='center', va='top', fontsize=9)
    if heading:
        write_heading(figure, heading, width, height)
    for i, (name, color) in enumerate((legend or {}).items()):
        row, column = divmod(i, each)
        figure.text((column + 0.5) / min(each, len(legend)), 1 - (0.2 * row + (0.42 if heading else 0.05)) / height,
                    f'■ {name}', ha='center', va='top', fontsize=9, color=color)
    return save_figure(figure, path)


def draw_images(images: Sequence, path, *, titles: Sequence[str] | None = None,
                title_colors: Sequence[str] | None = None, columns: int | None = None, heading: str = '',
                size: float = 1.8) -> Path:
    """A grid of images as a PNG; small ones are enlarged with sharp edges.

    Args:
        images: arrays ``(H, W, 3)`` in [0, 1] or uint8. titles, title_colors, columns, size: as in
            :func:`draw_clouds`.

    Raises:
        ValueError: no image, one of another shape or of values out of range, or lists of different lengths.
    """
    arrays = [as_numpy(image) for image in listed(images, 'images')]
    for i, array in enumerate(arrays):
        if array.ndim != 3 or array.shape[2] != 3 or not array.size:
            raise ValueError(f'images[{i}] has shape {array.shape}; expected (H, W, 3)')
        if array.dtype != np.uint8 and not ((array >= 0) & (array <= 1)).all():
            raise ValueError(f'images[{i}] has values outside [0, 1]; expected numbers in [0, 1], or uint8')
    count = len(arrays)
    titles, title_colors = per_cloud(titles, count, '', 'titles'), per_cloud(title_colors, count, INK, 'title_colors')
    columns = min(columns or min(8, math.ceil(math.sqrt(count))), count)
    rows, top, line = math.ceil(count / columns), 0.45 if heading else 0.08, 0.30 if any(titles) else 0.05
    width, height = columns * size, rows * (size + line) + top
    figure = new_figure(width, height)
    for i, array in enumerate(arrays):
        row, column = divmod(i, columns)
        bottom = height - top - (row + 1) * (size + line) + line
        axes = figure.add_axes(((column + 0.03) * size / width, bottom / height, 0.94 * size / width, size / height))
        axes.imshow(array, interpolation='nearest' if max(array.shape) < 130 * size else 'antialiased')
        axes.set_axis_off()
        figure.text((column + 0.5) * size / width, (bottom - 0.04) / height, titles[i], color=title_colors[i],
                    ha='center', va='top', fontsize=9)
    if heading:
        write_heading(figure, heading, width, height)
    return save_figure(figure, path)


def draw_predictions(clouds: Sequence, truth: Sequence[int], predicted: Sequence[int], classes: Sequence[str], path,
                     **kwargs) -> Path:
    """:func:`draw_clouds` with the predicted class below each cloud: right ones green, wrong ones red with the truth.

    Args:
        truth, predicted: class indices, one a cloud. classes: their names. kwargs: of :func:`draw_clouds`.

    Raises:
        ValueError: another number of labels than clouds, labels outside of the classes, and as :func:`draw_clouds`.
    """
    truth, predicted = _labels(truth, len(classes), 'truth'), _labels(predicted, len(classes), 'predicted')
    clouds = listed(clouds, 'clouds')
    if not len(clouds) == len(truth) == len(predicted):
        raise ValueError(f'{len(clouds)} clouds, {len(truth)} true and {len(predicted)} predicted labels; '
                         f'expected as many of each')
    right = [t == p for t, p in zip(truth, predicted)]
    titles = [f'✓ {classes[p]}' if ok else f'✗ {classes[p]}, is {classes[t]}'
              for t, p, ok in zip(truth, predicted, right)]
    marks = [RIGHT if ok else WRONG for ok in right]
    return draw_clouds(clouds, path, titles=titles, title_colors=marks,
                       **{'colors': [PLAIN if ok else WRONG for ok in right], **kwargs})


def draw_reconstructions(clouds: Sequence, reconstructed: Sequence, path, *, visible: Sequence | None = None,
                         titles: Sequence[str] | None = None, **kwargs) -> Path:
    """:func:`draw_clouds` with one row a cloud: as it is, what a model saw of it, what the model made of that.

    Args:
        clouds, reconstructed: arrays or tensors ``(N_i, 3 + F)`` and ``(M_i, 3)``, in the same coordinates.
        visible: ``(V_i, 3)``, drawn by itself and, in grey, with the reconstruction; without it there are two columns.
        titles: of the clouds. kwargs: of :func:`draw_clouds`.
    """
    clouds = listed(clouds, 'clouds')
    made = per_cloud(reconstructed, len(clouds), None, 'reconstructed')
    seen = per_cloud(visible, len(clouds), None, 'visible')
    titles = per_cloud(titles, len(clouds), 'input', 'titles')
    cells = []
    for i, cloud in enumerate(clouds):
        cloud, points = cloud_array(cloud, f'clouds[{i}]'), cloud_array(made[i], f'reconstructed[{i}]')
        cells.append((cloud, PLAIN, titles[i], cloud))
        rgb = np.tile(_rgb(MADE), (len(points), 1))
        if seen[i] is not None:
            behind = cloud_array(seen[i], f'visible[{i}]')
            cells.append((behind, PLAIN, 'visible', cloud))
            points = np.concatenate([points, behind])
            rgb = np.concatenate([rgb, np.tile(_rgb(GREY), (len(behind), 1))])
        cells.append((points, rgb, 'reconstructed', cloud))
    points, colors, names, frames = map(list, zip(*cells))
    return draw_clouds(points, path, **{'titles': names, 'colors': colors, 'frames': frames,
                                        'columns': len(cells) // len(clouds), **kwargs})


def part_cells(clouds: Sequence, truth: Sequence, predicted: Sequence, names: Sequence[str] | None = None) -> dict:
    """Keywords for :func:`draw_clouds` and :func:`ewa3d.viewer.write_html`: a row a cloud, with its true parts, the
    predicted ones, and where these are wrong (red).

    Args:
        clouds: ``(N_i, 3 + F)``. truth, predicted: ``(N_i,)`` part labels. names: of the clouds.

    Raises:
        ValueError: another number of labels than points.
    """
    clouds = listed(clouds, 'clouds')
    names = per_cloud(names, len(clouds), '', 'names')
    cells = []
    for i, (name, true, found) in enumerate(zip(names, per_cloud(truth, len(clouds), None, 'truth'),
                                                per_cloud(predicted, len(clouds), None, 'predicted'))):
        true, found = (as_numpy(labels).astype(np.int64) for labels in (true, found))
        if true.shape != found.shape:
            raise ValueError(f'clouds[{i}] has {true.shape} true and {found.shape} predicted labels; expected as many')
        errors = np.where((true == found)[:, None], _rgb(GREY), _rgb(WRONG))
        share = 100 * float((true != found).mean())
        cells += [(clouds[i], palette(true), name), (clouds[i], palette(found), 'predicted'),
                  (clouds[i], errors, f'{share:.1f} % wrong')]
    points, colors, titles = map(list, zip(*cells))
    return dict(clouds=points, colors=colors, titles=titles, columns=3)


def write_ply(path, points, colors=None) -> Path:
    """A cloud as a binary little-endian PLY file: x y z float32 and, with ``colors``, red green blue uint8.

    Shape:
        - points: ``(N, 3 + F)``; the first three columns are written.
        - colors: as in :func:`draw_clouds`, for this one cloud.
    """
    points = cloud_array(points, 'points')
    fields = [('x', '<f4'), ('y', '<f4'), ('z', '<f4')]
    if colors is not None:
        fields += [('red', 'u1'), ('green', 'u1'), ('blue', 'u1')]
    vertices = np.zeros(len(points), dtype=fields)
    for axis, name in enumerate('xyz'):
        vertices[name] = points[:, axis]
    if colors is not None:
        rgb = np.rint(point_colors(colors, len(points), 'colors') * 255).astype(np.uint8)
        for channel, name in enumerate(('red', 'green', 'blue')):
            vertices[name] = rgb[:, channel]
    kinds = {'<f4': 'float', 'u1': 'uchar'}
    header = ['ply', 'format binary_little_endian 1.0', f'element vertex {len(points)}',
              *(f'property {kinds[kind]} {name}' for name, kind in fields), 'end_header', '']
    return atomic_write(path, '\n'.join(header).encode('ascii') + vertices.tobytes())


def palette(labels) -> np.ndarray:
    """RGB in [0, 1] for integer labels, ``(N,)`` → ``(N, 3)``; negative labels (ignored points) are grey."""
    labels = as_numpy(labels).astype(np.int64)
    table = np.array([_rgb(color) for color in (*PALETTE, GREY)])
    return table[np.where(labels < 0, len(PALETTE), labels % len(PALETTE))]


def _scatter(axes, seen: np.ndarray, rgb: np.ndarray, size: float, frame: np.ndarray) -> None:
    """Points in view coordinates (right, away, up): near ones in front, larger and darker; far ones fade to white."""
    low, high = frame.min(0), frame.max(0)
    seen = seen - (low + high) / 2
    half = np.maximum((high - low) / 2, 1e-12)  # of the extent, by view axis
    order = np.argsort(-seen[:, 1], kind='stable')
    near = np.clip(0.5 - 0.5 * seen[order, 1] / half[1], 0, 1)  # 0 far, 1 near
    fade = (0.7 * (1 - near) ** 1.3)[:, None]
    light = (0.9 + 0.1 * np.clip(seen[order, 2] / half[2], -1, 1))[:, None]  # from above
    fill = rgb[order] * light * (1 - fade) + fade
    area = float(np.clip(6000 / len(seen), 1.2, 20)) * (size / 2.2) ** 2
    plane = seen[order][:, [0, 2]] / max(half[0], half[2])
    axes.scatter(plane[:, 0], plane[:, 1], c=fill, s=area * (0.55 + 0.75 * near), edgecolors=fill * 0.78,
                 linewidths=0.3)
    axes.set_xlim(-1.18, 1.18)
    axes.set_ylim(-1.18, 1.18)
    axes.set_aspect('equal')
    axes.set_axis_off()


def _view(up: str, azimuth: float, elevation: float) -> np.ndarray:
    """Rotation to (right, away, up) of the viewer, ``(3, 3)``, for data whose vertical axis is ``up``."""
    if up not in UP_AXES:
        raise ValueError(f'up = {up!r}; {nearest(up, UP_AXES)}')
    a, e = math.radians(azimuth), math.radians(elevation)
    right = np.array([-math.sin(a), math.cos(a), 0])
    away = -np.array([math.cos(a) * math.cos(e), math.sin(a) * math.cos(e), math.sin(e)])
    return np.stack([right, away, np.cross(right, away)])[:, np.argsort(UP_AXES[up])]


def cloud_array(value, name: str) -> np.ndarray:
    points = as_numpy(value)
    if points.ndim != 2 or points.shape[1] < 3 or len(points) == 0:
        raise ValueError(f'{name} has shape {points.shape}; expected (N, 3 + F) with N > 0')
    points = points[:, :3].astype(np.float64)
    bad = int((~np.isfinite(points)).any(1).sum())
    if bad:
        raise ValueError(f'{name} has {bad} points with NaN or infinite coordinates; expected finite ones')
    return points


def point_colors(value, count: int, name: str) -> np.ndarray:
    """Any of the accepted colour forms → RGB in [0, 1], ``(count, 3)``."""
    if isinstance(value, str):
        return np.tile(_rgb(value), (count, 1))
    array = as_numpy(value)
    if array.shape == (count,) and np.issubdtype(array.dtype, np.integer):
        return palette(array)
    if array.shape == (3,) and (array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)):
        array = np.tile(array, (count, 1))
    if array.shape != (count, 3):
        raise ValueError(f'{name} has shape {array.shape} and type {array.dtype}; expected a colour, ({count}, 3) RGB '
                         f'or ({count},) integer labels')
    rgb = array / 255. if array.dtype == np.uint8 else array.astype(np.float64)
    if not ((rgb >= 0) & (rgb <= 1)).all():
        raise ValueError(f'{name} has values outside [0, 1]; expected RGB in [0, 1], or 0 to 255 as uint8')
    return rgb


def _labels(values, classes: int, name: str) -> list[int]:
    labels = [int(v) for v in values]
    outside = [v for v in labels if not 0 <= v < classes]
    if outside:
        raise ValueError(f'{name} has the label {outside[0]}; expected 0 to {classes - 1} for {classes} classes')
    return labels


def per_cloud(values, count: int, default, name: str) -> list:
    if values is None:
        return [default] * count
    if isinstance(values, str) or len(values) != count:
        raise ValueError(f'{name}: expected a list with one entry for each of {count} clouds, got {values!r}'[:300])
    return list(values)


def listed(clouds, name: str) -> list:
    clouds = list(clouds)
    if not clouds:
        raise ValueError(f'{name} is empty; expected at least one cloud')
    return clouds


def _rgb(color: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb
    return to_rgb(color)
