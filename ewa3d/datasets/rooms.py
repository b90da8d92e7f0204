"""``SyntheticScenes``: rooms with furniture, made from a seed."""
from typing import ClassVar

import numpy as np

from ewa3d.checks import check_integer, is_number
from ewa3d.datasets.scenes import SceneDataset
from ewa3d.datasets.solids import Solid, flat_area
from ewa3d.datasets.transforms import rotation
from ewa3d.registry import DATASETS, nearest

__all__ = ['SyntheticScenes', 'make_scene']

DENSITY = 320.0  # points a square metre before anything is hidden; walls and the floor have a share of it
WALLS = 0.25
SEEN_ANGLE, SEEN_DEPTH = 0.05, 0.12  # a point this close to another's direction and so much behind it is hidden
LEAST_SEEN = 30  # points of a piece of furniture; one with fewer is taken out of the room
TRIES = 40


# ---- furniture: the front looks along +x, the box is centred on the z axis and stands on the floor ------------------
def bed(s, u):
    x, y, z, board = u(.95, 1.1), u(.45, .9), u(.4, .6), u(.85, 1.2)
    s.box(0, (-x + .08, -y, .12), (x, y, z))
    s.box(0, (-x, -y, 0), (-x + .08, y, board))
    return 2 * x, 2 * y, board


def chair(s, u):
    x, y, seat, z = u(.2, .28), u(.2, .28), u(.4, .48), u(.75, 1.05)
    s.box(0, (-x, -y, seat - .05), (x, y, seat))
    s.box(0, (-x, -y, seat), (-x + .05, y, z))
    legs(s, x, y, seat)
    return 2 * x, 2 * y, z


def desk(s, u):
    x, y, z = u(.28, .4), u(.5, .8), u(.7, .8)
    s.box(0, (-x, -y, z - .04), (x, y, z))
    s.box(0, (-x, -y, 0), (x, -y + .04, z))
    s.box(0, (-x, y - u(.3, .45), 0), (x, y, z))  # drawers to the left
    return 2 * x, 2 * y, z


def shelf(s, u):
    x, y, z = u(.14, .25), u(.35, .7), u(1.2, 2.1)
    s.box(0, (-x, -y, 0), (-x + .02, y, z))
    for side in (-y, y - .03):
        s.box(0, (-x, side, 0), (x, side + .03, z))
    for level in np.linspace(.05, z, 3 + int(u(0, 3))):
        s.box(0, (-x, -y, level - .03), (x, y, level))
    return 2 * x, 2 * y, z


def sofa(s, u):
    x, y, seat, z = u(.4, .5), u(.65, 1.2), u(.36, .45), u(.7, .95)
    s.box(0, (-x, -y, .06), (x, y, seat))
    s.box(0, (-x, -y, seat), (-x + .2, y, z))
    for side in (-y, y - .18):
        s.box(0, (-x, side, seat), (x, side + .18, seat + .2))
    return 2 * x, 2 * y, z


def table(s, u):
    x, y, z = u(.35, .5), u(.6, 1.1), u(.65, .8)
    s.box(0, (-x, -y, z - .05), (x, y, z))
    legs(s, x, y, z)
    return 2 * x, 2 * y, z


def legs(s, x, y, z):
    for i in (-x, x - .05):
        for j in (-y, y - .05):
            s.box(0, (i, j, 0), (i + .05, j + .05, z))


MAKERS = {f.__name__: f for f in (bed, chair, desk, shelf, sofa, table)}

# Options of make_scene, their defaults and what they may be.
LIMITS = dict(objects=(0, 30), clutter=(0, 100), noise=(0, 1), outliers=(0, 1), walled=(0, 1), views=(1, 8))


