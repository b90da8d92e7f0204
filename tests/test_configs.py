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
    if shape is not None and clip_length(cfg.model.backbone) is not None:
        clips = [torch.randn(clip_length(cfg.model.backbone), *shape) for _ in range(2)]
        return [dict(inputs=dict(video=clips), data_samples=samples)]
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
