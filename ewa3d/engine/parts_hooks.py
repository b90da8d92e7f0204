"""Hooks of part segmentation: the published schedule of batch norms, pictures of what is predicted."""
from collections.abc import Mapping, Sequence

from mmengine.hooks import Hook
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ewa3d.checks import check_integer, check_number
from ewa3d.engine.hooks import unwrapped
from ewa3d.engine.ranked_pictures import RankedPicturesHook
from ewa3d.evaluation_parts import PartIoU, predicted_parts, shape_iou
from ewa3d.registry import HOOKS

__all__ = ['BatchNormMomentumHook', 'PartPicturesHook']


@HOOKS.register_module()
class BatchNormMomentumHook(Hook):
    """Before each epoch the momentum of every batch norm becomes ``max(floor, start · decay^(epoch // interval))``:
    running statistics are averaged over more and more steps. The defaults are those of Point-BERT's part segmentation.

    Args:
        interval: epochs between two changes.
        start: the momentum of the first epochs. decay: its factor every ``interval`` epochs. floor: its least value.

    Raises:
        TypeError, ValueError: numbers out of range.
    """

    def __init__(self, start: float = 0.1, decay: float = 0.5, interval: int = 20, floor: float = 0.01):
        for name, value in (('start', start), ('decay', decay), ('floor', floor)):
            check_number(f'BatchNormMomentumHook: {name}', value, '[0, 1]')
        self.start, self.decay, self.floor = start, decay, floor
        self.interval = check_integer('BatchNormMomentumHook: interval', interval, 1)

    def momentum(self, epoch: int) -> float:
        """The momentum of an epoch, counted from 0."""
        return max(self.floor, self.start * self.decay ** (epoch // self.interval))

    def before_train_epoch(self, runner) -> None:
        for module in unwrapped(runner.model).modules():
            if isinstance(module, _BatchNorm):
                module.momentum = self.momentum(runner.epoch)


@HOOKS.register_module()
class PartPicturesHook(RankedPicturesHook):
    """``pictures/parts.png`` and ``pictures/parts.html``: shapes, sorted by their IoU, each with its true parts, the
    predicted ones and the errors.

    Args:
        num_samples: see :class:`~ewa3d.engine.ranked_pictures.RankedPicturesHook`.

    Raises:
        TypeError, ValueError: a number out of range. KeyError: predictions without ``part_scores``, or a data set whose
            metainfo has no ``parts``.
    """
    name, measure = 'parts', 'IoU'

    def score(self, runner, sample: Mapping, points: Tensor | None) -> float:
        return 100 * shape_iou(*_judged(_parts_of(runner), sample))

    def cells(self, runner, clouds: Sequence[Tensor], samples: Sequence[Mapping], names: Sequence[str]) -> dict:
        from ewa3d.visualization import part_cells
        parts = _parts_of(runner)
        found, truth, _ = zip(*(_judged(parts, sample) for sample in samples))
        return dict(part_cells(clouds, truth, found, names), heading='parts: truth, prediction, errors')


def _parts_of(runner) -> PartIoU:
    """What knows the categories and the parts of the tested data set: the metric of the test, where it is this one."""
    for metric in runner.test_evaluator.metrics:
        if isinstance(metric, PartIoU):
            return metric
    metric = PartIoU()
    metric.dataset_meta = getattr(runner.test_dataloader.dataset, 'metainfo', None)
    return metric


def _judged(parts: PartIoU, sample: Mapping) -> tuple[Tensor, Tensor, Sequence[int]]:
    """The predicted and the true parts of a sample, and those of its category."""
    ids = list(parts.parts.values())[parts.category_of(sample)]
    return predicted_parts(parts.field(sample, 'part_scores').cpu(), ids), parts.field(sample, 'gt_parts').cpu(), ids
