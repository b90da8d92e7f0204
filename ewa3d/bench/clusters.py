"""What clustering alone finds in rooms: what a detector has to beat. ``python -m ewa3d.bench.clusters CONFIG``"""
import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch

from ewa3d.evaluation_boxes import BoxAP
from ewa3d.registry import DATASETS

__all__ = ['cluster_boxes', 'evaluate', 'main']

FLOOR, LARGEST = 0.08, 3.5  # metres: what is lower goes; what is longer is a wall


def cluster_boxes(points: np.ndarray, eps: float, min_samples: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Axis-aligned boxes around the clusters (DBSCAN) of what is left without the floor, ``(Q, 7)``, and how many
    points each has."""
    from sklearn.cluster import DBSCAN
    floor = np.percentile(points[:, 2], 1)
    points = points[points[:, 2] > floor + FLOOR, :3]
    labels = DBSCAN(eps=eps, min_samples=min_samples).fit_predict(points)
    boxes, counts = [], []
    for label in range(labels.max() + 1):
        low, high = points[labels == label].min(0), points[labels == label].max(0)
        low[2] = floor
        if (high - low).max() < LARGEST:
            boxes.append([*(low + high) / 2, *(high - low), 0])
            counts.append((labels == label).sum())
    return np.array(boxes, np.float32).reshape(-1, 7), np.array(counts, np.int64)


def evaluate(scenes: Sequence[dict], eps: float) -> dict[str, float]:
    """AP and AR of the clusters, largest first, as if all classes were one: the baseline need not name what it
    finds."""
    metric = BoxAP(nms='none', threshold=0)
    for scene in scenes:
        boxes, counts = map(torch.from_numpy, cluster_boxes(scene['points'], eps))
        sample = dict(pred_boxes=boxes, pred_scores=torch.ones(len(boxes), 1),
                      pred_objectness=counts / len(scene['points']), gt_boxes=torch.from_numpy(scene['boxes']),
                      gt_labels=torch.zeros(len(scene['boxes'])))
        metric.process(dict(inputs=dict(points=[torch.tensor(scene['points'])])), [sample])
    return metric.evaluate(len(scenes))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the metrics for the test data of a config, whose clouds are in metres."""
    from ewa3d.cli import load_config
    parser = argparse.ArgumentParser(prog='python -m ewa3d.bench.clusters', description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('--scenes', type=int, help='of the test set, spread evenly; default: all')
    parser.add_argument('--eps', type=float, nargs='+', default=[.08, .12, .16, .2, .3], help='metres')
    args = parser.parse_args(argv)
    dataset = load_config(args.config).test_dataloader.dataset
    packed = list(DATASETS.build({**dataset, 'pipeline': [dict(type='PackBoxes')], 'indices': args.scenes}))
    scenes = [dict(points=each['inputs']['points'].numpy(), boxes=each['data_samples'].gt_boxes.numpy())
              for each in packed]
    for eps in args.eps:
        found = evaluate(scenes, eps)
        shown = '  '.join(f'{key} {found[key]:.1f}' for key in ('AP25', 'AP50', 'AR25', 'AR50'))
        sys.stdout.write(f'eps {eps:.2f}: {shown}\n')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
