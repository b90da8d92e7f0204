"""Every config is valid, builds, and takes one optimizer step on generated data."""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

from ewa3d import attach_ewa
from ewa3d.engine.validate import check_config
from ewa3d.fusing import clip_length, image_shape
from ewa3d.models.build import fill_model
from ewa3d.registry import MODELS
from ewa3d.reparam import Reparam
from ewa3d.structures import Sample

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
LEAVES = sorted(p for p in CONFIGS.rglob('*.py') if '_base_' not in p.parts)
OVERLAYS = sorted((CONFIGS / '_base_' / 'reparam').glob('*.py'))


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def inheritance_depth(path: Path) -> int:
    """How many files deep the longest chain of ``_base_`` is, ``path`` included."""
    bases = Config._get_base_files(str(path))
    return 1 + max((inheritance_depth((path.parent / base).resolve()) for base in bases), default=0)


def points_of(cfg: Config) -> int:
    """The number of points that the training pipeline ends with."""
    dataset = cfg.train_dataloader.dataset
    dataset = (dataset.get('sources') or {}).get('modelnet10', dataset)
    return [dataset.get('num_points'), *(t.num_points for t in dataset.pipeline if t.type == 'Resample')][-1]


def make_smaller(detector: dict) -> None:
    """Fewer tokens, neighbours and queries: the layers stay."""
    detector.backbone.tokenizer.update(num_points=80, num_neighbors=8)
    if detector.backbone.get('downsample'):
        detector.backbone.downsample.update(num_points=40, num_neighbors=8)
    detector.neck.update(num_queries=20)


def batches_of(cfg: Config, points: int | None = None) -> list[dict]:
    """What a step is taken on: two generated samples of each kind that the model takes."""
    shape, batches = image_shape(cfg.model.backbone) if 'backbone' in cfg.model else None, []
    samples = [Sample(gt_label=torch.tensor(i)) for i in range(2)]
    frames = clip_length(cfg.model.backbone) if 'backbone' in cfg.model else None
    if frames is not None:
        key, shape = ('points', (points_of(cfg), 3)) if shape is None else ('video', shape)
        return [dict(inputs={key: [torch.randn(frames, *shape) for _ in range(2)]}, data_samples=samples)]
    if shape is not None:
        batches.append(dict(inputs=dict(img=[torch.randn(shape) for _ in range(2)]), data_samples=samples))
    if shape is None or 'tasks' in cfg.model:
        points = points or points_of(cfg)
        samples = [Sample(gt_label=torch.tensor(i), gt_parts=torch.arange(points) % 5,
                          gt_boxes=torch.rand(i + 1, 7) + 0.1, gt_labels=torch.arange(i + 1)) for i in range(2)]
        batches.append(dict(inputs=dict(points=[torch.randn(points, 3) for _ in range(2)], category=torch.arange(2)),
                            data_samples=samples))
    return batches


def test_there_are_configs():
    assert LEAVES and OVERLAYS


@pytest.mark.parametrize('path', LEAVES, ids=name)
def test_is_valid_and_shallow(path):
    check_config(Config.fromfile(path))
    assert inheritance_depth(path) <= 3, 'leaf -> sibling leaf -> _base_ is the limit'
    assert '_delete_' not in path.read_text()


