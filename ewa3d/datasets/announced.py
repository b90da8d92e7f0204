"""What files announce, against what there is of it: headers of PLY, PCD and STL, and the sizes of packed arrays.

open3d returns arrays of the announced size even where the file ends early, so that is found out before it reads.
"""
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

__all__ = ['check_announced', 'check_archive', 'check_unpacked']

ROOM = 1 << 28  # bytes that any file may unpack to
RATIO = 100  # a larger content may be so many times as large as what is stored of it
LZF_RATIO = 100  # the compression of PCD files gives at most 264 bytes for 3

# Codes of ``struct`` for the types of PLY properties, under both of their names.
PLY_TYPES = {'char': 'b', 'uchar': 'B', 'short': 'h', 'ushort': 'H', 'int': 'i', 'uint': 'I', 'float': 'f',
             'double': 'd', 'int8': 'b', 'uint8': 'B', 'int16': 'h', 'uint16': 'H', 'int32': 'i', 'uint32': 'I',
             'float32': 'f', 'float64': 'd'}


# What coordinates in a PCD file may be; open3d makes zeros of the rest.
PCD_SIZES = dict(F=(4, 8), I=(1, 2, 4), U=(1, 2, 4))
PCD_KEYS = ('VERSION', 'FIELDS', 'COLUMNS', 'SIZE', 'TYPE', 'COUNT', 'WIDTH', 'HEIGHT', 'VIEWPOINT', 'POINTS')


def check_announced(path: Path) -> None:
    """Raise where a PLY, PCD or STL file holds less than its header announces; nothing for other formats.

    Raises:
        ValueError: naming the file, what was announced and what was found.
    """
    check = {'.ply': check_ply, '.pcd': check_pcd, '.stl': check_stl}.get(path.suffix.lower())
    if check is not None:
        check(path, path.read_bytes())


def check_unpacked(path: Path, size: int, stored: int) -> None:
    """Raise ``ValueError`` where ``size`` bytes come out of so few stored ones that only a trap would have them."""
    if size > max(ROOM, RATIO * stored):
        raise ValueError(f'{path}: {stored} bytes that unpack to {size} are refused; write the array anew, less packed')


def check_archive(path: Path) -> None:
    """The same for every array of an npz file."""
    if zipfile.is_zipfile(path):  # numpy says what else it is
        stored = path.stat().st_size  # whatever an entry says that it takes of that
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                check_unpacked(path, info.file_size, min(info.compress_size, stored))


def cut_off(path: Path, announced: int, what: str, found: int) -> ValueError:
    return ValueError(f'{path}: {announced} {what} announced, {found} found: the file is cut off')


