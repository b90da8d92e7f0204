"""``SyntheticShapes``: things of every day made from parameters. No files, no download."""
from typing import ClassVar

import numpy as np

from ewa3d.checks import check_integer, is_number
from ewa3d.datasets.base import PointDataset
from ewa3d.datasets.solids import Solid
from ewa3d.datasets.transforms import rotation
from ewa3d.registry import DATASETS, nearest

__all__ = ['SyntheticShapes', 'PARTS', 'make_shape']

PARTS = {
    'airplane': ('fuselage', 'wing', 'tail'),
    'bottle': ('body', 'neck'),
    'bucket': ('body', 'handle'),
    'cabinet': ('body', 'leg', 'knob'),
    'car': ('body', 'cabin', 'wheel'),
    'chair': ('seat', 'back', 'leg'),
    'lamp': ('base', 'pole', 'shade'),
    'monitor': ('screen', 'stand', 'base'),
    'mug': ('body', 'handle'),
    'shelf': ('frame', 'board'),
    'table': ('top', 'leg'),
    'umbrella': ('canopy', 'pole', 'handle'),
    'windmill': ('tower', 'roof', 'sail'),
}
# Part labels count through all classes, as ShapeNetPart's do.
FIRST_PART = np.cumsum([0, *map(len, PARTS.values())])
PART_IDS = {name: tuple(range(int(FIRST_PART[i]), int(FIRST_PART[i + 1]))) for i, name in enumerate(PARTS)}
PART_NAMES = tuple(f'{name}/{part}' for name, parts in PARTS.items() for part in parts)


def legs(solid: Solid, part: int, x: float, y: float, top: float, width: float, round_: bool) -> None:
    """Four legs at the corners of ``±x, ±y``, from the floor to ``top``."""
    for sx in (-1, 1):
        for sy in (-1, 1):
            cx, cy = sx * (x - width / 2), sy * (y - width / 2)
            if round_:
                solid.tube(part, (cx, cy, 0), top, width / 2)
            else:
                solid.box(part, (cx - width / 2, cy - width / 2, 0), (cx + width / 2, cy + width / 2, top))


def airplane(s, u):
    r, wing, sweep = u(.06, .11), u(.1, .2), u(-.1, .15)
    s.tube(0, (-.8, 0, 0), 1.6, r, caps='start', axis=0)
    s.tube(0, (.8, 0, 0), u(.15, .3), r, .02, axis=0)
    z = u(-r, r)
    s.box(1, (sweep - wing, -1, z - .02), (sweep + wing, 1, z + .02))
    tail = u(.25, .45)
    s.box(2, (-.8, -tail, r - .02), (-.8 + u(.12, .25), tail, r + .02))
    s.box(2, (-.8, -.02, r), (-.8 + u(.15, .3), .02, r + u(.2, .4)))


def bottle(s, u):
    body, shoulder, neck = u(.45, .9), u(.1, .3), u(.15, .45)
    r = u(.1, .2)
    s.tube(0, (0, 0, 0), body, u(.3, .45), .4, caps='start')
    s.tube(0, (0, 0, body), shoulder, .4, r)
    s.tube(1, (0, 0, body + shoulder), neck, r, caps='end')


def bucket(s, u):
    height, top = u(.5, 1), u(.4, .55)
    s.tube(0, (0, 0, 0), height, u(.25, .5), top, caps='start')
    s.ring(1, (0, 0, height), top, u(.04, .07), 0, .5, stretch=u(.8, 1.6))


def cabinet(s, u):
    x, y, z, leg = u(.3, .5), u(.4, .6), u(.8, 1.2), u(.08, .3)
    s.box(0, (-x, -y, leg), (x, y, leg + z))
    legs(s, 1, x, y, leg, u(.08, .16), u() < .5)
    rows, cols, r = 1 + int(u(0, 3)), 1 + int(u(0, 2)), u(.04, .07)
    for i in range(rows):
        for j in range(cols):
            s.dome(2, (x + r, y * ((2 * j + 1) / cols - 1) * .8, leg + z * (i + .5) / rows), r, r, -1)


