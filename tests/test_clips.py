"""Which frames of a video, reading them, the transforms of clips; what is damaged."""
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from ewa3d.datasets.clips import (
    ClipFlip,
    LoadClip,
    PackClip,
    ThreeCrop,
    count_frames,
    dense_frames,
    frame_files,
    read_frames,
    uniform_frames,
)
from ewa3d.datasets.image_transforms import ImageTransforms

cv2 = pytest.importorskip('cv2')


def write_frames(folder, count: int, size=(12, 16), name='img_{:05d}.png'):
    """Frames whose grey tells their number: 10, 20, …"""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((*size, 3), 10 * (i + 1), np.uint8)).save(folder / name.format(i + 1))
    return folder


def write_video(path, count: int, size=(48, 64), fourcc: str = 'MJPG', fps: int = 10):
    """A video of plain frames, red = 10 · number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), fps, size[::-1])
    if not writer.isOpened():
        pytest.skip(f'this OpenCV does not write {fourcc}')
    for i in range(count):
        frame = np.zeros((*size, 3), np.uint8)
        frame[..., 2] = 10 * i % 256
        writer.write(frame)
    writer.release()
    return path


# ---- which frames ---------------------------------------------------------------------------------------------------
def test_dense_at_fixed_places():
    assert dense_frames(20, 4, 2).tolist() == [[6, 8, 10, 12]]
    assert dense_frames(20, 4, 2, 3).tolist() == [[0, 2, 4, 6], [6, 8, 10, 12], [12, 14, 16, 18]]
    assert dense_frames(5, 4, 2, 2).tolist() == [[0, 2, 4, 1]] * 2  # too short: it starts again
    assert dense_frames(1, 3, 5).tolist() == [[0, 0, 0]]


def test_dense_at_random():
    starts = {int(dense_frames(12, 3, 2, 1, np.random.default_rng(i))[0, 0]) for i in range(100)}
    assert starts == set(range(7))
    clips = dense_frames(100, 5, 3, 4, np.random.default_rng(0))
    assert clips.shape == (4, 5) and (np.diff(clips) == 3).all() and len(set(clips[:, 0])) > 1


def test_uniform_at_fixed_places():
    assert uniform_frames(8, 8).tolist() == [list(range(8))]
    assert uniform_frames(12, 4).tolist() == [[1, 4, 7, 10]]
    assert uniform_frames(12, 4, 2).tolist() == [[1, 4, 7, 10], [2, 5, 8, 11]]
    assert uniform_frames(3, 6).tolist() == [[0, 0, 1, 1, 2, 2]]
    assert uniform_frames(9, 1).tolist() == [[4]] and uniform_frames(1, 3).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(('total', 'length'), [(30, 8), (8, 8), (5, 8), (1, 4), (17, 3)])
def test_uniform_at_random(total, length):
    seen = [set() for _ in range(length)]
    for i in range(300):
        clip = uniform_frames(total, length, 1, np.random.default_rng(i))[0]
        assert (np.diff(clip) >= 0).all() and clip.min() >= 0 and clip.max() < total
        for part, frame in zip(seen, clip):
            part.add(int(frame))
    assert set().union(*seen) == set(range(total))  # every frame comes up
    if total % length == 0:
        assert seen == [set(range(i * total // length, (i + 1) * total // length)) for i in range(length)]


# ---- reading --------------------------------------------------------------------------------------------------------
def test_a_folder_of_frames(tmp_path):
    write_frames(tmp_path / 'v', 12, name='frame_{}.png')  # frame_10 comes after frame_9
    write_frames(tmp_path / 'v', 2, name='flow_{}.png')
    (tmp_path / 'v' / 'notes.txt').write_text('')
    assert count_frames(tmp_path / 'v') == 14 and count_frames(tmp_path / 'v', 'frame_*') == 12
    assert [f.stem for f in frame_files(tmp_path / 'v', 'frame_*')] == [f'frame_{i}' for i in range(1, 13)]
    frames = read_frames(tmp_path / 'v', [11, 0, 11, 8], 'frame_*')
    assert frames.shape == (4, 12, 16, 3) and frames[:, 0, 0, 0].tolist() == [120, 10, 120, 90]
    assert read_frames(tmp_path / 'v', [0], short_side=6).shape == (1, 6, 8, 3)


def test_a_video_file(tmp_path):
    path = write_video(tmp_path / 'a.avi', 12)
    assert count_frames(path) == 12
    frames = read_frames(path, [7, 2, 2])
    assert frames.shape == (3, 48, 64, 3) and frames.dtype == np.uint8
    np.testing.assert_allclose(frames[..., 0].mean((1, 2)), [70, 20, 20], atol=4)  # red comes first
    assert frames[..., 2].max() < 20
    assert read_frames(path, [11], short_side=24).shape == (1, 24, 32, 3)


@pytest.mark.parametrize('name', ['nowhere.mp4', 'empty.mp4', 'text.avi', 'no_frames', 'no_frames.avi'])
def test_what_holds_no_frames(tmp_path, name):
    path = tmp_path / name
    if name == 'no_frames':
        path.mkdir()
    elif name == 'no_frames.avi':
        write_video(path, 0)
    elif name != 'nowhere.mp4':
        path.write_text('' if name == 'empty.mp4' else 'this is no video')
    error = FileNotFoundError if name == 'nowhere.mp4' else ValueError
    for read in (count_frames, lambda p: read_frames(p, [0]),
                 lambda p: LoadClip(2)(dict(path=p, rng=np.random.default_rng(0)))):
        with pytest.raises(error, match=path.stem):
            read(path)


def test_a_video_that_is_cut_off(tmp_path):
    whole = write_video(tmp_path / 'a.avi', 60, size=(96, 128)).read_bytes()
    cut = tmp_path / 'cut.avi'
    cut.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=r'cut\.avi: the video'):
        read_frames(cut, [count_frames(cut) - 1, 59])


def test_a_container_that_says_too_much(tmp_path, monkeypatch):
    """Containers estimate: one frame too many is none missing, a quarter is."""
    path = write_video(tmp_path / 'a.avi', 12)
    from ewa3d.datasets import clips
    monkeypatch.setattr(clips, '_claimed', lambda capture, path: 13)
    frames = read_frames(path, [12, 3])
    np.testing.assert_allclose(frames[..., 0].mean((1, 2)), [110, 30], atol=4)
    monkeypatch.setattr(clips, '_claimed', lambda capture, path: 16)
    with pytest.raises(ValueError, match=r'a\.avi: the video ends after 12 frames, its container says 16'):
        read_frames(path, [15])
    assert len(read_frames(path, [5])) == 1  # what is there is read


@pytest.mark.parametrize('kind', ['mjpeg', 'mpg'])
def test_streams_that_do_not_say_how_long_they_are(tmp_path, kind):
    """Raw JPEGs one after another, and MPEG program streams: frames are counted by decoding them, once."""
    path = tmp_path / f'a.{kind}'
    if kind == 'mpg':
        write_video(path, 30, fourcc='PIM1', fps=25)
    else:
        path.write_bytes(b''.join(cv2.imencode('.jpg', np.full((48, 64, 3), 8 * i, np.uint8))[1].tobytes()
                                  for i in range(30)))
    capture = cv2.VideoCapture(str(path))
    there = 0
    while capture.grab():
        there += 1
    assert there == 30 and int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) != 30
    assert count_frames(path) == 30 and read_frames(path, [29, 0]).shape == (2, 48, 64, 3)
    if kind == 'mjpeg':
        np.testing.assert_allclose(read_frames(path, [29, 0, 10]).mean((1, 2, 3)), [232, 0, 80], atol=4)
    with pytest.raises(ValueError, match='has 30 frames, number 30 was asked for'):
        read_frames(path, [30])
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])  # another file under the same name
    left = count_frames(path)
    assert 1 <= left < 30 and len(read_frames(path, [left - 1])) == 1


def test_containers_are_not_decoded_to_count(tmp_path, monkeypatch):
    path = write_video(tmp_path / 'a.avi', 12)
    from ewa3d.datasets import clips
    monkeypatch.setattr(clips, '_decodable', lambda *args: pytest.fail('decoded'))
    assert count_frames(path) == 12


def test_numbers_outside(tmp_path):
    folder, video = write_frames(tmp_path / 'v', 3), write_video(tmp_path / 'a.avi', 3)
    for path in (folder, video):
        with pytest.raises(ValueError, match='has 3 frames, number 3 was asked for'):
            read_frames(path, [0, 3])
        for numbers in ([-1], []):
            with pytest.raises(ValueError, match='frame numbers from 0 on'):
                read_frames(path, numbers)


def test_damaged_frames(tmp_path):
    folder = write_frames(tmp_path / 'v', 4)
    write_frames(tmp_path / 'w', 1, size=(8, 8))
    shutil.copy(tmp_path / 'w' / 'img_00001.png', folder / 'img_00003.png')
    with pytest.raises(ValueError, match=r'img_00003\.png: this frame is 8 × 8, img_00001\.png is 16 × 12'):
        read_frames(folder, [0, 2])
    (folder / 'img_00002.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'img_00002\.png: the image does not decode'):
        read_frames(folder, [1])


def test_the_real_clips(dataset_dir):
    root = dataset_dir('action_videos')
    assert count_frames(root / 'rawframes_test_imgs', 'img_*') == 10
    assert read_frames(root / 'rawframes_test_imgs', [9, 0], 'img_*').shape == (2, 240, 320, 3)
    for name, frames in (('test.avi', 164), ('rawvideo_part_0.mp4', 32)):
        assert count_frames(root / name) == frames
        clip = read_frames(root / name, [frames - 1, 0], short_side=32)
        assert clip.shape[:2] == (2, 32) and clip.std() > 20


# ---- transforms -----------------------------------------------------------------------------------------------------
def clip_of(T: int = 4, size=(6, 9)) -> dict:
    video = np.random.default_rng(0).integers(0, 256, (T, *size, 3)).astype(np.uint8)
    return dict(video=video, label=1, name='v', index=5, rng=np.random.default_rng(1))


def test_load_and_pack():
    results = clip_of(8)
    video = results['video']
    packed = PackClip()(LoadClip(4, test=True)(dict(results)))
    frames = torch.from_numpy(video[[1, 3, 5, 7]]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(packed['inputs']['video'], frames)
    sample = packed['data_samples']
    assert int(sample.gt_label) == 1 and sample.name == 'v' and sample.index == 5
    assert type(packed['inputs']['video']) is torch.Tensor
    normed = PackClip([0.5, 0.4, 0.3], [1, 2, 4])(LoadClip(4, test=True)(dict(results)))['inputs']['video']
    torch.testing.assert_close(normed[:, 2], (frames[:, 2] - 0.3) / 4)
    views = PackClip()(LoadClip(4, num_clips=3, test=True)(dict(results)))['inputs']['video']
    assert views.shape == (3, 4, 3, 6, 9)
    assert default_collate([views, views]).shape == (2, 3, 4, 3, 6, 9)


def test_loading_is_seeded():
    results = clip_of(50)
    one, two, other = (LoadClip(5, 'dense', 3)(dict(results, rng=np.random.default_rng(seed)))['img']
                       for seed in (0, 0, 3))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert LoadClip(2, short_side=3)(dict(results))['img'].shape == (2, 3, 3, 4)


def test_transforms_of_torchvision_treat_all_frames_alike():
    frame = np.random.default_rng(0).integers(0, 256, (1, 12, 12, 3)).astype(np.uint8).repeat(4, 0)
    steps = [dict(name='RandomResizedCrop', size=8), dict(name='RandAugment', num_ops=4, magnitude=7),
             dict(name='ToDtype', dtype='float32', scale=True), dict(name='RandomErasing', p=1.)]
    results = LoadClip(4)(dict(video=frame, rng=np.random.default_rng(2)))
    packed = PackClip()(ImageTransforms(steps)(results))['inputs']['video']
    assert packed.shape == (4, 3, 8, 8) and packed.std() > 0
    assert all(torch.equal(packed[0], other) for other in packed[1:])


def test_flip():
    swap = ClipFlip(1., swap={1: 2})
    results = swap(LoadClip(2)(clip_of()))
    plain = LoadClip(2)(clip_of())
    assert torch.equal(results['img'], plain['img'].flip(-1)) and results['label'] == 2
    assert type(results['img']) is type(plain['img'])
    assert swap(dict(results))['label'] == 1 and swap(dict(results, label=0))['label'] == 0
    assert torch.equal(ClipFlip(0.)(dict(plain))['img'], plain['img'])
    flips = sum(not torch.equal(ClipFlip()(dict(plain, rng=np.random.default_rng(i)))['img'], plain['img'])
                for i in range(60))
    assert 15 < flips < 45


@pytest.mark.parametrize('size', [(4, 10), (10, 4), (6, 10), (10, 7), (10, 10)])
def test_three_crops(size):
    results = LoadClip(3, num_clips=2, test=True)(clip_of(6, size))
    frames = results['img'].as_subclass(torch.Tensor)
    packed = PackClip()(ThreeCrop(4)(results))['inputs']['video']
    assert packed.shape == (6, 3, 3, 4, 4)
    for clip in range(2):
        for crop, start in enumerate((0, 3, 6)):
            part = frames[3 * clip:3 * clip + 3]
            middle = (min(size) - 4) // 2
            y, x = (middle, start) if size[1] > size[0] else (start, middle)
            torch.testing.assert_close(packed[3 * clip + crop], part[..., y:y + 4, x:x + 4] / 255)
    with pytest.raises(ValueError, match='have no square of 11'):
        ThreeCrop(11)(LoadClip(1)(clip_of(2, size)))


@pytest.mark.parametrize(('make', 'error', 'message'), [
    (lambda: LoadClip(sampling='random'), ValueError, "must be 'uniform' or 'dense'"),
    (lambda: LoadClip(interval=2), ValueError, "interval=2 belongs to sampling='dense'"),
    (lambda: LoadClip(0), ValueError, 'clip_len must be at least 1'),
    (lambda: LoadClip(2.5), TypeError, 'clip_len must be an integer'),
    (lambda: LoadClip(num_clips=0), ValueError, 'num_clips must be at least 1'),
    (lambda: LoadClip(short_side=0), ValueError, 'short_side must be at least 1, got 0'),
    (lambda: ClipFlip(1.5), ValueError, 'p must lie in'), (lambda: ClipFlip(swap=[1, 2]), TypeError, 'swap is a dict'),
    (lambda: ThreeCrop(0), ValueError, 'size must be at least 1'),
    (lambda: PackClip([0.5], None), ValueError, 'belong together'),
    (lambda: PackClip()(dict(img=np.zeros((4, 4, 3)))), ValueError, r'frames \(N, C, H, W\) were expected'),
    (lambda: PackClip([0.5], [1])(LoadClip(1)(clip_of())), ValueError, 'mean has 1 values, the image 3 channels')])
def test_mistakes(make, error, message):
    with pytest.raises(error, match=message):
        make()
