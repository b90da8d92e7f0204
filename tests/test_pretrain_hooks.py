"""Pictures during pretraining: written when due, the same clouds and masks each time, without a trace in the run."""
import pytest
import torch
from engine_toys import on_cpu, same  # noqa: F401
from test_masked import config, pretrain_config

from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.engine.pretrain_hooks import ReconstructionHook
from ewa3d.engine.runner import Runner


def run(work_dir, hook=None, **options):
    cfg = pretrain_config(work_dir, **options)
    cfg['default_hooks'] = dict(cfg['default_hooks'], pictures=hook)
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def test_pictures_when_due_and_a_run_like_the_one_without(tmp_path):
    run(tmp_path / 'a', dict(type='ReconstructionHook', interval=2, num_clouds=2), epochs=3)
    run(tmp_path / 'b', epochs=3)
    pictures = sorted(path.name for path in (tmp_path / 'a' / 'pictures').iterdir())
    assert pictures == ['epoch_2.png', 'epoch_3.png']
    assert not (tmp_path / 'b' / 'pictures').exists()
    one, other = (read_checkpoint(tmp_path / name / 'epoch_3.pth') for name in 'ab')
    assert same(one['state_dict'], other['state_dict']) and same(one['rng'], other['rng'])


def test_validation_clouds_under_the_same_masks(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr('ewa3d.visualization.draw_reconstructions',
                        lambda clouds, made, path, **options: drawn.append((clouds, made, options)))
    loader = pretrain_config(tmp_path)['train_dataloader']
    loader = dict(loader, drop_last=False, sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
                  dataset=dict(loader['dataset'], split='test', num_samples=6))
    runner = run(tmp_path, dict(type='ReconstructionHook', interval=1, num_clouds=3), epochs=2, val_dataloader=loader,
                 val_cfg=dict(), val_evaluator=dict(type='ReconstructionError'))
    assert {'CD-L1', 'CD-L2'} <= set(runner.last_metrics)
    (clouds, made, options), (again, other, _) = drawn
    assert len(clouds) == 3 and all(map(torch.equal, clouds, again))
    dataset = runner.val_dataloader.dataset
    assert torch.equal(clouds[1], dataset[2]['inputs']['points'])
    assert options['titles'][1] == dataset[2]['data_samples'].name and options['heading'] == 'epoch 1'
    assert not torch.equal(made[0], other[0])  # the model has learnt something
    hook = ReconstructionHook(num_clouds=3)
    for _ in range(2):
        hook.draw(runner, tmp_path / 'x.png')
    (_, first, options), (_, second, others) = drawn[2:]
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, options['visible'], others['visible']))


def test_models_with_another_kind_of_reconstruction(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr('ewa3d.visualization.draw_reconstructions',
                        lambda clouds, made, path, visible=None, **options: drawn.append((made, visible)))
    predict = ReconstructionHook()
    model = config()
    runner = Runner.from_cfg(pretrain_config(tmp_path, model=model))

    def without(*names):
        def forward(inputs, data_samples=None, mode='predict'):
            for sample in data_samples:
                for name in names:
                    sample.set_field(torch.ones(4, 3), name)
            return data_samples
        return forward

    monkeypatch.setattr(runner.model, 'forward', without('pred_points'))
    predict.draw(runner, tmp_path / 'x.png')
    assert drawn[0][0][0].shape == (4, 3) and drawn[0][1] is None
    monkeypatch.setattr(runner.model, 'forward', without('pred_tokens'))
    with pytest.raises(ValueError, match=r"MaskedAutoencoder predicts no pred_points, but \[.*'pred_tokens'"):
        predict.draw(runner, tmp_path / 'x.png')
    assert runner.model.training


@pytest.mark.parametrize('options, message', [(dict(interval=0), 'interval must be at least 1, got 0'),
                                              (dict(num_clouds=0), 'num_clouds must be at least 1'),
                                              (dict(seed=-1), 'seed must be at least 0')])
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionHook(**options)
