"""Scenes with boxes: the layouts that are read, what is refused, and the synthetic rooms."""
import json

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate

from ewa3d import ops
from ewa3d.bench.clusters import cluster_boxes, evaluate
from ewa3d.bench.clusters import main as clusters_main
from ewa3d.datasets import FolderScenes, ScanNetDetection, SUNRGBDDetection, SyntheticScenes
from ewa3d.datasets.rooms import MAKERS, make_scene, overlap
from ewa3d.datasets.scenes import check_boxes
from ewa3d.datasets.solids import Solid
from ewa3d.registry import DATASETS

RNG = np.random.default_rng


# ---- ScanNet --------------------------------------------------------------------------------------------------------
@pytest.fixture
def scannet(tmp_path):
    """Two scenes in VoteNet's layout, the second without boxes."""
    root = tmp_path / 'scans'
    root.mkdir()
    for i, boxes in enumerate(([[.5, .5, .5, 1, 2, 1, 5], [2, 2, .5, 1, 1, 1, 39]], [])):
        rows = RNG(i).uniform(0, 3, (200, 6))
        rows[:, 3:] *= 80
        np.save(root / f'scene{i}_vert.npy', rows.astype(np.float32))
        np.save(root / f'scene{i}_bbox.npy', np.array(boxes, np.float64))
    (root / 'scannetv2_train_subset.txt').write_text('scene0\nscene1\n')
    return root


def test_scannet(scannet):
    data = ScanNetDetection(scannet)
    sample, empty = data
    rows = np.load(scannet / 'scene0_vert.npy')
    assert len(data.metainfo['classes']) == 18 and data.metainfo['up_axis'] == 'z'
    np.testing.assert_array_equal(sample['points'], rows[:, :3])
    np.testing.assert_array_equal(sample['boxes'], np.float32([[.5, .5, .5, 1, 2, 1, 0], [2, 2, .5, 1, 1, 1, 0]]))
    assert [data.metainfo['classes'][k] for k in sample['box_labels']] == ['chair', 'garbage_bin']
    assert empty['boxes'].shape == (0, 7) and empty['box_labels'].shape == (0,)
    colored = ScanNetDetection(scannet, color=True)[0]['points']
    np.testing.assert_allclose(colored[:, 3:], (rows[:, 3:] - [109.8, 97.2, 83.8]) / 256, atol=1e-6)


def test_scannet_lists(scannet):
    (scannet.parent / 'meta_data').mkdir()
    (scannet.parent / 'meta_data' / 'scannetv2_train.txt').write_text('scene1\n')
    assert [s['name'] for s in ScanNetDetection(scannet)] == ['scene1']  # the official list comes first
    own = scannet / 'own.txt'
    own.write_text('scene0\nscene7\n')
    with pytest.raises(FileNotFoundError, match=r'own.txt: 2 of the 4 files.*scene7_vert.npy'):
        ScanNetDetection(scannet, list_file=own)
    with pytest.raises(FileNotFoundError, match=r'no list scannetv2_val.txt.*list_file='):
        ScanNetDetection(scannet, split='val')
    with pytest.raises(ValueError, match="no split 'all'"):
        ScanNetDetection(scannet, split='all')


@pytest.mark.parametrize('box, message', [
    ([0, 0, 0, 1, 1, 1, 13], r'scene0_bbox.npy: a box is of the class 13, which is none of 3, 4'),
    ([0, 0, 0, 1, 0, 1, 5], r'scene0_bbox.npy: box 1 has the sizes \[1.0, 0.0, 1.0\], which must be positive'),
    ([0, 0, 0, 1, -2, 1, 5], 'must be positive'), ([0, np.nan, 0, 1, 1, 1, 5], 'scene0_bbox.npy: box 1 is not finite'),
    ([0, 0, 0, np.inf, 1, 1, 5], 'not finite'), ([0, 0, 0, 1e300, 1, 1, 5], 'not finite')])
