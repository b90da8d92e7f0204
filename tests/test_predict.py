"""predict, prepare and extract: clouds, scenes and images as people have them."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mixed_toys import mixed_model
from mmengine.config import Config

import ewa3d
from ewa3d import cli
from ewa3d.config_files import find_config
from ewa3d.datasets.cache import prepared_rows
from ewa3d.engine.checkpoint import write_checkpoint
from ewa3d.evaluation_parts import propagated_scores
from ewa3d.predictions import BoxPrediction, ClassPrediction, PartPrediction
from ewa3d.registry import DATASETS

SMALL = dict(num_groups=8, group_size=8, embed_dim=16, widths=(8, 8, 16))
BACKBONE = dict(type='TokenEncoder', embed_dim=16, num_heads=2, tokenizer=dict(type='PointPatchEmbed', **SMALL))
PIPELINE = [dict(type='Normalize'), dict(type='Resample', num_points=64, method='fps'), dict(type='Pack')]


def whole(model: dict, data: dict, **more) -> dict:
    return dict(model=dict(type='TaskModel', **model), test_dataloader=dict(dataset=data), **more)


def classifier(pipeline=PIPELINE, **data) -> dict:
    data = dict(dict(type='SyntheticShapes', split='test', num_samples=4, num_points=200, pipeline=pipeline), **data)
    return whole(dict(backbone=dict(BACKBONE, depth=2), neck=dict(type='TokenPool'),
                      head=dict(type='ClsHead', hidden=16)), data)


def spread(model):
    """Outputs that differ from input to input."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(scope='module')
def shapes():
    return DATASETS.build(classifier()['test_dataloader']['dataset'])


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return spread(ewa3d.build(classifier()))


def clouds(shapes) -> list[np.ndarray]:
    return [np.array(shapes.raw(i)['points']) for i in range(len(shapes))]


# ---- classification --------------------------------------------------------------------------------------------------
def test_a_cloud_is_prepared_as_the_data_set_would(model, shapes):
    for i, cloud in enumerate(clouds(shapes)):
        found = model.predict(cloud)
        assert isinstance(found, ClassPrediction)
        expected = model(dict(points=shapes[i]['inputs']['points'][None])).softmax(-1)[0].detach()
        torch.testing.assert_close(found.scores, expected)
        assert found.label == int(expected.argmax()) and found.score == pytest.approx(float(expected.max()))
        assert found.class_name == shapes.metainfo['classes'][found.label] and found.class_name in str(found)
        assert json.loads(json.dumps(found.as_dict()))['scores'].keys() == set(shapes.metainfo['classes'])


def test_every_form_of_a_cloud(model, shapes, tmp_path):
    cloud = clouds(shapes)[0]
    np.save(tmp_path / 'a.npy', cloud)
    np.savetxt(tmp_path / 'b.txt', np.concatenate([cloud, np.ones((len(cloud), 3))], 1))  # more columns than are taken
    forms = [torch.from_numpy(cloud), torch.from_numpy(cloud).double().requires_grad_(),
             cloud.astype(np.float64) * 7 + 2, cloud.tolist(), str(tmp_path / 'a.npy'), tmp_path / 'b.txt']
    expected = model.predict(cloud).scores
    for form in forms:
        torch.testing.assert_close(model.predict(form).scores, expected, rtol=1e-4, atol=1e-5)
    found = model.predict(forms)
    assert len(found) == len(forms) and found[4].name == str(tmp_path / 'a.npy') and found[1].name == 'cloud 1'
    for one in found:
        torch.testing.assert_close(one.scores, expected, rtol=1e-4, atol=1e-5)


