"""What the tests of the commands share: config files, a trained run, the line that a mistake gives."""
from pathlib import Path

from engine_toys import toy_config, write_config

from ewa3d import cli


def configs(folder: Path, **options) -> tuple[str, str]:
    """An EWA config and its plain twin, as files."""
    paths = []
    for name, ewa in (('ewa', True), ('plain', False)):
        cfg = toy_config('x', ewa=ewa, epochs=1, **options)
        del cfg['work_dir']
        paths.append(str(write_config(folder / f'{name}.py', cfg)))
    return tuple(paths)


def trained_folder(folder: Path) -> Path:
    """``folder`` with ``ewa.py``, ``plain.py`` and the work dir ``run`` of the first, trained with EMA."""
    ewa, _ = configs(folder, ema=True)
    assert cli.main(['train', ewa, '--work-dir', str(folder / 'run')]) == 0
    return folder


def fails(capsys, *argv: str) -> str:
    """The one line that a mistake gives."""
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1, error
    return error