def test_scannet_boxes_that_cannot_be(scannet, box, message):
    np.save(scannet / 'scene0_bbox.npy', np.array([[0, 0, 0, 1, 1, 1, 5], box], np.float64))
    with pytest.raises(ValueError, match=message):
        ScanNetDetection(scannet)[0]


def test_scannet_files_that_cannot_be(scannet):
    np.save(scannet / 'scene0_bbox.npy', np.zeros((2, 6)))
    with pytest.raises(ValueError, match=r'scene0_bbox.npy: rows of 7 numbers were expected, got \(2, 6\)'):
        ScanNetDetection(scannet)[0]
    for rows, message in ((np.full((3, 6), np.nan), 'NaN or infinite'), (np.zeros((0, 6)), r'got \(0, 3\)')):
        np.save(scannet / 'scene0_vert.npy', rows)
        np.save(scannet / 'scene0_bbox.npy', np.zeros((0, 7)))
        with pytest.raises(ValueError, match=r'scene0_vert\.npy: .*' + message):
            ScanNetDetection(scannet)[0]
    (scannet / 'scene0_vert.npy').write_bytes(b'\x93NUMPY')
    with pytest.raises(ValueError, match=r'scene0_vert\.npy: cannot be read'):
        ScanNetDetection(scannet)[0]


def test_real_scannet(dataset_dir):
    root = dataset_dir('scannet_train_detection_data')
    data, val = ScanNetDetection(root), ScanNetDetection(root, split='val')
    assert (len(data), len(val)) == (17, 6)
    sample = data[0]
    counts = ops.points_in_boxes(torch.tensor(sample['points']), torch.from_numpy(sample['boxes'])).sum(-1)
    assert sample['points'].shape == (50_000, 3) and int(counts.min()) >= 5
    assert sum(len(np.load(entry['boxes_path'])) for entry in data._data_list) == 219


# ---- SUN RGB-D ------------------------------------------------------------------------------------------------------
@pytest.fixture
def sunrgbd(tmp_path):
    for split in ('train', 'val'):
        folder = tmp_path / f'sunrgbd_pc_bbox_votes_50k_v1_{split}'
        folder.mkdir()
        np.savez(folder / '000007_pc.npz', pc=RNG(7).uniform(0, 1, (100, 6)).astype(np.float32))
        np.save(folder / '000007_bbox.npy', np.array([[1, 2, 3, .5, 1, .25, .3, 8], [0, 0, 0, 1, 1, 1, -2, 0]]))
    return tmp_path


def test_sunrgbd(sunrgbd):
    by_prefix = SUNRGBDDetection(sunrgbd / 'sunrgbd_pc_bbox_votes_50k_v1')
    itself = SUNRGBDDetection(sunrgbd / 'sunrgbd_pc_bbox_votes_50k_v1_val', split='val')
    for data in (by_prefix, SUNRGBDDetection(sunrgbd, split='val'), itself):
        (sample,) = data
        np.testing.assert_allclose(sample['boxes'], [[1, 2, 3, 1, 2, .5, -.3], [0, 0, 0, 2, 2, 2, 2]], atol=1e-6)
        assert sample['box_labels'].tolist() == [8, 0] and sample['points'].shape == (100, 3)
        assert data.metainfo['classes'][8] == 'bookshelf' and len(data.metainfo['classes']) == 10
    colored = SUNRGBDDetection(sunrgbd, color=True)[0]['points']
    assert colored.shape == (100, 6) and abs(float(colored[:, 3:].mean())) < .1
    folder = sunrgbd / 'sunrgbd_pc_bbox_votes_50k_v1_train'
    np.save(folder / '000007_bbox.npy', np.array([[1, 2, 3, .5, 1, .25, .3, 12]]))
    with pytest.raises(ValueError, match=r'000007_bbox\.npy: a box is of the class 12'):
        by_prefix[0]
    (folder / '000007_bbox.npy').unlink()
    with pytest.raises(FileNotFoundError, match='1 of the 2 files'):
        SUNRGBDDetection(sunrgbd)
    with pytest.raises(FileNotFoundError, match='no folder'):
        SUNRGBDDetection(sunrgbd / 'elsewhere')


