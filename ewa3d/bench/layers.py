"""One FFN, forward and backward: EWA's experts against the dense layer they come from."""
from collections.abc import Iterator

import torch

from ewa3d.bench.harness import Case, Settings

__all__ = ['cases']

DIM, HIDDEN, TOKENS = 384, 1536, 65
BATCHES = (32, 128)  # 2080 and 8320 tokens


def cases(settings: Settings) -> Iterator[Case]:
    """Dense, and 2, 4, 8 experts, at 2080 and 8320 tokens."""
    dim, hidden, tokens = (16, 32, 5) if settings.quick else (DIM, HIDDEN, TOKENS)
    for batch in (8,) if settings.quick else BATCHES:
        for dtype in settings.dtypes:
            shape = (batch, tokens, dim)
            yield Case(f'FFN {dim}→{hidden}, {batch * tokens} tokens, {dtype}', {
                'dense': _ffn(settings, dtype, shape, hidden),
                **{f'EWA, {count} experts': _ffn(settings, dtype, shape, hidden, num_experts=count)
                   for count in (2, 4, 8)}})


def _ffn(settings: Settings, dtype: str, shape: tuple[int, ...], hidden: int, num_experts: int = 1):
    def build():
        from ewa3d.layers.block import Mlp
        from ewa3d.layers.experts import EWAFFN
        ffn = Mlp(shape[-1], hidden)
        if num_experts > 1:
            ffn = EWAFFN.expand(ffn, num_experts=num_experts)
        ffn.to(settings.device).train()
        x = torch.randn(shape, device=settings.device, requires_grad=True)
        gradient = torch.randn(shape, device=settings.device)

        def call():
            with settings.autocast(dtype):
                y = ffn(x)
            y.backward(gradient.to(y.dtype))
            ffn.zero_grad()
            x.grad = None
        return call
    return build
