"""Readers of point clouds and meshes.

Arrays (``npy npz txt csv xyz h5``) and OFF meshes need nothing extra; ``ply pcd obj stl`` go through open3d.
Every reader raises an error that names the file.
"""
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ewa3d.datasets.announced import check_announced, check_archive, check_unpacked
from ewa3d.datasets.text import read_rows

__all__ = ['Cloud', 'Mesh', 'EXTENSIONS', 'read_cloud', 'read_off', 'sample_mesh', 'as_cloud', 'read_h5',
           'import_open3d']

MESH_POINTS = 10_000  # points drawn from a mesh, as many as modelnet40_normal_resampled has
FAR = 1000.0  # a cloud further from the origin than so many of its extents is moved there before float32 rounds it
MAX_ROWS, MIN_COLUMNS = 9, 12  # so few points of more columns are a cloud that lies on its side
KEYS = ('points', 'data', 'xyz', 'arr_0')


class Cloud(NamedTuple):
    """A cloud as read.

    Shape:
        - points: ``(N, 3+F)``: xyz, then normals, then what else the file has.
        - normals: whether columns 3 to 5 are normals; ``None`` where the file cannot tell.
    """
    points: np.ndarray
    normals: bool | None = None


class Mesh(NamedTuple):
    """Triangles.

    Shape:
        - vertices: ``(V, 3)`` float64.
        - faces: ``(T, 3)`` int64.
    """
    vertices: np.ndarray
    faces: np.ndarray


