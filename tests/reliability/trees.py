"""The smallest data of every data set that reads files: a function of a folder writes them and gives the config."""
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

TREES: dict[str, Callable[[Path], dict]] = {}  # name → function of a folder that gives the config of the data set
SIDE = 8  # of images


def tree(make: Callable) -> Callable:
    TREES[make.__name__] = make
    return make


def cloud(seed: int, rows: int = 24, columns: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).round(3).astype(np.float32)


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def put_text(path: Path, rows: np.ndarray, mark: str = ' ') -> None:
    put(path, '\n'.join(mark.join(f'{value:g}' for value in row) for row in rows) + '\n')


def put_h5(path: Path, **arrays) -> None:
    with h5py.File(path, 'w') as file:
        for name, array in arrays.items():
            file[name] = array


def put_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)


# ---- objects --------------------------------------------------------------------------------------------------------
@tree
def folder(root):
    for i, name in enumerate(('räder', 'b c')):
        put_array(root / 'train' / name / 'a 1.npy', cloud(i))
        put_text(root / 'train' / name / 'b.txt', cloud(9 + i))
    return dict(type='FolderPointCloud', data_root=root)


@tree
def folder_parts(root):
    put(root / 'parts.json', json.dumps({'räder': ['rim', 'tyre'], 'b c': ['all']}, ensure_ascii=False))
    for i, (name, parts) in enumerate((('räder', 2), ('b c', 1))):
        rows = cloud(i)[:, :3]
        put_array(root / 'train' / name / 'a 1.npy', np.column_stack([rows, np.arange(len(rows)) % parts]))
        put_text(root / 'train' / name / 'b.txt', rows)
        put(root / 'train' / name / 'b.seg', ''.join(f'{j % parts}\n' for j in range(len(rows))))
    return dict(type='FolderParts', data_root=root)


@tree
def modelnet_txt(root):
    put(root / 'modelnet40_train.txt', 'chair_0001\nnight_stand_0002\n')
    for i, name in enumerate(('chair/chair_0001', 'night_stand/night_stand_0002')):
        put_text(root / f'{name}.txt', cloud(i, columns=6), ',')
    return dict(type='ModelNet', data_root=root, layout='txt')


@tree
def modelnet_dat(root):
    content = [[cloud(0, columns=6), cloud(1, columns=6)], [np.array([8], np.int32), np.array([3], np.int32)]]
    put(root / 'modelnet40_train_8192pts_fps.dat', pickle.dumps(content))
    return dict(type='ModelNet', data_root=root, layout='dat')


@tree
def modelnet_h5(root):
    put(root / 'train_files.txt', 'data/modelnet40_ply_hdf5_2048/ply_data_train0.h5\n')
    put_h5(root / 'ply_data_train0.h5', data=np.stack([cloud(0), cloud(1)]), label=np.array([[3], [5]], np.uint8))
    return dict(type='ModelNet', data_root=root, layout='h5')


@tree
def modelnet_off(root):
    for i, name in enumerate(('bathtub', 'toilet')):
        put(root / name / 'train' / f'{name}_0001.off', f'OFF\n4 2 0\n0 0 0\n1 0 {i}\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n')
    return dict(type='ModelNet', data_root=root, layout='off', mesh_points=20)


@tree
def scanobjectnn(root):
    (root / 'main_split').mkdir()
    put_h5(root / 'main_split' / 'training_objectdataset.h5', data=np.stack([cloud(0), cloud(1)]),
           label=np.array([3, 14], np.int64), mask=np.random.default_rng(0).integers(-1, 3, (2, 24)))
    return dict(type='ScanObjectNN', data_root=root, variant='objbg')


@tree
def shapenet55(root):
    names = ['02691156-a1.npy', '04554684-b2.npy']
    put(root / 'ShapeNet-55' / 'train.txt', '\n'.join(names))
    for i, name in enumerate(names):
        put_array(root / 'shapenet_pc' / name, cloud(i))
    return dict(type='ShapeNet55', data_root=root)


@tree
def fewshot(root):
    items = {split: [(cloud(i, columns=6), i % 2, 7 + i) for i in range(2)] for split in ('train', 'test')}
    put(root / '2way_1shot' / '0.pkl', pickle.dumps(items, 2))
    return dict(type='FewShot', data_root=root, way=2, shot=1)


# ---- parts ----------------------------------------------------------------------------------------------------------
def labels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 6, (24, 1))  # those of a bag


