"""Every transform on any cloud, scene, image or clip: finite numbers of the promised kind."""
import copy

import numpy as np
import pytest
import torch

from ewa3d.datasets.io import as_cloud
from ewa3d.registry import TRANSFORMS

hypothesis = pytest.importorskip('hypothesis')
arrays = pytest.importorskip('hypothesis.extra.numpy')
st = hypothesis.strategies

EXAMPLES = 40
RANDOM = dict(type='Resample', num_points=5, method='random', pad='repeat')
CLOUDS = [dict(type='Normalize'), dict(type='Resample', num_points=4, pad='repeat'), RANDOM,
          dict(RANDOM, pool=6, random_start=True), dict(RANDOM, replace=True, pad=None), dict(type='KeepAll'),
          dict(type='UpAxis', to='y'), dict(type='RandomScale'), dict(type='RandomScale', per_axis=False),
          dict(type='RandomShift'), dict(type='RandomRotate'), dict(type='RandomRotate', axis='x'),
          dict(type='RandomJitter'), dict(type='RandomDrop')]
SCENES = [dict(type='RandomCuboid', min_points=2, tries=5), dict(type='SceneFlip', axes='xy'),
          dict(type='SceneRotate'), dict(type='SceneRotate', refit=True), dict(type='SceneScale'),
          dict(type='AddHeight')]
IMAGES = [dict(type='ImageTransforms', transforms=[dict(name='RandomCrop', size=4, padding=2, pad_if_needed=True),
                                                   dict(name='RandomHorizontalFlip'), dict(name='ToImage')])]
CLIPS = [dict(type='LoadClip', clip_len=3), dict(type='LoadClip', clip_len=2, sampling='dense', num_clips=2, test=True)]
ENDS = {'points': dict(type='Pack'), 'boxes': dict(type='PackBoxes'), 'img': dict(type='PackImage'),
        'video': dict(type='PackClip'), 'clouds': dict(type='PackClouds')}
AFTER_CLIPS = [dict(type='ClipFlip'), dict(type='ThreeCrop', size=2)]
STEPS = [*CLOUDS, *SCENES, *IMAGES, *CLIPS, *AFTER_CLIPS, *ENDS.values()]

# Coordinates as they come: ordinary ones, all alike, in a line, tiny, huge.
number = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0., 1., -1., 1e-30, 1e30, -1e30, 1e-45, 5e6]))
points = arrays.arrays(np.float32, st.tuples(st.integers(1, 9), st.just(6)), elements=number,
                       fill=st.sampled_from([0., 0.3, 1e30]))
boxes = arrays.arrays(np.float32, st.tuples(st.integers(0, 4), st.just(7)), elements=st.floats(0.125, 9, width=32))
images = arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3)))
videos = arrays.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(2, 5), st.integers(2, 5), st.just(3)))


def settings(count: int = EXAMPLES):
    return hypothesis.settings(max_examples=count, deadline=None, database=None, derandomize=True,
                               suppress_health_check=list(hypothesis.HealthCheck))  # they go by the clock


def sample(seed: int, **content) -> dict:
    return dict(rng=np.random.default_rng(seed), label=1, index=0, name='one', **content)


def cloud(xyz: np.ndarray, seed: int, normals: bool) -> dict:
    return sample(seed, points=as_cloud(xyz, 'x'), normals=normals, up_axis='z', parts=np.arange(len(xyz)))


def apply(results: dict, *steps: dict) -> dict:
    """The sample behind the steps, which leave what they were given as it was and draw from its generator alone."""
    given = {key: value.copy() for key, value in results.items() if isinstance(value, np.ndarray)}
    before, twin = dict(results), copy.deepcopy(results)
    for value in before.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    torch.manual_seed(0)
    out = _run(results, steps)
    torch.manual_seed(1)
    np.random.seed(1)
    again = _run(twin, steps)
    for key, value in given.items():
        assert np.array_equal(before[key], value), f'{key} was written to'
    for key, value in out.items():
        if isinstance(value, (np.ndarray, torch.Tensor)):
            assert np.array_equal(np.asarray(value), np.asarray(again[key])), f'{key} differs at the second time'
    return out


def _run(results: dict, steps: tuple) -> dict:
    for step in steps:
        results = TRANSFORMS.build(dict(step))(results)
    return results


