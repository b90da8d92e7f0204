"""SyntheticShapes: the same everywhere, labelled, and not to be told apart by simple statistics."""
import hashlib
import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ewa3d.datasets import SyntheticShapes
from ewa3d.datasets.shapes import MAKERS, PARTS, make_shape, random_pose
from ewa3d.datasets.solids import Solid

REPO = Path(__file__).resolve().parents[1]


def fingerprint():
    dataset = SyntheticShapes(28, 100)
    raw = b''.join(dataset[i]['points'].tobytes() + dataset[i]['parts'].tobytes() for i in range(28))
    return hashlib.sha256(raw).hexdigest()


def test_metainfo():
    meta = SyntheticShapes(lazy_init=True).metainfo
    assert len(meta['classes']) >= 10 and meta['classes'] == tuple(sorted(meta['classes'])) and meta['up_axis'] == 'z'
    ids = [i for name in meta['classes'] for i in meta['parts'][name]]
    assert ids == list(range(len(meta['part_names']))) and tuple(MAKERS) == meta['classes']


def test_samples():
    dataset = SyntheticShapes(42, 300)
    classes = dataset.metainfo['classes']
    for i in range(42):
        sample = dataset[i]
        assert sample['points'].shape == (300, 3) and sample['points'].dtype == np.float32
        assert np.isfinite(sample['points']).all() and np.abs(sample['points']).max() < 2
        assert sample['label'] == i % len(classes)
        assert set(sample['parts']) <= set(dataset.metainfo['parts'][classes[sample['label']]])
        assert len(set(sample['parts'])) > 1


def test_it_is_the_same_in_another_process_and_made_on_the_fly():
    code = f'import sys; sys.path[:0] = {[str(REPO), str(REPO / "tests")]}; import test_datasets_shapes as t; ' \
           'print(t.fingerprint())'
    there = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert there.strip() == fingerprint()
    one, two = SyntheticShapes(30, 100), SyntheticShapes(30, 100, in_memory=False)
    for i in (29, 3):
        assert np.array_equal(one[i]['points'], two[i]['points']) and np.array_equal(one[i]['parts'], two[i]['parts'])
    assert np.array_equal(pickle.loads(pickle.dumps(two))[3]['points'], one[3]['points'])


def test_a_sample_depends_on_data_seed_split_and_index_only():
    base = SyntheticShapes(15, 64)[3]['points']
    assert np.array_equal(base, SyntheticShapes(99, 64, seed=5)[3]['points'])
    others = [SyntheticShapes(15, 64, data_seed=1)[3], SyntheticShapes(15, 64, split='test')[3],
              SyntheticShapes(18, 64)[17]]
    assert all(not np.array_equal(base, other['points']) for other in others)


def test_every_class_has_all_of_its_parts_and_varies():
    for label, name in enumerate(PARTS):
        shapes = [make_shape(label, 400, np.random.default_rng(seed)) for seed in range(6)]
        assert max(len(np.unique(parts)) for _, parts in shapes) == len(PARTS[name]), name
        extents = [np.ptp(points, axis=0) for points, _ in shapes]
        assert np.std(extents, axis=0).max() > 0.05, name


def test_points_are_drawn_by_area():
    solid = Solid()
    solid.box(0, (0, 0, 0), (2, 1, 1))  # area 10
    solid.tube(1, (5, 0, 0), 1, 1, caps='both')  # area 4 pi
    solid.dome(2, (9, 0, 0), 1, 1, -1)  # area 4 pi
    solid.tube(3, (20, 0, 0), 3, 1, 0)  # a cone of slant sqrt(10)
    points, parts = solid.sample(40_000, np.random.default_rng(0))
    areas = np.array([10, 4 * np.pi, 4 * np.pi, np.pi * np.sqrt(10)])
    np.testing.assert_allclose(np.bincount(parts) / 40_000, areas / areas.sum(), atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(points[parts == 2] - [9, 0, 0], axis=1), 1, atol=1e-9)
    np.testing.assert_allclose(points[parts == 2].mean(0), [9, 0, 0], atol=0.03)
    cone = points[parts == 3] - [20, 0, 0]
    np.testing.assert_allclose(np.linalg.norm(cone[:, :2], axis=1), 1 - cone[:, 2] / 3, atol=1e-9)
    assert cone[:, 2].mean() == pytest.approx(1, abs=0.03)  # the centroid of a mantle is at a third of its height
    box = points[parts == 0]
    np.testing.assert_allclose(box.mean(0), [1, 0.5, 0.5], atol=0.02)
    assert (np.minimum(np.abs(box), np.abs(box - [2, 1, 1])).min(1) < 1e-12).all()


