"""Transforms: ``dict`` in, ``dict`` out, in numpy. Sampling and augmentation live here and nowhere else.

A transform takes what :class:`~ewa3d.datasets.base.PointDataset` starts a sample with and returns it changed. It never
writes into the arrays it is given (they may be a file that is mapped into memory), and it draws from ``results['rng']``
only. Columns of ``points`` beyond xyz are features; where ``results['normals']`` is true the first three are normals,
and what turns or stretches the cloud turns them along.
"""
from collections.abc import Sequence

import numpy as np
import torch

from ewa3d.checks import check_integer, check_number, is_number
from ewa3d.registry import TRANSFORMS
from ewa3d.structures import Sample

__all__ = ['KeepAll', 'Normalize', 'Resample', 'UpAxis', 'RandomScale', 'RandomShift', 'RandomRotate', 'RandomJitter',
           'RandomDrop', 'Pack']

AXES = 'xyz'
ROW = 64  # points that are worked on as one row
PER_POINT = ('points', 'parts', 'rows')


def rng_of(results: dict) -> np.random.Generator:
    """The sample's generator; a fresh one where a transform is called by hand."""
    if 'rng' not in results:
        results['rng'] = np.random.default_rng()
    return results['rng']


def take(results: dict, rows, fps_ordered: bool = False) -> dict:
    """Keep these rows of everything that has one a point."""
    for key in PER_POINT:
        if results.get(key) is not None:
            array = results[key]
            results[key] = array[rows] if isinstance(rows, slice) else array.take(rows, axis=0)  # faster than []
    results['fps_ordered'] = fps_ordered
    return results


def with_xyz(results: dict, xyz: np.ndarray) -> dict:
    """Put new coordinates in, in the dtype of the old; features stay."""
    points = results['points']
    xyz = xyz.astype(points.dtype, copy=False)
    results['points'] = xyz if points.shape[1] == 3 else np.concatenate([xyz, points[:, 3:]], axis=1)
    return results


def for_each(function: np.ufunc, xyz: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """``function(xyz, vector)`` of every point and one vector: numpy's loops over three numbers take several times as
    long as those over the same numbers in longer rows."""
    whole = len(xyz) // ROW * ROW
    found, row = np.empty((len(xyz), 3), xyz.dtype), np.empty((ROW, 3), xyz.dtype)
    row[:] = vector
    function(np.ascontiguousarray(xyz[:whole]).reshape(-1, 3 * ROW), row.ravel(),
             out=found[:whole].reshape(-1, 3 * ROW))
    function(xyz[whole:], vector, out=found[whole:])
    return found


def linear_map(results: dict, matrix: np.ndarray) -> dict:
    """Apply a rotation to coordinates and normals."""
    points = results['points']
    matrix = matrix.astype(points.dtype)
    points = points.copy()
    points[:, :3] = points[:, :3] @ matrix.T
    if results.get('normals'):
        points[:, 3:6] = points[:, 3:6] @ matrix.T
    results['points'] = points
    return results


def without_boxes(results: dict, instead: str) -> None:
    """Raise where a transform would move the points and leave the boxes of a scene where they are."""
    if results.get('boxes') is not None:
        raise ValueError(f'the sample is a scene with boxes, which would stay where they are; {instead}')


def span(name: str, value, within: str = '(-inf, inf)') -> tuple[float, float]:
    """``(first, last)`` of a range given as a pair, or ``(-v, v)`` of a number; both lie ``within`` an interval."""
    if is_number(value):
        value = (-check_number(name, value, '[0, inf)'), value)
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f'{name} must be a pair (low, high), got {value!r}')
    first, last = (check_number(name, v, within) for v in value)
    if first > last:
        raise ValueError(f'{name} must be a pair (low, high) in this order, got {value!r}')
    return first, last


