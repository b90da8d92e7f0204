"""Label transfer from the nearest training shape: what a network for part segmentation has to beat.

``python -m ewa3d.bench.nearest CONFIG [--shapes N] [--points P]``
"""
import argparse
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ewa3d.checks import check_integer
from ewa3d.ops import chamfer_distance, knn
from ewa3d.registry import DATASETS, METRICS

__all__ = ['main', 'transferred']

PIPELINE = [dict(type='Normalize'), dict(type='Pack')]


def transferred(train: Dataset, test: Dataset, num_points: int = 256) -> dict[str, float]:
    """The metrics of :class:`~ewa3d.evaluation_parts.PartIoU` where every point of a test shape has the part of the
    nearest point of that training shape of its category which is nearest by Chamfer distance.

    Args:
        train, test: their samples are packed and normalised clouds of any size.
        num_points: of each shape, drawn at random, by which shapes are compared; labels come from all points.

    Raises:
        ValueError: a test shape of a category that the training set does not have.
    """
    check_integer('num_points', num_points, 1)
    shapes = [_cloud_of(train[i]) for i in range(len(train))]
    num_points = min(num_points, *(len(points) for points, _, _ in shapes))
    drawn = torch.stack([_draw(points, num_points) for points, _, _ in shapes])
    labels = torch.tensor([label for _, _, label in shapes])
    judge = METRICS.build(dict(type='PartIoU'))
    judge.dataset_meta = test.metainfo
    for i in range(len(test)):
        packed = test[i]
        points, _, label = _cloud_of(packed)
        rows = (labels == label).nonzero().flatten()
        if len(rows) == 0:
            raise ValueError(f'sample {packed["data_samples"].get("name")!r}: no training shape is of its category, '
                             f'{test.metainfo["classes"][label]!r}')
        mine = _draw(points, num_points)
        distances = chamfer_distance(mine.expand(len(rows), -1, -1), drawn[rows], reduction='none')
        near, parts, _ = shapes[rows[distances.argmin()]]
        found = parts[knn(points[None], near[None], 1)[1].flatten()]
        packed['data_samples'].part_scores = F.one_hot(found, judge.num_parts).float()
        judge.process({}, [packed['data_samples'].to_dict()])
    return judge.evaluate(len(test))


def _cloud_of(packed: dict) -> tuple[Tensor, Tensor, int]:
    sample = packed['data_samples']
    return packed['inputs']['points'][:, :3], sample.gt_parts, int(sample.gt_label)


def _draw(points: Tensor, num_points: int) -> Tensor:
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:num_points]]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the metrics for the training and the test data of a config."""
    from ewa3d.cli import load_config
    from ewa3d.evaluation import is_of_one_class
    parser = argparse.ArgumentParser(prog='python -m ewa3d.bench.nearest', description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('--shapes', type=int, help='of the test set, spread evenly; default: all')
    parser.add_argument('--points', type=int, default=256, help='by which shapes are compared (default: %(default)s)')
    args = parser.parse_args(argv)
    cfg = load_config(args.config)
    train, test = (DATASETS.build({**cfg[f'{split}_dataloader'].dataset, 'pipeline': PIPELINE, **more})
                   for split, more in (('train', {}), ('test', dict(indices=args.shapes))))
    metrics = transferred(train, test, args.points)
    shown = '  '.join(f'{key} {value:.2f}' for key, value in metrics.items() if not is_of_one_class(key))
    sys.stdout.write(f'{len(train)} training shapes, {len(test)} test shapes: {shown}\n')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
