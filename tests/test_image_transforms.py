"""Transforms of images: seeding, names and keywords, packing, mixing."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ewa3d.datasets.image_transforms import ImageTransforms, PackImage, drawing_from
from ewa3d.datasets.images import Digits
from ewa3d.models.heads import ClsHead
from ewa3d.models.mixing import ImagePreprocessor
from ewa3d.structures import Sample

STEPS = [dict(name='RandomCrop', size=8, padding=2), dict(name='RandomHorizontalFlip'), dict(name='RandAugment'),
         dict(name='RandomApply', transforms=[dict(name='GaussianBlur', kernel_size=3)], p=0.5),
         dict(name='Resize', size=9, interpolation='bicubic'),
         dict(name='ToImage'), dict(name='ToDtype', dtype='float32', scale=True),
         dict(name='Normalize', mean=[0.5], std=[0.25]), dict(name='RandomErasing', p=1.)]


def image(channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 8, channels)).astype(np.uint8)


def run(seed: int, steps=STEPS, channels: int = 1) -> torch.Tensor:
    results = ImageTransforms(steps)(dict(img=image(channels), rng=np.random.default_rng(seed)))
    return PackImage()(results)['inputs']['img']


@pytest.mark.parametrize('channels', [1, 3])
def test_draws_follow_from_the_rng_alone(channels):
    torch.manual_seed(1)
    first = run(0, channels=channels)
    state = torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(first, run(0, channels=channels)) and not torch.equal(first, run(1, channels=channels))
    assert first.shape == (channels, 9, 9) and first.dtype == torch.float32
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # the training's generator stands where it stood


def test_the_generator_comes_back_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), drawing_from(np.random.default_rng(0)):
        torch.rand(1)
        raise RuntimeError
    assert torch.equal(state, torch.get_rng_state())


def test_by_epoch_and_index():
    data = Digits(pipeline=[dict(type='ImageTransforms', transforms=STEPS), dict(type='PackImage')], seed=3)
    one, again, other = data[0]['inputs']['img'], data[0]['inputs']['img'], data.sample(0, repeat=1)['inputs']['img']
    data.set_epoch(1)
    assert torch.equal(one, again) and not torch.equal(one, data[0]['inputs']['img']) and not torch.equal(one, other)


@pytest.mark.parametrize(('step', 'error', 'message'), [
    (dict(name='RandomCorp', size=3), KeyError, "no transform of torchvision; did you mean 'RandomCrop'"),
    (dict(name='RandomCrop', sise=3), TypeError, r"transforms\[0\]: RandomCrop takes no 'sise'; did you mean 'size'"),
    (dict(name='RandomCrop'), TypeError, 'RandomCrop'), (dict(size=3), TypeError, 'a dict like'),
    ('RandomCrop', TypeError, 'a dict like'),
    (dict(name='Resize', size=3, interpolation='bicubik'), ValueError, "did you mean 'bicubic'"),
    (dict(name='ToDtype', dtype='flaot32'), ValueError, 'no dtype'),
    (dict(name='RandomApply', transforms=[dict(name='Nope')]), KeyError, r'transforms\[0\].transforms\[0\]')])
def test_wrong_steps(step, error, message):
    with pytest.raises(error, match=message):
        ImageTransforms([step])


def test_the_list_is_a_list():
    with pytest.raises(TypeError, match='a list of dicts'):
        ImageTransforms(dict(name='ToImage'))


def test_pack():
    img = image()
    packed = PackImage(mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.3])(dict(img=img, label=2, name='x', index=7))
    expected = (torch.from_numpy(img).permute(2, 0, 1) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / \
        torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(packed['inputs']['img'], expected)
    sample = packed['data_samples']
    assert int(sample.gt_label) == 2 and sample.get('name') == 'x' and sample.get('index') == 7
    assert 'gt_label' not in PackImage()(dict(img=img))['data_samples']
    for options in (dict(mean=[1.]), dict(mean=[1., 2.], std=[1.]), dict(mean=[1.], std=[0.])):
        with pytest.raises(ValueError, match='PackImage'):
            PackImage(**options)
    with pytest.raises(ValueError, match='mean has 1 values, the image 3 channels'):
        PackImage(mean=[0.], std=[1.])(dict(img=img))
    with pytest.raises(ValueError, match=r'\(C, H, W\)'):
        PackImage()(dict(img=torch.zeros(2, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# Mixing
# ---------------------------------------------------------------------------------------------------------------------
def batch(size: int = 6) -> dict:
    return dict(inputs=dict(img=[torch.full((1, 4, 4), float(i)) for i in range(size)]),
                data_samples=[Sample(gt_label=torch.tensor(i % 3)) for i in range(size)])


@pytest.mark.parametrize(('options', 'mode'), [(dict(mixup=0.8), 'batch'), (dict(cutmix=1.), 'batch'),
                                               (dict(mixup=0.8, cutmix=1.), 'elem'), (dict(cutmix=1.), 'pair')])
def test_images_and_labels_are_mixed_in_the_same_shares(options, mode):
    """Image i is all of value i, so its mean tells its share."""
    np.random.seed(0)
    mix = ImagePreprocessor(num_classes=3, mode=mode, **options)
    for _ in range(3):
        data = mix(batch(), training=True)
        for i, (img, sample) in enumerate(zip(data['inputs']['img'], data['data_samples'])):
            j = 5 - i
            share = (img.mean() - j) / (i - j)
            expected = share * F.one_hot(torch.tensor(i % 3), 3) + (1 - share) * F.one_hot(torch.tensor(j % 3), 3)
            torch.testing.assert_close(sample.gt_scores, expected, atol=1e-5, rtol=1e-5)


def test_mixing_is_for_training_and_seeded():
    mix = ImagePreprocessor(mixup=1., num_classes=3)
    plain = mix(batch())
    assert 'gt_scores' not in plain['data_samples'][0] and plain['inputs']['img'][3].mean() == 3
    drawn = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        drawn.append(mix(batch(), training=True)['inputs']['img'])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert 'gt_scores' not in ImagePreprocessor()(batch(), training=True)['data_samples'][0]


def test_wrong_mixing():
    with pytest.raises(ValueError, match='this batch has 5: choose an even'):
        ImagePreprocessor(mixup=1., num_classes=3)(batch(5), training=True)
    with pytest.raises(ValueError, match='num_classes is not set'):
        ImagePreprocessor(mixup=1.)(batch(), training=True)
    with pytest.raises(ValueError, match="did you mean 'batch'"):
        ImagePreprocessor(mode='bach')
    with pytest.raises(ValueError, match='prob'):
        ImagePreprocessor(prob=2.)
    uneven = batch()
    uneven['inputs']['img'][1] = torch.zeros(1, 5, 4)
    with pytest.raises(ValueError, match='add a Resize or crop transform'):
        ImagePreprocessor()(uneven)


def test_soft_labels_in_the_loss():
    head = ClsHead(3, 8, form='linear', label_smoothing=0.1)
    feats, labels = torch.randn(4, 8), torch.tensor([0, 2, 1, 1])
    hard = [Sample(gt_label=label) for label in labels]
    soft = [Sample(gt_label=label, gt_scores=F.one_hot(label, 3).float()) for label in labels]
    one, other = head.loss(feats, hard), head.loss(feats, soft)
    torch.testing.assert_close(one['loss_cls'], other['loss_cls'])
    assert one['acc'] == other['acc']
