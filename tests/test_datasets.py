"""The base class: metainfo, pipelines, seeding, workers, subsets, bad input."""
import copy
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import ClassVar

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader

from ewa3d.datasets import PointDataset
from ewa3d.registry import DATASETS

PIPELINE = [dict(type='Normalize'), dict(type='Resample', num_points=16, method='random'), dict(type='RandomScale'),
            dict(type='RandomJitter'), dict(type='Pack')]


class Fruit(PointDataset):
    """What a newcomer writes."""
    METAINFO: ClassVar[dict] = dict(classes=('apple', 'pear'), up_axis='y')

    def load_data_list(self):
        rng = np.random.default_rng(0)
        return [dict(points=rng.normal(size=(20, 3)).astype(np.float32), label=i % 2) for i in range(11)]


def of(entries, **kwargs):
    """A data set of these entries."""
    class Given(Fruit):
        def load_data_list(self):
            return entries
    return Given(**kwargs)


def epoch_of(dataset, workers=0, **kwargs):
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=pseudo_collate, **kwargs)
    return loader, [torch.stack(batch['inputs']['points']) for batch in loader]


def test_a_subclass_with_two_members_is_a_data_set():
    dataset = Fruit(pipeline=PIPELINE)
    sample = dataset[3]
    assert len(dataset) == 11 and sample['inputs']['points'].shape == (16, 3)
    assert int(sample['data_samples'].gt_label) == 1 and sample['data_samples'].name == 'Fruit[3]'
    assert len(list(dataset)) == 11  # iteration ends
    assert torch.equal(dataset[-1]['inputs']['points'], dataset[10]['inputs']['points'])


def test_paths_are_read_and_name_the_sample(tmp_path):
    np.save(tmp_path / 'a.npy', np.eye(3))
    dataset = of([dict(path=tmp_path / 'a.npy', label=0), dict(path=tmp_path / 'no.npy', label=1)])
    assert np.array_equal(dataset[0]['points'], np.eye(3)) and dataset[0]['name'].endswith('a.npy')
    with pytest.raises(FileNotFoundError, match=r'no\.npy'):
        dataset[1]


def test_metainfo_merges_and_is_a_copy():
    dataset = Fruit(metainfo=dict(up_axis='z', source='garden'), lazy_init=True)
    assert dataset.metainfo == dict(classes=('apple', 'pear'), up_axis='z', source='garden')
    dataset.metainfo['classes'] = ()
    assert dataset.metainfo['classes'] == ('apple', 'pear') and Fruit.METAINFO['up_axis'] == 'y'
    for bad, error in ((dict(up_axis='up'), ValueError), (dict(classes='ab'), TypeError),
                       (dict(classes=['a', 'a']), ValueError)):
        with pytest.raises(error):
            Fruit(metainfo=bad)


def test_lazy_init_reads_nothing_until_it_is_asked():
    class Counted(Fruit):
        reads = 0

        def load_data_list(self):
            type(self).reads += 1
            return super().load_data_list()
    dataset = Counted(lazy_init=True)
    assert dataset.metainfo['classes'] and Counted.reads == 0 and 'not read' in repr(dataset)
    assert len(dataset) == 11 and dataset[0]['label'] == 0 and Counted.reads == 1


@pytest.mark.parametrize('workers', [1, 2])
def test_augmentation_does_not_depend_on_the_number_of_workers(workers):
    for epoch in (0, 3):
        one, two = Fruit(pipeline=PIPELINE), Fruit(pipeline=PIPELINE)
        one.set_epoch(epoch)
        two.set_epoch(epoch)
        for a, b in zip(epoch_of(one)[1], epoch_of(two, workers)[1]):
            assert torch.equal(a, b)


def test_seed_epoch_and_index_each_change_the_augmentation():
    base = Fruit(pipeline=PIPELINE)[0]['inputs']['points']
    assert torch.equal(base, Fruit(pipeline=PIPELINE, seed=0)[0]['inputs']['points'])
    assert not torch.equal(base, Fruit(pipeline=PIPELINE, seed=1)[0]['inputs']['points'])
    later = Fruit(pipeline=PIPELINE)
    later.set_epoch(1)
    assert not torch.equal(base, later[0]['inputs']['points'])
    points = np.random.default_rng(0).normal(size=(20, 3))
    twins = of([dict(points=points, label=0)] * 2, pipeline=PIPELINE)
    assert not torch.equal(twins[0]['inputs']['points'], twins[1]['inputs']['points'])


