"""From the checkpoint of an expanded model to a file with plain weights, with the proof that nothing changed."""
import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ewa3d.engine.bounds import no_larger_than
from ewa3d.engine.checkpoint import (
    check_target,
    load_model_state,
    read_checkpoint,
    select_weights,
    write_checkpoint,
)
from ewa3d.engine.plain import to_plain
from ewa3d.layers.stacked import Experts, iter_experts
from ewa3d.models.build import fill_from_checkpoint, fill_from_data, lacks, without_pretrained
from ewa3d.registry import MODELS
from ewa3d.reparam import Reparam, Report, fuse, glob

__all__ = ['FuseReport', 'fuse_and_compare', 'fuse_checkpoint', 'example_inputs', 'output_difference', 'plain_config',
           'trusted_part']

TOLERANCE = 1e-5


@dataclass
class FuseReport:
    """What :func:`fuse_checkpoint` did; ``str()`` is what the command prints."""
    table: str
    weights: str
    fused: int
    kept: int
    difference: dict[str, dict[str, float]]  # dtype → absolute and relative
    tolerance: float
    out: Path
    written: bool = False
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.table, f'weights: {self.weights}', *self.notes]
        for dtype, value in self.difference.items():
            lines.append(f'largest output difference in {dtype}: {value["absolute"]:.3g} absolute, '
                         f'{value["relative"]:.3g} relative')
        relative = self.difference['float32']['relative']
        lines.append(f'wrote {self.out}' if self.written else
                     f'refused to write {self.out}: {relative:.3g} is more than {self.tolerance:g}')
        return '\n'.join(lines)


def fuse_checkpoint(checkpoint: str | Path, out: str | Path, config: Mapping | None = None, weights: str = 'default',
                    tolerance: float = TOLERANCE) -> FuseReport:
    """Build the model of ``checkpoint``, fuse it, compare, and write the plain weights to ``out``.

    The config comes from the checkpoint as data: only registered types are built and nothing in the file is executed.

    Args:
        checkpoint: a file that training wrote.
        out: ``*.pth`` or ``*.safetensors``; its folder is made. Written only when the outputs agree.
        config: a config of your own, where the model has types that only its ``custom_imports`` register.
        weights: ``'default'``, ``'ema'`` or ``'raw'``, see :func:`ewa3d.engine.checkpoint.select_weights`.
        tolerance: the largest relative output difference in fp32 at which ``out`` is written.

    Raises:
        ValueError: ``out`` has another suffix or is the checkpoint itself, or the checkpoint has no config or does not
            fit it.
    """
    checkpoint, out = Path(checkpoint), check_target(out, checkpoint)
    content = read_checkpoint(checkpoint)
    meta = dict(content.get('meta') or {})
    cfg = config_of(content, config, checkpoint)
    state, kind = select_weights(content, weights)

    expanded = build_stored(cfg['model'], checkpoint, state)
    load_model_state(expanded, state, str(checkpoint))
    expanded.eval().requires_grad_(False)
    plain, rows, difference = fuse_and_compare(expanded, example_inputs(cfg))
    kept = {row.before for row in rows if row.status == 'kept'}
    fused = sum(row.status == 'fused' for row in rows)
    report = FuseReport(str(rows), kind, fused, sum(row.status == 'kept' for row in rows), difference, tolerance, out)
    if not fused:
        report.notes.append('there was nothing to fuse')
    if kept:
        report.notes.append(f'kept as they are: {", ".join(sorted(kept))}; the plain config keeps their expand rules')
    relative = difference['float32']['relative']
    if not relative <= tolerance:  # NaN is refused too
        return report

    plain_cfg = plain_config(cfg, plain)
    load_model_state(build_stored(plain_cfg['model'], checkpoint, state), plain.state_dict(), 'the fused model')
    meta.update(cfg=plain_cfg, weights=kind, fused=dict(source=checkpoint.name, modules=fused, difference=difference))
    write_checkpoint(out, plain.state_dict(), meta)
    report.written = True
    return report


def build_stored(cfg: Mapping, checkpoint: str | Path, weights: Mapping) -> nn.Module:
    """The model of a config that came with a checkpoint; ``ValueError`` where that does not go."""
    try:
        with no_larger_than(weights):
            return MODELS.build(copy.deepcopy(dict(cfg)))
    except Exception as error:  # the config is whatever the file says, and so is what its values lead to
        reason = ' '.join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        raise ValueError(f'{checkpoint}: its model config cannot be built: {type(error).__name__}: {reason}') from error


