"""Hooks of part segmentation: the published schedule of batch norms, pictures of what is predicted."""
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.dataset import pseudo_collate
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.hooks import Hook
from torch.nn.modules.batchnorm import _BatchNorm

from ewa3d.checks import check_integer, check_number
from ewa3d.engine.hooks import unwrapped
from ewa3d.engine.pretrain_hooks import show_picture
from ewa3d.evaluation_parts import PartIoU, predicted_parts, shape_iou
from ewa3d.registry import HOOKS

__all__ = ['BatchNormMomentumHook', 'PartPicturesHook']


@HOOKS.register_module()
class BatchNormMomentumHook(Hook):
    """Before each epoch the momentum of every batch norm becomes ``max(floor, start · decay^(epoch // interval))``:
    running statistics are averaged over more and more steps. The defaults are those of Point-BERT's part segmentation.

    Args:
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
class PartPicturesHook(Hook):
    """After a test, ``pictures/parts.png`` and, to be turned in a browser, ``pictures/parts.html`` in the work dir: the
    best, the median and the worst shapes by their IoU, each with its true parts, the predicted ones and the errors.

    Only the IoU of every shape is kept meanwhile; the chosen shapes are predicted once more.

    Args:
        num_shapes: so many of the best, of those around the median, and of the worst.

    Raises:
        TypeError, ValueError: a number out of range. KeyError: predictions without ``part_scores``, or a data set whose
            metainfo has no ``parts``.
    """
    priority = 'LOW'

    def __init__(self, num_shapes: int = 1):
        self.num_shapes = check_integer('PartPicturesHook: num_shapes', num_shapes, 1)
        self._scored: list[tuple[float, int]] = []

    def before_test_epoch(self, runner) -> None:
        self._scored = []

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs: Sequence | None = None) -> None:
        parts = _parts_of(runner)
        for sample in outputs or ():
            place = get_rank() + get_world_size() * len(self._scored)  # as the sampler deals them out
            self._scored.append((_judged(parts, sample.to_dict())[0], place))

    def after_test_epoch(self, runner, metrics: dict | None = None) -> None:
        scored = [pair for pairs in all_gather_object(self._scored) for pair in pairs]
        if is_main_process() and scored:
            self.draw(runner, sorted(scored, reverse=True), Path(runner.work_dir) / 'pictures')

    def draw(self, runner, scored: Sequence[tuple[float, int]], folder: Path) -> None:
        """Write both files for shapes ``(IoU, place in the data set)``, the best first."""
        from ewa3d.viewer import write_html
        from ewa3d.visualization import draw_clouds, part_cells
        dataset, parts, count = runner.test_dataloader.dataset, _parts_of(runner), min(self.num_shapes, len(scored))
        first = (len(scored) - count) // 2
        chosen = {'best': scored[:count], 'median': scored[first:first + count], 'worst': scored[-count:]}
        places = [place for rows in chosen.values() for _, place in rows]
        batch = pseudo_collate([dataset[place] for place in places])
        with torch.no_grad():
            samples = unwrapped(runner.model).test_step(batch)
        judged = [_judged(parts, sample.to_dict()) for sample in samples]
        which = [name for name, rows in chosen.items() for _ in rows]
        names = [f'{name}: {sample.get("name", place)}, IoU {100 * iou:.1f}' for name, place, sample, (iou, _, _) in
                 zip(which, places, samples, judged)]
        cells = part_cells(batch['inputs']['points'], [truth for _, truth, _ in judged],
                           [found for _, _, found in judged], names)
        options = dict(cells, up=(dataset.metainfo or {}).get('up_axis') or 'z',
                       heading='parts: truth, prediction, errors')
        png, page = draw_clouds(path=folder / 'parts.png', **options), write_html(path=folder / 'parts.html', **options)
        show_picture(runner, 'parts', png)
        runner.logger.info(f'pictures: {png}, {page}')


def _parts_of(runner) -> PartIoU:
    """What knows the categories and the parts of the tested data set."""
    metric = PartIoU()
    metric.dataset_meta = getattr(runner.test_dataloader.dataset, 'metainfo', None)
    return metric


def _judged(parts: PartIoU, sample: Mapping) -> tuple[float, torch.Tensor, torch.Tensor]:
    """IoU, true and predicted parts of a sample."""
    ids = list(parts.parts.values())[parts.category_of(sample)]
    truth = parts.field(sample, 'gt_parts').cpu()
    found = predicted_parts(parts.field(sample, 'part_scores').cpu(), ids)
    return shape_iou(found, truth, ids), truth, found