# ---- PLY ----------------------------------------------------------------------------------------------------------
def check_ply(path: Path, raw: bytes) -> None:
    match = re.match(rb'ply\s.*?end_header[ \t]*(\r\n|\n|\r|$)', raw, re.DOTALL)
    if match is None:
        raise ValueError(f'{path}: a PLY file begins with "ply" and a header up to "end_header"')
    layout, elements = ply_header(path, match[0].decode('latin-1'))
    body = raw[match.end():]
    words = body.split() if layout == 'ascii' else None
    order = '>' if layout == 'binary_big_endian' else '<'
    at = 0
    for name, count, properties in elements:
        if count and not properties:
            raise ValueError(f'{path}: the PLY header announces {count} of {name!r} without a property')
        what = 'vertices' if name == 'vertex' else f'{name}s'
        if words is not None:
            sizes, total, length = [1] * len(properties), len(words), lambda code, at: int(words[at])
        else:
            sizes = [struct.calcsize(order + item) for _, item in properties]
            total, length = len(body), lambda code, at: struct.unpack_from(order + code, body, at)[0]
        if not any(lists for lists, _ in properties):
            row = sum(sizes)
            if at + count * row > total:
                raise cut_off(path, count, what, (total - at) // row)
            at += count * row
            continue
        for i in range(count):
            at = after_lists(at, total, properties, sizes, order if words is None else '', length)
            if at is None:
                raise cut_off(path, count, what, i)


def ply_header(path: Path, header: str) -> tuple[str, list[tuple[str, int, list]]]:
    """The format, and name, count and properties ``(code of a list's length or None, code)`` of each element."""
    layout, elements = '', []
    for line in header.splitlines():
        match line.split():
            case ['format', layout, *_]:
                pass
            case ['element', name, count] if count.isdecimal():
                elements.append((name, int(count), []))
            case ['property', 'list', _, _, 'x' | 'y' | 'z'] if elements and elements[-1][0] == 'vertex':
                raise ValueError(f'{path}: the PLY header has the line {line!r}; a coordinate is one number')
            case ['property', 'list', length, item, _] if elements and {length, item} <= PLY_TYPES.keys():
                elements[-1][2].append((PLY_TYPES[length], PLY_TYPES[item]))
            case ['property', item, _] if elements and item in PLY_TYPES:
                elements[-1][2].append((None, PLY_TYPES[item]))
            case ['element' | 'property', *_]:
                raise ValueError(f'{path}: the PLY header has the line {line!r}, which is none of "element <name> '
                                 f'<count>", "property <type> <name>", "property list <type> <type> <name>"')
    if layout not in ('ascii', 'binary_little_endian', 'binary_big_endian'):
        raise ValueError(f'{path}: the PLY format is ascii, binary_little_endian or binary_big_endian, got {layout!r}')
    return layout, elements


def after_lists(at: int, total: int, properties: list, sizes: list[int], order: str, length: Callable) -> int | None:
    """Where an item that holds lists ends; ``None`` where the file ends before it."""
    for (lists, _), size in zip(properties, sizes):
        if lists is not None:
            head = struct.calcsize(order + lists) if order else 1
            if at + head > total:
                return None
            entries = length(lists, at)
            if entries < 0:
                raise ValueError(f'a list of {entries} entries')
            size = head + entries * size
        at += size
    return at if at <= total else None


# ---- PCD ----------------------------------------------------------------------------------------------------------
def check_pcd(path: Path, raw: bytes) -> None:
    match = re.search(rb'^[ \t]*DATA[ \t]+(\w+)[ \t]*\r?(\n|$)', raw, re.MULTILINE)
    if match is None:
        raise ValueError(f'{path}: a PCD file has a header that ends with DATA ascii, binary or binary_compressed')
    layout, body = match[1].decode('latin-1').lower(), raw[match.end():]
    header = pcd_header(path, raw[:match.start()].decode('latin-1'))
    try:
        sizes = [int(word) for word in header['SIZE']]
        counts = [int(word) for word in header.get('COUNT', ['1'] * len(sizes))]
        known = [int(header['POINTS'][0])] if 'POINTS' in header else []
        if not known or {'WIDTH', 'HEIGHT'} <= header.keys():
            known.append(int(header['WIDTH'][0]) * int(header['HEIGHT'][0]))
        announced = max(known)
        if announced < 0 or min([*sizes, *counts], default=0) < 1:
            raise ValueError
        kinds = zip(header.get('FIELDS') or header['COLUMNS'], header['TYPE'], sizes, counts, strict=True)
        wrong = [(name, kind, size) for name, kind, size, count in kinds
                 if name in ('x', 'y', 'z') and (count > 1 or size not in PCD_SIZES.get(kind, ()))]
        row = sum(size * count for size, count in zip(sizes, counts))
    except (KeyError, IndexError, ValueError):
        raise ValueError(f'{path}: the PCD header should name FIELDS, SIZE, TYPE, COUNT, WIDTH, HEIGHT and POINTS, '
                         f'got {dict(header)}'[:400]) from None
    if wrong:
        raise ValueError(f'{path}: the PCD field {wrong[0][0]!r} has the type {wrong[0][1]} and the size '
                         f'{wrong[0][2]}; one number F 4, F 8, or I or U of 1, 2 or 4 bytes was expected')
    if layout == 'ascii':
        rows = [line.split() for line in body.splitlines() if line.strip()][:announced]
        found = sum(len(words) >= sum(counts) for words in rows)
        odd = next((i for i, words in enumerate(rows) if not all(map(is_number, words))), None)
        if odd is not None:  # open3d would make zeros of it
            raise ValueError(f'{path}: point {odd} is {b" ".join(rows[odd])[:80]!r}, numbers were expected')
    elif layout == 'binary':
        found = len(body) // max(row, 1)
    elif layout == 'binary_compressed':
        packed, unpacked = struct.unpack_from('<II', body) if len(body) >= 8 else (1, 0)
        if len(body) < 8 + packed:
            raise ValueError(f'{path}: {announced} points in {packed} compressed bytes announced, '
                             f'{max(len(body) - 8, 0)} bytes found: the file is cut off')
        if unpacked > LZF_RATIO * max(packed, 1):
            raise ValueError(f'{path}: {packed} compressed bytes cannot hold the {unpacked} that are announced')
        found = unpacked // max(row, 1)
    else:
        raise ValueError(f'{path}: PCD data is ascii, binary or binary_compressed, got {layout!r}')
    if found < announced:
        raise cut_off(path, announced, 'points', found)


def pcd_header(path: Path, text: str) -> dict[str, list[str]]:
    """The words of each line by its first, all of which have to be known and there once: open3d looks at beginnings of
    words, and takes the rest of a line of more than a thousand characters for another one."""
    header: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, *words = line.split() or ['#']
        comment = key.startswith('#')
        if len(line) > 1000 or (not comment and (key not in PCD_KEYS or key in header)):
            raise ValueError(f'{path}: the PCD header has the line {line[:80]!r}; one each of {", ".join(PCD_KEYS)} '
                             'was expected')
        if not comment:
            header[key] = words
    return header


def is_number(word: bytes) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


# ---- STL ----------------------------------------------------------------------------------------------------------
def check_stl(path: Path, raw: bytes) -> None:
    if raw.lstrip().startswith(b'solid'):
        return  # text, which announces nothing
    announced = struct.unpack_from('<I', raw, 80)[0] if len(raw) >= 84 else 1
    if announced > (len(raw) - 84) // 50:
        raise cut_off(path, announced, 'triangles', max(len(raw) - 84, 0) // 50)
