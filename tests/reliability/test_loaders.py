"""Every data set that reads files, on damaged ones: proper samples, or an error that names the file."""
import os
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mutants import mutate, verdicts
from trees import TREES

from ewa3d.datasets.base import shared_ids
from ewa3d.registry import DATASETS

ERRORS = (ValueError, TypeError, KeyError, OSError)
TEXT = ('.txt', '.json', '.pts', '.seg', '.off', '.csv')
WITHOUT_FILES = {'Digits', 'MixedDataset', 'MovingClouds', 'MovingShapes', 'PointDataset', 'SyntheticScenes',
                 'SyntheticShapes'}


def build(cfg: dict):
    return DATASETS.build(dict(split='train', cache_dir=None) | cfg)


def samples(cfg: dict) -> list[dict]:
    data = build(cfg)
    return [data[i] for i in range(len(data))]


def wrong(sample: dict, classes: int) -> str:
    """What is wrong with a sample; nothing where it is proper."""
    for key in ('points', 'boxes'):
        array = sample.get(key)
        if array is not None and not (array.dtype == np.float32 and array.ndim == 2 and np.isfinite(array).all()):
            return f'{key}: {array.dtype} {array.shape}, or not finite'
    if 'points' in sample and not (len(sample['points']) and sample['points'].shape[1] >= 3):
        return f'points: {sample["points"].shape}'
    if 'parts' in sample and len(sample['parts']) != len(sample['points']):
        return 'parts'
    named = [sample['label']] if sample.get('label') is not None else list(sample.get('box_labels', ()))
    if not all(isinstance(label, (int, np.integer)) and 0 <= label < classes for label in named):
        return f'labels: {named}'
    img = sample.get('img')
    if img is not None and (img.dtype not in (np.uint8, torch.uint8) or 0 in img.shape):
        return f'img: {img.dtype} {img.shape}'
    return ''


def judge(case: tuple[dict, Path]) -> str:
    """Nothing where the data are read properly, or refused with an error that names the file."""
    cfg, file = case
    try:
        data = build(cfg)
        classes = len(data.metainfo['classes'])
        found = [wrong(data[i], classes) for i in range(len(data))]
    except ERRORS as error:
        text = str(error)
        known = (file.name, file.parent.name + '/', str(file.parent))  # or what a list names and is not there
        return '' if any(name in text for name in known) else f'{file.name}: the file is not named: {error!r}'
    except Exception as error:
        return f'{file.name}: another error: {error!r}'
    return next((f'{file.name}: {text}' for text in found if text), '')


def files_in(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob('*') if path.is_file())


def turned(cfg: dict, name: str, root: Path) -> dict:
    """The config of a copy of the data elsewhere."""
    return {**cfg, 'data_root': str(root)}


def mutants(name: str, folder: Path, number: int):
    """Copies of the data with one file changed each: the cases to judge."""
    whole = folder / 'whole'
    whole.mkdir(parents=True)
    cfg, rng = TREES[name](whole), random.Random(name)
    files = [path.relative_to(whole) for path in files_in(whole)]
    ways = [(file, way) for file in files for way in ('gone', 'empty', 'folder', 'loop')]
    ways += [(rng.choice(files), 'mutated') for _ in range(number)]
    for i, (file, way) in enumerate(ways):
        root = folder / f'{i} mit ü'
        shutil.copytree(whole, root)
        path = root / file
        raw = path.read_bytes()
        path.unlink()
        if way == 'loop':
            path.symlink_to(path)
        elif way == 'folder':
            path.mkdir()
        elif way != 'gone':
            path.write_bytes(b'' if way == 'empty' else mutate(raw, rng))
        yield turned(cfg, name, root), path


def check(name: str, folder: Path, number: int) -> int:
    cases = list(mutants(name, folder, number))
    found = verdicts(judge, cases)
    assert len(found) == len(cases), f'{cases[len(found)]}: ended the process, or took too long'
    assert not [(str(case[1]), text) for case, text in zip(cases, found) if text]
    return len(cases)


@pytest.mark.parametrize('name', TREES)
def test_damaged_files(tmp_path, name):
    check(name, tmp_path, 20)


