"""A report per run: written by training and testing, complete, small, and a browser opens it without a word."""
import json
import re

import pytest
import torch
from browser import open_page
from cli_toys import configs, fails
from engine_toys import on_cpu, toy_config  # noqa: F401

from ewa3d import cli
from ewa3d.charts import confusion_table, line_chart, line_charts, page, table
from ewa3d.engine.averaging import average_, expert_spread
from ewa3d.engine.display_hooks import confusions
from ewa3d.engine.hooks import unwrapped
from ewa3d.engine.runner import Runner
from ewa3d.evaluation import Accuracy
from ewa3d.evaluation_tasks import TaskMetrics
from ewa3d.layers.experts import iter_experts
from ewa3d.plot import plot_confusion, plot_runs
from ewa3d.report import write_report
from ewa3d.runs import curves_of, default_keys, read_json, read_metrics, run_names


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Work dirs of an EWA run and its plain twin, and the config of the first."""
    folder = tmp_path_factory.mktemp('runs')
    ewa, plain = configs(folder)
    for name, path in (('ewa', ewa), ('plain', plain)):
        assert cli.main(['train', path, '--work-dir', str(folder / 'work' / name), '--cfg-options',
                         'train_cfg.max_epochs=2']) == 0
    return folder / 'work' / 'ewa', folder / 'work' / 'plain', ewa


def outside(text: str) -> list[str]:
    """What a page would load from elsewhere."""
    return [link for link in re.findall(r'(?:src|href)="?([^" >]*)', text) if not link.startswith('data:')] + \
        re.findall(r'url\([^)]*\)|@import|<script', text)


def test_training_leaves_a_report(runs):
    ewa, _, _ = runs
    text = (ewa / 'report.html').read_text(encoding='utf-8')
    for part in ('<h2>Results</h2>', '<h2>To repeat it</h2>', '<h2>Curves</h2>', '<h2>Confusion</h2>', 'By class', 'OA',
                 'share_rate', 'spread', 'ToyClouds', 'version of torch', '--seed 0', 'acc/round', '2 epochs'):
        assert part in text, part
    assert not outside(text) and len(text) < 200_000
    found = json.loads((ewa / 'confusion.json').read_text())['']
    assert found['classes'] == ['flat', 'round', 'long'] and sum(map(sum, found['counts'])) == 9
    log = (ewa / 'train.log').read_text()
    assert f'report: {ewa / "report.html"}' in log
    assert re.search(r'training took 0:0\d:\d\d; in .*work/ewa: report.html, metrics.jsonl, epoch_2.pth', log)


def test_testing_adds_to_the_report_or_makes_one(runs, tmp_path):
    ewa, _, config = runs
    assert cli.main(['test', config, str(ewa / 'epoch_2.pth'), '--work-dir', str(tmp_path / 'new'), '--pictures']) == 0
    text = (tmp_path / 'new' / 'report.html').read_text(encoding='utf-8')
    assert 'class=n' in text and 'predictions.png' in text and 'data:image/png;base64,' in text and 'ToyClouds' in text
    assert '<h2>Curves</h2>' not in text and not outside(text)
    assert {path.name for path in (tmp_path / 'new' / 'pictures').iterdir()} == {'predictions.png', 'predictions.html'}
    counts = read_json(tmp_path / 'new' / 'confusion.json')['']['counts']
    oa = json.loads((tmp_path / 'new' / 'metrics.json').read_text())['OA']
    assert 100 * sum(counts[i][i] for i in range(3)) / 9 == pytest.approx(oa)
    assert cli.main(['report', str(tmp_path / 'new'), str(ewa)]) == 0
    again = (tmp_path / 'new' / 'report.html').read_text(encoding='utf-8')
    assert 'The test: dataset: ToyClouds, split: test, points: 48' in again


def test_a_browser_opens_it(runs, tmp_path):
    page, said = open_page(runs[0] / 'report.html', tmp_path)
    assert said == [] and page.count('<svg') >= 6 and '<td>OA</td>' in page


def test_a_run_without_validation_is_reported_after_its_test(tmp_path, monkeypatch):
    monkeypatch.setattr('sys.argv', ['tools/train.py', 'my config.py'])
    cfg = toy_config(tmp_path, epochs=1, val_dataloader=None, val_cfg=None, val_evaluator=None)
    Runner.from_cfg(cfg).train()
    text = (tmp_path / 'report.html').read_text(encoding='utf-8')
    assert 'test, epoch 1' in text and '<h2>Confusion</h2>' in text
    assert "python tools/train.py &#x27;my config.py&#x27;" in text
    monkeypatch.setattr('ewa3d.report.write_report', lambda *a, **k: (_ for _ in ()).throw(OSError('disk full')))
    Runner.from_cfg(toy_config(tmp_path / 'b', epochs=1)).train()  # the run is not lost for it
    assert 'no report was written: disk full' in (tmp_path / 'b' / 'train.log').read_text()
    left_out = dict(checkpoint=dict(type='CheckpointHook'), report=None, progress=None)
    Runner.from_cfg(toy_config(tmp_path / 'c', epochs=1, default_hooks=left_out)).train()
    assert not (tmp_path / 'c' / 'report.html').exists()


def test_folders_that_are_no_runs(tmp_path, capsys):
    assert 'no such folder' in fails(capsys, 'report', str(tmp_path / 'x'))
    assert 'neither metrics.jsonl' in fails(capsys, 'report', str(tmp_path))
    assert 'work dir of a training was expected' in fails(capsys, 'plot', str(tmp_path))
    assert 'no confusion.json' in fails(capsys, 'plot', str(tmp_path), '--confusion')
    (tmp_path / 'metrics.jsonl').write_text('[1]\nnonsense\n')
    assert 'no line such as' in fails(capsys, 'plot', str(tmp_path))
    (tmp_path / 'metrics.json').write_text('{')
    (tmp_path / 'metrics.jsonl').write_text('{"mode": "train", "epoch": 1, "loss": 2.0}\n{"mode": "tr')
    assert 'no JSON' in fails(capsys, 'report', str(tmp_path))
    (tmp_path / 'metrics.json').unlink()
    assert '2.00' in write_report(tmp_path).read_text(encoding='utf-8')  # an interrupted run has one as well
    assert read_metrics(tmp_path) == [{'mode': 'train', 'epoch': 1, 'loss': 2.0}]


# ---- curves ---------------------------------------------------------------------------------------------------------
def test_plots_of_several_runs(runs, tmp_path, capsys):
    ewa, plain, _ = map(str, runs)
    for suffix, start in (('png', b'\x89PNG'), ('svg', b'<?xml'), ('pdf', b'%PDF')):
        assert plot_runs([ewa, plain], tmp_path / f'a.{suffix}', ['loss', 'OA']).read_bytes().startswith(start)
    assert cli.main(['plot', ewa, plain, '--out', str(tmp_path / 'a.html')]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / 'a.html')
    text = (tmp_path / 'a.html').read_text(encoding='utf-8')
    assert text.count('<svg') == 6 and '> ewa<' in text and '> plain<' in text and not outside(text)
    assert "no run has 'los' in its metrics; did you mean 'loss'" in fails(capsys, 'plot', ewa, '--keys', 'los')
    assert 'ends in .png, .svg, .pdf' in fails(capsys, 'plot', ewa, '--out', str(tmp_path / 'x.gif'))
    assert plot_confusion(ewa, tmp_path / 'c.png')[0].stat().st_size > 5000
    assert '<table class="matrix">' in plot_confusion(ewa, tmp_path / 'c.html')[0].read_text(encoding='utf-8')
    assert 'one run' in fails(capsys, 'plot', ewa, plain, '--confusion')


def test_curves_and_names():
    lines = [dict(mode='train', epoch=1, iter=3, loss=2., lr=.1, time=1, **{'spread/a.mlp': .1, 'spread/b.mlp': .2}),
             dict(mode='val', epoch=1, iter=3, OA=50., time=1, **{'acc/cup': 40.}),
             dict(mode='train', epoch=2, iter=6, loss=1., lr=.1, time=1), dict(mode='val', epoch=2, loss=3., OA=60.)]
    assert default_keys(lines) == ['loss', 'OA', 'lr', 'spread/*']
    one = curves_of(dict(x=lines))
    assert one['loss'] == dict(train=([1, 2], [2., 1.]), val=([2], [3.]))
    assert one['OA'] == dict(val=([1, 2], [50., 60.]))
    assert one['spread'] == {'a.mlp': ([1], [.1]), 'b.mlp': ([1], [.2])}
    two = curves_of(dict(x=lines, y=lines[:1]), ['loss', 'spread/b*', 'acc/*'])
    assert set(two['loss']) == {'x train', 'x val', 'y'} and set(two['spread/b*']) == {'x', 'y'}
    assert two['acc'] == {'x': ([1], [40.])}
    with pytest.raises(ValueError, match=r"'OAA'.*'OA'"):
        curves_of(dict(x=lines), ['OAA'])
    assert run_names(['/a/b/c', '/a/d/c']) == ['b/c', 'd/c'] and run_names(['/a/b']) == ['b']
    assert run_names(['/a', '/a/']) == ['a (1)', 'a (2)']


def test_charts():
    nan = float('nan')
    text = line_chart({'<a>': ([1, 2, 3, 4], [0., nan, 2., 3.])}, 'A & B')
    assert '&lt;a&gt;' in text and 'A &amp; B' in text and 'nan' not in text and text.count('<circle') == 6
    assert len(re.findall(r'M', re.search(r'd="([^"]*)" fill="none"', text)[1])) == 2  # a gap
    for curve in (([1], [5.]), ([3], [0.]), ([1, 2], [nan, nan]), (list(range(5000)), [1e-9] * 5000),
                  ([1, 2], [-1e6, 1e6])):
        made = line_chart(dict(x=curve), 'x')
        assert 'inf' not in made and 'nan' not in made and made.count('<circle') < 1000
    colours = re.findall(r'stroke="(#[^"]*)" stroke-width', line_charts(dict(a=dict(x=([1], [1])), b=dict(
        y=([1], [1]), x=([1], [1])))))
    assert colours[0] == colours[2] != colours[1]
    assert '<td class=n>0.1235</td>' in table([(0.12345, 'x', True)]) and '&lt;' in page('<', '')


def test_matrix_as_a_table():
    text = confusion_table([[5, 0], [3, 1]], ['<b>', 'c'])
    assert '&lt;b&gt;' in text and '75.0 %' in text and '<b>' not in text.replace('<body>', '')
    assert 'No confusion' in confusion_table([[2]], ['a'])
    big = confusion_table(torch.eye(100, dtype=torch.int64) + 1, [f'class{i}' for i in range(100)])
    assert 'matrix' not in big and big.count('<tr>') == 11
    with pytest.raises(ValueError, match=r'\(2, 2\) for 2 classes'):
        confusion_table([[1]], ['a', 'b'])


def test_matrices_of_an_evaluation():
    metric = Accuracy(num_classes=2)
    assert not list(confusions([metric]))
    metric.process({}, [dict(gt_label=0, pred_label=1), dict(gt_label=1, pred_label=1)])
    metric.evaluate(2)
    (task, classes, counts), = confusions([metric])
    assert (task, classes, counts.tolist()) == ('', ['0', '1'], [[0, 1], [0, 1]])
    tasks = TaskMetrics(dict(a=dict(type='Accuracy', num_classes=2), b=dict(type='Accuracy', num_classes=3)))
    tasks.process({}, [dict(gt_label=0, pred_label=0, source='a'), dict(gt_label=2, pred_label=0, source='b')])
    tasks.evaluate(2)
    assert [(task, len(classes)) for task, classes, _ in confusions([tasks])] == [('a', 2), ('b', 3)]


# ---- spread ---------------------------------------------------------------------------------------------------------
def test_spread_of_experts(runs, tmp_path):
    lines = [line for line in read_metrics(runs[0]) if line['mode'] == 'train']
    keys = [key for key in lines[0] if key.startswith('spread/')]
    assert keys == ['spread/backbone.blocks.0.mlp', 'spread/backbone.blocks.1.mlp']
    assert all(0 < line[key] < 1 for line in lines for key in keys)
    assert not any(key.startswith('spread') for line in read_metrics(runs[1]) for key in line)
    runner = Runner.from_cfg(toy_config(tmp_path, ewa=True, epochs=1))
    model = unwrapped(runner.model)
    assert set(expert_spread(model).values()) == {0.}
    with torch.no_grad():
        for _, module in iter_experts(model):
            for parameter in module.expert_parameters():
                parameter.add_(torch.randn_like(parameter))
    found = expert_spread(model)
    for name, module in iter_experts(model):
        rows = torch.cat([p.flatten(1) for p in module.expert_parameters()], 1).double()
        mean = rows.mean(0)
        apart = (rows - mean).norm(dim=1).square().mean().sqrt() / mean.norm()
        assert found[name] == pytest.approx(float(apart), rel=1e-5)
    average_(model, 0.5)  # (E - 1) / E of two experts: they become their mean
    assert max(expert_spread(model).values()) < 1e-6
    assert expert_spread(torch.nn.Linear(2, 2)) == {}
    from ewa3d.engine.hooks import EWAHook
    with pytest.raises(ValueError, match='log_interval'):
        EWAHook(log_interval=0)
