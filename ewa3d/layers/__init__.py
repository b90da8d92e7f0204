"""Layers: the transformer block, tokenizers and what ``expand`` puts in their place. Importing registers them."""
from ewa3d.layers import (
    adapter,
    block,
    experts,
    fusion,
    image_tokens,
    moe,
    partition,
    repa,
    residual,
    serialize,
    set_abstraction,
    ssm,
    temporal,
    tokenizers,
    video_tokens,
)

__all__ = ['adapter', 'block', 'experts', 'fusion', 'image_tokens', 'moe', 'partition', 'repa', 'residual',
           'serialize', 'set_abstraction', 'ssm', 'temporal', 'tokenizers', 'video_tokens']