def fuse_and_compare(expanded: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[nn.Module, Report, dict]:
    """The plain model, the report, and by precision the output difference of models fused in that precision."""
    difference, results = {}, {}
    for dtype in (torch.float32, torch.float64):
        before = copy.deepcopy(expanded).to(dtype)
        after = copy.deepcopy(before)
        results[dtype] = after, fuse(after)
        difference[str(dtype).removeprefix('torch.')] = output_difference(before, after, inputs, dtype)
    return *results[torch.float32], difference


def config_of(content: Mapping, config: Mapping | None, checkpoint: Path) -> dict:
    """The config for the content of a checkpoint: the given one, else the one in it, its model reduced to what is safe
    to build.

    Raises:
        ValueError: there is none.
    """
    meta = content.get('meta') or {}
    stored = meta.get('cfg')
    if config is not None:
        cfg = to_plain(config.to_dict() if hasattr(config, 'to_dict') else config, 'config')
        if not isinstance(cfg.get('model'), dict):
            raise ValueError(f'the config for {checkpoint} has no model')
        fill_from_checkpoint(cfg['model'], content)
        if lacks(cfg['model']):
            fill_from_data(cfg, cfg['model'])  # weights from elsewhere do not tell all
        cfg['model'] = without_pretrained(cfg['model'])
        return cfg
    if not isinstance(stored, Mapping) or not isinstance(stored.get('model'), Mapping):
        what = 'its config is text, which would have to be executed' if isinstance(stored, str) else 'it has no config'
        raise ValueError(f'{checkpoint}: {what}; give a config that you trust (--config; in Python the first argument)')
    return {**stored, 'model': trusted_part(stored['model'], str(checkpoint))}


_REFUSED_KEYS = ('_scope_', '_base_', 'custom_imports')  # would import or read code
_DROPPED_KEYS = ('pretrained', 'init_cfg', 'checkpoint', 'checkpoint_path')  # would read files; the weights are here


def trusted_part(cfg, name: str = 'checkpoint'):
    """A model config from a file, reduced to what is safe to build: registered names and plain values.

    Types are looked up in the registries alone (``ewa3d/registry.py`` imports nothing by name). Keys that would read
    other files are dropped: they did their work before the checkpoint was written.

    Raises:
        ValueError: a type that is no plain registered name, or a key that would import code.
    """
    if isinstance(cfg, Mapping):
        kind = cfg.get('type')
        if kind is not None and not (isinstance(kind, str) and re.fullmatch(r'((ewa3d|mmengine)\.)?\w+', kind)):
            raise ValueError(f'{name} was refused: its config names the type {kind!r}; only names that are registered '
                             'in ewa3d are built')
        for key in _REFUSED_KEYS:
            if key in cfg:
                raise ValueError(f'{name} was refused: its model config has the key {key!r}, which would import code')
        return {k: trusted_part(v, name) for k, v in cfg.items() if k not in _DROPPED_KEYS}
    if isinstance(cfg, (list, tuple)):
        return [trusted_part(v, name) for v in cfg]
    return cfg


def plain_config(cfg: Mapping, plain: nn.Module) -> dict:
    """``cfg`` without what training added: ``model.expand`` and the EWA hook. Rules of what ``plain``, the fused model,
    still has are kept, with the hook where that is experts; those that fuse to a form of their own build that one."""
    cfg = copy.deepcopy(dict(cfg))
    model = cfg['model'] = without_pretrained(cfg['model'])
    model.pop('trainable', None)  # adapters by name, which are gone
    rules = model.pop('expand', None) or []
    rules = [rules] if isinstance(rules, Mapping) else rules
    stay = [_stays(rule, plain) for rule in rules]
    left = [rule if stays else dict(rule, fused=True) for rule, stays in zip(rules, stay)
            if stays or _class_of(rule).has_fused_form]
    if left:
        model['expand'] = left
    if next(iter_experts(plain), None) is not None:
        return cfg  # experts that stay are averaged as before
    is_ewa = lambda hook: isinstance(hook, Mapping) and hook.get('type') == 'EWAHook'  # noqa: E731
    for key in ('default_hooks', 'custom_hooks'):
        hooks = cfg.get(key)
        if isinstance(hooks, Mapping):
            cfg[key] = {k: v for k, v in hooks.items() if not is_ewa(v)}
        elif hooks:
            cfg[key] = [v for v in hooks if not is_ewa(v)]
    return cfg


def _class_of(rule: Mapping) -> type[Reparam]:
    return MODELS.get(rule['type']) if isinstance(rule['type'], str) else rule['type']


def _stays(rule: Mapping, plain: nn.Module) -> bool:
    """Whether a module where the rule points is what the rule makes, by itself or multiplied by experts that stay."""
    cls, place = _class_of(rule), glob(rule['at'])
    found = (module for name, module in plain.named_modules() if place.fullmatch(name))
    return any(isinstance(m, cls) or (isinstance(m, Experts) and isinstance(m.body(), cls)) for m in found)


def example_inputs(cfg: Mapping, batch_size: int = 2, seed: int = 0,
                   num_points: int | None = None) -> dict[str, Tensor]:
    """Generated inputs of the shapes that the model of ``cfg`` takes: noisy ellipsoids in the unit ball, images of
    noise.

    Shape:
        - ``points``: ``(batch_size, N, 3 + F)``, ``N`` is ``num_points`` or that of the test or training pipeline (else
          1024), ``F`` from the tokenizer.
        - ``category``: ``(batch_size,)`` int64, where the neck is told.
        - ``img``: ``(batch_size, C, H, W)``, from the backbone, where it is for images.
        - ``video``: ``(batch_size, T, C, H, W)``, where it is for clips; ``points`` then ``(batch_size, T, N, 3 + F)``.
    """
    shape = image_shape(cfg['model'].get('backbone') or {})
    frames = clip_length(cfg['model'].get('backbone') or {})
    if frames is not None:
        return _clips(cfg, shape, frames, batch_size, seed, num_points)
    if shape is None:
        return _clouds(cfg, batch_size, seed, num_points)
    img = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(seed))
    takes_points = any(kind == 'PointPatchEmbed' for _, kind in _items(cfg['model'].get('backbone') or {}))
    return dict(_clouds(cfg, batch_size, seed, num_points), img=img) if takes_points else dict(img=img)


