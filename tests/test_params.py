"""Parameter groups: no decay by name and layer, experts' learning rate, the mmengine constructor."""
import pytest
import torch
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.optim.scheduler import CosineAnnealingLR, LinearLR
from torch import nn

from ewa3d.engine.params import ParamGroups, param_groups
from ewa3d.layers.block import Mlp
from ewa3d.reparam import expand


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, 8))
        self.tokenizer = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False))
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            norm1=nn.LayerNorm(8), mlp=nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8))))
            for _ in range(2))
        self.gamma = nn.Parameter(torch.ones(8))


EXPECTED_DECAY = {'cls_pos', 'tokenizer.0.weight', 'tokenizer.2.weight', 'blocks.0.mlp.0.weight',
                  'blocks.0.mlp.2.weight', 'blocks.1.mlp.0.weight', 'blocks.1.mlp.2.weight'}


def _names(model, groups) -> dict[str, list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {group['name']: [names[id(p)] for p in group['params']] for group in groups}


def test_plain_model():
    model = Model()
    groups = param_groups(model, 1e-3, 0.05)
    names = _names(model, groups)
    assert list(names) == ['decay', 'no_decay']
    assert set(names['decay']) == EXPECTED_DECAY
    assert set(names['no_decay']) == {name for name, _ in model.named_parameters()} - EXPECTED_DECAY
    assert [(g['lr'], g['weight_decay']) for g in groups] == [(1e-3, 0.05), (1e-3, 0.)]
    order = [name for name, _ in model.named_parameters()]
    assert all(part == sorted(part, key=order.index) for part in names.values())


def test_experts_follow_the_plain_rules():
    """Stacked biases and norms are two-dimensional and are not decayed all the same, also where no name says norm."""
    model = Model()
    expand(model, dict(type='EWAFFN', at='blocks.*.mlp', every=2))
    groups = param_groups(model, 1e-3, 0.05, expert_lr_mult=2.)
    names = _names(model, groups)
    assert set(names['decay']) | set(names['experts.decay']) == EXPECTED_DECAY
    assert set(names['experts.decay']) == {'blocks.1.mlp.0.weight', 'blocks.1.mlp.2.weight'}
    assert names['experts.no_decay'] == [f'blocks.1.mlp.{key}' for key in ('0.bias', '1.weight', '1.bias', '2.bias')]
    assert {g['name']: (g['lr'], g['weight_decay']) for g in groups} == {
        'decay': (1e-3, 0.05), 'no_decay': (1e-3, 0.), 'experts.decay': (2e-3, 0.05), 'experts.no_decay': (2e-3, 0.)}
    total = [p for g in groups for p in g['params']]
    assert len(total) == len({id(p) for p in total}) == len(list(model.parameters()))


def test_names_are_whole_words():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ('tokenizer', 'mask_token', 'token2', 'bias_table', 'relative_position_bias_table', 'normal',
                         'my_norm', 'biased', 'abnorm'):
                self.register_parameter(name, nn.Parameter(torch.zeros(2, 2)))

    names = _names(model := Odd(), param_groups(model, 1e-3, 0.05))
    assert set(names['decay']) == {'tokenizer', 'normal', 'biased', 'abnorm'}


def test_own_names():
    model = Model()
    groups = param_groups(model, 1., 1., no_decay=['cls_pos', 'token', 'blocks.1', 'tokenizer.*.weight'])
    assert set(_names(model, groups)['decay']) == {'blocks.0.mlp.0.weight', 'blocks.0.mlp.2.weight'}
    assert 'cls_token' in _names(model, param_groups(model, 1., 1., no_decay=[]))['decay']
    with pytest.raises(ValueError, match=r"no_decay name 'cls_tokn' matches no parameter; did you mean 'cls_token'"):
        param_groups(model, 1., 1., no_decay=['cls_tokn'])
    with pytest.raises(TypeError, match='list of names'):
        param_groups(model, 1., 1., no_decay='bias')


def test_frozen_and_tied_parameters():
    model = Model()
    model.blocks[0].requires_grad_(False)
    model.blocks[1]['mlp'][2].weight = nn.Parameter(torch.zeros(8, 12))
    model.again = model.blocks[1]['mlp'][2]
    names = _names(model, param_groups(model, 1., 1.))
    assert not [n for part in names.values() for n in part if n.startswith('blocks.0')]
    assert sum(n.endswith('mlp.2.weight') or n.startswith('again') for n in names['decay']) == 1
    torch.optim.AdamW(param_groups(model, 1e-3, 0.05))
    with pytest.raises(ValueError, match='no parameter that requires'):
        param_groups(model.requires_grad_(False), 1., 1.)


@pytest.mark.parametrize(('mult', 'error'), [(0, ValueError), (-1., ValueError), (float('nan'), ValueError),
                                             (float('inf'), ValueError), ('2', TypeError), (True, TypeError),
                                             (None, TypeError)])
def test_wrong_multiplier(mult, error):
    with pytest.raises(error, match='expert_lr_mult must'):
        param_groups(Model(), 1., 1., expert_lr_mult=mult)


def test_defaults_of_the_optimizer():
    model = Model()
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.5)
    assert [(g['lr'], g['weight_decay']) for g in optimizer.param_groups] == [(0.5, 0.01), (0.5, 0.)]
    expand(model, dict(type='EWAFFN', at='blocks.*.mlp'))
    with pytest.raises(ValueError, match='needs a learning rate'):
        param_groups(model, expert_lr_mult=2.)


