"""From a collated batch to what the model takes."""
from collections.abc import Sequence

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from ewa3d.registry import MODELS

__all__ = ['Preprocessor']


@MODELS.register_module()
class Preprocessor(BaseDataPreprocessor):
    """Stacks the clouds or images of a batch, checks them and moves them to the model's device.

    Nothing is normalised here: ``model(inputs)`` does not pass through a preprocessor. Samples stay where they are
    (heads move stacked labels, one transfer a batch).

    Shape:
        - ``data['inputs']['points']`` a list of ``(N, 3 + F)``, or stacked already; becomes ``(B, N, 3 + F)``.
          Other inputs likewise: ``data['inputs']['img']``.

    Raises:
        ValueError: clouds or images of different sizes or values that are not finite; the message names the samples.
    """

    def forward(self, data: dict, training: bool = False) -> dict:
        if not isinstance(data, dict) or 'inputs' not in data:
            raise ValueError(f"a batch is a dict with 'inputs' and 'data_samples', got {_describe(data)}")
        samples = data.get('data_samples')
        inputs = {name: self._batch(name, value, samples) for name, value in data['inputs'].items()}
        return {**data, 'inputs': inputs, 'data_samples': samples}

    def _batch(self, name: str, value: Tensor | Sequence[Tensor], samples: Sequence | None) -> Tensor:
        if not isinstance(value, Tensor):
            shape = value[0].shape
            for i, item in enumerate(value):
                if item.shape != shape:
                    raise ValueError(f'{name} of one batch must have one shape: {_name(samples, i)} has '
                                     f'{tuple(item.shape)}, {_name(samples, 0)} has {tuple(shape)}; '
                                     f'add a {"Resample" if name == "points" else "Resize or crop"} transform to the '
                                     'pipeline')
            value = torch.stack(list(value))
        if value.device.type == 'cpu' and not torch.isfinite(value.sum()):  # the sum is quick; it may overflow
            bad = (~value.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            if bad:
                raise ValueError(f'{name} has NaN or infinite values in {", ".join(_name(samples, i) for i in bad)}')
        return value.to(self.device, non_blocking=self._non_blocking)


def _name(samples: Sequence | None, i: int) -> str:
    sample = samples[i] if samples is not None and i < len(samples) else {}
    name = sample.get('name', sample.get('index', None))
    return f'sample {i} of the batch' if name is None else f'sample {name!r}'


def _describe(data) -> str:
    return f'a dict with {sorted(data)}' if isinstance(data, dict) else f'a {type(data).__name__}'
