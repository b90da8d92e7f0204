"""Batch augmentation of images: mixup and cutmix, timm's, with soft labels."""
from collections.abc import Sequence

import torch
from torch import Tensor

from ewa3d.checks import check_number
from ewa3d.models.preprocessor import Preprocessor
from ewa3d.registry import MODELS, nearest
from ewa3d.structures import Sample

__all__ = ['ImagePreprocessor']

MODES = ('batch', 'pair', 'elem')


@MODELS.register_module()
class ImagePreprocessor(Preprocessor):
    """``Preprocessor`` that mixes the images of a training batch (mixup, Zhang et al. 2018; cutmix, Yun et al. 2019).

    timm's ``Mixup`` does it, with numpy's global generator, whose state is part of a checkpoint. Mixed samples get
    ``gt_scores``, which the head's loss prefers to ``gt_label``; label smoothing is the head's.

    Args:
        mixup, cutmix: α of the beta distribution of the shares; 0 switches it off.
        prob: share of the batches (pairs, elements) that are mixed.
        switch_prob: share of those that get cutmix where both are on.
        mode: one draw a ``'batch'``, ``'pair'`` or ``'elem'`` (image).
        num_classes: the command line tools fill it in from the data set's class names; with several ``tasks`` it must
            be given.

    Shape:
        - ``data['inputs']['img']`` a list of ``(C, H, W)``; becomes ``(B, C, H, W)``.

    Raises:
        ValueError: a number out of range, ``num_classes`` missing, an odd batch (images are mixed in pairs).
    """

    def __init__(self, mixup: float = 0., cutmix: float = 0., prob: float = 1., switch_prob: float = 0.5,
                 mode: str = 'batch', num_classes: int | None = None, **kwargs):
        super().__init__(**kwargs)
        for name, value, within in (('mixup', mixup, '[0, inf)'), ('cutmix', cutmix, '[0, inf)'),
                                    ('prob', prob, '[0, 1]'), ('switch_prob', switch_prob, '[0, 1]')):
            check_number(f'ImagePreprocessor: {name}', value, within)
        if mode not in MODES:
            raise ValueError(f'ImagePreprocessor: mode={mode!r}: {nearest(mode, MODES)}')
        self.mix = None
        if mixup or cutmix:
            from timm.data.mixup import Mixup
            self.mix = Mixup(mixup, cutmix, prob=prob, switch_prob=switch_prob, mode=mode, label_smoothing=0.,
                             num_classes=num_classes)

    def forward(self, data: dict, training: bool = False) -> dict:
        data = super().forward(data, training)
        img, samples = data['inputs'].get('img'), data.get('data_samples')
        if training and self.mix is not None and img is not None:
            data['inputs']['img'] = self._mixed(img, samples)
        return data

    def _mixed(self, img: Tensor, samples: Sequence[Sample]) -> Tensor:
        if len(img) % 2:
            raise ValueError(f'mixup and cutmix take images in pairs, and this batch has {len(img)}: choose an even '
                             'train_dataloader.batch_size, with drop_last=True')
        if self.mix.num_classes is None:
            raise ValueError('ImagePreprocessor: num_classes is not set. tools/train.py fills it in from the class '
                             'names of the training set where there is one task; otherwise set '
                             'model.data_preprocessor.num_classes')
        labels = torch.stack([torch.as_tensor(sample.gt_label).reshape(()) for sample in samples])
        img, scores = self.mix(img.clone(), labels)  # it writes in place
        for sample, score in zip(samples, scores):
            sample.gt_scores = score
        return img
