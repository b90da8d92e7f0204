"""Official 3DETR checkpoints of any size, and what the published network makes of them, written out naively."""
import argparse
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from official_files import linear, norm

__all__ = ['checkpoint', 'predictions']


def set_abstraction(prefix: str, *widths: int) -> dict:
    state = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        at = f'{prefix}.mlp_module.layer{i}'
        state |= {**linear(f'{at}.conv', inputs, outputs, 1, 1, bias=False), **norm(f'{at}.bn.bn', outputs, True)}
    return state


def attention(prefix: str, width: int) -> dict:
    return {f'{prefix}.in_proj_weight': torch.randn(3 * width, width) / width ** 0.5,
            f'{prefix}.in_proj_bias': torch.randn(3 * width) * 0.1, **linear(f'{prefix}.out_proj', width, width)}


def layer(prefix: str, width: int, hidden: int, attentions: tuple[str, ...]) -> dict:
    state = {**linear(f'{prefix}.linear1', width, hidden), **linear(f'{prefix}.linear2', hidden, width)}
    for name in attentions:
        state |= attention(f'{prefix}.{name}', width)
    for i in range(len(attentions) + 1):
        state |= norm(f'{prefix}.norm{i + 1}', width)
    return state


def mlp(prefix: str, widths: tuple[int, ...], step: int, outputs: int = 0, norms: bool = True) -> dict:
    """Layers numbered in steps of ``step``; with ``outputs`` a last one without a norm."""
    state = {}
    for i, (a, b) in enumerate(pairwise(widths)):
        state |= linear(f'{prefix}.{step * i}', a, b, 1, bias=not norms)
        state |= norm(f'{prefix}.{step * i + 1}', b, True) if norms else {}
    return state | (linear(f'{prefix}.{step * (len(widths) - 1)}', widths[-1], outputs, 1) if outputs else {})


def checkpoint(enc=24, dec=32, enc_ffn=10, dec_ffn=14, enc_layers=3, dec_layers=2, classes=5, bins=1, masked=False,
               color=False, enc_heads=4, dec_heads=2, npoints=40, queries=9, **more) -> dict:
    """As the project writes it, with the arguments; ``more`` are further ones."""
    state = {**set_abstraction('pre_encoder', 6 if color else 3, 64, 128, enc),
             **mlp('encoder_to_decoder_projection.layers', (enc,) * (2 if masked else 3) + (dec,), 3),
             'pos_embedding.gauss_B': torch.randn(3, dec // 2),
             **mlp('query_projection.layers', (dec, dec, dec), 2, norms=False), **norm('decoder.norm', dec)}
    if masked:
        state |= set_abstraction('encoder.interim_downsampling', enc + 3, 256, 256, enc)
    for i in range(enc_layers):
        state |= layer(f'encoder.layers.{i}', enc, enc_ffn, ('self_attn',))
    for i in range(dec_layers):
        state |= layer(f'decoder.layers.{i}', dec, dec_ffn, ('self_attn', 'multihead_attn'))
    for name, outputs in (('sem_cls', classes + 1), ('center', 3), ('size', 3), ('angle_cls', bins),
                          ('angle_residual', bins)):
        state |= mlp(f'mlp_heads.{name}_head.layers', (dec, dec, dec), 4, outputs)
    args = dict(enc_type='masked' if masked else 'vanilla', enc_nhead=enc_heads, dec_nhead=dec_heads, use_color=color,
                preenc_npoints=npoints, nqueries=queries, pos_embed='fourier', enc_pos_embed=None, **more)
    return dict(model=state, optimizer=dict(state={}, param_groups=[]), epoch=3, args=argparse.Namespace(**args),
                best_val_metrics={0.25: dict(mAP=0.5)})


# ---- the published network, one thing at a time --------------------------------------------------------------------
def _fps(points, num):
    """One cloud; points near the origin are left out."""
    picks, nearest = [0], torch.full((len(points),), 1e10)
    allowed = points.square().sum(-1) > 1e-3
    while len(picks) < num:
        nearest = torch.minimum(nearest, (points - points[picks[-1]]).square().sum(-1))
        picks.append(int(torch.where(allowed, nearest, -1).argmax()))
    return torch.tensor(picks)


def _ball(center, points, radius, k):
    found = []
    for c in center:
        hits = ((points - c).square().sum(-1) < radius ** 2).nonzero().flatten()[:k].tolist()
        found.append(hits + [hits[0]] * (k - len(hits)))
    return torch.tensor(found)


def _bn(state, name, x):
    """Channels in dimension 1."""
    return F.batch_norm(x, *(state[f'{name}.{key}'] for key in ('running_mean', 'running_var', 'weight', 'bias')))


def _abstract(state, name, xyz, features, num, radius, k):
    """``(B, N, 3)`` and ``(B, C, N)`` or None to ``(B, num, 3)`` and ``(B, C', num)``."""
    places, grouped = [], []
    for b, cloud in enumerate(xyz):
        center = cloud[_fps(cloud, num)]
        near = _ball(center, cloud, radius, k)
        columns = [((cloud[near] - center.unsqueeze(1)) / radius).permute(2, 0, 1)]
        columns += [] if features is None else [features[b][:, near]]
        places.append(center)
        grouped.append(torch.cat(columns))
    x, i = torch.stack(grouped), 0
    while f'{name}.mlp_module.layer{i}.conv.weight' in state:
        at = f'{name}.mlp_module.layer{i}'
        x, i = _bn(state, f'{at}.bn.bn', F.conv2d(x, state[f'{at}.conv.weight'])).relu(), i + 1
    return torch.stack(places), x.amax(-1)


def _attend(state, name, heads, query, key, value, mask=None):
    """Sequence first, through torch's own function."""
    width = query.shape[-1]
    return F.multi_head_attention_forward(
        query, key, value, width, heads, state[f'{name}.in_proj_weight'], state[f'{name}.in_proj_bias'], None, None,
        False, 0., state[f'{name}.out_proj.weight'], state[f'{name}.out_proj.bias'], training=False,
        need_weights=False, attn_mask=mask)[0]


def _norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f'{name}.weight'], state[f'{name}.bias'])


