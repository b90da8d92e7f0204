"""Pictures open, show what they should and leave no half-written file; PLY files hold the numbers."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ewa3d import visualization as vis
from ewa3d.files import atomic_write


@pytest.fixture
def cloud():
    return np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)


def pixels(path):
    from matplotlib.image import imread
    return imread(path)[..., :3]


def ink(image, color):
    """How many pixels are close to the hue of ``color``: same direction from white."""
    target = 1 - np.array(vis._rgb(color))
    seen = 1 - image.reshape(-1, 3)
    length = np.linalg.norm(seen, axis=1)
    cosine = seen @ target / np.maximum(length * np.linalg.norm(target), 1e-9)
    return int(((cosine > 0.985) & (length > 0.2)).sum())


def read_ply(path):
    header, body = path.read_bytes().split(b'end_header\n', 1)
    lines = header.decode('ascii').splitlines()
    assert lines[:2] == ['ply', 'format binary_little_endian 1.0']
    kinds = {'float': '<f4', 'uchar': 'u1'}
    fields = [(line.split()[2], kinds[line.split()[1]]) for line in lines if line.startswith('property')]
    count = int(next(line for line in lines if line.startswith('element vertex')).split()[2])
    vertices = np.frombuffer(body, dtype=fields)
    assert len(vertices) == count
    return vertices


def test_grid_has_the_size_of_its_cells_and_is_not_blank(cloud, tmp_path):
    small = pixels(vis.draw_clouds([cloud], tmp_path / 'one.png', size=2))
    wide = pixels(vis.draw_clouds([cloud] * 5, tmp_path / 'five.png', size=2, columns=5))
    rows = pixels(vis.draw_clouds([cloud] * 5, tmp_path / 'rows.png', size=2, columns=2))
    assert wide.shape[1] == 5 * small.shape[1] and wide.shape[0] == small.shape[0]
    assert rows.shape[1] == 2 * small.shape[1] and rows.shape[0] > 2.5 * small.shape[0]
    assert all(image.min() < 0.6 and image.mean() > 0.5 for image in (small, wide, rows))
    fifth = wide[:, 4 * small.shape[1]:]
    assert fifth.min() < 0.6


def test_long_titles_stay_in_their_cells(tmp_path):
    titles = ['', 'wide ' * 40, '']
    image = pixels(vis.draw_clouds([np.eye(3)] * 3, tmp_path / 'a.png', titles=titles, columns=3))
    line = image[-int(image.shape[0] * 0.3 / 2.58):].min(-1)  # the line of titles: 0.30 of 0.08 + 2.2 + 0.30 inches
    cell = image.shape[1] // 3
    assert line[:, cell:2 * cell].min() < 0.6 and line[:, :cell].min() == line[:, 2 * cell:].min() == 1


def test_same_input_gives_the_same_bytes(cloud, tmp_path):
    first = vis.draw_clouds([cloud], tmp_path / 'a.png').read_bytes()
    assert vis.draw_clouds([torch.from_numpy(cloud)], tmp_path / 'b.png').read_bytes() == first


def test_predictions_colour_right_and_wrong(cloud, tmp_path):
    right = pixels(vis.draw_predictions([cloud], [1], [1], ['box', 'cone'], tmp_path / 'r.png'))
    wrong = pixels(vis.draw_predictions([cloud], [1], [0], ['box', 'cone'], tmp_path / 'w.png'))
    assert ink(right, vis.PLAIN) > 200 and ink(right, vis.WRONG) == 0
    assert ink(wrong, vis.WRONG) > 200 and ink(wrong, vis.PLAIN) == 0


@pytest.mark.parametrize('up', ['x', 'y', 'z'])
def test_the_up_axis_points_up_and_is_no_mirror_image(up):
    view = vis._view(up, 30., 20.)
    np.testing.assert_allclose(view @ view.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(view) == pytest.approx(1)
    right, _, upward = view @ np.eye(3)['xyz'.index(up)]
    assert right == pytest.approx(0) and upward > 0.9


def test_near_points_hide_far_ones(tmp_path):
    """Two parallel sheets: from the front only the near one's colour shows in the middle."""
    y, z = np.meshgrid(np.linspace(-1, 1, 60), np.linspace(-1, 1, 60))
    sheet = np.stack([np.zeros(3600), y.ravel(), z.ravel()], 1)
    cloud = np.concatenate([sheet + [1, 0, 0], sheet - [1, 0, 0]])
    labels = np.repeat([0, 3], 3600)
    image = pixels(vis.draw_clouds([cloud], tmp_path / 'a.png', colors=[labels], azimuth=0, elevation=0))
    assert ink(image, vis.PALETTE[0]) > 20 * ink(image, vis.PALETTE[3])


