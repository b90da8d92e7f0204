"""Models: backbone, necks, heads, the models that hold them, the tokenizer. Importing registers them."""
from ewa3d.models import (
    backbone,
    detection,
    dvae,
    heads,
    masked,
    mixing,
    necks,
    partseg,
    preprocessor,
    propagation,
    sequence,
    task,
    timm_backbone,
    token_model,
    video,
)

__all__ = ['backbone', 'detection', 'dvae', 'heads', 'masked', 'mixing', 'necks', 'partseg', 'preprocessor',
           'propagation', 'sequence', 'task', 'timm_backbone', 'token_model', 'video']
