"""Official part segmentation weights of any size, and what the published networks make of them, written out naively."""
import torch
import torch.nn.functional as F
from official_files import linear, norm, vit

__all__ = ['log_probs', 'partseg']

OUT_INDICES = (3, 7, 11)


def propagation(prefix: str, inputs: int, *widths: int) -> dict:
    state = {}
    for i, (a, b) in enumerate(zip((inputs, *widths), widths)):
        state |= {**linear(f'{prefix}.mlp_convs.{i}', a, b, 1), **norm(f'{prefix}.mlp_bns.{i}', b, True)}
    return state


def partseg(kind: str, width=12, depth=12, parts=9, categories=3, encoder=20, point=16, **options) -> dict:
    """``kind`` ``'point-mae'`` or ``'point-bert'``; ``point`` is the width of Point-MAE's point features."""
    if kind == 'point-mae':
        joined = 3 * width
        return {**vit('', width, depth, cls=False, **options), **linear('label_conv.0', categories, 64, 1, bias=False),
                **norm('label_conv.1', 64, True), **propagation('propagation_0', joined + 3, 4 * width, point),
                **linear('convs1', point + 2 * joined + 64, 512, 1), **norm('bns1', 512, True),
                **linear('convs2', 512, 256, 1), **norm('bns2', 256, True), **linear('convs3', 256, parts, 1)}
    state = vit('', width, depth, encoder, **options)
    for i, columns in ((2, 3), (1, 3), (0, 3 + categories)):
        state |= propagation(f'propagation_{i}', width + columns, 4 * width, width)
    for i in (1, 2):
        at = f'dgcnn_pro_{i}'
        state |= {**linear(f'{at}.layer1.0', 2 * width, 512, 1, 1, bias=False), **norm(f'{at}.layer1.1', 512),
                  **linear(f'{at}.layer2.0', 1024, width, 1, 1, bias=False), **norm(f'{at}.layer2.1', width)}
    return {**state, **linear('conv1', width, 128, 1), **norm('bn1', 128, True), **linear('conv2', 128, parts, 1)}


# ---- a naive forward: channels first, everything repeated for every point, as published -----------------------------
def _conv(state, name, x):
    weight, bias = state[f'{name}.weight'], state.get(f'{name}.bias')
    return (F.conv2d if weight.ndim == 4 else F.conv1d)(x, weight, bias)


def _bn(state, name, x):
    return F.batch_norm(x, *(state[f'{name}.{key}'] for key in ('running_mean', 'running_var', 'weight', 'bias')))


def _squared(a, b):
    """Of columns ``(B, 3, N)`` and ``(B, 3, S)``: ``(B, N, S)``."""
    return (a.transpose(1, 2).unsqueeze(2) - b.transpose(1, 2).unsqueeze(1)).square().sum(-1)


def _at(x, index):
    """Columns ``(B, C, S)`` by ``(B, N, k)``: ``(B, C, N, k)``."""
    return torch.stack([cloud[:, rows] for cloud, rows in zip(x, index)])


def _propagate(state, name, to, own, fro, features):
    distance, index = (_squared(to, fro)).sort(-1)
    weight = 1 / (distance[..., :3] + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    carried = (_at(features, index[..., :3]) * weight.unsqueeze(1)).sum(-1)
    x, i = torch.cat([own, carried], 1), 0
    while f'{name}.mlp_convs.{i}.weight' in state:
        x, i = _bn(state, f'{name}.mlp_bns.{i}', _conv(state, f'{name}.mlp_convs.{i}', x)).relu(), i + 1
    return x


def _edges(state, name, coord_q, x_q, coord, x):
    index = _squared(coord_q, coord).sort(-1).indices[..., :4]
    near = _at(x, index)
    own = x_q.unsqueeze(-1).expand_as(near)
    x = _conv(state, f'{name}.0', torch.cat([near - own, own], 1))
    x = F.group_norm(x, 4, state[f'{name}.1.weight'], state[f'{name}.1.bias'])
    return F.leaky_relu(x, 0.2).amax(-1)


def _upsample(state, name, coord, x, coord_q, x_q):
    x_q = _edges(state, f'{name}.layer1', coord_q, x_q, coord, x)
    return _edges(state, f'{name}.layer2', coord_q, x_q, coord_q, x_q)


def log_probs(state: dict, features, center, points, category, many=None, few=None):
    """Log-probabilities ``(B, N, parts)``.

    Args:
        features: of the three blocks, ``(B, G, C)`` each, without a class token.
        many, few: the farthest points of Point-BERT's levels, ``(B, M, 3)``.
    """
    early, middle, last = (x.transpose(1, 2) for x in features)
    center, points = center.transpose(1, 2), points.transpose(1, 2)
    N = points.shape[2]
    if many is None:
        categories = state['label_conv.0.weight'].shape[1]
        told = F.one_hot(category, categories).to(points.dtype).unsqueeze(-1)
        told = F.leaky_relu(_bn(state, 'label_conv.1', _conv(state, 'label_conv.0', told)), 0.2)
        joined = torch.cat([early, middle, last], 1)
        x = _propagate(state, 'propagation_0', points, points, center, joined)
        shared = [joined.amax(2, keepdim=True), joined.mean(2, keepdim=True), told]
        x = torch.cat([x, *(y.expand(-1, -1, N) for y in shared)], 1)
        for i in (1, 2):
            x = _bn(state, f'bns{i}', _conv(state, f'convs{i}', x)).relu()
        x = _conv(state, 'convs3', x)
    else:
        many, few = many.transpose(1, 2), few.transpose(1, 2)
        categories = state['propagation_0.mlp_convs.0.weight'].shape[1] - 3 - last.shape[1]
        told = F.one_hot(category, categories).to(points.dtype).unsqueeze(-1).expand(-1, -1, N)
        x = _propagate(state, 'propagation_2', few, few, center, middle)
        x = _upsample(state, 'dgcnn_pro_2', center, last, few, x)
        y = _propagate(state, 'propagation_1', many, many, center, early)
        y = _upsample(state, 'dgcnn_pro_1', few, x, many, y)
        x = _propagate(state, 'propagation_0', points, torch.cat([told, points], 1), many, y)
        x = _conv(state, 'conv2', _bn(state, 'bn1', _conv(state, 'conv1', x)).relu())
    return x.log_softmax(1).transpose(1, 2)
