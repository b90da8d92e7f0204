"""Few-shot folds: the published pickles under both names, hostile and broken ones, and folds drawn from a data set."""
import os
import pickle
from typing import ClassVar

import numpy as np
import pytest

from ewa3d.datasets import FewShot, PointDataset
from ewa3d.datasets.fewshot import draw_fold, make_fold, read_fold
from ewa3d.engine.validate import check_config
from ewa3d.registry import DATASETS

SMALL = dict(type='SyntheticShapes', num_samples=78, num_points=32)  # 6 of each of 13 classes


def rows(seed, n=60):
    return np.random.default_rng(seed).normal(size=(n, 6)).astype(np.float32)


def published(way=2, shot=3, queries=2):
    """A fold as published: the clouds of one class follow each other."""
    return {split: [(rows(100 * s + i), i // size, np.int64(7 * (i // size))) for i in range(way * size)]
            for s, (split, size) in enumerate((('train', shot), ('test', queries)))}


@pytest.fixture
def make(tmp_path):
    """``make(content, folder=…)``: the file of fold 0, and the options that read it."""
    def write(content=None, folder='2way_3shot', protocol=4, **kwargs):
        file = tmp_path / 'folds' / folder / '0.pkl'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(published() if content is None else content, protocol=protocol))
        return FewShot(tmp_path / 'folds', **{'way': 2, 'shot': 3, 'cache_dir': None, **kwargs})
    return write


# ---- the published folds ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize('folder', ['2way_3shot', '2way3shot'])
@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_both_names(make, folder, protocol):
    dataset = make(folder=folder, protocol=protocol)
    assert len(dataset) == 6 and dataset.labels == [0, 0, 0, 1, 1, 1]
    assert dataset.metainfo == dict(classes=('class_0', 'class_1'), up_axis='y', normals=False)
    for i, sample in enumerate(dataset):
        assert sample['fps_ordered'] and sample['class_id'] == 7 * sample['label']
        assert sorted(sample['points'].tolist()) == sorted(rows(i)[:, :3].tolist())
        assert sample['name'] == f'{folder}/0.pkl[train][{i}]'
    test = make(folder=folder, split='test')
    assert test.labels == [0, 0, 1, 1]
    assert sorted(test[3]['points'].tolist()) == sorted(rows(103)[:, :3].tolist())


def test_options_and_the_cache(make, tmp_path):
    assert make(normals=True, max_points=20)[0]['points'].shape == (20, 6)
    fresh = make(max_points=20, pipeline=[dict(type='Resample', num_points=16), dict(type='Pack')])
    for _ in range(2):
        cached = make(max_points=20, cache_dir=tmp_path / 'cache', pipeline=fresh.pipeline)
        for a, b in zip(fresh, cached):
            assert np.array_equal(a['inputs']['points'], b['inputs']['points'])
    assert list((tmp_path / 'cache').glob('fewshot_2way_3shot_0_train-*'))
    with pytest.raises(ValueError, match=r'max_points=20'):
        make(max_points=20, pipeline=[dict(type='Resample', num_points=30)])[0]


def test_missing_folds_name_both_places(make):
    make()
    for options in (dict(fold=1), dict(way=5)):
        with pytest.raises(FileNotFoundError, match=r'\dway_3shot/\d\.pkl nor \dway3shot/\d\.pkl.*base='):
            make(**options)
    with pytest.raises(FileNotFoundError, match='no folder'):
        FewShot('no/such/folder')


def test_a_missing_fold_is_missed_before_it_is_read(make):
    make(lazy_init=True)
    with pytest.raises(FileNotFoundError, match=r'2way_3shot/4\.pkl'):
        make(lazy_init=True, fold=4)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Bomb.target),)


def test_a_hostile_fold_is_refused_and_nothing_runs(make, tmp_path):
    Bomb.target = tmp_path / 'ran'
    good = published()
    for content in (Bomb(), dict(good, test=Bomb()), dict(good, train=[(rows(0), Bomb(), 0)]), dict(good, more=Bomb()),
                    dict(good, train=[(Bomb(), 0, 0)])):
        for protocol in (2, 4):
            with pytest.raises(ValueError, match=r'0\.pkl: refused.*mkdir'):
                make(content, protocol=protocol)
    assert not Bomb.target.exists()