def test_degenerate_clouds_are_drawn(tmp_path):
    for i, points in enumerate([np.zeros((1, 3)), np.ones((50, 3)), np.eye(3) * 1e-30, np.full((4, 3), 1e9)]):
        assert pixels(vis.draw_clouds([points], tmp_path / f'{i}.png')).min() < 0.95


def test_curves_and_confusion(tmp_path):
    loss = {'plain': [3., 2., 1.], 'EWA': ([1, 3], [2.5, .5])}
    path = vis.draw_curves({'loss': loss, 'OA': {'EWA': [1., np.nan, 2.]}},
                           tmp_path / 'deep' / 'er' / 'curves.png')
    assert ink(pixels(path), vis.PALETTE[0]) > 100 and ink(pixels(path), vis.PALETTE[1]) > 100
    dark = pixels(vis.draw_confusion(np.eye(4) * 10, list('abcd'), tmp_path / 'm.png'))
    light = pixels(vis.draw_confusion(np.zeros((4, 4)), list('abcd'), tmp_path / 'n.png'))
    assert dark.mean() < light.mean() - 0.03
    assert vis.draw_confusion(np.ones((40, 40)), [str(i) for i in range(40)], tmp_path / 'big.png').exists()


def test_ply_holds_the_numbers(cloud, tmp_path):
    labels = np.arange(200) % 3 - 1
    vertices = read_ply(vis.write_ply(tmp_path / 'a.ply', np.c_[cloud, cloud], labels))
    np.testing.assert_array_equal(np.stack([vertices[k] for k in 'xyz'], 1), cloud)
    rgb = np.stack([vertices[k] for k in ('red', 'green', 'blue')], 1)
    np.testing.assert_array_equal(rgb, np.rint(vis.palette(labels) * 255))
    assert read_ply(vis.write_ply(tmp_path / 'b.ply', cloud)).dtype.names == ('x', 'y', 'z')
    exact = np.random.default_rng(0).integers(0, 256, (200, 3), dtype=np.uint8)
    vertices = read_ply(vis.write_ply(tmp_path / 'c.ply', cloud, exact))
    np.testing.assert_array_equal(vertices['green'], exact[:, 1])


@pytest.mark.parametrize('call, message', [
    (lambda p, c: vis.draw_clouds([], p), 'at least one cloud'),
    (lambda p, c: vis.draw_clouds([c[:0]], p), r'clouds\[0\] has shape \(0, 3\)'),
    (lambda p, c: vis.draw_clouds([c, c[:, :2]], p), r'clouds\[1\] has shape'),
    (lambda p, c: vis.draw_clouds([c * np.nan], p), '200 points with NaN'),
    (lambda p, c: vis.draw_clouds([c], p, up='w'), "up = 'w'"),
    (lambda p, c: vis.draw_clouds([c], p, columns=-1), 'columns = -1'),
    (lambda p, c: vis.draw_clouds([c], p, titles=['a', 'b']), 'titles'),
    (lambda p, c: vis.draw_clouds([c], p, colors=[np.zeros(7, int)]), r'colors\[0\]'),
    (lambda p, c: vis.draw_clouds([c], p, colors=[np.full((200, 3), 7.)]), r'outside \[0, 1\]'),
    (lambda p, c: vis.draw_clouds([c], p.with_suffix('.jpg')), 'ends in .png'),
    (lambda p, c: vis.draw_predictions([c], [0], [2], ['a', 'b'], p), 'predicted has the label 2'),
    (lambda p, c: vis.draw_predictions([c, c], [0], [0], ['a'], p), '2 clouds, 1 true'),
    (lambda p, c: vis.draw_curves({}, p), 'panels is empty'),
    (lambda p, c: vis.draw_curves({'loss': {'a': ([1, 2], [1])}}, p), r"panels\['loss'\]\['a'\]"),
    (lambda p, c: vis.draw_confusion(np.zeros((2, 3)), ['a', 'b'], p), r'shape \(2, 3\)'),
    (lambda p, c: vis.draw_confusion(-np.eye(2), ['a', 'b'], p), 'negative'),
])
def test_bad_input_is_named_and_writes_nothing(cloud, tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / 'a.png', cloud)
    assert not list(tmp_path.iterdir())