def car(s, u):
    length, width, low, high, r = u(.9, 1.1), u(.38, .5), u(.15, .22), u(.4, .55), u(.16, .24)
    s.box(0, (-length, -width, low), (length, width, high))
    back, front = u(-.9, -.35), u(.1, .45)
    s.box(1, (back, -width * .9, high), (front, width * .9, high + u(.22, .4)))
    for x in (-u(.5, .7), u(.5, .7)):
        for y in (-width - .06, width - .06):
            s.tube(2, (x, y, r), .12, r, axis=1, caps='both')


def chair(s, u):
    x, y, z, thick = u(.4, .55), u(.4, .55), u(.5, 1), u(.06, .12)
    s.box(0, (-x, -y, z), (x, y, z + thick))
    back, top = u(.06, .12), z + u(.5, 1.2)
    if u() < .5:
        s.box(1, (-x, -y, z + thick + u(0, .15)), (-x + back, y, top))
    else:
        bars = 3 + int(u(0, 3))
        for i in range(bars):
            c = -y + (2 * i + 1) * y / bars
            s.box(1, (-x, c - y * .35 / bars, z + thick), (-x + back, c + y * .35 / bars, top))
        s.box(1, (-x, -y, top), (-x + back, y, top + u(.06, .14)))
    legs(s, 2, x, y, z, u(.08, .14), u() < .5)


def lamp(s, u):
    base, pole, shade, r = u(.05, .15), u(.6, 1.2), u(.3, .7), u(.03, .06)
    s.tube(0, (0, 0, 0), base, u(.3, .5), caps='both')
    s.tube(1, (0, 0, base), pole, r)
    wide = u(.35, .55)
    s.tube(2, (0, 0, base + pole - u(0, .2)), shade, wide, wide * u(.4, .9))


def monitor(s, u):
    thick, wide, high, foot = u(.05, .1), u(.7, 1), u(.7, 1.1), u(.2, .6)
    s.box(0, (-thick, -wide, foot), (thick, wide, foot + high))
    w = u(.06, .15)
    s.box(1, (-.04 - thick, -w, .06), (-thick, w, foot + high * .4))
    if u() < .5:
        s.box(2, (-u(.25, .4), -u(.3, .5), 0), (u(.25, .4), u(.3, .5), .06))
    else:
        s.tube(2, (0, 0, 0), .06, u(.3, .45), caps='both')


def mug(s, u):
    height, r = u(.6, 1.1), u(.35, .5)
    s.tube(0, (0, 0, 0), height, u(.8, 1.1) * r, r, caps='start')
    size = u(.25, .38) * height
    s.ring(1, (r * .95, 0, height * u(.45, .6)), size, u(.05, .08), -.27, .27, stretch=u(.9, 1.3))


def shelf(s, u):
    x, y, z, thick = u(.25, .5), u(.4, .6), u(1, 1.4), u(.03, .06)
    for side in (-y, y):
        s.box(0, (-x, side - thick, 0), (x, side + thick, z))
    if u() < .5:
        s.box(0, (-x, -y, 0), (-x + thick, y, z))
    boards = 3 + int(u(0, 2))
    for i in range(boards):
        level = z * (i + .3) / (boards - .4)
        s.box(1, (-x, -y, level - thick / 2), (x, y, level + thick / 2))


def table(s, u):
    z, thick = u(.6, 1.1), u(.05, .12)
    x, y = u(.5, .8), u(.5, .8)
    if u() < .5:
        s.box(0, (-x, -y, z), (x, y, z + thick))
    else:
        s.tube(0, (0, 0, z), thick, x, caps='both')
        y = x = x * .75
    if u() < .6:
        legs(s, 1, x, y, z, u(.08, .16), u() < .5)
    else:
        s.tube(1, (0, 0, 0), z, u(.06, .12))
        s.box(1, (-x * .6, -.06, 0), (x * .6, .06, .08))
        s.box(1, (-.06, -y * .6, 0), (.06, y * .6, .08))


