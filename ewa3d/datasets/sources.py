"""Where published data sets come from: what ``ewa3d data prepare`` downloads or tells, and ``ewa3d data check`` counts.

A checksum or size stands here only where somebody published it: ``attributed`` says who. Where there is none, the
sha256 of what was downloaded is told and kept.
"""
from dataclasses import dataclass
from pathlib import Path

from ewa3d.registry import nearest

__all__ = ['SOURCES', 'Archive', 'Part', 'Source', 'find_source']


@dataclass(frozen=True)
class Archive:
    """A file to download, with one folder in it.

    Attributes:
        name: of the file. urls: mirrors, in the order in which they are tried.
        holds: the folder in it. size: in bytes. checksum: ``'sha256:…'`` or ``'md5:…'``.
        attributed: who published size and checksum. most: bytes that the content may have, a bound of ours.
    """
    name: str
    urls: tuple[str, ...]
    holds: str
    size: int | None = None
    checksum: str | None = None
    attributed: str = ''
    most: int | None = None


@dataclass(frozen=True)
class Part:
    """Files of a whole data set: how many, at least, a pattern finds in its folder; the ``md5`` of a single one."""
    pattern: str
    count: int = 1
    md5: str = ''


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: what it is called on the command line. what: what it is.
        terms: under which terms it is handed out. page: of its owners.
        folder: where it lies, below the root. parts: the files of all of it.
        datasets: configs that read it, without their folder; each has every one of ``splits``.
        configs: pattern of the configs that train on it, where there are some. archive: what can be downloaded freely.
        steps: what has to be done by hand, where not everything can be downloaded. ``{root}`` and ``{folder}`` in it
            stand for the paths. note: what should be known of it.
    """
    name: str
    what: str
    terms: str
    page: str
    folder: str
    parts: tuple[Part, ...]
    datasets: tuple[dict, ...]
    splits: tuple[str, ...] = ('train', 'test')
    configs: str = ''
    archive: Archive | None = None
    steps: str = ''
    note: str = ''

    def told_steps(self, root: Path) -> str:
        """``steps`` with the paths in it."""
        return self.steps.format(root=root, folder=root / self.folder).strip()


STANFORD = 'https://shapenet.cs.stanford.edu/media'
HUGGING_FACE = 'https://huggingface.co/datasets'
POINT_BERT = 'https://github.com/Julie-tang00/Point-BERT/blob/master/DATASET.md'
VOTENET = 'https://github.com/facebookresearch/votenet'
TORCHVISION = 'torchvision (datasets/cifar.py); the size from the logs of Keras'
MODELNET = dict(terms='academic research only; the makers of the models hold the rights',
                page='https://modelnet.cs.princeton.edu')
SHAPENET = dict(terms="ShapeNet's: research and education that are not commercial")
CIFAR = dict(terms='none stated; the report to cite is Krizhevsky, Learning Multiple Layers of Features from Tiny '
                   'Images, 2009', page='https://www.cs.toronto.edu/~kriz/cifar.html')

_ALL = (
    Source(
        'modelnet40', 'ModelNet40, 10,000 points a shape with normals (modelnet40_normal_resampled)', **MODELNET,
        folder='modelnet40_normal_resampled', configs='*_modelnet40-*',
        parts=(Part('modelnet40_shape_names.txt'), Part('modelnet40_train.txt'), Part('modelnet40_test.txt'),
               Part('*/*.txt', 12311)),
        datasets=(dict(type='ModelNet', variant=40),),
        archive=Archive('modelnet40_normal_resampled.zip', (
            f'{STANFORD}/modelnet40_normal_resampled.zip',
            f'{HUGGING_FACE}/cminst/ModelNet40/resolve/main/modelnet40_normal_resampled.zip'),
            holds='modelnet40_normal_resampled', most=20 * 10 ** 9),
        note='about 1.6 GB to download (KPConv-PyTorch), about 7 GB unpacked; its owners publish no checksum, and the '
             'second mirror is a copy of others'),
    Source(
        'modelnet40-h5', 'ModelNet40, 2048 points a shape (modelnet40_ply_hdf5_2048)', **MODELNET,
        folder='modelnet40_ply_hdf5_2048', configs='*_modelnet40-*',
        parts=(Part('shape_names.txt'), Part('train_files.txt'), Part('test_files.txt'),
               Part('ply_data_train*.h5', 5), Part('ply_data_test*.h5', 2)),
        datasets=(dict(type='ModelNet', variant=40),),
        archive=Archive('modelnet40_ply_hdf5_2048.zip', (
            f'{STANFORD}/modelnet40_ply_hdf5_2048.zip',
            'https://github.com/ma-xu/pointMLP-pytorch/releases/download/Modenet40_dataset/modelnet40_ply_hdf5_2048.zip',
            f'{HUGGING_FACE}/Msun/modelnet40/resolve/main/modelnet40_ply_hdf5_2048.zip'),
            holds='modelnet40_ply_hdf5_2048', size=435_212_151, most=4 * 10 ** 9,
            checksum='sha256:07670e237db72ece0f723b9abb571534c9ad655a6456b389646587dc72bb8bae',
            attributed='TensorFlow Graphics (datasets/modelnet40/checksums)'),
        note='these files have 9,840 of the 9,843 shapes to train on'),
    Source(
        'modelnet40-off', 'ModelNet40, the meshes', **MODELNET, folder='ModelNet40', configs='*_modelnet40-*',
        parts=(Part('*/train/*.off', 9843), Part('*/test/*.off', 2468)),
        datasets=(dict(type='ModelNet', variant=40),),
        archive=Archive('ModelNet40.zip', ('http://modelnet.cs.princeton.edu/ModelNet40.zip',), holds='ModelNet40',
                        size=2_039_180_837, most=40 * 10 ** 9,
                        checksum='sha256:42dc3e656932e387f554e25a4eb2cc0e1a1bd3ab54606e2a9eae444c60e536ac',
                        attributed='TensorFlow Graphics (datasets/modelnet40/checksums), CompressAI, Flux3D.jl')),
    Source(
        'modelnet10', 'ModelNet10, the meshes', **MODELNET, folder='ModelNet10', configs='*modelnet10*',
        parts=(Part('*/train/*.off', 3991), Part('*/test/*.off', 908)),
        datasets=(dict(type='ModelNet', variant=10),),
        archive=Archive('ModelNet10.zip', (
            'http://3dvision.princeton.edu/projects/2014/3DShapeNets/ModelNet10.zip',
            'http://vision.princeton.edu/projects/2014/3DShapeNets/ModelNet10.zip'), holds='ModelNet10',
            size=473_402_300, most=10 ** 10,
            checksum='sha256:9d8679435fc07d1d26f13009878db164a7aa8ea5e7ea3c8880e42794b7307d51',
            attributed='CompressAI and Flux3D.jl; the size from an example of Keras')),
    Source(
        'modelnet10-1k', 'ModelNet10, 1024 points a shape (modelnet10_ply_hdf5_1024)', **MODELNET,
        folder='modelnet10_ply_hdf5_1024', configs='*modelnet10*',
        parts=(Part('train_files.txt'), Part('test_files.txt'), Part('ply_data_train*.h5', 2),
               Part('ply_data_test*.h5')),
        datasets=(dict(type='ModelNet', variant=10),),
        steps="""
