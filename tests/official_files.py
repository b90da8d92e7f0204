"""State dicts with the names and shapes of the published projects, of any size, and a naive forward of a classifier."""
from itertools import pairwise

import torch
import torch.nn.functional as F

__all__ = ['classifier', 'dvae', 'linear', 'logits', 'pretrain', 'vit']


def linear(prefix: str, inputs: int, outputs: int, *ones: int, bias: bool = True) -> dict:
    state = {f'{prefix}.weight': torch.randn(outputs, inputs, *ones) / inputs ** 0.5}
    return {**state, f'{prefix}.bias': torch.randn(outputs) * 0.1} if bias else state


def norm(prefix: str, width: int, batch: bool = False) -> dict:
    state = {f'{prefix}.weight': 1 + 0.1 * torch.randn(width), f'{prefix}.bias': torch.randn(width) * 0.1}
    if batch:
        state.update({f'{prefix}.running_mean': torch.randn(width) * 0.2,
                      f'{prefix}.running_var': torch.rand(width) + 0.5,
                      f'{prefix}.num_batches_tracked': torch.tensor(7)})
    return state


def pointnet(prefix: str, outputs: int, widths=(128, 256, 512)) -> dict:
    a, b, c = widths
    return {**linear(f'{prefix}.first_conv.0', 3, a, 1), **norm(f'{prefix}.first_conv.1', a, True),
            **linear(f'{prefix}.first_conv.3', a, b, 1), **linear(f'{prefix}.second_conv.0', 2 * b, c, 1),
            **norm(f'{prefix}.second_conv.1', c, True), **linear(f'{prefix}.second_conv.3', c, outputs, 1)}


def blocks(prefix: str, width: int, depth: int, hidden: int | None = None) -> dict:
    state = {}
    for i in range(depth):
        at = f'{prefix}.{i}'
        state.update({**norm(f'{at}.norm1', width), **norm(f'{at}.norm2', width),
                      **linear(f'{at}.mlp.fc1', width, hidden or 4 * width),
                      **linear(f'{at}.mlp.fc2', hidden or 4 * width, width),
                      **linear(f'{at}.attn.qkv', width, 3 * width, bias=False),
                      **linear(f'{at}.attn.proj', width, width)})
    return state


def vit(prefix: str, width: int, depth: int, encoder: int | None = None, cls: bool = True, widths=(128, 256, 512),
        hidden: int | None = None, pos: int = 128) -> dict:
    """The encoder of both projects; ``encoder`` is the patch feature's width where there is a ``reduce_dim``."""
    state = {**pointnet(f'{prefix}encoder', encoder or width, widths), **linear(f'{prefix}pos_embed.0', 3, pos),
             **linear(f'{prefix}pos_embed.2', pos, width), **blocks(f'{prefix}blocks.blocks', width, depth, hidden),
             **norm(f'{prefix}norm', width)}
    if encoder:
        state.update(linear(f'{prefix}reduce_dim', encoder, width))
    if cls:
        state.update({f'{prefix}cls_token': torch.randn(1, 1, width), f'{prefix}cls_pos': torch.randn(1, 1, width)})
    return state


def classifier(width=36, depth=2, classes=7, encoder: int | None = None, **options) -> dict:
    """Point-MAE's, or with ``encoder`` Point-BERT's."""
    head = 'cls_head_finetune'
    if encoder:
        layers = {**linear(f'{head}.0', 2 * width, 256), **linear(f'{head}.3', 256, classes)}
    else:
        layers = {**linear(f'{head}.0', 2 * width, 256), **norm(f'{head}.1', 256, True),
                  **linear(f'{head}.4', 256, 256), **norm(f'{head}.5', 256, True), **linear(f'{head}.8', 256, classes)}
    return {**vit('', width, depth, encoder, **options), **layers}


def pretrain(width=36, depth=2, decoder_depth=1, group_size=6) -> dict:
    """Point-MAE's."""
    return {'mask_token': torch.randn(1, 1, width), **vit('MAE_encoder.', width, depth, cls=False),
            **linear('decoder_pos_embed.0', 3, 128), **linear('decoder_pos_embed.2', 128, width),
            **blocks('MAE_decoder.blocks', width, decoder_depth), **norm('MAE_decoder.norm', width),
            **linear('increase_dim.0', width, 3 * group_size, 1)}


