"""3D object detection with queries: 3DETR's encoder, decoder, matching, losses and box parametrisation."""
from ewa3d.models.detection import coder, decoder, encoder, head, matcher

__all__ = ['coder', 'decoder', 'encoder', 'head', 'matcher']