def test_clouds_of_different_sizes_and_batches(model, shapes):
    several = [cloud[:size] for cloud, size in zip(clouds(shapes), (200, 64, 150, 20))]
    alone = [model.predict(cloud).scores for cloud in several]
    for size in (1, 3, 32):
        together = model.predict(several, batch_size=size)
        assert [one.name for one in together] == [f'cloud {i}' for i in range(4)]
        for a, b in zip(alone, together):
            torch.testing.assert_close(a, b.scores, rtol=1e-5, atol=1e-6)
    batch = np.stack([cloud[:150] for cloud in clouds(shapes)])
    for form in (batch, torch.from_numpy(batch), batch.tolist()):
        assert len(model.predict(form)) == 4
    assert model.predict([]) == [] and len(model.predict([batch[0]])) == 1


def test_without_resampling_each_size_is_a_batch_of_its_own(shapes):
    model = spread(ewa3d.build(classifier([dict(type='Normalize'), dict(type='Pack')])))
    several = [cloud[:size] for cloud, size in zip(clouds(shapes), (100, 100, 90, 100))]
    for cloud, found in zip(several, model.predict(several)):
        torch.testing.assert_close(found.scores, model.predict(cloud).scores, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match='one batch was expected'):
        model.prepare(several)


def test_the_model_is_left_as_it_was(shapes):
    model = ewa3d.build(classifier()).double()
    model.train()
    model.neck.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = model.predict(clouds(shapes)[0])
    assert bool(found.scores.isfinite().all()) and not found.scores.requires_grad
    assert model.training and model.head.training and not model.neck.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_folders_of_clouds_are_cut_and_ordered_as_their_data_set_does(tmp_path):
    rng = np.random.default_rng(0)
    for name in ('flat', 'round'):
        (tmp_path / name).mkdir()
        for i in range(2):
            np.save(tmp_path / name / f'{i}.npy', rng.normal(size=(300, 3)) * (1, 1, 0.1 if name == 'flat' else 1))
    data = dict(type='FolderPointCloud', data_root=str(tmp_path), max_points=100, cache_dir=None, pipeline=PIPELINE)
    cfg = classifier()
    cfg['test_dataloader'] = dict(dataset=data)
    model = spread(ewa3d.build(cfg))
    built = DATASETS.build(data)
    for i, path in enumerate(sorted(tmp_path.glob('*/*.npy'))):
        points = model.prepare(path)['points']
        torch.testing.assert_close(points[0], built[i]['inputs']['points'])
    assert model.predict(path).class_name in ('flat', 'round')
    rows = prepared_rows(np.load(path).astype(np.float32), 100)
    assert len(set(rows.tolist())) == 100


def test_a_checkpoint_brings_names_and_pipeline(model, tmp_path, shapes):
    cfg = classifier()
    meta = dict(cfg=cfg, dataset_meta=dict(classes=[f'kind {i}' for i in range(13)]))
    file = write_checkpoint(tmp_path / 'a.pth', model.state_dict(), meta)
    expected = model.predict(clouds(shapes)[0])
    for built in (ewa3d.build(file), ewa3d.build(cfg, file), ewa3d.build(dict(cfg['model']), file)):
        found = built.predict(clouds(shapes)[0])
        torch.testing.assert_close(found.scores, expected.scores)
        assert found.class_name == f'kind {expected.label}'
    bare = write_checkpoint(tmp_path / 'bare.pth', model.state_dict())
    with pytest.raises(ValueError, match='it has no config'):
        ewa3d.build(bare)
    with pytest.raises(FileNotFoundError):
        ewa3d.build(tmp_path / 'none.pth')


def test_a_model_without_a_pipeline_says_so(shapes):
    model = ewa3d.build(classifier()['model'], num_classes=13)
    with pytest.raises(ValueError, match='without a test pipeline'):
        model.predict(clouds(shapes)[0])
    found = model.predict(clouds(shapes)[0], pipeline=PIPELINE)
    assert found.class_name == str(found.label)
    headless = ewa3d.build(dict(type='TaskModel', backbone=dict(BACKBONE, depth=1)))
    with pytest.raises(ValueError, match='needs a head'):
        headless.predict(clouds(shapes)[0])


