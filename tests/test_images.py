"""Data sets of images: CIFAR's batches, folders, ImageNet's layout, digits; what is damaged."""
import pickle

import numpy as np
import pytest
from PIL import Image

from ewa3d.datasets.images import CIFAR10, CIFAR100, Digits, ImageFolder, ImageNet, decode_image
from ewa3d.registry import DATASETS


def write_cifar(folder, rows: int = 4, protocol: int = 2, **changes):
    """The official files of CIFAR-10 with ``rows`` random images each; returns the pixels by file."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {}
    for i, name in enumerate([*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']):
        pixels[name] = np.random.default_rng(i).integers(0, 256, (rows, 3072)).astype(np.uint8)
        content = dict(data=pixels[name], labels=[(i + row) % 3 for row in range(rows)], batch_label='b')
        (folder / name).write_bytes(pickle.dumps({**content, **changes}, protocol))
    (folder / 'batches.meta').write_bytes(pickle.dumps(dict(label_names=['cat', 'dog', 'ship']), protocol))
    return pixels


def write_images(root, names, size=(6, 5)):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        array = np.random.default_rng(i).integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(array).save(root / name)


@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_cifar10(tmp_path, protocol):
    pixels = write_cifar(tmp_path / 'cifar-10-batches-py', protocol=protocol)
    for root in (tmp_path, tmp_path / 'cifar-10-batches-py'):
        train, test = CIFAR10(root), CIFAR10(root, split='test')
        assert len(train) == 20 and len(test) == 4
    assert train.metainfo['classes'] == ('cat', 'dog', 'ship')
    assert train.labels[:5] == [0, 1, 2, 0, 1]
    sample = train[5]
    assert sample['img'].shape == (32, 32, 3) and sample['label'] == 2 and sample['name'] == 'data_batch_2[1]'
    row = pixels['data_batch_2'][1].reshape(3, 32, 32)  # red, green, blue, each row by row
    assert (sample['img'] == row.transpose(1, 2, 0)).all()
    with pytest.raises(ValueError, match='read-only'):
        sample['img'][0] = 0
    assert len(CIFAR10(tmp_path, indices=[3, 1])) == 2


def test_cifar_with_names_in_bytes(tmp_path):
    """As files are that were written anew with what ``encoding='bytes'`` gave."""
    write_cifar(tmp_path)
    for file in tmp_path.iterdir():
        content = {key.encode(): value for key, value in pickle.loads(file.read_bytes()).items()}
        if b'label_names' in content:
            content[b'label_names'] = [name.encode() for name in content[b'label_names']]
        file.write_bytes(pickle.dumps(content))
    data = CIFAR10(tmp_path)
    assert data.metainfo['classes'] == ('cat', 'dog', 'ship') and len(data) == 20


def test_cifar_that_is_cut_off(tmp_path):
    write_cifar(tmp_path)
    whole = (tmp_path / 'data_batch_2').read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / 'data_batch_2').write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r'data_batch_2: refused or broken pickle: .'):
            CIFAR10(tmp_path)
    (tmp_path / 'data_batch_2').write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match=r'data_batch_2: a dict was expected .* it holds a list'):
        CIFAR10(tmp_path)


def test_cifar100(tmp_path):
    folder = tmp_path / 'cifar-100-python'
    folder.mkdir()
    content = dict(data=np.zeros((3, 3072), np.uint8), fine_labels=[2, 0, 1], coarse_labels=[1, 0, 0])
    for name in ('train', 'test'):
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / 'meta').write_bytes(pickle.dumps(dict(fine_label_names=list('abc'), coarse_label_names=list('xy'))))
    assert CIFAR100(tmp_path).labels == [2, 0, 1] and CIFAR100(folder).metainfo['classes'] == ('a', 'b', 'c')
    coarse = CIFAR100(tmp_path, split='test', coarse=True)
    assert coarse.labels == [1, 0, 0] and coarse.metainfo['classes'] == ('x', 'y')


class Evil:
    def __reduce__(self):
        return eval, ("open('was_here', 'w')",)


def test_cifar_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / 'c')
    (tmp_path / 'c' / 'data_batch_3').write_bytes(pickle.dumps(dict(data=Evil(), labels=[])))
    with pytest.raises(ValueError, match='data_batch_3: refused'):
        CIFAR10(tmp_path / 'c')
    assert not (tmp_path / 'was_here').exists()


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(labels=[0, 1]), r'data must be uint8 \(2, 3072\), one row a label; got uint8 \(4, 3072\)'),
    (dict(labels=[0, 1, 2, 3]), 'label 3 is not one of the 3 classes'),
    (dict(data=np.zeros((4, 3072), np.float32)), 'got float32'), (dict(data=[1]), 'got list'),
    (dict(labels=['a', 'b', 'c', 'd']), 'label must be an integer'),
    (dict(labels=5), r'data_batch_1: labels must be a list of numbers, it is a int'),
    (dict(labels=None), 'it is a NoneType'), (dict(labels=dict(a=0)), 'it is a dict'),
    (dict(labels=np.zeros((4, 1), int)), 'it is a ndarray')])
def test_cifar_with_wrong_content(tmp_path, changes, message):
    write_cifar(tmp_path, **changes)
    with pytest.raises((ValueError, TypeError), match=message):
        CIFAR10(tmp_path)


def test_cifar_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='no folder'):
        CIFAR10(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match=r'batches\.meta: there is no such file'):
        CIFAR10(tmp_path)
    write_cifar(tmp_path)
    (tmp_path / 'data_batch_4').unlink()
    with pytest.raises(FileNotFoundError, match='data_batch_4'):
        CIFAR10(tmp_path)
    (tmp_path / 'data_batch_4').write_bytes(pickle.dumps(dict(data=1)))
    with pytest.raises(ValueError, match="data_batch_4: no 'labels' in it"):
        CIFAR10(tmp_path)
    with pytest.raises(ValueError, match="no split 'val'"):
        CIFAR10(tmp_path, split='val')


def test_the_real_subset(dataset_dir):
    root = dataset_dir('cifar-10-batches-py')
    test = CIFAR10(root, split='test')
    assert len(test.metainfo['classes']) == 10 and len(test) >= 10 and set(test.labels) == set(range(10))
    assert test[0]['img'].std() > 10


def test_digits():
    train, test = Digits(), Digits(split='test')
    assert (len(train), len(test)) == (1197, 600)
    assert train[0]['img'].shape == (8, 8, 1) and train[0]['img'].dtype == np.uint8
    assert max(train[i]['img'].max() for i in range(9)) == 255
    names = {train[i]['name'] for i in (0, 1196)} | {test[i]['name'] for i in (0, 599)}
    assert names == {'digit 0', 'digit 1196', 'digit 1197', 'digit 1796'}
    assert set(train.labels) == set(test.labels) == set(range(10))


@pytest.mark.parametrize('pattern', ['{split}/{name}/{i}.png', '{name}/{split}/{i}.png'])
def test_image_folder(tmp_path, pattern):
    write_images(tmp_path, [pattern.format(split=split, name=name, i=i) for split in ('train', 'test')
                            for name in ('b', 'a') for i in range(1 + (split == 'train'))])
    train, test = ImageFolder(tmp_path), ImageFolder(tmp_path, split='test')
    assert train.metainfo['classes'] == ('a', 'b') and train.labels == [0, 0, 1, 1] and test.labels == [0, 1]
    assert train[2]['img'].shape == (6, 5, 3)
    assert ImageFolder(tmp_path, mode='L')[0]['img'].shape == (6, 5, 1)
    assert ImageFolder(tmp_path, classes=['b'], split=None).labels == [0, 0, 0]
    with pytest.raises(ValueError, match="no class folder 'c'"):
        ImageFolder(tmp_path, classes=['a', 'c'])
    with pytest.raises(ValueError, match="has no split 'val'"):
        ImageFolder(tmp_path, split='val')


def test_image_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match='no class folders'):
        ImageFolder(tmp_path)
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'x.txt').write_text('')
    with pytest.raises(ValueError, match='an empty class folder'):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match='needs data_root'):
        ImageFolder(None)
    with pytest.raises(ValueError, match='on_error must be'):
        ImageFolder(tmp_path, on_error='ignore', lazy_init=True)
    with pytest.raises(ValueError, match='mode must be'):
        ImageFolder(tmp_path, mode='CMYK', lazy_init=True)


def test_an_image_that_does_not_decode(tmp_path, caplog):
    write_images(tmp_path, ['a/0.jpg', 'a/1.jpg', 'b/2.png', 'b/3.png'], size=(40, 40))
    whole = (tmp_path / 'a' / '1.jpg').read_bytes()
    (tmp_path / 'a' / '1.jpg').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'b' / '2.png').write_text('no image')
    data = ImageFolder(tmp_path)
    assert len(data) == 4
    for i, file in ((1, '1.jpg'), (2, '2.png')):
        with pytest.raises(ValueError, match=f'{file}: the image does not decode'):
            data[i]
    with caplog.at_level('WARNING', 'ewa3d'):
        kept = ImageFolder(tmp_path, on_error='skip')
    assert [kept[i]['name'] for i in range(len(kept))] == ['a/0.jpg', 'b/3.png']
    assert [file[-5:] for file in kept.skipped] == ['1.jpg', '2.png']
    assert '2 of 4 images do not decode and are skipped' in caplog.text and '1.jpg' in caplog.text
    with pytest.raises(FileNotFoundError, match='no such file'):
        decode_image(tmp_path / 'nowhere.png')


def test_images_of_more_than_eight_bits(tmp_path):
    values = np.array([[0, 255, 256], [40000, 65535, 513]], np.uint16)
    Image.fromarray(values).save(tmp_path / 'a.png')
    for mode, channels in (('L', 1), ('RGB', 3)):
        image = decode_image(tmp_path / 'a.png', mode)
        assert (image == np.repeat((values >> 8)[..., None], channels, 2)).all()
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / 'b.tiff')
    with pytest.raises(ValueError, match=r'b\.tiff: the image does not decode .*32 bits'):
        decode_image(tmp_path / 'b.tiff')


def test_imagenet(tmp_path):
    write_images(tmp_path, ['train/n02/1.JPEG', 'train/n01/2.JPEG', 'val/n02/ILSVRC2012_val_1.JPEG'])
    (tmp_path / 'devkit').mkdir()
    train, val = ImageNet(tmp_path), ImageNet(tmp_path, split='val')
    assert train.metainfo['classes'] == val.metainfo['classes'] == ('n01', 'n02')
    assert train.labels == [0, 1] and val.labels == [1]
    with pytest.raises(ValueError, match="no split 'test'"):
        ImageNet(tmp_path, split='test')
    write_images(tmp_path / 'flat', ['train/n01/1.JPEG', 'val/1.JPEG'])
    with pytest.raises(ValueError, match='has no class folders such as n01440764'):
        ImageNet(tmp_path / 'flat', split='val')
    with pytest.raises(FileNotFoundError, match="has no folder 'train'"):
        ImageNet(tmp_path / 'devkit')


def test_they_are_registered():
    for name in ('CIFAR10', 'CIFAR100', 'Digits', 'ImageFolder', 'ImageNet'):
        assert DATASETS.get(name).__name__ == name
