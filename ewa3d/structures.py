"""What flows through the framework: :class:`Sample` (one example's annotations and predictions) and :class:`Tokens`."""
from typing import NamedTuple

from mmengine.structures import BaseDataElement
from torch import Tensor

__all__ = ['Sample', 'Tokens']


class Sample(BaseDataElement):
    """Annotations and predictions of one example.

    Data fields, each present only where the task has it:

    * ``gt_scores`` float ``(num_classes,)``, a distribution in place of a label, of mixed images;
    * ``gt_label`` int64 ``()``; ``pred_label`` int64 ``()``; ``pred_scores`` float ``(num_classes,)``, probabilities;
    * ``gt_parts`` int64 ``(N,)``, one label a point; ``part_scores`` float ``(N, num_parts)``, log-probabilities, and
      ``pred_parts`` int64 ``(N,)``; the cloud before points were drawn from it: ``all_points`` ``(M, 3)``,
      ``gt_all_parts`` ``(M,)``, and which of them the points are, ``rows`` ``(N,)``;
    * ``pred_points`` float ``(M, 3)``, a reconstruction of the cloud; of a masked autoencoder also its two parts,
      ``visible_points`` and ``reconstructed_points``;
    * ``gt_boxes`` float ``(M, 7)`` and ``gt_labels`` int64 ``(M,)``, none or more (:mod:`ewa3d.ops.boxes`);
      ``pred_boxes`` ``(Q, 7)``, ``pred_scores`` ``(Q, num_classes)`` and ``pred_objectness`` ``(Q,)``;
    * ``gt_tokens`` and ``pred_tokens`` int64 ``(G,)``, codes of patches; ``masked`` bool ``(G,)``;
    * ``by_task``, task → field → value, what each of several tasks predicts.

    Metainfo: ``name`` (what the data set calls the example, used in error messages) and ``index``.
    """


class Tokens(NamedTuple):
    """What a tokenizer returns.

    Shape:
        - x: ``(B, L, C)`` token features.
        - pos: ``(B, L, C)`` positional embedding, added by the backbone.
        - coord: ``(B, L, D)`` where each token sits (group centres, patch grid).
        - prefix_pos: ``(B, 1, C)`` added to the position of the encoder's own tokens, or ``None``; of clips.
        - target: what a masked model reconstructs, ``(B, L, K, D)`` for points (local coordinates), or ``None``.
    """
    x: Tensor
    pos: Tensor
    coord: Tensor
    target: Tensor | None = None
    prefix_pos: Tensor | None = None
