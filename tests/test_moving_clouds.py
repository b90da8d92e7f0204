"""Sequences of clouds: what the set holds, how they are packed, and a run on them."""
import numpy as np
import pytest
import torch
from engine_toys import on_cpu, toy_config  # noqa: F401

from ewa3d.datasets.moving_clouds import MovingClouds, PackClouds
from ewa3d.engine.runner import Runner
from ewa3d.registry import DATASETS, TRANSFORMS


def test_clips():
    data = MovingClouds(12, num_frames=5, num_points=20)
    assert data.labels == [0, 1, 2, 3, 4, 5] * 2 and len(data.metainfo['classes']) == 6
    clip = data[3]['points']
    assert clip.shape == (100, 4) and clip.dtype == np.float32 and clip[:, 3].tolist() == sorted([*range(5)] * 20)
    assert np.array_equal(clip, MovingClouds(4, num_frames=5, num_points=20)[3]['points'])
    assert not np.array_equal(clip, MovingClouds(4, num_frames=5, num_points=20, split='test')[3]['points'])
    assert not np.array_equal(clip, MovingClouds(4, num_frames=5, num_points=20, data_seed=1)[3]['points'])
    assert not np.array_equal(clip[:20, :3], clip[20:40, :3])
    assert MovingClouds(1, num_frames=1, num_points=1)[0]['points'].shape == (1, 4)
    assert MovingClouds(6, num_frames=2, num_points=4, on_error='skip').skipped == []
    assert DATASETS.get('MovingClouds') is MovingClouds and TRANSFORMS.get('PackClouds') is PackClouds


@pytest.mark.parametrize(('options', 'error', 'message'), [
    (dict(num_frames=0), ValueError, 'num_frames must be at least 1'), (dict(num_points=2.), TypeError, 'num_points'),
    (dict(num_samples=0), ValueError, 'num_samples'), (dict(noise=2), ValueError, 'noise must lie in'),
    (dict(split='all'), ValueError, "no split 'all'")])
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        MovingClouds(**options)


def test_they_move_as_their_class_says():
    data = MovingClouds(36, num_frames=4, num_points=400, noise=0.)
    for i in range(36):
        clip = data[i]['points'][:, :3].reshape(4, 400, 3)
        centre = (clip.min(1) + clip.max(1))[:, :2] / 2
        dx, dy = np.median((np.diff(centre, axis=0) + 1) % 2 - 1, axis=0)
        name = data.metainfo['classes'][data.labels[i]]
        far = dict(forward=dx, back=-dx, left=dy, right=-dy).get(name)
        assert far is None or far > 0.08, (name, dx, dy)
        if far is None:
            assert abs(centre - centre[0]).max() < 0.3


def test_one_cloud_says_nothing():
    """Single clouds are spread over the world in the same way, whatever the class."""
    data = MovingClouds(600, num_frames=3, num_points=8)
    centres = np.stack([data[i]['points'][8:16, :2].mean(0) for i in range(600)]).reshape(100, 6, 2)
    assert abs(centres.mean(0)).max() < 0.25 and abs(centres.std(0) - 3 ** -0.5).max() < 0.15


def test_packing():
    points = np.arange(24, dtype=np.float32).reshape(6, 4)
    points[:, 3] = [1, 0, 2, 0, 1, 2]
    packed = PackClouds()(dict(points=points, label=2, name='a', index=0))
    assert packed['inputs']['points'][:, :, 0].tolist() == [[4, 12], [0, 16], [8, 20]]
    assert packed['inputs']['points'].shape == (3, 2, 3) and int(packed['data_samples'].gt_label) == 2
    with pytest.raises(ValueError, match='3 frames have 1 to 2 points'):
        PackClouds()(dict(points=points[:5]))
    with pytest.raises(ValueError, match=r'the frame of each point in the last column was expected, got \(6, 3\)'):
        PackClouds()(dict(points=points[:, :3]))


def test_transforms_treat_a_clip_as_a_whole():
    steps = [dict(type='RandomScale', scale=(2., 2.)), dict(type='PackClouds')]
    plain, scaled = (MovingClouds(1, num_frames=3, num_points=4, pipeline=p)[0]['inputs']['points']
                     for p in (steps[1:], steps))
    torch.testing.assert_close(scaled, 2 * plain)


def test_a_run_on_clips_of_clouds(tmp_path):
    cfg = toy_config(tmp_path, epochs=1)
    tokenizer = dict(type='PointClipEmbed', num_frames=3, num_groups=4, group_size=4, widths=(8, 8, 8))
    cfg['model'] = dict(
        type='TaskModel', backbone=dict(type='TokenEncoder', tokenizer=tokenizer, embed_dim=16, depth=2, num_heads=2),
        neck=dict(type='ClipPool'), head=dict(type='I3DHead'),
        expand=[dict(type='STDHA', at='backbone.blocks.*.attn', offsets=[-1, 1])])
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader']['dataset'] = dict(type='MovingClouds', num_samples=10, num_frames=3, num_points=16,
                                                     split=split, pipeline=[dict(type='PackClouds')])
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert 0 <= runner.test()['OA'] <= 100
