"""The benchmarks run, take turns, keep raw timings, and compare forms that compute the same. Nothing is judged."""
import contextlib
import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ewa3d.bench import SUITES, Case, Settings, Work, harness, latency, main, measure, report, step
from ewa3d.bench.main import run
from ewa3d.bench.ops import (
    ball_query_topk,
    chamfer_cdist,
    chamfer_gather,
    fps_in_place,
    fps_mask_assign,
    knn_cdist,
    knn_centred_product,
    knn_trees,
    nearest_argmin,
    nearest_trees,
)
from ewa3d.bench.parts import interpolate_gather
from ewa3d.bench.pretrain import QUICK, NaivePointMAE, autoencoder
from ewa3d.bench.published import NaiveClassifier, scale_and_translate
from ewa3d.bench.scaling import Crew
from ewa3d.models.weights import rename

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the timed work moves."""
    state = {'now': 0.}
    monkeypatch.setattr(harness.time, 'perf_counter', lambda: state['now'])
    return state


def case_of(clock, calls=None, **seconds):
    def build(name, cost):
        def work():
            clock['now'] += cost
            if calls is not None:
                calls.append(name)
        return lambda: work
    return Case('case', {name: build(name, cost) for name, cost in seconds.items()})


def test_variants_take_turns_in_changing_order(clock):
    calls = []
    rows = measure(case_of(clock, calls, a=1., b=2., c=4.), Settings(repeat=12), 'suite')
    timed = calls[6:]  # after two untimed calls each
    rounds = [tuple(timed[i:i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) == 12 and all(sorted(r) == ['a', 'b', 'c'] for r in rounds)
    assert len(set(rounds)) > 2
    assert [row.variant for row in rows] == ['a', 'b', 'c']
    assert [row.summary()['ratio'] for row in rows] == [1., 2., 4.]


def test_ratios_are_taken_within_a_round(clock):
    """A machine that slows down tenfold midway moves the times and leaves the ratio."""
    def build(cost):
        def work():
            clock['now'] += cost * (10. if clock['now'] > 60. else 1.)
        return lambda: work

    row = measure(Case('case', {'a': build(1.), 'b': build(2.)}), Settings(repeat=40))[1].summary()
    assert row['max_s'] == pytest.approx(10 * row['min_s'])
    assert row['ratio'] == pytest.approx(2.)


def test_short_work_is_repeated_within_a_timing(clock):
    calls = []
    rows = measure(case_of(clock, calls, a=0.001, b=0.002), Settings(repeat=3))
    assert len(calls) == 2 * 2 + 3 * 2 * 10  # 0.02 s / 0.002 s = 10 calls a timing, the same for both
    assert rows[0].seconds == pytest.approx([0.001] * 3)


def test_every_variant_is_built_from_the_same_seed(clock):
    drawn = []

    def build():
        drawn.append(torch.rand(3))
        return lambda: clock.update(now=clock['now'] + 1.)

    measure(Case('case', {'a': build, 'b': build}), Settings(repeat=1))
    assert torch.equal(*drawn)


def test_report_is_json_with_hardware_versions_and_spread(clock):
    result = json.loads(json.dumps(report(measure(case_of(clock, a=1., b=2.), Settings(repeat=3), 's'), Settings())))
    assert result['hardware']['cpu'] and result['hardware']['cores'] >= 1
    assert result['versions']['torch'] == torch.__version__ or result['versions']['torch'].startswith('2')
    assert result['rows'][1]['seconds'] == [2.] * 3
    assert {'median_s', 'min_s', 'max_s', 'ratio', 'ratio_min', 'ratio_max'} <= set(result['rows'][0])


def test_bad_settings():
    with pytest.raises(ValueError, match='repeat = 0'):
        measure(Case('case', {'a': lambda: lambda: None}), Settings(repeat=0))
    with pytest.raises(ValueError, match='no variants'):
        Case('case', {})
    with pytest.raises(ValueError, match=r"no suite 'stp'; did you mean 'step'"):
        from ewa3d.bench.main import run
        run(['stp'], Settings())


@pytest.mark.parametrize('argv, message', [(['stp'], "did you mean 'step'"), (['--threads', '0'], '--threads 0'),
                                           (['--repeat', '-1'], '--repeat -1'), (['--dtype', 'fp8'], 'fp8'),
                                           (['--device', 'gpu'], '--device gpu: cpu, cuda or cuda:N was expected'),
                                           (['--device', 'mps'], '--device mps: cpu, cuda or cuda:N was expected')])
def test_bad_command_lines_end_with_a_message(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason='a CUDA device is here')
def test_a_missing_gpu_is_said(capsys):
    with pytest.raises(SystemExit):
        main(['ops', '--device', 'cuda'])
    assert 'torch sees no CUDA device' in capsys.readouterr().err


def of_suite(monkeypatch, tmp_path, cases):
    """What `bench toy` writes."""
    monkeypatch.setitem(SUITES, 'toy', cases)
    path = tmp_path / 'r.json'
    with contextlib.suppress(RuntimeError):
        main(['toy', '--repeat', '1', '--json', str(path)])
    return json.loads(path.read_text())


def test_what_is_not_there_is_skipped_and_said(monkeypatch, tmp_path, capsys):
    def cases(settings):
        yield Case('one', {'a': lambda: lambda: None}, skipped={'b': 'it needs a GPU'})
        yield Case('two', {'a': lambda: importlib.import_module('no_such_package')})
        yield Case('three', {'a': lambda: lambda: None})
        importlib.import_module('no_such_package')

    result = of_suite(monkeypatch, tmp_path, cases)
    assert [(row['case'], row['variant']) for row in result['rows']] == [('one', 'a'), ('three', 'a')]
    one, two, four = result['skipped']
    assert four['case'] is None and four['reason'] == two['reason']
    assert one == dict(suite='toy', case='one', variant='b', reason='it needs a GPU')
    assert two['case'] == 'two' and two['variant'] is None and 'pip install no_such_package' in two['reason']
    out = capsys.readouterr().out
    assert 'skipped: toy, b: it needs a GPU\n' in out and 'skipped: toy, two: No module named' in out


def test_what_was_measured_before_an_error_is_kept(monkeypatch, tmp_path):
    def cases(settings):
        yield Case('one', {'a': lambda: lambda: None})
        raise RuntimeError('out of memory')

    assert [row['case'] for row in of_suite(monkeypatch, tmp_path, cases)['rows']] == ['one']


def test_pytorch3d_is_one_of_the_forms_where_it_is_installed(monkeypatch, request):
    names = ('fps', 'knn', 'ball query', 'chamfer')
    for installed in (False, True):
        if installed:
            request.getfixturevalue('pytorch3d')
        else:
            monkeypatch.setitem(sys.modules, 'pytorch3d.ops', None)
        cases = [case for case in SUITES['ops'](Settings(quick=True)) if case.name.startswith(names)]
        assert cases and all(case.memory for case in cases)
        assert all(('pytorch3d' in case.variants) is installed for case in cases)
        assert all(('pytorch3d' in case.skipped) is not installed for case in cases)
        if installed:
            assert all(len(measure(case, Settings(quick=True, repeat=1))) == len(case.variants) for case in cases)


def test_steps_are_compiled_on_a_gpu_only():
    on_cpu, on_gpu = (next(SUITES['step'](Settings(torch.device(kind)))) for kind in ('cpu', 'cuda'))
    more = {'plain, compiled', 'EWA, every 2nd FFN, compiled'}
    assert set(on_cpu.skipped) == more and set(on_gpu.variants) == set(on_cpu.variants) | more and not on_gpu.skipped


def test_an_error_in_another_process_is_told_with_its_traceback():
    with pytest.raises(RuntimeError, match=r'rank 0 of 1: Traceback[\s\S]*ValueError: not enough values'), \
            Crew([1], Settings(quick=True)) as crew:
        crew.ask(1, 'build', ('nothing',))
    assert not any(process.is_alive() for process in crew.processes)


@pytest.mark.parametrize('suite', SUITES)
def test_quick_suite_runs_and_writes_its_numbers(suite, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert main([suite, '--quick', '--repeat', '2', '--out', str(tmp_path / 'out' / 'r.json')]) == 0
    assert torch.get_num_threads() == threads
    result = json.loads((tmp_path / 'out' / 'r.json').read_text())
    table = capsys.readouterr().out
    assert result['rows'] and all(row['suite'] == suite and len(row['seconds']) == 2 for row in result['rows'])
    assert all(f'| {row["variant"]} |' in table for row in result['rows'])
    cases = {row['case'] for row in result['rows']}
    assert suite in ('ops', 'data') or {case.rsplit(', ', 1)[1] for case in cases} == {'fp32', 'bf16'}


def test_mixers_are_measured_from_64_to_16k_tokens():
    """In every case there are attention, S4D and S4."""
    from ewa3d.bench import mixers
    found = {case.name: set(case.variants) for case in mixers.cases(Settings())}
    lengths = {name.split('×')[1].split()[0] for name in found}
    assert lengths == {'64', '256', '1024', '4096', '16384'} and len(found) == 5 * 2 * 2
    assert all({'attention', 'S4D', 'S4, two directions'} <= variants for variants in found.values())


def test_chosen_cases(tmp_path):
    main(['relatives', '--quick', '--repeat', '1', '--case', 'bf16', '--out', str(tmp_path / 'a.json')])
    rows = json.loads((tmp_path / 'a.json').read_text())['rows']
    assert {row['variant'] for row in rows} >= {'plain', 'EWA', 'S4D'} and all('bf16' in row['case'] for row in rows)
    assert run(['relatives'], Settings(quick=True), part='no such case') == []


def test_the_script_lists_its_suites():
    done = subprocess.run([sys.executable, 'tools/bench.py', '--help'], cwd=REPO, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(REPO)})
    assert done.returncode == 0 and all(name in done.stdout for name in SUITES)


def test_portable_forms_compute_the_real_thing():
    from ewa3d import ops
    points = torch.randn(3, 50, 3, dtype=torch.float64)
    query = points[:, :7] + 0.1
    assert torch.equal(fps_mask_assign(points, 12), ops.fps(points, 12))
    assert torch.equal(fps_in_place(points, 12), ops.fps(points, 12))
    squared, index = ops.knn(query, points, 5)
    distance, by_cdist = knn_cdist(query, points, 5)
    product, by_product = knn_centred_product(query, points, 5)
    by_trees, of_trees = knn_trees(query, points, 5)
    assert torch.equal(by_cdist, index) and torch.equal(by_product, index) and torch.equal(of_trees, index)
    torch.testing.assert_close(by_trees, squared)
    torch.testing.assert_close(distance.square(), squared)
    torch.testing.assert_close(product, squared)
    assert torch.equal(ball_query_topk(points[:, :7], points, 1.1, 5), ops.ball_query(points[:, :7], points, 1.1, 5))
    for form in (chamfer_cdist, partial(chamfer_gather, nearest_argmin), partial(chamfer_gather, nearest_trees)):
        torch.testing.assert_close(form(query, points), ops.chamfer_distance(query, points))
    features = torch.randn(3, 50, 4, dtype=torch.float64)
    torch.testing.assert_close(interpolate_gather(query, points, features), ops.interpolate(query, points, features))


def test_peak_memory_is_what_a_call_holds_at_a_time():
    def work():
        for _ in range(20):
            x = torch.ones(1 << 20)  # 4 MiB, gone before the next one
            x = x + 1
            del x

    # two at a time, not the sum of forty; resident memory counts what the allocator has not joined up again, too
    assert 8 << 20 <= harness.peak_memory(work, torch.device('cpu')) < 40 << 20
    if sys.platform.startswith('linux'):
        assert harness.peak_memory(lambda: np.ones(6 << 20), torch.device('cpu')) > 40 << 20  # what torch does not see
    rows = measure(Case('case', {'a': lambda: work}, memory=True), Settings(repeat=1))
    assert rows[0].summary()['peak_bytes'] == rows[0].peak
    rows += measure(Case('case', {'b': lambda: work}), Settings(repeat=1))
    first, second = harness.table(rows).splitlines()[2:]
    assert first.endswith(f'| {rows[0].peak / 2**20:.3g} |') and second.endswith(' |')
    assert first.count('|') == second.count('|')


@pytest.mark.parametrize('training', [True, False])
def test_the_naive_point_mae_computes_the_same_thing(training):
    """Loss, gradients and batch statistics, on the same weights, clouds and masks."""
    size = dict(QUICK, num_groups=10, depth=3, decoder_depth=2)
    ours = autoencoder(size, drop_path=0.).double().train(training)
    naive = NaivePointMAE(ours, size, drop_path=0.).double().train(training)
    points = torch.randn(3, size['points'], 3, dtype=torch.float64)
    mask = torch.stack([torch.randperm(10) < 6 for _ in range(3)])
    losses = [ours(points, mode='loss', mask=mask)['loss_chamfer'], naive(points, mask)]
    torch.testing.assert_close(*losses)
    grads = []
    for model, loss in zip((ours, naive), losses):
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    renamed = rename(grads[0], 'point_mae_pretrain', reverse=True)
    assert set(renamed) == set(grads[1])
    for name, grad in grads[1].items():
        torch.testing.assert_close(renamed[name], grad, msg=name)
    buffers = rename(dict(ours.named_buffers()), 'point_mae_pretrain', reverse=True)
    for name, buffer in naive.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, msg=name)
    assert naive._mask(5, 10).sum(1).tolist() == [6] * 5


@pytest.mark.parametrize('training', [True, False])
def test_the_published_classifier_computes_the_same_thing(training):
    """Loss, gradients and batch statistics of the fine-tuning step, on the same weights and clouds."""
    size = dict(step.QUICK, depth=3)
    ours = step.classifier(size, drop_path=0., dropout=0.).double().train(training)
    naive = NaiveClassifier(ours, size, drop_path=0.).double().train(training)
    points, labels = torch.randn(4, size['points'], 3, dtype=torch.float64), torch.arange(4)
    losses = [torch.nn.functional.cross_entropy(model(x), labels)
              for model, x in ((ours, dict(points=points)), (naive, points))]
    torch.testing.assert_close(*losses)
    grads = []
    for model, loss in zip((ours, naive), losses):
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    renamed = rename(grads[0], 'point_mae', reverse=True)
    assert set(renamed) == set(grads[1])
    for name, grad in grads[1].items():
        torch.testing.assert_close(renamed[name], grad, msg=name)
    buffers = rename(dict(ours.named_buffers()), 'point_mae', reverse=True)
    for name, buffer in naive.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, msg=name)


def test_the_published_augmentation_scales_and_shifts_every_cloud():
    points = torch.randn(3, 20, 3, dtype=torch.float64)
    moved = scale_and_translate(points.clone())
    for before, after in zip(points, moved):
        factor = (after[1:] - after[0]) / (before[1:] - before[0])
        torch.testing.assert_close(factor, factor[:1].expand_as(factor))
        assert factor.min() > 0.66 and factor.max() < 1.51
        assert (after - before * factor[0]).abs().max() < 0.21


def test_facts_and_items_are_columns(clock):
    def slow():
        clock['now'] += 2.

    rows = measure(Case('case', {'a': lambda: slow, 'b': lambda: Work(slow, {'parameters': 12345, 'share': 0.5}, 10)}),
                   Settings(repeat=2))
    summary = rows[1].summary()
    assert summary['items_per_s'] == 5 and summary['facts'] == {'parameters': 12345, 'share': 0.5}
    assert 'facts' not in rows[0].summary() and 'items_per_s' not in rows[0].summary()
    head, _, first, second = harness.table(rows).splitlines()
    assert head.endswith('| items / s | parameters | share |') and second.endswith('| 5 | 12,345 | 0.5 |')
    assert first.count('|') == second.count('|') == head.count('|')


def test_the_clock_may_be_the_processor_time_of_the_process(monkeypatch):
    state = {'now': 0.}
    monkeypatch.setattr(harness.time, 'process_time', lambda: state['now'])
    rows = measure(Case('case', {'a': lambda: lambda: state.update(now=state['now'] + 3.)}),
                   Settings(repeat=2, clock='cpu'))
    assert rows[0].seconds == [3., 3.]


def test_flops_of_fused_models():
    """Two operations a product and sum; a fused model of EWA costs what the plain one does, RePaViT's less."""
    assert latency.flops(torch.nn.Linear(4, 5), torch.randn(3, 4)) == 2 * 3 * 4 * 5
    builds = latency._forward(Settings(quick=True), 'fp32', latency._clouds(step.QUICK, 1, ''), 'backbone.', [])
    facts = {name: latency._forward(Settings(), 'fp32', latency._clouds(step.QUICK, 1, name), 'backbone.',
                                    latency.RULES[name])().facts for name in ('EWA, fused', 'RePaViT, idle 0.5, fused')}
    plain = builds().facts
    assert plain['FLOPs / plain'] == facts['EWA, fused']['FLOPs / plain'] == 1
    assert facts['RePaViT, idle 0.5, fused']['FLOPs / plain'] < 1
    assert facts['EWA, fused']['parameters'] == plain['parameters'] < facts['EWA, fused']['parameters, training']
