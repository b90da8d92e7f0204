"""Getting a published data set: downloaded, compared, unpacked, counted; or what has to be done by hand."""
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ewa3d.checks import some
from ewa3d.datasets.cache import lock
from ewa3d.datasets.sources import Archive, Source
from ewa3d.download import checksum_of, download, verify
from ewa3d.files import atomic_write, check_writable
from ewa3d.unpack import look_into, remove_unfinished, unpack

__all__ = ['Inventory', 'configs_of', 'inventory', 'prepare']

RECORDS = '.prepared'  # below the root: what was downloaded from where, one file a data set


@dataclass
class Inventory:
    """The files of a data set; ``str()`` is what the commands print.

    Attributes:
        folder: where they should be. there: what was found, missing: what was not, wrong: what is another file.
        notes: what was downloaded, and whether it is still there as it was.
    """
    folder: Path
    there: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing and nothing is wrong."""
        return not self.missing and not self.wrong

    def __str__(self) -> str:
        lines = [f'folder: {self.folder}']
        for kind in ('there', 'missing', 'wrong'):
            lines += [f'{kind}: {text}' for text in getattr(self, kind)]
        return '\n'.join(f'  {line}' for line in lines + [f'note: {text}' for text in self.notes])


def inventory(source: Source, root: Path) -> Inventory:
    """Which files of a data set are there; nothing but known checksums is read of them."""
    folder = root / source.folder
    found = Inventory(folder)
    if not folder.is_dir():
        found.missing.append('the folder')
        return found
    for part in source.parts:
        files = list(folder.glob(part.pattern))
        counted = part.pattern if len(files) == part.count == 1 else f'{part.pattern}: {len(files)}'
        if len(files) <= part.count > 1:
            counted += f' of {part.count}'
        (found.there if len(files) >= part.count else found.missing).append(counted)
        if part.md5 and files:
            digest = checksum_of(files[0], 'md5')['md5']
            if digest != part.md5:
                found.wrong.append(f'{part.pattern}: {files[0].stat().st_size} bytes with the md5 {digest}; the '
                                   f'official file has {part.md5}')
    record = read_record(source, root)
    if record:
        found.notes.append(f'from {record["archive"]} of {record["url"]}, sha256 {record["sha256"]}')
        now, then = sizes_in(folder), record['files']
        gone = [name for name in then if name not in now]
        other = [f'{name} ({now[name]} bytes, not {size})' for name, size in then.items()
                 if now.get(name, size) != size]
        if gone:
            found.missing.append(f'of the {len(then)} files that were unpacked: {some(gone, 3)}')
        if other:
            found.wrong.append(f'other sizes than when they were unpacked: {some(other, 3)}')
    return found


def configs_of(source: Source, root: Path) -> Iterator[tuple[str, Mapping]]:
    """Where the data of a source stand in a config, and what stands there."""
    for dataset in source.datasets:
        for split in source.splits:
            yield f'{split}_dataloader.dataset', dict(dataset, data_root=str(root / source.folder), split=split)


def prepare(source: Source, root: Path, *, urls: Sequence[str] = (), offline: bool = False, keep: bool = False,
            tell: Callable[[str], object] = lambda text: None, **options) -> bool:
    """Get a data set into its folder below ``root``; whether it is there, all of it.

    An archive that lies in ``root`` is used instead of a download, and neither changed nor deleted where it is wrong.
    What is complete is left as it is; so is a folder that is not, and is in the way.

    Args:
        urls: mirrors that are tried before the known ones.
        offline: no network: of archives that are there.
        keep: keep the archive.
        tell: is called with every line about what happens. options: of :func:`ewa3d.download.download`.

    Raises:
        FileExistsError: the folder is there and not complete.
        FileNotFoundError: ``offline``, and the archive is not there.
        ValueError, OSError: see :func:`ewa3d.download.download` and :func:`ewa3d.unpack.unpack`.
    """
    check_writable(root, '--root')
    (root / RECORDS).mkdir(parents=True, exist_ok=True)
    with lock(root / RECORDS / f'{source.name}.lock'):  # whoever else is at it: then it may be there in a moment
        found = inventory(source, root)
        if found.complete:
            tell(f'{source.name} is complete: nothing to do')
            return True
        archive = source.archive
        here = archive is not None and (root / archive.name).is_file()
        if archive is None or not (here or archive.urls or urls):
            tell(f'{source.what}: {source.terms} ({source.page})\n{source.told_steps(root)}\n'
                 f'Then: ewa3d data check {source.name} --root {root}')
            return False
        target = root / source.folder
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        if target.exists():
            raise FileExistsError(f'{target} is there and is not all of {source.name}; what is missing or wrong: '
                                  f'{some([*found.missing, *found.wrong], 2)}; rename or delete it first')
        remove_unfinished(target)
        tell(f'{source.what}; terms: {source.terms} ({source.page})')
        if source.note:
            tell(f'note: {source.note}')
        record = _fetch(source, archive, root, [*urls, *archive.urls], offline, tell, options)
        try:
            unpack(root / archive.name, target, archive.holds, archive.most)
        except ValueError:
            if not here:  # the next call should not begin with it
                (root / archive.name).unlink()
            raise
        sizes = sizes_in(target)
        atomic_write(_record_file(source, root), json.dumps(dict(record, files=sizes), indent=0))
        if not here and not keep:
            (root / archive.name).unlink()
        tell(f'unpacked {len(sizes)} files, {sum(sizes.values()) / 1e6:.0f} MB, to {target}')
        return inventory(source, root).complete


def _fetch(source: Source, archive: Archive, root: Path, urls: Sequence[str], offline: bool,
           tell: Callable[[str], object], options: Mapping) -> dict:
    """Have the archive in ``root``; what is written down of it."""
    file, before = root / archive.name, read_record(source, root)
    if file.is_file():
        url, sha256 = f'{file}, which was there', verify(file, archive.size, archive.checksum)
    elif offline:
        raise FileNotFoundError(f'{file} is not there, and --offline downloads nothing; it is to be had from '
                                f'{" or ".join(urls)}')
    else:
        got = download(urls, file, archive.size, archive.checksum,
                       check=lambda path: look_into(path, archive.holds, archive.most), **options)
        url, sha256 = got.url, got.sha256
    tell(f'{archive.name} from {url}: {file.stat().st_size} bytes, sha256 {sha256}')
    if archive.checksum:
        tell(f'its {archive.checksum.partition(":")[0]} is the one known from {archive.attributed}')
    elif before and before['sha256'] != sha256:
        tell(f'note: no checksum of it is published, and it is another file than the one prepared here before '
             f'(sha256 {before["sha256"]})')
    else:
        tell('no checksum of it is published; this one is kept to compare with')
    return dict(archive=archive.name, url=url, size=file.stat().st_size, sha256=sha256)


# ---- records --------------------------------------------------------------------------------------------------------
def _record_file(source: Source, root: Path) -> Path:
    return root / RECORDS / f'{source.name}.json'


def read_record(source: Source, root: Path) -> dict:
    """What :func:`prepare` wrote down; empty where there is nothing, or nothing that can be read."""
    kinds = dict(archive=str, url=str, sha256=str, files=dict)
    try:
        record = json.loads(_record_file(source, root).read_text())
        return record if all(isinstance(record.get(key), kind) for key, kind in kinds.items()) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def sizes_in(folder: Path) -> dict[str, int]:
    """The files below a folder and their bytes."""
    return {file.relative_to(folder).as_posix(): file.stat().st_size
            for file in sorted(folder.rglob('*')) if file.is_file()}