# What the published configs say: points, pool and batch in training, groups, epochs, warm-up, learning rate, decay.
TUNED = dict(batch=32, epochs=300, warmup=10, lr=5e-4, decay=0.05, clip=10)
MASKED = dict(points=1024, pool=None, groups=64, batch=128, epochs=300, warmup=10, lr=1e-3, decay=0.05, clip=None)
CLASSIFIED = {'1k': (1024, 1200, 64), '2k': (2048, 2400, 128), '4k': (4096, 4800, 256), '8k': (8192, 8192, 512)}
OFFICIAL = {
    **{f'point_{m}/point-{m}_s_ft_modelnet40-{size}': dict(TUNED, points=points, pool=pool, groups=groups)
       for m in ('mae', 'bert') for size, (points, pool, groups) in CLASSIFIED.items()},
    **{f'point_mae/point-mae_s_ft_scanobjectnn-{v}': dict(TUNED, points=2048, pool=None, groups=128)
       for v in ('objbg', 'objonly', 'hardest')},
    **{f'point_bert/point-bert_s_ft_scanobjectnn-{v}': dict(TUNED, points=1024, pool=1200, groups=64)
       for v in ('objbg', 'objonly', 'hardest')},
    **{f'point_{m}/point-{m}_s_ft_fewshot-modelnet40': dict(TUNED, epochs=150, points=1024, pool=1200, groups=64)
       for m in ('mae', 'bert')},
    'point_mae/point-mae_s_pt_shapenet55': MASKED,
    'point_bert/point-bert_s_pt_shapenet55': dict(MASKED, warmup=3, lr=5e-4),
    'point_bert/dvae_shapenet55': dict(MASKED, batch=64, lr=5e-4, decay=5e-4)}


@pytest.mark.parametrize('leaf', OFFICIAL)
def test_official_recipes_have_the_official_numbers(leaf):
    cfg = Config.fromfile(CONFIGS / f'{leaf}.py')
    optimizer, dataset, epochs = cfg.optim_wrapper.optimizer, cfg.train_dataloader.dataset, cfg.train_cfg.max_epochs
    tokenizer = cfg.model.get('backbone', dict(tokenizer=cfg.model))['tokenizer']
    sampled = next(step for step in dataset.pipeline if step.type == 'Resample')
    assert dict(batch=cfg.train_dataloader.batch_size, epochs=epochs, points=sampled.num_points,
                pool=sampled.get('pool'), groups=tokenizer.num_groups, lr=optimizer.lr, decay=optimizer.weight_decay,
                clip=(cfg.optim_wrapper.get('clip_grad') or {}).get('max_norm'),
                warmup=round(cfg.param_scheduler.warmup * epochs, 6)) == OFFICIAL[leaf]
    assert (optimizer.type, sampled.method, tokenizer.group_size) == ('AdamW', 'random', 32)
    assert cfg.param_scheduler.eta_min == 1e-6 and cfg.train_dataloader.drop_last and tokenizer.skip_origin
    kinds = [step.type for step in dataset.pipeline]
    augmented = [] if 'dvae' in leaf else [dict(type='RandomScale', scale=(2 / 3, 3 / 2)),
                                           dict(type='RandomShift', shift=0.2)]
    assert [dict(step) for step in dataset.pipeline if step.type.startswith('Random')] == augmented
    assert ('Normalize' in kinds) == ('scanobjectnn' not in leaf)
    if 'scanobjectnn' in leaf:
        variants = [cfg[f'{split}_dataloader'].dataset.variant for split in ('train', 'val', 'test')]
        assert variants == 3 * [leaf.rpartition('-')[2]]
    if 'pt_shapenet55' in leaf:
        assert dataset.get('whole', False) == ('bert' in leaf)


def of_type(steps: list, kind: str) -> list:
    return [step for step in steps if step.type == kind]


# ZeroI2V: backbone, clips of how many processes make 64, frames and how they are drawn, epochs, heads that are shifted,
# scale and dropout of the adapters, clips and squares of the test, label smoothing.
K400 = dict(backbone='vit_base_patch16_clip_quickgelu_224', processes=8, frames=8, sampling=('dense', 16), epochs=40,
            offsets=[-1, 1] + [0] * 10, scale=0.5, dropout=0.1, views=(3, 1), smoothing=0.)
