"""The configs that come with the package, by name."""
import os
from fnmatch import fnmatchcase
from pathlib import Path

from mmengine.config import Config

from ewa3d.registry import nearest

__all__ = ['config_root', 'find_config', 'is_checkpoint', 'list_configs', 'read_config']

CONFIG_SUFFIXES = ('.py', '.yml', '.yaml', '.json')
WEIGHT_SUFFIXES = ('.pth', '.pt', '.ckpt', '.safetensors')
EXPORTED = {'.onnx': 'onnxruntime', '.pt2': 'torch.export.load'}  # and what opens it


def config_root() -> Path:
    """The folder of the configs: ``ewa3d/configs`` of an installed package, ``configs`` of a checkout.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(__file__).resolve().parent
    for root in (package / 'configs', package.parent / 'configs'):
        if (root / '_base_').is_dir():
            return root
    raise FileNotFoundError(f'{package}: the configs, which belong into {package / "configs"}, are not there; install '
                            'the package again')


def list_configs(pattern: str = '*') -> list[str]:
    """Names of configs, ``folder/name``, sorted. :func:`ewa3d.build` and the commands take them, also without the
    folder.

    Args:
        pattern: as in a shell: ``'*modelnet*'``, ``'part_seg/*_ewa'``.
    """
    root = config_root()
    names = (path.relative_to(root).with_suffix('').as_posix() for path in root.rglob('*.py') if path.is_file())
    return sorted(name for name in names if not name.startswith('_base_/') and fnmatchcase(name, pattern))


def find_config(name: str | Path) -> Path:
    """The file of a config: a path, or a name from :func:`list_configs`, with or without its folder, ``configs/`` or
    ``.py``.

    Raises:
        FileNotFoundError: there is neither such a file nor such a name; tells the nearest ones.
        ValueError: several folders have a config of this name; a file that is no config. IsADirectoryError: a folder.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in CONFIG_SUFFIXES:
            raise ValueError(f'config {path}: a config ends in {", ".join(CONFIG_SUFFIXES)}, got {path.suffix!r}')
        return path
    known = list_configs()
    short = os.fspath(name).replace('\\', '/').removeprefix('./').removeprefix('configs/').removesuffix('.py')
    found = [entry for entry in known if short in (entry, entry.rpartition('/')[2])]
    if len(found) > 1:
        raise ValueError(f'config {name}: several are called so: {", ".join(found)}')
    if not found and path.is_dir():
        raise IsADirectoryError(f'config {name} is a folder; a file or a name was expected')
    if not found:
        if '/' in short and short.partition('/')[0] not in {entry.partition('/')[0] for entry in known}:
            raise FileNotFoundError(f'config {name} does not exist')
        close = known if '/' in short else [entry.rpartition('/')[2] for entry in known]
        hint = nearest(short, close)
        raise FileNotFoundError(f'config {name} does not exist' + (f'; {hint}' if hint.endswith('?') else
                                                                  '; ewa3d configs lists those that come along'))
    return config_root() / f'{found[0]}.py'


def is_checkpoint(name: object) -> bool:
    """Whether what was given in place of a config is called like a file of weights.

    Raises:
        ValueError: it is called like an exported model.
    """
    suffix = Path(name).suffix if isinstance(name, (str, Path)) else ''
    if suffix in EXPORTED:
        raise ValueError(f'{name}: an exported model, which {EXPORTED[suffix]} opens (docs/export.md); a config or a '
                         'checkpoint was expected')
    return suffix in WEIGHT_SUFFIXES


def read_config(path: Path) -> Config:
    """A config from its file. One in Python is a program; one in YAML or JSON is data, and so is what it is based on.

    Raises:
        ValueError: YAML with tags, which name classes of Python, or with aliases that unfold without end.
        Exception: whatever a config in Python raises.
    """
    _check_yaml(path)
    return Config.fromfile(path)


def _check_yaml(path: Path, above: tuple[Path, ...] = ()) -> None:
    """mmengine would make any object that a file names, and copy what it holds many times over once for each time."""
    if path.suffix.lower() not in ('.yml', '.yaml') or not path.is_file():
        return
    if path.resolve() in above:
        raise ValueError(f'{path} is based on itself')
    import yaml

    from ewa3d.engine.bounds import check_tree
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
        check_tree(content, path.stat().st_size)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f'{path}: no YAML of plain values: {error}') from None
    bases = content.get('_base_', ()) if isinstance(content, dict) else ()
    for base in [bases] if isinstance(bases, str) else bases:
        if isinstance(base, str):
            _check_yaml(path.parent / base, (*above, path.resolve()))
