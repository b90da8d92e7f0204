"""SIGTERM and Ctrl-C: a run ends after the step that it is in, with a checkpoint to go on from."""
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook

from ewa3d.engine.saving import INTERRUPTED
from ewa3d.files import atomic_write
from ewa3d.registry import HOOKS

__all__ = ['InterruptHook', 'catch_signals']

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def catch_signals() -> Iterator[SimpleNamespace]:
    """Take down the first SIGINT or SIGTERM as ``.number`` of what this gives (0 before) and go on; the second one is
    a ``KeyboardInterrupt`` on the spot. In another thread than the main one, signals stay what they are.

    Where ``.waits`` of what this gives is set to ``False``, the first one ends what is done in here, too.

    Raises:
        KeyboardInterrupt: at the second signal, or SIGINT where nothing waits. SystemExit: SIGTERM there, code 143.
    """
    caught, own = SimpleNamespace(number=0, waits=True), os.getpid()

    def take_down(number: int, frame) -> None:
        if os.getpid() != own:  # data workers inherit this; the main process ends them
            return
        first, caught.number = not caught.number, caught.number or number
        if not first or (number == signal.SIGINT and not caught.waits):
            raise KeyboardInterrupt
        if not caught.waits:
            raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [s for s in SIGNALS if signal.getsignal(s) not in (signal.SIG_IGN, None)]
        before = {number: signal.signal(number, take_down) for number in wanted}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@HOOKS.register_module()
class InterruptHook(Hook):
    """Ends a run that got a signal: saves ``interrupted.pth``, to which ``last_checkpoint`` then points, and leaves.

    Raises:
        KeyboardInterrupt: after Ctrl-C (SIGINT). SystemExit: after SIGTERM, with the code 0: a job that is preempted
            has done what was asked of it, and nobody has to look into it. A checkpoint is there in both cases.
    """
    priority = 'LOWEST'

    def before_train(self, runner) -> None:
        if runner.interruption is not None:
            runner.interruption.waits = True

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        steps = len(runner.train_dataloader)
        if (runner.iter + 1) % steps and self._came(runner):  # the end of an epoch has lines to write first
            self._save(runner, runner.iter + 1, by_epoch=False)
            self._leave(runner, runner.iter + 1)

    def after_train_epoch(self, runner) -> None:
        if self._came(runner):
            self._save(runner, runner.iter, by_epoch=True)
            self._leave(runner, runner.iter)

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        # a model with averaged weights is not itself here: nothing can be saved before the end of the validation
        # (ranks may have different numbers of batches here, so several of them stop at its end, too)
        saved = runner.message_hub.get_info('saved_iter') == runner.iter
        if saved and not runner.distributed and self._came(runner):
            self._leave(runner, runner.iter)

    def after_val(self, runner) -> None:
        if self._came(runner):
            self._save(runner, runner.iter, by_epoch=True, epoch=runner.epoch)
            self._leave(runner, runner.iter)

    @staticmethod
    def _came(runner) -> bool:
        """Whether a signal came, to any of the ranks."""
        if runner.interruption is None:  # a test without training
            return False
        if runner.distributed:
            flag = torch.tensor(int(runner.interruption.number))
            all_reduce(flag, 'max')
            runner.interruption.number = int(flag)
        return bool(runner.interruption.number)

    @staticmethod
    def _save(runner, iteration: int, by_epoch: bool, **position) -> None:
        if runner.message_hub.get_info('saved_iter') == iteration:
            return
        runner.save_checkpoint(runner.work_dir, INTERRUPTED, by_epoch=by_epoch, meta=position)
        if is_main_process():
            atomic_write(Path(runner.work_dir) / 'last_checkpoint', str(Path(runner.work_dir) / INTERRUPTED))

    @staticmethod
    def _leave(runner, iteration: int) -> None:
        number = runner.interruption.number
        runner.logger.warning(f'{signal.Signals(number).name}: stopped after iteration {iteration}; the checkpoint is '
                              'written, and --resume goes on')
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(0)
