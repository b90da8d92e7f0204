"""Frames of videos: which ones, and how they are read; the transforms of clips."""
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from ewa3d.checks import check_integer, check_number, is_integer
from ewa3d.datasets.image_transforms import PackImage, label_sample
from ewa3d.datasets.images import CHECK_SIZE, MOST_PIXELS, decode_image
from ewa3d.datasets.images import EXTENSIONS as IMAGES
from ewa3d.datasets.transforms import rng_of
from ewa3d.registry import TRANSFORMS

__all__ = ['ClipFlip', 'LoadClip', 'PackClip', 'ThreeCrop', 'VIDEOS', 'check_decodes', 'count_frames', 'dense_frames',
           'frame_files', 'read_frames', 'uniform_frames']

VIDEOS = frozenset(('.mp4', '.avi', '.mkv', '.mov', '.webm', '.mpg', '.mpeg', '.m4v', '.wmv', '.flv', '.3gp'))
# Containers estimate how many frames they hold from their length; a shortfall within this share is no damage.
SLACK = 0.02
# Containers whose count of frames, or length, is worth reading, by their first bytes: AVI, MP4 and its kin, Matroska,
# Flash, ASF. What MPEG streams and raw ones are said to hold is a guess from their size.
COUNTED = ((0, b'RIFF'), (4, b'ftyp'), (4, b'moov'), (4, b'mdat'), (4, b'free'), (4, b'wide'), (4, b'skip'),
           (0, b'\x1aE\xdf\xa3'), (0, b'FLV'), (0, b'0&\xb2u'))