The configs name these files. They are derived from the clouds of https://github.com/molivas2022/modelNet10classifier,
which states no licence, and are not handed out; data/README.md says how they were made. The same shapes, as meshes:
  1. ewa3d data prepare modelnet10 --root {root}
  2. train with --cfg-options {{train,val,test}}_dataloader.dataset.data_root={root}/ModelNet10
"""),
    Source(
        'scanobjectnn', 'ScanObjectNN, three variants', terms='a form has to be agreed to',
        page='https://hkust-vgd.github.io/scanobjectnn', folder='ScanObjectNN', configs='*_scanobjectnn-*',
        parts=tuple(Part(f'**/{folder}/{half}_{ending}') for folder, ending in (
            ('main_split', 'objectdataset.h5'), ('main_split_nobg', 'objectdataset.h5'),
            ('main_split', 'objectdataset_augmentedrot_scale75.h5')) for half in ('training', 'test')),
        datasets=tuple(dict(type='ScanObjectNN', variant=variant) for variant in ('objbg', 'objonly', 'hardest')),
        archive=Archive('h5_files.zip', (), holds='h5_files', most=50 * 10 ** 9),
        steps="""
  1. Agree to the terms of use: the form is linked from https://hkust-vgd.github.io/scanobjectnn
  2. Download h5_files.zip with the link that it gives, to {root}/h5_files.zip
  3. ewa3d data prepare scanobjectnn --root {root}
     unpacks it to {folder}, so that {folder}/main_split and {folder}/main_split_nobg are there
