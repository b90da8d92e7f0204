"""Channel-idle FFNs: folding is exact, by itself, inside EWA, in whole blocks; the published model's numbers."""
import copy
import math

import pytest
import torch
from torch import nn
from toys import make_model, scramble, train_steps

from ewa3d import expand, fuse
from ewa3d.fusing import plain_config
from ewa3d.layers.block import Block, Mlp
from ewa3d.layers.channels import ChannelIdle, TokenBatchNorm
from ewa3d.layers.experts import EWAFFN
from ewa3d.layers.repa import (
    FoldedBlock,
    FoldedFFN,
    RePaBlock,
    RePaFFN,
    active_channels,
    fold,
    idle_ratios,
)
from ewa3d.models.weights import rename

RATIOS = [0, 0.25, 0.5, 0.7, 0.75, 1]


def randomize(model: nn.Module) -> None:
    """Weights, and batch statistics far from (0, 1)."""
    scramble(model)
    for module in model.modules():
        if isinstance(module, TokenBatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)


def make_block(dim: int = 8, **kwargs) -> Block:
    return Block(dim, 2, mlp_ratio=3., **kwargs).double()


@pytest.mark.parametrize('idle_ratio', RATIOS)
@pytest.mark.parametrize('norm', ['none', 'batch'])
def test_folded_ffn_is_exact(idle_ratio, norm):
    ffn = RePaFFN(6, 20, 9, idle_ratio=idle_ratio, norm=norm, dtype=torch.float64).eval()
    randomize(ffn)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    active = math.ceil(20 * (1 - idle_ratio))
    hidden = ffn.fc1(x)  # channel by channel
    hidden = torch.cat([hidden[..., i:i + 1] if i >= active else ffn.act.act(hidden[..., i:i + 1])
                        for i in range(20)], -1)
    if norm == 'batch':
        hidden = (hidden - ffn.norm.running_mean) / (ffn.norm.running_var + ffn.norm.eps).sqrt()
        hidden = hidden * ffn.norm.weight + ffn.norm.bias
    torch.testing.assert_close(ffn(x), ffn.fc2(hidden), rtol=0, atol=1e-12)
    folded = ffn.fuse()
    torch.testing.assert_close(folded(x), ffn(x), rtol=0, atol=1e-12)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert sum(isinstance(m, nn.Linear) for m in folded.modules()) == (1 if active == 0 else 2 if active == 20 else 3)


@pytest.mark.parametrize('idle_ratio', RATIOS)
@pytest.mark.parametrize('init_values', [None, 0.3])
def test_folded_block_is_exact_and_has_no_norm_left(idle_ratio, init_values):
    model = nn.Sequential(make_block(init_values=init_values, drop_path=0.2, proj_drop=0.1))
    expand(model, dict(type='RePaFFN', at='0', idle_ratio=idle_ratio))
    block = model[0]
    assert isinstance(block, RePaBlock) and isinstance(block.norm2, TokenBatchNorm)
    train_steps(model, torch.randn(3, 5, 8, dtype=torch.float64))
    randomize(model)
    model.eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    before = model(x)
    report = fuse(model)
    assert [(row.before, row.after, row.status) for row in report] == [('RePaBlock', 'FoldedBlock', 'fused')]
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    left = {name for name, m in model[0].named_modules() if isinstance(m, (nn.LayerNorm, TokenBatchNorm))}
    assert left == {'norm1'}
    assert not model.training and model[0].mlp.shortcut == (idle_ratio == 0)


def test_parameters_of_the_folded_form():
    plain = Mlp(64, 256)
    folded = RePaFFN.expand(plain, idle_ratio=0.75).eval().fuse()
    weights = lambda m: sum(p.numel() for p in m.parameters() if p.ndim == 2)  # noqa: E731
    assert weights(folded) == round(weights(plain) * (1 - 0.75 + 1 / 8))


