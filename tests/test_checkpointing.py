"""Activation checkpointing changes nothing but memory: the same losses, gradients, buffers and random numbers."""
import copy

import pytest
import torch
from engine_toys import on_cpu, same, toy_config  # noqa: F401 (on_cpu is a fixture)
from torch import nn

from ewa3d import expand
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.engine.runner import Runner
from ewa3d.layers.checkpointing import checkpoint_modules, checkpointed
from ewa3d.layers.moe import routing_losses
from ewa3d.registry import MODELS

RULES = {
    'plain': [],
    'EWA': [dict(type='EWAFFN', at='blocks.*.mlp', num_experts=3)],
    'EWA, partition of a sample': [dict(type='EWAFFN', at='blocks.*.mlp', num_experts=3, partition='sample')],
    'RePaViT': [dict(type='RePaFFN', at='blocks.*')],
    'MoE': [dict(type='MoEFFN', at='blocks.*.mlp', num_experts=3)],
}


def encoder(rules: list[dict], **options) -> nn.Module:
    torch.manual_seed(0)
    tokenizer = dict(type='PointPatchEmbed', num_groups=7, group_size=4, widths=(4, 8, 8))
    model = MODELS.build(dict(type='TokenEncoder', tokenizer=tokenizer, embed_dim=12, depth=3, num_heads=2,
                              drop_path_rate=0.4, proj_drop=0.2, attn_drop=0.1, **options))
    if rules:
        expand(model, rules)
    return model


def steps(model: nn.Module, count: int = 2) -> dict:
    """Losses, gradients, buffers and the generator's state after some training steps."""
    points, found = torch.randn(5, 30, 3, generator=torch.Generator().manual_seed(1)), {}
    torch.manual_seed(2)
    for i in range(count):
        loss = model(dict(points=points)).square().mean()
        for name, value in routing_losses(model).items():
            found[f'{i} {name}'] = value.detach()
            loss = loss + value
        loss.backward()
        found[f'{i} loss'] = loss.detach()
    found.update({f'grad {name}': p.grad for name, p in model.named_parameters()})
    found.update({f'buffer {name}': b for name, b in model.named_buffers()})
    return {**found, 'rng': torch.get_rng_state()}


@pytest.mark.parametrize('rules', RULES.values(), ids=list(RULES))
def test_the_same_bit_for_bit(rules):
    plain, ours = (steps(encoder(rules, grad_checkpointing=on)) for on in (False, True))
    assert set(plain) == set(ours)
    for name, value in plain.items():
        assert value is ours[name] is None or torch.equal(value, ours[name]), name


def test_the_same_in_low_precision():
    found = []
    for on in (False, True):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            found.append(steps(encoder(RULES['EWA'], grad_checkpointing=on), 1))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_activations_inside_blocks_are_not_kept():
    kept = []
    for on in (False, True):
        model, count = encoder(RULES['EWA'], grad_checkpointing=on), 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(dict(points=torch.randn(5, 30, 3)))
        kept.append(count)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize('mode', ['eval', 'no_grad'])
def test_outside_of_training_nothing_changes(mode, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('checkpointed')
    monkeypatch.setattr('ewa3d.layers.checkpointing.checkpoint', refuse)
    points = torch.randn(2, 30, 3)
    plain, ours = (encoder([], grad_checkpointing=on).train(mode != 'eval') for on in (False, True))
    outputs = []
    for model in (plain, ours):
        torch.manual_seed(3)
        with torch.set_grad_enabled(mode == 'eval'):
            outputs.append(model(dict(points=points)))
    assert torch.equal(*outputs)


def test_blocks_that_are_asked_for():
    outputs = []
    for on in (False, True):
        model = encoder([], grad_checkpointing=on)
        torch.manual_seed(3)
        outputs.append(model(dict(points=torch.randn(2, 30, 3)), out_indices=(0, 1)))
    assert all(torch.equal(a, b) for a, b in zip(*outputs)) and len(outputs[0]) == 2


def test_keywords_and_several_outputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.seen = 0

        def forward(self, x, shift=0):
            self.seen += 1
            return self.norm(x) + shift, x * shift

    grads = []
    for call in (lambda m, *a, **k: m(*a, **k), checkpointed):
        module, x = Pair().double(), torch.arange(12., dtype=torch.float64).view(4, 3).sin().requires_grad_()
        one, other = call(module, x, shift=2)
        (one.square() + other).pow(2).sum().backward()
        assert module.seen == 1 and module.norm.num_batches_tracked == 1
        grads.append((x.grad, module.norm.weight.grad, module.norm.running_mean))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_norms_of_modalities_are_refused():
    points = dict(type='PointPatchEmbed', num_groups=7, group_size=4, widths=(4, 8, 8))
    with pytest.raises(ValueError, match='grad_checkpointing does not go with modality_norms'):
        MODELS.build(dict(type='TokenEncoder', tokenizer=dict(points=points), embed_dim=12, depth=1, num_heads=2,
                          modality_norms=True, grad_checkpointing=True))


@pytest.mark.parametrize('rules', RULES.values(), ids=list(RULES))
@pytest.mark.parametrize('names', ['blocks.*', ['blocks.0', 'blocks.*.mlp']])
def test_modules_by_name_are_the_same_bit_for_bit(rules, names):
    plain, ours = encoder(rules), encoder(rules)
    checkpoint_modules(ours, names)
    assert same(steps(plain), steps(ours))


def test_a_copy_has_weights_of_its_own():
    model = encoder([])
    checkpoint_modules(model, 'blocks.*')
    twin = copy.deepcopy(model)
    nn.init.zeros_(model.blocks[0].mlp.fc2.weight)
    assert twin.blocks[0].forward.__self__ is twin.blocks[0]
    torch.manual_seed(1)
    x = torch.randn(2, 4, 12)
    expected = encoder([]).eval().encode(x, x)
    assert torch.equal(twin.eval().encode(x, x), expected) and not torch.equal(model.eval().encode(x, x), expected)


def test_names_that_cannot_be_checkpointed():
    with pytest.raises(ValueError, match=r"'block\.\*' names no module of TokenEncoder; did you mean 'blocks"):
        checkpoint_modules(encoder([]), ['block.*'])
    points = dict(type='PointPatchEmbed', num_groups=7, group_size=4, widths=(4, 8, 8))
    model = MODELS.build(dict(type='TokenEncoder', tokenizer=dict(points=points), embed_dim=12, depth=1, num_heads=2,
                              modality_norms=True))
    with pytest.raises(ValueError, match=r"'blocks\.0' has norms of several modalities"):
        checkpoint_modules(model, 'blocks.*')


def test_by_config_a_run_is_the_same(tmp_path):
    """Losses, weights and those that the EMA keeps and evaluates, with the partition of EWA."""
    found = []
    for names in (None, ['backbone.blocks.*']):
        cfg = toy_config(tmp_path / str(names is None), ewa=True, ema=True, epochs=1, activation_checkpointing=names)
        runner = Runner.from_cfg(cfg)
        runner.train()
        content = read_checkpoint(tmp_path / str(names is None) / 'epoch_1.pth')
        assert content['meta']['cfg'].get('activation_checkpointing') == names
        assert ('forward' in vars(runner.model.backbone.blocks[1])) is (names is not None)
        found.append([content['state_dict'], content['ema_state_dict'], content['optimizer'], runner.last_metrics])
    assert same(*found)
    with pytest.raises(TypeError, match='activation_checkpointing is True; a list or a str was expected'):
        Runner.from_cfg(toy_config(tmp_path, activation_checkpointing=True))