def dvae(prefix: str = '', group_size=8, encoder=16, tokens=20, token=12, decoder=16) -> dict:
    """Point-BERT's tokenizer."""
    state = {**pointnet(f'{prefix}encoder', encoder), f'{prefix}codebook': torch.randn(tokens, token)}
    for name, inputs, outputs in (('dgcnn_1', encoder, tokens), ('dgcnn_2', token, decoder)):
        at, widths = f'{prefix}{name}', (128, 256, 512, 512, 1024)
        state.update(linear(f'{at}.input_trans', inputs, 128, 1))
        for i, (a, b) in enumerate(pairwise(widths), 1):
            state.update({**linear(f'{at}.layer{i}.0', 2 * a, b, 1, 1, bias=False), **norm(f'{at}.layer{i}.1', b)})
        state.update({**linear(f'{at}.layer5.0', sum(widths[1:]), outputs, 1, bias=False),
                      **norm(f'{at}.layer5.1', outputs)})
    mlp, final = f'{prefix}decoder.mlp', f'{prefix}decoder.final_conv'
    return {**state, **linear(f'{mlp}.0', decoder, 1024), **linear(f'{mlp}.2', 1024, 1024),
            **linear(f'{mlp}.4', 1024, 3 * group_size // 4), **linear(f'{final}.0', decoder + 5, 512, 1),
            **norm(f'{final}.1', 512, True), **linear(f'{final}.3', 512, 512, 1), **norm(f'{final}.4', 512, True),
            **linear(f'{final}.6', 512, 3, 1)}


# ---- a naive forward -------------------------------------------------------------------------------------------------
def _linear(state, name, x):
    weight = state[f'{name}.weight']
    return x @ weight.reshape(weight.shape[:2]).T + state.get(f'{name}.bias', 0)


def _layer_norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f'{name}.weight'], state[f'{name}.bias'])


def _batch_norm(state, name, x):
    x = (x - state[f'{name}.running_mean']) / (state[f'{name}.running_var'] + 1e-5).sqrt()
    return x * state[f'{name}.weight'] + state[f'{name}.bias']


def _attention(state, name, x, heads):
    B, L, C = x.shape
    q, k, v = (t.reshape(B, L, heads, C // heads).transpose(1, 2) for t in
               _linear(state, f'{name}.qkv', x).split(C, -1))
    weights = (q @ k.transpose(-1, -2) / (C // heads) ** 0.5).softmax(-1)
    return _linear(state, f'{name}.proj', (weights @ v).transpose(1, 2).reshape(B, L, C))


def _pointnet(state, patches):
    x = _linear(state, 'encoder.first_conv.0', patches)
    x = _linear(state, 'encoder.first_conv.3', _batch_norm(state, 'encoder.first_conv.1', x).relu())
    x = torch.cat([x.amax(2, keepdim=True).expand_as(x), x], -1)
    x = _batch_norm(state, 'encoder.second_conv.1', _linear(state, 'encoder.second_conv.0', x)).relu()
    return _linear(state, 'encoder.second_conv.3', x).amax(2)


def logits(state: dict, center: torch.Tensor, patches: torch.Tensor, heads: int) -> torch.Tensor:
    """Class scores of centres ``(B, G, 3)`` and patches ``(B, G, K, 3)``."""
    x = _pointnet(state, patches)
    if 'reduce_dim.weight' in state:
        x = _linear(state, 'reduce_dim', x)
    pos = _linear(state, 'pos_embed.2', F.gelu(_linear(state, 'pos_embed.0', center)))
    B = len(x)
    x = torch.cat([state['cls_token'].expand(B, -1, -1), x], 1)
    pos = torch.cat([state['cls_pos'].expand(B, -1, -1), pos], 1)
    i = 0
    while f'blocks.blocks.{i}.norm1.weight' in state:
        at = f'blocks.blocks.{i}'
        x = x + pos
        x = x + _attention(state, f'{at}.attn', _layer_norm(state, f'{at}.norm1', x), heads)
        hidden = F.gelu(_linear(state, f'{at}.mlp.fc1', _layer_norm(state, f'{at}.norm2', x)))
        x, i = x + _linear(state, f'{at}.mlp.fc2', hidden), i + 1
    x = _layer_norm(state, 'norm', x)
    x = torch.cat([x[:, 0], x[:, 1:].amax(1)], -1)
    head = 'cls_head_finetune'
    if f'{head}.8.weight' not in state:
        return _linear(state, f'{head}.3', _linear(state, f'{head}.0', x).relu())
    for i in (0, 4):
        x = _batch_norm(state, f'{head}.{i + 1}', _linear(state, f'{head}.{i}', x)).relu()
    return _linear(state, f'{head}.8', x)