@pytest.mark.parametrize(('given', 'error', 'text'), [
    (np.zeros(3), ValueError, r'shape \(N, 3\+F\), or a batch'), (np.zeros((5, 2)), ValueError, r'\(N, 3\)'),
    (np.zeros((5, 6)), ValueError, r'takes points \(N, 3\), got \(5, 6\)'),
    (np.zeros((3, 1024)), ValueError, r'\(N, 3\)'), (np.zeros((1, 2, 5, 3)), ValueError, 'shape'),
    (np.full((80, 3), np.nan), ValueError, 'NaN'), (np.zeros((0, 3)), ValueError, 'N > 0'),
    (np.array([['a'] * 3]), TypeError, 'array of numbers or a path'), (np.ones((80, 3), complex), TypeError, 'numbers'),
    (np.ones((80, 3), bool), TypeError, 'numbers'), (None, TypeError, 'NoneType'), (3.5, ValueError, 'shape'),
    (dict(points=1), TypeError, 'got a dict'), ([np.zeros((80, 3)), None], TypeError, 'cloud 1'),
    ([[1., 2.], [3.]], ValueError, 'cloud 0'), ('nothing.npy', FileNotFoundError, 'nothing.npy'),
    ('a.docx', ValueError, 'unknown extension'), ('', IsADirectoryError, 'folder'),
])
def test_what_is_no_cloud(model, given, error, text):
    with pytest.raises(error, match=text):
        model.predict(given)


@pytest.mark.parametrize(('options', 'text'), [
    (dict(batch_size=0), 'batch_size'), (dict(task='x'), 'one task'), (dict(threshold=2), 'threshold'),
    (dict(category='char'), "did you mean 'chair' or"), (dict(category=13), '0 to 12'),
    (dict(category=[1, 2]), '1 were'), (dict(pipeline=[dict(type='Normalise')]), "'Normalize'"),
])
def test_options_that_cannot_be(model, shapes, options, text):
    with pytest.raises((ValueError, KeyError), match=text):
        model.predict(clouds(shapes)[0], **options)


def test_inputs_of_another_kind(model):
    with pytest.raises(TypeError, match=r'floating-point numbers, got torch\.int64'):
        model(dict(points=torch.zeros(1, 80, 3, dtype=torch.int64)))
    with pytest.raises(TypeError, match='tensor'):
        model(dict(points=np.zeros((1, 80, 3))))


# ---- features --------------------------------------------------------------------------------------------------------
def test_extract(model, shapes):
    cloud = clouds(shapes)[0]
    inputs = model.prepare(cloud)
    assert inputs['points'].shape == (1, 64, 3)
    feats = model.extract(inputs)
    torch.testing.assert_close(model.extract(cloud), feats)
    torch.testing.assert_close(model.extract(inputs['points']), feats)
    torch.testing.assert_close(model.head(feats), model(inputs))
    assert not model.extract(cloud).requires_grad and feats.requires_grad
    first, last = model.extract(cloud, out_indices=(0, -1))
    assert first.shape == last.shape == (1, 9, 16)
    torch.testing.assert_close(model.neck(last), feats)
    assert len(model.extract(clouds(shapes), out_indices=[1])[0]) == 4
    torch.testing.assert_close(model.extract(torch.as_tensor(np.array(cloud))), feats)  # one cloud, as numpy's
    with pytest.raises(ValueError, match='nothing was given'):
        model.extract([])
    with pytest.raises(ValueError, match=r'\(B, N, 3\), got'):
        model(torch.rand(200, 3))  # what the model takes is a batch
    for wrong in ((7,), (0, 0), (), 'ab', 1):
        with pytest.raises(ValueError, match='out_indices'):
            model.extract(inputs, out_indices=wrong)


# ---- parts -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def segmenter():
    torch.manual_seed(0)
    steps = [dict(type='Normalize'), dict(type='KeepAll'), dict(type='Resample', num_points=64, method='random'),
             dict(type='Pack', category=True)]
    data = dict(type='SyntheticShapes', split='test', num_samples=13, num_points=300, pipeline=steps)
    return spread(ewa3d.build(whole(dict(
        backbone=dict(BACKBONE, depth=3, cls_token=False),
        neck=dict(type='PointFeaturePropagation', out_indices=(0, 1, 2), hidden=16, out_dim=16, category_dim=4),
        head=dict(type='PartSegHead', hidden=(16,))), data)))