def umbrella(s, u):
    pole, radius, r = u(.9, 1.4), u(.5, .8), u(.025, .05)
    s.dome(0, (0, 0, pole - .35), radius, u(.35, .5))
    s.tube(1, (0, 0, .12), pole, r)
    s.ring(2, (.12, 0, .12), .12, r, .5, 1)


def windmill(s, u):
    z, r, top = u(.8, 1.2), u(.25, .4), u(.15, .25)
    s.tube(0, (0, 0, 0), z, r, top)
    s.dome(1, (0, 0, z), top * 1.1, u(.15, .3))
    turn, length, width = u(0, .5 * np.pi), u(.5, .75), u(.1, .18)
    for i in range(4):  # a sail starts at the hub and is a strip on one side of its spar
        dy, dz = np.cos(turn + i * np.pi / 2), np.sin(turn + i * np.pi / 2)
        s.flat(2, (r * 1.05, dy * .1, z + dz * .1), (0, dy * length, dz * length), (0, -dz * width, dy * width))


MAKERS = {f.__name__: f for f in (airplane, bottle, bucket, cabinet, car, chair, lamp, monitor, mug, shelf, table,
                                  umbrella, windmill)}

# Options of make_shape and what they may be.
LIMITS = dict(noise=(0, 10), outliers=(0, 1), hidden=(0, 0.95), unevenness=(0, 10), tilt=(0, 180), least_tilt=(0, 180),
              turn=(0, 180), least_turn=(0, 180), stretch=(0.01, 1))


def make_shape(label: int, num_points: int, rng: np.random.Generator, noise: float = 0.012,
               outliers: float = 0.02, hidden: float = 0.2, unevenness: float = 1.3, tilt: float = 35.0,
               least_tilt: float = 0.0, turn: float = 180.0, least_turn: float = 0.0, stretch: float = 0.5):
    """One shape: built, stretched to a random box, turned, partly hidden, noisy, centred and scaled to radius 1.

    It leans by ``least_tilt`` to ``tilt`` degrees in any direction and is turned about the up axis by ``least_turn`` to
    ``turn``; the sides of its box are ``stretch`` to 1.

    Returns:
        points ``(num_points, 3)`` float32 in random order and the part of each, ``(num_points,)`` uint8, counted from
        0 over the parts of its class.
    """
    def u(low=0.0, high=1.0):
        return low + (high - low) * rng.random()

    solid = Solid()
    MAKERS[tuple(PARTS)[label]](solid, u)
    sampled = int(np.ceil(num_points / (1 - hidden * rng.random())))
    points, parts = solid.sample(sampled, rng, unevenness)
    low, high = points.min(0), points.max(0)
    # a class tells nothing by its box
    points = (points - (low + high) / 2) / np.maximum(high - low, 1e-9) * rng.uniform(stretch, 1, 3)
    if sampled > num_points:  # what lies furthest along some direction is not seen
        direction = rng.standard_normal(3)
        seen = np.argpartition(points @ direction, num_points - 1)[:num_points]
        points, parts = points[seen], parts[seen]
    points = points @ random_pose(rng, (least_tilt, tilt), (least_turn, turn)).T
    points -= points.mean(0)
    points /= np.sqrt(np.einsum('ij,ij->i', points, points).max())
    points += noise * rng.standard_normal(points.shape)
    order = rng.permutation(num_points)
    astray = order[:int(outliers * num_points)]
    points[astray] += 0.15 * rng.standard_normal((len(astray), 3))
    order = rng.permutation(num_points)
    return points[order].astype(np.float32), parts[order].astype(np.uint8)


def random_pose(rng: np.random.Generator, tilt: tuple[float, float],
                turn: tuple[float, float] = (0, 180)) -> np.ndarray:
    """A lean in any direction and a turn about the up axis, each to either side by least to most degrees."""
    direction, lean, turned = 2 * np.pi * rng.random(), _either_side(rng.uniform(-1, 1), *tilt), rng.random()
    # after a lean in any direction, any last turn is any turn
    last = 2 * np.pi * turned if turn == (0, 180) else _either_side(2 * turned - 1, *turn) - direction
    return rotation(2, last) @ rotation(0, lean) @ rotation(2, direction)


