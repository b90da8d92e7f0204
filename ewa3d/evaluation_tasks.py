"""Metrics of a model with several tasks: each task's own, on the samples of its source."""
from collections.abc import Mapping, Sequence

from mmengine.evaluator import BaseMetric

from ewa3d.registry import METRICS, nearest

__all__ = ['TaskMetrics']


@METRICS.register_module()
class TaskMetrics(BaseMetric):
    """``tasks=dict(cifar10=dict(type='Accuracy'), modelnet10=dict(type='Accuracy'))``: a metric for each task of a
    ``TaskModel``, with the task's name in front of its values, ``cifar10/OA``.

    Args:
        tasks: task → config of its metric (which takes a ``prefix``).
        data: task → source of the ``MixedDataset`` that it is judged on, where that is not the task's name.

    Raises:
        TypeError: ``tasks`` is no dict. ValueError: it is empty, ``data`` names another task, a task has no samples, or
            the data set has no such source.
    """
    default_prefix = ''

    def __init__(self, tasks: Mapping[str, Mapping], data: Mapping[str, str] | None = None):
        super().__init__(collect_device='cpu')
        if not isinstance(tasks, Mapping) or 'type' in tasks:
            raise TypeError(f'TaskMetrics: tasks is a dict of metrics by task, got {tasks!r}')
        if not tasks:
            raise ValueError('TaskMetrics: tasks is empty; at least one was expected')
        for name in data or ():
            if name not in tasks:
                raise ValueError(f'TaskMetrics: data has no task {name!r}; {nearest(name, tasks)}')
        self.metrics = {name: METRICS.build({'prefix': name, **cfg}) for name, cfg in tasks.items()}
        self.data = {name: (data or {}).get(name, name) for name in tasks}

    @property
    def dataset_meta(self) -> dict | None:
        """Of the ``MixedDataset``; each task's metric gets that of its source."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict) -> None:
        self._dataset_meta = dataset_meta
        sources = (dataset_meta or {}).get('sources')
        for name, metric in self.metrics.items():
            if sources is not None and self.data[name] not in sources:
                raise ValueError(f'TaskMetrics: the task {name!r} has no data: there is no source {self.data[name]!r}; '
                                 f'{nearest(self.data[name], sources)}')
            metric.dataset_meta = dataset_meta if sources is None else sources[self.data[name]]

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        """Count one batch, for each task its own predictions on the samples of its source."""
        for name, metric in self.metrics.items():
            mine = [{**sample, **sample.get('by_task', {}).get(name, {})} for sample in data_samples
                    if sample.get('source', self.data[name]) == self.data[name]]
            if mine:
                metric.process(data_batch, mine)

    def evaluate(self, size: int) -> dict[str, float]:
        """All tasks' metrics; then start again. ``size``: number of samples in the data set."""
        results: dict[str, float] = {}
        for name, metric in self.metrics.items():
            try:
                results.update(metric.evaluate(size))
            except ValueError as error:
                raise ValueError(f'task {name!r}: {error}') from error
        return results

    def compute_metrics(self, results: list) -> dict:
        """Nothing: the tasks' metrics compute theirs."""
        return {}