@pytest.mark.parametrize('at', ['0', '0.mlp'])
def test_inside_ewa_average_first_and_fold_after(at):
    model = nn.Sequential(make_block())
    expand(model, [dict(type='RePaFFN', at=at), dict(type='EWAFFN', at='0.mlp', num_experts=3)])
    assert isinstance(model[0].mlp, EWAFFN) and model[0].mlp.fast
    x = torch.randn(3, 5, 8, dtype=torch.float64)  # 15 tokens, one padded slot would spoil the statistics
    train_steps(model, x)
    randomize(model)
    if at == '0':
        norm = model[0].mlp.norm
        assert norm.weight.shape == (24,) and norm.running_mean.shape == (24,)  # shared, outside the experts
        assert all(p is not norm.weight for p in model[0].mlp.expert_parameters())
    model.eval()
    before = model(x)
    fuse(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert isinstance(model[0].mlp, FoldedFFN)


def test_in_a_block_with_shifted_heads_adapters_and_experts():
    """The FFN's branch folds; what was put into the attention stays or is merged by itself."""
    model = nn.Sequential(make_block(qkv_bias=True))
    x = torch.randn(6, 4, 8, dtype=torch.float64)
    expand(model, [dict(type='RePaFFN', at='0'), dict(type='STDHA', at='0.attn', offsets=[-1, 1], num_frames=3)])
    randomize(model)
    before = model.eval()(x)
    expand(model, [dict(type='LinearAdapter', at='0.attn.qkv'),
                   dict(type='LinearAdapter', at='0.attn.proj', position='after'), dict(type='EWAFFN', at='0.mlp')])
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    train_steps(model, x)
    before = model.eval()(x)
    report = fuse(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert [row.name for row in report if row.status == 'kept'] == ['0.attn']
    assert isinstance(model[0], FoldedBlock) and type(model[0].attn.qkv) is type(model[0].attn.proj) is nn.Linear
    with pytest.raises(ValueError, match=r"'0\.mlp\.fc1' is inside '0\.mlp', which is already a RePaFFN"):
        expand(nn.Sequential(make_block()), [dict(type='RePaFFN', at='0'), dict(type='LinearAdapter', at='0.mlp.fc1')])


def test_batch_statistics_inside_ewa_are_of_all_tokens():
    """With equal experts, a training step is that of one FFN, statistics included."""
    plain = RePaFFN(6, 20, idle_ratio=0.5, norm='batch', dtype=torch.float64)
    experts = EWAFFN.expand(plain, num_experts=4).train()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(experts(x), plain.train()(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(experts.norm.running_var, plain.norm.running_var, rtol=0, atol=1e-12)
    experts.fc1.register_forward_hook(lambda *args: None)
    with pytest.raises(TypeError, match='batch norm of all tokens'):
        experts(x)


def test_gradients_of_idle_channels():
    idle = ChannelIdle(nn.ReLU(), 2)
    x = torch.tensor([[-1., 1., -1., 1.]], requires_grad=True)
    idle(x).sum().backward()
    assert x.grad.tolist() == [[0., 1., 1., 1.]]
    assert 'active=2' in repr(idle)


@pytest.mark.parametrize('name', ['timm ViT', 'torchvision ViT'])
def test_models_that_are_not_ours(name):
    model, at, x = make_model(name)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    expand(model, dict(type='RePaFFN', at=at, idle_ratio=0.5))
    found = model.load_state_dict(plain)  # strictly: under the names that it had
    assert not found.missing_keys
    model.eval()
    before = model(x)
    report = fuse(model)
    assert len(report) == 3 and report.params_after < report.params_before
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_timm_blocks_and_timm_layers():
    timm = pytest.importorskip('timm')
    model, _, x = make_model('timm ViT')
    expand(model, dict(type='RePaFFN', at='blocks.*', schedule='linear'))
    assert [b.mlp.act.active for b in model.blocks] == [active_channels(24, r) for r in idle_ratios(3, 0.5, 'linear')]
    train_steps(model, x)
    model.eval()
    before = model(x)
    fuse(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert all(isinstance(block, FoldedBlock) for block in model.blocks)
    own = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2, mlp_layer=RePaFFN)
    assert type(own.blocks[0].mlp) is RePaFFN


def test_swin_blocks():
    """Windows, shifted ones too, are the block's own; its FFN branch folds with norm and shortcut."""
    timm = pytest.importorskip('timm')

    def make():
        return timm.models.SwinTransformer(img_size=32, patch_size=4, embed_dim=8, depths=(2,), num_heads=(2,),
                                           window_size=4, num_classes=3, drop_path_rate=0.1).double()

    model, x = make(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert any(model.layers[0].blocks[1].shift_size)
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    rules = [dict(type='RePaFFN', at='layers.*.blocks.*'),
             dict(type='EWAFFN', at='layers.*.blocks.*.mlp', num_experts=2)]
    half = model.layers[0].blocks[1]
    expected = x.new_ones(1, 8, 8, 8).normal_()
    expected = (expected, expected + half._attn(half.norm1(expected)))
    expand(model, rules)
    blocks = model.layers[0].blocks
    torch.testing.assert_close(blocks[1].eval().first_half(expected[0], {}), expected[1])
    found = model.load_state_dict(plain, strict=False)
    assert not found.unexpected_keys and all('.norm' in key for key in found.missing_keys)
    train_steps(model, x)
    randomize(model)
    before = model.eval()(x)
    copied = copy.deepcopy(model)
    report = fuse(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert {row.after for row in report} == {'FoldedBlock'}
    fuse(copied.float().double())  # buffers and children of the stand-in move along
    torch.testing.assert_close(copied(x), before, rtol=1e-4, atol=1e-4)
    twin = make()
    expand(twin, dict(rules[0], fused=True))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(x), model(x))


def test_blocks_that_need_more_are_told_what_else_there_is():
    timm = pytest.importorskip('timm')
    beit = timm.models.beit.Beit(img_size=16, patch_size=4, depth=1, num_heads=2, embed_dim=16, num_classes=2,
                                 init_values=0.1, use_rel_pos_bias=True)
    swin = timm.models.SwinTransformerV2(img_size=16, patch_size=4, embed_dim=8, depths=(1,), num_heads=(2,),
                                         window_size=2, num_classes=2)
    torch.nn.init.ones_(swin.layers[0].blocks[0].norm1.weight)
    for model, at in ((beit, 'blocks.*'), (swin, 'layers.*.blocks.*')):
        with pytest.raises(TypeError, match=r"(by itself|something else); .*name the block's mlp in the rule"):
            expand(model, dict(type='RePaFFN', at=at))
        expand(model, dict(type='RePaFFN', at=f'{at}.mlp'))


def test_fused_weights_have_a_model():
    """What fuse writes is loaded by a config whose rule says fused=True."""
    rules = [dict(type='RePaFFN', at='*', last=1), dict(type='EWAFFN', at='1.mlp')]
    model, twin = (nn.Sequential(make_block(), make_block()) for _ in range(2))
    expand(model, rules)
    fuse(model.eval())
    cfg = plain_config(dict(model=dict(expand=rules), default_hooks=dict(ewa=dict(type='EWAHook'))), model)
    assert cfg['model']['expand'] == [dict(type='RePaFFN', at='*', last=1, fused=True)]
    assert cfg['default_hooks'] == {}
    report = expand(twin, cfg['model']['expand'])
    assert [row.after for row in report] == ['FoldedBlock']
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert torch.equal(twin.eval()(x), model(x))
    assert len(fuse(twin)) == 0


# ---- schedules ------------------------------------------------------------------------------------------------------
def test_schedules():
    assert idle_ratios(4, 0.3) == [0.3] * 4
    assert idle_ratios(6, 0.5, 'linear') == pytest.approx([0.2, 0.4, 0.6, 0.8, 1., 0.])
    theta, depth = 0.75, 12
    assert idle_ratios(depth, theta, 'linear') == pytest.approx(
        [(2 * theta - 1) + (2 - 2 * theta) / (depth - 1) * (i + 1) for i in range(depth - 1)] + [0.])
    assert idle_ratios(1, 0.5, 'linear') == [0.] and idle_ratios(2, 0.1, 'linear') == [1., 0.]
    with pytest.raises(ValueError, match=r'would start at -0\.364 in 12 blocks'):
        idle_ratios(12, 0.25, 'linear')


def test_active_channels_as_computed_in_double_precision():
    assert active_channels(160, 0.7) == 49
    assert [active_channels(8, r) for r in (0, 0.5, 1)] == [8, 4, 0]


def test_one_token_has_no_statistics():
    block = RePaFFN.expand(make_block()).train()
    with pytest.raises(ValueError, match=r'statistics need more than one token, got \(1, 1, 8\)'):
        block(torch.randn(1, 1, 8, dtype=torch.float64))
    assert block.eval()(torch.randn(1, 1, 8, dtype=torch.float64)).isfinite().all()
    assert block.train()(torch.randn(2, 1, 8, dtype=torch.float64)).isfinite().all()


# ---- refusals -------------------------------------------------------------------------------------------------------
def test_folding_in_training_mode():
    for module in (RePaFFN(4, 8), RePaFFN(4, 8, norm='batch'), RePaFFN.expand(Block(8, 2))):
        with pytest.raises(ValueError, match='training mode'):
            module.train().fuse()


@pytest.mark.parametrize('cfg, error, message', [
    (dict(idle_ratio=1.1), ValueError, r'idle_ratio must lie in \[0, 1\], got 1.1'),
    (dict(idle_ratio=-0.1), ValueError, 'idle_ratio'),
    (dict(idle_ratio='half'), TypeError, 'idle_ratio must be a number'),
    (dict(norm='layer'), ValueError, "norm='layer'"),
    (dict(schedule='cosine'), ValueError, "schedule='cosine'"),
    (dict(schedule='linear'), ValueError, 'over the modules of a rule'),
])
def test_bad_values(cfg, error, message):
    with pytest.raises(error, match=message):
        RePaFFN.expand(Mlp(4, 8), **cfg)


class PostNorm(Block):
    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


@pytest.mark.parametrize('plain, error, message', [
    (nn.Linear(4, 4), TypeError, 'Linear is another FFN'),
    (Mlp(4, 8, norm_layer=nn.LayerNorm), TypeError, 'LayerNorm between them'),
    (Mlp(4, 8, act_layer=nn.PReLU), TypeError, 'PReLU as activation'),
    (nn.Sequential(nn.Linear(4, 8), nn.GELU()), TypeError, 'has the layers Linear, GELU'),
    (nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8)), TypeError, 'other layers than plain linear'),
    (PostNorm(8, 2), TypeError, 'PostNorm computes something else'),
    (nn.ModuleDict(dict(mlp=Mlp(4, 8))), TypeError, 'lacks norm1, attn, norm2'),
])
def test_modules_that_cannot_be(plain, error, message):
    if isinstance(plain, nn.ModuleDict):
        plain.mlp = plain['mlp']
    with pytest.raises(error, match=message):
        RePaFFN.expand(plain)


def test_blocks_and_layers_that_cannot_be():
    block = Block(8, 2)
    with pytest.raises(ValueError, match="name the block's mlp"):
        RePaFFN.expand(block, norm='none')
    block.norm2 = nn.Identity()
    with pytest.raises(TypeError, match='Identity as norm2'):
        RePaFFN.expand(block)
    with pytest.raises(ValueError, match='cannot be folded'):
        RePaFFN(4, 8, norm_layer=nn.LayerNorm)
    with pytest.raises(ValueError, match='one width'):
        fold(RePaFFN(4, 8, 5), shortcut=True)
    ffn = RePaFFN(4, 8).eval()
    ffn.fc1 = nn.Sequential(ffn.fc1)
    with pytest.raises(TypeError, match='folds where its layers are linear; one is a Sequential'):
        fold(ffn)
    with pytest.raises(ValueError, match='without running statistics'):
        fold(RePaFFN(4, 8), nn.BatchNorm1d(4, track_running_stats=False))


# ---- parity ---------------------------------------------------------------------------------------------------------
def official(reference):
    case = reference('repavit')
    return case, torch.load(case.path / 'checkpoint.pth', map_location='cpu', weights_only=False)


def close(value, expected):
    torch.testing.assert_close(value, expected, rtol=3e-5, atol=3e-5)


def test_parity_of_the_stand_alone_ffn(reference):
    case, checkpoint = official(reference)
    state = {k.removeprefix('mlp_block.'): v for k, v in checkpoint['mlp_block'].items()}
    hidden, dim = state['fc1.weight'].shape
    norm = TokenBatchNorm(dim).eval()
    norm.load_state_dict({k.removeprefix('norm1.'): v for k, v in state.items() if k.startswith('norm1.')})
    rest = {k.replace('norm2.', 'norm.'): v for k, v in state.items() if not k.startswith('norm1.')}
    tokens = case.inputs['tokens']
    for key, expected in case.expected.items():
        if not key.startswith('idle_') or not key.endswith('/out'):
            continue
        name = key.removesuffix('/out')
        ffn = RePaFFN(dim, hidden, idle_ratio=float(name.removeprefix('idle_')), norm='batch').eval()
        ffn.load_state_dict(rest)
        assert ffn.act.active == int(case.expected[f'{name}/active_channels'])
        close(tokens + ffn(norm(tokens)), expected)
        folded = fold(ffn, norm, shortcut=True)
        close(folded(tokens), case.expected[f'{name}/fused_out'])
        ours = dict(folded.named_parameters())
        for theirs, own in (('fc1', 'skip'), ('fc2', 'fc1'), ('fc3', 'fc2')):
            for part in ('weight', 'bias'):
                stored = case.expected.get(f'{name}/fused/{theirs}.{part}')
                if stored is not None and f'{own}.{part}' in ours and 0 < ffn.act.active < hidden:
                    close(ours[f'{own}.{part}'], stored)


def test_parity_of_the_image_transformer(reference):
    timm = pytest.importorskip('timm')
    case, checkpoint = official(reference)
    cfg = case.meta['config']
    model = timm.models.VisionTransformer(
        img_size=cfg['img_size'], patch_size=cfg['patch_size'], embed_dim=cfg['embed_dim'], depth=cfg['depth'],
        num_heads=cfg['num_heads'], mlp_ratio=cfg['mlp_ratio'], num_classes=cfg['num_classes'], pre_norm=True,
        fc_norm=False)
    expand(model, dict(type='RePaFFN', at='blocks.*', idle_ratio=cfg['idle_ratio']))
    for block in model.blocks:
        block.norm1.eps = 1e-5  # the norm before attention has torch's default there, the other two 1e-6
    model.load_state_dict(rename(checkpoint['model'], 'repavit'))
    model.eval()
    images, found = case.inputs['images'], {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, args, out, i=i: found.update({f'block_{i}/ffn_out': out}))
    close(model(images), case.expected['logits'])
    for key, value in found.items():
        close(value, case.expected[key])
    assert [block.mlp.act.active for block in model.blocks] == case.expected['active_channels'].tolist()
    fuse(model)
    close(model(images), case.expected['fused_logits'])
    for key, stored in case.expected.items():
        if key.startswith('fused/'):
            own = key.removeprefix('fused/')
            for theirs, ours in (('.fc1.', '.skip.'), ('.fc2.', '.fc1.'), ('.fc3.', '.fc2.')):
                if theirs in own:
                    close(model.state_dict()[own.replace(theirs, ours)], stored)
