"""Transforms against plain versions, their limits, and what they must not do."""
import numpy as np
import pytest
import torch

from ewa3d.datasets import transforms as T
from ewa3d.registry import TRANSFORMS

ALL = [dict(type='Normalize'), dict(type='Resample', num_points=50), dict(type='UpAxis', to='y'),
       dict(type='Resample', num_points=50, method='random', pool=60),
       dict(type='Resample', num_points=200, pad='repeat'), dict(type='RandomScale'), dict(type='RandomShift'),
       dict(type='RandomRotate'), dict(type='RandomJitter'), dict(type='RandomDrop')]


def cloud(n=100, features=0, seed=0, **more):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 3 + features)).astype(np.float32)
    points.flags.writeable = False
    return dict(points=points, label=2, name='thing', index=5, up_axis='z', rng=np.random.default_rng(seed), **more)


def with_normals(n=100):
    results = cloud(n, 3, normals=True)
    points = results['points'].copy()
    points[:, 3:] /= np.linalg.norm(points[:, 3:], axis=1, keepdims=True)
    return {**results, 'points': points}


@pytest.mark.parametrize('cfg', ALL, ids=lambda c: '-'.join(map(str, c.values())))
@pytest.mark.parametrize('features', [0, 1, 3])
def test_every_transform_is_repeatable_keeps_the_source_and_the_dtype(cfg, features):
    transform = TRANSFORMS.build(cfg)
    source = cloud(features=features, parts=np.arange(100))
    before = source['points'].copy()
    one, two = (transform(dict(source, rng=np.random.default_rng(1))) for _ in range(2))
    assert np.array_equal(one['points'], two['points']) and one['points'].dtype == np.float32
    assert np.array_equal(source['points'], before)
    assert one['points'].shape[1] == 3 + features and len(one['parts']) == len(one['points'])
    rows = one['parts']  # the row that each point was: features move along with it
    assert np.array_equal(one['points'][:, 3:], before[rows, 3:])


@pytest.mark.parametrize('offset', [0, 1000])
def test_normalize(offset):
    results = cloud(500, 2)
    points = results['points'].copy()
    points[:, :3] += offset
    out = T.Normalize()(dict(results, points=points))['points']
    xyz = points[:, :3].astype(np.float64)
    xyz -= xyz.mean(0)
    np.testing.assert_allclose(out[:, :3], xyz / np.linalg.norm(xyz, axis=1).max(), atol=2e-6)
    assert np.linalg.norm(out[:, :3], axis=1).max() == pytest.approx(1, abs=1e-6)
    assert np.array_equal(out[:, 3:], points[:, 3:])


@pytest.mark.parametrize('n', [1, 7])
def test_normalize_of_one_place_is_the_origin(n):
    out = T.Normalize()(dict(points=np.full((n, 3), 5, np.float32)))['points']
    assert np.array_equal(out, np.zeros((n, 3)))


def naive_fps(xyz, num):
    picks = [0]
    while len(picks) < num:
        picks.append(int(np.min([np.square(xyz - xyz[p]).sum(1) for p in picks], axis=0).argmax()))
    return picks


def test_resample_fps_is_fps_on_any_order_and_a_slice_on_ordered_clouds():
    results = cloud(60)
    out = T.Resample(20)(dict(results))
    assert np.array_equal(out['points'], results['points'][naive_fps(results['points'].astype(float), 20)])
    out = T.Resample(20)(dict(results, fps_ordered=True))
    assert np.array_equal(out['points'], results['points'][:20])
    assert T.Resample(5)(out)['fps_ordered']


def test_resample_random_draws_from_the_pool_without_repetition():
    results = cloud(100, parts=np.arange(100), fps_ordered=True)
    seen = set()
    for seed in range(20):
        rows = T.Resample(30, 'random', pool=40)(dict(results, rng=np.random.default_rng(seed)))['parts']
        assert len(set(rows)) == 30
        seen |= set(rows.tolist())
    assert seen == set(range(40))
    again = T.Resample(30, 'random', pool=40)(dict(results))
    assert not again['fps_ordered']  # a later FPS must not take it for ordered


def test_a_pool_larger_than_the_cloud_is_the_whole_cloud():
    rows = T.Resample(100, 'random', pool=120)(cloud(100, parts=np.arange(100)))['parts']
    assert sorted(rows) == list(range(100))