@TRANSFORMS.register_module()
class Normalize:
    """Centre a cloud on the mean of its points and divide by the largest distance from there.

    A cloud whose points are all in one place is centred only.
    """

    def __call__(self, results: dict) -> dict:
        without_boxes(results, 'models of scenes take metres')
        xyz = results['points'][:, :3]
        exponent = np.frexp(np.maximum(xyz.max(), -xyz.min()))[1]
        if abs(exponent) > 16:
            xyz = np.ldexp(xyz, -exponent)  # to about 1, exactly: squares must not leave the range
        xyz = for_each(np.subtract, xyz, xyz[0])  # near the origin a sum in single precision is exact enough
        mean = np.full(len(xyz), 1 / len(xyz), xyz.dtype) @ xyz  # several times faster than mean(0)
        xyz = for_each(np.subtract, xyz, mean)
        x, y, z = np.square(xyz).T
        radius = np.sqrt((x + y + z).max())
        if radius > 0:
            xyz /= radius
        return with_xyz(results, xyz)


@TRANSFORMS.register_module()
class Resample:
    """Keep ``num_points`` points.

    * ``method='fps'``: by farthest point sampling. Data sets that store their clouds in that order (``fps_ordered``)
      make it a slice.
    * ``method='random'``: at random without repetition, from the first ``pool`` by farthest point sampling where
      ``pool`` is given. Point-BERT and Point-MAE train with ``num_points=1024, pool=1200`` (2048/2400, 4096/4800).
      A pool larger than the cloud is the whole cloud.

    From a cloud in FPS order the pool is always the same first points: cheap, but the other points are never seen.
    Point-BERT and Point-MAE sample anew each time from a shuffled cloud, that is from another start:
    ``random_start=True`` does so.

    Args:
        num_points: how many points are kept.
        method: ``'fps'`` or ``'random'``. pool: of ``'random'``, see above; all points unless given.
        replace: ``method='random'`` draws with repetition, as published part segmentation does.
        random_start: sample farthest points from a point drawn at random, among all points of the cloud. It costs some
            25 ms a cloud on one idle core for 1200 of 8192 points, a slice costs nothing; meant for training.
        pad: what to do with a cloud of fewer than ``num_points``: ``None`` is an error, ``'repeat'`` keeps all of it
            and adds points of it at random.

    Raises:
        TypeError, ValueError: settings that do not go together; a cloud with too few points where ``pad`` is ``None``.
    """

    def __init__(self, num_points: int, method: str = 'fps', pool: int | None = None, pad: str | None = None,
                 random_start: bool = False, replace: bool = False):
        self.num_points = check_integer('Resample: num_points', num_points, 1)
        if method not in ('fps', 'random'):
            raise ValueError(f"Resample: method must be 'fps' or 'random', got {method!r}")
        if pad not in (None, 'repeat'):
            raise ValueError(f"Resample: pad must be None or 'repeat', got {pad!r}")
        if pool is not None and method == 'fps':
            raise ValueError("Resample: pool belongs to method='random'")
        if pool is not None and check_integer('Resample: pool', pool, 1) < num_points:
            raise ValueError(f'Resample: {num_points} points cannot be drawn from a pool of {pool}')
        if random_start and method == 'random' and pool is None:
            raise ValueError("Resample: random_start belongs to farthest point sampling: method='fps', or a pool")
        if replace and (method == 'fps' or pool is not None):
            raise ValueError("Resample: replace belongs to method='random' without a pool")
        self.method, self.pool, self.pad, self.random_start = method, pool, pad, bool(random_start)
        self.replace = bool(replace)

    def __call__(self, results: dict) -> dict:
        N = len(results['points'])
        if self.replace:
            return take(results, rng_of(results).integers(N, size=self.num_points))
        if self.num_points > N:
            return self._padded(results, N)
        if self.method == 'fps':
            return self._farthest(results, self.num_points)
        if self.pool is not None and self.pool < N:
            results = self._farthest(results, self.pool)
            N = self.pool
        return take(results, rng_of(results).permutation(N)[:self.num_points])

    def _farthest(self, results: dict, num: int) -> dict:
        if not self.random_start:
            return first_fps(results, num)
        return fps_from(results, num, int(rng_of(results).integers(len(results['points']))))

    def _padded(self, results: dict, N: int) -> dict:
        if self.pad is None and results.get('max_points') == N:
            raise ValueError(f'num_points={self.num_points} points asked for, the data set keeps at most '
                             f'max_points={N} of a cloud: give it a larger max_points')
        if self.pad is None:
            raise ValueError(f"num_points={self.num_points} points asked for, the cloud has {N}; pad='repeat' would "
                             f'repeat points')
        more = rng_of(results).integers(N, size=self.num_points - N)
        return take(results, np.concatenate([np.arange(N), more]))


