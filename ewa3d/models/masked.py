"""Point-MAE's pretraining (Pang et al. 2022): masked patches are reconstructed from the visible ones."""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.serialize import refuse_order
from ewa3d.layers.tokenizers import PointPatchEmbed, points_of
from ewa3d.models.backbone import TransformerStack
from ewa3d.models.base import ExpandableModel, build_module, check_mode, inputs_of
from ewa3d.models.masking import mask_function, mask_parts
from ewa3d.ops import chamfer_distance, gather, nearest_squared, patch_max
from ewa3d.registry import MODELS, nearest
from ewa3d.structures import Sample, Tokens

__all__ = ['MaskedAutoencoder', 'Reconstruction', 'TokenDecoder']

LOSSES = {'cdl1': 'l1', 'cdl2': 'l2'}


class Reconstruction(NamedTuple):
    """Patches of a masked cloud, in coordinates relative to their centres.

    Shape:
        - predicted, target: ``(B, M, K, 3)`` masked patches as reconstructed and as they are.
        - patches: ``(B, G, K, 3)`` all patches; center: ``(B, G, 3)``.
        - visible, masked: ``(B, V)`` and ``(B, M)``, their numbers.
    """
    predicted: Tensor
    target: Tensor
    patches: Tensor
    center: Tensor
    visible: Tensor
    masked: Tensor


class TokenDecoder(TransformerStack):
    """The blocks of a masked autoencoder's decoder; options are those of :class:`TransformerStack`.

    Linear weights are Xavier uniform with zero biases, as Point-MAE's decoder has them (and its encoder has not).
    """

    def __init__(self, embed_dim: int, depth: int, num_heads: int, **options):
        super().__init__()
        self.add_blocks(embed_dim, depth, num_heads, **options)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


