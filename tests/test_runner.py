"""The Runner: checked configs, what follows from the data, the work dir, how a result is chosen."""
import copy
import json

import pytest
import torch
from engine_toys import CLASSES, on_cpu, same, toy_config  # noqa: F401
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch.utils.data import DataLoader

from ewa3d.engine.checkpoint import read_checkpoint, write_checkpoint
from ewa3d.engine.derive import fill_num_classes, selection
from ewa3d.engine.runner import Runner
from ewa3d.engine.validate import check_config
from ewa3d.evaluation import Accuracy
from ewa3d.registry import METRICS


def changed(path: str, value, **options) -> dict:
    """The toy config with ``value`` at a dotted path."""
    cfg = toy_config('unused', ewa=True, **options)
    node = cfg
    *parents, last = path.split('.')
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value
    return cfg


@pytest.mark.parametrize(('path', 'value', 'texts'), [
    ('train_dataloder', {}, ['train_dataloder', "did you mean 'train_dataloader'"]),
    ('model.type', 'TaskModle', ['model: ', "'TaskModel'"]),
    ('model.backbone.type', 'TokenEncodr', ['model.backbone: ', "'TokenEncoder'"]),
    ('model.backbone.dept', 3, ['model.backbone: TokenEncoder', "'dept'", "'depth'"]),
    ('model.backbone.tokenizer.num_group', 3, ['model.backbone.tokenizer: ', "'num_groups'"]),
    ('model.expand.0.type', 'EWAFNN', ['model.expand[0]', "'EWAFFN'"]),
    ('train_dataloader.batchsize', 3, ['train_dataloader', "'batch_size'"]),
    ('train_dataloader.dataset.type', 'ToyCloud', ['train_dataloader.dataset', "'ToyClouds'"]),
    ('test_dataloader.dataset.num_point', 3, ['test_dataloader.dataset', "'num_points'"]),
    ('train_dataloader.sampler.type', 'DefaultSampeler', ['train_dataloader.sampler', "'DefaultSampler'"]),
    ('optim_wrapper.optimizer.type', 'AdmW', ['optim_wrapper.optimizer', "'AdamW'"]),
    ('optim_wrapper.optimizer.weight_deca', 1, ['optim_wrapper.optimizer', "'weight_decay'"]),
    ('optim_wrapper.clip_gard', {}, ['optim_wrapper', "'clip_grad'"]),
    ('optim_wrapper.constructor', 'ParamGroup', ['optim_wrapper.constructor', "'ParamGroups'"]),
    ('param_scheduler.warm', 1, ['param_scheduler', "'warmup'"]),
    ('train_cfg.max_epoch', 1, ['train_cfg', "'max_epochs'"]),
    ('val_cfg.fp61', 1, ['val_cfg', 'fp16']),
    ('val_evaluator.type', 'Acuracy', ['val_evaluator', "'Accuracy'"]),
    ('default_hooks.ewa.share_rat', 1, ['default_hooks.ewa', "'share_rate'"]),
    ('default_hooks.checkpoint.max_keep_ckpt', 1, ['default_hooks.checkpoint', "'max_keep_ckpts'"]),
    ('custom_hooks', [dict(type='EAMHook')], ['custom_hooks[0]', "'EMAHook'"]),
    ('train_dataloader.dataset', dict(type='SyntheticShapes', pipeline=3), ['train_dataloader.dataset.pipeline is 3']),
    ('train_dataloader.dataset', dict(type='SyntheticShapes', pipeline=['Pack']), ["dataset.pipeline[0] is 'Pack'"]),
])
def test_mistakes_are_named_with_their_place(path, value, texts):
    with pytest.raises((KeyError, TypeError)) as error:
        check_config(changed(path, value))
    for text in texts:
        assert text in str(error.value)


def test_a_good_config_passes_and_helper_names_are_free():
    check_config(toy_config('x', ewa=True, ema=True, ewa_hook=dict(a=1), data_root='/x', train_pipeline=[]))


@pytest.mark.parametrize('key', ['model', 'train_dataloader', 'optim_wrapper'])
def test_a_missing_part_is_named(key):
    cfg = toy_config('x')
    del cfg[key]
    with pytest.raises(KeyError, match=f'no {key!r}'):
        check_config(cfg)