def first_fps(results: dict, num: int) -> dict:
    """The first ``num`` points of the cloud by farthest point sampling from point 0."""
    points = results['points']
    if results.get('fps_ordered') or num == len(points):
        return take(results, slice(num), fps_ordered=bool(results.get('fps_ordered')))
    return fps_from(results, num, 0)


def fps_from(results: dict, num: int, start: int) -> dict:
    """``num`` points of the cloud by farthest point sampling from point ``start``."""
    from ewa3d.datasets.cache import fps_order
    return take(results, fps_order([results['points']], num, start)[0], fps_ordered=True)


@TRANSFORMS.register_module()
class KeepAll:
    """Keep the points and their parts as they are now, for an evaluation on all points of a cloud: they become the
    sample's ``all_points`` and ``gt_all_parts``, and transforms behind this one leave them alone. ``rows`` tells which
    of them the points of the input are. It belongs behind ``Normalize`` and before ``Resample``.
    """

    def __call__(self, results: dict) -> dict:
        if results.get('parts') is None:
            raise ValueError('KeepAll: the sample has no parts')
        results.update(all_points=results['points'][:, :3], all_parts=results['parts'],
                       rows=np.arange(len(results['points'])))
        return results


@TRANSFORMS.register_module()
class UpAxis:
    """Turn the cloud by 90 degrees so that ``to`` is its up axis; the data set's metainfo says which one is now.

    Args:
        to: ``'x'``, ``'y'`` or ``'z'``.

    Raises:
        ValueError: another axis, or a data set that does not say which way is up.
    """

    def __init__(self, to: str = 'z'):
        if to not in tuple(AXES):
            raise ValueError(f"UpAxis: to must be 'x', 'y' or 'z', got {to!r}")
        self.to = to

    def __call__(self, results: dict) -> dict:
        without_boxes(results, 'boxes stand upright along z')
        now = up_axis(results)
        if now == self.to:
            return results
        a, b = AXES.index(now), AXES.index(self.to)
        matrix = np.eye(3)
        matrix[[a, b]] = 0
        matrix[b, a], matrix[a, b] = 1, -1
        results['up_axis'] = self.to
        return linear_map(results, matrix)


def up_axis(results: dict) -> str:
    """The cloud's up axis; an error where the data set does not say."""
    if results.get('up_axis') is None:
        raise ValueError("the data set's metainfo does not say which axis is up: set metainfo=dict(up_axis='z')")
    return results['up_axis']


@TRANSFORMS.register_module()
class RandomScale:
    """Multiply the coordinates by a factor drawn from ``scale``: one an axis, or one for all (``per_axis=False``).

    Args:
        scale: the smallest and the largest factor. per_axis: a factor for each axis.
    """

    def __init__(self, scale: Sequence[float] = (2 / 3, 3 / 2), per_axis: bool = True):
        self.scale = span('RandomScale: scale', scale, '(0, inf)')
        self.per_axis = per_axis

    def __call__(self, results: dict) -> dict:
        without_boxes(results, 'SceneScale moves both')
        points = results['points']
        factor = rng_of(results).uniform(*self.scale, size=3 if self.per_axis else 1).astype(points.dtype)
        results = with_xyz(results, points[:, :3] * factor)
        if self.per_axis and results.get('normals'):  # a stretched surface's normals shrink where it grew
            normals = points[:, 3:6] / factor
            length = np.linalg.norm(normals, axis=1, keepdims=True)
            results['points'][:, 3:6] = normals / np.maximum(length, 1e-12)
        return results


@TRANSFORMS.register_module()
class RandomShift:
    """Move the cloud by a vector with components drawn from ``[-shift, shift]`` (or from a pair).

    Args:
        shift: the largest component, or the smallest and the largest, in the unit of the cloud.
    """

    def __init__(self, shift: float | Sequence[float] = 0.2):
        self.shift = span('RandomShift: shift', shift)

    def __call__(self, results: dict) -> dict:
        without_boxes(results, 'leave it out')
        points = results['points']
        offset = rng_of(results).uniform(*self.shift, size=3).astype(points.dtype)
        return with_xyz(results, points[:, :3] + offset)


