"""Every ordered pair of rules on one block, and many triples: refused when put together, or exact after fuse."""
import itertools
import random

import pytest
import torch
from torch import nn
from toys import scramble

from ewa3d import expand, fuse
from ewa3d.layers.block import Block
from ewa3d.layers.channels import TokenBatchNorm
from ewa3d.layers.moe import RoutedFFN, to_dense
from ewa3d.layers.repa import FoldedBlock, FoldedFFN

EXPERTS = {
    'EWA': dict(type='EWAFFN', at='0.mlp', num_experts=2, init_noise_std=0.2),
    'MoE': dict(type='MoEFFN', at='0.mlp', num_experts=3, top_k=2),
    'RMoE': dict(type='ResidualMoEFFN', at='0.mlp', num_experts=2),
    'fusion': dict(type='FusionFFN', at='0.mlp', num_experts=2),
}
RULES = {
    **EXPERTS,
    'RePa': dict(type='RePaFFN', at='0.mlp', idle_ratio=0.5),
    'RePa block': dict(type='RePaFFN', at='0', idle_ratio=0.5),
    'adapter qkv': dict(type='LinearAdapter', at='0.attn.qkv', rank=2),
    'adapter proj': dict(type='LinearAdapter', at='0.attn.proj', position='after', rank=2),
    'adapter fc1': dict(type='LinearAdapter', at='0.mlp.fc1', rank=2),
    'adapter fc2': dict(type='LinearAdapter', at='0.mlp.fc2', position='after', rank=2),
    'STDHA': dict(type='STDHA', at='0.attn', offsets=[-1, 1], num_frames=2),
    'S4D': dict(type='S4D', at='0.attn', d_state=2, length=3),
    'S4': dict(type='S4', at='0.attn', d_state=2, length=3),
}
FREELY = [('RePa', 'EWA'), ('RePa block', 'EWA'), ('RePa', 'MoE'), ('RePa', 'RMoE'), ('EWA', 'adapter fc1'),
          ('adapter fc2', 'EWA'), ('S4D', 'EWA'), ('STDHA', 'adapter qkv'), ('adapter proj', 'STDHA')]


def check(names: tuple[str, ...]) -> bool:
    """Whether the rules go together; where they do, training runs and fusing is exact."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(8, 2, 2., qkv_bias=True)).double(), torch.randn(4, 3, 8, dtype=torch.float64)
    try:
        expand(model, [RULES[name] for name in names])
    except (TypeError, ValueError):
        return False
    model.train()(x).square().mean().backward()
    scramble(model, 0.3)
    for module in model.modules():
        if isinstance(module, TokenBatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.eval()
    if any(isinstance(module, RoutedFFN) for module in model.modules()):
        before = model(x)
        fuse(model)
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12, msg=f'{names}, fused')
        to_dense(model, 'mean')
    before = model(x)
    fuse(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12, msg=f'{names}')
    return True


@pytest.mark.parametrize('first', RULES)
def test_pairs(first):
    fitting = {(first, second) for second in RULES if second != first and check((first, second))}
    assert {pair for pair in FREELY if pair[0] == first} <= fitting


def test_triples():
    """All with a channel-idle FFN inside experts and an adapter, and a sample of the others."""
    known = [(form, experts, adapter) for form in ('RePa', 'RePa block') for experts in EXPERTS
             for adapter in ('adapter fc1', 'adapter fc2')]
    others = random.Random(0).sample([*itertools.permutations(RULES, 3)], 40)
    fitting = {names for names in [*known, *others] if check(names)}
    assert {names for names in known if names[0] == 'RePa' and names[1] in ('EWA', 'fusion')} <= fitting
    assert not {('RePa block', 'EWA', adapter) for adapter in ('adapter fc1', 'adapter fc2')} & fitting


@pytest.mark.parametrize('experts', ['EWAFFN', 'FusionFFN'])
@pytest.mark.parametrize(('target', 'position'), [('fc1', 'before'), ('fc2', 'after')])
def test_an_adapter_of_a_channel_idle_ffn_inside_experts_is_folded_too(experts, target, position):
    model, x = nn.Sequential(Block(8, 2)).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    expand(model, [dict(type='RePaFFN', at='0.mlp'), dict(type=experts, at='0.mlp'),
                   dict(type='LinearAdapter', at=f'0.mlp.{target}', position=position, rank=2)])
    scramble(model, 0.3)
    before = model.eval()(x)
    fuse(model)
    assert isinstance(model[0].mlp, FoldedFFN)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_the_whole_block_with_an_adapter_in_summed_experts():
    model, x = nn.Sequential(Block(8, 2)).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    expand(model, [dict(type='RePaFFN', at='0'), dict(type='FusionFFN', at='0.mlp'),
                   dict(type='LinearAdapter', at='0.mlp.fc1', rank=2)])
    model.train()(x)
    scramble(model, 0.3)
    before = model.eval()(x)
    fuse(model)
    assert isinstance(model[0], FoldedBlock)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_adapters_are_refused_where_experts_share_a_batch_norm():
    model = nn.Sequential(Block(8, 2))
    with pytest.raises(ValueError, match=r"'0\.mlp\.fc1': experts that share a batch norm"):
        expand(model, [dict(type='RePaFFN', at='0'), dict(type='EWAFFN', at='0.mlp'),
                       dict(type='LinearAdapter', at='0.mlp.fc1')])