@MODELS.register_module()
class MaskedAutoencoder(ExpandableModel):
    """Point-MAE: the encoder sees the visible patches, a small decoder reconstructs the masked ones.

    The keys under ``backbone.`` are those of a classifier's backbone. Rules of ``expand`` reach the encoder
    (``backbone.blocks.*.mlp``) and the decoder (``decoder.blocks.*.mlp``).

    Args:
        backbone: a :class:`~ewa3d.models.backbone.TokenEncoder` or its config; without a class token unless it says so.
        decoder_depth, decoder_num_heads, decoder_mlp_ratio, drop_path_rate: of the decoder, which is as wide as the
            backbone and adds a positional embedding of its own before each block.
        mask_ratio: share of the patches that is masked: ``int(mask_ratio * G)`` of ``G`` in every cloud.
        mask_type: ``'rand'``, or ``'block'`` for a random patch and those nearest to it.
        loss: ``'cdl2'`` or ``'cdl1'``, see :func:`ewa3d.ops.chamfer_distance`.
        group_size: points of a reconstructed patch; the tokenizer's unless given.
        pos_dim: hidden width of the decoder's position MLP.
        expand, pretrained: see :meth:`ExpandableModel.finish`.
        data_preprocessor: ``Preprocessor`` unless given.

    Shape:
        - inputs ``dict(points=(B, N, 3 + F))``; ``mask`` bool ``(B, G)``, True where masked, drawn unless given.
        - returns the stages (``mode='tensor'``, see :meth:`stages`), ``dict(loss_chamfer=())`` (``'loss'``) or samples
          (``'predict'``).

    Raises:
        TypeError, ValueError: a number out of range, a ratio that leaves nothing visible or nothing masked, a mask of
            another shape or with unequal rows, a tokenizer without targets or with patches of another size.
    """
    compiled = 'reconstruct'

    def __init__(self, backbone: dict | nn.Module, decoder_depth: int = 4, decoder_num_heads: int = 6,
                 decoder_mlp_ratio: float = 4., mask_ratio: float = 0.6, mask_type: str = 'rand',
                 drop_path_rate: float = 0.1, loss: str = 'cdl2', group_size: int | None = None, pos_dim: int = 128,
                 expand: Sequence[dict] | None = None, pretrained: str | dict | None = None,
                 data_preprocessor: dict | nn.Module | None = None):
        super().__init__(data_preprocessor)
        if loss not in LOSSES:
            raise ValueError(f'MaskedAutoencoder: loss={loss!r}; {nearest(loss, LOSSES)}')
        self.chamfer_norm = LOSSES[loss]
        self.mask_ratio = check_number('MaskedAutoencoder: mask_ratio', mask_ratio, '(0, 1)')
        self.draw_mask = mask_function(mask_type, ('rand', 'block'))  # equally many of every cloud
        self.backbone = build_module(backbone, cls_token=False)
        refuse_order(self.backbone, 'MaskedAutoencoder')
        self.num_prefix_tokens = getattr(self.backbone, 'num_prefix_tokens', 0)
        tokenizer = getattr(self.backbone, 'tokenizer', None)
        if hasattr(tokenizer, 'num_groups'):
            self._num_masked(tokenizer.num_groups)
        self.group_size = self._points_of_a_patch(tokenizer, group_size)
        width = self.backbone.embed_dim
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        # These two keep torch's own initialisation, as published.
        self.decoder_pos_embed = nn.Sequential(nn.Linear(3, check_integer('MaskedAutoencoder: pos_dim', pos_dim, 1)),
                                               nn.GELU(), nn.Linear(pos_dim, width))
        self.decoder = TokenDecoder(width, decoder_depth, decoder_num_heads, mlp_ratio=decoder_mlp_ratio,
                                    drop_path_rate=drop_path_rate)
        self.increase_dim = nn.Linear(width, 3 * self.group_size)
        self.finish(pretrained, expand)

    # ---- mmengine's calls -------------------------------------------------------------------------------------------
    def forward(self, inputs: dict | Tensor, data_samples: Sequence[Sample] | None = None, mode: str = 'tensor',
                mask: Tensor | None = None):
        check_mode(mode)
        if mode == 'tensor':
            return self.stages(inputs, mask)
        if mode == 'predict':
            return self.predict(inputs, data_samples, mask)
        found = self.reconstruct(inputs, mask)
        predicted, target = found.predicted.flatten(0, 1), found.target.flatten(0, 1)
        return dict(loss_chamfer=chamfer_distance(predicted, target, self.chamfer_norm))

    def predict(self, inputs: dict | Tensor, samples: Sequence[Sample] | None = None,
                mask: Tensor | None = None) -> list[Sample]:
        """The samples with ``visible_points`` ``(V K, 3)``, ``reconstructed_points`` ``(M K, 3)`` and both together,
        ``pred_points`` ``(G K, 3)``: in the coordinates of the cloud, on the CPU."""
        found = self.reconstruct(inputs, mask)
        seen = _placed(_some(found.patches, found.visible), found.center, found.visible)
        made = _placed(found.predicted, found.center, found.masked)
        samples = [Sample() for _ in seen] if samples is None else list(samples)
        for sample, visible, reconstructed in zip(samples, seen, made):
            sample.visible_points, sample.reconstructed_points = visible, reconstructed
            sample.pred_points = torch.cat([visible, reconstructed])
        return samples

    # ---- what they are made of --------------------------------------------------------------------------------------
    def extract(self, points: Tensor | dict) -> Tensor:
        """The feature ``(B, C)`` for a linear classifier: mean plus maximum over all patches, unmasked."""
        x = self.backbone(inputs_of(points))[:, self.num_prefix_tokens:]
        return x.mean(1) + patch_max(x)

    def reconstruct(self, inputs: dict | Tensor, mask: Tensor | None = None) -> Reconstruction:
        """Mask, encode, decode."""
        tokenizer = getattr(self.backbone, 'tokenizer', None)
        if isinstance(tokenizer, PointPatchEmbed):
            center, patches = tokenizer.group(points_of(inputs))
            visible, masked = self._parts(center, mask)
            tokens = tokenizer.embed(center, patches, visible)  # masked patches are spared the last layers
            x, pos = tokens.x, tokens.pos
        else:
            tokens = self.backbone.tokenize(inputs)
            visible, masked = self._parts(tokens.coord, mask)
            x, pos = gather(tokens.x, visible), gather(tokens.pos, visible)
        patches = self._targets(tokens)
        encoded = self.backbone.encode(x, pos)[:, self.num_prefix_tokens:]
        x, pos = self._decoder_input(encoded, tokens.coord, visible, masked)
        decoded = self.decoder.norm(self.decoder.run(x, pos, norm=False)[:, visible.shape[1]:])
        return Reconstruction(self._points(decoded), _some(patches, masked), patches, tokens.coord, visible, masked)

    def stages(self, inputs: dict | Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """What a step computes, by stage.

        ``center``, ``neighborhood`` (patches), ``patch_tokens``; ``encoder_block_i`` and, after the norm,
        ``encoder_visible``; ``decoder_block_i`` (visible tokens first), ``decoder_masked``; ``reconstructed_points``
        and ``target_points`` ``(B, M, K, 3)``; ``loss``, ``loss_cdl2``, ``loss_cdl1``; by patch
        ``chamfer_d2_pred_to_gt`` ``(B M, K)`` and ``chamfer_d2_gt_to_pred_mean_per_patch`` ``(B M,)``.
        """
        tokens, prefix = self.backbone.tokenize(inputs), self.num_prefix_tokens
        visible, masked = self._parts(tokens.coord, mask)
        patches = self._targets(tokens)
        found = dict(center=tokens.coord, neighborhood=patches, patch_tokens=tokens.x)
        encoder = self.backbone.encode(gather(tokens.x, visible), gather(tokens.pos, visible),
                                       out_indices=range(len(self.backbone.blocks)), norm=False)
        found.update((f'encoder_block_{i}', x[:, prefix:]) for i, x in enumerate(encoder))
        found['encoder_visible'] = self.backbone.norm(encoder[-1])[:, prefix:]
        x, pos = self._decoder_input(found['encoder_visible'], tokens.coord, visible, masked)
        decoder = self.decoder.run(x, pos, out_indices=range(len(self.decoder.blocks)), norm=False)
        found.update((f'decoder_block_{i}', x) for i, x in enumerate(decoder))
        found['decoder_masked'] = self.decoder.norm(decoder[-1][:, visible.shape[1]:])
        found['reconstructed_points'] = self._points(found['decoder_masked'])
        found['target_points'] = _some(patches, masked)
        predicted, target = found['reconstructed_points'].flatten(0, 1), found['target_points'].flatten(0, 1)
        found.update((f'loss_{name}', chamfer_distance(predicted, target, norm)) for name, norm in LOSSES.items())
        return dict(found, loss=chamfer_distance(predicted, target, self.chamfer_norm),
                    chamfer_d2_pred_to_gt=nearest_squared(predicted, target),
                    chamfer_d2_gt_to_pred_mean_per_patch=nearest_squared(target, predicted).mean(1))

    def _decoder_input(self, encoded: Tensor, center: Tensor, visible: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and positions ``(B, G, C)``, the visible ones first."""
        blank = self.mask_token.expand(*masked.shape, -1).to(encoded.dtype)
        pos = gather(self.decoder_pos_embed(center), torch.cat([visible, masked], 1))
        return torch.cat([encoded, blank], 1), pos

    def _points(self, decoded: Tensor) -> Tensor:
        return self.increase_dim(decoded).unflatten(-1, (self.group_size, 3))  # (B, M, K, 3)

    # ---- checks -----------------------------------------------------------------------------------------------------
    @staticmethod
    def _points_of_a_patch(tokenizer: nn.Module | None, given: int | None) -> int:
        own = getattr(tokenizer, 'group_size', None)
        if own is None and given is None:
            raise ValueError(f'MaskedAutoencoder: the tokenizer, a {type(tokenizer).__name__}, does not say how many '
                             'points a patch has: give group_size')
        if None not in (own, given) and own != given:
            raise ValueError(f"MaskedAutoencoder: group_size={given}, but the tokenizer's patches have {own} points")
        return check_integer('MaskedAutoencoder: group_size', own if given is None else given, 1)

    def _num_masked(self, num_groups: int) -> int:
        count = int(self.mask_ratio * num_groups)
        if not 0 < count < num_groups:
            raise ValueError(f'MaskedAutoencoder: mask_ratio={self.mask_ratio} masks {count} of {num_groups} patches; '
                             'at least one masked and one visible patch were expected')
        return count

    def _parts(self, center: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The numbers of the visible and of the masked patches, by a given mask or a new one."""
        if mask is None:
            count = self._num_masked(center.shape[1])
            return mask_parts(self.draw_mask(center, self.mask_ratio), count)
        shape = tuple(center.shape[:2])
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
            found = f'{mask.dtype} {tuple(mask.shape)}' if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f'MaskedAutoencoder: mask must be a bool tensor of the shape {shape}, True where masked, '
                             f'got {found}')
        counts = sorted(set(mask.sum(1).tolist()))  # waits for the device, for a given mask only
        if len(counts) > 1:
            raise ValueError(f'MaskedAutoencoder: mask must mask equally many patches of every cloud, got {counts}')
        if counts[0] in (0, shape[1]):
            raise ValueError(f'MaskedAutoencoder: mask masks {counts[0]} of {shape[1]} patches; at least one masked '
                             'and one visible patch were expected')
        return mask_parts(mask.to(center.device), counts[0])

    def _targets(self, tokens: Tokens) -> Tensor:
        target, expected = tokens.target, (*tokens.coord.shape[:2], self.group_size, 3)
        if target is None:
            raise ValueError(f'MaskedAutoencoder: the backbone ({type(self.backbone).__name__}) gives no targets: its '
                             'tokenizer must return Tokens with the patches as target')
        if target.shape != expected:
            raise ValueError(f'MaskedAutoencoder: target patches of the shape {expected} were expected, the tokenizer '
                             f'gives {tuple(target.shape)}')
        return target


def _some(patches: Tensor, numbers: Tensor) -> Tensor:
    """Patches by number: ``(B, G, K, 3)`` and ``(B, V)`` to ``(B, V, K, 3)``."""
    return gather(patches.flatten(2), numbers).unflatten(-1, patches.shape[2:])


def _placed(patches: Tensor, center: Tensor, numbers: Tensor) -> Tensor:
    """The points ``(B, V K, 3)`` of patches ``(B, V, K, 3)``, at their centres, on the CPU."""
    return (patches.float() + gather(center, numbers).unsqueeze(2)).flatten(1, 2).detach().cpu()
