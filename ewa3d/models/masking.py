"""Which tokens are masked: at random (Point-MAE) or a block (Point-BERT), for a whole batch on its device."""
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ewa3d.checks import check_number
from ewa3d.registry import nearest

__all__ = ['MASKS', 'block_mask', 'iid_mask', 'mask_function', 'mask_parts', 'random_mask']

Ratio = float | Sequence[float] | Tensor


def random_mask(coord: Tensor, ratio: Ratio, generator: torch.Generator | None = None) -> Tensor:
    """Mask ``int(ratio * G)`` tokens of each cloud, all choices equally likely.

    Args:
        coord: where the tokens are; only shape and device matter.
        ratio: in [0, 1]: one number for all clouds, ``(B,)`` for each its own, or ``(low, high)`` to draw them from.
        generator: of the device; torch's own by default.

    Shape:
        - coord ``(B, G, D)``; returns bool ``(B, G)``, True where masked.

    Raises:
        TypeError, ValueError: a ratio out of range, of another type or shape; another shape of ``coord``.
    """
    B, G = _shape(coord)
    ratio = _ratio(ratio, coord, generator)
    return _first(torch.rand(B, G, device=coord.device, generator=generator).argsort(1), ratio)


def iid_mask(coord: Tensor, ratio: Ratio, generator: torch.Generator | None = None) -> Tensor:
    """Mask each token by itself with the probability ``ratio``, so that clouds mask different numbers of them, perhaps
    none (Point-BERT's ``mask_rand``). Arguments, shapes and errors are those of :func:`random_mask`."""
    B, G = _shape(coord)
    ratio = _ratio(ratio, coord, generator)
    return torch.rand(B, G, device=coord.device, generator=generator) < ratio


def block_mask(coord: Tensor, ratio: Ratio, generator: torch.Generator | None = None) -> Tensor:
    """Mask a random token of each cloud and those nearest to it, ``int(ratio * G)`` in all.

    Args:
        ratio: in [0, 1]: one number for all clouds, ``(B,)`` for each its own, or ``(low, high)`` to draw them from.
        generator: of the device; torch's own by default.

    Shape:
        - coord ``(B, G, D)``; returns bool ``(B, G)``, True where masked.

    Raises:
        TypeError, ValueError: as :func:`random_mask`.
    """
    B, G = _shape(coord)
    ratio = _ratio(ratio, coord, generator)
    seed = torch.randint(G, (B, 1, 1), device=coord.device, generator=generator)
    middle = coord.gather(1, seed.expand(-1, -1, coord.shape[2]))  # (B, 1, D)
    distance = (coord - middle).square().sum(-1)
    distance.scatter_(1, seed.squeeze(2), -1.)  # before another token at the same place
    return _first(distance.argsort(dim=1, stable=True), ratio)


MASKS = {'rand': random_mask, 'block': block_mask, 'iid': iid_mask}


def mask_parts(mask: Tensor, num_masked: int) -> tuple[Tensor, Tensor]:
    """The indices of the visible tokens, and of the masked ones, in the order of the tokens.

    Args:
        num_masked: how many tokens each row masks. (To count them would wait for the device.)

    Shape:
        - mask bool ``(B, G)``; returns ``(B, G - num_masked)`` and ``(B, num_masked)`` int64.
    """
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    visible = mask.shape[1] - num_masked
    return order[:, :visible], order[:, visible:]


def _first(order: Tensor, ratio: float | Tensor) -> Tensor:
    """True for the first ``int(ratio * G)`` tokens of each row of ``order``."""
    G = order.shape[1]
    count = int(ratio * G) if isinstance(ratio, float) else (ratio.double() * G).long()  # (B, 1)
    chosen = (torch.arange(G, device=order.device) < count).expand(order.shape)
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def _shape(coord: Tensor) -> tuple[int, int]:
    if not isinstance(coord, Tensor) or coord.ndim != 3 or coord.shape[1] < 1:
        raise ValueError(f'masking: coord must have the shape (B, G, D), got {tuple(getattr(coord, "shape", ()))}')
    return coord.shape[:2]


def _ratio(ratio: Ratio, coord: Tensor, generator: torch.Generator | None) -> float | Tensor:
    """A float, or ``(B, 1)``. The values of a tensor are looked at on a CPU only."""
    B = len(coord)
    if isinstance(ratio, (tuple, list)):
        if len(ratio) != 2 or check_number('mask ratio', ratio[0]) > check_number('mask ratio', ratio[1]):
            raise ValueError(f'mask ratio: a range is (low, high), got {ratio!r}')
        low, high = ratio
        return low + (high - low) * torch.rand(B, 1, device=coord.device, generator=generator)
    if not isinstance(ratio, Tensor):
        return check_number('mask ratio', ratio)
    if ratio.shape != (B,):
        raise ValueError(f'mask ratio: a number, (low, high) or the shape ({B},) expected, got {tuple(ratio.shape)}')
    if ratio.device.type == 'cpu' and not torch.compiler.is_compiling() and not ((ratio >= 0) & (ratio <= 1)).all():
        raise ValueError(f'mask ratio must lie in [0, 1], got {ratio.tolist()}')
    return ratio.to(coord.device).unsqueeze(1)


def mask_function(name: str, valid: Collection[str] = tuple(MASKS)) -> Callable[..., Tensor]:
    """The function of a ``mask_type``, one of the ``valid`` ones.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in valid:
        raise ValueError(f'mask_type={name!r}; {nearest(name, valid)}')
    return MASKS[name]