@pytest.mark.parametrize(('content', 'match'), [
    ([1, 2], 'should hold dict'), (dict(train=[]), 'should hold dict'), (dict(train=[], test=5), 'should hold dict'),
    (dict(train=[], test=[]), 'no train clouds'), (dict(train=[5], test=[]), r'\[train\]\[0\]: should hold \(points'),
    (dict(train=[(rows(0), 0)], test=[]), 'should hold'), (dict(train=[([1], 0, 0)], test=[]), 'should hold'),
    (dict(train=[(rows(0), 2, 0)], test=[]), r'label 2 is not one of the 2 classes \(0 … 1\)'),
    (dict(train=[(rows(0), -1, 0)], test=[]), 'label -1'), (dict(train=[(rows(0), 0.5, 0)], test=[]), 'an integer'),
    (dict(train=[(rows(0), 'a', 0)], test=[]), 'an integer'),
    (dict(train=[(rows(0), np.arange(2), 0)], test=[]), 'an integer'),
    (dict(train=[(rows(0)[:, :2], 0, 0)], test=[]), r'\[train\]\[0\].*N, 3\+F'),
    (dict(train=[(rows(0) * np.nan, 0, 0)], test=[]), r'\[train\]\[0\].*NaN')])
def test_a_fold_of_another_content(make, content, match):
    with pytest.raises(ValueError, match=match):
        make(content)


def test_a_cut_off_fold(make, tmp_path):
    make()
    file = tmp_path / 'folds/2way_3shot/0.pkl'
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r'0\.pkl: refused or broken'):
        read_fold(file, 2)


def test_normals_that_are_not_there(make):
    content = dict(train=[(rows(0)[:, :3], 0, 0)], test=[])
    assert make(content)[0]['points'].shape == (60, 3)
    with pytest.raises(ValueError, match='normals=True needs rows of 6'):
        make(content, normals=True)


# ---- drawn folds -----------------------------------------------------------------------------------------------------
LABELS = dict(train=np.repeat(np.arange(10), 30), test=np.repeat(np.arange(10), 25))


def test_a_fold_has_the_asked_for_samples():
    for fold in range(3):
        drawn = draw_fold(LABELS, way=5, shot=10, fold=fold)
        assert {split: len(items) for split, items in drawn.items()} == dict(train=50, test=100)
        classes = {label: class_id for _, label, class_id in drawn['train']}
        assert sorted(classes) == list(range(5)) and len(set(classes.values())) == 5
        for split, items in drawn.items():
            assert len({index for index, _, _ in items}) == len(items)
            assert all(LABELS[split][index] == class_id == classes[label] for index, label, class_id in items)


def test_folds_depend_on_the_arguments_alone_and_nest():
    first = draw_fold(LABELS, 5, 10)
    np.random.seed(5)
    assert draw_fold(LABELS, 5, 10) == first
    assert all(draw_fold(LABELS, 5, 10, **other) != first for other in (dict(fold=1), dict(seed=1)))
    more = draw_fold(LABELS, 5, 20)
    assert more['test'] == first['test'] and set(first['train']) < set(more['train'])


def test_folds_are_the_same_everywhere():
    """Written down here, so that no other version of numpy draws others."""
    small = dict(train=[0, 1, 2, 3] * 5, test=[3, 2, 1, 0] * 4)
    assert draw_fold(small, way=2, shot=2, queries=1) == dict(
        train=[(19, 0, 3), (7, 0, 3), (5, 1, 1), (17, 1, 1)], test=[(8, 0, 3), (6, 1, 1)])
    assert draw_fold(small, way=3, shot=1, fold=7, queries=1, seed=2**40) == dict(
        train=[(5, 0, 1), (7, 1, 3), (8, 2, 0)], test=[(10, 0, 1), (12, 1, 3), (3, 2, 0)])


def test_every_class_is_drawn():
    seen = {class_id for fold in range(10) for _, _, class_id in draw_fold(LABELS, 5, 10, fold)['train']}
    assert seen == set(range(10))


@pytest.mark.parametrize('options', [dict(way=11, shot=10), dict(way=5, shot=31), dict(way=5, shot=10, queries=26)])
def test_too_few_samples(options):
    with pytest.raises(ValueError, match=f'way={options["way"]} classes.* of 10 classes have so many'):
        draw_fold(LABELS, **options)


def test_classes_with_too_few_samples_are_left_out():
    labels = dict(train=[0] * 9 + [1] * 9 + [2] * 9 + [3] * 2, test=[1] * 4 + [2] * 4 + [3] * 4 + [9] * 4)
    assert {c for _, _, c in draw_fold(labels, 2, 3, queries=4)['test']} == {1, 2}


@pytest.fixture
def options():
    return dict(base=SMALL, way=4, shot=3, queries=2)


