"""Label transfer from the nearest training shape, against loops; and that the embedded shapes are not solved by it."""
import numpy as np
import pytest
import torch
from mmengine.config import Config

from ewa3d.bench import nearest
from ewa3d.datasets import SyntheticShapes
from ewa3d.evaluation_parts import shape_iou


def shapes(num, split='train', **options):
    return SyntheticShapes(num, 96, split, pipeline=nearest.PIPELINE, **options)


def naive(train, test):
    ious = []
    for a in test:
        points, sample = a['inputs']['points'], a['data_samples']
        best = None
        for b in train:
            other = b['inputs']['points']
            distance = torch.cdist(points, other).square()
            score = float(distance.min(0).values.mean() + distance.min(1).values.mean())
            if b['data_samples'].gt_label == sample.gt_label and (best is None or score < best[0]):
                best = score, b['data_samples'].gt_parts[distance.argmin(1)]
        ids = list(test.metainfo['parts'].values())[int(sample.gt_label)]
        ious.append(shape_iou(best[1], sample.gt_parts, ids))
    return 100 * np.mean(ious)


def test_naive():
    train, test = shapes(39), shapes(13, 'test')
    assert nearest.transferred(train, test, 96)['instance_mIoU'] == pytest.approx(naive(train, test), abs=1e-3)


def test_shapes_that_are_there_already_and_others():
    train = shapes(130)
    assert nearest.transferred(train, shapes(130, indices=13))['instance_mIoU'] == 100
    assert nearest.transferred(train, shapes(26, 'test'))['instance_mIoU'] < 75


def test_a_category_that_is_not_there():
    with pytest.raises(ValueError, match=r"'bottle_00001': no training shape is of its category, 'bottle'"):
        nearest.transferred(shapes(1), shapes(2, 'test'))


def test_command(tmp_path, capsys):
    loader = dict(dataset=dict(type='SyntheticShapes', num_samples=26, num_points=64))
    Config(dict(train_dataloader=loader, test_dataloader=dict(dataset=dict(loader['dataset'], split='test')))).dump(
        tmp_path / 'c.py')
    assert nearest.main([str(tmp_path / 'c.py'), '--shapes', '13', '--points', '32']) == 0
    assert '26 training shapes, 13 test shapes: instance_mIoU' in capsys.readouterr().out