def test_set_epoch_reaches_workers_that_are_already_running():
    dataset, plain = Fruit(pipeline=PIPELINE), Fruit(pipeline=PIPELINE)
    loader, first = epoch_of(dataset, 2, persistent_workers=True)
    assert all(torch.equal(a, b) for a, b in zip(first, epoch_of(plain)[1]))
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        plain.set_epoch(epoch)
        batches = [torch.stack(batch['inputs']['points']) for batch in loader]
        assert all(torch.equal(a, b) for a, b in zip(batches, epoch_of(plain)[1]))
        assert not torch.equal(batches[0], first[0])


def test_the_epoch_is_shared_with_a_spawned_copy_and_with_a_deep_copys_workers():
    dataset = Fruit()
    buffer = ForkingPickler.dumps(SpawnedFruit())
    assert pickle.loads(buffer).epoch == 0
    original = SpawnedFruit()
    copy_elsewhere = pickle.loads(ForkingPickler.dumps(original))
    original.set_epoch(7)
    assert copy_elsewhere.epoch == 7
    assert copy.deepcopy(dataset)._epoch.is_shared()


class SpawnedFruit(Fruit):
    """At the top of the module, so that it pickles."""


def test_a_failing_transform_names_sample_and_transform():
    def broken(results):
        raise RuntimeError('out of paint')
    dataset = of([dict(points=np.eye(3), label=0, name='red one')], pipeline=[broken])
    with pytest.raises(RuntimeError, match=r'red one.*out of paint'):
        dataset[0]
    dataset = of([dict(points=np.eye(3), label=0, name='red one')], pipeline=[dict(type='Resample', num_points=5)])
    with pytest.raises(ValueError, match=r'red one: Resample: num_points=5.*has 3'):
        dataset[0]
    dataset = of([dict(points=np.eye(3), label=0, name='red one')], pipeline=[lambda results: None])
    with pytest.raises(ValueError, match=r'red one.*None'):
        dataset[0]

    def writes(results):
        results['points'] *= 2
        return results
    dataset = of([dict(points=np.eye(3, dtype=np.float32), label=0, name='red one')], pipeline=[writes])
    with pytest.raises(ValueError, match=r'red one.*read-only'):
        dataset[0]


def test_a_failing_worker_says_which_sample(tmp_path):
    entries = [dict(points=np.eye(3), label=0, name='good'), dict(points=np.full((3, 3), np.nan), label=0, name='bad')]
    with pytest.raises(ValueError, match='bad: 3 of 3 points have NaN'):
        list(DataLoader(of(entries), num_workers=1, collate_fn=pseudo_collate))


@pytest.mark.parametrize('entry, error, match', [
    (dict(points=np.array([[0, 0, np.inf]]), label=0), ValueError, 'NaN or infinite'),
    (dict(points=np.zeros((4, 2)), label=0), ValueError, r'\(4, 2\)'),
    (dict(points=np.zeros((0, 3)), label=0), ValueError, r'\(0, 3\)'),
    (dict(points=['a'], label=0), TypeError, 'array of numbers'),
    (dict(points=np.eye(3), parts=[0, 1], label=0), ValueError, '2 part labels for 3 points'),
    (dict(label=0), KeyError, "'points' or 'path'")])
def test_bad_samples(entry, error, match):
    with pytest.raises(error, match=match) as caught:
        of([dict(name='the sample', **entry)])[0]
    assert 'the sample' in str(caught.value)


@pytest.mark.parametrize('label, error', [(2, ValueError), (-1, ValueError), (0.5, TypeError), ('apple', TypeError),
                                          (True, TypeError)])
def test_bad_labels_are_found_when_the_list_is_read(label, error):
    with pytest.raises(error, match='worm'):
        of([dict(points=np.eye(3), label=label, name='worm')])


def test_an_unlabelled_cloud_has_no_label():
    assert 'gt_label' not in of([dict(points=np.eye(3))], pipeline=[dict(type='Pack')])[0]['data_samples']


@pytest.mark.parametrize('entries, match', [(None, 'must return a list of dicts, got None'), ([('a', 0)], 'got tuple')])
def test_lists_of_something_else(entries, match):
    with pytest.raises(TypeError, match=match):
        of(entries)


def test_no_samples():
    with pytest.raises(ValueError, match='no samples'):
        of([])


def test_subsets():
    full = Fruit(pipeline=PIPELINE)
    assert [s['data_samples'].index for s in Fruit(pipeline=PIPELINE, indices=3)] == [0, 3, 7]
    part = Fruit(pipeline=PIPELINE, indices=[9, 2])
    assert len(part) == 2 and torch.equal(part[1]['inputs']['points'], full[2]['inputs']['points'])
    for bad in (0, 12, [11], [-1], []):
        with pytest.raises(ValueError, match='indices'):
            Fruit(indices=bad)


class Uneven(Fruit):
    """60 apples and 20 pears, mixed."""

    def load_data_list(self):
        return [dict(points=np.eye(3, dtype=np.float32), label=int(i % 4 == 3)) for i in range(80)]


