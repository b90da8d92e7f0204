"""Models of clips: tokenizers, backbones, pooling, the head, frozen parameters; from an image model and back."""
import copy

import pytest
import torch
from torch import nn

from ewa3d import expand, fuse
from ewa3d.engine.params import freeze, param_groups
from ewa3d.fusing import clip_length, example_inputs, fuse_checkpoint, image_shape
from ewa3d.layers.temporal import STDHA
from ewa3d.layers.video_tokens import PointClipEmbed, VideoPatchEmbed
from ewa3d.models.task import TaskModel
from ewa3d.models.tasks import Task, features_by_task
from ewa3d.models.video import ClipPool, I3DHead, TimmVideoBackbone
from ewa3d.models.weights import load_plain
from ewa3d.structures import Sample

STDHA_RULE = dict(type='STDHA', at='backbone.blocks.*.attn', offsets=[-1, 1])
ADAPTERS = [dict(type='LinearAdapter', at=f'backbone.blocks.*.{at}', position=position) for at, position in (
    ('attn.qkv', 'before'), ('attn.proj', 'after'), ('mlp.fc1', 'before'), ('mlp.fc2', 'after'))]
TRAINABLE = ['adapter', 'temporal_embed', 'backbone.norm.*', 'head']


def encoder(tokenizer: dict, **options) -> dict:
    return dict(type='TokenEncoder', tokenizer=tokenizer, embed_dim=16, depth=2, num_heads=2, qkv_bias=True,
                pos='first', drop_path_rate=0., **options)


def image_model(**options) -> TaskModel:
    tokenizer = dict(type='ImagePatchEmbed', img_size=8, patch_size=4)
    return TaskModel(encoder(tokenizer), dict(type='TokenPool', mode='cls'),
                     dict(type='ClsHead', num_classes=3, form='linear'), **options)


def video_model(T: int = 3, tokenizer: dict | None = None, **options) -> TaskModel:
    tokenizer = tokenizer or dict(type='VideoPatchEmbed', img_size=8, patch_size=4, num_frames=T)
    return TaskModel(encoder(tokenizer), dict(type='ClipPool'), dict(type='I3DHead', num_classes=3), **options)


def timm_model(T: int = 3, **options) -> TaskModel:
    pytest.importorskip('timm')
    backbone = dict(type='TimmVideoBackbone', name='vit_base_patch16_clip_quickgelu_224', num_frames=T, img_size=8,
                    patch_size=4, embed_dim=16, depth=2, num_heads=2)
    return TaskModel(backbone, dict(type='ClipPool'), dict(type='I3DHead', num_classes=3), **options)


def samples_of(*labels: int) -> list[Sample]:
    return [Sample(gt_label=torch.tensor(label)) for label in labels]


def train(model: TaskModel, inputs: dict, steps: int = 3, lr: float = 0.05) -> None:
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    samples = samples_of(*(i % 3 for i in range(len(next(iter(inputs.values()))))))
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs, samples, mode='loss')['loss_cls'].backward()
        optimizer.step()


@pytest.mark.parametrize('T', [1, 2, 5])
def test_an_image_checkpoint_becomes_a_video_model_and_costs_what_the_image_model_costs(T):
    image = image_model().double().eval()
    model = video_model(T, expand=[STDHA_RULE, *ADAPTERS], trainable=TRAINABLE).double()
    report = load_plain(model, image.state_dict(), strict=False)
    assert {key for key in report.missing if 'adapter' not in key} == {'backbone.tokenizer.temporal_embed'}
    video = torch.randn(2, T, 3, 8, 8, dtype=torch.float64)
    if T == 1:  # one frame: the image model itself
        torch.testing.assert_close(model.eval()(dict(video=video)), image(dict(img=video[:, 0])), rtol=0, atol=1e-12)
    frozen = {key: value.clone() for key, value in model.state_dict().items()
              if not any(word in key for word in ('adapter', 'temporal', 'backbone.norm.', 'head'))}
    train(model, dict(video=video))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    before = model.eval()(dict(video=video))
    fuse(model)
    torch.testing.assert_close(model(dict(video=video)), before, rtol=0, atol=1e-12)
    extra = 'backbone.tokenizer.temporal_embed'
    assert [key for key in model.state_dict() if key != extra] == list(image.state_dict())
    assert sum(p.numel() for key, p in model.named_parameters() if key != extra) == \
        sum(p.numel() for p in image.parameters())


