"""Layers that treat the channels of a token differently, or all tokens as one batch."""
import torch
from torch import Tensor, nn

__all__ = ['ChannelIdle', 'TokenBatchNorm']


class ChannelIdle(nn.Module):
    """An activation of the first ``active`` channels; the others pass as they are.

    Shape:
        - ``(..., H)``, kept.
    """

    def __init__(self, act: nn.Module, active: int):
        super().__init__()
        self.act = act
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        if self.active >= x.shape[-1]:
            return self.act(x)
        return torch.cat([self.act(x[..., :self.active]), x[..., self.active:]], -1) if self.active else x

    def extra_repr(self) -> str:
        return f'active={self.active}'


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of channels that come last; the batch is all tokens.

    Shape:
        - ``(..., C)``, kept.

    Raises:
        ValueError: in training, a single token, which has no statistics.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[-1]:
            raise ValueError(f'{type(self).__name__}: in training, statistics need more than one token, got '
                             f'{tuple(x.shape)}; use larger batches, or drop_last=True in the data loader')
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)