def read_cloud(path: str | Path, mesh_points: int = MESH_POINTS, rng: np.random.Generator | None = None) -> Cloud:
    """The cloud in a file, by its extension. From a mesh ``mesh_points`` are drawn (see :func:`sample_mesh`); a mesh
    format without faces is the cloud of its vertices.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown extension, a broken file, coordinates that are not finite.
        ImportError: the format needs open3d.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f'{path}: unknown extension {path.suffix!r}; known are {", ".join(sorted(READERS))}')
    if not path.is_file():
        raise FileNotFoundError(f'{path}: there is no such file')
    try:
        found = reader(path)
    except ImportError:
        raise
    except Exception as error:  # libraries raise errors of their own on broken files
        text = str(error)
        raise ValueError(text if str(path) in text else f'{path}: cannot be read: {text}') from error
    if isinstance(found, Mesh):
        if len(found.faces):
            points = sample_mesh(found, mesh_points, rng or np.random.default_rng(0), str(path))
            return Cloud(as_cloud(points, str(path)), True)
        found = Cloud(found.vertices, False)
    return Cloud(as_cloud(found.points, str(path)), found.normals)


def as_cloud(points, name: str) -> np.ndarray:
    """``points`` as a float32 array ``(N, 3+F)``, or an error that names the sample.

    A cloud of float64 or integers so far from the origin that float32 would round its shape away (map coordinates) is
    moved so that its centre lies there; every transform for classification centres it anyway.

    Raises:
        TypeError: not an array of numbers.
        ValueError: another shape, no points, NaN or infinite values.
    """
    points = np.asarray(points)
    if points.dtype.kind not in 'fiu':
        raise TypeError(f'{name}: a cloud is an array of numbers, got {points.dtype}')
    if points.ndim != 2 or points.shape[1] < 3 or not len(points):
        raise ValueError(f'{name}: a cloud has the shape (N, 3+F) with N > 0, got {points.shape}')
    if len(points) <= MAX_ROWS < MIN_COLUMNS < points.shape[1]:
        raise ValueError(f'{name}: the shape {points.shape} means {len(points)} points of {points.shape[1]} columns; a '
                         f'cloud has the shape (N, 3+F): transpose it')
    finite = np.isfinite(points)
    if not finite.all():
        rows = np.flatnonzero(~finite.all(1))
        raise ValueError(f'{name}: {len(rows)} of {len(points)} points have NaN or infinite values, the first is '
                         f'point {rows[0]}')
    if points.dtype == np.float32:
        return points
    if points.dtype.itemsize > 2:  # integers, too: those beyond 2^24 are rounded in single precision
        points = points.astype(np.float64)
        low, high = points[:, :3].min(0), points[:, :3].max(0)
        centre = low / 2 + high / 2  # a sum may leave the range
        if np.abs(centre).max() > FAR * (high - low).max():
            points = np.concatenate([points[:, :3] - centre, points[:, 3:]], axis=1)
        if np.abs(points).max() > np.finfo(np.float32).max:
            raise ValueError(f'{name}: values up to {np.abs(points).max():.3g} do not fit float32')
    return points.astype(np.float32)


def sample_mesh(mesh: Mesh, num_points: int, rng: np.random.Generator, name: str = 'mesh') -> np.ndarray:
    """Points drawn evenly by area, with the normals of their faces.

    Shape:
        - returns ``(num_points, 6)``.

    Raises:
        ValueError: vertices that are not finite, faces that name no vertex, no area.
    """
    vertices, faces = mesh
    if not np.isfinite(vertices).all():
        raise ValueError(f'{name}: the mesh has NaN or infinite vertices')
    if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
        raise ValueError(f'{name}: a face names vertex {faces.min() if faces.min() < 0 else faces.max()}, there are '
                         f'{len(vertices)}')
    origin, a, b = (vertices[faces[:, i]] for i in range(3))
    a, b = a - origin, b - origin
    normals = np.cross(a, b)
    double_area = np.linalg.norm(normals, axis=1)
    edges = np.cumsum(double_area)
    if not len(faces) or not edges[-1] > 0:
        raise ValueError(f'{name}: the mesh has no faces with an area to draw points from')
    face = np.searchsorted(edges, rng.random(num_points) * edges[-1], side='right').clip(max=len(faces) - 1)
    u, v = rng.random((2, num_points, 1))
    outside = u + v > 1  # fold the parallelogram onto the triangle
    u, v = np.where(outside, 1 - u, u), np.where(outside, 1 - v, v)
    points = origin[face] + u * a[face] + v * b[face]
    return np.concatenate([points, normals[face] / np.maximum(double_area[face, None], 1e-300)], axis=1)


# ---- readers ------------------------------------------------------------------------------------------------------
def read_text(path: Path) -> Cloud:
    return Cloud(*read_rows(path))


def read_npy(path: Path) -> Cloud:
    return Cloud(np.load(path, allow_pickle=False))


def read_npz(path: Path) -> Cloud:
    """The array named ``points``, ``data``, ``xyz`` or ``arr_0``, or the only one."""
    check_archive(path)
    with np.load(path, allow_pickle=False) as file:
        return Cloud(file[pick_key(file.files, path)])


def read_h5_cloud(path: Path) -> Cloud:
    """One cloud a file, under the key ``points``, ``data``, ``xyz``, or the only one."""
    import h5py
    with open_h5(path) as file:
        keys = [key for key in file if isinstance(file.get(key, getlink=True), (h5py.SoftLink, h5py.ExternalLink))
                or isinstance(file[key], h5py.Dataset)]
        return Cloud(own_array(file, pick_key(keys, path), path)[()])


def pick_key(keys, path: Path) -> str:
    """Which of the arrays in a file is the cloud."""
    keys = list(keys)
    for key in KEYS:
        if key in keys:
            return key
    if len(keys) != 1:
        raise ValueError(f'{path}: cannot tell which of the arrays {sorted(keys)} is the cloud; name it "points"')
    return keys[0]


@contextmanager
def open_h5(path: Path) -> Iterator:
    """An h5 file, open for reading; what goes wrong with it there is a ``ValueError`` that names it."""
    import h5py
    if not path.is_file():
        raise FileNotFoundError(f'{path}: there is no such file')
    try:
        file = h5py.File(path, 'r')
    except OSError as error:
        raise ValueError(f'{path}: not a readable HDF5 file, perhaps cut off: {error}') from error
    try:
        with file:
            yield file
    except Exception as error:  # a broken file makes the library raise errors of any kind
        text = str(error)
        raise ValueError(text if str(path) in text else f'{path}: cannot be read, perhaps cut off: {text}') from error


def read_h5(path: Path, *keys: str) -> list[np.ndarray]:
    """These arrays of an h5 file.

    Raises:
        ValueError: a cut-off or broken file, a missing key.
    """
    with open_h5(path) as file:
        for key in keys:
            if key not in list(file):  # `in file` would follow links
                raise ValueError(f'{path}: has no key {key!r}, only {sorted(file)}')
        arrays = [own_array(file, key, path) for key in keys]
        return [array[()] for array in arrays]


def own_array(file, key: str, path: Path):
    """The numbers ``key`` of an open h5 file, which have to lie in that file and to be as many as it says."""
    import h5py
    linked = isinstance(file.get(key, getlink=True), (h5py.SoftLink, h5py.ExternalLink))  # a soft one may lead to such
    array = None if linked else file[key]
    if array is None or getattr(array, 'external', None) or getattr(array, 'is_virtual', False):
        raise ValueError(f'{path}: {key!r} is a link, perhaps into another file, which is not followed')
    if getattr(array, 'shape', None) is None:
        raise ValueError(f'{path}: {key!r} is a group or holds nothing, an array was expected')
    if array.dtype.hasobject:  # lists of any length, which may be one and the same many times
        raise ValueError(f'{path}: {key!r} should hold numbers, got {array.dtype}')
    size = max(array.size, math.prod(array.chunks or ()))  # a chunk is unpacked as a whole
    check_unpacked(path, size * array.dtype.itemsize, array.id.get_storage_size())
    return array


def read_off(path: Path) -> Mesh:
    """An OFF mesh. Also read: a header that runs into the counts (``OFF490 518 0``, as many ModelNet files have it),
    comments, polygons (split into a fan of triangles), colours behind a vertex or a face, lines broken anywhere.

    Raises:
        ValueError: naming the file: no OFF, or one that is cut off.
    """
    lines = [line.split('#')[0].strip() for line in path.read_text('utf-8-sig', errors='replace').splitlines()]
    lines = [line for line in lines if line]
    header = re.fullmatch(r'(?:ST)?C?N?OFF\s*(.*)', lines[0], re.IGNORECASE) if lines else None
    if header is None:
        raise ValueError(f'{path}: an OFF file begins with OFF, this one with {lines[0][:20] if lines else ""!r}')
    body = [header[1], *lines[1:]] if header[1] else lines[1:]
    try:
        num_vertices, num_faces = (int(word) for word in body[0].split()[:2])
    except (ValueError, IndexError):
        raise ValueError(f'{path}: the numbers of vertices and faces should follow OFF, got '
                         f'{body[0][:40] if body else ""!r}') from None
    try:
        return off_lines(body[1:], num_vertices, num_faces, path)
    except ValueError:
        mesh = off_words(' '.join(body[1:]).split(), num_vertices, num_faces)
        if mesh is None:
            raise
        return mesh


def off_lines(lines: list[str], num_vertices: int, num_faces: int, path: Path) -> Mesh:
    """A mesh of one line a vertex and a face, whatever follows on it."""
    if num_vertices < 0 or num_faces < 0 or len(lines) < num_vertices + num_faces:
        raise ValueError(f'{path}: {num_vertices} vertices and {num_faces} faces announced, {len(lines)} lines '
                         f'follow: the file is cut off')
    rows = lines[:num_vertices]
    vertices = np.loadtxt(rows, usecols=(0, 1, 2), ndmin=2) if rows else np.empty((0, 3))
    return Mesh(vertices, off_faces(lines[num_vertices:num_vertices + num_faces]))


def off_words(words: list[str], num_vertices: int, num_faces: int) -> Mesh | None:
    """A mesh of words, wherever its lines break; ``None`` unless vertices and faces are all there is."""
    at, faces = 3 * num_vertices, []
    if num_vertices < 0 or num_faces < 0 or not all(word.isdecimal() for word in words[at:]):
        return None
    for _ in range(num_faces):
        if at >= len(words):
            return None
        size = 1 + int(words[at])
        faces.append(' '.join(words[at:at + size]))
        at += size
    if at != len(words):
        return None
    return Mesh(np.array(words[:3 * num_vertices], dtype=np.float64).reshape(-1, 3), off_faces(faces))


def off_faces(lines: list[str]) -> np.ndarray:
    """Triangles ``(T, 3)`` from lines ``n i_1 … i_n``."""
    triangles = []
    for line in lines:
        words = line.split()
        n = int(words[0])
        corners = [int(word) for word in words[1:1 + n]]
        if n < 0 or len(corners) < n:
            raise ValueError(f'a face of {n} corners has {"no such number" if n < 0 else f"only {len(corners)}"}: '
                             f'{line[:40]!r}')
        triangles += [(corners[0], corners[i], corners[i + 1]) for i in range(1, n - 1)]
    return np.array(triangles, dtype=np.int64).reshape(-1, 3)


def read_mesh_open3d(path: Path) -> Mesh:
    o3d = import_open3d(path)
    check_announced(path)
    with o3d.utility.VerbosityContextManager(o3d.utility.VerbosityLevel.Error):
        mesh = o3d.io.read_triangle_mesh(str(path))
    if not len(mesh.vertices):
        raise ValueError('open3d finds no vertices in it')
    return Mesh(np.asarray(mesh.vertices), np.asarray(mesh.triangles, dtype=np.int64))


def read_obj(path: Path) -> Mesh:
    """An OBJ mesh; without faces (open3d finds nothing then) its vertices. Materials are not looked for: open3d would
    open any file that they name."""
    import_open3d(path)
    text = path.read_text('utf-8-sig', errors='replace').replace('\\\r\n', ' ').replace('\\\n', ' ')
    lines = [line for line in text.splitlines() if line.split()[:1] in (['v'], ['vt'], ['vn'], ['f'])]
    if any(line.split()[0] == 'f' for line in lines):
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / 'mesh.obj'
            plain.write_text('\n'.join(lines) + '\n', encoding='utf-8')
            return read_mesh_open3d(plain)
    rows = [line.split()[1:4] for line in lines if line.split()[0] == 'v']
    if not rows:
        raise ValueError('there are no vertices (lines "v x y z") in it')
    return Mesh(np.array(rows, dtype=np.float64).reshape(len(rows), 3), np.empty((0, 3), dtype=np.int64))


def read_points_open3d(path: Path) -> Cloud:
    o3d = import_open3d(path)
    check_announced(path)
    with o3d.utility.VerbosityContextManager(o3d.utility.VerbosityLevel.Error):
        cloud = o3d.io.read_point_cloud(str(path))
    if not cloud.has_points():
        raise ValueError('open3d finds no points in it')
    columns = [np.asarray(cloud.points)]
    columns += [np.asarray(cloud.normals)] if cloud.has_normals() else []
    columns += [np.asarray(cloud.colors)] if cloud.has_colors() else []
    return Cloud(np.concatenate(columns, axis=1), cloud.has_normals())


def read_ply(path: Path) -> Mesh | Cloud:
    """A PLY with faces is a mesh, one without is a cloud."""
    with path.open('rb') as file:
        header = file.read(1 << 16).split(b'end_header')[0]
    if not header.startswith(b'ply'):
        raise ValueError('a PLY file begins with "ply"')
    faces = re.search(rb'element\s+face\s+(\d+)', header)
    return read_mesh_open3d(path) if faces and int(faces[1]) else read_points_open3d(path)


def import_open3d(path: str | Path = ''):
    """open3d, the one place that imports it.

    Raises:
        ImportError: it is not installed, or a system library that it needs is missing; says what to install.
    """
    try:
        import ctypes

        import libusb_package  # carries libusb-1.0.so.0, which a bare system lacks and open3d links to
        ctypes.CDLL(str(libusb_package.get_library_path()), mode=ctypes.RTLD_GLOBAL)
    except (ImportError, OSError):
        pass  # not needed where the system has the library
    try:
        import open3d
    except (ImportError, OSError) as error:
        what = f'{path}: reading {Path(path).suffix} files' if path else 'this'
        raise ImportError(f"{what} needs open3d, which cannot be imported ({error}): "
                          "pip install 'ewa3d[3d]'") from error
    return open3d


READERS = {'.txt': read_text, '.csv': read_text, '.xyz': read_text, '.npy': read_npy, '.npz': read_npz,
           '.h5': read_h5_cloud, '.off': read_off, '.ply': read_ply, '.pcd': read_points_open3d,
           '.obj': read_obj, '.stl': read_mesh_open3d}
EXTENSIONS = frozenset(READERS)