# ---- own scenes -----------------------------------------------------------------------------------------------------
CHAIR = dict(label='chair', center=[.5, .5, .5], size=[1, 1, 1], yaw=.2)


def write(folder, boxes=(CHAIR,), name='a', points=None):
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f'{name}.npy', RNG(0).uniform(0, 1, (50, 4)) if points is None else points)
    (folder / f'{name}.json').write_text(json.dumps(dict(boxes=list(boxes))))
    return folder


def test_own_scenes(tmp_path):
    lamp = dict(label='lamp', center=[0, 0, 0], size=[.1, .2, .3])
    write(tmp_path / 'train', [CHAIR, lamp])
    write(tmp_path / 'train', [], name='empty')
    write(tmp_path / 'val', [dict(CHAIR, label='desk')], name='b')
    data = FolderScenes(tmp_path)
    first, empty = data
    assert data.metainfo['classes'] == ('chair', 'desk', 'lamp')  # of all splits
    np.testing.assert_allclose(first['boxes'], [[.5, .5, .5, 1, 1, 1, .2], [0, 0, 0, .1, .2, .3, 0]], atol=1e-7)
    assert first['box_labels'].tolist() == [0, 2] and len(empty['boxes']) == 0
    assert first['points'].shape == (50, 3) and FolderScenes(tmp_path, num_features=1)[0]['points'].shape == (50, 4)
    assert len(FolderScenes(tmp_path, split=None)) == 3 and FolderScenes(tmp_path, split='val')[0]['box_labels'] == [1]
    chosen = FolderScenes(tmp_path, classes=['lamp', 'desk', 'chair'])
    assert chosen[0]['box_labels'].tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"a.json: box 0 is of the class 'chair'; did you mean 'chairs'"):
        FolderScenes(tmp_path, classes=['lamp', 'desk', 'chairs'])
    with pytest.raises(TypeError, match="classes must be a list of names, got 'chair'"):
        FolderScenes(tmp_path, classes='chair')
    with pytest.raises(FileNotFoundError, match="has no folder 'test'"):
        FolderScenes(tmp_path, split='test')
    assert len(FolderScenes(tmp_path / 'train')) == 2  # without levels


@pytest.mark.parametrize('change, error, message', [
    (dict(size=[1, 0, 1]), ValueError, r'a.json: box 0 has the sizes'),
    (dict(size=[1, -1, 1]), ValueError, 'a.json: box 0 has the sizes'),
    (dict(size=[1, 1]), ValueError, "a.json: 'size' of box 0 should be three numbers"),
    (dict(center=None), ValueError, "a.json: 'center' of box 0 should be three numbers, got None"),
    (dict(center=[0, 0, 'x']), ValueError, "'center'"), (dict(center=[0, 0, float('nan')]), ValueError, 'not finite'),
    (dict(yaw='north'), ValueError, "a.json: 'yaw' of box 0 should be a number, got 'north'"),
    (dict(label=3), ValueError, 'a.json: box 0 should be an object with a "label"'),
    (dict(heading=1), KeyError, "box 0 has 'heading'"),
    (dict(center=[50, 0, 0]), ValueError, 'a.json: all boxes lie outside of the points of a.npy')])
def test_own_boxes_that_cannot_be(tmp_path, change, error, message):
    write(tmp_path, [CHAIR | change])
    with pytest.raises(error, match=message):
        FolderScenes(tmp_path)[0]


