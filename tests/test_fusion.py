"""ExFusion: weights are summed before the one forward, and after training for good."""
import pytest
import torch
from torch import nn
from torch.func import functional_call
from toys import FFNS, make_ffn, scramble, train_steps

from ewa3d import attach_ewa, expand, fuse
from ewa3d.layers.block import Mlp
from ewa3d.layers.fusion import FusionFFN


@pytest.mark.parametrize('name', [name for name in FFNS if name not in ('batch norm', 'hand-written')])
def test_against_a_sum_of_weights(name):
    plain = make_ffn(name)
    module = FusionFFN.expand(plain, num_experts=3)
    scramble(module)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    logits = parameters['fusion.logits']
    shares = [logits[i].exp() / logits.exp().sum() for i in range(3)]
    fused = {key: sum(share * parameters[key][i] for i, share in enumerate(shares)) for key in plain.state_dict()}
    outputs = [module(x), functional_call(plain, fused, x)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
    weight = torch.randn_like(outputs[0])
    ours, naive = (torch.autograd.grad((y * weight).sum(), list(parameters.values())) for y in outputs)
    for one, other in zip(ours, naive):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_experts_start_apart_around_the_plain_ffn():
    plain = make_ffn('ours')
    module = FusionFFN.expand(plain, num_experts=3, init_noise_std=0.1)
    torch.testing.assert_close(module.fc1.weight.mean(0), plain.fc1.weight, rtol=0, atol=1e-14)
    before = module.fc1.weight.detach().clone()
    train_steps(module, torch.randn(7, 12, dtype=torch.float64))
    assert float((module.fc1.weight - before).abs().max()) > 0
    assert float(module.fusion.logits.detach().abs().max()) > 0  # the shares learn
    alike = FusionFFN.expand(plain, init_noise_std=0.)
    torch.testing.assert_close(alike.fc1.weight, plain.fc1.weight.expand(4, -1, -1))


def test_buffers_are_shared_and_updated():
    module = FusionFFN.expand(make_ffn('batch norm')).train()
    assert module.norm.running_mean.shape == (20,)
    module(torch.randn(2, 5, 12, dtype=torch.float64))
    assert int(module.norm.num_batches_tracked) == 1 and bool((module.norm.running_mean != 0).any())


def test_fuses_after_training_and_with_averaging():
    model = nn.Sequential(Mlp(12, 20), Mlp(12, 20)).double()
    expand(model, dict(type='FusionFFN', at='*', every=2))
    x = torch.randn(7, 12, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with attach_ewa(optimizer, model, 0.3, 'constant'):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    before = model.eval()(x)
    assert [row.status for row in fuse(model)] == ['fused']
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert [type(layer) for layer in model] == [Mlp, Mlp]


def test_channel_idle_experts_are_summed_and_folded():
    model = nn.Sequential(Mlp(12, 20)).double()
    expand(model, [dict(type='RePaFFN', at='0', norm='batch'), dict(type='FusionFFN', at='0')])
    x = torch.randn(7, 12, dtype=torch.float64)
    train_steps(model, x)
    before = model.eval()(x)
    assert [row.after for row in fuse(model)] == ['FoldedFFN']
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_bad_values():
    with pytest.raises(ValueError, match='num_experts must be at least 2'):
        FusionFFN.expand(Mlp(12, 20), num_experts=1)
    with pytest.raises(ValueError, match='init_noise_std'):
        FusionFFN.expand(Mlp(12, 20), init_noise_std=-1)
    with pytest.raises(ValueError, match='has no parameters'):
        FusionFFN.expand(nn.Identity())
