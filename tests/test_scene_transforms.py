"""Points and boxes move together; pictures of boxes."""
import numpy as np
import pytest
import torch

from ewa3d import ops
from ewa3d.datasets import SyntheticScenes
from ewa3d.registry import TRANSFORMS
from ewa3d.viewer import write_html
from ewa3d.visualization import draw_clouds
from ewa3d.visualization_boxes import box_cells, box_edges


def scene(seed=0, N=900, M=3, features=0):
    """Boxes whose points are those inside: what a transform must keep."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-2, 2, (N, 3 + features)).astype(np.float32)
    boxes = np.concatenate([rng.uniform(-1, 1, (M, 3)), rng.uniform(.8, 1.5, (M, 3)), rng.uniform(-3, 3, (M, 1))], 1)
    return dict(points=points, boxes=boxes.astype(np.float32), box_labels=np.arange(M), rng=rng, up_axis='z',
                name='s', index=0, normals=False)


def inside(results):
    return ops.points_in_boxes(torch.tensor(results['points']), torch.tensor(results['boxes']))


def apply(results, **cfg):
    before = {key: np.array(results[key]) for key in ('points', 'boxes')}
    for key in before:
        results[key].flags.writeable = False
    found = TRANSFORMS.build(cfg)(dict(results))
    assert all(np.array_equal(before[key], results[key]) for key in before)  # nothing is written in place
    assert found['points'].dtype == found['boxes'].dtype == np.float32
    return found


@pytest.mark.parametrize('cfg', [dict(type='SceneFlip', axes='x', p=1.), dict(type='SceneFlip', axes='y', p=1.),
                                 dict(type='SceneFlip', axes='xy', p=1.), dict(type='SceneRotate', degrees=(170, 175)),
                                 dict(type='SceneRotate', degrees=(-20, -10)), dict(type='SceneScale', scale=(.5, .6))])
def test_the_same_points_stay_inside(cfg):
    for seed in range(3):
        before = scene(seed)
        after = apply(before, **cfg)
        assert not np.allclose(after['points'], before['points'])
        assert float((inside(after) != inside(before)).float().mean()) < 2e-3  # rounding at the faces
        assert np.abs(after['boxes'][:, 6]).max() <= np.pi + 1e-6


def test_published_flip_and_turn():
    box = np.float32([[1, 2, 3, 1, 2, 3, .5]])
    flipped = apply(scene() | dict(boxes=box), type='SceneFlip', axes='x', p=1.)['boxes'][0]
    np.testing.assert_allclose(flipped, [-1, 2, 3, 1, 2, 3, np.pi - .5], atol=1e-6)
    turned = apply(scene() | dict(boxes=box), type='SceneRotate', degrees=(90, 90))['boxes'][0]
    np.testing.assert_allclose(turned, [-2, 1, 3, 1, 2, 3, .5 + np.pi / 2], atol=1e-6)
    same = apply(scene() | dict(boxes=box), type='SceneFlip', p=0.)['boxes'][0]
    np.testing.assert_array_equal(same, box[0])


def test_refit_is_the_hull_of_the_turned_box():
    before = scene()
    before['boxes'][:, 6] = 0
    plain = apply(before, type='SceneRotate', degrees=(5, 5))
    refit = apply(before, type='SceneRotate', degrees=(5, 5), refit=True)
    corners = ops.box3d_corners(torch.tensor(plain['boxes']))
    hull = corners.amax(1) - corners.amin(1)
    np.testing.assert_allclose(refit['boxes'][:, 3:6], hull, atol=1e-5)
    np.testing.assert_allclose(refit['boxes'][:, :3], plain['boxes'][:, :3])
    assert not refit['boxes'][:, 6].any()


def test_height_is_a_column_that_scales():
    found = apply(scene(features=2), type='AddHeight')
    floor = np.percentile(found['points'][:, 2], .99)
    np.testing.assert_allclose(found['points'][:, 5], found['points'][:, 2] - floor, atol=1e-6)
    scaled = apply(found, type='SceneScale', scale=(2, 2))
    np.testing.assert_allclose(scaled['points'][:, [0, 1, 2, 5]], 2 * found['points'][:, [0, 1, 2, 5]], atol=1e-6)
    np.testing.assert_array_equal(scaled['points'][:, 3:5], found['points'][:, 3:5])


def test_cuboid():
    for seed in range(4):
        before = scene(seed, N=4000, M=5)
        after = apply(before, type='RandomCuboid', min_points=300, crop=(.4, .6))
        low, high = after['points'][:, :3].min(0), after['points'][:, :3].max(0)
        assert 300 <= len(after['points']) < 4000 and 1 <= len(after['boxes']) <= 5
        rows = {tuple(row) for row in before['points'].tolist()}
        assert all(tuple(row) in rows for row in after['points'].tolist())
        kept = {tuple(row) for row in after['boxes'].tolist()}
        for box, label in zip(before['boxes'], before['box_labels']):
            centre_in = bool(((box[:3] > low) & (box[:3] < high)).all())
            assert tuple(box.tolist()) in kept or not centre_in
            assert (label in after['box_labels']) == (tuple(box.tolist()) in kept)


def test_cuboids_that_find_nothing_leave_the_scene():
    before = scene()
    for cfg in (dict(min_points=901), dict(min_points=900, crop=(.1, .2)), dict(min_points=1, aspect=1., tries=3)):
        after = apply(before, type='RandomCuboid', **cfg)
        assert after['points'] is before['points'] and after['boxes'] is before['boxes']
    away = scene()
    away['boxes'][:, :3] += 100  # no cuboid keeps a box
    assert len(apply(away, type='RandomCuboid', min_points=5)['points']) == 900
    empty = scene() | dict(boxes=np.zeros((0, 7), np.float32), box_labels=np.zeros(0, np.int64))
    assert len(apply(empty, type='RandomCuboid', min_points=5, crop=(.3, .4))['points']) < 900


def test_a_pipeline():
    steps = [dict(type='RandomCuboid', min_points=500), dict(type='SceneFlip', axes='xy'), dict(type='SceneRotate'),
             dict(type='SceneScale'), dict(type='AddHeight'),
             dict(type='Resample', num_points=700, method='random', pad='repeat'), dict(type='PackBoxes')]
    data = SyntheticScenes(3, num_points=1000, pipeline=steps)
    for sample in data:
        assert sample['inputs']['points'].shape == (700, 4)
        boxes = sample['data_samples'].gt_boxes
        assert boxes.dtype == torch.float32 and len(boxes) == len(sample['data_samples'].gt_labels)
        assert bool((boxes[:, 3:6] > 0).all()) and sample['data_samples'].name.startswith('train_')
    none = TRANSFORMS.build(dict(type='PackBoxes'))(scene(M=0))['data_samples']
    assert none.gt_boxes.shape == (0, 7) and none.gt_labels.shape == (0,)


@pytest.mark.parametrize('name', ['Normalize', 'UpAxis', 'RandomScale', 'RandomShift', 'RandomRotate'])
def test_transforms_of_single_clouds_do_not_leave_boxes_behind(name):
    with pytest.raises(ValueError, match='boxes, which would stay where they are'):
        TRANSFORMS.build(dict(type=name))(scene())
    assert len(TRANSFORMS.build(dict(type='RandomJitter'))(scene())['boxes']) == 3


@pytest.mark.parametrize('cfg, error, message', [
    (dict(type='SceneFlip', axes='z'), ValueError, "axes must be 'x', 'y' or 'xy', got 'z'"),
    (dict(type='SceneFlip', p=2), ValueError, 'SceneFlip: p'),
    (dict(type='SceneScale', scale=(0, 1)), ValueError, 'SceneScale: scale'),
    (dict(type='SceneRotate', degrees=(3, 2)), ValueError, 'degrees'),
    (dict(type='RandomCuboid', crop=(.5, 2)), ValueError, r'crop must lie in \(0, 1\]'),
    (dict(type='RandomCuboid', min_points=0), ValueError, 'min_points must be at least 1'),
    (dict(type='AddHeight', percentile=101), ValueError, 'percentile')])
def test_options_that_cannot_be(cfg, error, message):
    with pytest.raises(error, match=message):
        TRANSFORMS.build(cfg)


def test_a_cloud_without_boxes_is_refused():
    results = scene()
    del results['boxes']
    for name in ('SceneFlip', 'SceneRotate', 'SceneScale', 'PackBoxes', 'RandomCuboid'):
        with pytest.raises(ValueError, match=r"no 'boxes'"):
            TRANSFORMS.build(dict(type=name, **dict(p=1.) if name == 'SceneFlip' else {}))(dict(results))


# ---- pictures -------------------------------------------------------------------------------------------------------
def test_edges_lie_on_the_box():
    box = torch.tensor([[1., 2, 3, 1, 2, 3, .5], [0, 0, 0, 1, 1, 1, 0]])
    edges, owner = box_edges(box, .1)
    first = torch.tensor(edges[owner == 0]).float()
    assert set(owner) == {0, 1} and float((first - box[0, :3]).norm(dim=1).min()) > .5
    grown = box[:1] * torch.tensor([1, 1, 1, 1.001, 1.001, 1.001, 1])
    assert bool(ops.points_in_boxes(first, grown).all())
    assert not bool(ops.points_in_boxes(first, box[:1] * torch.tensor([1, 1, 1, .999, .999, .999, 1])).any())
    corners = torch.cdist(ops.box3d_corners(box[0]), first).amin(1)
    assert float(corners.max()) < 1e-5
    assert box_edges(np.zeros((0, 7)), .1)[0].shape == (0, 3)


def test_pictures(tmp_path):
    from matplotlib.image import imread
    scenes = [scene(0), scene(1, M=0)]
    cells = box_cells([s['points'] for s in scenes], [s['boxes'] for s in scenes], [s['box_labels'] for s in scenes],
                      predicted=[torch.tensor(s['boxes'][:1]) for s in scenes], names=['a', 'b'],
                      classes=('bed', 'chair', 'desk'))
    assert cells['titles'] == ['a: 3 boxes', 'predicted: 1 box', 'b: 0 boxes', 'predicted: 0 boxes'] and \
        cells['columns'] == 2
    assert list(cells['legend']) == ['bed', 'chair', 'desk'] and len(set(cells['legend'].values())) == 3
    assert imread(draw_clouds(path=tmp_path / 'a.png', **cells)).min() < .6
    page = write_html(path=tmp_path / 'a.html', **cells).read_text()
    assert 'predicted: 1 box<' in page and f'<span style="color: {cells["legend"]["bed"]}">■ bed</span>' in page
    plain = box_cells([scenes[0]['points']], [scenes[0]['boxes']], classes=('bed',))
    assert plain['titles'] == ['3 boxes'] and not plain['legend']
    assert '<span' not in write_html(path=tmp_path / 'b.html', **plain).read_text()
    assert len(np.unique(plain['colors'][0], axis=0)) == 2


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(boxes=[]), ValueError, 'one entry for each of 1 clouds'),
    (dict(boxes=[np.zeros((2, 6))]), ValueError, r'boxes\[0\] must be'),
    (dict(boxes=[np.full((1, 7), np.nan)]), ValueError, r'boxes\[0\] must be \(M, 7\) finite'),
    (dict(boxes=[np.ones((2, 7))], labels=[[0]]), ValueError, r'boxes\[0\] has 2 boxes and 1 labels')])
def test_cells_that_cannot_be(kwargs, error, message):
    with pytest.raises(error, match=message):
        box_cells([np.zeros((4, 3))], **kwargs)
