"""The linear SVM and voting: right numbers, nothing disturbed, exact on resume, clear errors."""
import json

import numpy as np
import pytest
import torch
from engine_toys import on_cpu, same, toy_config, write_config  # noqa: F401
from sklearn.svm import LinearSVC
from test_resume import assert_same_run, train
from torch import nn

from ewa3d import cli, protocols
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.engine.hooks import get_rng_state
from ewa3d.engine.runner import Runner
from ewa3d.engine.validate import check_config
from ewa3d.protocols import extract_features, linear_svm, vote
from ewa3d.structures import Sample

LOADER = dict(batch_size=5, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False, round_up=False))
SVM = dict(type='LinearSVMHook', train_dataloader=dict(**LOADER, dataset=dict(type='ToyClouds', num_samples=15)))
PLAIN = [dict(type='Normalize'), dict(type='Resample', num_points=48), dict(type='Pack')]
AUGMENTED = [dict(type='Normalize'), dict(type='Resample', num_points=48, pool=60, method='random'),
             dict(type='RandomScale'), dict(type='RandomShift'), dict(type='Pack')]
SHAPES = dict(type='SyntheticShapes', num_samples=26, num_points=64)


def svm_config(work_dir, hook=SVM, **options) -> dict:
    cfg = toy_config(work_dir, **options)
    cfg['default_hooks']['svm'] = hook
    return cfg


def shapes_config(work_dir='x', **options) -> dict:
    """Training and test on synthetic shapes, with pipelines that differ."""
    cfg = toy_config(work_dir, epochs=1, **options)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader']['dataset'] = dict(SHAPES, split=split,
                                                     pipeline=AUGMENTED if split == 'train' else PLAIN)
    return cfg


def lines(folder, mode='val') -> list[dict]:
    found = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [line for line in found if line['mode'] == mode]