def test_parts_of_every_point_that_was_given(segmenter):
    shapes = DATASETS.build(dict(type='SyntheticShapes', split='test', num_samples=13, num_points=300))
    ids = list(shapes.metainfo['parts'].values())
    for i in (0, 5):
        cloud = np.array(shapes.raw(i)['points'])
        name = shapes.metainfo['classes'][i]
        found = segmenter.predict(cloud, category=name)
        assert isinstance(found, PartPrediction) and found.parts.shape == (300,) and found.category == name
        assert set(found.parts.tolist()) <= set(ids[i]) and name in str(found)
        torch.testing.assert_close(found.part_scores.sum(-1), torch.ones(300))
        assert torch.equal(found.part_scores.argmax(-1), found.parts)
        # the scores of the points that were drawn, carried to the others
        inputs = segmenter.prepare(cloud, category=i)
        scores, normalised = segmenter(inputs)[0], segmenter.prepare(cloud, i, pipeline=[
            dict(type='Normalize'), dict(type='Pack', category=True)])['points'][0]
        expected = propagated_scores(scores, inputs['points'][0], normalised)[:, list(ids[i])]
        same = torch.tensor(ids[i])[expected.argmax(-1)] == found.parts
        assert same.float().mean() > 0.99  # equal distances may go either way
        assert json.loads(json.dumps(found.as_dict()))['parts'] == found.parts.tolist()
    several = segmenter.predict([cloud[:250], cloud], category=[name, 5])
    assert [len(one.parts) for one in several] == [250, 300]


def test_the_category_is_asked_for(segmenter):
    with pytest.raises(ValueError, match=r'told the category.*airplane'):
        segmenter.predict(np.random.rand(100, 3))
    with pytest.raises(ValueError, match="'airplane'"):
        segmenter.predict(np.random.rand(100, 3), category='aeroplane')


# ---- boxes -----------------------------------------------------------------------------------------------------------
def test_boxes_where_the_points_are():
    cfg = Config.fromfile(find_config('3detr_xs_scratch_synthetic'))
    cfg.merge_from_dict({'model.backbone.tokenizer.num_points': 32, 'model.backbone.depth': 1,
                         'model.neck.num_queries': 8, 'model.neck.depth': 1, 'test_dataloader.dataset.num_points': 500,
                         'test_dataloader.dataset.num_samples': 2})
    model = spread(ewa3d.build(cfg))
    data = DATASETS.build(cfg.test_dataloader.dataset)
    rooms = [np.array(data.raw(i)['points']) for i in range(2)]
    found = model.predict([rooms[0], rooms[1][:400]], threshold=0)
    assert len(found) == 2
    for one in found:
        assert isinstance(one, BoxPrediction) and one.boxes.shape == (len(one.labels), 7) and len(one.boxes)
        assert one.scores.tolist() == sorted(one.scores.tolist(), reverse=True)
        assert [data.metainfo['classes'][i] for i in one.labels.tolist()] == list(one.class_names)
        assert len(json.loads(json.dumps(one.as_dict()))['boxes']) == len(one.boxes)
    assert len(model.predict(rooms[0], threshold=1).boxes) == 0
    far = model.predict(rooms[0].astype(np.float64) + (6e5, 5e6, 0), threshold=0)
    centre = far.boxes[:, :3] - torch.tensor([6e5, 5e6, 0.], dtype=torch.float64)
    assert centre.abs().max() < 1e3


