"""Batches that pass from a worker to the training process in a few pieces."""
import io
import pickle
from collections.abc import Sequence

import torch
from mmengine.dataset import pseudo_collate
from torch import Tensor

__all__ = ['Batch', 'packed_collate']

SMALL = 1024  # bytes; tensors up to this size travel with the rest of the batch
OF_NUMPY = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32,
            torch.float64}


def packed_collate(samples: Sequence) -> dict:
    """mmengine's ``pseudo_collate``: nothing is stacked, ``inputs`` and ``data_samples`` become lists. What differs is
    how the batch travels to another process (see :class:`Batch`)."""
    batch = pseudo_collate(samples)
    return Batch(batch) if type(batch) is dict else batch


class Batch(dict):
    """A dict that is pickled as few tensors; it arrives as a plain dict with the same content.

    A worker hands tensors over in shared memory, one file descriptor each, which costs more than a cloud's
    augmentation, and a batch of 32 clouds has 64 tensors. Here the large ones of each entry and dtype are joined to one
    and arrive as views of it; small ones, labels say, arrive as tensors of their own.
    """

    def __reduce__(self):
        return _restore, ({key: _Packed.of(value) for key, value in self.items()},)


def _restore(parts: dict) -> dict:
    return {key: part.restore() for key, part in parts.items()}


class _Packed:
    """An object as bytes and, beside them, its tensors: those of each dtype flat, one after another.

    ``places`` tells for each tensor which of the flat ones it is in, where it begins, and its shape.
    """

    def __init__(self, content: bytes, flat: list[Tensor], places: list[tuple[int, int, torch.Size]]):
        self.content, self.flat, self.places = content, flat, places

    @classmethod
    def of(cls, value) -> '_Packed':
        pickler = _Pickler(content := io.BytesIO())
        pickler.dump(value)
        groups: dict[torch.dtype, list[Tensor]] = {}
        ends, places = [], []
        for tensor in pickler.tensors:
            if tensor.dtype not in groups:
                groups[tensor.dtype] = []
                ends.append(0)
            number = list(groups).index(tensor.dtype)
            groups[tensor.dtype].append(tensor.flatten())
            places.append((number, ends[number], tensor.shape))
            ends[number] += tensor.numel()
        return cls(content.getvalue(), [torch.cat(tensors) for tensors in groups.values()], places)

    def restore(self):
        tensors = [self.flat[group][first:first + shape.numel()].view(shape) for group, first, shape in self.places]
        return _Unpickler(io.BytesIO(self.content), tensors).load()


class _Pickler(pickle.Pickler):
    """Takes plain tensors out of what it pickles: the large ones to ``tensors``, small ones as arrays."""

    def __init__(self, file):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.seen: dict[int, int] = {}  # a tensor that occurs twice arrives as one

    def persistent_id(self, obj):
        if type(obj) is not Tensor or obj.device.type != 'cpu' or obj.layout != torch.strided or obj.requires_grad \
                or obj.dtype not in OF_NUMPY:
            return None  # as torch pickles it
        if obj.nbytes <= SMALL:
            return obj.numpy()
        if id(obj) not in self.seen:
            self.seen[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self.seen[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, tensors: list[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid):
        return self.tensors[pid] if isinstance(pid, int) else torch.from_numpy(pid)
