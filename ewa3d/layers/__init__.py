"""Layers: the transformer block, tokenizers and what ``expand`` puts in their place. Importing registers them."""
from ewa3d.layers import (
    block,
    experts,
    fusion,
    image_tokens,
    moe,
    partition,
    repa,
    residual,
    set_abstraction,
    tokenizers,
)

__all__ = ['block', 'experts', 'fusion', 'image_tokens', 'moe', 'partition', 'repa', 'residual', 'set_abstraction',
           'tokenizers']
