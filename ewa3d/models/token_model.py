"""Point-BERT's pretraining: codes of masked patches are predicted, mixtures of clouds are recognised."""
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.block import init_vit
from ewa3d.layers.serialize import refuse_order
from ewa3d.layers.tokenizers import points_of
from ewa3d.models.base import ExpandableModel, build_module, check_mode
from ewa3d.models.contrast import KeyNetwork, enqueue, gather_keys, mask_tokens, mixed_contrast, moco_contrast
from ewa3d.models.dvae import DiscreteVAE, at_least_single, code_usage, count_codes
from ewa3d.models.masking import mask_function
from ewa3d.ops import gather
from ewa3d.registry import MODELS, nearest
from ewa3d.structures import Sample

__all__ = ['Draws', 'MaskedTokenModel']


class Draws(NamedTuple):
    """What a step draws at random; each may be given instead.

    Shape:
        - mask, mask_mixed, mask_k: ``(B, G)`` bool, True is masked: of the real and of the mixed clouds, and of the
          real ones in the key network.
        - mixup_ratio: ``(B,)`` in [0, 1]; mixup_uniform: ``(B, G)`` in [0, 1]. A group keeps its own patch where
          ``mixup_uniform < mixup_ratio`` and takes that of the cloud at the mirrored position of the batch elsewhere.
    """
    mask: Tensor
    mask_mixed: Tensor
    mask_k: Tensor
    mixup_ratio: Tensor
    mixup_uniform: Tensor

    @property
    def masks(self) -> Tensor:
        """Of the real clouds and, after them, of the mixed ones: ``(2 B, G)``."""
        return torch.cat([self.mask, self.mask_mixed])

    def with_mixed(self, x: Tensor) -> Tensor:
        """What belongs to the groups of the real clouds, and after it what belongs to those of the mixed ones:
        ``(B, G, ...)`` to ``(2 B, G, ...)``."""
        return torch.cat([x, mix(x, self.mixup_ratio, self.mixup_uniform)])


