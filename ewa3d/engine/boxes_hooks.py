"""Pictures of the boxes that a detector finds."""
from collections.abc import Mapping, Sequence

from torch import Tensor

from ewa3d.checks import check_number
from ewa3d.engine.ranked_pictures import RankedPicturesHook
from ewa3d.evaluation_boxes import BoxAP, kept_boxes
from ewa3d.registry import HOOKS

__all__ = ['BoxPicturesHook']


@HOOKS.register_module()
class BoxPicturesHook(RankedPicturesHook):
    """``pictures/boxes.png`` and ``pictures/boxes.html``: scenes with their true boxes, and with those that the model
    is surer of than ``threshold``, after the suppression of the run's :class:`~ewa3d.evaluation_boxes.BoxAP`.

    Scenes are sorted by their own AP, that of the first limit of IoU and of the classes that they have; scenes without
    boxes are left out.

    Args:
        num_samples: see :class:`RankedPicturesHook`.
        threshold: of objectness.

    Raises:
        TypeError, ValueError: a number out of range, a test without ``BoxAP``.
    """
    name, measure, options = 'boxes', 'AP', dict(size=4.)

    def __init__(self, num_samples: int = 1, threshold: float = 0.5):
        super().__init__(num_samples)
        self.threshold = check_number('BoxPicturesHook: threshold', threshold)

    def score(self, runner, sample: Mapping, points: Tensor | None) -> float | None:
        if not len(sample['gt_boxes']):
            return None
        metric = _metric_of(runner)
        return metric.compute_metrics([metric.count(sample, points)])[f'AP{round(100 * metric.iou[0])}_gt']

    def cells(self, runner, clouds: Sequence[Tensor], samples: Sequence[Mapping], names: Sequence[str]) -> dict:
        from ewa3d.visualization_boxes import box_cells
        found, labels = zip(*(self._found(runner, sample, points) for sample, points in zip(samples, clouds)))
        cells = box_cells(clouds, [sample['gt_boxes'] for sample in samples],
                          [sample['gt_labels'] for sample in samples], found, labels, names,
                          (runner.test_dataloader.dataset.metainfo or {}).get('classes'))
        return dict(cells, heading='boxes: truth, prediction')

    def _found(self, runner, sample: Mapping, points: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and their most probable classes."""
        boxes, sure, labels = sample['pred_boxes'], sample['pred_objectness'], sample['pred_scores'].argmax(-1)
        kept = kept_boxes(boxes, sure, labels, points, **_metric_of(runner).rules)
        kept = kept[sure[kept] > self.threshold]
        return boxes[kept], labels[kept]


def _metric_of(runner) -> BoxAP:
    metrics = runner.test_evaluator.metrics
    for metric in metrics:
        if isinstance(metric, BoxAP):
            return metric
    raise ValueError('BoxPicturesHook: the test_evaluator has no BoxAP, by whose rules boxes are kept; it has '
                     f'{", ".join(type(metric).__name__ for metric in metrics)}')
