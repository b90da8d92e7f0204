"""Rows of numbers as text: ``txt``, ``csv``, ``xyz``."""
import re
from pathlib import Path

import numpy as np

__all__ = ['read_rows']

COMMENT = re.compile('#|//')
INDEX = ('', 'id', 'idx', 'index', 'unnamed: 0')  # columns that number the rows, as tables are saved with them
XYZ = ('x', 'y', 'z')
NORMALS = (('nx', 'ny', 'nz'), ('normal_x', 'normal_y', 'normal_z'))


def read_rows(path: Path) -> tuple[np.ndarray, bool | None]:
    """Rows of numbers separated by commas, semicolons (a comma is then the decimal mark) or blanks, and whether
    columns 3 to 5 are normals (``None``: the file does not say).

    ``#`` and ``//`` comments and header lines are skipped. A header that names the columns orders them: x, y, z, then
    normals, then the others; a column that numbers the rows (no name, ``id``, ``index``) is left out. A leading line
    with one number announces the number of rows.

    Raises:
        ValueError: no row of numbers, rows of different lengths, an empty field, another number of rows than announced,
            a header of another length than the rows.
    """
    raw = [line.strip() for line in path.read_text(encoding='utf-8-sig', errors='replace').splitlines()]
    raw = [line for line in raw if line]
    lines = [COMMENT.split(line, maxsplit=1)[0].strip() for line in raw]
    first = first_row(lines, 0)
    if first is None:
        raise ValueError(f'no row of numbers, the file begins with {raw[0][:40] if raw else ""!r}')
    announced = None
    if len(split(lines[first])) == 1 and any(lines[first + 1:]):
        announced, first = lines[first], first_row(lines, first + 1)
        if first is None:
            raise ValueError(f'{announced} points announced in the first line, no row of numbers follows')
    rows = [line for line in lines[first:] if line]
    if announced is not None and announced != str(len(rows)):
        raise ValueError(f'{announced} points announced in the first line, {len(rows)} rows follow')
    points = load(rows)
    broken = next((line for line in lines[:first] if is_broken(line, points.shape[1])), None)
    if broken is not None:
        raise ValueError(f'{broken[:80]!r} stands before the rows, and is neither one of them nor a header')
    return arrange(points, raw[first - 1], bool(lines[first - 1])) if first else (points, None)


def load(rows: list[str]) -> np.ndarray:
    """The numbers in the rows, ``(N, columns)``."""
    mark = delimiter(rows[0])
    if mark == ';':
        rows = [row.replace(',', '.') for row in rows]
    if mark is not None and all(row.endswith(mark) for row in rows):  # a mark behind every row is not a column
        rows = [row[:-1] for row in rows]
    return np.loadtxt(rows, delimiter=mark, quotechar='"', ndmin=2)


def arrange(points: np.ndarray, header: str, required: bool) -> tuple[np.ndarray, bool | None]:
    """The columns in the order x, y, z, normals, others, where ``header`` names them; as they are where it does not.
    A header of another length is an error when ``required``: a comment may say anything."""
    names = [name.lower() for name in split(header.lstrip('#/ \t'))]
    named = set(XYZ) <= set(names)
    if len(names) != points.shape[1]:
        if named and required:
            raise ValueError(f'the header names {len(names)} columns ({header[:60]!r}), the rows have '
                             f'{points.shape[1]}')
        return points, None
    normals = next((triple for triple in NORMALS if set(triple) <= set(names)), ())
    leading = [names.index(name) for name in (*XYZ, *normals)] if named else []
    rest = [i for i, name in enumerate(names) if i not in leading and name not in INDEX]
    return points[:, leading + rest], bool(normals) if named else None


def first_row(lines: list[str], start: int) -> int | None:
    """Where the rows of numbers begin."""
    return next((i for i in range(start, len(lines)) if is_row(lines[i])), None)


def is_row(line: str) -> bool:
    """Whether a line consists of numbers; a field without any is an error of a row, not the mark of a header."""
    fields = split(line)
    if delimiter(line) == ';':
        fields = [field.replace(',', '.') for field in fields]
    try:
        return bool([float(field) for field in fields if field])
    except ValueError:
        return False


def is_broken(line: str, columns: int) -> bool:
    """Whether a line has as many fields as the rows, some of which only are numbers: a damaged row, and no header."""
    fields = [field for field in split(line) if field]
    return len(fields) == columns and any(map(is_row, fields))


def split(line: str) -> list[str]:
    """The fields of a line, without quotes."""
    return [field.strip(' \t"\'') for field in line.split(delimiter(line))]


def delimiter(line: str) -> str | None:
    """What separates the fields of a line; ``None`` are blanks."""
    return ';' if ';' in line else ',' if ',' in line else None