@tree
def parts_v0(root):
    put(root / 'synsetoffset2category.txt', 'Bag\t02773838\n')
    put(root / 'shuffled_train_file_list.json', json.dumps([f'shape_data/02773838/s{i}' for i in range(2)]))
    for i in range(2):
        put_text(root / '02773838' / 'points' / f's{i}.pts', cloud(i))
        put_text(root / '02773838' / 'points_label' / f's{i}.seg', labels(i) - 3)
    return dict(type='ShapeNetPart', data_root=root)


@tree
def parts_normal(root):
    put(root / 'synsetoffset2category.txt', 'Bag\t02773838\n')
    put(root / 'shuffled_train_file_list.json', json.dumps([f'shape_data/02773838/s{i}' for i in range(2)]))
    for i in range(2):
        put_text(root / '02773838' / f's{i}.txt', np.column_stack([cloud(i, columns=6), labels(i)]))
    return dict(type='ShapeNetPart', data_root=root)


@tree
def parts_h5(root):
    put(root / 'all_object_categories.txt', 'Airplane\t02691156\nBag\t02773838\n')
    put(root / 'train_hdf5_file_list.txt', 'ply_data_train0.h5\n')
    put_h5(root / 'ply_data_train0.h5', data=np.stack([cloud(0), cloud(1)]), label=np.array([[1], [1]], np.uint8),
           pid=np.stack([labels(0)[:, 0], labels(1)[:, 0]]).astype(np.uint8))
    return dict(type='ShapeNetPart', data_root=root, categories=['Bag'])


# ---- scenes ---------------------------------------------------------------------------------------------------------
@tree
def scannet(root):
    put(root / 'scannetv2_train.txt', 'scene0\nscene1\n')
    for i in range(2):
        put_array(root / f'scene{i}_vert.npy', cloud(i, columns=6))
        put_array(root / f'scene{i}_bbox.npy', np.array([[0, 0, 0, 1, 1, 2, 5], [1, 0, 0, 1, 2, 1, 39]], np.float64))
    return dict(type='ScanNetDetection', data_root=root)


@tree
def sunrgbd(root):
    inside = root / 'x_v1_train'
    inside.mkdir()
    np.savez(inside / '000007_pc.npz', pc=cloud(0, columns=6))
    put_array(inside / '000007_bbox.npy', np.array([[0, 0, 0, 1, 1, 2, 0.3, 5]], np.float64))
    return dict(type='SUNRGBDDetection', data_root=root)


@tree
def folder_scenes(root):
    put_array(root / 'room.npy', cloud(0))
    box = dict(label='stühl', center=[0.1, 0, 0.4], size=[0.5, 0.6, 0.9], yaw=0.3)
    put(root / 'room.json', json.dumps(dict(boxes=[box]), ensure_ascii=False))
    return dict(type='FolderScenes', data_root=root)


# ---- images and videos ----------------------------------------------------------------------------------------------
@tree
def cifar10(root):
    for i in range(1, 6):
        pixels = np.random.default_rng(i).integers(0, 256, (2, 3072), np.uint8)
        put(root / f'data_batch_{i}', pickle.dumps({b'data': pixels, b'labels': [i, 0]}, 2))
    put(root / 'batches.meta', pickle.dumps({b'label_names': [f'c{i}'.encode() for i in range(10)]}, 2))
    return dict(type='CIFAR10', data_root=root)


@tree
def cifar100(root):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
    put(root / 'train', pickle.dumps({'data': pixels, 'fine_labels': [99, 0], 'coarse_labels': [3, 19]}, 2))
    names = dict(fine_label_names=[f'c{i}' for i in range(100)], coarse_label_names=['a'] * 20)
    put(root / 'meta', pickle.dumps(names))
    return dict(type='CIFAR100', data_root=root)


@tree
def image_folder(root):
    for i, name in enumerate(('a/1.png', 'a/2.jpg', 'ü b/1.png')):
        put_image(root / name, i)
    return dict(type='ImageFolder', data_root=root)


@tree
def imagenet(root):
    for i, name in enumerate(('n01440764/1.png', 'n01443537/1.png')):
        put_image(root / 'train' / name, i)
    return dict(type='ImageNet', data_root=root)


@tree
def videos_listed(root):
    for i in range(2):
        for frame in range(3):
            put_image(root / f'clip {i}' / f'img_{frame:05d}.png', frame)
    put(root / 'list.txt', 'clip 0 3 0\nclip 1 1\n')
    return dict(type='VideoDataset', data_root=root, ann_file='list.txt', pipeline=[dict(type='LoadClip', clip_len=2)])