# ---- images, several tasks -------------------------------------------------------------------------------------------
def test_images(tmp_path):
    from PIL import Image
    cfg = Config.fromfile(find_config('vit_xs_scratch_digits'))
    cfg.merge_from_dict({'model.backbone.depth': 1})
    model = spread(ewa3d.build(cfg))
    data = DATASETS.build(cfg.test_dataloader.dataset)
    img = np.array(data.raw(3)['img'])
    Image.fromarray(img[..., 0]).save(tmp_path / 'three.png')
    expected = model(dict(img=data[3]['inputs']['img'][None])).softmax(-1)[0]
    forms = [img, img[..., 0], torch.from_numpy(img).permute(2, 0, 1), Image.fromarray(img[..., 0]),
             tmp_path / 'three.png']
    for form in forms:
        torch.testing.assert_close(model.predict(form).scores, expected)
    assert len(model.predict(forms)) == 5 and len(model.predict(np.stack([img, img]))) == 2
    for wrong in (img.astype(float), np.zeros((2, 2, 2, 2, 2), np.uint8), tmp_path / 'none.png'):
        with pytest.raises((ValueError, FileNotFoundError)):
            model.predict(wrong)


def test_a_task_of_several():
    sources = dict(clouds=dict(type='SyntheticShapes', num_samples=2, pipeline=PIPELINE),
                   images=dict(type='Digits', split='test', pipeline=[dict(type='PackImage')]))
    model = ewa3d.build(dict(model=mixed_model(), test_dataloader=dict(dataset=dict(type='MixedDataset',
                                                                                  sources=sources))))
    found = model.predict(np.random.rand(80, 3), task='clouds')
    assert len(found.classes) == 13 and 'airplane' in found.classes
    assert len(model.predict(np.zeros((8, 8, 1), np.uint8), task='images').classes) == 10
    for options, text in ((dict(), "say which: task='clouds'"), (dict(task='image'), "'images'")):
        with pytest.raises(ValueError, match=text):
            model.predict(np.random.rand(80, 3), **options)


# ---- the command -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def run_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    cfg = classifier()
    (folder / 'config.py').write_text('\n'.join(f'{key} = {value!r}' for key, value in cfg.items()) + '\n')
    write_checkpoint(folder / 'a.pth', model.state_dict(), dict(cfg=cfg))
    np.save(folder / 'cloud.npy', np.random.default_rng(0).normal(size=(100, 3)))
    return folder


def test_the_command(model, run_folder, tmp_path, capsys):
    cloud = str(run_folder / 'cloud.npy')
    command = ['predict', str(run_folder / 'config.py'), str(run_folder / 'a.pth'), cloud, '--device', 'cpu']
    assert cli.main([*command, cloud, '--json', str(tmp_path / 'new' / 'out.json')]) == 0
    out = capsys.readouterr().out
    expected = model.predict(cloud)
    assert out.count(f'{cloud}  {expected}') == 2
    found = json.loads((tmp_path / 'new' / 'out.json').read_text())
    assert len(found) == 2 and found[0]['class_name'] == expected.class_name and Path(found[0]['name']).is_file()


@pytest.mark.parametrize(('change', 'text'), [
    ({3: 'nothing.npy'}, 'nothing.npy: there is no such file'), ({2: 'nothing.pth'}, 'nothing.pth does not exist'),
    ({1: 'quickstart/plian'}, "did you mean 'quickstart/plain'"), ({5: 'tpu'}, '--device tpu'),
])
def test_mistakes_on_the_command_line(run_folder, capsys, change, text):
    command = ['predict', str(run_folder / 'config.py'), str(run_folder / 'a.pth'), str(run_folder / 'cloud.npy'),
               '--device', 'cpu']
    for place, value in change.items():
        command[place] = value
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and text in error


def test_an_output_that_cannot_be_written_is_found_first(run_folder, tmp_path, capsys):
    (tmp_path / 'file').touch()
    command = ['predict', str(run_folder / 'config.py'), 'nothing.pth', str(run_folder / 'cloud.npy'), '--json']
    for out, text in ((tmp_path, 'is a folder'), (tmp_path / 'file' / 'x.json', 'is a file')):
        assert cli.main([*command, str(out)]) == 2
        assert text in capsys.readouterr().err
