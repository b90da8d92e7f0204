"""Training and testing detection from a config; pictures of the best, median and worst scenes."""
import json
import re
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from engine_toys import on_cpu  # noqa: F401
from mmengine.config import Config
from torch import nn

from ewa3d import cli
from ewa3d.engine.boxes_hooks import BoxPicturesHook
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.engine.ranked_pictures import RankedPicturesHook
from ewa3d.evaluation_boxes import BoxAP
from ewa3d.structures import Sample


def box_config(work_dir, **options) -> dict:
    """A tiny detector on the embedded rooms."""
    def loader(split, samples, shuffle):
        return dict(batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=shuffle, round_up=shuffle),
                    dataset=dict(type='SyntheticScenes', split=split, num_samples=samples, num_points=512,
                                 scene_cfg=dict(objects=4, clutter=2), pipeline=[dict(type='PackBoxes')]))
    return dict(
        default_scope='ewa3d', work_dir=str(work_dir), randomness=dict(seed=0),
        model=dict(type='TaskModel',
                   backbone=dict(type='SetEncoder', embed_dim=16, depth=2, num_heads=2,
                                 tokenizer=dict(type='SetAbstraction', num_points=32, radius=0.5, num_neighbors=8,
                                                widths=(8, 16))),
                   neck=dict(type='QueryDecoder', num_queries=12, depth=2, num_heads=2),
                   head=dict(type='DETRHead', num_angle_bins=4)),
        train_dataloader=loader('train', 8, True), val_dataloader=loader('val', 4, False),
        test_dataloader=loader('test', 5, False), val_evaluator=dict(type='BoxAP'), test_evaluator=dict(type='BoxAP'),
        train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=1), val_cfg=dict(), test_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', save_best='AP50_gt'),
                           ewa=dict(type='EWAHook', share_rate=0.3, schedule='linear')), **options)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Config and work dir of a run that ``train`` made."""
    folder = tmp_path_factory.mktemp('run')
    cfg = box_config(folder / 'work')
    cfg['model']['expand'] = [dict(type='EWAFFN', at=f'{part}.blocks.*.mlp', num_experts=2)
                              for part in ('backbone', 'neck')]
    Config(cfg).dump(folder / 'config.py')
    assert cli.main(['train', str(folder / 'config.py')]) == 0
    return folder / 'config.py', folder / 'work'


def test_training_fills_in_the_classes(trained):
    _, work = trained
    meta = read_checkpoint(work / 'epoch_1.pth')['meta']
    assert meta['cfg']['model']['head']['num_classes'] == len(meta['dataset_meta']['classes']) == 6
    names = set().union(*(json.loads(line) for line in (work / 'metrics.jsonl').read_text().splitlines()))
    assert {'AP25', 'AP50', 'AR25', 'AR50', 'AP25_gt', 'AP50_gt', 'loss_giou_0', 'cardinality_error'} <= names


def test_testing_reports_both_conventions_and_draws(trained, tmp_path, capsys):
    config, work = trained
    command = ['test', str(config), str(work / 'epoch_1.pth'), '--work-dir', str(tmp_path)]
    options = ['--pictures', '2', '--cfg-options', 'test_evaluator.min_points=0']
    assert cli.main([*command, *options]) == 0
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert {'AP25', 'AP25_gt', 'AP25/bed'} <= set(metrics) and metrics['samples'] == 5
    assert 'AP50_gt' in capsys.readouterr().out.splitlines()[-1]
    text = (tmp_path / 'pictures' / 'boxes.html').read_text()
    assert (tmp_path / 'pictures' / 'boxes.png').stat().st_size > 10_000 and text.count('<canvas') == 12
    aps = [float(x) for x in re.findall(r'(?:best|median|worst), AP ([\d.]+): \S+', text)]
    assert len(aps) == 6 and aps == sorted(aps, reverse=True)


def test_fusing_a_trained_detector(trained, tmp_path, capsys):
    _, work = trained
    assert cli.main(['fuse', str(work / 'epoch_1.pth'), str(tmp_path / 'plain.pth')]) == 0
    told = capsys.readouterr().out
    assert 'wrote' in told and all(f'{part}.blocks.{i}.mlp' in told for part in ('backbone', 'neck') for i in (0, 1))


class Rooms:
    """Rooms with one box each, of which the stand-in for a model misses some by more and more."""
    metainfo: ClassVar[dict] = dict(classes=('bed', 'chair'), up_axis='z')
    shifts = (.3, 0., 5., .1)

    def __getitem__(self, i):
        boxes = torch.tensor([[0., 0, 0, 1, 1, 1, 0]])[:i != 4]
        sample = Sample(gt_boxes=boxes, gt_labels=torch.ones(len(boxes), dtype=torch.long),
                        metainfo=dict(name=f'room{i}'))
        return dict(inputs=dict(points=torch.rand(50, 3) - .5), data_samples=sample)


class Finder(nn.Module):
    def test_step(self, batch):
        """The box, the box of another class behind a surer one in the first room, and one that nobody is sure of."""
        for sample in batch['data_samples']:
            shift = (*Rooms.shifts, 0.)[int(sample.name[-1])]
            sample.pred_boxes = torch.tensor([[shift, 0, 0, 1, 1, 1, 0], [0, 0, 3., 1, 1, 1, 0]])
            sample.pred_scores = torch.tensor([[.1, .8], [.1, .85]])
            sample.pred_objectness = torch.tensor([.9, .95 if shift == .3 else .4])
        return batch['data_samples']


def runner_of(tmp_path, **rules):
    metric = BoxAP(min_points=0, **rules)
    metric.dataset_meta = Rooms.metainfo
    return SimpleNamespace(test_dataloader=SimpleNamespace(dataset=Rooms()), model=Finder(), work_dir=str(tmp_path),
                           test_evaluator=SimpleNamespace(metrics=[metric]),
                           logger=SimpleNamespace(info=lambda text: None),
                           visualizer=SimpleNamespace(_vis_backends={}))


def test_chosen_scenes_are_the_best_the_median_and_the_worst(tmp_path):
    runner = runner_of(tmp_path, iou=(.5,))
    hook = BoxPicturesHook()
    hook.before_test_epoch(runner)
    for i in (0, 1, 2, 4):  # the last one has no box to be found
        item = Rooms()[i]
        batch = dict(inputs=dict(points=[item['inputs']['points']]), data_samples=[item['data_samples']])
        hook.after_test_iter(runner, i, batch, runner.model.test_step(batch))
    assert hook._scored == [(50., 0), (100., 1), (0., 2)]
    hook.after_test_epoch(runner)
    text = (tmp_path / 'pictures' / 'boxes.html').read_text()
    assert re.findall(r'(\w+), AP ([\d.]+): (room\d): 1 box<', text) == [
        ('best', '100.0', 'room1'), ('median', '50.0', 'room0'), ('worst', '0.0', 'room2')]
    assert re.findall(r'predicted: (\d) box', text) == ['1', '2', '1']  # the sure ones
    assert '■ chair' in text and '■ bed' not in text


def test_what_cannot_be_drawn(tmp_path):
    for options, error in ((dict(num_samples=0), ValueError), (dict(num_samples=1.5), TypeError),
                           (dict(threshold=2), ValueError)):
        with pytest.raises(error, match='BoxPicturesHook: ' + next(iter(options))):
            BoxPicturesHook(**options)
    runner = runner_of(tmp_path)
    runner.test_evaluator.metrics = [object()]
    with pytest.raises(ValueError, match=r'has no BoxAP.*it has object'):
        BoxPicturesHook().score(runner, Rooms()[0]['data_samples'].to_dict(), None)
    for call in (RankedPicturesHook().score, RankedPicturesHook().cells):
        with pytest.raises(NotImplementedError, match='RankedPicturesHook must define'):
            call(*[None] * (3 if call.__name__ == 'score' else 4))