@pytest.mark.parametrize('step', CLOUDS, ids=str)
def test_clouds(step):
    @settings()
    @hypothesis.given(points, st.integers(0, 9), st.booleans())
    def check(xyz, seed, normals):
        out = apply(cloud(xyz, seed, normals), step)
        assert out['points'].dtype == np.float32 and out['points'].ndim == 2 and out['points'].shape[1] == 6
        assert np.isfinite(out['points']).all() and len(out['points']) == len(out['parts']) > 0
        assert set(out['parts'].tolist()) <= set(range(len(xyz)))

    check()


@pytest.mark.parametrize('step', SCENES, ids=str)
def test_scenes(step):
    @settings()
    @hypothesis.given(points, boxes, st.integers(0, 9))
    def check(xyz, boxes, seed):
        scene = cloud(xyz, seed, False)
        scene.update(boxes=boxes, box_labels=np.arange(len(boxes)))
        del scene['parts']
        out = apply(scene, step)
        assert out['points'].dtype == out['boxes'].dtype == np.float32
        assert np.isfinite(out['points']).all() and np.isfinite(out['boxes']).all() and len(out['points'])
        assert len(out['boxes']) == len(out['box_labels']) and (out['boxes'][:, 3:6] > 0).all()
        packed = apply(out, ENDS['boxes'])
        assert packed['data_samples'].gt_boxes.shape == (len(out['boxes']), 7)

    check()


@pytest.mark.parametrize('step', [s for s in CLOUDS if s['type'] in (
    'Normalize', 'UpAxis', 'RandomScale', 'RandomShift', 'RandomRotate')], ids=str)
def test_what_would_tear_boxes_from_their_points_says_so(step):
    scene = cloud(np.eye(3, 6, dtype=np.float32), 0, False)
    scene.update(boxes=np.ones((1, 7), np.float32), box_labels=np.zeros(1, int))
    with pytest.raises(ValueError, match='boxes'):
        apply(scene, step)


@pytest.mark.parametrize('step', IMAGES, ids=['torchvision'])
def test_images(step):
    @settings()
    @hypothesis.given(images, st.integers(0, 9))
    def check(img, seed):
        packed = apply(sample(seed, img=img), step, ENDS['img'])
        assert packed['inputs']['img'].shape == (3, 4, 4) and packed['inputs']['img'].isfinite().all()
        assert packed['inputs']['img'].min() >= 0 and packed['inputs']['img'].max() <= 1

    check()


@pytest.mark.parametrize('step', CLIPS, ids=str)
def test_clips(step):
    @settings()
    @hypothesis.given(videos, st.integers(0, 9))
    def check(video, seed):
        packed = apply(sample(seed, video=video), step, *AFTER_CLIPS, ENDS['video'])
        views = 3 * step.get('num_clips', 1)
        assert packed['inputs']['video'].shape == (views, step['clip_len'], 3, 2, 2)
        assert packed['inputs']['video'].isfinite().all()

    check()


@pytest.mark.parametrize('frames', [1, 3])
def test_clips_of_clouds(frames):
    @settings()
    @hypothesis.given(points)
    def check(xyz):
        clip = np.concatenate([np.column_stack([xyz, np.full(len(xyz), frame, np.float32)]) for frame in range(frames)])
        packed = apply(sample(0, points=clip[::-1].copy(), normals=False, up_axis='z'), ENDS['clouds'])
        expected = torch.from_numpy(np.stack([xyz[::-1]] * frames))
        assert torch.equal(packed['inputs']['points'], expected)

    check()


def test_clouds_are_packed_as_they_are():
    @settings()
    @hypothesis.given(points)
    def check(xyz):
        packed = apply(cloud(xyz, 0, False), ENDS['points'])
        assert np.array_equal(packed['inputs']['points'].numpy(), as_cloud(xyz, 'x'))
        assert packed['data_samples'].gt_parts.tolist() == list(range(len(xyz)))

    check()


def test_every_transform_is_here():
    TRANSFORMS.import_from_location()
    known = {name for name, cls in TRANSFORMS.module_dict.items() if cls.__module__.startswith('ewa3d.')}
    assert known == {step['type'] for step in STEPS}
