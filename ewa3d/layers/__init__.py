"""Layers: the transformer block, tokenizers and what ``expand`` puts in their place. Importing registers them."""
from ewa3d.layers import block, experts, fusion, moe, partition, repa, residual, tokenizers

__all__ = ['block', 'experts', 'fusion', 'moe', 'partition', 'repa', 'residual', 'tokenizers']