def image_shape(backbone: Mapping) -> tuple[int, int, int] | None:
    """``(C, H, W)`` of the images that a backbone's config takes; ``None`` where it takes none."""
    if backbone.get('type') in ('TimmBackbone', 'TimmVideoBackbone'):
        from timm.models import get_pretrained_cfg
        channels, *size = getattr(get_pretrained_cfg(str(backbone.get('name'))), 'input_size', (3, 224, 224))
        size, channels = backbone.get('img_size') or size, backbone.get('in_chans', channels)
    else:
        found = [v for _, v in _items({'': backbone}) if isinstance(v, Mapping)
                 and v.get('type') in ('ImagePatchEmbed', 'SequenceEncoder', 'VideoPatchEmbed')]
        if not found:
            return None
        size, channels = found[0].get('img_size', 224), found[0].get('in_channels', 3)
    return (channels, *(size if isinstance(size, (list, tuple)) else (size, size)))


def clip_length(backbone: Mapping) -> int | None:
    """The number of frames of the clips that a backbone's config takes; ``None`` where it takes single ones."""
    clips = [v for _, v in _items({'': backbone}) if isinstance(v, Mapping)
             and v.get('type') in ('TimmVideoBackbone', 'VideoPatchEmbed', 'PointClipEmbed')]
    return clips[0].get('num_frames', 8) if clips else None


def _clips(cfg: Mapping, shape: tuple[int, int, int] | None, frames: int, batch_size: int, seed: int,
           num_points: int | None) -> dict:
    if shape is None:
        clouds = _clouds(cfg, batch_size * frames, seed, num_points)
        return dict(clouds, points=clouds['points'].unflatten(0, (batch_size, frames)))
    generator = torch.Generator().manual_seed(seed)
    return dict(video=torch.randn(batch_size, frames, *shape, generator=generator))


def _clouds(cfg: Mapping, batch_size: int, seed: int, num_points: int | None) -> dict[str, Tensor]:
    loader = cfg.get('test_dataloader') or cfg.get('train_dataloader') or {}  # pretraining has no test
    sizes = [v for k, v in _items(loader) if k == 'num_points' and isinstance(v, int)]
    tokenizer = (cfg['model'].get('backbone') or {}).get('tokenizer') or {}
    channels = [v for k, v in _items(tokenizer) if k == 'in_channels' and isinstance(v, int)]
    size, width = num_points or max(sizes, default=1024), max(channels, default=3)
    if not (1 <= size <= 2**20 and 3 <= width <= 1024):
        raise ValueError(f'the config asks for clouds of {size} points with {width} channels')
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(batch_size, size, width, generator=generator)
    radius = points[..., :3].norm(dim=-1, keepdim=True)
    scale = 0.3 + 0.7 * torch.rand(batch_size, 1, 3, generator=generator)
    points[..., :3] = points[..., :3] / radius * scale * (0.95 + 0.05 * radius / radius.amax(1, keepdim=True))
    categories = (cfg['model'].get('neck') or {}).get('num_categories')
    return dict(points=points, category=torch.arange(batch_size) % categories) if categories else dict(points=points)


def _items(tree) -> Iterator[tuple]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield key, value
            yield from _items(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _items(value)


@torch.no_grad()
def output_difference(one: nn.Module, other: nn.Module, inputs: Mapping[str, Tensor],
                      dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The largest difference of two models' raw outputs: ``absolute``, and ``relative`` to the largest output."""
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    first, second = (list(_tensors(_evaluate(copy.deepcopy(model).to(dtype), inputs))) for model in (one, other))
    absolute = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
    largest = max(float(a.abs().max()) for a in first)
    return dict(absolute=absolute, relative=absolute / max(largest, torch.finfo(dtype).tiny))


def _evaluate(model: nn.Module, inputs: Mapping[str, Tensor]):
    """The raw output in eval mode; what is drawn at random (masks) is the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model.eval()(inputs, mode='tensor')


def _tensors(output) -> Iterator[Tensor]:
    """The floating-point tensors of an output; numbers of tokens and the like have no size to compare."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    else:
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)
