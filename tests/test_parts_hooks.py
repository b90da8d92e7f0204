"""Training and testing part segmentation from a config; pictures of the best, median and worst shapes; batch norms."""
import base64
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_toys import on_cpu  # noqa: F401
from mmengine.config import Config
from torch import nn

from ewa3d import cli
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.engine.parts_hooks import BatchNormMomentumHook, PartPicturesHook
from ewa3d.engine.runner import Runner
from ewa3d.evaluation_parts import propagated_scores
from ewa3d.registry import DATASETS, METRICS
from ewa3d.viewer import SCRIPT, write_html
from ewa3d.visualization import draw_clouds, palette, part_cells


def part_config(work_dir, **options) -> dict:
    """A tiny part segmentation on the embedded shapes."""
    pipeline = [dict(type='Normalize'), dict(type='KeepAll'), dict(type='Resample', num_points=40, method='random'),
                dict(type='Pack', category=True)]

    def loader(split, samples, shuffle):
        return dict(batch_size=8, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=shuffle, round_up=shuffle),
                    dataset=dict(type='SyntheticShapes', split=split, num_samples=samples, num_points=64,
                                 pipeline=[step for step in pipeline if split != 'train' or step['type'] != 'KeepAll']))
    return dict(
        default_scope='ewa3d', work_dir=str(work_dir), randomness=dict(seed=0),
        model=dict(type='TaskModel',
                   backbone=dict(type='TokenEncoder', embed_dim=16, depth=2, num_heads=2, cls_token=False,
                                 tokenizer=dict(type='PointPatchEmbed', num_groups=8, group_size=6, widths=(8, 8, 16))),
                   neck=dict(type='PointFeaturePropagation', out_indices=(0, 1), hidden=16, out_dim=16),
                   head=dict(type='PartSegHead', hidden=(16,))),
        train_dataloader=loader('train', 26, True), val_dataloader=loader('val', 13, False),
        test_dataloader=loader('test', 15, False), val_evaluator=dict(type='PartIoU'),
        test_evaluator=dict(type='PartIoU'), train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=1),
        val_cfg=dict(), test_cfg=dict(), optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', save_best='instance_mIoU'),
                           ewa=dict(type='EWAHook', share_rate=0.3, schedule='linear')), **options)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Config and work dir of a run that ``train`` made."""
    folder = tmp_path_factory.mktemp('run')
    cfg = part_config(folder / 'work')
    cfg['model']['expand'] = [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=2)]
    Config(cfg).dump(folder / 'config.py')
    assert cli.main(['train', str(folder / 'config.py')]) == 0
    return folder / 'config.py', folder / 'work'


def test_training_fills_in_what_the_data_say(trained):
    _, work = trained
    meta = read_checkpoint(work / 'epoch_1.pth')['meta']
    model = meta['cfg']['model']
    assert model['neck']['num_categories'] == 13 and len(model['head']['parts']) == 13
    assert list(work.glob('best_instance_mIoU_epoch_1.pth')) and meta['dataset_meta']['parts']['mug']
    names = set().union(*(json.loads(line) for line in (work / 'metrics.jsonl').read_text().splitlines()))
    for name in ('instance_mIoU', 'category_mIoU', 'point_acc', 'class_acc'):
        assert {name, f'{name}_all'} <= names


def test_testing_reports_both_and_draws(trained, tmp_path, capsys):
    config, work = trained
    command = ['test', str(config), str(work / 'epoch_1.pth'), '--work-dir']
    assert cli.main([*command, str(tmp_path), '--pictures', '2']) == 0
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert {'instance_mIoU', 'instance_mIoU_all', 'IoU/mug', 'IoU_all/mug'} <= set(metrics)
    assert metrics['points'] == 40 and metrics['samples'] == 15
    shown = capsys.readouterr().out.splitlines()[-1]
    assert 'instance_mIoU_all' in shown and 'IoU/mug' not in shown
    text = (tmp_path / 'pictures' / 'parts.html').read_text()
    assert (tmp_path / 'pictures' / 'parts.png').stat().st_size > 10_000 and text.count('<canvas') == 18
    ious = [float(x) for x in re.findall(r'(?:best|median|worst), IoU ([\d.]+): \S+<', text)]
    assert len(ious) == 6 and ious == sorted(ious, reverse=True)
    options = ['--cfg-options', 'default_hooks.pictures.type=PartPicturesHook']
    assert cli.main([*command, str(tmp_path / 'b'), *options]) == 0
    assert (tmp_path / 'b' / 'pictures' / 'parts.html').read_text().count('<canvas') == 9


def test_voting_on_parts(trained, tmp_path, capsys):
    config, work = trained
    cfg = Config.fromfile(config)
    steps = [*cfg.test_dataloader.dataset.pipeline]
    command = ['test', str(config), str(work / 'epoch_1.pth'), '--work-dir', str(tmp_path), '--vote']
    assert cli.main([*command, '2']) == 2  # as in training: there nothing is kept
    assert "needs dict(type='KeepAll') before Resample in the vote pipeline" in capsys.readouterr().err
    cfg.vote_pipeline = [*steps[:3], dict(type='RandomShift', shift=0.2), steps[3]]
    cfg.dump(tmp_path / 'config.py')
    command[1] = str(tmp_path / 'config.py')
    assert cli.main([*command, '3']) == 0
    found = json.loads((tmp_path / 'metrics.json').read_text())
    assert 'instance_mIoU_all_vote3' in capsys.readouterr().out and 'IoU/mug_vote3' not in found

    # the same, a shape and a pass at a time
    runner = Runner.from_cfg(cfg)
    runner.load_checkpoint(work / 'epoch_1.pth')
    model, plain = runner.model.eval(), runner.test_dataloader.dataset
    drawn = DATASETS.build(dict(cfg.test_dataloader.dataset, pipeline=cfg.vote_pipeline, seed=0))
    judge = METRICS.build(dict(type='PartIoU'))
    judge.dataset_meta = plain.metainfo
    for i in range(len(plain)):
        sample, scores = plain[i]['data_samples'], 0
        for epoch in range(3):
            drawn.set_epoch(epoch)
            inputs, where = drawn[i]['inputs'], drawn[i]['data_samples'].rows
            with torch.no_grad():
                made = model(dict(points=inputs['points'][None], category=torch.tensor([int(inputs['category'])])))[0]
            scores = scores + propagated_scores(made, sample.all_points[where], sample.all_points)
        sample.all_part_scores, sample.part_scores = scores, scores[sample.rows]
        judge.process({}, [sample.to_dict()])
    for key, value in judge.evaluate(len(plain)).items():
        if '/' not in key:
            assert found[f'{key}_vote3'] == pytest.approx(value, abs=1e-3), key


def test_fusing_a_trained_model(trained, tmp_path, capsys):
    _, work = trained
    assert cli.main(['fuse', str(work / 'epoch_1.pth'), str(tmp_path / 'plain.pth')]) == 0
    assert 'wrote' in capsys.readouterr().out


@pytest.mark.parametrize('known_by', ['the data set', 'the metric'])
def test_chosen_shapes_are_the_best_the_median_and_the_worst(tmp_path, known_by):
    """Of shapes whose IoU is known, the pictures show these."""
    parts = dict(thing=[0, 1])
    meta, metric = (dict(parts=parts), dict(type='Accuracy')) if known_by == 'the data set' else \
        ({}, dict(type='PartIoU', parts=parts))
    clouds = [torch.randn(12, 3) for _ in range(5)]
    wrong = [3, 0, 12, 6, 1]  # points

    class Data:
        def __init__(self):
            self.metainfo = dict(meta, up_axis='y')

        def __getitem__(self, i):
            from ewa3d.structures import Sample
            sample = Sample(gt_parts=torch.arange(12) % 2, gt_label=torch.tensor(0), metainfo=dict(name=f'shape{i}'))
            return dict(inputs=dict(points=clouds[i]), data_samples=sample)

    class Model(nn.Module):
        def test_step(self, batch):
            for sample in batch['data_samples']:
                found = sample.gt_parts.clone()
                found[:wrong[int(sample.name[-1])]] = 1 - found[:wrong[int(sample.name[-1])]]
                sample.part_scores = nn.functional.one_hot(found, 2).float().log()
            return batch['data_samples']

    logger = SimpleNamespace(info=lambda text: None)
    runner = SimpleNamespace(test_dataloader=SimpleNamespace(dataset=Data()), model=Model(), work_dir=str(tmp_path),
                             logger=logger, test_evaluator=SimpleNamespace(metrics=[METRICS.build(metric)]),
                             visualizer=SimpleNamespace(_vis_backends={}))
    hook = PartPicturesHook()
    hook.before_test_epoch(runner)
    for i in range(5):
        hook.after_test_iter(runner, i, None, runner.model.test_step(dict(data_samples=[Data()[i]['data_samples']])))
    hook.after_test_epoch(runner)
    text = (tmp_path / 'pictures' / 'parts.html').read_text()
    shown = re.findall(r'(\w+), IoU [\d.]+: (shape\d)', text)
    assert shown == [('best', 'shape1'), ('median', 'shape0'), ('worst', 'shape2')]
    assert re.findall(r'([\d.]+) % wrong', text) == ['0.0', '25.0', '100.0']
    for bad in (0, 1.5):
        with pytest.raises((ValueError, TypeError), match='num_samples'):
            PartPicturesHook(bad)


# ---- cells and pages ------------------------------------------------------------------------------------------------
def test_cells():
    cells = part_cells([np.zeros((3, 6))], [[0, 1, 1]], [torch.tensor([0, 1, 2])], ['a'])
    assert cells['titles'] == ['a', 'predicted', '33.3 % wrong'] and cells['columns'] == 3
    np.testing.assert_array_equal(cells['colors'][1], palette([0, 1, 2]))
    grey, _, red = cells['colors'][2]
    assert np.ptp(grey) < 0.1 and red[0] > 0.7 > red[1]
    with pytest.raises(ValueError, match=r'clouds\[0\] has \(3,\) true and \(2,\) predicted'):
        part_cells([np.zeros((3, 3))], [[0, 1, 1]], [[0, 1]])
    with pytest.raises(ValueError, match='truth: expected a list'):
        part_cells([np.zeros((3, 3))], [], [])


def decode(text, name, dtype):
    return [np.frombuffer(base64.b64decode(part), dtype) for part in re.findall(rf'{name}="([^"]*)"', text)]


@pytest.mark.parametrize('up, order', [('z', [0, 1, 2]), ('y', [2, 0, 1]), ('x', [1, 2, 0])])
def test_page_holds_the_points(tmp_path, up, order):
    points = np.random.default_rng(0).normal(size=(50, 4)) * 3 + 7
    path = write_html([points, points[:9]], tmp_path / 'a' / 'x.html', up=up, titles=['<b>&', 'two'], heading='H & M',
                      colors=[np.arange(50) % 3, '#ff0000'])
    text = path.read_text()
    placed, *_ = decode(text, 'data-points', '<i2')
    xyz = points[:, order]
    centre = (xyz.min(0) + xyz.max(0)) / 2
    radius = np.linalg.norm(xyz - centre, axis=1).max()
    np.testing.assert_allclose(placed.reshape(-1, 3) / 32767 * radius + centre, xyz, atol=1e-3)
    rgb = decode(text, 'data-colors', 'u1')
    assert rgb[1].reshape(-1, 3).tolist() == [[255, 0, 0]] * 9 and len(rgb[0]) == 150
    assert '&lt;b&gt;&amp;' in text and 'H &amp; M' in text and '<b>' not in text
    assert not re.search(r'(src|href)=|https?:', text)  # nothing is loaded


def test_pages_that_cannot_be(tmp_path):
    cloud = np.zeros((3, 3))
    for options, message in ((dict(clouds=[]), 'clouds is empty'), (dict(clouds=[cloud[:, :2]]), r'clouds\[0\] has'),
                             (dict(clouds=[cloud], up='w'), "up = 'w'"), (dict(clouds=[cloud], columns=0), 'columns'),
                             (dict(clouds=[cloud], titles=['a', 'b']), 'titles: expected a list')):
        with pytest.raises(ValueError, match=message):
            write_html(path=tmp_path / 'x.html', **options)
    assert not (tmp_path / 'x.html').exists()


@pytest.mark.skipif(shutil.which('node') is None, reason='node is not here')
def test_script_draws_and_turns(tmp_path):
    """The page's script on a stand-in for a browser: every point is drawn, near ones last, and dragging turns."""
    points, colors = np.array([[32767, 0, 0], [0, 32767, 0], [0, 0, 32767]], '<i2'), np.zeros((3, 3), np.uint8)
    data = [base64.b64encode(array.tobytes()).decode() for array in (points, colors)]
    stage = """
const drawn = [], handlers = {}, frames = [];
const context = {clearRect() { drawn.length = 0; }, fillRect(x, y) { drawn.push([x, y]); }};
const canvas = {dataset: {points: 'POINTS', colors: 'COLORS'}, clientWidth: 100, getContext: () => context,
  addEventListener: (name, f) => { handlers[name] = f; }, setPointerCapture() {}, hasPointerCapture: () => true};
globalThis.document = {querySelectorAll: () => [canvas]};
globalThis.window = {addEventListener() {}};
globalThis.requestAnimationFrame = f => frames.push(f);
const play = () => { while (frames.length) frames.shift()(); };
""".replace('POINTS', data[0]).replace('COLORS', data[1])
    rest = """
play();
const first = drawn.map(p => p.slice());
handlers.pointermove({pointerId: 1, movementX: 50, movementY: 10});
play();
const second = drawn.map(p => p.slice());
handlers.wheel({preventDefault() {}, deltaY: -500});
play();
console.log(JSON.stringify([first, second, drawn]));
"""
    (tmp_path / 'x.js').write_text(stage + SCRIPT.replace("'use strict';", '') + rest)
    done = subprocess.run(['node', str(tmp_path / 'x.js')], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second, zoomed = json.loads(done.stdout)
    assert len(first) == len(second) == len(zoomed) == 3 and first != second
    spread = [np.ptp(np.array(points), axis=0).max() for points in (second, zoomed)]
    assert spread[1] > 1.2 * spread[0]
    top = min(range(3), key=lambda i: first[i][1])
    assert first[top][0] == pytest.approx(50, abs=2)  # the axis that is up points up, and stays in the middle


def test_png_of_parts(tmp_path):
    cells = part_cells([np.random.default_rng(0).normal(size=(60, 3))], [np.arange(60) % 3], [np.arange(60) % 2])
    assert draw_clouds(path=tmp_path / 'x.png', **cells).stat().st_size > 3000


# ---- batch norms ----------------------------------------------------------------------------------------------------
def test_momentum_of_batch_norms():
    hook, model = BatchNormMomentumHook(), nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm2d(2)))
    assert [hook.momentum(epoch) for epoch in (0, 19, 20, 40, 60, 80)] == [0.1, 0.1, 0.05, 0.025, 0.0125, 0.01]
    hook.before_train_epoch(SimpleNamespace(model=model, epoch=45))
    assert model[0].momentum == model[1][0].momentum == 0.025
    for options, error in ((dict(start=2), ValueError), (dict(interval=0), ValueError), (dict(decay='a'), TypeError)):
        with pytest.raises(error, match='BatchNormMomentumHook'):
            BatchNormMomentumHook(**options)
