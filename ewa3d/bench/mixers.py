"""Token mixers from 64 to 16k tokens: where a state space begins to cost less than attention."""
from collections.abc import Iterator

import torch
from torch import nn

from ewa3d.bench.harness import Case, Settings

__all__ = ['cases']

DIM, HEADS, STATES, TOKENS = 96, 4, 64, 16_384
LENGTHS = (64, 256, 1024, 4096, 16_384)


def cases(settings: Settings) -> Iterator[Case]:
    """One mixer on the same number of tokens in sequences of each length: a training step, and inference with the
    kernel computed in each call and once."""
    dim, heads, states, tokens, lengths = (8, 2, 4, 32, (8, 16)) if settings.quick else \
        (DIM, HEADS, STATES, TOKENS, LENGTHS)
    for length in lengths:
        shape = (max(tokens // length, 1), length, dim)
        for dtype in settings.dtypes:
            for mode in ('training', 'inference'):
                kinds = dict(attention=dict(), S4D=dict(bidirectional=False), **{
                    'S4D, two directions': dict(bidirectional=True), 'S4, two directions': dict(bidirectional=True)})
                if mode == 'inference':
                    kinds['S4D, two directions, fused'] = dict(bidirectional=True, fused=True)
                yield Case(f'{mode}, {shape[0]}×{length} tokens, {dtype}', {
                    name: _mixer(settings, dtype, mode, shape, heads, states, name, options)
                    for name, options in kinds.items()}, memory=True)


def _mixer(settings: Settings, dtype: str, mode: str, shape: tuple[int, ...], heads: int, states: int, name: str,
           options: dict):
    def build():
        from ewa3d.layers.block import Attention
        from ewa3d.layers.ssm import S4, S4D
        mixer: nn.Module = Attention(shape[-1], heads, qkv_bias=True)
        if name != 'attention':
            cls = S4D if name.startswith('S4D') else S4
            mixer = cls.expand(mixer, d_state=states, length=shape[1], **options)
        mixer.to(settings.device).train(mode == 'training')
        x = torch.randn(shape, device=settings.device, requires_grad=mode == 'training')
        gradient = torch.randn(shape, device=settings.device)

        def infer():
            with torch.no_grad(), settings.autocast(dtype):
                return mixer(x)

        def train():
            with settings.autocast(dtype):
                y = mixer(x)
            y.backward(gradient.to(y.dtype))
            mixer.zero_grad()
            x.grad = None
        return train if mode == 'training' else infer
    return build