@pytest.mark.parametrize(('name', 'damaged'), [
    ('modelnet_txt', 'chair/chair_0001.txt'), ('modelnet_off', 'bathtub/train/bathtub_0001.off'), ('modelnet_h5', ''),
    ('scanobjectnn', ''), ('shapenet55', 'shapenet_pc/02691156-a1.npy'), ('parts_v0', '02773838/points/s0.pts'),
    ('parts_normal', '02773838/s0.txt'), ('parts_h5', '')])
def test_what_is_damaged_is_skipped(tmp_path, name, damaged, caplog):
    """One of two clouds: a file, or one in an h5 file; with a cache, when it is written and when it is read, and
    without."""
    (tmp_path / 'data').mkdir()
    cfg = TREES[name](tmp_path / 'data')
    if damaged:
        (tmp_path / 'data' / damaged).write_text('1 2 x\n')
    else:
        path = next((tmp_path / 'data').rglob('*.h5'))
        with h5py.File(path, 'r+') as file:
            file['data'][0, 3, 1] = np.nan
        damaged = f'{path.name}[0]'
    for cache in (tmp_path / 'cache', tmp_path / 'cache', None):
        caplog.clear()
        with caplog.at_level('WARNING', 'ewa3d'):
            data = build({**cfg, 'cache_dir': cache, 'on_error': 'skip'})
        assert len(data) == len(data.skipped) == 1 and not wrong(data[0], 100)
        assert '1 of 2 samples cannot be read and are skipped' in caplog.text
    with pytest.raises(ValueError, match='max_skipped'):
        build({**cfg, 'cache_dir': tmp_path / 'cache', 'on_error': 'skip', 'max_skipped': 0.2})
    with pytest.raises(ERRORS) as caught:
        data = build(cfg)
        data[0]
    assert damaged in str(caught.value)


@pytest.mark.reliability
def test_many_damaged_files(tmp_path):
    total = sum(check(name, tmp_path / name, 300) for name in TREES)
    print(f'\n{total} damaged copies of {len(TREES)} kinds of data: read properly, or refused with the name of a file')


@pytest.mark.parametrize('name', TREES)
def test_odd_but_right(tmp_path, name):
    """Blanks and other letters in the path; text with line ends and the mark of Windows; links to files."""
    plain, odd = tmp_path / 'plain', tmp_path / 'räume und ツ'
    plain.mkdir()
    cfg = TREES[name](plain)
    shutil.copytree(plain, odd)
    for path in files_in(odd):
        raw = path.read_bytes()
        if path.suffix in TEXT:
            raw = b'\xef\xbb\xbf' + raw.replace(b'\n', b'\r\n')
        aside = tmp_path / 'aside' / path.relative_to(odd)
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(raw)
        path.unlink()
        path.symlink_to(aside)
    one, other = samples(cfg), samples(turned(cfg, name, odd))
    assert len(one) == len(other) >= 1
    for a, b in zip(one, other):
        for key in ('points', 'label', 'parts', 'boxes', 'box_labels', 'img'):
            assert np.array_equal(np.asarray(a.get(key)), np.asarray(b.get(key))), key
        assert not wrong(a, 100)


@pytest.mark.parametrize('name', TREES)
def test_the_same_samples_in_two_splits_are_named(tmp_path, name):
    """Every data set of files says which samples it has."""
    cfg = TREES[name](tmp_path)
    shared = shared_ids([build(cfg)], [build(cfg)])
    assert len(shared) == len(build(cfg)) and all(len(str(one)) > 3 for one in shared)


def test_every_data_set_is_here(tmp_path):
    types = set()
    for name, make in TREES.items():
        (tmp_path / name).mkdir()
        types.add(make(tmp_path / name)['type'])
    DATASETS.import_from_location()
    known = {name for name, cls in DATASETS.module_dict.items() if cls.__module__.startswith('ewa3d.')}
    assert known - types <= WITHOUT_FILES and types <= known


def test_links_in_circles_among_folders(tmp_path):
    """A folder that holds a link to itself or above is no end of work."""
    for name in ('folder', 'modelnet_off', 'image_folder', 'folder_scenes', 'videos_listed'):
        root = tmp_path / name
        root.mkdir()
        cfg = TREES[name](root)
        for folder in [root, *(path for path in root.rglob('*') if path.is_dir())]:
            os.symlink(root, folder / 'zz')
        assert not judge((cfg, root / 'zz' / 'zz'))