def test_num_classes_follow_the_data(tmp_path):
    cfg = toy_config(tmp_path)
    runner = Runner.from_cfg(cfg)
    assert runner.model.head.num_classes == 3 and runner.cfg.model.head.num_classes == 3
    assert 'num_classes' not in cfg['model']['head']  # the caller's config is left alone
    wrapped = toy_config(tmp_path)
    wrapped['train_dataloader']['dataset'] = dict(type='RepeatDataset', times=2, dataset=dict(type='ToyClouds',
                                                                                              classes=['a', 'b']))
    fill_num_classes(wrapped)
    assert wrapped['model']['head']['num_classes'] == 2
    with pytest.raises(ValueError, match='3 classes'):
        fill_num_classes(changed('model.head.num_classes', 2))
    more = changed('model.head.num_classes', 5)
    fill_num_classes(more)
    assert more['model']['head']['num_classes'] == 5


def test_work_dir(tmp_path):
    Runner.from_cfg(toy_config(tmp_path, ewa=True, epochs=1)).train()
    assert {p.name for p in tmp_path.iterdir()} == {'config.py', 'environment.json', 'epoch_1.pth', 'last_checkpoint',
                                                    'metrics.jsonl', 'train.log', 'confusion.json', 'report.html'}
    environment = json.loads((tmp_path / 'environment.json').read_text())
    assert environment['seed'] == 0 and environment['versions']['torch']
    meta = read_checkpoint(tmp_path / 'epoch_1.pth')['meta']
    assert meta['cfg']['model']['head']['num_classes'] == 3 and meta['seed'] == 0
    assert meta['dataset_meta'] == dict(classes=list(CLASSES)) and (meta['epoch'], meta['iter']) == (1, 6)
    json.dumps(meta)
    torch.load(tmp_path / 'epoch_1.pth', weights_only=True)


def test_the_dumped_config_trains_the_same_again(tmp_path):
    Runner.from_cfg(toy_config(tmp_path / 'a', ewa=True, epochs=1)).train()
    again = Config.fromfile(tmp_path / 'a' / 'config.py')
    assert 'resume' not in again and 'launcher' not in again
    again.work_dir = str(tmp_path / 'b')
    torch.manual_seed(99)
    Runner.from_cfg(again).train()
    a, b = (read_checkpoint(tmp_path / name / 'epoch_1.pth') for name in 'ab')
    assert same(a['state_dict'], b['state_dict']) and same(a['optimizer'], b['optimizer'])


def test_another_seed_is_another_run(tmp_path):
    for name, seed in (('a', 0), ('b', 1)):
        Runner.from_cfg(toy_config(tmp_path / name, epochs=1, randomness=dict(seed=seed))).train()
    a, b = (read_checkpoint(tmp_path / name / 'epoch_1.pth') for name in 'ab')
    assert b['meta']['seed'] == 1 and not same(a['state_dict'], b['state_dict'])


# ---- which epoch is reported -----------------------------------------------------------------------------------------
def with_splits(val, save_best=None) -> dict:
    cfg = toy_config('x')
    if val is None:
        cfg['val_dataloader'] = None
    elif val == 'same as test':
        cfg['val_dataloader'] = copy.deepcopy(cfg['test_dataloader'])
        for loader in ('val_dataloader', 'test_dataloader'):
            del cfg[loader]['dataset']['split']
    else:
        cfg['val_dataloader']['dataset']['split'] = val
    cfg['default_hooks']['checkpoint']['save_best'] = save_best
    return cfg


def test_selection():
    assert selection(with_splits('val', 'OA'))[0] == 'best'
    assert selection(with_splits('val'))[0] == 'last'
    for val in ('test', None, 'same as test'):
        kind, why = selection(with_splits(val))
        assert kind == 'last' and 'last epoch is what is reported' in why
    for val in ('test', 'same as test'):
        with pytest.raises(ValueError, match='test split'):
            selection(with_splits(val, 'OA'))
    with pytest.raises(ValueError, match='needs a val_dataloader'):
        selection(with_splits(None, 'OA'))


def test_the_log_says_what_is_reported(tmp_path):
    cfg = toy_config(tmp_path / 'test', epochs=1)
    cfg['val_dataloader'] = copy.deepcopy(cfg['test_dataloader'])
    Runner.from_cfg(cfg).train()
    log = (tmp_path / 'test' / 'train.log').read_text()
    assert 'only a test split exists' in log and 'reported: last epoch (1): OA' in log

    cfg = toy_config(tmp_path / 'none', epochs=2, val_dataloader=None, val_cfg=None, val_evaluator=None)
    Runner.from_cfg(cfg).train()
    lines = [json.loads(x) for x in (tmp_path / 'none' / 'metrics.jsonl').read_text().splitlines()]
    assert [x['mode'] for x in lines] == ['train', 'train', 'test']  # the last epoch, once

    cfg = toy_config(tmp_path / 'val', epochs=1)
    cfg['default_hooks']['checkpoint']['save_best'] = 'OA'
    Runner.from_cfg(cfg).train()
    assert 'best_OA_epoch_1.pth' in (tmp_path / 'val' / 'train.log').read_text()