@MODELS.register_module()
class MaskedTokenModel(ExpandableModel):
    """Point-BERT's pretraining (Yu et al. 2022) of a :class:`~ewa3d.models.backbone.TokenEncoder`.

    A frozen :class:`~ewa3d.models.dvae.DiscreteVAE` labels each patch with a code. Masked patches of a cloud, and of a
    mixture of its patches with those of the cloud at the mirrored position of the batch, have to be labelled from the
    rest; the class token of the mixture has to be like the keys of both clouds. Keys are class tokens from a network
    that follows this one by momentum, and a queue holds those of earlier steps.

    The keys under ``backbone.`` are those of a task model. The checkpoint also holds the tokenizer (``dvae.``), which
    is never trained, the key network (``momentum.``), which is always plain, follows the mean of experts and is moved
    at each ``'loss'`` in training, and the queue, so that a resumed run goes on exactly.

    Where this differs from the published code: the mini-PointNet sees each patch once a step, not again in the mixture,
    so in training its batch norms see the real clouds alone; there is no random replacement of tokens (its probability
    is 0 there); and the queue's length need not be a multiple of the batch.

    Args:
        backbone: with a class token and a tokenizer of points; config or module.
        dvae: config or module of the tokenizer. Grouping is that of the backbone, and filled in where the config leaves
            it out. Its ``pretrained`` is loaded strictly.
        cls_dim: width of the contrasted features.
        mask_ratio: share of a cloud's patches, one number or the ``(low, high)`` of a uniform distribution.
        mask_type: ``'block'``, the patches nearest to a random one; ``'rand'``, as many at random; or ``'iid'``, each
            by itself with the ratio as its probability (published as ``mask_rand``).
        contrast: with the mixed contrast.
        moco: with a contrast of the real clouds as well.
        temperature: of both contrasts.
        key_momentum: share of itself that the key network keeps in a step.
        queue_size: number of keys in the queue.
        init_encoder: start from the tokenizer's mini-PointNet, where ``dvae`` has weights.
        expand, pretrained, data_preprocessor: see :class:`~ewa3d.models.base.ExpandableModel`. With a contrast, what
            rules expand has to fuse into plain modules, which the key network follows.

    Shape:
        - inputs ``dict(points=(B, N, 3 + F))``; draws as in :class:`Draws`, ``mask`` by name and the others by name or
          as a dict ``noise``.
        - ``'loss'``: ``loss_mpm_real``, ``loss_mpm_mixed``, ``loss_mixed_contrast``, ``loss_moco`` and statistics.
        - ``'predict'``: samples with ``masked``, ``pred_tokens`` and, from the tokenizer, ``gt_tokens``, each ``(G,)``.
        - ``'tensor'``: every stage by name, see :meth:`stages`; nothing is moved.

    Raises:
        TypeError, ValueError: a backbone without class token or groups, a tokenizer of other sizes than its weights or
            the backbone's patches, a mask of another shape, a ratio or size out of range.
    """
    compiled = 'features'

    def __init__(self, backbone: dict | nn.Module, dvae: dict | nn.Module, cls_dim: int = 512,
                 mask_ratio: float | Sequence[float] = (0.25, 0.45), mask_type: str = 'block', contrast: bool = True,
                 moco: bool = False, temperature: float = 0.07, key_momentum: float = 0.999, queue_size: int = 16384,
                 init_encoder: bool = True, expand: Sequence[dict] | None = None, pretrained: str | dict | None = None,
                 data_preprocessor: dict | nn.Module | None = None):
        super().__init__(data_preprocessor)
        self.make_mask, self.mask_type = mask_function(mask_type), mask_type
        self.contrast, self.moco = contrast, moco
        self.temperature = check_number('MaskedTokenModel: temperature', temperature, '(0, inf)')
        self.key_momentum = check_number('MaskedTokenModel: key_momentum', key_momentum)
        self.backbone = _checked_backbone(build_module(backbone))
        self.mask_ratio = _checked_ratio(mask_ratio, self.backbone.tokenizer.num_groups)
        self.dvae, self._has_labels = _build_dvae(dvae, self.backbone.tokenizer)
        width, cls_dim = self.backbone.embed_dim, check_integer('MaskedTokenModel: cls_dim', cls_dim, 1)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.lm_head = nn.Linear(width, self.dvae.num_tokens).apply(init_vit)
        self.cls_head = nn.Sequential(nn.Linear(width, cls_dim), nn.GELU(), nn.Linear(cls_dim, cls_dim)).apply(init_vit)
        self.cls_head.requires_grad_(contrast or moco)
        if init_encoder and self._has_labels:
            _copy_encoder(self.backbone.tokenizer, self.dvae)
        queue_size = check_integer('MaskedTokenModel: queue_size', queue_size, 1)
        self.register_buffer('queue', F.normalize(torch.randn(cls_dim, queue_size), dim=0))
        self.register_buffer('queue_ptr', torch.zeros(1, dtype=torch.int64))
        self.momentum = KeyNetwork(self)
        self.finish(pretrained, expand)
        if contrast or moco:
            followed = self.momentum.followed(self)  # an expansion that the key network cannot follow is found now
            if pretrained and not any(key.startswith('momentum.') for key in self.load_report.matched):
                own = {**self.state_dict(), **followed}
                self.momentum.load_state_dict({name: own[name] for name in self.momentum.state_dict()})

    def train(self, mode: bool = True):
        """As usual, but for the tokenizer, which stays in eval mode."""
        super().train(mode)
        self.dvae.eval()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._has_labels |= f'{prefix}dvae.codebook' in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- parts -------------------------------------------------------------------------------------------------------
    def extract(self, points: Tensor | dict) -> Tensor:
        """The projected class token of whole clouds, ``(B, cls_dim)``: what the published linear SVM classifies."""
        tokens = self.backbone.tokenize(points)
        return self.cls_head(self.backbone.encode(tokens.x, tokens.pos)[:, 0])

    def features(self, center: Tensor, patches: Tensor, drawn: Draws, **options) -> Tensor:
        """Features ``(2 B, 1 + G, C)`` of the masked real clouds and, after them, of the masked mixed ones; options are
        those of the backbone's ``encode``."""
        tokens = self.backbone.tokenizer.embed(center, patches)
        x, pos = drawn.with_mixed(tokens.x), drawn.with_mixed(tokens.pos)
        return self.backbone.encode(mask_tokens(x, drawn.masks, self.mask_token), pos, **options)

    def scores(self, center: Tensor, patches: Tensor) -> Tensor:
        """The tokenizer's scores of all codes for each patch, ``(B, G, num_tokens)``, in single precision."""
        with torch.no_grad(), torch.autocast(center.device.type, enabled=False):
            return self.dvae.scores(center, patches[..., :3])

    def draw(self, center: Tensor, given: Mapping[str, Tensor | None]) -> Draws:
        """What is random in a step, where it is not ``given``."""
        B, G = center.shape[:2]
        found = {}
        for name in Draws._fields:
            value, shape = given.get(name), (B,) if name == 'mixup_ratio' else (B, G)
            if value is None:
                continue
            _check_draw(name, value, shape)
            found[name] = value.to(center.device)
        for name, shape in (('mixup_ratio', (B,)), ('mixup_uniform', (B, G))):
            if name not in found:
                found[name] = torch.rand(shape, device=center.device)
        mixed = mix(center, found['mixup_ratio'], found['mixup_uniform'])
        low, high = self.mask_ratio
        for name, coord in (('mask', center), ('mask_mixed', mixed), ('mask_k', center)):
            if name not in found:
                ratio = low + (high - low) * torch.rand(B, dtype=torch.float64, device=center.device)
                found[name] = self.make_mask(coord, ratio)
        return Draws(**found)

    def keys(self, center: Tensor, patches: Tensor, mask: Tensor, move: bool) -> Tensor:
        """The keys ``(B, cls_dim)``, not normalised, of the key network one momentum step further; ``move``: it stays
        there."""
        return self.momentum.keys(self, self.key_momentum, center, patches, mask, move=move)

    # ---- mmengine's calls --------------------------------------------------------------------------------------------
    def forward(self, inputs: dict | Tensor, data_samples: Sequence[Sample] | None = None, mode: str = 'tensor',
                mask: Tensor | None = None, noise: Mapping[str, Tensor] | None = None, **draws: Tensor):
        check_mode(mode)
        if not isinstance(noise, Mapping | None):
            raise TypeError(f'MaskedTokenModel: noise must be a dict with some of {", ".join(Draws._fields)}, got '
                            f'{type(noise).__name__}')
        given = {'mask': mask, **(noise or {}), **draws}
        for name in given:
            if name not in Draws._fields:
                raise TypeError(f'MaskedTokenModel draws no {name!r}; {nearest(name, Draws._fields)}')
        center, patches = self.backbone.tokenizer.group(points_of(inputs))
        drawn = self.draw(center, given)
        if mode == 'predict':
            return self.predict(center, patches, drawn.mask, data_samples)
        if mode == 'loss':
            unbounded = self.mask_type == 'iid' or any(given.get(name) is not None for name in ('mask', 'mask_mixed'))
            most = None if unbounded else int(self.mask_ratio[1] * center.shape[1])
            return self.loss(center, patches, drawn, most)
        return self.stages(points_of(inputs), center, patches, drawn)

    def loss(self, center: Tensor, patches: Tensor, drawn: Draws, most: int | None = None) -> dict[str, Tensor]:
        """One step: losses and statistics; in training, the key network and the queue move.

        Args:
            most: an upper bound of the number of masked patches of a cloud.
        """
        if self.training and not self._has_labels:
            print_log('the dvae was never trained: dvae.pretrained names no weights, and its labels mean nothing',
                      logger='current', level=logging.WARNING)
            self._has_labels = True  # said once
        labels = self.scores(center, patches).argmax(-1)
        x = self.features(center, patches, drawn)
        losses = self._token_losses(x[:, 1:], drawn.with_mixed(labels), drawn.masks, most)
        if self.contrast or self.moco:
            keys = self.keys(center, patches, drawn.mask_k, move=self.training)
            losses.update(self._contrast_losses(self.cls_head(x[:, 0]), keys, drawn.mixup_ratio))
            if self.training:
                self.queue, self.queue_ptr = self._enqueued(keys)
        used, perplexity = code_usage(count_codes(labels, self.dvae.num_tokens))
        return dict(losses, codes_used=used, code_perplexity=perplexity)

    def _token_losses(self, x: Tensor, labels: Tensor, mask: Tensor, most: int | None) -> dict[str, Tensor]:
        """Cross entropy at masked patches; the masked ones of a cloud come first and the rest, which is there because
        clouds have different numbers of them, is ignored. Nothing waits for the device."""
        order = mask.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        scores = at_least_single(self.lm_head(gather(x, order)))  # (2 B, most, num_tokens)
        labels = labels.masked_fill(~mask, -100).gather(1, order)
        real, mixed = (F.cross_entropy(s.flatten(0, 1), t.flatten(), reduction='sum') / _count(t)
                       for s, t in zip(scores.chunk(2), labels.chunk(2)))
        hits = (scores.detach().argmax(-1) == labels).sum() / _count(labels)
        return dict(loss_mpm_real=real, loss_mpm_mixed=mixed, acc_masked=100 * hits)

    def _contrast_losses(self, projected: Tensor, keys: Tensor, ratio: Tensor) -> dict[str, Tensor]:
        losses = {}
        with torch.autocast(projected.device.type, enabled=False):
            (real, mixed), keys = self._unit(projected).chunk(2), self._unit(keys)
            if self.contrast:
                losses['loss_mixed_contrast'] = mixed_contrast(mixed, keys, self.queue, ratio, self.temperature)
            if self.moco:
                losses['loss_moco'] = moco_contrast(real, keys, self.queue, self.temperature)
        return losses

    def _enqueued(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        return enqueue(self.queue, self.queue_ptr, gather_keys(self._unit(keys)))

    def _unit(self, x: Tensor) -> Tensor:
        return F.normalize(x.to(self.queue.dtype), dim=1)

    @torch.no_grad()
    def predict(self, center: Tensor, patches: Tensor, mask: Tensor,
                samples: Sequence[Sample] | None = None) -> list[Sample]:
        """The samples with ``gt_tokens``, ``pred_tokens`` and ``masked``, on the CPU."""
        tokens = self.backbone.tokenizer.embed(center, patches)
        x = self.backbone.encode(mask_tokens(tokens.x, mask, self.mask_token), tokens.pos)
        found = dict(gt_tokens=self.scores(center, patches).argmax(-1).cpu(), masked=mask.cpu(),
                     pred_tokens=self.lm_head(x[:, 1:]).argmax(-1).cpu())
        samples = [Sample() for _ in center] if samples is None else list(samples)
        for i, sample in enumerate(samples):
            sample.set_data({name: values[i] for name, values in found.items()})
        return samples

    def stages(self, points: Tensor, center: Tensor, patches: Tensor, drawn: Draws) -> dict[str, Tensor]:
        """What a step computes, by name, without moving anything.

        ``eval_cls_feature`` (:meth:`extract`), ``center``, ``dvae_logits``, ``dvae_label``; ``block_{i}`` (before the
        norm), ``cls_q``, ``logits_masked``, ``logits_unmasked`` of the real clouds; ``mixed_`` blocks, ``cls_q``,
        ``logits_masked``, ``center`` and ``label``; every loss; and with a contrast ``cls_k``, of the key network after
        a momentum step, ``queue_after`` and ``queue_ptr_after``.
        """
        scores, mask = self.scores(center, patches), drawn.masks
        labels = drawn.with_mixed(scores.argmax(-1))
        blocks = self.features(center, patches, drawn, out_indices=range(len(self.backbone.blocks)), norm=False)
        x = self.backbone.norm(blocks[-1])
        projected, logits = self.cls_head(x[:, 0]), self.lm_head(x[:, 1:])
        found = dict(eval_cls_feature=self.extract(points), center=center, dvae_logits=scores,
                     **self._token_losses(x[:, 1:], labels, mask, None))
        if self.contrast or self.moco:
            found['cls_k'] = keys = self.keys(center, patches, drawn.mask_k, move=False)
            found.update(self._contrast_losses(projected, keys, drawn.mixup_ratio))
            found['queue_after'], found['queue_ptr_after'] = self._enqueued(keys)
        found['loss_moco_plus_mpm'] = sum(value for name, value in found.items() if name.startswith('loss_m')
                                          and name != 'loss_mixed_contrast')
        for i, block in enumerate(blocks):
            found[f'block_{i}'], found[f'mixed_block_{i}'] = block.chunk(2)
        (real, mixed), (real_mask, mixed_mask) = logits.chunk(2), mask.chunk(2)
        found.update(logits_masked=real[real_mask], logits_unmasked=real[~real_mask],
                     mixed_logits_masked=mixed[mixed_mask], mixed_center=drawn.with_mixed(center)[len(center):])
        found['dvae_label'], found['mixed_label'] = labels.chunk(2)
        found['cls_q'], found['mixed_cls_q'] = projected.chunk(2)
        return found


def _count(labels: Tensor) -> Tensor:
    """How many patches are labelled, at least 1: masks of independent draws can be empty."""
    return (labels >= 0).sum().clamp(min=1)


def mix(x: Tensor, ratio: Tensor, uniform: Tensor) -> Tensor:
    """Groups ``(B, G, ...)`` of each cloud, some replaced by those of the cloud at the mirrored position."""
    own = (uniform < ratio.unsqueeze(1)).view(*x.shape[:2], *[1] * (x.ndim - 2))
    return torch.where(own, x, x.flip(0))


def _check_draw(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    is_mask = name.startswith('mask')
    if not isinstance(value, Tensor) or value.shape != shape or is_mask != (value.dtype == torch.bool):
        got = f'{value.dtype} {tuple(value.shape)}' if isinstance(value, Tensor) else type(value).__name__
        kind = 'bool tensor, True where masked,' if is_mask else 'tensor of numbers'
        raise ValueError(f'MaskedTokenModel: {name} must be a {kind} of the shape {shape}, got {got}')
    if name in ('mask', 'mask_mixed') and not value.any():  # waits for the device, for a given mask only
        raise ValueError(f'MaskedTokenModel: {name} masks no patch at all; there is nothing to predict')


def _checked_backbone(backbone: nn.Module) -> nn.Module:
    if getattr(backbone, 'num_prefix_tokens', 0) != 1:
        raise ValueError('MaskedTokenModel: the backbone needs a class token (cls_token=True), whose feature is '
                         'contrasted')
    tokenizer = getattr(backbone, 'tokenizer', None)
    if not (hasattr(tokenizer, 'group') and hasattr(tokenizer, 'embed')):
        raise ValueError('MaskedTokenModel: a backbone whose tokenizer groups points was expected (PointPatchEmbed), '
                         f'got {type(tokenizer).__name__}, which gives no patches to label')
    refuse_order(backbone, 'MaskedTokenModel')
    return backbone


def _checked_ratio(ratio: float | Sequence[float], num_groups: int) -> tuple[float, float]:
    low, high = ratio if isinstance(ratio, Sequence) and len(ratio) == 2 else (ratio, ratio)
    for value in (low, high):
        check_number('MaskedTokenModel: mask_ratio', value, '(0, 1)')
    if low > high or int(low * num_groups) < 1:
        raise ValueError(f'MaskedTokenModel: mask_ratio is a share or a range (low, high) of shares that mask at least '
                         f'one of num_groups={num_groups} patches, got {ratio!r}')
    return float(low), float(high)


def _build_dvae(cfg: dict | nn.Module, tokenizer: nn.Module) -> tuple[nn.Module, bool]:
    """The frozen tokenizer, and whether it has weights."""
    has_weights = True
    if isinstance(cfg, Mapping):
        cfg, has_weights = dict(cfg), bool(cfg.get('pretrained'))
        if isinstance(cfg.get('pretrained'), str):
            cfg['pretrained'] = dict(source=cfg['pretrained'], strict=True)
    dvae = build_module(cfg, num_groups=tokenizer.num_groups, group_size=tokenizer.group_size,
                        skip_origin=tokenizer.skip_origin)
    if not isinstance(dvae, DiscreteVAE):
        raise TypeError(f'MaskedTokenModel: dvae must be a DiscreteVAE or its config, got {type(dvae).__name__}')
    if dvae.group_size != tokenizer.group_size:
        raise ValueError(f'MaskedTokenModel: the dvae labels patches of group_size={dvae.group_size}, the backbone has '
                         f'patches of group_size={tokenizer.group_size}')
    return dvae.eval().requires_grad_(False), has_weights


def _copy_encoder(tokenizer: nn.Module, dvae: nn.Module) -> None:
    own, given = ({name: tuple(value.shape) for name, value in module.encoder.state_dict().items()}
                  for module in (tokenizer, dvae))
    if own != given:
        name = next(name for name in (*own, *given) if own.get(name) != given.get(name))
        raise ValueError(f'init_encoder: the mini-PointNet {name} of the backbone is {own.get(name)}, that of the dvae '
                         f'{given.get(name)}: give the tokenizer encoder_dim and widths of the dvae, or '
                         'init_encoder=False')
    tokenizer.encoder.load_state_dict(dvae.encoder.state_dict())