"""),
    Source(
        'shapenetpart', 'ShapeNetPart, with normals', **SHAPENET,
        page='https://cs.stanford.edu/~ericyi/project_page/part_annotation', configs='part_seg/*_shapenetpart*',
        folder='shapenetcore_partanno_segmentation_benchmark_v0_normal', splits=('train', 'val', 'test'),
        parts=(Part('synsetoffset2category.txt'), Part('train_test_split/shuffled_*_file_list.json', 3),
               Part('*/*.txt', 16881)),
        datasets=(dict(type='ShapeNetPart'),),
        archive=Archive('shapenetcore_partanno_segmentation_benchmark_v0_normal.zip', (
            f'{STANFORD}/shapenetcore_partanno_segmentation_benchmark_v0_normal.zip',
            f'{HUGGING_FACE}/cminst/ShapeNet/resolve/main/shapenetcore_partanno_segmentation_benchmark_v0_normal.zip'),
            holds='shapenetcore_partanno_segmentation_benchmark_v0_normal', most=20 * 10 ** 9,
            checksum='sha256:0e26411700bae2da38ee8ecc719ba4db2e6e0133486e258665952ad5dfced0fe',
            attributed='CompressAI (compressai/datasets/pointcloud/shapenet.py)')),
    Source(
        'shapenet55', 'ShapeNet-55, 8192 points a shape', **SHAPENET, page='https://shapenet.org',
        folder='ShapeNet55-34', configs='*_shapenet55*',
        parts=(Part('ShapeNet-55/train.txt'), Part('ShapeNet-55/test.txt'), Part('shapenet_pc/*.npy', 52470)),
        datasets=(dict(type='ShapeNet55'),),
        steps=f"""
  1. Register on https://shapenet.org and accept the terms
  2. Get the clouds of ShapeNet-55 by the links on {POINT_BERT}
  3. Unpack them so that {{folder}}/shapenet_pc/02691156-….npy … are there
  4. Copy data/ShapeNet55-34/ShapeNet-55/train.txt and test.txt of that repository to {{folder}}/ShapeNet-55/