def test_a_share_of_the_labels_is_balanced_nested_and_seeded():
    def chosen(fraction, **kwargs):
        dataset = Uneven(label_fraction=fraction, **kwargs)
        assert len(dataset) == len(dataset.labels)
        return [sample['index'] for sample in dataset], dataset.labels
    half, labels = chosen(0.5)
    assert labels.count(0) == 30 and labels.count(1) == 10 and half == sorted(half)
    assert [i % 4 == 3 for i in half] == [label == 1 for label in labels]
    tenth, labels = chosen(0.1)
    assert (labels.count(0), labels.count(1)) == (6, 2) and set(tenth) < set(half)
    assert sorted(chosen(0.001)[1]) == [0, 1]  # one of each class
    assert chosen(1)[0] == list(range(80)) == chosen(None)[0]
    assert chosen(0.1)[0] == tenth != chosen(0.1, label_seed=1)[0]
    assert set(chosen(0.5, indices=range(40))[0]) < set(range(40)) and len(chosen(0.5, indices=range(40))[0]) == 20
    assert chosen(0.1, seed=7)[0] == tenth  # the augmentation's seed is another one


@pytest.mark.parametrize(('options', 'error', 'match'), [
    (dict(label_fraction=0), ValueError, r'label_fraction must lie in \(0, 1\], got 0'),
    (dict(label_fraction=1.5), ValueError, 'label_fraction'), (dict(label_fraction=-0.1), ValueError, 'label_fraction'),
    (dict(label_fraction='10%'), TypeError, 'label_fraction must be a number'),
    (dict(label_fraction=True), TypeError, 'label_fraction'), (dict(label_seed=-1), ValueError, 'label_seed'),
    (dict(label_seed=0.5), TypeError, 'label_seed')])
def test_bad_shares_of_the_labels(options, error, match):
    with pytest.raises(error, match=match):
        Uneven(**options)


def test_a_share_of_labels_needs_labels():
    with pytest.raises(ValueError, match='sample 1 has none'):
        of([dict(points=np.eye(3), label=0), dict(points=np.eye(3))], label_fraction=0.5)


@pytest.mark.parametrize(('seed', 'error'), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_seeds(seed, error):
    with pytest.raises(error, match='Fruit: seed must be'):
        Fruit(seed=seed)


@pytest.mark.parametrize('indices', [[True, False] + [True] * 9, True, np.ones(11, bool)])
def test_masks_are_no_indices(indices):
    with pytest.raises(TypeError, match='flatnonzero'):
        Fruit(indices=indices)


def test_meshes_have_normals_where_they_are_asked_for(tmp_path):
    path = tmp_path / 'a.off'
    path.write_text('OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n')
    assert of([dict(path=path, label=0)])[0]['points'].shape == (10_000, 3)
    sample = of([dict(path=path, label=0)], metainfo=dict(normals=True))[0]
    assert sample['points'].shape == (10_000, 6) and sample['normals'] is True
    path.write_text('OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n')
    with pytest.raises(ValueError, match=r'a.off: metainfo says normals=True'):
        of([dict(path=path, label=0)], metainfo=dict(normals=True))[0]


def test_what_an_entry_says_is_kept():
    entry = dict(points=np.zeros((2, 6)), label=0, normals=True, up_axis='x', index=42, colour='red')
    sample = of([entry])[0]
    assert sample['normals'] is True and sample['up_axis'] == 'x' and sample['colour'] == 'red'
    assert sample['index'] == 42
    with pytest.raises(TypeError, match="'normals' says whether"):
        of([dict(points=np.eye(3), normals=np.eye(3), label=0)])[0]


def test_a_missing_data_root_is_named():
    class Files(Fruit):
        def load_data_list(self):
            return [dict(path=self.data_root / 'a.npy', label=0)]
    with pytest.raises(TypeError, match='give it as data_root='):
        Files()
    assert len(Files('garden')) == 1


def test_normals_need_their_columns():
    dataset = of([dict(points=np.eye(3), label=0, name='flat')], metainfo=dict(normals=True))
    with pytest.raises(ValueError, match='flat: normals need 6 columns'):
        dataset[0]


def test_registry_suggests_names_and_keywords():
    with pytest.raises(KeyError, match='ModelNet'):
        DATASETS.build(dict(type='Modelnet'))
    with pytest.raises(TypeError, match='variant'):
        DATASETS.build(dict(type='ModelNet', varient=10))
    with pytest.raises(KeyError, match='Normalize'):
        Fruit(pipeline=[dict(type='Normalise')])
    with pytest.raises(TypeError, match='a transform is'):
        Fruit(pipeline=[3])
