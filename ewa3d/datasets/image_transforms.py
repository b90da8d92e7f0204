"""Transforms of images: torchvision's, drawn from the sample's own generator, and the end of a pipeline."""
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from ewa3d.checks import some
from ewa3d.datasets.transforms import rng_of
from ewa3d.registry import TRANSFORMS, nearest
from ewa3d.structures import Sample

__all__ = ['ImageTransforms', 'PackImage', 'drawing_from']


@TRANSFORMS.register_module()
class ImageTransforms:
    """Transforms of ``torchvision.transforms.v2``, one after the other, on the sample's ``img``.

    They draw from torch's global generator; here it is seeded from the sample's ``rng`` and put back afterwards, so
    that a sample's augmentation depends on ``(seed, epoch, index)`` alone. They get a PIL image, on which most of them
    are quicker than on a small tensor; ``dict(name='ToImage')`` makes a tensor of it for those that need one::

        dict(type='ImageTransforms', transforms=[
            dict(name='RandomCrop', size=32, padding=4), dict(name='RandomHorizontalFlip'),
            dict(name='ToImage'), dict(name='ToDtype', dtype='float32', scale=True),
            dict(name='Normalize', mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25]), dict(name='RandomErasing', p=0.25)])

    Args:
        transforms: dicts with ``name``, a class of torchvision's, and its keywords. ``dtype`` and ``interpolation`` are
            strings; a list of such dicts is an argument of ``RandomApply`` and the like.

    Raises:
        KeyError, TypeError, ValueError: an unknown name, a keyword that the transform does not take, a wrong value.
    """

    def __init__(self, transforms: Sequence[dict]):
        if isinstance(transforms, (str, Mapping)) or not isinstance(transforms, Sequence):
            raise TypeError(f'ImageTransforms: transforms is a list of dicts with a name, got {transforms!r}')
        self.steps = [build_v2(step, f'ImageTransforms: transforms[{i}]') for i, step in enumerate(transforms)]

    def __call__(self, results: dict) -> dict:
        img = results['img']
        if isinstance(img, np.ndarray):
            from PIL import Image
            img = Image.fromarray(img[..., 0] if img.shape[2] == 1 else img)
        with drawing_from(rng_of(results)):
            for step in self.steps:
                img = step(img)
        results['img'] = img
        return results


@contextmanager
def drawing_from(rng: np.random.Generator):
    """torch's CPU generator, seeded from ``rng``, until the context ends; other devices' are left alone."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(int(rng.integers(2**63)))
    try:
        yield
    finally:
        torch.set_rng_state(before)


def build_v2(step: Mapping, where: str) -> Callable:
    """A transform of torchvision's from ``dict(name=…, **keywords)``."""
    from torchvision.transforms import v2
    if not isinstance(step, Mapping) or not isinstance(step.get('name'), str):
        raise TypeError(f"{where}: a dict like dict(name='RandomCrop', size=32) was expected, got {step!r}")
    known = {key for key, cls in vars(v2).items() if inspect.isclass(cls) and issubclass(cls, v2.Transform)}
    name, keywords = step['name'], {key: value for key, value in step.items() if key != 'name'}
    if name not in known:
        raise KeyError(f'{where}: {name!r} is no transform of torchvision; {nearest(name, known)}')
    cls = getattr(v2, name)
    accepted = inspect.signature(cls).parameters
    for key in keywords:
        if key not in accepted:
            raise TypeError(f'{where}: {name} takes no {key!r}; {nearest(key, accepted)}')
    keywords = {key: _value(key, value, f'{where}.{key}') for key, value in keywords.items()}
    try:
        return cls(**keywords)
    except (TypeError, ValueError) as error:
        raise type(error)(f'{where}: {name}: {error}') from error


def _value(key: str, value, where: str):
    """What a config writes as a string or dict, as torchvision wants it."""
    from torchvision.transforms import InterpolationMode
    if key == 'interpolation' and isinstance(value, str):
        modes = {mode.value: mode for mode in InterpolationMode}
        if value not in modes:
            raise ValueError(f'{where}: {value!r}: {nearest(value, modes)}')
        return modes[value]
    if key == 'dtype' and isinstance(value, str):
        if not isinstance(getattr(torch, value, None), torch.dtype):
            raise ValueError(f"{where}: {value!r} is no dtype of torch ('float32', 'uint8')")
        return getattr(torch, value)
    if key in ('transforms', 'transform'):
        several = isinstance(value, Sequence)
        steps = [build_v2(step, f'{where}[{i}]') for i, step in enumerate(value if several else [value])]
        return steps if several else steps[0]
    return value


@TRANSFORMS.register_module()
class PackImage:
    """End a pipeline: ``{'inputs': {'img': (C, H, W) float32}, 'data_samples': Sample(gt_label)}``.

    Bytes become numbers in ``[0, 1]``. The sample's metainfo holds its ``name`` and ``index``.

    Args:
        mean, std: where given, a value a channel: the image is normalised by them.

    Raises:
        ValueError: ``mean`` without ``std`` or of another length, a ``std`` that is not positive.
    """

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        if (mean is None) != (std is None) or len(mean or ()) != len(std or ()):
            raise ValueError(f'PackImage: mean and std belong together, one value a channel; got {mean!r}, {std!r}')
        if any(value <= 0 for value in std or ()):
            raise ValueError(f'PackImage: std must be above 0, got {std!r}')
        self.mean, self.std = (None if v is None else torch.tensor(v, dtype=torch.float32).view(-1, 1, 1)
                               for v in (mean, std))

    def __call__(self, results: dict) -> dict:
        img = self.normalise(image_tensor(results['img']))
        return {'inputs': dict(img=img), 'data_samples': label_sample(results)}

    def normalise(self, img: torch.Tensor) -> torch.Tensor:
        """``(..., C, H, W)``, kept, by ``mean`` and ``std`` where they are given."""
        if self.mean is None:
            return img
        if img.shape[-3] != len(self.mean):
            raise ValueError(f'{type(self).__name__}: mean has {len(self.mean)} values, the image {img.shape[-3]} '
                             'channels')
        return (img - self.mean) / self.std


def label_sample(results: dict) -> Sample:
    """A sample with the label, where there is one, and ``name`` and ``index`` as metainfo."""
    sample = Sample(metainfo={key: results[key] for key in ('name', 'index') if key in results})
    if results.get('label') is not None:
        sample.gt_label = torch.tensor(int(results['label']))
    return sample


def image_tensor(img) -> torch.Tensor:
    """An array ``(H, W, C)``, a PIL image or a tensor ``(C, H, W)`` as a float32 tensor ``(C, H, W)``."""
    if not isinstance(img, torch.Tensor):
        array = np.array(img)  # a copy: the data set's own must not be written to
        if array.ndim not in (2, 3):
            raise ValueError(f'PackImage: an image (H, W, C) was expected, got {some(array.shape)}')
        img = torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
    if img.ndim != 3:
        raise ValueError(f'PackImage: an image (C, H, W) was expected, got {tuple(img.shape)}')
    scale = 1 / 255 if img.dtype == torch.uint8 else 1
    return (img.as_subclass(torch.Tensor).to(torch.float32) * scale).contiguous()
