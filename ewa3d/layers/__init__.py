"""Layers: the transformer block, tokenizers and what ``expand`` puts in their place. Importing registers them."""
from ewa3d.layers import block, experts, image_tokens, partition, tokenizers

__all__ = ['block', 'experts', 'image_tokens', 'partition', 'tokenizers']