def test_without_shifts_frames_are_images():
    image, model = image_model().eval(), video_model(4)
    load_plain(model, image.state_dict(), strict=False)
    video = torch.randn(2, 4, 3, 8, 8)
    feats = model.eval().extract(dict(video=video))
    assert feats.shape == (2, 4, 16)
    torch.testing.assert_close(feats, image.extract(dict(img=video.flatten(0, 1))).unflatten(0, (2, 4)))


@pytest.mark.parametrize('make', [video_model, timm_model])
def test_time_reaches_every_token(make):
    model = make(2).eval()
    owner = getattr(model.backbone, 'tokenizer', model.backbone)
    assert not owner.temporal_embed.any() and owner.temporal_embed.shape == (1, 2, 16)
    frame = torch.randn(1, 1, 3, 8, 8).expand(1, 2, -1, -1, -1)
    feats = model.extract(dict(video=frame))
    torch.testing.assert_close(feats[:, 0], feats[:, 1])
    with torch.no_grad():
        owner.temporal_embed[:, 1] = torch.randn(16)
    tokens = model.backbone.tokenize(dict(video=frame))
    assert tokens.prefix_pos.shape == (2, 1, 16)
    assert (model.extract(dict(video=frame))[:, 1] - feats[:, 1]).abs().max() > 1e-3
    torch.testing.assert_close(tokens.pos[1] - tokens.pos[0], owner.temporal_embed[0, 1].expand(4, -1))
    names = {name for group in param_groups(model, 0.1, 0.1) if group['name'] == 'decay' for name, p in
             model.named_parameters() if any(p is q for q in group['params'])}
    assert not any('temporal' in name for name in names) and names


@pytest.mark.parametrize('make', [video_model, timm_model])
def test_order_matters_where_heads_are_shifted_alone(make):
    video = torch.randn(1, 3, 3, 8, 8)
    plain = make(3).eval()
    torch.testing.assert_close(plain(dict(video=video)), plain(dict(video=video.flip(1))))
    expand(plain, dict(STDHA_RULE, num_frames=3))
    assert (plain(dict(video=video)) - plain(dict(video=video.flip(1)))).abs().max() > 1e-6


def test_clips_of_clouds():
    tokenizer = dict(type='PointClipEmbed', num_frames=3, num_groups=4, group_size=5, widths=(8, 8, 8))
    model = video_model(3, tokenizer, expand=[STDHA_RULE, *ADAPTERS]).double()
    assert all(module.num_frames == 3 for module in model.modules() if isinstance(module, STDHA))
    clouds = torch.randn(2, 3, 20, 3, dtype=torch.float64)
    assert model(dict(points=clouds)).shape == (2, 3)
    train(model, dict(points=clouds))
    before = model.eval()(dict(points=clouds))
    fuse(model)
    torch.testing.assert_close(model(dict(points=clouds)), before, rtol=0, atol=1e-12)
    tokens = model.backbone.tokenize(dict(points=clouds))
    assert tokens.x.shape == (6, 4, 16) and tokens.target.shape == (6, 4, 5, 3)
    feats, places = model.backbone.located(dict(points=clouds), (0, 1))
    assert torch.equal(places, tokens.coord) and model.backbone.tokenizer.temporal_embed.any()
    for one, other in zip(feats, model.backbone(dict(points=clouds), (0, 1)), strict=True):
        assert torch.equal(one, other)  # the class token's time included
    with pytest.raises(ValueError, match=r'points must have the shape \(B, 3, N, C\)'):
        model(dict(points=clouds[:, :2]))


def test_time_reaches_tasks_that_ask_for_blocks():
    """What a neck gets that names blocks, and the one beside it, is what the backbone gives."""
    class Blocks(nn.Module):
        out_indices = (0, 1)

        def forward(self, feats, coord, inputs):
            return torch.stack(list(feats))

    backbone = video_model(2).eval().backbone
    nn.init.normal_(backbone.tokenizer.temporal_embed)
    inputs = dict(video=torch.randn(2, 2, 3, 8, 8))
    feats = features_by_task(backbone, dict(blocks=Task(Blocks(), nn.Identity(), None, 'a', 1.),
                                            last=Task(None, nn.Identity(), None, 'b', 1.)), inputs)
    assert torch.equal(feats['last'], backbone(inputs))
    assert torch.equal(feats['blocks'], torch.stack(list(backbone(inputs, (0, 1)))))