def make_scene(num_points: int, rng: np.random.Generator, objects: int = 7, clutter: int = 6, noise: float = 0.01,
               outliers: float = 0.01, walled: float = 0.6, views: int = 1) -> tuple:
    """One room: walls and a floor of any heading, furniture (part of it along the walls), boards and boxes that are
    nothing, as seen from ``views`` places in the room, with noise and stray points.

    Args:
        objects, clutter: at most so many pieces of furniture and of clutter; a room has at least half of them, and
            fewer where they find no place.
        noise: standard deviation in metres. outliers: share of stray points.
        walled: share of the furniture that stands with its back at a wall.

    Returns:
        points ``(num_points, 3)`` float32 in random order, boxes ``(M, 7)`` float32 and labels ``(M,)`` int64.
    """
    def u(low=0.0, high=1.0):
        return low + (high - low) * rng.random()

    size = rng.uniform(3.5, 5.5, 2)
    clouds, boxes, labels = room(size, rng, u), [], []
    for _ in range(int(rng.integers((objects + 1) // 2, objects + 1))):
        label = int(rng.integers(len(MAKERS)))
        solid = Solid()
        box = np.array([0, 0, 0, *list(MAKERS.values())[label](solid, u), 0])
        place = find_place(box, boxes, size, u, rng.random() < walled)
        if place is not None:
            clouds.append(points_of(solid, DENSITY, rng) @ rotation(2, place[6]).T + [place[0], place[1], 0])
            boxes.append(place)
            labels.append(label)
    clouds += [junk(boxes, size, rng, u) for _ in range(int(rng.integers((clutter + 1) // 2, clutter + 1)))]
    owner = np.repeat(np.arange(-2, len(clouds) - 2), [len(cloud) for cloud in clouds])  # floor, walls, furniture, …
    points = np.concatenate(clouds)
    seen = np.zeros(len(points), bool)
    for _ in range(views):
        seen |= visible(points, np.array([*(rng.uniform(-.35, .35, 2) * size), u(1.2, 1.9)]))
    counts = np.bincount(owner[seen] + 2, minlength=len(clouds))[2:2 + len(boxes)]
    kept = np.flatnonzero(counts >= LEAST_SEEN)
    seen &= ~np.isin(owner, np.setdiff1d(np.arange(len(boxes)), kept))
    return finished(points[seen], np.array(boxes).reshape(-1, 7)[kept], np.array(labels, np.int64)[kept], num_points,
                    rng, noise, outliers)


def finished(points: np.ndarray, boxes: np.ndarray, labels: np.ndarray, num_points: int, rng: np.random.Generator,
             noise: float, outliers: float) -> tuple:
    """Choose points, add noise and turn everything by one angle."""
    chosen = rng.permutation(len(points))[:num_points]
    if len(chosen) < num_points:
        chosen = np.concatenate([chosen, rng.integers(len(points), size=num_points - len(chosen))])
    points = points[chosen] + noise * rng.standard_normal((num_points, 3))
    stray = rng.random(num_points) < outliers
    points[stray] += .3 * rng.standard_normal((int(stray.sum()), 3))
    turn = rng.uniform(-np.pi, np.pi)
    boxes[:, 2] = boxes[:, 5] / 2
    boxes[:, :3], boxes[:, 6] = boxes[:, :3] @ rotation(2, turn).T, boxes[:, 6] + turn
    boxes[:, 6] = (boxes[:, 6] + np.pi) % (2 * np.pi) - np.pi
    return (points @ rotation(2, turn).T).astype(np.float32), boxes.astype(np.float32), labels


def room(size: np.ndarray, rng: np.random.Generator, u) -> list[np.ndarray]:
    """Points of the floor, and of two to four walls."""
    x, y = size / 2
    floor, walls = Solid(), Solid()
    floor.flat(0, (-x, -y, 0), (2 * x, 0, 0), (0, 2 * y, 0))
    sides = [((-x, -y, 0), (2 * x, 0, 0)), ((-x, y, 0), (2 * x, 0, 0)), ((-x, -y, 0), (0, 2 * y, 0)),
             ((x, -y, 0), (0, 2 * y, 0))]
    for i in rng.permutation(4)[:int(rng.integers(2, 5))]:
        walls.flat(0, *sides[i], (0, 0, u(1.8, 2.4)))
    return [points_of(solid, WALLS * DENSITY, rng) for solid in (floor, walls)]


def points_of(solid: Solid, density: float, rng: np.random.Generator) -> np.ndarray:
    """Points of a solid of flat pieces, so many a square metre."""
    area = flat_area(np.array(solid._flats, np.float64)).sum()
    return solid.sample(max(8, int(area * density)), rng)[0]


def junk(boxes: list, size: np.ndarray, rng: np.random.Generator, u) -> np.ndarray:
    """A carton, a board or a pole on the floor, on furniture or beside it: touching it, as often as not."""
    half = rng.uniform(.05, .25, 3)
    half[rng.integers(3)] *= u(.1, 1.5)
    solid = Solid()
    solid.box(0, (-half[0], -half[1], 0), (half[0], half[1], 2 * half[2]))
    x, y, z = *(rng.uniform(-.45, .45, 2) * size), 0.
    if boxes and rng.random() < .7:
        box = boxes[int(rng.integers(len(boxes)))]
        if rng.random() < .5:
            x, y, z = box[0], box[1], box[5]
        else:
            side = np.array([(box[3] / 2 + half[0]) * rng.choice([-1, 1]), u(-.5, .5) * box[4]])
            x, y = box[:2] + rotation(2, box[6])[:2, :2] @ side
    return points_of(solid, DENSITY, rng) @ rotation(2, u(0, 2 * np.pi)).T + [x, y, z]


def find_place(box: np.ndarray, boxes: list, size: np.ndarray, u, walled: bool) -> np.ndarray | None:
    """``box`` at a place in the room where it meets no other, with its back at a wall or with any heading."""
    for _ in range(TRIES):
        place = box.copy()
        place[6] = np.floor(u(0, 4)) * np.pi / 2 if walled else u(-np.pi, np.pi)
        turn = rotation(2, place[6])[:2, :2]
        room_left = size / 2 - np.abs(turn) @ box[3:5] / 2 - .02
        if (room_left < 0).any():
            continue
        place[:2] = np.array([u(-1, 1), u(-1, 1)]) * room_left
        if walled:
            back = -turn[:, 0]
            axis = int(np.abs(back).argmax())
            place[axis] = np.sign(back[axis]) * room_left[axis]
        if not any(overlap(place, other) for other in boxes):
            return place
    return None


def overlap(a: np.ndarray, b: np.ndarray, gap: float = 0.04) -> bool:
    """Whether two boxes, seen from above, come closer than ``gap``: no axis of either one separates them."""
    axes = np.concatenate([rotation(2, a[6])[:2, :2].T, rotation(2, b[6])[:2, :2].T])
    reach = sum(np.abs(axes @ rotation(2, box[6])[:2, :2]) @ box[3:5] / 2 for box in (a, b))
    return bool((np.abs(axes @ (a[:2] - b[:2])) < reach + gap).all())


def visible(points: np.ndarray, camera: np.ndarray) -> np.ndarray:
    """Which points nothing hides from a camera: the nearest one in each direction, and what lies little behind it."""
    offset = points - camera
    depth = np.linalg.norm(offset, axis=1)
    around = np.arctan2(offset[:, 1], offset[:, 0])
    above = np.arcsin(np.clip(offset[:, 2] / np.maximum(depth, 1e-9), -1, 1))
    columns = int(np.ceil(2 * np.pi / SEEN_ANGLE)) + 1
    cell = ((above + np.pi / 2) // SEEN_ANGLE * columns + (around + np.pi) // SEEN_ANGLE).astype(np.int64)
    nearest_depth = np.full(cell.max() + 1, np.inf)
    np.minimum.at(nearest_depth, cell, depth)
    return depth <= nearest_depth[cell] + SEEN_DEPTH


@DATASETS.register_module()
class SyntheticScenes(SceneDataset):
    """Rooms with furniture of 6 classes and their boxes, made from a seed: no files, no download.

    Beds, chairs, desks, shelves, sofas and tables stand along the walls or with any heading, partly hidden from where
    the room is seen, among cartons and boards that are no furniture; the whole room has any heading. Scene ``i`` of a
    split depends on ``(data_seed, split, i)`` and the options alone.

    Args:
        num_samples: by default 800 for training, 200 for validation and for test.
        num_points: points a scene, in random order.
        data_seed: of the scenes; ``seed`` is the augmentation's.
        in_memory: make all scenes once, at the start; otherwise each one whenever it is asked for.
        scene_cfg: options of :func:`make_scene`: ``objects``, ``clutter``, ``noise``, ``outliers``, ``walled``,
            ``views``.
    """

    METAINFO: ClassVar[dict] = dict(classes=tuple(MAKERS), up_axis='z')
    SPLITS = ('train', 'val', 'test')
    NAMED = False

    def __init__(self, num_samples: int | None = None, num_points: int = 4096, split: str = 'train',
                 data_seed: int = 0, in_memory: bool = True, scene_cfg: dict | None = None, **kwargs):
        if num_samples is None:
            num_samples = 800 if split == 'train' else 200
        self.num_samples = check_integer('SyntheticScenes: num_samples', num_samples, 1)
        self.num_points = check_integer('SyntheticScenes: num_points', num_points, 2)
        self.data_seed = check_integer('SyntheticScenes: data_seed', data_seed, 0)
        self.in_memory, self.scene_cfg = in_memory, check_scene_cfg(scene_cfg)
        super().__init__(split=split, **kwargs)

    def load_data_list(self) -> list[dict]:
        return [dict(name=f'{self.split}_{i:05d}', number=i, **self.make(i) if self.in_memory else {})
                for i in range(self.num_samples)]

    def load_cloud(self, entry: dict) -> dict:
        return {} if self.in_memory else self.make(entry['number'])

    def make(self, i: int) -> dict:
        """Scene ``i``: ``points``, ``boxes`` and ``box_labels``."""
        rng = np.random.default_rng((self.data_seed, self.SPLITS.index(self.split), i))
        return dict(zip(('points', 'boxes', 'box_labels'), make_scene(self.num_points, rng, **self.scene_cfg)))


def check_scene_cfg(cfg: dict | None) -> dict:
    """The options of :func:`make_scene`, or an error that names key and value."""
    cfg = dict(cfg or {})
    for key, value in cfg.items():
        if key not in LIMITS:
            raise TypeError(f'SyntheticScenes: scene_cfg has no option {key!r}; {nearest(key, LIMITS)}')
        low, high = LIMITS[key]
        if key in ('objects', 'clutter', 'views'):
            cfg[key] = value = check_integer(f'SyntheticScenes: scene_cfg: {key}', value, low)
        if not is_number(value) or not low <= value <= high:
            raise ValueError(f'SyntheticScenes: scene_cfg: {key} must be a number from {low} to {high}, got {value!r}')
    return cfg
