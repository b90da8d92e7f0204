"""Clips of clouds: a generated set whose classes the order in time decides, and the end of such a pipeline."""
from typing import ClassVar

import numpy as np

from ewa3d.checks import check_integer, check_number
from ewa3d.datasets.base import PointDataset
from ewa3d.datasets.shapes import PARTS, make_shape
from ewa3d.datasets.transforms import Pack, rotation
from ewa3d.registry import DATASETS, TRANSFORMS

__all__ = ['MovingClouds', 'PackClouds']


@DATASETS.register_module()
class MovingClouds(PointDataset):
    """A thing that moves forward, back, left or right, or turns about the up axis one way or the other, as a sequence
    of clouds: made from a seed, no files.

    It starts anywhere and turned anyhow, comes in again on the other side, and each cloud has points of its own, so
    that a single cloud says nothing about the class; the same clouds the other way round are another class. Things
    (those of ``SyntheticShapes``), sizes and speeds are drawn for every clip.

    A clip is one cloud to the transforms, which treat it as a whole: ``points`` ``(T·N, 4)``, whose last column is the
    number of the frame. ``PackClouds`` ends the pipeline. Sample ``i`` of a split depends on ``(data_seed, split, i)``
    and the options alone; its class is ``i`` modulo 6.

    Args:
        num_samples: by default 1800 for training, 600 for validation and for test.
        num_frames: T. num_points: N, of each cloud.
        noise: standard deviation of the points' noise; the thing's radius is 0.3 to 0.5.
        data_seed: of the clips; ``seed`` is the augmentation's.
    """
    METAINFO: ClassVar[dict] = dict(classes=('forward', 'back', 'left', 'right', 'anticlockwise', 'clockwise'),
                                    up_axis='z')
    SPLITS = ('train', 'val', 'test')
    NAMED = False

    def __init__(self, num_samples: int | None = None, num_frames: int = 8, num_points: int = 256,
                 noise: float = 0.01, split: str = 'train', data_seed: int = 0, **kwargs):
        if num_samples is None:
            num_samples = 1800 if split == 'train' else 600
        for name, value, least in (('num_samples', num_samples, 1), ('num_frames', num_frames, 1),
                                   ('num_points', num_points, 1), ('data_seed', data_seed, 0)):
            check_integer(f'MovingClouds: {name}', value, least)
        self.noise = check_number('MovingClouds: noise', noise, '[0, 1]')
        self.num_samples, self.num_frames, self.num_points, self.data_seed = \
            num_samples, num_frames, num_points, data_seed
        super().__init__(split=split, **kwargs)

    def load_data_list(self) -> list[dict]:
        names = self.METAINFO['classes']
        return [dict(name=f'{names[i % 6]}_{i:05d}', label=i % 6, number=i) for i in range(self.num_samples)]

    def load_cloud(self, entry: dict) -> dict:
        return dict(points=self.make(entry['number']))

    def make(self, i: int) -> np.ndarray:
        """Clip ``i``: ``(num_frames · num_points, 4)`` float32, frame after frame."""
        rng = np.random.default_rng((self.data_seed, self.SPLITS.index(self.split), i))
        T, N, label = self.num_frames, self.num_points, i % 6
        thing = make_shape(int(rng.integers(len(PARTS))), max(T * N, 2), rng, noise=0., outliers=0., hidden=0.)[0]
        thing = thing[:T * N].reshape(T, N, 3) * rng.uniform(0.3, 0.5)
        time = np.arange(T)
        step = rng.uniform(0.12, 0.24) * time  # the world is 2 wide
        turn = rng.uniform(0.25, 0.5) * time  # radians
        dx, dy = ((1, 0), (-1, 0), (0, 1), (0, -1), (0, 0), (0, 0))[label]
        angles = 2 * np.pi * rng.random() + (0, 0, 0, 0, 1, -1)[label] * turn
        start = rng.uniform(-1, 1, 2)
        place = [(begin + way * step + 1) % 2 - 1 for begin, way in zip(start, (dx, dy))]
        clip = np.empty((T, N, 4), np.float32)
        for frame, points, angle in zip(clip, thing, angles):
            frame[:, :3] = points @ rotation(2, angle).T
        clip[..., :3] += np.stack([*place, np.zeros(T)], -1)[:, None] + self.noise * rng.standard_normal((T, N, 3))
        clip[..., 3] = time[:, None]
        return clip.reshape(-1, 4)


@TRANSFORMS.register_module()
class PackClouds(Pack):
    """End a pipeline of clips of clouds: as :class:`~ewa3d.datasets.transforms.Pack`, with ``points`` ``(T, N, 3+F)``.

    The last column of the clip is the frame that a point belongs to; it is left out of the result.

    Raises:
        ValueError: no such column, or frames of different numbers of points (as after a ``Resample`` of all of them).
    """

    def __call__(self, results: dict) -> dict:
        points = np.asarray(results['points'])
        if points.ndim != 2 or points.shape[1] < 4:
            raise ValueError('PackClouds: a clip (T·N, 3+F+1) with the frame of each point in the last column was '
                             f'expected, got {points.shape}')
        frames, counts = np.unique(points[:, -1], return_counts=True)
        if len(set(counts.tolist())) > 1:
            raise ValueError(f'PackClouds: the {len(frames)} frames have {counts.min()} to {counts.max()} points; a '
                             'transform has taken points of the clip as a whole')
        clip = points[points[:, -1].argsort(kind='stable'), :-1]
        packed = super().__call__({**results, 'points': clip})
        packed['inputs']['points'] = packed['inputs']['points'].unflatten(0, (len(frames), -1))
        return packed
