"""Data sets of videos: lists, folders of classes, moving shapes; real clips through a model."""
import numpy as np
import pytest
import torch
from engine_toys import on_cpu, toy_config  # noqa: F401
from test_clips import write_frames, write_video

from ewa3d import fuse
from ewa3d.datasets.clips import LoadClip, PackClip
from ewa3d.datasets.videos import MovingShapes, VideoDataset
from ewa3d.engine.runner import Runner
from ewa3d.models.task import TaskModel
from ewa3d.registry import DATASETS

CLIP = [dict(type='LoadClip', clip_len=3), dict(type='PackClip')]


def test_a_list(tmp_path):
    write_frames(tmp_path / 'data' / 'b 1', 4)
    write_frames(tmp_path / 'data' / 'c', 5)
    write_video(tmp_path / 'data' / 'a.avi', 6)
    (tmp_path / 'list.txt').write_text('a.avi 1\n\nb 1 4 0\nc 5 2\n')
    data = VideoDataset(tmp_path / 'data', ann_file=tmp_path / 'list.txt', pipeline=CLIP)
    assert data.labels == [1, 0, 2] and data.metainfo['classes'] == ('0', '1', '2')
    assert [data[i]['inputs']['video'].shape for i in range(3)] == [(3, 3, 48, 64), (3, 3, 12, 16), (3, 3, 12, 16)]
    assert data[1]['data_samples'].name == 'b 1'
    named = VideoDataset(tmp_path / 'data', ann_file=tmp_path / 'list.txt', classes=['x', 'y', 'z'])
    assert named.metainfo['classes'] == ('x', 'y', 'z') and 'video' not in named[0]
    (tmp_path / 'data' / 'own.txt').write_text('c 0')
    assert VideoDataset(tmp_path / 'data', ann_file='own.txt').labels == [0]


@pytest.mark.parametrize(('text', 'message'), [
    ('a.avi', "line 1: 'path label'"), ('a.avi 0\nb.avi one', 'line 2'), ('a.avi -1', 'line 1'), ('\n \n', 'is empty')])
def test_a_wrong_list(tmp_path, text, message):
    (tmp_path / 'list.txt').write_text(text)
    with pytest.raises(ValueError, match=f'list.txt: .*{message}'):
        VideoDataset(tmp_path, ann_file=tmp_path / 'list.txt')


def test_lists_that_do_not_fit(tmp_path):
    (tmp_path / 'list.txt').write_text('a.avi 3\ngone.mp4 0')
    with pytest.raises(ValueError, match='label 3 is not one of the 2 classes'):
        VideoDataset(tmp_path, ann_file='list.txt', classes=['x', 'y'])
    data = VideoDataset(tmp_path, ann_file='list.txt', pipeline=CLIP)
    with pytest.raises(FileNotFoundError, match=r'gone\.mp4: there is no such video'):
        data[1]
    with pytest.raises(FileNotFoundError, match=r"there is no list 'other\.txt'"):
        VideoDataset(tmp_path, ann_file='other.txt')
    with pytest.raises(FileNotFoundError, match='there is no folder'):
        VideoDataset(tmp_path / 'nowhere')
    with pytest.raises(ValueError, match='needs data_root'):
        VideoDataset(None)
    (tmp_path / 'latin.txt').write_bytes('ä.avi 0'.encode('latin-1'))
    with pytest.raises(ValueError, match='UTF-8 was expected'):
        VideoDataset(tmp_path, ann_file='latin.txt')


@pytest.mark.parametrize('pattern', ['{split}/{name}', '{name}/{split}', '{name}'])
def test_folders_of_classes(tmp_path, pattern):
    for split in ('train', 'test'):
        for name in ('run', 'jump'):
            folder = tmp_path / pattern.format(split=split, name=name)
            write_frames(folder / f'{split}_frames', 3)
            write_video(folder / f'{split}.avi', 4)
    data = VideoDataset(tmp_path, pipeline=CLIP)
    per_class = 2 if 'split' in pattern else 4
    assert data.metainfo['classes'] == ('jump', 'run') and data.labels == [0] * per_class + [1] * per_class
    assert data[0]['inputs']['video'].shape[0] == 3
    assert VideoDataset(tmp_path, split=None, classes=['run']).labels == [0] * 4
    with pytest.raises(ValueError, match="no class folder 'rum'"):
        VideoDataset(tmp_path, classes=['rum'])
    (tmp_path / pattern.format(split='train', name='sit')).mkdir(parents=True)
    with pytest.raises(ValueError, match=r'sit.*: an empty class folder'):
        VideoDataset(tmp_path)


def test_damaged_videos_are_named(tmp_path):
    write_video(tmp_path / 'run' / 'a.avi', 4)
    (tmp_path / 'run' / 'b.mp4').write_text('no video')
    (tmp_path / 'run' / 'c').mkdir()
    data = VideoDataset(tmp_path, pipeline=CLIP)
    assert len(data) == 3 and data[0]['inputs']['video'].shape == (3, 3, 48, 64)
    for i, name in ((1, r'b\.mp4'), (2, 'c')):
        with pytest.raises(ValueError, match=rf'run/{name}.*(does not open|without frames)'):
            data[i]