def test_too_few_points_is_an_error_with_both_numbers_or_padded():
    with pytest.raises(ValueError, match=r'128.*100'):
        T.Resample(128)(cloud(100))
    rows = T.Resample(128, 'random', pad='repeat')(cloud(100, parts=np.arange(100)))['parts']
    assert len(rows) == 128 and set(rows) == set(range(100))


def test_up_axis_turns_without_mirroring():
    for now in 'xyz':
        for to in 'xyz':
            points = np.eye(3, dtype=np.float32)
            out = T.UpAxis(to)(dict(points=points, up_axis=now))
            assert out['up_axis'] == to
            assert np.array_equal(out['points']['xyz'.index(now)], points['xyz'.index(to)])
            assert np.linalg.det(out['points']) == pytest.approx(1)
    with pytest.raises(ValueError, match='which axis is up'):
        T.UpAxis('z')(dict(points=np.eye(3)))


def test_rotation_keeps_height_lengths_and_turns_normals_along():
    results = with_normals()
    out = T.RandomRotate()(dict(results))['points']
    np.testing.assert_allclose(out[:, 2], results['points'][:, 2], atol=1e-6)
    for columns in (slice(0, 3), slice(3, 6)):
        np.testing.assert_allclose(np.linalg.norm(out[:, columns], axis=1),
                                   np.linalg.norm(results['points'][:, columns], axis=1), rtol=1e-5)
    cosines = [np.einsum('ij,ij->i', p[:, :3], p[:, 3:]) for p in (out, results['points'])]
    np.testing.assert_allclose(*cosines, atol=1e-5)
    turned = T.RandomRotate('y', degrees=(90, 90))(dict(points=np.array([[0, 0, 1.]]), rng=np.random.default_rng(0)))
    np.testing.assert_allclose(turned['points'], [[1, 0, 0]], atol=1e-6)


def test_scale_ranges_and_normals_stay_perpendicular():
    results = with_normals()
    points = results['points'].copy()
    points[:, 2] = -(points[:, 0] * 1 + points[:, 1] * 2) / 3  # a plane with the normal (1, 2, 3)
    points[:, 3:] = np.array([1, 2, 3]) / np.sqrt(14)
    out = T.RandomScale((0.5, 2))(dict(results, points=points))['points']
    ratio = out[:, :3] / points[:, :3]
    assert np.ptp(ratio, axis=0).max() < 1e-4 and len(set(ratio[0].round(4))) == 3
    assert (ratio >= 0.5 - 1e-4).all() and (ratio <= 2 + 1e-4).all()
    assert np.abs((out[:, :3] * out[:, 3:]).sum(1)).max() < 1e-5
    np.testing.assert_allclose(np.linalg.norm(out[:, 3:], axis=1), 1, rtol=1e-5)
    ratio = T.RandomScale((0.5, 2), per_axis=False)(cloud())['points'] / cloud()['points']
    assert np.ptp(ratio) < 1e-5


def test_shift_and_jitter_stay_within_their_limits():
    source = cloud(5000)['points']
    moved = T.RandomShift(0.2)(cloud(5000))['points'] - source
    assert np.ptp(moved, axis=0).max() < 1e-5 and np.abs(moved).max() <= 0.2 + 1e-5
    noise = T.RandomJitter(0.01, 0.02)(cloud(5000))['points'] - source
    assert np.abs(noise).max() <= 0.02 + 1e-5 and 0.007 < noise.std() < 0.011


def test_drop_repeats_the_first_point_and_keeps_the_count():
    shares = []
    for seed in range(50):
        rows = T.RandomDrop(0.5)(cloud(1000, parts=np.arange(1000)) | dict(rng=np.random.default_rng(seed)))['parts']
        kept = rows == np.arange(1000)
        assert (rows[~kept] == 0).all()
        shares.append(1 - kept.mean())
    assert max(shares) < 0.56 and min(shares) < 0.1 and 0.15 < np.mean(shares) < 0.35


def test_pack():
    out = T.Pack()(cloud(10, 1, parts=np.arange(10, dtype=np.uint8)))
    points, sample = out['inputs']['points'], out['data_samples']
    assert points.dtype == torch.float32 and points.shape == (10, 4) and points.is_contiguous()
    assert sample.gt_label.dtype == torch.int64 and sample.gt_label.shape == () and int(sample.gt_label) == 2
    assert sample.gt_parts.dtype == torch.int64 and sample.gt_parts.tolist() == list(range(10))
    assert sample.name == 'thing' and sample.index == 5
    assert 'gt_label' not in T.Pack()(dict(points=np.zeros((3, 3))))['data_samples']


