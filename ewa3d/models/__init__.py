"""Models: backbone, necks, heads, the models that hold them, the tokenizer. Importing registers them."""
from ewa3d.models import (
    backbone,
    detection,
    dvae,
    heads,
    masked,
    necks,
    partseg,
    preprocessor,
    propagation,
    task,
    token_model,
)

__all__ = ['backbone', 'detection', 'dvae', 'heads', 'masked', 'necks', 'partseg', 'preprocessor', 'propagation',
           'task', 'token_model']
