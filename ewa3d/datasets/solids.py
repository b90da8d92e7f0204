"""Surfaces that synthetic shapes are built from, and points on them."""
import numpy as np

__all__ = ['Solid']

TURN = 2 * np.pi


class Solid:
    """Pieces of surface, each belonging to a part; :meth:`sample` draws points from all of them at once.

    Coordinates are x forward, y left, z up. A piece is a row of numbers, so that a whole shape is sampled with a few
    array operations.
    """

    def __init__(self):
        self._flats, self._tubes, self._rings, self._domes = [], [], [], []

    def box(self, part: int, low, high) -> None:
        """An axis-parallel box between two corners."""
        (x, y, z), (X, Y, Z) = low, high
        a, b, c = X - x, Y - y, Z - z
        self._flats += [(part, x, y, z, a, 0, 0, 0, b, 0), (part, x, y, Z, a, 0, 0, 0, b, 0),
                        (part, x, y, z, a, 0, 0, 0, 0, c), (part, x, Y, z, a, 0, 0, 0, 0, c),
                        (part, x, y, z, 0, b, 0, 0, 0, c), (part, X, y, z, 0, b, 0, 0, 0, c)]

    def flat(self, part: int, corner, a, b) -> None:
        """A parallelogram spanned by two edges from a corner."""
        self._flats.append((part, *corner, *a, *b))

    def tube(self, part: int, start, length: float, radius: float, end_radius: float | None = None, axis: int = 2,
             caps: str = '') -> None:
        """The mantle of a cylinder or cone along an axis; ``caps`` closes its ``'start'``, ``'end'`` or ``'both'``."""
        end_radius = radius if end_radius is None else end_radius
        self._tubes.append((part, *start, radius, end_radius, length, axis))
        if caps in ('start', 'both'):
            self.disc(part, start, radius, axis)
        if caps in ('end', 'both'):
            end = list(start)
            end[axis] += length
            self.disc(part, end, end_radius, axis)

    def disc(self, part: int, centre, radius: float, axis: int = 2) -> None:
        """A disc: a tube of no length whose radius grows from 0."""
        self._tubes.append((part, *centre, 0.0, radius, 0.0, axis))

    def ring(self, part: int, centre, radius: float, thickness: float, first: float, last: float,
             stretch: float = 1.0) -> None:
        """An arc of a torus that stands upright in the xz plane, from one angle to another (turns; 0 is +x, 0.25 +z);
        ``stretch`` scales its height."""
        self._rings.append((part, *centre, radius, thickness, first * TURN, last * TURN, stretch))

    def dome(self, part: int, centre, radius: float, height: float, bottom: float = 0.0) -> None:
        """A half ellipsoid on its rim, upwards; ``bottom=-1`` makes it whole."""
        self._domes.append((part, *centre, radius, height, bottom))

    def sample(self, num: int, rng: np.random.Generator, unevenness: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Points drawn by area, and the part of each. The density of a part is multiplied by ``exp(±unevenness)`` at
        most: scanners do not see all parts of a thing equally well.

        Shape:
            - returns ``(num, 3)`` float64 and ``(num,)`` int64.
        """
        kinds = [(np.array(rows, dtype=np.float64), area, place) for rows, area, place in (
            (self._flats, flat_area, on_flats), (self._tubes, tube_area, on_tubes),
            (self._rings, ring_area, on_rings), (self._domes, dome_area, on_domes)) if rows]
        parts = np.concatenate([rows[:, 0] for rows, _, _ in kinds]).astype(np.int64)
        weights = np.concatenate([area(rows) for rows, area, _ in kinds])
        if unevenness:
            weights = weights * np.exp(unevenness * rng.uniform(-1, 1, parts.max() + 1))[parts]
        edges = np.cumsum(weights)
        piece = np.sort(np.searchsorted(edges, rng.random(num) * edges[-1], side='right').clip(max=len(parts) - 1))
        u, v = rng.random((2, num))
        points, first, begin = np.empty((num, 3)), 0, 0
        for rows, _, place in kinds:
            first, last = first + len(rows), first
            end = np.searchsorted(piece, first)
            chosen = slice(begin, end)
            points[chosen] = place(rows[piece[chosen] - last], u[chosen], v[chosen])
            begin = end
        return points, parts[piece]


def flat_area(rows):
    return np.linalg.norm(np.cross(rows[:, 4:7], rows[:, 7:10]), axis=1)


def on_flats(rows, u, v):
    return rows[:, 1:4] + rows[:, 4:7] * u[:, None] + rows[:, 7:10] * v[:, None]


def tube_area(rows):
    a, b, length = rows[:, 4], rows[:, 5], rows[:, 6]
    return np.pi * (a + b) * np.hypot(length, b - a)


def on_tubes(rows, u, v):
    a, b, length, axis = rows[:, 4], rows[:, 5], rows[:, 6], rows[:, 7].astype(np.int64)
    radius = np.sqrt(a * a + u * (b * b - a * a))  # evenly by area: the circumference grows with the radius
    straight = np.abs(b - a) < 1e-9
    along = np.where(straight, u, (radius - a) / np.where(straight, 1, b - a))
    points, row = rows[:, 1:4].copy(), np.arange(len(rows))
    points[row, axis] += along * length
    points[row, (axis + 1) % 3] += radius * np.cos(TURN * v)
    points[row, (axis + 2) % 3] += radius * np.sin(TURN * v)
    return points


def ring_area(rows):
    return TURN * rows[:, 5] * rows[:, 4] * np.abs(rows[:, 7] - rows[:, 6]) * (1 + rows[:, 8]) / 2


def on_rings(rows, u, v):
    radius, thickness, first, last, stretch = rows[:, 4:].T
    angle = first + u * (last - first)
    reach = radius + thickness * np.cos(TURN * v)
    return rows[:, 1:4] + np.stack([reach * np.cos(angle), thickness * np.sin(TURN * v),
                                    stretch * reach * np.sin(angle)], axis=1)


def dome_area(rows):
    return TURN * rows[:, 4] * (rows[:, 4] + rows[:, 5]) / 2 * (1 - rows[:, 6])


def on_domes(rows, u, v):
    radius, height, bottom = rows[:, 4:].T
    level = bottom + u * (1 - bottom)  # evenly by area on a sphere (Archimedes)
    reach = radius * np.sqrt(np.maximum(0, 1 - level * level))
    return rows[:, 1:4] + np.stack([reach * np.cos(TURN * v), reach * np.sin(TURN * v), height * level], axis=1)