def test_from_a_data_set_without_files(options):
    train, test = (FewShot(split=split, **options) for split in ('train', 'test'))
    assert train.labels == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 and len(test) == 8
    assert train.metainfo == dict(classes=('class_0', 'class_1', 'class_2', 'class_3'), up_axis='z')
    source = {split: DATASETS.build({**SMALL, 'split': split}) for split in ('train', 'test')}
    for dataset, split in ((train, 'train'), (test, 'test')):
        names = {sample['name']: sample for sample in source[split]}
        for i, sample in enumerate(dataset):
            assert np.array_equal(sample['points'], names[sample['name']]['points']) and sample['index'] == i
            assert sample['class_id'] == names[sample['name']]['label'] and len(sample['parts']) == 32
    classes = [{sample['label']: sample['class_id'] for sample in dataset} for dataset in (train, test)]
    assert classes[0] == classes[1]
    assert [s['name'] for s in FewShot(**options)] == [s['name'] for s in train]
    assert [s['name'] for s in FewShot(fold=1, **options)] != [s['name'] for s in train]
    assert [s['name'] for s in FewShot(fold_seed=1, **options)] != [s['name'] for s in train]
    assert [s['name'] for s in FewShot(seed=1, **options)] == [s['name'] for s in train]


def test_augmentation_follows_seed_and_epoch(options):
    pipeline = [dict(type='RandomShift'), dict(type='Pack')]
    def first(epoch=0, **kwargs):
        dataset = FewShot(pipeline=pipeline, **options, **kwargs)
        dataset.set_epoch(epoch)
        return dataset[0]['inputs']['points'].tolist()
    assert first() == first() and first() != first(epoch=1) and first() != first(seed=1)


def test_a_drawn_fold_written_down_reads_as_published(tmp_path, options):
    source = [DATASETS.build({**SMALL, 'split': split}) for split in ('train', 'test')]
    fold = make_fold(*source, way=4, shot=3, queries=2)
    (tmp_path / '4way_3shot').mkdir()
    (tmp_path / '4way_3shot/0.pkl').write_bytes(pickle.dumps(fold))
    for split in ('train', 'test'):
        drawn = FewShot(split=split, **options)
        read = FewShot(tmp_path, split, way=4, shot=3, cache_dir=None)
        assert read.labels == drawn.labels
        for a, b in zip(drawn, read):
            assert sorted(a['points'].tolist()) == sorted(b['points'].tolist()) and a['class_id'] == b['class_id']


def test_modelnet10(dataset_dir):
    dataset_dir('modelnet10_ply_hdf5_1024')
    base = dict(type='ModelNet', variant=10, data_root=str(dataset_dir('modelnet10_ply_hdf5_1024')), max_points=64,
                cache_dir=None)
    dataset = FewShot(base=base, way=5, shot=10, pipeline=[dict(type='Resample', num_points=48), dict(type='Pack')])
    assert len(dataset) == 50 and dataset[49]['inputs']['points'].shape == (48, 3)
    assert dataset.metainfo['up_axis'] == 'z'


# ---- bad options -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(('options', 'error', 'match'), [
    (dict(way=1), ValueError, 'way must be at least 2'), (dict(shot=0), ValueError, 'shot'),
    (dict(fold=-1), ValueError, 'fold'), (dict(queries=0), ValueError, 'queries'), (dict(way=2.5), TypeError, 'way'),
    (dict(fold_seed=-1), ValueError, 'fold_seed'), (dict(split='val'), ValueError, "no split 'val'"),
    (dict(data_root='x'), ValueError, 'data_root and normals'), (dict(normals=True), ValueError, 'data_root and norm'),
    (dict(base=5), TypeError, 'config of a data set'), (dict(base=dict(num_samples=3)), TypeError, 'config of a data'),
    (dict(base=dict(SMALL, split='train')), ValueError, "no 'split'"),
    (dict(base=dict(SMALL, pipeline=[])), ValueError, "no 'pipeline'"),
    (dict(base=dict(type='ModelNett')), KeyError, 'ModelNet')])
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        FewShot(**{'base': SMALL, **options})


def test_a_base_without_labels():
    @DATASETS.register_module(name='Unlabelled', force=True)
    class Unlabelled(PointDataset):
        SPLITS: ClassVar = ('train', 'test')

        def load_data_list(self):
            return [dict(points=np.eye(3, dtype=np.float32))] * 4
    with pytest.raises(ValueError, match='has no label'):
        FewShot(base=dict(type='Unlabelled'), way=2, shot=1, queries=1)


def test_mistakes_in_the_base_are_found_in_a_config():
    cfg = dict(model=dict(type='TaskModel'), train_cfg=dict(), optim_wrapper=dict(optimizer=dict(type='AdamW')),
               train_dataloader=dict(dataset=dict(type='FewShot', base=dict(type='ModelNett'))))
    with pytest.raises(KeyError, match=r'train_dataloader\.dataset\.base'):
        check_config(cfg)