@TRANSFORMS.register_module()
class RandomRotate:
    """Turn the cloud about an axis by an angle drawn from ``[-degrees, degrees]`` (or from a pair).

    Args:
        degrees: the largest angle to either side, or the smallest and the largest.
        axis: ``'x'``, ``'y'``, ``'z'``, or ``'up'`` for the data set's up axis.

    Raises:
        TypeError, ValueError: another axis, or no angles; ``'up'`` where the data set does not say which way that is.
    """

    def __init__(self, axis: str = 'up', degrees: float | Sequence[float] = 180):
        if axis not in ('up', *AXES):
            raise ValueError(f"RandomRotate: axis must be 'up', 'x', 'y' or 'z', got {axis!r}")
        self.axis = axis
        self.degrees = span('RandomRotate: degrees', degrees)

    def __call__(self, results: dict) -> dict:
        without_boxes(results, 'SceneRotate moves both')
        axis = AXES.index(up_axis(results) if self.axis == 'up' else self.axis)
        angle = np.deg2rad(rng_of(results).uniform(*self.degrees))
        return linear_map(results, rotation(axis, angle))


def rotation(axis: int, angle: float) -> np.ndarray:
    """The matrix that turns counter-clockwise about coordinate axis 0, 1 or 2."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[j, i] = np.sin(angle)
    matrix[i, j] = -matrix[j, i]
    return matrix


@TRANSFORMS.register_module()
class RandomJitter:
    """Add normal noise of standard deviation ``sigma`` to every coordinate, clipped to ``[-clip, clip]``.

    Args:
        sigma: standard deviation, in the unit of the cloud. clip: the largest shift of a coordinate.
    """

    def __init__(self, sigma: float = 0.01, clip: float = 0.05):
        self.sigma = check_number('RandomJitter: sigma', sigma, '[0, inf)')
        self.clip = check_number('RandomJitter: clip', clip, '(0, inf)')

    def __call__(self, results: dict) -> dict:
        points = results['points']
        noise = rng_of(results).standard_normal((len(points), 3), dtype=np.float32)
        noise *= self.sigma
        return with_xyz(results, points[:, :3] + np.clip(noise, -self.clip, self.clip, out=noise))


@TRANSFORMS.register_module()
class RandomDrop:
    """Replace a random share of the points, up to ``max_ratio``, by the first one: PointNet++'s input dropout.

    The number of points stays, so that clouds still stack.

    Args:
        max_ratio: the largest share, in ``[0, 1]``.
    """

    def __init__(self, max_ratio: float = 0.5):
        self.max_ratio = check_number('RandomDrop: max_ratio', max_ratio, '[0, 1]')

    def __call__(self, results: dict) -> dict:
        rng, N = rng_of(results), len(results['points'])
        dropped = rng.random(N, dtype=np.float32) < rng.random() * self.max_ratio
        return take(results, np.where(dropped, 0, np.arange(N)))


@TRANSFORMS.register_module()
class Pack:
    """End a pipeline: ``{'inputs': {'points': (N, 3+F) float32}, 'data_samples': Sample(gt_label, gt_parts)}``.

    The sample's metainfo holds its ``name`` and ``index``.

    Args:
        category: the label goes into the inputs as well, for a model that is told the category of a cloud.
    """

    def __init__(self, category: bool = False):
        self.category = bool(category)

    def __call__(self, results: dict) -> dict:
        sample = Sample()
        for key in ('name', 'index'):
            if key in results:
                sample.set_field(results[key], key, field_type='metainfo')  # Sample(metainfo=…) would copy deeply
        if results.get('label') is not None:
            sample.gt_label = torch.from_numpy(np.array(results['label'], np.int64))  # faster than tensor()
        for key, name in (('parts', 'gt_parts'), ('all_parts', 'gt_all_parts'), ('rows', 'rows')):
            if results.get(key) is not None:
                setattr(sample, name, torch.from_numpy(np.array(results[key], dtype=np.int64)))
        if 'all_points' in results:
            sample.all_points = torch.from_numpy(np.array(results['all_points'], dtype=np.float32))
        inputs = dict(points=torch.from_numpy(np.array(results['points'], dtype=np.float32, order='C')))
        if self.category:
            if results.get('label') is None:
                raise ValueError('Pack: category=True, and the sample has no label')
            inputs['category'] = torch.tensor(int(results['label']))
        return {'inputs': inputs, 'data_samples': sample}