def _ffn(state, at, x, activation=F.relu):
    hidden = activation(F.linear(x, state[f'{at}.linear1.weight'], state[f'{at}.linear1.bias']))
    return F.linear(hidden, state[f'{at}.linear2.weight'], state[f'{at}.linear2.bias'])


def _convs(state, at, x, relu_last):
    numbers = sorted(int(key.split('.')[-2]) for key in state if key.startswith(f'{at}.') and
                     key.endswith('.weight') and state[key].ndim == 3)
    for i in numbers:
        x = F.conv1d(x, state[f'{at}.{i}.weight'], state.get(f'{at}.{i}.bias'))
        if f'{at}.{i + 1}.running_mean' in state:
            x = _bn(state, f'{at}.{i + 1}', x)
        if relu_last or i != numbers[-1]:
            x = x.relu()
    return x


def _fourier(state, xyz, low, high):
    scaled = (xyz - low[:, None]) / (high - low)[:, None] * 2 * math.pi
    angle = torch.stack([cloud @ state['pos_embedding.gauss_B'] for cloud in scaled])
    return torch.cat([angle.sin(), angle.cos()], 2)  # (B, N, C)


def _depth(state, at):
    return len({key.split('.')[2] for key in state if key.startswith(f'{at}.layers.')})


def predictions(content: dict, points: torch.Tensor, activation=F.relu) -> list[dict]:
    """Those of each decoder layer, of points ``(B, N, 3 + F)``."""
    state, args = content['model'], content['args']
    xyz, features = points[..., :3], points[..., 3:].transpose(1, 2) if points.shape[-1] > 3 else None
    low, high = xyz.amin(1), xyz.amax(1)
    xyz, x = _abstract(state, 'pre_encoder', xyz, features, args.preenc_npoints, 0.2, 64)
    x = x.permute(2, 0, 1)
    masked = args.enc_type == 'masked'
    for i in range(_depth(state, 'encoder')):
        at, mask = f'encoder.layers.{i}', None
        if masked:
            far = torch.stack([(cloud[:, None] - cloud[None]).square().sum(-1).sqrt() for cloud in xyz]) >= \
                (0.4 ** 2, 0.8 ** 2, 1.2 ** 2)[i]
            mask = far.repeat_interleave(args.enc_nhead, 0)
        y = _norm(state, f'{at}.norm1', x)
        x = x + _attend(state, f'{at}.self_attn', args.enc_nhead, y, y, y, mask)
        x = x + _ffn(state, at, _norm(state, f'{at}.norm2', x), activation)
        if masked and i == 0:
            xyz, x = _abstract(state, 'encoder.interim_downsampling', xyz, x.permute(1, 2, 0),
                               args.preenc_npoints // 2, 0.4, 32)
            x = x.permute(2, 0, 1)
    memory = _convs(state, 'encoder_to_decoder_projection.layers', x.permute(1, 2, 0), True).permute(2, 0, 1)
    queries = torch.stack([cloud[_fps(cloud, args.nqueries)] for cloud in xyz])
    pos = _fourier(state, xyz, low, high).transpose(0, 1)
    query_pos = _convs(state, 'query_projection.layers', _fourier(state, queries, low, high).transpose(1, 2),
                       True).permute(2, 0, 1)
    x, outputs = torch.zeros_like(query_pos), []
    for i in range(_depth(state, 'decoder')):
        at = f'decoder.layers.{i}'
        y = _norm(state, f'{at}.norm1', x)
        x = x + _attend(state, f'{at}.self_attn', args.dec_nhead, y + query_pos, y + query_pos, y)
        y = _norm(state, f'{at}.norm2', x)
        x = x + _attend(state, f'{at}.multihead_attn', args.dec_nhead, y + query_pos, memory + pos, memory)
        x = x + _ffn(state, at, _norm(state, f'{at}.norm3', x))
        features = _norm(state, 'decoder.norm', x).permute(1, 2, 0)
        raw = {name: _convs(state, f'mlp_heads.{name}_head.layers', features, False).transpose(1, 2) for name in
               ('sem_cls', 'center', 'size', 'angle_cls', 'angle_residual')}
        outputs.append(dict(sem_cls_logits=raw['sem_cls'], center=queries + raw['center'].sigmoid() - 0.5,
                            size=raw['size'].sigmoid() * (high - low).clamp(min=0.1)[:, None],
                            angle=_angles(raw['angle_cls'], raw['angle_residual'])))
    return outputs


def _angles(logits, residual):
    """One query after another."""
    bins = logits.shape[-1]
    angle = torch.zeros(logits.shape[:2])
    for b, q in torch.cartesian_prod(*map(torch.arange, angle.shape)).tolist() if bins > 1 else ():
        chosen = int(logits[b, q].argmax())
        value = chosen * 2 * math.pi / bins + float(residual[b, q, chosen]) * math.pi / bins
        angle[b, q] = value - 2 * math.pi if value > math.pi else value
    return angle