# ---- the SVM itself --------------------------------------------------------------------------------------------------
def blobs(n, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    return (rng.normal(size=(n, 4)) + 2 * np.eye(4)[labels]).astype(np.float32), labels


def test_linear_svm_is_scikit_learns():
    train_set, test_set = blobs(60), blobs(90, 1)
    np.random.seed(3)
    before = get_rng_state()
    for C in (0.01, 1.0):
        svm = LinearSVC(C=C, dual=True, random_state=0).fit(*train_set)
        assert linear_svm(*train_set, *test_set, C=C) == pytest.approx(100 * svm.score(*test_set))
    assert linear_svm(*train_set, *train_set) > 70 and same(get_rng_state(), before)


def test_a_fit_that_does_not_converge_is_logged(monkeypatch):
    said = []
    monkeypatch.setattr(protocols, 'print_log', lambda text, logger: said.append(text))
    linear_svm(*blobs(60), *blobs(9), C=1e-3)
    assert not said
    linear_svm(*blobs(60), *blobs(9), C=1e6)
    assert len(said) == 1 and '1000 iterations' in said[0] and 'not converged' in said[0]


def test_linear_svm_of_what_cannot_be_fitted():
    features, labels = blobs(9)
    with pytest.raises(ValueError, match='training features are not finite'):
        linear_svm(features * np.nan, labels, features, labels)
    with pytest.raises(ValueError, match='test features are not finite'):
        linear_svm(features, labels, features * np.inf, labels)
    with pytest.raises(ValueError, match='one class only, label 7'):
        linear_svm(features, labels * 0 + 7, features, labels)


def test_features_are_frozen_and_the_model_is_left_as_it_was(tmp_path):
    runner = Runner.from_cfg(toy_config(tmp_path))
    model, loader = runner.model, runner.build_dataloader(SVM['train_dataloader'])
    model.train()
    model.head.eval()  # a frozen part
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, get_rng_state()
    modes = [module.training for module in model.modules()]
    features, labels = extract_features(model, loader)
    assert same(dict(model.state_dict()), state) and same(get_rng_state(), rng)
    assert [module.training for module in model.modules()] == modes and any(modes) and not all(modes)
    assert features.shape == (15, 32) and labels.tolist() == [0, 1, 2] * 5
    model.eval()
    points = torch.stack([loader.dataset[i]['inputs']['points'] for i in range(15)])
    assert np.allclose(model.extract(points).detach(), features, atol=1e-6)


def test_features_need_extract_and_labels(tmp_path):
    runner = Runner.from_cfg(toy_config(tmp_path))
    with pytest.raises(TypeError, match=r'Linear has no extract\(points\)'):
        extract_features(nn.Linear(1, 1), runner.build_dataloader(SVM['train_dataloader']))
    cfg = dict(SVM['train_dataloader'], dataset=dict(SHAPES, pipeline=[
        lambda results: dict(results, label=None), *PLAIN]))
    with pytest.raises(ValueError, match="sample 'airplane_00000' has no label"):
        extract_features(runner.model, runner.build_dataloader(cfg))


# ---- as a metric of a run --------------------------------------------------------------------------------------------
def test_svm_is_reported_at_every_validation_and_disturbs_nothing(tmp_path):
    options = dict(ewa=True, epochs=2)
    train(toy_config(tmp_path / 'without', **options))
    train(svm_config(tmp_path / 'with', **options))
    a, b = (read_checkpoint(tmp_path / name / 'epoch_2.pth') for name in ('without', 'with'))
    for key in ('state_dict', 'optimizer', 'rng'):
        assert same(a[key], b[key]), key
    found = lines(tmp_path / 'with')
    assert [line['epoch'] for line in found] == [1, 2] and all(0 <= line['svm_acc'] <= 100 for line in found)
    assert [line['OA'] for line in found] == [line['OA'] for line in lines(tmp_path / 'without')]
    assert 'svm_acc' in (tmp_path / 'with' / 'train.log').read_text()


def test_the_number_is_that_of_the_model_as_it_stands(tmp_path):
    runner = train(svm_config(tmp_path, epochs=1))
    loaders = [runner.build_dataloader(SVM['train_dataloader']), runner.val_dataloader]
    sets = [array for loader in loaders for array in extract_features(runner.model, loader)]
    assert lines(tmp_path)[-1]['svm_acc'] == linear_svm(*sets) == runner.last_metrics['svm_acc']


@pytest.mark.parametrize('stage', ['after_train_epoch', 'after_val_epoch'])
def test_resume_is_exact(tmp_path, stage):
    options = dict(ewa=True, epochs=2)
    train(svm_config(tmp_path / 'whole', **options))
    train(svm_config(tmp_path / 'stopped', **options), stop_after=1, stop_in=stage)
    torch.manual_seed(5)
    train(svm_config(tmp_path / 'stopped', **options, resume=True))
    assert_same_run(tmp_path / 'whole', tmp_path / 'stopped', 2)


def test_an_average_is_what_is_probed(tmp_path, monkeypatch):
    """With EMA, the features are those of the averaged weights, which checkpoints hold as ``state_dict``."""
    seen = []
    monkeypatch.setattr(protocols, 'extract_features', lambda model, loader: seen.append(
        {k: v.clone() for k, v in model.state_dict().items()}) or extract_features(model, loader))
    train(svm_config(tmp_path, ema=True, epochs=1))
    assert len(seen) == 2 and same(seen[0], read_checkpoint(tmp_path / 'epoch_1.pth')['state_dict'])


def test_best_by_svm_and_own_test_data(tmp_path):
    cfg = svm_config(tmp_path, epochs=1, hook=dict(SVM, C=0.1, test_dataloader=dict(
        **LOADER, dataset=dict(type='ToyClouds', num_samples=6, split='test'))))
    cfg['default_hooks']['checkpoint']['save_best'] = 'svm_acc'
    train(cfg)
    assert (tmp_path / 'best_svm_acc_epoch_1.pth').is_file()


def test_svm_hook_mistakes(tmp_path):
    cfg = svm_config(tmp_path)
    cfg.update(val_dataloader=None, val_cfg=None, val_evaluator=None)
    with pytest.raises(ValueError, match='no val_dataloader'):
        Runner.from_cfg(cfg).train()
    with pytest.raises(ValueError, match='C must lie in'):
        protocols.LinearSVMHook(SVM['train_dataloader'], C=0)
    for path, value, text in (('dataset', dict(type='ToyCloud'), 'train_dataloader.dataset'),
                              ('batchsize', 3, "'batch_size'")):
        with pytest.raises((KeyError, TypeError), match=text):
            check_config(svm_config('x', hook=dict(SVM, train_dataloader={**SVM['train_dataloader'], path: value})))


@pytest.mark.parametrize('classes', [('round', 'flat', 'long'), ('flat', 'round', 'tall'), ('flat', 'round')])
def test_test_data_of_other_classes(tmp_path, classes):
    hook = dict(SVM, test_dataloader=dict(**LOADER, dataset=dict(type='ToyClouds', num_samples=6, classes=classes)))
    with pytest.raises(ValueError, match=f'have the classes flat, round, long, the test data {classes[0]}'):
        train(svm_config(tmp_path, hook=hook, epochs=1))


def test_a_sampler_that_repeats_samples(tmp_path, monkeypatch):
    """As ``round_up=True`` does for ranks that do not divide the data."""
    runner = Runner.from_cfg(svm_config(tmp_path))
    loader = runner.build_dataloader(SVM['train_dataloader'])
    empty = (np.empty((0, 0), np.float32), np.empty(0, np.int64))
    own = extract_features(runner.model, loader)
    monkeypatch.setattr(protocols, 'all_gather_object', lambda part: [part, empty])  # a rank without a sample
    features, labels = protocols.gather_features(runner.model, loader, 'x')
    assert np.array_equal(features, own[0]) and np.array_equal(labels, own[1])
    monkeypatch.setattr(protocols, 'all_gather_object', lambda part: [part, part])
    with pytest.raises(ValueError, match=r'x gives 30 samples of 15.*round_up=False'):
        protocols.gather_features(runner.model, loader, 'x')


def test_a_rank_without_samples_has_no_features(tmp_path):
    runner = Runner.from_cfg(svm_config(tmp_path))
    features, labels = extract_features(runner.model, [])
    assert len(features) == len(labels) == 0


# ---- voting ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def voted(tmp_path_factory):
    """A trained model's folder and the metrics of tests of it: plain, and with three passes."""
    folder = tmp_path_factory.mktemp('vote')
    config = str(write_config(folder / 'c.py', {k: v for k, v in shapes_config().items() if k != 'work_dir'}))
    assert cli.main(['train', config, '--work-dir', str(folder / 'run')]) == 0

    def test(name, *argv):
        assert cli.main(['test', config, str(folder / 'run/epoch_1.pth'), '--work-dir', str(folder / name), *argv]) == 0
        return json.loads((folder / name / 'metrics.json').read_text())
    return folder, test


def test_voting_is_reported_beside_the_plain_numbers(voted, capsys):
    _, test = voted
    plain, three = test('plain'), test('three', '--vote', '3')
    assert set(three) - set(plain) == {'OA_vote3', 'mAcc_vote3'}
    assert all(three[key] == value for key, value in plain.items())
    assert 'OA_vote3' in capsys.readouterr().out
    assert test('again', '--vote', '3') == three
    assert 'OA_vote10' in test('ten', '--vote')


def test_voting_is_the_mean_of_logits_over_augmented_passes(voted):
    folder, test = voted
    cfg = shapes_config(folder / 'twin')
    runner = Runner.from_cfg(cfg)
    runner.load_checkpoint(folder / 'run/epoch_1.pth')
    model = runner.model.eval()
    loader = runner.build_dataloader(dict(cfg['test_dataloader'], dataset=dict(
        SHAPES, split='test', pipeline=AUGMENTED, seed=0)))
    logits, seen = [], []
    for epoch in range(3):
        loader.dataset.set_epoch(epoch)
        points = [loader.dataset[i]['inputs']['points'] for i in range(26)]
        seen.append(points[0].tolist())
        with torch.no_grad():
            logits.append(torch.cat([model(torch.stack(points[i:i + 4])) for i in range(0, 26, 4)]))
    assert seen[0] != seen[1] != seen[2]
    mean = torch.stack(logits).mean(0)
    samples = vote(model, loader, 3)
    scores = torch.stack([sample.pred_scores for sample in samples])
    assert torch.allclose(scores, mean.softmax(-1), atol=1e-6)
    assert [int(sample.pred_label) for sample in samples] == mean.argmax(-1).tolist()
    accuracy = 100 * (mean.argmax(-1) == torch.tensor(loader.dataset.labels)).double().mean()
    assert test('three again', '--vote', '3')['OA_vote3'] == pytest.approx(float(accuracy))


def test_a_config_may_say_how_to_vote(voted):
    folder, _ = voted
    cfg = shapes_config(vote_pipeline=PLAIN, default_hooks=dict(vote=dict(type='VotingHook', times=2, seed=4,
                                                                          pipeline=AUGMENTED)))
    config = str(write_config(folder / 'own.py', cfg))
    for extra, key in (([], 'OA_vote2'), (['--vote', '1'], 'OA_vote1')):
        checkpoint = str(folder / 'run/epoch_1.pth')
        assert cli.main(['test', config, checkpoint, '--work-dir', str(folder / 'own'), *extra]) == 0
        metrics = json.loads((folder / 'own/metrics.json').read_text())
        assert key in metrics
    assert metrics['OA_vote1'] == metrics['OA']  # vote_pipeline draws nothing


def test_voting_on_data_that_others_wrap(voted):
    """The passes' pipeline and seed go to the data sets inside."""
    folder, test = voted
    cfg = shapes_config()
    data = cfg['test_dataloader']['dataset']
    expected = test('unwrapped', '--vote', '2')['OA_vote2']
    for name, wrapped in (('concat', dict(type='ConcatDataset', datasets=[data])),
                          ('repeat', dict(type='RepeatDataset', dataset=data, times=1))):
        cfg['test_dataloader']['dataset'] = wrapped
        config = str(write_config(folder / f'{name}.py', {k: v for k, v in cfg.items() if k != 'work_dir'}))
        assert cli.main(['test', config, str(folder / 'run/epoch_1.pth'), '--work-dir', str(folder / name), '--vote',
                         '2']) == 0
        assert json.loads((folder / name / 'metrics.json').read_text())['OA_vote2'] == expected


@pytest.mark.parametrize('output', [torch.zeros(2, 8, 5), dict(logits=torch.zeros(2, 5)), torch.zeros(6, 5)])
def test_voting_is_for_classifiers(output):
    class Other(nn.Module):
        def data_preprocessor(self, batch, training):
            return batch

        def forward(self, inputs, mode):
            return output
    loader = [dict(inputs={}, data_samples=[Sample(), Sample()])]
    with pytest.raises(TypeError, match=r'logits \(B, K\) of a classifier, Other gives'):
        protocols._pass(Other(), loader)


def test_voting_mistakes(voted, tmp_path, capsys):
    folder, _ = voted
    config, checkpoint = str(folder / 'c.py'), str(folder / 'run/epoch_1.pth')
    for argv, text in ((['--vote', '0'], 'times must be at least 1'),
                       (['--vote', '2', '--cfg-options', 'train_dataloader=None'], 'neither a vote_pipeline')):
        capsys.readouterr()
        assert cli.main(['test', config, checkpoint, '--work-dir', str(tmp_path), *argv]) == 2
        assert text in capsys.readouterr().err
    with pytest.raises(ValueError, match='needs the pipeline'):
        protocols.VotingHook()
    with pytest.raises(ValueError, match='seed must be at least 0'):
        protocols.VotingHook(pipeline=AUGMENTED, seed=-1)
    cfg = shapes_config(default_hooks=dict(vote=dict(type='VotingHook', pipeline=[dict(type='Pakc')])))
    with pytest.raises(KeyError, match=r"default_hooks\.vote\.pipeline\[0\].*'Pack'"):
        check_config(cfg)


def test_loaders_that_voting_refuses(tmp_path):
    runner = Runner.from_cfg(shapes_config(tmp_path))
    model = runner.model.eval()
    shuffled = torch.utils.data.DataLoader(runner.train_dataloader.dataset, batch_size=13, shuffle=True,
                                           collate_fn=runner.train_dataloader.collate_fn)
    with pytest.raises(ValueError, match='in one order'):
        vote(model, shuffled, 2)
    plain = torch.utils.data.DataLoader([runner.train_dataloader.dataset[i] for i in range(4)], batch_size=4,
                                        collate_fn=runner.train_dataloader.collate_fn)
    with pytest.raises(TypeError, match='list has no set_epoch'):
        vote(model, plain, 2)