def test_own_files_that_cannot_be(tmp_path):
    write(tmp_path)
    (tmp_path / 'a.json').write_text('{"boxes": 3}')
    with pytest.raises(ValueError, match=r'a\.json: should hold'):
        FolderScenes(tmp_path)
    for text in ('boxes', '[' * 100_000):
        (tmp_path / 'a.json').write_text(text)
        with pytest.raises(ValueError, match=r'a\.json: is no JSON'):
            FolderScenes(tmp_path)
    (tmp_path / 'a.json').write_text(json.dumps(dict(boxes=[dict(CHAIR, size=[1, 10 ** 400, 1])])))
    with pytest.raises(ValueError, match=r'a\.json: box 0 is not finite'):
        FolderScenes(tmp_path)
    (tmp_path / 'a.json').rename(tmp_path / 'b.json')
    with pytest.raises(FileNotFoundError, match=r'b.json: there is no cloud b'):
        FolderScenes(tmp_path)
    (tmp_path / 'b.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'a.npy: there is no a.json'):
        FolderScenes(tmp_path)
    write(tmp_path)
    (tmp_path / 'a.txt').write_text('0 0 0')
    with pytest.raises(ValueError, match=r'a.npy and a.txt are two clouds'):
        FolderScenes(tmp_path)
    (tmp_path / 'a.txt').unlink()
    with pytest.raises(ValueError, match='6 columns are wanted'):
        FolderScenes(tmp_path, num_features=3)[0]
    far = write(tmp_path / 'far', [dict(CHAIR, center=[5e6, 0, 0])], points=RNG(0).uniform(0, 1, (9, 3)) + [5e6, 0, 0])
    with pytest.raises(ValueError, match='not further from its origin'):  # float32 would round such coordinates
        FolderScenes(far)[0]


def test_boxes_that_cannot_be():
    with pytest.raises(KeyError, match="here: a scene needs 'boxes'"):
        check_boxes(None, [], 'here')
    with pytest.raises(ValueError, match=r'here: boxes \(M, 7\) with a label each were expected, got \(2, 7\)'):
        check_boxes(np.ones((2, 7)), [0], 'here')
    with pytest.raises(TypeError, match='labels integers'):
        check_boxes(np.ones((1, 7)), [.5], 'here')
    with pytest.raises(ValueError, match='the label 3 is not one of the 2 classes'):
        check_boxes(np.ones((1, 7)), [3], 'here', ('a', 'b'))


# ---- synthetic rooms ------------------------------------------------------------------------------------------------
def test_rooms_depend_on_seed_split_and_number():
    data = SyntheticScenes(4, num_points=600, data_seed=3)
    lazy = DATASETS.build(dict(type='SyntheticScenes', num_samples=2, num_points=600, data_seed=3, in_memory=False))
    for a, b in zip(data, lazy):
        assert all(np.array_equal(a[key], b[key]) for key in ('points', 'boxes', 'box_labels'))
    others = [SyntheticScenes(1, num_points=600, data_seed=seed, split=split)
              for seed, split in ((4, 'train'), (3, 'val'))]
    assert not any(np.array_equal(other[0]['points'], data[0]['points']) for other in others)
    assert len(SyntheticScenes(in_memory=False)) == 800 and len(SyntheticScenes(split='val', in_memory=False)) == 200


def test_rooms_hold_furniture_that_is_seen_and_apart():
    labels, yaws = [], []
    for i in range(12):
        points, boxes, found = make_scene(4096, RNG(i), noise=0., outliers=0.)
        assert points.shape == (4096, 3) and points.dtype == boxes.dtype == np.float32 and len(boxes) == len(found)
        tensor = torch.from_numpy(boxes)
        assert int(ops.points_in_boxes(torch.from_numpy(points), tensor * torch.tensor([1, 1, 1, 1.01, 1.01, 1.01, 1]))
                   .sum(-1).min()) >= 10
        iou = ops.box3d_iou(tensor, tensor)
        assert float((iou - torch.diag(iou.diagonal())).max()) == 0
        np.testing.assert_allclose(boxes[:, 2], boxes[:, 5] / 2, atol=1e-6)
        labels += found.tolist()
        yaws += boxes[:, 6].tolist()
    assert set(labels) == set(range(6)) and min(yaws) < -2 and max(yaws) > 2 and np.abs(yaws).max() <= np.pi


@pytest.mark.parametrize('name', MAKERS)
def test_furniture_fills_its_box(name):
    rng = RNG(1)
    for _ in range(3):
        solid = Solid()
        size = np.array(MAKERS[name](solid, lambda low=0., high=1.: low + (high - low) * rng.random()))
        points = solid.sample(20_000, rng)[0]
        np.testing.assert_allclose(points.min(0), [-size[0] / 2, -size[1] / 2, 0], atol=.1)
        np.testing.assert_allclose(points.max(0), [size[0] / 2, size[1] / 2, size[2]], atol=.02)
        assert (points.min(0) >= [-size[0] / 2 - 1e-9, -size[1] / 2 - 1e-9, -1e-9]).all()


def test_places_do_not_meet():
    for i in range(60):
        a, b = RNG(i).uniform([-1, -1, 0, .2, .2, 1, -4], [1, 1, 0, 2, 2, 1, 4], (2, 7))
        area = float(ops.box3d_iou(torch.from_numpy(a[None]), torch.from_numpy(b[None])))
        assert overlap(a, b, gap=0.) == (area > 0)


def test_rooms_without_furniture_and_options():
    points, boxes, labels = make_scene(300, RNG(0), objects=0, clutter=0)
    assert points.shape == (300, 3) and boxes.shape == (0, 7) and labels.shape == (0,)
    sample = SyntheticScenes(1, num_points=300, scene_cfg=dict(objects=0))[0]
    assert sample['boxes'].shape == (0, 7)
    for cfg, error, message in ((dict(chairs=3), TypeError, "no option 'chairs'"),
                                (dict(noise=-1), ValueError, 'noise must be a number from 0 to 1'),
                                (dict(views=0), ValueError, 'views must be at least 1'),
                                (dict(objects=2.5), TypeError, 'objects must be an integer')):
        with pytest.raises(error, match=message):
            SyntheticScenes(1, scene_cfg=cfg)


def test_clusters_do_not_solve_the_rooms():
    """DBSCAN and axis-aligned boxes, with classes ignored, stay below AP50 = 20; yet they do find things."""
    alone = np.concatenate([RNG(0).uniform(0, 1, (400, 3)) + [0, 0, .2], RNG(0).uniform(-3, 3, (400, 3)) * [1, 1, 0]])
    (box,), (count,) = cluster_boxes(alone.astype(np.float32), .3)
    assert count > 300
    np.testing.assert_allclose(box, [.5, .5, .6, 1, 1, 1.2, 0], atol=.05)
    found = evaluate(list(SyntheticScenes(12, split='val')), eps=.16)
    assert found['AP50'] < 20 and found['AP25'] > 0


def test_clusters_of_a_config(tmp_path, capsys):
    config = tmp_path / 'rooms.py'
    config.write_text("test_dataloader = dict(dataset=dict(type='SyntheticScenes', split='test', num_samples=3))")
    assert clusters_main([str(config), '--scenes', '2', '--eps', '.16']) == 0
    scenes = [dict(points=entry['points'], boxes=entry['boxes']) for entry in map(SyntheticScenes(
        3, split='test', pipeline=[], indices=2).__getitem__, range(2))]
    found = evaluate(scenes, .16)
    assert capsys.readouterr().out == 'eps 0.16: ' + '  '.join(
        f'{key} {found[key]:.1f}' for key in ('AP25', 'AP50', 'AR25', 'AR50')) + '\n'


def test_ragged_boxes_are_collated_as_lists():
    data = SyntheticScenes(3, num_points=64, pipeline=[dict(type='PackBoxes')])
    batch = pseudo_collate([data[i] for i in range(3)])
    assert [tuple(s.gt_boxes.shape) for s in batch['data_samples']] == [(len(e['boxes']), 7) for e in data._data_list]
    assert torch.stack(list(batch['inputs']['points'])).shape == (3, 64, 3)
    assert batch['data_samples'][0].gt_labels.dtype == torch.int64
