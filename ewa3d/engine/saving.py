"""Checkpoints while a run goes on: which are kept, and what happens when one cannot be written."""
import copy
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook as _CheckpointHook

from ewa3d.files import atomic_write, remove_leftovers
from ewa3d.registry import HOOKS, nearest

__all__ = ['CheckpointHook', 'INTERRUPTED']

INTERRUPTED = 'interrupted.pth'  # of a run that a signal ended; replaced by the next, deleted once a later one is whole


class _KeepingBackend(LocalBackend):
    """Notes what is to be removed and leaves it there."""

    def __init__(self):
        super().__init__()
        self.outdated: list[str] = []

    def remove(self, filepath) -> None:
        self.outdated.append(str(filepath))


@HOOKS.register_module()
class CheckpointHook(_CheckpointHook):
    """mmengine's, with three differences: an old checkpoint is removed only after the new one is complete, the pointer
    ``last_checkpoint`` is replaced atomically, and the metrics of point clouds are known to be better when greater.

    Args:
        interval: save every so many epochs (iterations with ``by_epoch=False``).
        max_keep_ckpts: how many are kept; -1 keeps all.
        save_best: a metric, e.g. ``'OA'``: also keep ``best_OA_epoch_N.pth``, chosen on the validation split.
        on_error: what a checkpoint that cannot be written (no space, no permission) is: ``'raise'`` ends the run,
            ``'continue'`` logs it and tries again at the next one. What was there before stays in either case.
        by_epoch: count in epochs, not iterations. save_begin: nothing is saved before.
        save_optimizer, save_param_scheduler: without them a run cannot be resumed.
        out_dir: another folder than the work dir. filename_tmpl: mmengine's, ``'epoch_{}.pth'`` unless given.
        save_last: the end of the run is saved whatever ``interval`` is.
        rule: ``'greater'`` or ``'less'``, where the metric of ``save_best`` does not tell which is better.
        greater_keys, less_keys: beginnings of metric names that are better when greater, or less.

    Raises:
        ValueError: another ``on_error``; and as mmengine's.
    """
    _default_greater_keys = [*_CheckpointHook._default_greater_keys, 'OA', 'IoU', 'AP']  # noqa: RUF012

    def __init__(self, interval: int = 1, by_epoch: bool = True, save_optimizer: bool = True,
                 save_param_scheduler: bool = True, out_dir=None, max_keep_ckpts: int = -1, save_last: bool = True,
                 save_best=None, rule=None, greater_keys=None, less_keys=None, filename_tmpl: str | None = None,
                 save_begin: int = 0, on_error: str = 'raise'):
        # spelled out, because mmengine's takes any keyword without a word
        super().__init__(interval=interval, by_epoch=by_epoch, save_optimizer=save_optimizer,
                         save_param_scheduler=save_param_scheduler, out_dir=out_dir, max_keep_ckpts=max_keep_ckpts,
                         save_last=save_last, save_best=save_best, rule=rule, greater_keys=greater_keys,
                         less_keys=less_keys, filename_tmpl=filename_tmpl, save_begin=save_begin)
        if on_error not in ('raise', 'continue'):
            raise ValueError(f"CheckpointHook: on_error must be 'raise' or 'continue', got {on_error!r}")
        self.on_error = on_error

    def before_train(self, runner) -> None:
        self.out_dir = self.out_dir or runner.work_dir
        if is_main_process():
            remove_leftovers(self.out_dir)  # of a run that was killed
        self.file_backend = LocalBackend()
        if self.save_best is not None:
            info = runner.message_hub.get_info
            if len(self.key_indicators) == 1:
                self.best_ckpt_path = info('best_ckpt')
            else:
                self.best_ckpt_path_dict = {key: info(f'best_ckpt_{key}') for key in self.key_indicators}
        if self.max_keep_ckpts > 0:
            kept = list(runner.message_hub.get_info(self._kept) or [])
            self.keep_ckpt_ids = deque(kept[-self.max_keep_ckpts:], self.max_keep_ckpts)
            self._remove(kept[:-self.max_keep_ckpts])  # a run that was killed did not get to it

    def after_train_epoch(self, runner) -> None:
        with self._surviving(runner):
            super().after_train_epoch(runner)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        with self._surviving(runner):
            super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def after_val_epoch(self, runner, metrics) -> None:
        with self._surviving(runner):
            super().after_val_epoch(runner, metrics)

    @contextmanager
    def _surviving(self, runner) -> Iterator[None]:
        """Forgets about a checkpoint that could not be written, and lets the run go on where that is asked for."""
        hub, kept = runner.message_hub, list(getattr(self, 'keep_ckpt_ids', ()))
        own = ('best', 'keep_ckpt_ids', 'last_ckpt')
        before = {key: value for key, value in hub.runtime_info.items() if key.startswith(own)}
        state = {k: copy.copy(v) for k, v in vars(self).items() if k.startswith(('best_ckpt', 'last_ckpt'))}
        try:
            yield
        except OSError as error:
            if self.on_error == 'raise':
                raise
            if self.max_keep_ckpts > 0:
                self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
            vars(self).update(state)
            for key in [key for key in hub.runtime_info if key.startswith(own)]:
                hub.runtime_info.pop(key)
            hub.update_info_dict(before)
            runner.logger.error(f'no checkpoint after epoch {runner.epoch + 1}: {error}; the run goes on')

    def _save_best_checkpoint(self, runner, metrics) -> None:
        """As mmengine's, but the previous best is removed only once the new one is complete."""
        for key in self.key_indicators if self.save_best else ():
            if key != 'auto' and key not in metrics:
                raise KeyError(f'save_best={key!r} is no metric of the validation; {nearest(key, metrics)}')
        backend, self.file_backend = self.file_backend, _KeepingBackend()
        try:
            super()._save_best_checkpoint(runner, metrics)
            outdated = self.file_backend.outdated
        finally:
            self.file_backend = backend
        current = {value for key, value in runner.message_hub.runtime_info.items() if key.startswith('best_ckpt')}
        for path in set(outdated) - current:  # after a resume, the same epoch may be the best once more
            Path(path).unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner, step, meta) -> None:
        name = self.filename_tmpl.format(step)
        outdated = []
        if self.max_keep_ckpts > 0 and not (self.keep_ckpt_ids and self.keep_ckpt_ids[-1] == step):
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated.append(self.keep_ckpt_ids.popleft())
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info(self._kept, [*outdated, *self.keep_ckpt_ids])
        self.last_ckpt = os.path.join(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(self.out_dir, name, save_optimizer=self.save_optimizer,
                               save_param_scheduler=self.save_param_scheduler, meta=meta, by_epoch=self.by_epoch)
        runner.message_hub.update_info('saved_iter', runner.iter + (not self.by_epoch))
        if not is_main_process():
            return
        atomic_write(Path(runner.work_dir) / 'last_checkpoint', self.last_ckpt)
        Path(runner.work_dir, INTERRUPTED).unlink(missing_ok=True)
        self._remove(outdated)

    @property
    def _kept(self) -> str:
        """Where the message hub has what is kept: a run may save by epochs and by iterations."""
        return 'keep_ckpt_ids' if self.by_epoch else 'keep_ckpt_ids_by_iter'

    def _remove(self, steps: Iterable[int]) -> None:
        if is_main_process():
            for step in steps:
                Path(self.out_dir, self.filename_tmpl.format(step)).unlink(missing_ok=True)
