"""Data loaders: samples a second by workers, from files that are made for it."""
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader, Dataset

from ewa3d.bench.harness import Case, Settings, Work

__all__ = ['cases', 'clouds', 'images', 'scenes']

WORKERS = (0, 1, 2, 4)
FULL = dict(clouds=(512, 8192, 1024, 1200), scenes=(16, 60_000, 40_000), images=(128, 320, 224))
QUICK = dict(clouds=(6, 64, 16, 24), scenes=(4, 60, 40), images=(4, 40, 32))
BATCH = dict(clouds=32, scenes=8, images=32)


def cases(settings: Settings) -> Iterator[Case]:
    """An epoch of clouds of ModelNet's size, of scenes of ScanNet's and of images, each with its training augmentation,
    by the number of worker processes, which live on between epochs; and how much faster a batch travels when its
    tensors are joined. A worker's time is not in ``--clock cpu``; with none, it is the cost of the samples themselves.
    """
    sizes = QUICK if settings.quick else FULL
    for make in (clouds, scenes, images):
        name, size = make.__name__, sizes[make.__name__]
        with tempfile.TemporaryDirectory(prefix='ewa3d-bench-') as folder:
            dataset, batch = make(Path(folder), *size, seed=settings.seed), 2 if settings.quick else BATCH[name]
            variants = {f'{count} worker{"s" * (count != 1)}': _epoch(dataset, batch, count)
                        for count in (WORKERS[:2] if settings.quick else WORKERS)}
            variants['1 worker, tensors one by one'] = _epoch(dataset, batch, 1, pseudo_collate)
            yield Case(f'{name} {" → ".join(f"{n:,}" for n in size[1:3])}, batch {batch}', variants)


def _epoch(dataset: Dataset, batch: int, workers: int, collate: Callable | None = None):
    def build():
        from ewa3d.datasets import packed_collate
        loader = DataLoader(dataset, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0,
                            collate_fn=collate or packed_collate)

        def epoch():
            for _ in loader:
                pass
        return Work(epoch, items=len(dataset))
    return build


def clouds(folder: Path, count: int, points: int, kept: int, pool: int, seed: int = 0) -> Dataset:
    """ModelNet40 in its cache, in FPS order: ``kept`` of the first ``pool`` points, scaled and shifted."""
    from ewa3d.datasets import ModelNet
    rng = np.random.default_rng(seed)
    made = list(rng.standard_normal((count, points, 3), dtype=np.float32))
    with (folder / f'modelnet40_train_{points}pts_fps.dat').open('wb') as file:
        pickle.dump([made, [i % 40 for i in range(count)]], file)
    pipeline = [dict(type='Normalize'), dict(type='Resample', num_points=kept, pool=pool, method='random'),
                dict(type='RandomScale', scale=(2 / 3, 3 / 2)), dict(type='RandomShift', shift=0.2), dict(type='Pack')]
    return ModelNet(folder, variant=40, split='train', layout='dat', cache_dir=folder / 'cache', pipeline=pipeline)


def scenes(folder: Path, count: int, points: int, kept: int, seed: int = 0) -> Dataset:
    """ScanNet's scenes, read from their files: cut, flipped, turned, scaled."""
    from ewa3d.datasets import ScanNetDetection
    rng, names = np.random.default_rng(seed), [f'scene{i:04d}_00' for i in range(count)]
    extent = np.array([7, 5, 2.5, 255, 255, 255], np.float32)
    for name in names:
        np.save(folder / f'{name}_vert.npy', rng.random((points, 6), dtype=np.float32) * extent)
        boxes = np.concatenate([rng.uniform(1, 5, (12, 3)), rng.uniform(0.5, 1, (12, 3)), np.full((12, 1), 5.)], 1)
        np.save(folder / f'{name}_bbox.npy', boxes)
    (folder / 'scannetv2_train.txt').write_text('\n'.join(names))
    pipeline = [dict(type='RandomCuboid', min_points=kept * 3 // 4), dict(type='Resample', num_points=kept,
                                                                         method='random', pad='repeat'),
                dict(type='SceneFlip', axes='xy'), dict(type='SceneRotate', degrees=5),
                dict(type='SceneScale', scale=(0.9, 1.1)), dict(type='PackBoxes')]
    return ScanNetDetection(folder, split='train', pipeline=pipeline)


def images(folder: Path, count: int, side: int, kept: int, seed: int = 0) -> Dataset:
    """A folder of JPEG files: a random crop, resized and flipped."""
    from PIL import Image

    from ewa3d.datasets import ImageFolder
    rng = np.random.default_rng(seed)
    for i in range(count):
        target = folder / 'train' / f'class{i % 2}' / f'{i}.jpg'
        target.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(target, quality=90)
    transforms = [dict(name='RandomResizedCrop', size=kept), dict(name='RandomHorizontalFlip')]
    pipeline = [dict(type='ImageTransforms', transforms=transforms),
                dict(type='PackImage', mean=[0.5] * 3, std=[0.5] * 3)]
    return ImageFolder(folder, split='train', pipeline=pipeline)
