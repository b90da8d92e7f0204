"""3DETR's parametrisation of boxes: what the head's numbers mean in a cloud, and what it should have said of a box."""
import math

import torch
from torch import Tensor

from ewa3d.checks import check_integer
from ewa3d.models.detection.decoder import in_range

__all__ = ['BoxCoder']

MIN_EXTENT = 0.1  # metres: what a flat cloud counts as


class BoxCoder:
    """Boxes relative to their query and cloud.

    The centre is at most half a metre from the query along each axis; the size is a share of the cloud's; the heading
    is one of ``num_angle_bins`` bins and a residual, or 0 with one bin. Headings here are the official ones, which run
    clockwise: ``yaw = -angle``.

    Args:
        num_angle_bins: 12 for SUN RGB-D, 1 for boxes along the axes.
    """

    def __init__(self, num_angle_bins: int = 1):
        self.num_angle_bins = check_integer('num_angle_bins', num_angle_bins, 1)
        self.bin = 2 * math.pi / num_angle_bins

    def decode(self, raw: dict[str, Tensor], coord: Tensor, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Predictions by the names of the published code.

        Args:
            raw: ``sem_cls`` ``(..., Q, K + 1)``, ``center`` and ``size`` ``(..., Q, 3)``, ``angle_cls`` and
                ``angle_residual`` ``(..., Q, bins)``: what the layers gave.

        Shape:
            - coord ``(B, Q, 3)``, low and high ``(B, 3)``.
        """
        center = coord + (raw['center'].sigmoid() - 0.5)
        size = raw['size'].sigmoid()
        residual = raw['angle_residual']
        return dict(sem_cls_logits=raw['sem_cls'], center=center, center_normalized=in_range(center, low, high),
                    size=size * extent(low, high).unsqueeze(-2), size_normalized=size, angle_logits=raw['angle_cls'],
                    angle_residual_normalized=residual, angle=self._angle(raw['angle_cls'], residual * (self.bin / 2)))

    def _angle(self, logits: Tensor, residual: Tensor) -> Tensor:
        if self.num_angle_bins == 1:
            return (logits * 0 + residual * 0).squeeze(-1)  # all layers take part in the backward
        chosen = logits.argmax(-1, keepdim=True)
        return self.decode_angle(chosen, residual.gather(-1, chosen)).squeeze(-1)

    def boxes(self, predicted: dict[str, Tensor]) -> Tensor:
        """Decoded predictions as boxes ``(..., Q, 7)`` with yaw."""
        return torch.cat([predicted['center'], predicted['size'], -predicted['angle'].unsqueeze(-1)], -1)

    def encode_angle(self, angle: Tensor) -> tuple[Tensor, Tensor]:
        """The bin (int64) of each heading, and the residual within it, in ``[-pi / bins, pi / bins)``."""
        shifted = (angle + self.bin / 2) % (2 * math.pi)
        chosen = (shifted / self.bin).long().clamp(max=self.num_angle_bins - 1)
        return chosen, shifted - (chosen.to(angle.dtype) * self.bin + self.bin / 2)

    def decode_angle(self, chosen: Tensor, residual: Tensor) -> Tensor:
        """The heading of a bin and a residual; above pi it is wrapped once, as published."""
        angle = chosen.to(residual.dtype) * self.bin + residual
        return torch.where(angle > math.pi, angle - 2 * math.pi, angle)


def extent(low: Tensor, high: Tensor) -> Tensor:
    """The cloud's size ``(..., 3)``, at least 0.1 m along each axis."""
    return (high - low).clamp(min=MIN_EXTENT)