# ---------------------------------------------------------------------------------------------------------------------
# Which frames
# ---------------------------------------------------------------------------------------------------------------------
def dense_frames(total: int, clip_len: int, interval: int, num_clips: int = 1,
                 rng: np.random.Generator | None = None) -> np.ndarray:
    """Clips of every ``interval``-th frame: ``(num_clips, clip_len)`` frame numbers.

    Clips start at random where ``rng`` is given, else spread evenly over the video, one alone in the middle. A video
    that is shorter than a clip starts again.
    """
    room = max(total - clip_len * interval, 0)  # a clip owns its last interval too, as published
    if rng is not None:
        starts = rng.integers(room + 1, size=num_clips)
    elif num_clips == 1:
        starts = np.array([room // 2])
    else:
        starts = np.round(np.linspace(0, room, num_clips)).astype(int)
    return (starts[:, None] + np.arange(clip_len) * interval) % total


def uniform_frames(total: int, clip_len: int, num_clips: int = 1, rng: np.random.Generator | None = None) -> np.ndarray:
    """Clips of one frame of each of ``clip_len`` equal parts of the video: ``(num_clips, clip_len)`` frame numbers.

    A random frame of each part where ``rng`` is given; else that in the middle, or with several clips at places that
    divide the parts evenly. A video of fewer frames than parts gives some of them twice.
    """
    edges = np.arange(clip_len + 1) * total / clip_len
    middle = (np.arange(1, num_clips + 1) / (num_clips + 1))[:, None]
    place = middle if rng is None else rng.random((num_clips, clip_len))
    low, high = np.floor(edges[:-1]), np.maximum(np.floor(edges[1:]), np.floor(edges[:-1]) + 1)
    return np.minimum(np.floor(low + place * (high - low)), total - 1).astype(int)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
def frame_files(folder: str | Path, pattern: str = '*') -> list[Path]:
    """The images in a folder of frames whose names match, in the order of the numbers in their names.

    Raises:
        ValueError: there is none.
    """
    folder = Path(folder)
    files = [f for f in folder.glob(pattern) if f.suffix.lower() in IMAGES and not f.name.startswith('.')]
    if not files:
        raise ValueError(f'{folder}: a folder without frames; images {pattern!r} were expected in it')
    return sorted(files, key=lambda f: [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', f.name)])


def count_frames(path: str | Path, pattern: str = '*') -> int:
    """How many frames a video has, as its container says, or a folder of frames holds. A stream without a container
    that says it is decoded to its end, once in a process.

    Raises:
        FileNotFoundError: there is neither. ValueError: it does not open, or has no frames.
    """
    path = Path(path)
    if path.is_dir():
        return len(frame_files(path, pattern))
    capture = _opened(path)
    try:
        return _claimed(capture, path)
    finally:
        capture.release()


def read_frames(path: str | Path, numbers: Iterable[int], pattern: str = '*',
                short_side: int | None = None) -> np.ndarray:
    """Frames of a video file or of a folder, as they are asked for: ``(N, H, W, 3)`` uint8, RGB.

    A video is decoded from its start, since seeking is not exact in every container. Where it ends within the last 2 %
    of what its container says, its last frame stands for what is missing.

    Args:
        short_side: where given, frames are resized to this, bilinearly.

    Raises:
        FileNotFoundError: there is neither. ValueError: a video that does not open or ends early, a frame that does not
            decode, frames of different sizes, numbers outside the video.
    """
    path, numbers = Path(path), [int(n) for n in numbers]
    wanted = sorted(set(numbers))
    if not wanted or wanted[0] < 0:
        raise ValueError(f'{path}: frame numbers from 0 on were expected, got {numbers}')
    frames = _of_folder(path, wanted, pattern, short_side) if path.is_dir() else _of_file(path, wanted, short_side)
    return np.stack([frames[n] for n in numbers])


def _of_folder(path: Path, wanted: list[int], pattern: str, short_side: int | None) -> dict[int, np.ndarray]:
    files = frame_files(path, pattern)
    if wanted[-1] >= len(files):
        raise ValueError(f'{path}: has {len(files)} frames, number {wanted[-1]} was asked for')
    frames = {n: _resized(decode_image(files[n]), short_side) for n in wanted}
    shape = frames[wanted[0]].shape
    for n, frame in frames.items():
        if frame.shape != shape:
            raise ValueError(f'{files[n]}: this frame is {frame.shape[1]} × {frame.shape[0]}, {files[wanted[0]].name} '
                             f'is {shape[1]} × {shape[0]}')
    return frames


def _of_file(path: Path, wanted: list[int], short_side: int | None) -> dict[int, np.ndarray]:
    frames, end, claimed = _decoded(path, wanted, short_side)
    if len(frames) == len(wanted):
        return frames
    if claimed - end > max(SLACK * claimed, 1) or end == 0:
        raise ValueError(f'{path}: the video ends after {end} frames, its container says {claimed}; it is truncated or '
                         'damaged')
    stands_in = {n: min(n, end - 1) for n in wanted}
    frames, _, _ = _decoded(path, sorted(set(stands_in.values())), short_side)
    return {n: frames[stands_in[n]] for n in wanted}


def _decoded(path: Path, wanted: list[int], short_side: int | None) -> tuple[dict[int, np.ndarray], int, int]:
    """Those of the wanted frames that are there, how many were decoded, and how many the container says there are."""
    import cv2
    capture, frames = _opened(path), {}
    try:
        claimed = _claimed(capture, path)
        if wanted[-1] >= claimed:
            raise ValueError(f'{path}: has {claimed} frames, number {wanted[-1]} was asked for')
        for number in range(wanted[-1] + 1):
            if not capture.grab():
                return frames, number, claimed
            if number in wanted:
                found, frame = capture.retrieve()
                if not found:
                    return frames, number, claimed
                frames[number] = _resized(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), short_side)
        return frames, wanted[-1] + 1, claimed
    finally:
        capture.release()


def _opened(path: Path):
    import cv2
    if not path.is_file():
        raise FileNotFoundError(f'{path}: there is no such video or folder of frames')
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise ValueError(f'{path}: the video does not open; it is damaged, cut off, or in a format that OpenCV does '
                         f'not read')
    return capture


def _claimed(capture, path: Path) -> int:
    import cv2
    width, height = (int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if width * height > MOST_PIXELS:
        raise ValueError(f'{path}: frames of {width} × {height} pixels, more than {MOST_PIXELS}')
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    if not 1 <= count < 2 ** 31 or not _says_its_length(path):
        status = path.stat()
        count = _decodable(path, status.st_size, status.st_mtime_ns)
    if count < 1:
        raise ValueError(f'{path}: the video has no frames')
    return int(count)


def _says_its_length(path: Path) -> bool:
    with path.open('rb') as file:
        head = file.read(8)
    return any(head[at:].startswith(mark) for at, mark in COUNTED)


@functools.lru_cache(maxsize=65_536)
def _decodable(path: Path, size: int, changed: int) -> int:
    """How many frames of a file are decoded until there is no further one; ``size`` and ``changed`` are the file's."""
    capture, count = _opened(path), 0
    try:
        while capture.grab():
            count += 1
    finally:
        capture.release()
    return count


def check_decodes(path: str | Path, pattern: str = '*') -> None:
    """Decode a video to its last frame, or every frame of a folder, and keep nothing.

    Raises:
        FileNotFoundError, ValueError: what :func:`read_frames` would raise for one of its frames.
    """
    path = Path(path)
    if not path.is_dir():
        read_frames(path, [count_frames(path) - 1])
        return
    shapes: dict[tuple, Path] = {}
    for file in frame_files(path, pattern):
        shapes.setdefault(decode_image(file, size=CHECK_SIZE).shape, file)
    if len(shapes) > 1:
        (one, first), (other, second) = list(shapes.items())[:2]
        raise ValueError(f'{second}: this frame is {other[1]} × {other[0]}, {first.name} is {one[1]} × {one[0]}')


def _resized(frame: np.ndarray, short_side: int | None) -> np.ndarray:
    if short_side is None or min(frame.shape[:2]) == short_side:
        return frame
    import cv2
    height, width = (max(round(side * short_side / min(frame.shape[:2])), short_side) for side in frame.shape[:2])
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------------------------------
@TRANSFORMS.register_module()
class LoadClip:
    """Choose frames and read them: ``img`` becomes a video of torchvision, ``(num_clips * clip_len, 3, H, W)`` uint8.

    Transforms of torchvision (``ImageTransforms``) then treat all frames of a sample alike.

    Args:
        clip_len: T, frames of a clip.
        sampling: ``'uniform'``: a frame of each of T equal parts of the video; ``'dense'``: every ``interval``-th one
            from a start (see :func:`uniform_frames`, :func:`dense_frames`).
        interval: of ``'dense'``.
        num_clips: how many clips are taken, each a view of its own.
        test: choose at fixed places instead of at random.
        short_side: resize frames to this as they are read.

    Raises:
        ValueError, TypeError: a setting out of range; and what :func:`read_frames` raises, with the file's name.
    """

    def __init__(self, clip_len: int = 8, sampling: str = 'uniform', interval: int = 1, num_clips: int = 1,
                 test: bool = False, short_side: int | None = None):
        if sampling not in ('uniform', 'dense'):
            raise ValueError(f"LoadClip: sampling must be 'uniform' or 'dense', got {sampling!r}")
        if sampling == 'uniform' and interval != 1:
            raise ValueError(f"LoadClip: interval={interval} belongs to sampling='dense'")
        for name, value in (('clip_len', clip_len), ('interval', interval), ('num_clips', num_clips),
                            ('short_side', 1 if short_side is None else short_side)):
            check_integer(f'LoadClip: {name}', value, 1)
        self.clip_len, self.sampling, self.interval = clip_len, sampling, interval
        self.num_clips, self.test, self.short_side = num_clips, bool(test), short_side

    def numbers(self, total: int, rng: np.random.Generator) -> np.ndarray:
        """Which of ``total`` frames: ``(num_clips, clip_len)``."""
        rng = None if self.test else rng
        if self.sampling == 'uniform':
            return uniform_frames(total, self.clip_len, self.num_clips, rng)
        return dense_frames(total, self.clip_len, self.interval, self.num_clips, rng)

    def __call__(self, results: dict) -> dict:
        from torchvision.tv_tensors import Video
        video, pattern = results.get('video'), results.get('frames', '*')
        total = count_frames(results['path'], pattern) if video is None else len(video)
        numbers = self.numbers(total, rng_of(results)).flatten()
        if video is None:
            frames = read_frames(results['path'], numbers, pattern, self.short_side)
        else:
            frames = np.stack([_resized(video[n], self.short_side) for n in numbers])
        results['img'] = Video(torch.from_numpy(frames).permute(0, 3, 1, 2))
        results['num_views'] = self.num_clips
        return results


@TRANSFORMS.register_module()
class ClipFlip:
    """Mirror all frames of a sample, left to right, with probability ``p``.

    Args:
        p: probability.
        swap: pairs of labels that mirroring turns into one another (Something-Something's "left to right" and "right to
            left"): a dict of one to the other; the other way round is meant, too.

    Raises:
        TypeError, ValueError: no probability, or ``swap`` is no dict of labels.
    """

    def __init__(self, p: float = 0.5, swap: Mapping[int, int] | None = None):
        self.p = check_number('ClipFlip: p', p, '[0, 1]')
        if swap is not None and not (isinstance(swap, Mapping) and all(map(is_integer, (*swap, *swap.values())))):
            raise TypeError(f'ClipFlip: swap is a dict of labels to labels, got {swap!r}')
        self.swap = {**{b: a for a, b in (swap or {}).items()}, **(swap or {})}

    def __call__(self, results: dict) -> dict:
        if rng_of(results).random() < self.p:
            from torchvision import tv_tensors
            img = results['img']
            results['img'] = tv_tensors.wrap(img.flip(-1), like=img)  # still a video to the transforms that follow
            if results.get('label') is not None:
                results['label'] = self.swap.get(int(results['label']), results['label'])
        return results


@TRANSFORMS.register_module()
class ThreeCrop:
    """Three squares of ``size`` from each frame, at the ends and in the middle of the longer side and in the middle of
    the other one: views of their own.

    Args:
        size: side of a square, in pixels.

    Raises:
        ValueError: frames smaller than ``size``.
    """

    def __init__(self, size: int):
        self.size = check_integer('ThreeCrop: size', size, 1)

    def __call__(self, results: dict) -> dict:
        img, size, views = results['img'], self.size, results.get('num_views', 1)
        height, width = img.shape[-2:]
        if min(height, width) < size:
            raise ValueError(f'ThreeCrop: frames of {width} × {height} have no square of {size}')
        wide = width > height
        crops = [img[..., y:y + size, x:x + size] for y, x in (
            ((height - size) * (1 if wide else i) // 2, (width - size) * (i if wide else 1) // 2) for i in range(3))]
        # views are the slowest: all crops of the first clip, then of the second
        results['img'] = torch.stack([crop.unflatten(0, (views, -1)) for crop in crops], 1).flatten(0, 2)
        results['num_views'] = 3 * views
        return results


@TRANSFORMS.register_module()
class PackClip(PackImage):
    """End a pipeline of clips: ``{'inputs': {'video': (T, C, H, W) float32}, 'data_samples': Sample(gt_label)}``.

    Several views are ``(V, T, C, H, W)``. Bytes become numbers in ``[0, 1]``.

    Args:
        mean, std: where given, a value a channel: the frames are normalised by them.
    """

    def __call__(self, results: dict) -> dict:
        img = results['img']
        if not isinstance(img, torch.Tensor) or img.ndim != 4:
            what = tuple(img.shape) if hasattr(img, 'shape') else type(img).__name__
            raise ValueError(f'PackClip: frames (N, C, H, W) were expected, got {what}; LoadClip reads them')
        scale = 1 / 255 if img.dtype == torch.uint8 else 1
        img = self.normalise(img.as_subclass(torch.Tensor).to(torch.float32) * scale)
        views = results.get('num_views', 1)
        video = img.contiguous() if views == 1 else img.contiguous().unflatten(0, (views, -1))
        return {'inputs': dict(video=video), 'data_samples': label_sample(results)}


def check_video(video, name: str) -> np.ndarray:
    """``video``, if it is an array ``(T, H, W, 3)`` of bytes."""
    good = isinstance(video, np.ndarray) and video.dtype == np.uint8 and video.ndim == 4 and video.shape[3] == 3
    if not good or 0 in video.shape:
        what = f'{video.dtype} {video.shape}' if isinstance(video, np.ndarray) else type(video).__name__
        raise ValueError(f'{name}: a video is a uint8 array (T, H, W, 3) of at least one frame, got {what}')
    return video
