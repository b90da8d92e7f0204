"""What a run shows of itself: a live bar on a terminal, and a page about it when it is done."""
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from ewa3d.engine.environment import describe_environment
from ewa3d.evaluation import is_of_one_class
from ewa3d.files import atomic_write
from ewa3d.progress import Progress, on_terminal
from ewa3d.registry import HOOKS

__all__ = ['ProgressHook', 'ReportHook', 'confusions']


@HOOKS.register_module()
class ProgressHook(Hook):
    """On a terminal, a live bar of training, validation and test with the time that is left and the current numbers.

    Elsewhere it does nothing: the log has plain lines. Every run has it, ``default_hooks=dict(progress=None)`` none.
    """
    priority = 'LOWEST'

    def __init__(self):
        self._bars: dict[str, Progress] = {}

    def before_train(self, runner) -> None:
        self._start('train', runner.max_iters, runner.iter)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if 'train' in self._bars:
            self._bars['train'].update(runner.iter + 1, self._numbers(runner))

    def before_val_epoch(self, runner) -> None:
        self._start('val', len(runner.val_dataloader))

    def before_test_epoch(self, runner) -> None:
        self._start('test', len(runner.test_dataloader))

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if 'val' in self._bars:
            self._bars['val'].update(batch_idx + 1)

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if 'test' in self._bars:
            self._bars['test'].update(batch_idx + 1)

    def after_val_epoch(self, runner, metrics=None) -> None:
        self.close('val')

    def after_test_epoch(self, runner, metrics=None) -> None:
        self.close('test')

    def after_train(self, runner) -> None:
        self.close()

    def close(self, *names: str) -> None:
        """Take bars off the display: those of ``names``, or all. The runner does it whatever ends a run."""
        for name in names or tuple(self._bars):
            if name in self._bars:
                self._bars.pop(name).stop()

    def _start(self, name: str, total: int, done: int = 0) -> None:
        self.close(name)
        if is_main_process() and on_terminal():
            self._bars[name] = Progress(name, total, done, lines=False)

    @staticmethod
    def _numbers(runner) -> str:
        scalars = runner.message_hub.log_scalars
        shown = {key: scalars[f'train/{key}'].current() for key in ('loss', 'acc', 'lr') if f'train/{key}' in scalars}
        judged = [(key, value) for key, value in runner.last_metrics.items() if not is_of_one_class(key)][:2]
        return '  '.join([f'epoch {runner.epoch + 1}', *(f'{key} {value:.4g}' for key, value in shown.items()),
                          *(f'val {key} {value:.2f}' for key, value in judged)])


@HOOKS.register_module()
class ReportHook(Hook):
    """``report.html`` in the work dir when a training or a test ends (:func:`ewa3d.report.write_report`), and
    ``confusion.json`` with the counts of the last evaluation where it has ``Accuracy``.

    Every run has it: it takes milliseconds. ``default_hooks=dict(report=None)`` leaves it out.
    """
    priority = 'LOWEST'

    def __init__(self):
        self._tested: dict | None = None
        self._trained = False

    def before_train(self, runner) -> None:
        self._trained = True

    def after_train(self, runner) -> None:
        if runner._val_loop is not None:
            self.write(runner, runner.val_loop.evaluator)
        elif runner._test_loop is None:
            self.write(runner)
        # else the test that follows writes it

    def after_test_epoch(self, runner, metrics: Mapping | None = None) -> None:
        self._tested = {key: value for key, value in (metrics or {}).items() if isinstance(value, (int, float))}

    def after_test(self, runner) -> None:
        self.write(runner, runner.test_loop.evaluator, None if self._trained else self._tested)

    def write(self, runner, evaluator=None, tested: Mapping | None = None) -> None:
        """Write both files. What goes wrong here is a warning: the run itself is done."""
        if not is_main_process():
            return
        from ewa3d.report import write_report
        folder, given = Path(runner.work_dir), {}
        if tested is not None:
            given['tested'] = dict(tested, command=sys.argv)
            if not (folder / 'environment.json').is_file():
                given['environment'] = describe_environment(seed=runner.seed, world_size=runner.world_size)
            if not (folder / 'config.py').is_file():
                given['config'] = runner.cfg.text
        try:
            found = {task: dict(classes=classes, counts=counts.tolist())
                     for task, classes, counts in confusions(getattr(evaluator, 'metrics', ()))}
            if found:
                atomic_write(folder / 'confusion.json', json.dumps(found))
            else:
                (folder / 'confusion.json').unlink(missing_ok=True)  # of an earlier run
            runner.logger.info(f'report: {write_report(folder, **given)}')
        except (OSError, ValueError, KeyError) as error:
            runner.logger.warning(f'no report was written: {error}')


def confusions(metrics: Sequence) -> Iterator[tuple[str, list[str], object]]:
    """Task (``''`` where there is one), classes and counts of each evaluated ``Accuracy`` among some metrics."""
    for metric in metrics:
        inner = getattr(metric, 'metrics', None)
        if isinstance(inner, Mapping):  # of several tasks
            yield from confusions(tuple(inner.values()))
        elif getattr(metric, 'last_confusion', None) is not None:
            counts = metric.last_confusion
            yield metric.prefix or '', metric.classes or [str(i) for i in range(len(counts))], counts
