"""Data sets and transforms; importing this package registers them."""
from ewa3d.datasets.base import PointDataset
from ewa3d.datasets.clips import ClipFlip, LoadClip, PackClip, ThreeCrop
from ewa3d.datasets.collate import Batch, packed_collate
from ewa3d.datasets.fewshot import FewShot
from ewa3d.datasets.folder import FolderPointCloud
from ewa3d.datasets.folder_parts import FolderParts
from ewa3d.datasets.image_transforms import ImageTransforms, PackImage
from ewa3d.datasets.images import CIFAR10, CIFAR100, Digits, ImageDataset, ImageFolder, ImageNet
from ewa3d.datasets.mixed import MixedBatches, MixedDataset, MixedSampler
from ewa3d.datasets.modelnet import ModelNet
from ewa3d.datasets.moving_clouds import MovingClouds, PackClouds
from ewa3d.datasets.parts import ShapeNetPart
from ewa3d.datasets.repeated import RepeatedSampler
from ewa3d.datasets.rooms import SyntheticScenes
from ewa3d.datasets.scanobjectnn import ScanObjectNN
from ewa3d.datasets.scene_transforms import AddHeight, PackBoxes, RandomCuboid, SceneFlip, SceneRotate, SceneScale
from ewa3d.datasets.scenes import FolderScenes, ScanNetDetection, SUNRGBDDetection
from ewa3d.datasets.shapenet import ShapeNet55
from ewa3d.datasets.shapes import SyntheticShapes
from ewa3d.datasets.transforms import (
    KeepAll,
    Normalize,
    Pack,
    RandomDrop,
    RandomJitter,
    RandomRotate,
    RandomScale,
    RandomShift,
    Resample,
    UpAxis,
)
from ewa3d.datasets.videos import MovingShapes, VideoDataset

__all__ = ['PointDataset', 'FewShot', 'FolderParts', 'FolderPointCloud', 'ModelNet', 'ScanObjectNN', 'ShapeNet55',
           'ShapeNetPart', 'SyntheticShapes', 'KeepAll', 'Normalize', 'Resample', 'UpAxis', 'RandomScale',
           'RandomShift', 'RandomRotate', 'RandomJitter', 'RandomDrop', 'Pack', 'FolderScenes', 'ScanNetDetection',
           'SUNRGBDDetection', 'SyntheticScenes', 'AddHeight', 'PackBoxes', 'RandomCuboid', 'SceneFlip',
           'SceneRotate', 'SceneScale', 'CIFAR10', 'CIFAR100', 'Digits', 'ImageDataset', 'ImageFolder', 'ImageNet',
           'ImageTransforms', 'PackImage', 'MixedBatches', 'MixedDataset', 'MixedSampler', 'RepeatedSampler',
           'ClipFlip', 'LoadClip', 'PackClip', 'ThreeCrop', 'MovingClouds', 'MovingShapes', 'PackClouds',
           'VideoDataset', 'Batch', 'packed_collate']