VIDEO = {
    'zeroi2v_b_ft_k400-8x16': K400,
    'zeroi2v_l_ft_k400-8x16': dict(K400, backbone='vit_large_patch14_clip_quickgelu_224',
                                   offsets=[-1, -1, 1, 1] + [0] * 12),
    'zeroi2v_b_ft_ucf101-8': dict(K400, processes=4, sampling=('uniform', 1), views=(1, 3)),
    'zeroi2v_b_ft_ssv2-16': dict(K400, processes=16, frames=16, sampling=('uniform', 1), epochs=50, scale=1.,
                                 dropout=0., offsets=[-1, 1, -2, 2] + [0] * 8, views=(1, 3), smoothing=0.1)}


@pytest.mark.parametrize('leaf', VIDEO)
def test_video_recipes_have_the_official_numbers(leaf):
    cfg, wanted = Config.fromfile(CONFIGS / 'video' / f'{leaf}.py'), VIDEO[leaf]
    train, test = (cfg[f'{split}_dataloader'].dataset.pipeline for split in ('train', 'test'))
    load, views = of_type(train, 'LoadClip')[0], of_type(test, 'LoadClip')[0]
    shift, *adapters = cfg.model.expand
    assert dict(backbone=cfg.model.backbone.name, processes=64 // cfg.train_dataloader.batch_size,
                frames=cfg.model.backbone.num_frames, epochs=cfg.train_cfg.max_epochs, offsets=shift.offsets,
                sampling=(load.get('sampling', 'uniform'), load.get('interval', 1)), scale=adapters[0].scale,
                dropout=adapters[0].dropout, views=(views.get('num_clips', 1), 3 if of_type(test, 'ThreeCrop') else 1),
                smoothing=cfg.model.head.get('label_smoothing', 0.)) == wanted
    assert load.clip_len == views.clip_len == wanted['frames'] and views.test
    assert [(a.at.split('*.')[1], a.position) for a in adapters] == [
        ('attn.qkv', 'before'), ('attn.proj', 'after'), ('mlp.fc1', 'before'), ('mlp.fc2', 'after')]
    assert {(a.scale, a.dropout) for a in adapters} == {(wanted['scale'], wanted['dropout'])}
    assert not any('ratio' in a or 'rank' in a for a in adapters)  # a quarter of the width
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 3e-4, 0.05)
    schedule = cfg.param_scheduler
    assert (schedule.warmup * wanted['epochs'], schedule.warmup_factor, schedule.eta_min) == (2.5, 0.1, 0)
    steps = [step for t in of_type(train, 'ImageTransforms') for step in t.transforms]
    augment, = (step for step in steps if step['name'] == 'RandAugment')
    assert (augment['num_ops'], augment['magnitude'], cfg.model.head.dropout) == (4, 7, 0.5)
    assert [step['p'] for step in steps if step['name'] == 'RandomErasing'] == [0.25] * ('ssv2' in leaf)
    assert ('swap' in of_type(train, 'ClipFlip')[0]) == ('ssv2' in leaf)
    assert set(cfg.model.trainable) == {'adapter', 'temporal_embed', 'backbone.norm.*', 'head'}


def test_the_recipe_of_sequential_cifar_has_the_official_numbers():
    cfg = Config.fromfile(CONFIGS / 'relatives' / 'pixels_s_scratch_cifar10_s4d.py')
    backbone, rule, optimizer = cfg.model.backbone, cfg.model.expand[0], cfg.optim_wrapper.optimizer
    assert (backbone.embed_dim, backbone.depth, backbone.dropout, backbone.img_size) == (128, 4, 0.1, 32)
    assert (rule.type, rule.d_state, rule.bidirectional, rule.dropout, rule.length) == ('S4D', 64, False, 0.1, 1024)
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-2, 0.01)
    assert (cfg.optim_wrapper.paramwise_cfg.ssm_lr, cfg.train_cfg.max_epochs) == (1e-3, 100)
    assert cfg.model.neck.mode == 'mean'
    assert (cfg.param_scheduler.warmup, cfg.param_scheduler.eta_min, cfg.train_dataloader.batch_size) == (0, 0, 64)
    pack, = cfg.train_dataloader.dataset.pipeline
    assert (pack.mean, pack.std) == ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])


