"""What a run left in its work dir, read back: the lines of ``metrics.jsonl`` and curves of them."""
import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ewa3d.evaluation import is_of_one_class
from ewa3d.registry import nearest

__all__ = ['JUDGED', 'curves_of', 'default_keys', 'differing', 'read_json', 'read_metrics', 'run_names']

NOT_METRICS = ('mode', 'epoch', 'iter', 'time')
JUDGED = ('dataset', 'split', 'points', 'samples')  # what has to agree before numbers are compared


def read_json(path: Path) -> dict:
    """The dict in a file, ``{}`` where there is no such file.

    Raises:
        ValueError: it is no JSON, or something else than a dict.
    """
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: no JSON: {error}') from None
    if not isinstance(found, dict):
        raise ValueError(f'{path}: a JSON object was expected, it holds {str(found)[:80]}')
    return found


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of ``metrics.jsonl``; one that is torn, because a run was killed while it wrote, is left out.

    Raises:
        FileNotFoundError: ``folder`` or the file is not there. ValueError: no line of the file is one of a run.
    """
    folder = Path(folder)
    path = folder if folder.is_file() else folder / 'metrics.jsonl'
    if not path.is_file():
        found = f'there is no {path.name} in it' if folder.is_dir() else 'there is no such folder'
        raise FileNotFoundError(f'{folder}: the work dir of a training was expected, and {found}')
    lines = []
    for text in path.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, Mapping) and {'mode', 'epoch'} <= line.keys():
            lines.append(dict(line))
    if not lines:
        raise ValueError(f'{path}: no line such as {{"mode": "train", "epoch": 1, "loss": …}}')
    return lines


def differing(judged: Mapping[str, Mapping]) -> str:
    """What runs were judged on that differs, as a sentence; empty where they agree, or where it is not known.

    Args:
        judged: name of a run → its data set, split, points and samples, see
            :func:`ewa3d.engine.provenance.describe_data`.
    """
    for key in JUDGED:
        found: dict = {}
        for name, values in judged.items():
            if values.get(key) is not None:
                found.setdefault(values[key], name)
        if len(found) > 1:
            told = ', '.join(f'{name}: {value}' for value, name in list(found.items())[:3])
            what = {'dataset': 'data', 'points': 'numbers of points'}.get(key, f'{key.removesuffix("s")}s')
            return f'runs were judged on different {what} ({told})'
    return ''


def run_names(folders: Sequence[str | Path]) -> list[str]:
    """Short names that differ: the last part of each path, or as many as it takes."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ['/'.join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f'{part[-1]} ({i + 1})' for i, part in enumerate(parts)]  # the same folder twice


def default_keys(lines: Sequence[Mapping]) -> list[str]:
    """Loss, the metrics of the evaluations, learning rate, share rate and the spread of the experts, if they are there.
    """
    trained = {key for line in lines if line['mode'] == 'train' for key in line}
    judged = dict.fromkeys(key for line in lines if line['mode'] == 'val' for key in line
                           if key not in NOT_METRICS and not is_of_one_class(key))
    keys = ['loss', *judged, 'lr', 'share_rate'] if 'loss' in trained else [*judged]
    keys = [key for key in dict.fromkeys(keys) if key in trained or key in judged]
    return keys + (['spread/*'] if any(key.startswith('spread/') for key in trained) else [])


def curves_of(runs: Mapping[str, Sequence[Mapping]], keys: Sequence[str] | None = None) -> dict[str, dict]:
    """Curves over epochs, a panel for each of ``keys``, for :func:`ewa3d.visualization.draw_curves`.

    Args:
        runs: name → lines of :func:`read_metrics`. keys: names in the lines, or patterns (``'acc/*'``: one panel with
            a curve for each); by default :func:`default_keys` of all runs.

    Returns:
        what is shown → name of a curve → ``(epochs, values)``.

    Raises:
        ValueError: no run has one of the keys.
    """
    keys = list(keys or dict.fromkeys(key for lines in runs.values() for key in default_keys(lines)))
    known = {key for lines in runs.values() for line in lines for key in line} - set(NOT_METRICS)
    panels: dict[str, dict] = {}
    for pattern in keys:
        matched = sorted(key for key in known if key == pattern or fnmatch.fnmatchcase(key, pattern))
        if not matched:
            raise ValueError(f'no run has {pattern!r} in its metrics; {nearest(pattern, known)}')
        curves = panels.setdefault(pattern.removesuffix('/*'), {})
        for name, lines in runs.items():
            for key in matched:
                by_mode = {mode: [(line['epoch'], line[key]) for line in lines if line['mode'] == mode and key in line]
                           for mode in ('train', 'val', 'test')}
                by_mode = {mode: points for mode, points in by_mode.items() if points}
                for mode, points in by_mode.items():
                    label = [name] if len(runs) > 1 else []
                    label += [key.rpartition('/')[2] if '/' in pattern else key] if len(matched) > 1 else []
                    label += [mode] if len(by_mode) > 1 or not label else []
                    curves[' '.join(label)] = tuple(map(list, zip(*points)))
    return panels
