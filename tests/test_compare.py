"""Results of runs in a table, which refuses what does not compare; plot and test say so."""
import json

import pytest
from cli_toys import fails
from engine_toys import on_cpu, toy_config, write_config  # noqa: F401

from ewa3d import cli
from ewa3d.compare import compare, read_result
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.runs import differing


def run(folder, seed: int, oa: float, config: str = 'model = dict(depth=4)\n', **judged):
    """A work dir as training leaves it."""
    folder.mkdir()
    lines = [dict(mode='train', epoch=1, loss=1.), dict(mode='val', epoch=1, iter=3, OA=1., time=2),
             dict(mode='val', epoch=2, iter=6, OA=oa, time=2, **{'acc/cup': 3.})]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    judged = dict(dataset='ModelNet10', split='test', points=1024, samples=908) | judged
    (folder / 'environment.json').write_text(json.dumps(dict(seed=seed, judged=judged)))
    (folder / 'config.py').write_text(f'{config}randomness = dict(\n    seed={seed})\nwork_dir = {str(folder)!r}\n'
                                      f'data = dict(label_seed={seed})\n')
    return folder


def test_seeds_of_a_config_are_a_row(tmp_path):
    runs = [run(tmp_path / f'plain_s{seed}', seed, oa) for seed, oa in ((2, 93.), (0, 94.), (1, 95.))]
    runs.append(run(tmp_path / 'ewa', 0, 90., 'model = dict(depth=5)\n'))
    assert compare(runs).splitlines() == [
        '| run | seeds | dataset | split | points | OA |', '| --- | --- | --- | --- | --- | --- |',
        '| plain_s* | 0 1 2 | ModelNet10 | test | 1024 | 94.00 ± 1.00 |',
        '| ewa | 0 | ModelNet10 | test | 1024 | 90.00 |']
    assert compare(runs, ['acc/cup']).count('3.00') == 2
    (runs[3] / 'metrics.json').write_text(json.dumps(dict(OA=80., epoch=2, dataset='ModelNet10', split='test',
                                                          points=1024, samples=908, weights='raw', seed=0)))
    assert read_result(runs[3]).numbers == dict(OA=80.) and '80.00' in compare(runs)  # a test counts


def test_other_points_are_refused(tmp_path, capsys):
    a, b = run(tmp_path / 'a', 0, 94.), run(tmp_path / 'b', 0, 68.5, points=8192)
    text = fails(capsys, 'compare', str(a), str(b))
    assert 'different numbers of points (a: 1024, b: 8192)' in text and '--force' in text
    assert cli.main(['compare', str(a), str(b), '--force']) == 0
    out = capsys.readouterr().out
    assert '| 1024 | 94.00 |' in out and '| 8192 | 68.50 |' in out
    assert cli.main(['plot', str(a), str(b), '--keys', 'OA', '--out', str(tmp_path / 'x.html')]) == 0
    assert capsys.readouterr().err == 'warning: runs were judged on different numbers of points (a: 1024, b: 8192): ' \
                                      'their metrics do not compare\n'
    assert cli.main(['plot', str(a), '--keys', 'OA', '--out', str(tmp_path / 'x.html')]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize(('key', 'value', 'text'), [
    ('dataset', 'ModelNet40', 'data'), ('split', 'train', 'splits'), ('samples', 100, 'samples')])
def test_other_data_are_refused(tmp_path, key, value, text):
    runs = [run(tmp_path / 'a', 0, 1.), run(tmp_path / 'b', 1, 2., **{key: value})]
    with pytest.raises(ValueError, match=f'different {text} '):
        compare(runs)
    assert differing(dict(a={}, b=dict(points=None), c=dict(points=1))) == ''  # what is not known


def test_what_is_no_run(tmp_path, capsys):
    assert 'no such folder' in fails(capsys, 'compare', str(tmp_path / 'x'))
    (tmp_path / 'metrics.jsonl').write_text('{"mode": "train", "epoch": 1, "loss": 2.0}\n')
    assert 'was not evaluated; ewa3d test CONFIG' in fails(capsys, 'compare', str(tmp_path))
    a = run(tmp_path / 'a', 0, 1.)
    assert "no run has 'mOA'; did you mean 'OA'" in fails(capsys, 'compare', str(a), '--keys', 'mOA')
    (a / 'environment.json').unlink()
    assert compare([a]).splitlines()[-1] == '| a | (1) | – | – | – | 1.00 |'


def test_training_records_on_what_it_is_judged_and_tests_compare(tmp_path, capsys):
    pipeline = [dict(type='Normalize'), dict(type='Resample', num_points=48), dict(type='Pack')]
    options = {f'{split}_dataloader': dict(batch_size=13, num_workers=0, dataset=dict(
        type='SyntheticShapes', split=split, num_samples=13, num_points=60, pipeline=pipeline),
        sampler=dict(type='DefaultSampler', shuffle=split == 'train', round_up=split == 'train'))
        for split in ('train', 'val', 'test')}
    path, work = str(write_config(tmp_path / 'toy.py', toy_config(tmp_path, epochs=1, **options))), tmp_path / 'run'
    assert cli.main(['train', path, '--work-dir', str(work)]) == 0
    judged = json.loads((work / 'environment.json').read_text())['judged']
    assert judged == dict(dataset='SyntheticShapes', split='val', points=48, samples=13)
    assert read_checkpoint(work / 'epoch_1.pth')['meta']['judged'] == judged
    said = 'judged on clouds of 48 points, this test has 40'
    for points in (48, 40):
        assert cli.main(['test', path, str(work / 'epoch_1.pth'), '--work-dir', str(tmp_path / f't{points}'),
                         '--cfg-options', f'test_dataloader.dataset.pipeline.1.num_points={points}']) == 0
        assert (said in (tmp_path / f't{points}' / 'test.log').read_text()) == (points == 40)
    assert 'different numbers of points' in fails(capsys, 'compare', str(tmp_path / 't48'), str(tmp_path / 't40'))


def test_samples_of_data_sets_of_others_are_left_alone(tmp_path):
    cfg = toy_config(tmp_path, epochs=1)
    assert cli.main(['train', str(write_config(tmp_path / 'toy.py', cfg)), '--work-dir', str(tmp_path / 'run')]) == 0
    judged = json.loads((tmp_path / 'run' / 'environment.json').read_text())['judged']
    assert judged['points'] is None and judged['dataset'] == 'ToyClouds'
