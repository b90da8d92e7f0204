"""What a model is given, and what it predicts, as pictures: clouds, parts, boxes, images, clips; TensorBoard."""
import numpy as np
import pytest
import torch
from browser import open_page
from cli_toys import configs, fails
from engine_toys import on_cpu, toy_config  # noqa: F401
from mixed_toys import mixed_config
from mmengine.config import Config
from test_visualization import pixels, read_ply

from ewa3d import cli
from ewa3d.browse import browse
from ewa3d.datasets.image_transforms import PackImage
from ewa3d.engine.pictures import PicturesHook
from ewa3d.engine.runner import Runner
from ewa3d.gallery import by_source, sample_cells, write_gallery
from ewa3d.structures import Sample
from ewa3d.visualization import RIGHT, WRONG, draw_images, palette


def loader(**dataset) -> Config:
    return Config(dict(train_dataloader=dict(dataset=dataset)))


PACK = [dict(type='Normalize'), dict(type='Resample', num_points=32, method='random')]


def test_command(tmp_path, capsys, monkeypatch):
    config, _ = configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(['browse', config, '--num', '3', '--split', 'test', '--ply']) == 0
    written = capsys.readouterr().out.split()
    assert [path.partition('/')[2] for path in written] == [
        'ewa/test.png', 'ewa/test.html', *(f'ewa/test_{i}.ply' for i in range(3))]
    assert 'ToyClouds, test: 9 samples; points (48, 3)' in (tmp_path / 'browse/ewa/test.html').read_text()
    assert len(read_ply(tmp_path / 'browse/ewa/test_0.ply')) == 48
    assert 'num must be at least 1' in fails(capsys, 'browse', config, '--num', '0')
    assert cli.main(['browse', config, '--num', '1', '--out', 'o', '--cfg-options',
                     'train_dataloader.dataset.num_points=9']) == 0
    assert 'points (9, 3)' in (tmp_path / 'o/train.html').read_text()
    with pytest.raises(KeyError, match='no val_dataloader'):
        browse(Config(dict(val_dataloader=None)), tmp_path, 'val')


def test_augmentation_is_that_of_the_epoch(tmp_path):
    cfg = loader(type='SyntheticShapes', num_samples=4, num_points=64, pipeline=[
        *PACK, dict(type='RandomRotate'), dict(type='Pack')])
    first, again, other = (browse(cfg, tmp_path / name, num=1, epoch=epoch)[0].read_bytes()
                           for name, epoch in (('a', 0), ('b', 0), ('c', 1)))
    assert first == again != other


def test_parts_boxes_images_and_clips(tmp_path):
    parts = loader(type='SyntheticShapes', num_samples=13, num_points=64, pipeline=[*PACK, dict(type='Pack')])
    scenes = loader(type='SyntheticScenes', num_samples=2, num_points=512, pipeline=[dict(type='PackBoxes')])
    images = loader(type='Digits', split='train', pipeline=[dict(type='PackImage', mean=[0.3], std=[0.37])])
    clips = loader(type='MovingShapes', num_samples=2, pipeline=[
        dict(type='LoadClip', clip_len=4), dict(type='PackClip', mean=[.5] * 3, std=[.3] * 3)])
    for name, cfg, num in (('parts', parts, 2), ('scenes', scenes, 1), ('images', images, 4), ('clips', clips, 2)):
        png, page = browse(cfg, tmp_path / name, num=num)
        assert pixels(png).min() < 0.6 and page.stat().st_size > 1000
    assert pixels(tmp_path / 'clips' / 'train.png').shape[1] > pixels(tmp_path / 'images' / 'train.png').shape[1]
    assert open_page(tmp_path / 'parts' / 'train.html', tmp_path / 'profile')[1] == []


def test_mixtures_have_a_picture_a_source(tmp_path):
    cfg = Config(dict(train_dataloader=mixed_config(tmp_path)['train_dataloader']))
    names = [path.name for path in browse(cfg, tmp_path, num=2)]
    assert names == ['train_clouds.png', 'train_clouds.html', 'train_images.png', 'train_images.html']


# ---- cells ----------------------------------------------------------------------------------------------------------
class Data:
    def __init__(self, **metainfo):
        self.metainfo = metainfo


def item(inputs: dict, **fields) -> dict:
    sample = Sample(metainfo=dict(name='a'))
    for key, value in fields.items():
        setattr(sample, key, torch.as_tensor(value))
    return dict(inputs=inputs, data_samples=sample)


def test_classes_below_predictions():
    cloud = dict(points=torch.randn(20, 3))
    items = [item(cloud, gt_label=0, pred_label=0), item(cloud, gt_label=0, pred_label=1), item(cloud, pred_label=1)]
    cells = sample_cells(items, Data(classes=('cup', 'mug')), predicted=True)
    assert list(cells['titles']) == ['✓ cup', '✗ mug, is cup', 'mug']
    assert list(cells['title_colors']) == [RIGHT, WRONG, RIGHT]
    assert list(sample_cells(items, Data(), predicted=False)['titles']) == ['0', '0', 'a']


def test_parts_are_coloured_and_restricted_to_the_category():
    cloud = dict(points=torch.randn(4, 3))
    scores = torch.tensor([[9., 0, 1, 0]]).repeat(4, 1).log()
    items = [item(cloud, gt_label=1, gt_parts=[2, 2, 3, 3], part_scores=scores)]
    np.testing.assert_array_equal(sample_cells(items, Data())['colors'][0], palette([2, 2, 3, 3]))
    cells = sample_cells(items, Data(parts=dict(a=[0, 1], b=[2, 3])), predicted=True)
    assert cells['titles'] == ['a', 'predicted', '50.0 % wrong']