def test_dollars_and_backslashes_in_names_are_no_formulas(tmp_path):
    odd = r'$\frac{$ \no$'
    path = tmp_path / 'a.png'
    vis.draw_clouds([np.eye(3)], path, titles=[odd], heading=odd)
    vis.draw_predictions([np.eye(3)], [0], [1], [odd, 'b'], path)
    vis.draw_curves({odd: {odd: [1, 2]}}, path, xlabel=odd, heading=odd)
    vis.draw_confusion(np.eye(2), [odd, '$$'], path, heading=odd)
    assert path.read_bytes().startswith(b'\x89PNG')


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / 'a.txt', 'old')

    def fail(*args):
        raise OSError('disk full')

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='disk full'):
        atomic_write(path, 'new')
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a.txt']
    with pytest.raises(IsADirectoryError, match='is a folder'):
        atomic_write(tmp_path, 'new')


def test_no_pyplot_and_no_display(tmp_path):
    code = ('import sys, numpy as np\n'
            'from ewa3d import visualization as vis\n'
            'assert "matplotlib" not in sys.modules\n'
            f'vis.draw_clouds([np.eye(3)], {str(tmp_path / "a.png")!r})\n'
            'assert "matplotlib.pyplot" not in sys.modules\n')
    environment = {'HOME': str(tmp_path), 'PYTHONPATH': ':'.join(sys.path)}  # no DISPLAY, no MPLBACKEND
    subprocess.run([sys.executable, '-c', code], check=True, env=environment)


def test_reconstructions_have_a_row_a_cloud_in_one_frame(cloud, tmp_path):
    visible, made = cloud[:60], cloud[60:] * 0.9
    three = pixels(vis.draw_reconstructions([cloud] * 2, [made] * 2, tmp_path / 'a.png', visible=[visible] * 2, size=2))
    two = pixels(vis.draw_reconstructions([cloud] * 2, [made] * 2, tmp_path / 'b.png', size=2, titles=['one', 'two']))
    cell = three.shape[1] // 3
    assert two.shape == (three.shape[0], 2 * cell, 3)
    third = three[:, 2 * cell:]
    assert ink(third, vis.MADE) > 200 and ink(third, vis.PLAIN) < ink(three[:, :cell], vis.PLAIN) / 5
    assert ink(three[:, cell:2 * cell], vis.MADE) == 0


def test_a_frame_places_a_part_where_it_is_in_the_whole(tmp_path):
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)
    part = corners[corners[:, 2] > 0] + [0, 0, 0]
    alone = pixels(vis.draw_clouds([part], tmp_path / 'a.png'))
    placed = pixels(vis.draw_clouds([part], tmp_path / 'b.png', frames=[corners]))
    half = placed.shape[0] // 2
    assert placed[half + 20:].min() > 0.9 and placed[:half].min() < 0.6  # the upper half of the cube
    assert alone[half + 20:].min() < 0.6
    with pytest.raises(ValueError, match='frames: expected a list with one entry for each of 1 clouds'):
        vis.draw_clouds([part], tmp_path / 'c.png', frames=[corners] * 2)


@pytest.mark.parametrize('arguments, message', [
    (dict(reconstructed=[]), 'reconstructed: expected a list with one entry for each of 1 clouds'),
    (dict(reconstructed=[np.zeros((0, 3))]), r'reconstructed\[0\] has shape \(0, 3\)'),
    (dict(visible=[np.full((2, 3), np.nan)]), r'visible\[0\] has 2 points with NaN'),
    (dict(clouds=[]), 'clouds is empty'),
])
def test_reconstructions_refuse(cloud, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        vis.draw_reconstructions(**{'clouds': [cloud], 'reconstructed': [cloud], 'path': tmp_path / 'a.png',
                                    **arguments})