"""),
    Source(
        'scannet', 'ScanNet v2 with boxes, as VoteNet prepares it', page='http://www.scan-net.org',
        terms='terms of use have to be signed; the data may not be passed on', folder='scannet_train_detection_data',
        configs='detection/*_scannet*', splits=('train', 'val'),
        parts=(Part('*_vert.npy'), Part('*_bbox.npy')), datasets=(dict(type='ScanNetDetection'),),
        steps=f"""
  1. Sign the terms (http://kaldir.vc.in.tum.de/scannet/ScanNet_TOS.pdf) and send them to scannet@googlegroups.com; the
     answer has the script download-scannet.py
  2. With it, get four kinds of files:
       for kind in _vh_clean_2.ply .aggregation.json _vh_clean_2.0.010000.segs.json .txt; do
         python download-scannet.py -o scannet --type $kind; done
  3. Convert them: git clone {VOTENET}; link scannet/scans to votenet/scannet/scans, and in votenet/scannet run
       python batch_load_scannet_data.py
  4. Move the folder scannet_train_detection_data that it writes to {{folder}}, and copy the lists
     votenet/scannet/meta_data/scannetv2_train.txt and scannetv2_val.txt into it
"""),
    Source(
        'sunrgbd', 'SUN RGB-D v1 with boxes, as VoteNet prepares it', page='https://rgbd.cs.princeton.edu',
        terms='those of its home page', folder='sunrgbd', configs='detection/*_sunrgbd*',
        splits=('train', 'val'), datasets=(dict(type='SUNRGBDDetection'),),
        parts=tuple(Part(f'sunrgbd_pc_bbox_votes_50k_v1_{split}/*_{kind}', count)
                    for split, count in (('train', 5285), ('val', 5050)) for kind in ('pc.npz', 'bbox.npy')),
        steps=f"""
The archives lie on its home page; turning them into clouds takes Matlab:
  1. git clone {VOTENET}; make the folder votenet/sunrgbd/OFFICIAL_SUNRGBD
  2. From http://rgbd.cs.princeton.edu/data/ get SUNRGBD.zip, SUNRGBDMeta2DBB_v2.mat, SUNRGBDMeta3DBB_v2.mat and
     SUNRGBDtoolbox.zip (md5 18d22e1761d36352f37232cba102f91f, says VoteNet) into it, and unzip them
  3. In votenet/sunrgbd/matlab run extract_split.m, extract_rgbd_data_v2.m and extract_rgbd_data_v1.m
  4. In votenet/sunrgbd run
       python sunrgbd_data.py --gen_v1_data
  5. Move the folders sunrgbd_pc_bbox_votes_50k_v1_train and …_val that it writes to {{folder}}
"""),
    Source(
        'cifar10', 'CIFAR-10', **CIFAR, folder='cifar-10-batches-py', configs='*_cifar10*',
        parts=(Part('batches.meta', md5='5ff9c542aee3614f3951f8cda6e48888'),
               Part('data_batch_1', md5='c99cafc152244af753f735de768cd75f'),
               Part('data_batch_2', md5='d4bba439e000b95fd0a9bffe97cbabec'),
               Part('data_batch_3', md5='54ebc095f3ab1f0389bbae665268c751'),
               Part('data_batch_4', md5='634d18415352ddfa80567beed471001a'),
               Part('data_batch_5', md5='482c414d41f54cd18b22e5b47cb7c3cb'),
               Part('test_batch', md5='40351d587109b95175f43aff81a1287e')),
        datasets=(dict(type='CIFAR10'),),
        archive=Archive('cifar-10-python.tar.gz', ('https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz',),
                        holds='cifar-10-batches-py', size=170_498_071, most=10 ** 9,
                        checksum='md5:c58f30108f718f92721af3b95e74349a', attributed=TORCHVISION)),
    Source(
        'cifar100', 'CIFAR-100', **CIFAR, folder='cifar-100-python',
        parts=(Part('meta', md5='7973b15100ade9c7d40fb424638fde48'),
               Part('train', md5='16019d7e3df5f24257cddd939b257f8d'),
               Part('test', md5='f0ef6b0ae62326f3e7ffdfab6717acfc')),
        datasets=(dict(type='CIFAR100'),),
        archive=Archive('cifar-100-python.tar.gz', ('https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz',),
                        holds='cifar-100-python', size=169_001_437, most=10 ** 9,
                        checksum='md5:eb9058c3a382ffc7106e4002c42a8d85', attributed=TORCHVISION)),
    Source(
        'imagenet', 'ImageNet-1k (ILSVRC 2012)', terms='an account, and research that is not commercial',
        page='https://www.image-net.org', folder='imagenet', configs='vit/*_imagenet*', splits=('train', 'val'),
        parts=(Part('train/n*/*.JPEG', 1_281_167), Part('val/n*/*.JPEG', 50_000)), datasets=(dict(type='ImageNet'),),
        steps="""
  1. Make an account on https://www.image-net.org and accept the terms
  2. Download into {folder} (the checksums are torchvision's):
       ILSVRC2012_img_train.tar        md5 1d675b47d978889d74fa0da5fadfb00e
       ILSVRC2012_img_val.tar          md5 29b22e2961454d5413ddabcf34fc5622
       ILSVRC2012_devkit_t12.tar.gz    md5 fa75699e90414af021442c21a62c3abf
  3. Unpack and sort them into one folder a class, which torchvision does:
       python -c "from torchvision.datasets import ImageNet as I; [I('{folder}', split) for split in ('train', 'val')]"
"""),
)
SOURCES = {source.name: source for source in _ALL}


def find_source(name: str) -> Source:
    """The data set of a name.

    Raises:
        KeyError: there is none of this name; tells the nearest ones.
    """
    if name not in SOURCES:
        raise KeyError(f'there is no data set {name!r} to prepare; {nearest(name, SOURCES)}')
    return SOURCES[name]