def test_damaged_videos_are_skipped_where_that_is_asked_for(tmp_path):
    """Videos are opened and decoded to their end, folders frame by frame, before the first sample is asked for."""
    whole = write_video(tmp_path / 'run' / 'a.avi', 60, size=(96, 128)).read_bytes()
    (tmp_path / 'run' / 'cut.avi').write_bytes(whole[:2 * len(whole) // 3])
    (tmp_path / 'run' / 'text.mp4').write_text('no video')
    write_frames(tmp_path / 'run' / 'frames', 4)
    for name in ('empty', 'broken', 'sizes'):
        write_frames(tmp_path / 'run' / name, 0 if name == 'empty' else 3)
    (tmp_path / 'run' / 'broken' / 'img_00003.png').write_bytes(b'no image')
    write_frames(tmp_path / 'run' / 'sizes', 1, size=(8, 8))
    data = VideoDataset(tmp_path, pipeline=CLIP, on_error='skip', max_skipped=0.8)
    assert [name for _, name in data.ids] == ['run/a.avi', 'run/frames'] and len(data) == 2
    assert [data[i]['inputs']['video'].shape[0] for i in range(2)] == [3, 3]
    assert [path.rsplit('/', 1)[1] for path in data.skipped] == ['broken', 'cut.avi', 'empty', 'sizes', 'text.mp4']
    with pytest.raises(ValueError, match=r'5 of 7 .*the first: .*img_00003\.png: the image does not decode'):
        VideoDataset(tmp_path, on_error='skip')
    (tmp_path / 'list.txt').write_text('run/a.avi 0\ngone.mp4 0\n')
    assert VideoDataset(tmp_path, ann_file='list.txt', on_error='skip').skipped == [str(tmp_path / 'gone.mp4')]


def test_generated_clips_are_all_readable():
    assert MovingShapes(6, num_frames=2, on_error='skip').skipped == []


def test_moving_shapes():
    data = MovingShapes(12, num_frames=5, size=16)
    assert data.labels == [0, 1, 2, 3, 4, 5] * 2 and len(data.metainfo['classes']) == 6
    video = data[3]['video']
    assert video.shape == (5, 16, 16, 3) and video.dtype == np.uint8
    assert np.array_equal(video, MovingShapes(4, num_frames=5, size=16)[3]['video'])
    assert not np.array_equal(video, MovingShapes(4, num_frames=5, size=16, split='test')[3]['video'])
    assert not np.array_equal(video, MovingShapes(4, num_frames=5, size=16, data_seed=1)[3]['video'])
    with pytest.raises(ValueError, match='read-only'):
        video[0] = 0
    assert MovingShapes(2, num_frames=1)[0]['video'].shape == (1, 32, 32, 3)
    fewer = MovingShapes(5, num_frames=5, size=16, classes=['down', 'left'])
    assert fewer.metainfo['classes'] == ('down', 'left') and fewer.labels == [0, 1, 0, 1, 0]
    all_but_the_class = MovingShapes(1, num_frames=5, size=16, classes=['left'])[0]['video']
    assert np.array_equal(all_but_the_class[0], fewer[0]['video'][0])  # only the way differs
    assert not np.array_equal(all_but_the_class[1], fewer[0]['video'][1])
    for options, message in ((dict(classes=['rihgt']), "no class 'rihgt'; did you mean 'right'"),
                             (dict(classes=['up', 'up']), 'twice'), (dict(classes=[]), 'empty'),
                             (dict(size=4), 'size must be at least 8'), (dict(num_frames=0), 'num_frames'),
                             (dict(noise=2), 'noise must lie in'), (dict(split='all'), "no split 'all'")):
        with pytest.raises(ValueError, match=message):
            MovingShapes(**options)


def test_shapes_move_as_their_class_says():
    """The shift that best maps each frame to the next; for turns, none."""
    data = MovingShapes(60, num_frames=4, noise=0.)
    for i in range(60):
        frames = data[i]['video'].astype(float).mean(-1)
        frames -= frames.mean((1, 2), keepdims=True)
        spectra = np.fft.fft2(frames)
        moves = np.fft.ifft2(spectra[1:] * spectra[:-1].conj()).real  # its peak is where the frame before went
        peaks = [np.unravel_index(move.argmax(), move.shape) for move in moves]
        dy, dx = np.mean([[(p + 16) % 32 - 16 for p in peak] for peak in peaks], 0)
        name = data.metainfo['classes'][data.labels[i]]
        way = dict(left=dx < -1, right=dx > 1, up=dy < -1, down=dy > 1).get(name, abs(dx) <= 1 and abs(dy) <= 1)
        assert way, (name, dx, dy)


def test_one_frame_says_nothing():
    """Of single frames, every class has the same distribution: the mean frame does not tell classes apart."""
    data = MovingShapes(600, num_frames=3, size=16, noise=0.)
    frames = np.stack([abs(data[i]['video'][1].astype(float) - data[i]['video'][1].mean((0, 1))).mean(-1)
                       for i in range(600)]).reshape(100, 6, -1)
    spread = frames.mean(0).std(0).mean()  # over classes
    assert spread < 1.5 * frames.std(0).mean() / 10  # as far as chance goes


def test_a_run_and_its_test_with_several_views(tmp_path):
    """Two clips of three squares of every video: their probabilities are averaged, and the metric counts videos."""
    data = dict(type='MovingShapes', num_samples=10, num_frames=6, size=12)
    one = [dict(type='LoadClip', clip_len=3, short_side=8), dict(type='PackClip')]
    views = [dict(type='LoadClip', clip_len=3, sampling='dense', num_clips=2, test=True),
             dict(type='ThreeCrop', size=8), dict(type='PackClip')]
    cfg = toy_config(tmp_path, epochs=1)
    tokenizer = dict(type='VideoPatchEmbed', img_size=8, patch_size=4, num_frames=3)
    cfg['model'] = dict(
        type='TaskModel', backbone=dict(type='TokenEncoder', tokenizer=tokenizer, embed_dim=16, depth=2, num_heads=2),
        neck=dict(type='ClipPool'), head=dict(type='I3DHead'),
        expand=[dict(type='STDHA', at='backbone.blocks.*.attn', offsets=[-1, 1])])
    for split, pipeline in (('train', one), ('val', views), ('test', views)):
        cfg[f'{split}_dataloader']['dataset'] = dict(data, split=split, pipeline=pipeline)
    runner = Runner.from_cfg(cfg)
    runner.train()
    found = runner.test()['OA']
    samples = [runner.test_dataloader.dataset[i] for i in range(10)]
    assert samples[0]['inputs']['video'].shape == (6, 3, 3, 8, 8)
    with torch.no_grad():
        scores = [runner.model.eval()(dict(video=s['inputs']['video'])).softmax(-1).mean(0) for s in samples]
    hits = [int(score.argmax()) == int(s['data_samples'].gt_label) for score, s in zip(scores, samples)]
    assert found == pytest.approx(100 * sum(hits) / 10)


def test_they_are_registered():
    assert DATASETS.get('VideoDataset') is VideoDataset and DATASETS.get('MovingShapes') is MovingShapes


def test_real_clips_are_loaded_trained_on_fused_and_tested(dataset_dir, tmp_path):
    root = dataset_dir('action_videos')
    (tmp_path / 'list.txt').write_text('test.avi 0\nrawvideo_part_0.mp4 1\nrawframes_test_imgs 2\n')
    steps = [dict(type='ImageTransforms', transforms=[dict(name='RandomResizedCrop', size=16)]),
             dict(type='PackClip', mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])]
    data = VideoDataset(root, ann_file=tmp_path / 'list.txt', frames='img_*', seed=0,
                        pipeline=[dict(type='LoadClip', clip_len=4, short_side=20), *steps])
    rules = [dict(type='STDHA', at='backbone.blocks.*.attn', offsets=[-1, 1]),
             dict(type='LinearAdapter', at='backbone.blocks.*.attn.qkv'),
             dict(type='LinearAdapter', at='backbone.blocks.*.mlp.fc2', position='after')]
    tokenizer = dict(type='VideoPatchEmbed', img_size=16, patch_size=8, num_frames=4)
    backbone = dict(type='TokenEncoder', tokenizer=tokenizer,
                    embed_dim=16, depth=2, num_heads=2, qkv_bias=True, pos='first', drop_path_rate=0.)
    model = TaskModel(backbone, dict(type='ClipPool'), dict(type='I3DHead', num_classes=3), rules,
                      trainable=['adapter', 'temporal_embed', 'backbone.norm.*', 'head'])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        items = [data[i] for i in range(3)]
        batch = model.data_preprocessor(dict(inputs=dict(video=[item['inputs']['video'] for item in items]),
                                             data_samples=[item['data_samples'] for item in items]))
        optimizer.zero_grad()
        loss = model(**batch, mode='loss')['loss_cls']
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    model.eval()
    test = [LoadClip(4, 'dense', 2, num_clips=2, test=True, short_side=16), *data.pipeline[1:-1], PackClip()]
    views = VideoDataset(root, ann_file=tmp_path / 'list.txt', frames='img_*', pipeline=test)[0]
    inputs = dict(video=views['inputs']['video'][None])
    assert inputs['video'].shape == (1, 2, 4, 3, 16, 16)
    before = model(inputs, [views['data_samples']], mode='predict')[0].pred_scores
    fuse(model)
    after = model(inputs, [views['data_samples']], mode='predict')[0].pred_scores
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
