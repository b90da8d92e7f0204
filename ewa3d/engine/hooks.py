"""Hooks of a run: EWA, exact resume, metrics by epoch, checkpoints.

Order matters (lower runs first): ``EWAHook`` 40, EMA and timer 50, logger 60, schedulers 70, checkpoint 90. All state
is a function of the iteration or lives in the checkpoint; hooks own no counters that a resume could lose.
"""
import itertools
import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.hooks import LoggerHook as _LoggerHook
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop
from torch import nn

from ewa3d.checks import check_integer, some
from ewa3d.datasets.base import shared_ids
from ewa3d.engine.averaging import attach_ewa, expert_spread
from ewa3d.engine.parallel import mean_over_ranks
from ewa3d.engine.saving import CheckpointHook
from ewa3d.evaluation import is_of_one_class
from ewa3d.files import append_line, atomic_write
from ewa3d.registry import HOOKS

__all__ = ['EWAHook', 'RNGStateHook', 'DatasetEpochHook', 'MetricsHook', 'CheckpointHook', 'LoggerHook',
           'get_rng_state', 'optimizer_steps', 'set_rng_state', 'seed_rank', 'unwrapped']


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself where DDP wraps it."""
    return model.module if is_model_wrapper(model) else model


# ---------------------------------------------------------------------------------------------------------------------
# EWA
# ---------------------------------------------------------------------------------------------------------------------
DIVERGING = 0.5  # with learning rates that work, spreads of some tenths were seen


@HOOKS.register_module()
class EWAHook(Hook):
    """Experts Weights Averaging (arXiv 2308.06093) after every optimizer step of the run.

    The averaging is :func:`ewa3d.attach_ewa`'s; this hook tells it where the run stands, in optimizer steps, before
    each iteration. It runs before a model EMA and before checkpoints are written.

    The share rate and, now and then, how far apart the experts of each layer are (:func:`~ewa3d.engine.averaging.
    expert_spread`, just after the averaging) go into ``metrics.jsonl`` and to the visualizer. Experts that diverge are
    a warning: a layer whose spread is above a half and twice what it was at first, and again each time it has doubled.

    Args:
        log_interval: the spread is taken every so many iterations, and at the end of every epoch.
        share_rate: the largest β, in ``[0, (E - 1) / E]``.
        schedule: how β goes over the run: ``'constant'``, ``'linear'`` (0 to β), ``'cosine'``, or in Python a function
            of progress that gives a factor.
        begin, end: fractions of the run between which experts are averaged; the schedule runs over this window.
        every: average after every k-th optimizer step.
        average_moments: treat the optimizer's moments alike.

    Raises:
        TypeError, ValueError: the model has no experts, the optimizer does not hold them, or a number is out of range.
    """
    priority = 'ABOVE_NORMAL'

    def __init__(self, share_rate: float = 0.3, schedule='linear', begin: float = 0.0, end: float = 1.0, every: int = 1,
                 average_moments: bool = False, log_interval: int = 50):
        self.log_interval = check_integer('EWAHook: log_interval', log_interval, 1)
        self.settings = dict(share_rate=share_rate, schedule=schedule, begin=begin, end=end, every=every,
                             average_moments=average_moments)
        self.handle, self.rate = None, 0.0
        self._bounds: dict[str, float] = {}  # of the spread of each layer

    def before_train(self, runner) -> None:
        step, total_steps = optimizer_steps(runner)
        self._detach()  # a training that was interrupted did not get to `after_train`
        self.handle = attach_ewa(runner.optim_wrapper.optimizer, unwrapped(runner.model), total_steps=total_steps,
                                 start_step=step, **self.settings)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        self.handle.step, _ = optimizer_steps(runner)
        self.rate = self.handle.rate  # of the step that this iteration belongs to

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        runner.message_hub.update_scalar('train/share_rate', float(self.rate))
        if self.every_n_train_iters(runner, self.log_interval) or self.end_of_epoch(runner.train_dataloader, batch_idx):
            found = expert_spread(unwrapped(runner.model))
            self._warn(runner, found)
            spread = {f'spread/{name}': value for name, value in found.items()}
            runner.message_hub.update_scalars(spread)  # no part of the console's line: one number a layer
            runner.visualizer.add_scalars(spread, step=runner.iter + 1)

    def after_train(self, runner) -> None:
        self._detach()

    def _warn(self, runner, spread: Mapping[str, float]) -> None:
        """Name the layers whose experts diverge."""
        for name, value in spread.items():
            if not value <= self._bounds.setdefault(name, max(DIVERGING, 2 * value)):  # NaN is none
                self._bounds[name] = max(self._bounds[name], 2 * value)
                runner.logger.warning(
                    f'iteration {runner.iter + 1}: the experts of {name} diverge: they are {value:.2f} of the size of '
                    'their mean away from it; a larger share_rate holds them together')

    def _detach(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


def optimizer_steps(runner) -> tuple[int, int]:
    """The optimizer step, counted from 0, that this iteration belongs to, and the number of steps of the run."""
    accumulate = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
    return runner.iter // accumulate, -(-runner.max_iters // accumulate)  # the last, shorter group is a step too


# ---------------------------------------------------------------------------------------------------------------------
# Exact resume
# ---------------------------------------------------------------------------------------------------------------------
def get_rng_state() -> dict:
    """The state of Python's, numpy's and torch's generators in this process, as tensors and plain values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = dict(python=[version, list(words), gauss], torch=torch.get_rng_state(),
                 numpy=[kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)])
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping) -> None:
    """Put the generators where :func:`get_rng_state` saw them."""
    version, words, gauss = state['python']
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state['numpy']
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def seed_rank(seed: int, rank: int) -> None:
    """Seed Python's, numpy's and torch's generators of this rank."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


@HOOKS.register_module()
class RNGStateHook(Hook):
    """Random generators of every rank go into checkpoints and come back on resume; validation leaves them alone.

    Without it a resumed run draws other partitions, dropouts and masks than the run it continues, and all ranks of a
    run draw the same ones: they are seeded alike, so that they build the same model, and apart when training begins.
    """
    priority = 'LOWEST'

    def __init__(self):
        self._resumed = None
        self._before_val = None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint['rng'] = all_gather_object(get_rng_state())

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        states = checkpoint.get('rng')
        if not runner._resume:
            return
        if not states:
            runner.logger.warning('the checkpoint has no random states: the resumed run will not be exact')
        elif len(states) != runner.world_size:
            runner.logger.warning(f'the checkpoint has the random states of {len(states)} ranks, this run has '
                                  f'{runner.world_size}: it will not be exact')
        else:
            self._resumed = states[get_rank()]

    def before_train(self, runner) -> None:
        if self._resumed is not None:
            set_rng_state(self._resumed)
            if runner.iter == runner.epoch * len(runner.train_dataloader):
                self._resumed = None  # inside an epoch, batches are skipped first: restore again after them
        elif runner.world_size > 1:  # one process goes on from where building the model left its generators
            own = runner._randomness_cfg.get('diff_rank_seed')  # mmengine has added the rank
            seed_rank(runner.seed, 0 if own else runner.rank)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        if self._resumed is not None:
            set_rng_state(self._resumed)
            self._resumed = None

    def before_val(self, runner) -> None:
        self._before_val = get_rng_state()

    def after_val(self, runner) -> None:
        set_rng_state(self._before_val)


@HOOKS.register_module()
class DatasetEpochHook(Hook):
    """Tells the training data the run's seed and the epoch, from which (with the index) each sample's augmentation
    follows. A data set with a seed of its own keeps it. Warns of samples that training shares with validation."""

    def before_train(self, runner) -> None:
        training = list(walk_datasets(runner.train_dataloader.dataset))
        for dataset in training:
            if getattr(dataset, 'seed', 0) is None:
                dataset.seed = runner.seed
        validation = getattr(runner, 'val_loop', None)
        if validation is not None and is_main_process():
            shared = shared_ids(training, walk_datasets(validation.dataloader.dataset))
            if shared:
                runner.logger.warning(f'{len(shared)} samples are in the training and in the validation data, so the '
                                      f'validation is too good: {some(shared)}')

    def before_train_epoch(self, runner) -> None:
        for dataset in walk_datasets(runner.train_dataloader.dataset):
            if hasattr(dataset, 'set_epoch'):
                dataset.set_epoch(runner.epoch)


def walk_datasets(dataset) -> Iterator:
    """The data set and those it wraps (``.dataset``, ``.datasets``)."""
    yield dataset
    inner = getattr(dataset, 'dataset', None)
    for child in ([inner] if inner is not None else []) + list(getattr(dataset, 'datasets', None) or []):
        yield from walk_datasets(child)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and log
# ---------------------------------------------------------------------------------------------------------------------
KEPT_SCALARS = 1000  # of each value, from one epoch to the next; the log takes means over a few


@HOOKS.register_module()
class MetricsHook(Hook):
    """``metrics.jsonl`` in the work dir: one line per training epoch, one per evaluation.

    ``{"mode": "train", "epoch": 1, "iter": 124, "lr": …, "loss": …, "share_rate": …, "time": …}`` has the means of the
    losses over the epoch and all ranks, the last learning rate, share rate and spread of the experts
    (``"spread/LAYER"``), and seconds; ``"val"`` and ``"test"`` lines have the metrics. A resumed run first drops the
    lines that it is about to write again.

    Args:
        on_error: what a line that cannot be written (no space, no permission) is: ``'raise'`` ends the run,
            ``'continue'`` logs it and writes it with the next one that can be.

    Raises:
        ValueError: another ``on_error``.
    """
    priority = 'BELOW_NORMAL'
    LAST = ('lr', 'base_lr', 'share_rate', 'temperature', 'kl_weight', 'skipped_steps')

    def __init__(self, on_error: str = 'raise'):
        if on_error not in ('raise', 'continue'):
            raise ValueError(f"MetricsHook: on_error must be 'raise' or 'continue', got {on_error!r}")
        self.on_error = on_error
        self._waiting: list[str] = []
        self._started = self._eval_started = 0.0
        self._lengths: dict[str, int] = {}
        self._resumed: dict[str, list] = {}

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Inside an epoch, what the mean over it is made of."""
        position, steps = checkpoint['meta'], len(runner.train_dataloader)
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and position['iter'] != position['epoch'] * steps:
            checkpoint['epoch_scalars'] = mean_over_ranks({
                name: history.data[0][self._lengths.get(name, 0):].tolist()
                for name, history in runner.message_hub.log_scalars.items() if name.startswith(('train/', 'spread/'))})

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if runner._resume:
            self._resumed = checkpoint.get('epoch_scalars') or {}

    def before_train(self, runner) -> None:
        self._waiting = []
        if is_main_process():
            _trim_metrics(self._path(runner), runner)

    def before_train_epoch(self, runner) -> None:
        self._started = time.perf_counter()
        for history in runner.message_hub.log_scalars.values():  # each step copies them: they must not grow for days
            history._log_history, history._count_history = (part[-KEPT_SCALARS:] for part in history.data)
        self._lengths = {name: len(history.data[0]) for name, history in runner.message_hub.log_scalars.items()}
        for name, values in self._resumed.items():
            for value in values:
                runner.message_hub.update_scalar(name, value)
        self._resumed = {}

    def after_train_epoch(self, runner) -> None:
        line = {}
        for name, history in runner.message_hub.log_scalars.items():
            mode, _, key = name.partition('/')
            new = len(history.data[0]) - self._lengths.get(name, 0)  # not the same for all: norms come once a step
            if mode == 'spread' and new:
                line[name] = float(history.current())
            elif mode == 'train' and key not in ('time', 'data_time') and new:
                line[key] = float(history.current() if key in self.LAST else history.mean(new))
        line = mean_over_ranks(line)  # each rank has the losses of its own samples
        self._write(runner, 'train', runner.epoch + 1, line, time.perf_counter() - self._started)

    def before_val_epoch(self, runner) -> None:
        self._eval_started = time.perf_counter()

    before_test_epoch = before_val_epoch

    def after_val_epoch(self, runner, metrics=None) -> None:
        runner.message_hub.update_info('validated_iter', runner.iter)  # a checkpoint knows whether this was done
        runner.last_metrics = dict(metrics or {})
        self._write(runner, 'val', runner.epoch, metrics or {}, time.perf_counter() - self._eval_started)

    def after_test_epoch(self, runner, metrics=None) -> None:
        if isinstance(runner._train_loop, dict) or runner._train_loop is None:
            return  # tools/test.py writes metrics.json; metrics.jsonl belongs to the training run
        self._write(runner, 'test', runner.epoch, metrics or {}, time.perf_counter() - self._eval_started)

    @staticmethod
    def _path(runner) -> Path:
        return Path(runner.work_dir) / 'metrics.jsonl'

    def _write(self, runner, mode: str, epoch: int, values: dict, seconds: float) -> None:
        if not is_main_process():
            return
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float, np.number))}
        line = dict(mode=mode, epoch=epoch, iter=runner.iter, **numbers, time=round(seconds, 3))
        self._waiting.append(json.dumps(line))
        try:
            while self._waiting:
                append_line(self._path(runner), self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            if self.on_error == 'raise':
                raise
            runner.logger.error(f'{error}; the run goes on, with lines of the metrics that wait: {len(self._waiting)}')


def _trim_metrics(path: Path, runner) -> None:
    """Drop what a resumed run will write again; move the metrics of an earlier run out of the way."""
    if not path.is_file():
        return
    if runner.iter == 0:
        names = (path.with_name(f'metrics.previous{f"-{i}" if i > 1 else ""}.jsonl') for i in itertools.count(1))
        os.replace(path, next(name for name in names if not name.exists()))
        return
    kept = []
    for text in path.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # the run was killed while it wrote this one
            continue
        if not isinstance(line, dict) or not isinstance(line.get('epoch'), int) or 'mode' not in line:
            continue
        again = line['mode'] == 'val' and line['epoch'] == runner.epoch and runner.pending_validation
        if line['epoch'] <= runner.epoch and line['mode'] != 'test' and not again:
            kept.append(text + '\n')
    atomic_write(path, ''.join(kept))


@HOOKS.register_module()
class LoggerHook(_LoggerHook):
    """mmengine's console log, shorter: per-class values become a table at the test, nothing is dumped beside it.

    Args:
        interval: a line every so many iterations.
        interval_exp_name: the experiment's name every so many iterations; practically never unless given.
    """

    def __init__(self, interval: int = 50, interval_exp_name: int = 10**9, **kwargs):
        super().__init__(interval=interval, interval_exp_name=interval_exp_name, **kwargs)

    def before_run(self, runner) -> None:
        super().before_run(runner)
        self.json_log_path = 'scalars.json'  # of visualizer back ends, where a config asks for some

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        last = self.end_of_epoch(runner.train_dataloader, batch_idx)
        due = self.every_n_inner_iters(batch_idx, self.interval)
        if due or (last and (not self.ignore_last or len(runner.train_dataloader) <= self.interval)):
            tag, text = runner.log_processor.get_log_after_iter(runner, batch_idx, 'train')
            runner.logger.info(text)
            runner.visualizer.add_scalars(tag, step=runner.iter + 1, file_path=self.json_log_path)

    def after_val_epoch(self, runner, metrics=None) -> None:
        runner.logger.info(f'Epoch(val) [{runner.epoch}]  {_summary(metrics)}')
        runner.visualizer.add_scalars(dict(metrics or {}), step=runner.epoch, file_path=self.json_log_path)

    def after_test_epoch(self, runner, metrics=None) -> None:
        runner.logger.info('test:\n' + _table(metrics) + f'\n{_summary(metrics)}')


def _summary(metrics) -> str:
    return '  '.join(f'{k}: {v:.2f}' for k, v in (metrics or {}).items() if not is_of_one_class(k))


def _table(metrics) -> str:
    rows = {k.rpartition('acc/')[2]: v for k, v in (metrics or {}).items() if is_of_one_class(k)}
    width = max(map(len, rows), default=0)
    return '\n'.join(f'  {name:<{width}}  {value:6.2f}' for name, value in rows.items())