def test_views_are_averaged():
    model = video_model(2).eval()
    video = torch.randn(2, 3, 2, 3, 8, 8)  # two samples, three views
    samples = model(dict(video=video), samples_of(0, 1), mode='predict')
    scores = model(dict(video=video.flatten(0, 1))).softmax(-1).unflatten(0, (2, 3)).mean(1)
    torch.testing.assert_close(torch.stack([s.pred_scores for s in samples]), scores)
    assert [int(s.pred_label) for s in samples] == scores.argmax(-1).tolist()
    loss = model(dict(video=video), samples_of(0, 1), mode='loss')['loss_cls']
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(dict(video=video)), labels))
    assert len(model(dict(video=video), mode='predict')) == 6
    with pytest.raises(ValueError, match='6 clips cannot be shared out to 4 samples'):
        model(dict(video=video), samples_of(0, 1, 2, 0), mode='predict')


def test_head():
    head = I3DHead(4, 6, dropout=0.5, init_std=0.2).eval()
    feats = torch.randn(2, 5, 6)
    torch.testing.assert_close(head(feats), feats.mean(1) @ head.layers[0].weight.T + head.layers[0].bias)
    head.train()
    assert not torch.equal(head(feats), head(feats))
    with pytest.raises(ValueError, match=r'features \(B, T, 6\) expected, got \(2, 6\)'):
        head(feats[:, 0])
    with pytest.raises(ValueError, match='init_std'):
        I3DHead(4, 6, init_std=-1)


def test_pool():
    pool, x = ClipPool('cls+mean', num_frames=2, num_prefix_tokens=1), torch.randn(4, 5, 3)
    expected = torch.cat([x[:, 0], x[:, 1:].mean(1)], -1).view(2, 2, 6)
    torch.testing.assert_close(pool(x), expected)
    with pytest.raises(ValueError, match='5 frames are no whole clips of num_frames=2'):
        pool(torch.randn(5, 4, 3))
    with pytest.raises(ValueError, match='num_frames is not set'):
        TaskModel(encoder(dict(type='ImagePatchEmbed', img_size=8, patch_size=4)), dict(type='ClipPool'))


@pytest.mark.parametrize(('inputs', 'error', 'message'), [
    (dict(img=torch.zeros(1, 3, 8, 8)), KeyError, "need the key 'video', found"),
    (dict(video=[1]), TypeError, 'video must be a tensor'),
    (torch.zeros(2, 3, 8, 8), ValueError, r'\(B, 2, C, H, W\), clips of num_frames=2'),
    (torch.zeros(1, 3, 3, 8, 8), ValueError, r'got \(1, 3, 3, 8, 8\)'),
    (torch.zeros(1, 0, 3, 8, 8), ValueError, 'num_frames=2'),
    (torch.zeros(1, 2, 3, 8, 6), ValueError, r'images \(B, 3, 8, 8\) expected')])
def test_wrong_clips(inputs, error, message):
    with pytest.raises(error, match=message):
        VideoPatchEmbed(2, img_size=8, patch_size=4, embed_dim=4)(inputs)


def test_wrong_settings():
    for cls in (VideoPatchEmbed, PointClipEmbed):
        with pytest.raises(ValueError, match=f'{cls.__name__}: num_frames must be at least 1'):
            cls(0)
    with pytest.raises(ValueError, match='num_frames=2, the backbone takes clips of num_frames=3'):
        video_model(3, expand=[dict(STDHA_RULE, num_frames=2)])
    with pytest.raises(ValueError, match='the backbone has none either'):
        image_model(expand=[STDHA_RULE])
    with pytest.raises(ValueError, match="trainable name 'adaptor' matches no parameter"):
        video_model(expand=ADAPTERS, trainable=['adaptor'])