@pytest.mark.parametrize(('save_best', 'loop', 'texts'), [
    (['OA', 'mAcc'], {}, ['best_OA_epoch_1.pth, OA ', 'best_mAcc_epoch_1.pth, mAcc ', 'best epoch by OA, mAcc on']),
    ('OA', dict(val_begin=5), ['reported: no best epoch, because none was validated'])])
def test_the_report_of_several_best_scores_or_none(tmp_path, save_best, loop, texts):
    cfg = toy_config(tmp_path, epochs=1)
    cfg['default_hooks']['checkpoint']['save_best'] = save_best
    cfg['train_cfg'].update(loop)
    Runner.from_cfg(cfg).train()
    log = (tmp_path / 'train.log').read_text()
    for text in texts:
        assert text in log


def test_a_metric_of_ones_own_may_have_any_name(tmp_path, monkeypatch):
    class Other(Accuracy):
        def compute_metrics(self, results):
            return dict(F1=float(results.trace()))

    monkeypatch.setitem(METRICS._module_dict, 'Other', Other)
    cfg = toy_config(tmp_path, epochs=1, val_evaluator=dict(type='Other'))
    cfg['default_hooks']['checkpoint'].update(save_best='F1', rule='greater')
    Runner.from_cfg(cfg).train()
    assert (tmp_path / 'best_F1_epoch_1.pth').is_file()
    cfg['default_hooks']['checkpoint']['save_best'] = 'F2'
    with pytest.raises(KeyError, match="save_best='F2' is no metric of the validation; did you mean 'F1'"):
        Runner.from_cfg(cfg).train()


def test_the_log_says_what_was_expanded_and_whether_it_is_averaged(tmp_path):
    for name, hooks in (('with', {}), ('without', dict(ewa=None))):
        cfg = toy_config(tmp_path / name, ewa=True, epochs=1)
        cfg['default_hooks'].update(hooks)
        Runner.from_cfg(cfg).train()
        log = (tmp_path / name / 'train.log').read_text()
        assert log.count('params before') == 1 and 'backbone.blocks.0.mlp' in log
        assert log.count('the run no EWAHook') == (name == 'without')


# ---- loading, data loaders, other modes ------------------------------------------------------------------------------
def test_load_from_takes_weights_only(tmp_path):
    Runner.from_cfg(toy_config(tmp_path / 'a', epochs=1)).train()
    runner = Runner.from_cfg(toy_config(tmp_path / 'b', epochs=1, load_from=str(tmp_path / 'a' / 'epoch_1.pth')))
    runner.load_or_resume()
    assert same(dict(runner.model.state_dict()), read_checkpoint(tmp_path / 'a' / 'epoch_1.pth')['state_dict'])
    runner = Runner.from_cfg(toy_config(tmp_path / 'c', ewa=True, load_from=str(tmp_path / 'a' / 'epoch_1.pth')))
    runner.load_or_resume()  # a plain checkpoint fits the expanded model
    other = toy_config(tmp_path / 'd', load_from=str(tmp_path / 'a' / 'epoch_1.pth'))
    other['model']['head']['num_classes'] = 4
    with pytest.raises(ValueError, match=r'3 in the checkpoint, 4 in the model.* model\.pretrained='):
        Runner.from_cfg(other).load_or_resume()


def test_a_resumed_file_cannot_point_outside(tmp_path):
    """`best_ckpt` and `keep_ckpt_ids` are used to delete files; only names in the work dir are believed."""
    Runner.from_cfg(toy_config(tmp_path / 'a', epochs=1)).train()
    victim = tmp_path / 'victim.pth'
    victim.write_text('precious')
    content = read_checkpoint(tmp_path / 'a' / 'epoch_1.pth')
    content['message_hub'].update(best_ckpt=str(victim), best_score=-1.0, keep_ckpt_ids=['/../../victim'])
    parts = {k: v for k, v in content.items() if k not in ('format_version', 'checksum', 'state_dict', 'meta')}
    evil = write_checkpoint(tmp_path / 'evil.pth', content['state_dict'], content['meta'], **parts)
    with pytest.raises(ValueError, match='invalid literal'):
        Runner.from_cfg(toy_config(tmp_path / 'b', epochs=2, resume=str(evil))).train()
    parts['message_hub']['keep_ckpt_ids'] = [1]
    write_checkpoint(evil, content['state_dict'], content['meta'], **parts)
    cfg = toy_config(tmp_path / 'c', epochs=2, resume=str(evil))
    cfg['default_hooks']['checkpoint'].update(save_best='OA', max_keep_ckpts=1)
    Runner.from_cfg(cfg).train()
    assert victim.read_text() == 'precious'


