"""Pictures of what a model says about files, and windows where they are asked for."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from browser import open_page
from test_predict import classifier, segmenter, spread  # noqa: F401

import ewa3d
from ewa3d import cli
from ewa3d.browse import browse
from ewa3d.datasets.io import read_cloud
from ewa3d.engine.checkpoint import write_checkpoint
from ewa3d.gallery import write_predictions
from ewa3d.inference import originals
from ewa3d.predictions import BoxPrediction, ClassPrediction
from ewa3d.viewer import show_clouds
from ewa3d.visualization import palette


def cloud(count: int = 90) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 3)).astype(np.float32)


def test_a_checkpoint_alone_says_and_draws(tmp_path, capsys):
    folder = tmp_path / 'mit Ümlaut'
    folder.mkdir()
    cfg = classifier()
    model = spread(ewa3d.build(cfg))
    names = [f'class {i}' for i in range(13)]
    path = str(write_checkpoint(folder / 'a.pth', model.state_dict(), dict(cfg=cfg, dataset_meta=dict(classes=names))))
    files = []
    for i in range(2):
        files.append(str(folder / f'é {i}.npy'))
        np.save(files[-1], cloud(90 + i))
    assert cli.main(['predict', path, *files, '--device', 'cpu', '--pictures', str(folder / 'new' / 'p')]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 6 and all(file in line and 'class ' in line for file, line in zip(files, out))
    made = {file.name for file in (folder / 'new' / 'p').iterdir()}
    assert made == {f'predictions{end}' for end in ('.png', '.html', '_0.ply', '_1.ply')}
    page, said = open_page(folder / 'new' / 'p' / 'predictions.html', tmp_path / 'profile')
    assert not said and page.count('<canvas') == 2 and 'class ' in page
    assert cli.main(['predict', path, files[0], '--cfg-options', 'a=1']) == 2
    assert 'none is given' in capsys.readouterr().err
    (folder / 'file').touch()
    assert cli.main(['predict', path, files[0], '--pictures', str(folder / 'file' / 'x')]) == 2
    assert 'is a file' in capsys.readouterr().err


def test_parts_and_boxes(segmenter, tmp_path):  # noqa: F811
    np.save(tmp_path / 'a.npy', cloud(120))
    found = segmenter.predict([tmp_path / 'a.npy'], category='chair')
    inputs, up = originals(segmenter, [tmp_path / 'a.npy'])
    written = write_predictions(found, inputs, tmp_path / 'parts', up, ply=True)
    assert [path.name for path in written] == ['parts.png', 'parts.html', 'parts_0.ply'] and up in 'xyz'
    name = found[0].part_names[int(found[0].parts[0])]
    assert name in written[1].read_text(encoding='utf-8')
    body = written[2].read_bytes().partition(b'end_header\n')[2]
    vertices = np.frombuffer(body, [('xyz', '<f4', 3), ('rgb', 'u1', 3)])
    np.testing.assert_array_equal(vertices['xyz'], cloud(120))
    np.testing.assert_allclose(vertices['rgb'] / 255, palette(found[0].parts), atol=1 / 255)
    room = [np.random.default_rng(0).uniform(0, 3, (200, 3))]
    boxes = BoxPrediction('room.ply', np.array([[1., 1, 1, 1, 1, 1, 0]]), np.array([1]), ('bed',), np.array([.5]))
    assert 'bed' in write_predictions([boxes], room, tmp_path / 'boxes')[1].read_text(encoding='utf-8')
    none = boxes.__class__('x', np.zeros((0, 7)), np.zeros(0, int), (), np.zeros(0))
    assert write_predictions([none], room, tmp_path / 'none')[0].stat().st_size > 1000


@pytest.mark.parametrize('channels', [1, 3])
def test_images(channels, tmp_path):
    found = [ClassPrediction('a/b.png', 0, 'cat', .875, np.ones(1), ('cat',))]
    image = np.random.default_rng(0).integers(0, 255, (8, 9, channels)).astype(np.uint8)
    assert len(write_predictions(found, [image], tmp_path / 'images', ply=True)) == 2
    with pytest.raises(ValueError, match='1 predictions and 0 inputs'):
        write_predictions(found, [], tmp_path / 'images')
    with pytest.raises(ValueError, match='0 predictions'):
        write_predictions([], [], tmp_path / 'images')


def test_a_window_only_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    shown = []
    made = SimpleNamespace(
        geometry=SimpleNamespace(PointCloud=lambda points: SimpleNamespace(points=points)),
        utility=SimpleNamespace(Vector3dVector=np.asarray),
        visualization=SimpleNamespace(draw_geometries=lambda clouds, window_name: shown.append((clouds, window_name))))
    monkeypatch.setattr('ewa3d.viewer.import_open3d', lambda: made)
    monkeypatch.setattr('ewa3d.browse.import_open3d', lambda: made)
    monkeypatch.setenv('DISPLAY', ':0')
    command = ['browse', 'quickstart/plain', '--num', '2', '--out', str(tmp_path)]
    assert cli.main(command) == 0 and not shown
    assert cli.main([*command, '--window']) == 0
    (one, two), heading = shown.pop()
    assert len(one.points) == len(one.colors) and 'SyntheticShapes' in heading
    assert one.points[:, 0].max() < two.points[:, 0].min()  # side by side
    for name in ('DISPLAY', 'WAYLAND_DISPLAY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, 'platform', 'linux')
    with pytest.raises(OSError, match='a window needs a display'):
        show_clouds([cloud()])
    images = dict(train_dataloader=dict(dataset=dict(type='Digits', split='train', pipeline=[dict(type='PackImage')])))
    with pytest.raises(KeyError, match='a window shows clouds'):
        browse(images, tmp_path, num=1, window=True)


def test_clouds_are_those_of_the_file(tmp_path):
    np.savetxt(tmp_path / 'a.txt', np.hstack([cloud(), cloud()]))
    model = ewa3d.build(classifier())
    inputs, _ = originals(model, [str(tmp_path / 'a.txt')])
    np.testing.assert_allclose(inputs[0], read_cloud(tmp_path / 'a.txt').points[:, :3], atol=1e-6)
    with pytest.raises(FileNotFoundError):
        originals(model, [tmp_path / 'b.txt'])