def test_boxes_that_are_likely(tmp_path):
    box = torch.tensor([[0., 0, 0, 1, 1, 1, 0]])
    items = [item(dict(points=torch.rand(50, 3)), gt_boxes=box, gt_labels=[1], pred_boxes=box.repeat(2, 1),
                  pred_scores=[[.1, .8], [.3, .1]], pred_objectness=[.9, .4])]
    cells = sample_cells(items, Data(classes=('bed', 'sofa')), predicted=True)
    assert cells['titles'] == ['a: 1 box', 'predicted: 1 box'] and list(cells['legend']) == ['sofa']
    assert len(write_gallery(items, Data(classes=('bed', 'sofa')), tmp_path / 'x', predicted=True)) == 2


def test_images_as_they_were_before_normalisation():
    data = Data()
    data.pipeline = [PackImage(mean=[.2, .4, .6], std=[.5, .5, .5])]
    img = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    packed = data.pipeline[0](dict(img=img, label=0, name='a'))
    shown = sample_cells([packed], data)['images'][0]
    np.testing.assert_allclose(shown * 255, img, atol=1e-3)
    clip = item(dict(video=torch.rand(2, 3, 1, 4, 4)))  # two views of three frames, one channel
    cells = sample_cells([clip], Data())
    assert len(cells['images']) == 6 and cells['columns'] == 6 and cells['images'][0].shape == (4, 4, 3)
    clouds = sample_cells([item(dict(points=torch.rand(3, 9, 3)))], Data())
    assert len(clouds['clouds']) == 3 and list(clouds['titles']) == ['a', '', '']
    with pytest.raises(KeyError, match='these have sound'):
        sample_cells([item(dict(sound=torch.rand(3)))], Data())
    with pytest.raises(ValueError, match='as many frames'):
        sample_cells([item(dict(video=torch.rand(t, 3, 4, 4))) for t in (2, 3)], Data())


def test_grids_of_images(tmp_path):
    images = [np.zeros((4, 4, 3)), np.ones((9, 5, 3)), np.full((4, 4, 3), 255, np.uint8)]
    wide = pixels(draw_images(images, tmp_path / 'a.png', columns=3, titles=['a', 'b', 'c'], heading='H'))
    assert wide.shape[1] > 2.5 * pixels(draw_images(images, tmp_path / 'b.png', columns=1)).shape[1]
    for bad, message in (([], 'images is empty'), ([np.zeros((4, 4))], r'images\[0\] has shape'),
                         ([np.full((2, 2, 3), 2.)], r'images\[0\] has values outside')):
        with pytest.raises(ValueError, match=message):
            draw_images(bad, tmp_path / 'x.png')


def test_indices_are_spread():
    assert [rows for _, _, rows in by_source(range(10), 5)] == [[0, 2, 4, 6, 8]]
    assert [rows for _, _, rows in by_source(range(2), 5)] == [[0, 1]]


# ---- while training and after a test --------------------------------------------------------------------------------
def test_pictures_go_to_tensorboard(tmp_path, monkeypatch):
    cfg = toy_config(tmp_path, ewa=True, epochs=2)
    cfg['default_hooks']['pictures'] = dict(type='PicturesHook', interval=2, ply=True)
    cfg['visualizer'] = dict(type='Visualizer', vis_backends=[dict(type='TensorboardVisBackend')])
    runner = Runner.from_cfg(cfg)
    runner.train()
    names = {path.name for path in (tmp_path / 'pictures').iterdir()}
    assert names == {'val_epoch_2.png', 'val_epoch_2.html', *(f'val_epoch_2_{i}.ply' for i in range(8))}
    runner.visualizer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / 'vis_data'))
    events.Reload()
    tags = events.Tags()
    assert tags['images'] == ['val'] and events.Images('val')[0].step == 12
    assert {'loss', 'share_rate', 'OA', 'spread/backbone.blocks.0.mlp'} <= set(tags['scalars'])
    assert [event.step for event in events.Scalars('spread/backbone.blocks.0.mlp')] == [6, 12]
    assert 'val_epoch_2.png' in (tmp_path / 'report.html').read_text(encoding='utf-8')


def test_half_of_the_pictures_are_wrong_ones(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr('ewa3d.engine.pictures.write_gallery',
                        lambda items, data, stem, *args, **options: drawn.append((stem.name, items)) or [stem])
    runner = Runner.from_cfg(toy_config(tmp_path, epochs=1))
    hook = PicturesHook()
    runner.build_test_loop(runner._test_loop)
    dataset = runner.build_dataloader(toy_config(tmp_path)['test_dataloader']).dataset
    hook.draw(runner, dataset, 'predictions', wrong=[2, 5])
    assert [item['data_samples'].index for item in drawn[0][1]] == [2, 5, 0, 1, 3, 4, 6, 7]
    assert 'pred_label' in drawn[0][1][0]['data_samples'] and drawn[0][0] == 'predictions'
    hook.draw(runner, dataset, 'predictions', wrong=list(range(9)))
    assert len({item['data_samples'].index for item in drawn[1][1]}) == 8
    for bad in (dict(num_samples=0), dict(interval=0)):
        with pytest.raises(ValueError, match='PicturesHook'):
            PicturesHook(**bad)


def test_pictures_of_several_tasks(tmp_path):
    cfg = mixed_config(tmp_path, epochs=1)
    cfg['default_hooks']['pictures'] = dict(type='PicturesHook', interval=1)
    Runner.from_cfg(cfg).train()
    assert {path.name for path in (tmp_path / 'pictures').glob('*.png')} == {
        'val_epoch_1_clouds.png', 'val_epoch_1_images.png'}
    text = (tmp_path / 'report.html').read_text(encoding='utf-8')
    assert '<h3>clouds</h3>' in text and '<h3>images</h3>' in text