def test_data_loaders(tmp_path):
    init_default_scope('ewa3d')
    cfg = toy_config(tmp_path)['train_dataloader']
    loader = Runner.build_dataloader(dict(cfg, persistent_workers=True, num_workers=0), seed=3)
    assert isinstance(loader, DataLoader) and Runner.build_dataloader(loader) is loader
    state = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match='drop_last'):
        Runner.build_dataloader(dict(cfg, batch_size=100))
    with pytest.raises(ValueError, match='empty'):
        Runner.build_dataloader(dict(cfg, dataset=dict(type='ToyClouds', num_samples=0)))


@pytest.mark.parametrize('epochs', [0, -1, 1.5, None])
def test_bad_length(tmp_path, epochs):
    cfg = toy_config(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=epochs))
    with pytest.raises(ValueError, match='max_epochs'):
        Runner.from_cfg(cfg).train()


def test_autocast_accumulation_and_a_short_run(tmp_path):
    cfg = toy_config(tmp_path, ewa=True, epochs=1)
    cfg['optim_wrapper'].update(type='AutocastOptimWrapper', accumulative_counts=4, constructor='ParamGroups',
                                paramwise_cfg=dict(expert_lr_mult=2.0))
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert len({group['lr'] for group in runner.optim_wrapper.param_groups}) == 2
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())


def test_compiled_training_is_eager_training(tmp_path):
    """With a back end that only traces, compiling changes nothing; evaluation and checkpoints are as before."""
    Runner.from_cfg(toy_config(tmp_path / 'a', ewa=True, epochs=1)).train()
    Runner.from_cfg(toy_config(tmp_path / 'b', ewa=True, epochs=1, compile=dict(backend='eager'))).train()
    a, b = (read_checkpoint(tmp_path / name / 'epoch_1.pth') for name in 'ab')
    assert a['state_dict'].keys() == b['state_dict'].keys()
    for key, value in a['state_dict'].items():
        torch.testing.assert_close(b['state_dict'][key], value, rtol=1e-4, atol=1e-5)


def test_a_run_counted_in_iterations(tmp_path):
    cfg = toy_config(tmp_path, ewa=True, train_cfg=dict(by_epoch=False, max_iters=7, val_interval=3))
    cfg['train_dataloader']['sampler'] = dict(type='InfiniteSampler', shuffle=True)
    cfg['default_hooks']['checkpoint'].update(by_epoch=False, interval=3)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 7 and sorted(p.name for p in tmp_path.glob('*.pth')) == ['iter_3.pth', 'iter_6.pth',
                                                                                  'iter_7.pth']
    assert 'reported: last iteration (7): OA' in (tmp_path / 'train.log').read_text()
    assert runner.optim_wrapper.param_groups[0]['lr'] < 2e-4  # the schedule spans the iterations
    resumed = Runner.from_cfg({**cfg, 'resume': str(tmp_path / 'iter_6.pth')})
    resumed.train()
    assert same(dict(resumed.model.state_dict()), dict(runner.model.state_dict()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_on_a_gpu(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr('mmengine.runner.runner.get_device', lambda: 'cuda')
    cfg = toy_config(tmp_path, ewa=True, ema=True, epochs=1, workers=1)
    if dtype != 'float32':
        cfg['optim_wrapper'].update(type='AutocastOptimWrapper', dtype=dtype)
    Runner.from_cfg(cfg).train()
    longer = toy_config(tmp_path, ewa=True, ema=True, epochs=2, workers=1, optim_wrapper=cfg['optim_wrapper'])
    runner = Runner.from_cfg({**longer, 'resume': True})
    runner.train()
    assert runner.iter == 12 and next(runner.model.parameters()).is_cuda
    content = read_checkpoint(tmp_path / 'epoch_2.pth')
    assert all(not v.is_cuda for v in content['state_dict'].values()) and 'cuda' in content['rng'][0]