def test_timm_backbone_refuses_what_it_cannot_do():
    pytest.importorskip('timm')
    with pytest.raises(ValueError, match='a plain ViT was expected'):
        TimmVideoBackbone('swin_tiny_patch4_window7_224', img_size=56, depths=(1, 1), embed_dim=8, num_heads=(1, 2))
    with pytest.raises(ValueError, match='pool=True'):
        TimmVideoBackbone('vit_tiny_patch16_224', pool=True)


def test_image_weights_of_timm_load(tmp_path):
    timm = pytest.importorskip('timm')
    sizes = dict(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    image = timm.create_model('vit_base_patch16_clip_quickgelu_224', num_classes=0, global_pool='', **sizes).eval()
    torch.save(image.state_dict(), tmp_path / 'clip.pth')
    backbone = TimmVideoBackbone('vit_base_patch16_clip_quickgelu_224', 2, tmp_path / 'clip.pth', **sizes).eval()
    video = torch.randn(1, 2, 3, 8, 8)
    torch.testing.assert_close(backbone(video), image(video.flatten(0, 1)))
    assert backbone.no_weight_decay() >= {'pos_embed', 'cls_token', 'temporal_embed'}
    assert set(backbone.state_dict()) - set(image.state_dict()) == {'temporal_embed'}
    assert len(backbone(video, out_indices=(0, 1))) == 2


def test_freeze():
    model = nn.ModuleDict(dict(norm=nn.LayerNorm(4), norm_pre=nn.LayerNorm(4), head=nn.Linear(4, 2)))
    model['norm'].requires_grad_(False)
    assert freeze(model, ['norm.*', 'head']) == ['norm.weight', 'norm.bias', 'head.weight', 'head.bias']
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ['norm_pre.weight', 'norm_pre.bias']
    with pytest.raises(TypeError, match='got the string'):
        freeze(model, 'head')
    with pytest.raises(ValueError, match="trainable name 'token' matches no parameter"):
        freeze(model, ['token'])


def test_fuse_tool(tmp_path):
    """The file that the tool writes holds the video model without adapters, STDHA still in its config."""
    from ewa3d.engine.checkpoint import read_checkpoint, write_checkpoint
    from ewa3d.models.build import build
    tokenizer = dict(type='VideoPatchEmbed', img_size=8, patch_size=4, num_frames=3)
    cfg = dict(type='TaskModel', backbone=encoder(tokenizer), neck=dict(type='ClipPool'),
               head=dict(type='I3DHead', num_classes=3), expand=[STDHA_RULE, *ADAPTERS], trainable=TRAINABLE)
    hooks = dict(ewa=dict(type='EWAHook'), timer=dict(type='IterTimerHook'))
    model, video = build(cfg), torch.randn(2, 3, 3, 8, 8)
    train(model, dict(video=video))
    write_checkpoint(tmp_path / 'a.pth', model.state_dict(), dict(cfg=dict(model=copy.deepcopy(cfg),
                                                                              default_hooks=hooks)))
    report = fuse_checkpoint(tmp_path / 'a.pth', tmp_path / 'b.pth')
    assert report.written and report.fused == 8 and report.kept == 2
    plain = read_checkpoint(tmp_path / 'b.pth')['meta']['cfg']
    assert [rule['type'] for rule in plain['model']['expand']] == ['STDHA'] and 'trainable' not in plain['model']
    assert list(plain['default_hooks']) == ['timer']
    fused = build(plain, tmp_path / 'b.pth')
    torch.testing.assert_close(fused(dict(video=video)), model.eval()(dict(video=video)), rtol=1e-4, atol=1e-5)


def test_example_inputs():
    backbone = dict(type='TimmVideoBackbone', name='vit_base_patch16_clip_quickgelu_224', num_frames=4)
    assert image_shape(backbone) == (3, 224, 224) and clip_length(backbone) == 4
    points = dict(type='PointClipEmbed', num_frames=3)
    inputs = example_inputs(dict(model=dict(backbone=encoder(points)),
                                 test_dataloader=dict(dataset=dict(num_points=50))))
    assert inputs['points'].shape == (2, 3, 50, 3)
    assert clip_length(encoder(dict(type='VideoPatchEmbed'))) == 8
    assert clip_length(encoder(dict(type='ImagePatchEmbed'))) is None