def _wrapper(model, **kwargs) -> OptimWrapper:
    cfg = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
               clip_grad=dict(max_norm=10))
    return ParamGroups(cfg, kwargs)(model)


def test_constructor_builds_the_wrapper():
    model = Model()
    expand(model, dict(type='EWAFFN', at='blocks.*.mlp'))
    wrapper = _wrapper(nn.parallel.DataParallel(model), no_decay=['cls_pos', 'bias'], expert_lr_mult=2.)
    assert isinstance(wrapper, OptimWrapper)
    assert isinstance(wrapper.optimizer, torch.optim.AdamW)
    assert [g['lr'] for g in wrapper.optimizer.param_groups] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert wrapper.clip_grad_kwargs == dict(max_norm=10)


def test_constructor_by_name():
    from mmengine.registry import DefaultScope
    with DefaultScope.overwrite_default_scope('ewa3d'):
        wrapper = build_optim_wrapper(Model(), dict(optimizer=dict(type='SGD', lr=0.1), constructor='ParamGroups'))
    assert [g['name'] for g in wrapper.optimizer.param_groups] == ['decay', 'no_decay']


def test_constructor_errors():
    with pytest.raises(TypeError, match="did you mean 'expert_lr_mult'"):
        _wrapper(Model(), expert_lr_mul=2.)
    with pytest.raises(TypeError, match='optimizer'):
        ParamGroups(dict(type='OptimWrapper'))
    with pytest.raises(ValueError, match='expert_lr_mult'):
        _wrapper(Model(), expert_lr_mult=0)


def test_schedulers_keep_the_multiplier():
    model = Model()
    expand(model, dict(type='EWAFFN', at='blocks.*.mlp'))
    wrapper = _wrapper(model, expert_lr_mult=2.)
    schedulers = [LinearLR(wrapper, start_factor=0.1, by_epoch=False, end=3),
                  CosineAnnealingLR(wrapper, T_max=7, by_epoch=False, begin=3, end=10)]
    for _ in range(9):
        wrapper.optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        rates = [g['lr'] for g in wrapper.param_groups]
        assert rates[2] == pytest.approx(2 * rates[0])
        assert rates[3] == pytest.approx(2 * rates[1])


def test_biases_of_experts_really_do_not_decay():
    model = Model()
    expand(model, dict(type='EWAFFN', at='blocks.*.mlp'))
    layer = model.get_submodule('blocks.0.mlp.0')
    nn.init.ones_(layer.bias)
    optimizer = torch.optim.AdamW(param_groups(model, 0.1, 0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = layer.weight.clone()
    optimizer.step()
    assert (layer.bias == 1).all()
    assert torch.allclose(layer.weight, before * 0.95)


def test_ours_mlp_norm_slot():
    model = nn.ModuleDict(dict(mlp=Mlp(4, 8, norm_layer=nn.LayerNorm)))
    expand(model, dict(type='EWAFFN', at='mlp'))
    names = _names(model, param_groups(model, 1., 1.))
    assert names == {'experts.decay': ['mlp.fc1.weight', 'mlp.fc2.weight'],
                     'experts.no_decay': ['mlp.fc1.bias', 'mlp.norm.weight', 'mlp.norm.bias', 'mlp.fc2.bias']}


def test_state_spaces_learn_slowly_and_without_decay():
    model = nn.ModuleDict(dict(blocks=nn.ModuleList(nn.ModuleDict(dict(attn=nn.Linear(4, 4))) for _ in range(2))))
    expand(model, dict(type='S4D', at='blocks.*.attn', d_state=4))
    groups = param_groups(model, 1e-2, 0.05)
    names = _names(model, groups)
    assert list(names) == ['decay', 'no_decay', 'ssm.no_decay']
    assert names['ssm.no_decay'] == [f'blocks.{i}.attn.kernel.{key}' for i in range(2)
                                     for key in ('log_dt', 'log_A_real', 'A_imag')]
    assert 'blocks.0.attn.kernel.C' in names['decay'] and 'blocks.0.attn.D' in names['no_decay']

    def rates(lr, **options):
        return [group['lr'] for group in param_groups(model, lr, 0.05, **options) if 'ssm' in group['name']]

    assert rates(1e-2) == [1e-3] and rates(1e-4) == [1e-4]
    assert rates(1e-2, ssm_lr=5e-3) == [5e-3] and rates(1e-2, ssm_lr=None) == [1e-2]
    assert rates(1e-3, layer_decay=0.5, ssm_lr=1e-2) == [5e-4, 1e-3]  # there is nothing behind the blocks
    with pytest.raises(ValueError, match='smaller one of lr and ssm_lr: give lr'):
        param_groups(model)
    assert 'lr' not in param_groups(model, ssm_lr=None)[0]
    with pytest.raises(ValueError, match='ssm_lr must lie in'):
        param_groups(model, 1., ssm_lr=0)