def _either_side(share: float, least: float, most: float) -> float:
    """``share`` in [-1, 1] of the angles from least to most degrees, to either side."""
    return np.deg2rad(most - least) * share + np.copysign(np.deg2rad(least), share)


def check_shape_cfg(cfg: dict | None) -> dict:
    """The options of :func:`make_shape`, or an error that names key and value."""
    cfg = dict(cfg or {})
    for key, value in cfg.items():
        if key not in LIMITS:
            raise TypeError(f'SyntheticShapes: shape_cfg has no option {key!r}; {nearest(key, LIMITS)}')
        low, high = LIMITS[key]
        if not is_number(value) or not low <= value <= high:
            raise ValueError(f'SyntheticShapes: shape_cfg: {key} must be a number from {low} to {high}, got {value!r}')
    return cfg


@DATASETS.register_module()
class SyntheticShapes(PointDataset):
    """Shapes of 13 classes with part labels, made from a seed: no files, no download.

    Classes are told apart by structure. Proportions, the box around the shape, the density of points on each part, the
    turn about the up axis, a lean of up to 35 degrees, a hidden side, noise and stray points are drawn for every shape,
    so that sizes and moments of the cloud say little. Sample ``i`` of a split depends on ``(data_seed, split, i)`` and
    the options alone; its class is ``i`` modulo 13.

    Args:
        num_samples: by default 4000 for training, 1000 for validation and for test.
        num_points: points a cloud, in random order.
        data_seed: of the shapes; ``seed`` is the augmentation's.
        in_memory: make all shapes once, at the start (for 1024 points 0.7 ms and 13 kB each); otherwise each one
            whenever it is asked for.
        shape_cfg: options of :func:`make_shape`: ``noise``, ``outliers``, ``hidden``, ``unevenness``, ``tilt``,
            ``least_tilt``, ``turn``, ``least_turn``, ``stretch``.
    """

    METAINFO: ClassVar[dict] = dict(classes=tuple(PARTS), up_axis='z', parts=PART_IDS, part_names=PART_NAMES)
    SPLITS = ('train', 'val', 'test')
    NAMED = False

    def __init__(self, num_samples: int | None = None, num_points: int = 1024, split: str = 'train',
                 data_seed: int = 0, in_memory: bool = True, shape_cfg: dict | None = None, **kwargs):
        if num_samples is None:
            num_samples = 4000 if split == 'train' else 1000
        self.num_samples = check_integer('SyntheticShapes: num_samples', num_samples, 1)
        self.num_points = check_integer('SyntheticShapes: num_points', num_points, 2)
        self.data_seed = check_integer('SyntheticShapes: data_seed', data_seed, 0)
        self.in_memory, self.shape_cfg = in_memory, check_shape_cfg(shape_cfg)
        super().__init__(split=split, **kwargs)

    def load_data_list(self) -> list[dict]:
        names, classes = self.metainfo['classes'], len(PARTS)
        data_list = [dict(name=f'{names[i % classes]}_{i:05d}', label=i % classes, number=i)
                     for i in range(self.num_samples)]
        if self.in_memory:
            for entry in data_list:
                entry['points'], entry['parts'] = self.make(entry['number'])
        return data_list

    def load_cloud(self, entry: dict) -> dict:
        return {} if self.in_memory else dict(zip(('points', 'parts'), self.make(entry['number'])))

    def make(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Shape ``i``: ``(num_points, 3)`` float32 and the part of each point ``(num_points,)`` uint8."""
        rng = np.random.default_rng((self.data_seed, self.SPLITS.index(self.split), i))
        label = i % len(PARTS)
        points, parts = make_shape(label, self.num_points, rng, **self.shape_cfg)
        return points, parts + np.uint8(FIRST_PART[label])