def test_pack_copies_so_that_the_data_cannot_be_changed():
    results = cloud(10)
    before = results['points'].copy()
    T.Pack()(results)['inputs']['points'].zero_()
    assert np.array_equal(results['points'], before)


@pytest.mark.parametrize('cfg', [
    dict(type='Resample', num_points=0), dict(type='Resample', num_points=8, method='furthest'),
    dict(type='Resample', num_points=8, method='random', pool=7), dict(type='Resample', num_points=8, pool=9),
    dict(type='Resample', num_points=8, pad='zeros'), dict(type='RandomScale', scale=(0, 1)),
    dict(type='RandomScale', scale=(2, 1)), dict(type='RandomShift', shift=-1), dict(type='RandomJitter', sigma=-0.1),
    dict(type='RandomJitter', clip=0), dict(type='RandomDrop', max_ratio=1.5), dict(type='RandomRotate', axis='w'),
    dict(type='RandomShift', shift=float('nan')), dict(type='UpAxis', to='up')],
    ids=lambda c: '-'.join(map(str, c.values())))
def test_values_out_of_range_are_refused(cfg):
    with pytest.raises(ValueError, match=cfg['type']):
        TRANSFORMS.build(cfg)


@pytest.mark.parametrize('cfg', [dict(type='Resample', num_points=8.5), dict(type='Resample', num_points=True),
                                 dict(type='RandomScale', scale='big'), dict(type='RandomScale', scale=(1, 2, 3)),
                                 dict(type='RandomDrop', max_ratio='half'), dict(type='RandomShift', shift=None)])
def test_values_of_another_type_are_refused(cfg):
    with pytest.raises(TypeError, match=cfg['type']):
        TRANSFORMS.build(cfg)


def test_an_unknown_keyword_or_name_suggests_the_right_one():
    with pytest.raises(TypeError, match='num_points'):
        TRANSFORMS.build(dict(type='Resample', npoints=5))
    with pytest.raises(KeyError, match='RandomShift'):
        TRANSFORMS.build(dict(type='RandomShft'))


@pytest.mark.parametrize('method, num, pool', [('fps', 20, None), ('fps', 100, None), ('random', 20, 30),
                                               ('random', 100, 100)])
def test_a_random_start_is_fps_of_all_points_from_there(method, num, pool):
    step = T.Resample(num, method, pool=pool, random_start=True)
    starts = set()
    for seed in range(8):
        source = cloud(parts=np.arange(100), fps_ordered=True)
        rows = step({**source, 'rng': np.random.default_rng(seed)})['parts']
        rng = np.random.default_rng(seed)
        if method == 'random' and pool == 100:  # all of it: a shuffle
            assert np.array_equal(rows, rng.permutation(100))
            continue
        xyz, picked = source['points'].astype(np.float64), [int(rng.integers(100))]
        while len(picked) < (pool or num):
            nearest = np.square(xyz[:, None] - xyz[None, picked]).sum(-1).min(1)
            picked.append(int(nearest.argmax()))
        starts.add(picked[0])
        expected = picked if method == 'fps' else np.array(picked)[rng.permutation(pool)[:num]]
        assert np.array_equal(rows, expected)
    assert pool == 100 or len(starts) > 4
    with pytest.raises(ValueError, match='random_start'):
        T.Resample(20, 'random', random_start=True)


@pytest.mark.parametrize('factor', [1e-37, 1e-25, 1e-12, 1e12, 1e25, 3e37])
def test_normalize_at_the_ends_of_the_range(factor):
    points = cloud()['points']
    scaled = (points * np.float32(factor)).astype(np.float32)
    expected = T.Normalize()(dict(points=points))['points']
    found = T.Normalize()(dict(points=scaled))['points']
    assert np.allclose(found, expected, atol=1e-5) and np.isclose(np.linalg.norm(found, axis=1).max(), 1)


def test_too_few_points_name_what_cut_them():
    with pytest.raises(ValueError, match=r'num_points=200.*max_points=100'):
        T.Resample(200)(cloud(max_points=100))
    with pytest.raises(ValueError, match=r'num_points=200.*the cloud has 100; pad'):
        T.Resample(200)(cloud(max_points=8192))