def test_arguments():
    for kwargs in (dict(num_samples=-1), dict(num_samples=0), dict(num_points=0), dict(num_points=1),
                   dict(split='trian'), dict(data_seed=-1), dict(data_seed=0.5)):
        error = TypeError if kwargs.get('data_seed') == 0.5 else ValueError
        with pytest.raises(error, match=next(iter(kwargs))):
            SyntheticShapes(**{'num_samples': 5, 'lazy_init': True, **kwargs})
    for key, value in dict(hidden=2, outliers='a', noise=-1, tilt=float('nan'), unevenness=None, stretch=0).items():
        with pytest.raises(ValueError, match=f'{key} must be .* got {value!r}'):
            SyntheticShapes(5, shape_cfg={key: value})
    with pytest.raises(TypeError, match="'hiden'; did you mean 'hidden'"):
        SyntheticShapes(5, shape_cfg=dict(hiden=0.1))
    two = SyntheticShapes(130, num_points=2)
    assert all(np.isfinite(two[i]['points']).all() for i in range(130))
    with pytest.raises(TypeError, match='wobble'):
        SyntheticShapes(5, shape_cfg=dict(wobble=1))


def test_ranges_of_pose_and_box():
    draw = {name: [make_shape(3, 60, np.random.default_rng(seed), noise=0, outliers=0, hidden=0, **options)[0]
                   for seed in range(40)] for name, options in (
        ('default', {}), ('the same', dict(least_tilt=0.0, tilt=35.0, stretch=0.5)),
        ('upright', dict(tilt=0)), ('leaning', dict(tilt=50, least_tilt=50)), ('cube', dict(tilt=0, stretch=1)))}
    for a, b in zip(draw['default'], draw['the same']):
        np.testing.assert_array_equal(a, b)
    # legs end on a floor: upright it is level
    level = {name: np.mean([np.ptp(np.sort(x[:, 2])[:6]) for x in clouds]) for name, clouds in draw.items()}
    assert level['leaning'] > 2 * level['upright']
    sides = np.array([np.ptp(x[:, 2]) for x in draw['cube']])
    assert sides.std() < 0.5 * np.std([np.ptp(x[:, 2]) for x in draw['upright']])


@pytest.mark.parametrize('least', [0, 20, 35])
def test_poses_lean_by_what_is_asked_for(least):
    rng = np.random.default_rng(0)
    leans = [np.rad2deg(np.arccos(random_pose(rng, (least, 35.))[2, 2])) for _ in range(200)]
    assert least - 1e-4 <= min(leans) and max(leans) <= 35 + 1e-4
    assert np.ptp(leans) >= 0.8 * (35 - least)


def statistics(points):
    """Box and moments up to the fourth order, in raw and in invariant forms."""
    low, high = points.min(0), points.max(0)
    extent, mean = high - low, points.mean(0)
    centred = points - mean
    radius = np.linalg.norm(centred, axis=1)
    scaled = centred / centred.std(0)
    moments = [np.prod(centred[:, axes], axis=1).mean() for order in (2, 3, 4)
               for axes in itertools.combinations_with_replacement(range(3), order)]
    return np.concatenate([extent, np.sort(extent), np.log(extent), low, high, mean, (mean - low) / extent,
                           np.linalg.eigvalsh(np.cov(centred.T)), (scaled ** 3).mean(0), (scaled ** 4).mean(0), moments,
                           [radius.mean(), radius.std(), radius.max(), (radius ** 3).mean()]])


def test_a_linear_model_on_box_and_moments_stays_below_70_percent():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    sets = []
    for split, size in (('train', 1500), ('test', 500)):
        dataset = SyntheticShapes(size, 512, split=split)
        sets.append((np.stack([statistics(dataset[i]['points']) for i in range(size)]), np.arange(size) % len(PARTS)))
    accuracy = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(*sets[0]).score(*sets[1])
    assert 0.3 < accuracy < 0.7