@pytest.mark.parametrize('size', ['small', 'base'])
def test_the_recipe_of_deit_has_the_official_numbers(size):
    cfg = Config.fromfile(CONFIGS / 'vit' / f'deit_{size[0]}_scratch_imagenet.py')
    optimizer, schedule, mixing = cfg.optim_wrapper.optimizer, cfg.param_scheduler, cfg.model.data_preprocessor
    assert (cfg.model.backbone.name, cfg.model.backbone.drop_path_rate) == (f'deit_{size}_patch16_224', 0.1)
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-3, 0.05)
    assert (cfg.train_cfg.max_epochs, schedule.warmup * 300, schedule.eta_min) == (300, 5, 1e-5)
    assert schedule.warmup_factor * optimizer.lr == pytest.approx(1e-6) and 'clip_grad' not in cfg.optim_wrapper
    assert (mixing.mixup, mixing.cutmix, cfg.model.head.label_smoothing) == (0.8, 1.0, 0.1)
    assert cfg.train_dataloader.sampler.repeats == 3 and cfg.train_dataloader.batch_size * 16 == 1024


def test_the_point_classifier_with_state_spaces_is_like_pointmamba():
    cfg = Config.fromfile(CONFIGS / 'relatives' / 'point-mae_xs_scratch_modelnet10-1k_s4d-two.py')
    backbone = cfg.model.backbone
    assert (backbone.pos, backbone.cls_token, cfg.model.neck.mode) == ('first', False, 'mean')
    assert backbone.order == ['hilbert', 'hilbert-trans']
    assert cfg.model.expand[0].length == 2 * backbone.tokenizer.num_groups


@pytest.mark.parametrize('path', LEAVES, ids=name)
def test_builds_and_takes_one_step(path):
    cfg = Config.fromfile(path)
    fill_model(cfg.model, dict(classes=list('abcde'), parts={name: [i] for i, name in enumerate('abcde')}), 'toy')
    for part in (cfg.model, cfg.model.get('dvae', {})):
        part.pop('pretrained', None)  # another run's result
    detects = cfg.model.get('head', {}).get('type') == 'DETRHead'
    if detects:
        make_smaller(cfg.model)
    if cfg.model.get('backbone', {}).get('type') == 'TimmVideoBackbone':  # at full width, on a part of the pixels
        cfg.model.backbone.update(img_size=2 * int(cfg.model.backbone.name.split('patch')[1][:2]), depth=2)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    assert any(isinstance(module, Reparam) for module in model.modules()) == ('expand' in cfg.model)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    handle = None
    if 'ewa' in cfg.default_hooks:
        settings = {k: v for k, v in cfg.default_hooks.ewa.items() if k != 'type'}
        handle = attach_ewa(wrapper.optimizer, model, total_steps=3, start_step=1, **settings)
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trainable]
    batches = batches_of(cfg, 300 if detects else None)
    for batch in batches:
        assert torch.isfinite(model.train_step(batch, wrapper)['loss'])
    changed = [not torch.equal(a, b) for a, b in zip(before, trainable)]
    assert sum(changed) > len(changed) // 2
    if handle is not None:
        assert handle.step == 1 + len(batches)


@pytest.mark.parametrize('path', [p for p in LEAVES if p.stem.endswith('_ewa') or p.stem == 'ewa'], ids=name)
def test_ewa_leaf_differs_from_its_plain_one_by_the_overlay_alone(path):
    plain = path.with_name(path.name.replace('_ewa', '') if '_ewa' in path.name else 'plain.py')
    with_ewa, without = Config.fromfile(path).to_dict(), Config.fromfile(plain).to_dict()
    assert with_ewa['model'].pop('expand')
    assert with_ewa['default_hooks'].pop('ewa')
    with_ewa['optim_wrapper']['paramwise_cfg'].pop('expert_lr_mult')
    without['optim_wrapper']['paramwise_cfg'].pop('expert_lr_mult')
    for key in without:
        assert with_ewa[key] == without[key], key
