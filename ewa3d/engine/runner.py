"""The Runner: mmengine's, with checked configs, safe checkpoints, exact resume and everything at one work-dir root.

A work dir holds ``config.py`` (resolved: it trains the same again), ``environment.json``, ``train.log``,
``metrics.jsonl``, ``epoch_N.pth``, ``best_*.pth``, ``last_checkpoint``, ``confusion.json`` and ``report.html``.
"""
import copy
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import all_gather_object, get_world_size, is_distributed, is_main_process
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner as _Runner
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader

import ewa3d
from ewa3d.datasets.collate import packed_collate
from ewa3d.engine.checkpoint import load_any, read_checkpoint, write_checkpoint
from ewa3d.engine.derive import check_save_best, fill_num_classes, selection
from ewa3d.engine.environment import check_device, check_launcher, describe_environment, init_gloo, versions
from ewa3d.engine.hooks import unwrapped
from ewa3d.engine.intact import find_intact_checkpoint, passed_over, read_once
from ewa3d.engine.interrupt import catch_signals
from ewa3d.engine.loops import TrainLoop
from ewa3d.engine.memory import keep_freed_memory
from ewa3d.engine.parallel import batch_size_of, check_sync_bn, lr_ratio, scale_rates
from ewa3d.engine.plain import to_plain
from ewa3d.engine.ranks import process_group_timeout, together, watch
from ewa3d.engine.reporting import close_displays, log_end, log_result, log_start
from ewa3d.engine.sharding import FULLY_SHARD, gathered, shard, shared_out
from ewa3d.engine.validate import check_config
from ewa3d.engine.workers import TIMEOUT, end_workers, explain, watched
from ewa3d.files import atomic_write
from ewa3d.layers.checkpointing import checkpoint_modules
from ewa3d.models.build import without_pretrained
from ewa3d.registry import PARAM_SCHEDULERS, RUNNERS

__all__ = ['Runner']

_RUNS = itertools.count()  # two runs of one process must not share a logger or a message hub
# What a resumed run needs from the message hub.
_KEPT_INFO = ('best_score', 'best_ckpt', 'keep_ckpt_ids', 'last_ckpt', 'validated_iter', 'skipped')


@RUNNERS.register_module()
class Runner(_Runner):
    """See the module's docstring. Build it with :meth:`from_cfg`; call :meth:`train` or :meth:`test`.

    ``resume=True`` continues from ``work_dir/last_checkpoint`` (or starts afresh where there is none), a path continues
    from that file. ``load_from`` only loads weights: the model's own, or of a pretraining model the backbone.
    """
    @classmethod
    def from_cfg(cls, cfg) -> 'Runner':
        """Check ``cfg``, fill what follows from the data, and build.

        Raises:
            KeyError, TypeError, ValueError: ``cfg`` cannot be right; see :func:`ewa3d.engine.validate.check_config`.
        """
        cfg = copy.deepcopy(cfg) if isinstance(cfg, Config) else Config(copy.deepcopy(dict(cfg)))
        training = cfg.get('train_cfg') is not None
        check_config(cfg, training)
        cfg.setdefault('default_scope', 'ewa3d')
        cfg.randomness = cfg.get('randomness') or dict(seed=0)
        if cfg.randomness.get('seed') is None:
            cfg.randomness.seed = 0
        if cfg.get('work_dir') is None:
            raise KeyError("the config has no 'work_dir'")
        if cfg.get('load_from') and not cfg.get('resume') and not Path(cfg.load_from).is_file():
            raise FileNotFoundError(f'load_from: there is no checkpoint {cfg.load_from}')
        fill_num_classes(cfg, ('train', 'val', 'test') if training else ('test', 'train', 'val'))
        if training:
            check_device(cfg)
            check_save_best(cfg)
        to_plain(cfg.to_dict(), 'config')  # what cannot be stored is found now, not at the first checkpoint
        with together(process_group_timeout(cfg.get('env_cfg') or {}), new_run=True):
            return super().from_cfg(cfg)

    def __init__(self, model, work_dir: str, train_cfg=None, experiment_name=None, default_scope='ewa3d',
                 randomness=None, cfg=None, **kwargs):
        self.selection = selection(cfg or {}) if train_cfg is not None else ('given', 'a checkpoint is evaluated')
        self.last_metrics: dict = {}
        self.interruption = None  # while training: which signal came
        self._checkpointing = None
        name = experiment_name or Path((cfg and cfg.filename) or 'run').stem
        super().__init__(model, work_dir, train_cfg=train_cfg, experiment_name=f'{name}-{next(_RUNS)}',
                         default_scope=default_scope, randomness=dict(randomness or dict(seed=0)), cfg=cfg, **kwargs)

    # ---- environment, log, layout of the work dir --------------------------------------------------------------------
    @property
    def _log_dir(self) -> str:
        return self._work_dir

    @_log_dir.setter
    def _log_dir(self, value: str) -> None:
        """mmengine wants a folder for every start; here a run's files lie at the root of its work dir."""

    def setup_env(self, env_cfg: dict) -> None:
        """As mmengine's, and gloo where there is no GPU (its own set-up calls CUDA in every case)."""
        self._timeout = process_group_timeout(env_cfg or {})
        if self.distributed and not is_distributed():
            check_launcher(self._launcher)
            if not torch.cuda.is_available():
                init_gloo(self._launcher, self._timeout)
        env_cfg = dict(env_cfg or {})
        super().setup_env({**env_cfg, 'dist_cfg': {**(env_cfg.get('dist_cfg') or {}), 'timeout': self._timeout}})
        watch(self._timeout)
        keep_freed_memory()

    def build_logger(self, log_level='INFO', log_file=None, **kwargs):
        """``train.log``; evaluating a checkpoint writes ``test.log`` and leaves a training's log alone."""
        name = 'test.log' if self._train_loop is None else 'train.log'
        return super().build_logger(log_level, log_file or os.path.join(self._work_dir, name), **kwargs)

    def build_visualizer(self, visualizer=None) -> Visualizer:
        """None by default: metrics go to ``metrics.jsonl``; configs may ask for TensorBoard."""
        if visualizer is None:
            return Visualizer.get_instance(name=self._experiment_name)
        return super().build_visualizer(visualizer)

    def get_hooks_info(self) -> str:
        """The names of the hooks, in their order, for the log."""
        return ', '.join(type(hook).__name__ for hook in self._hooks)

    def _log_env(self, env_cfg: dict) -> None:
        own = bool(self._randomness_cfg.get('diff_rank_seed'))  # is added to this rank's seed then
        seeds = [self._seed - own * self.rank + rank for rank in range(self._world_size)]
        environment = describe_environment(seed=self._seed, world_size=self._world_size, rank_seeds=seeds)
        self.logger.info(f'ewa3d {ewa3d.__version__}, torch {torch.__version__}, {environment["device"]}, '
                         f'seed {self._seed}, {self._world_size} process(es); work dir {self._work_dir}')
        if is_main_process() and self._train_loop is not None:
            atomic_write(Path(self._work_dir) / 'environment.json', json.dumps(environment, indent=2))

    def dump_config(self) -> None:
        """``config.py``: everything resolved, usable with tools/train.py."""
        if not is_main_process() or self._train_loop is None:
            return
        cfg = copy.deepcopy(self.cfg)
        for key in ('resume', 'launcher'):  # of this start, not of the experiment
            cfg.pop(key, None)
        atomic_write(Path(self._work_dir) / 'config.py', cfg.pretty_text)

    # ---- building ----------------------------------------------------------------------------------------------------
    def register_default_hooks(self, hooks=None) -> None:
        """mmengine's and ours, whatever the config lists; a name set to ``None`` leaves that hook out."""
        defaults = dict(rng=dict(type='RNGStateHook'), dataset_epoch=dict(type='DatasetEpochHook'),
                        metrics=dict(type='MetricsHook'), logger=dict(type='LoggerHook'),
                        progress=dict(type='ProgressHook'), report=dict(type='ReportHook'),
                        finite=dict(type='FiniteHook'), interrupt=dict(type='InterruptHook'),
                        provenance=dict(type='ProvenanceHook'),
                        checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3))
        if self.distributed:
            defaults['sync_buffers'] = dict(type='SyncBuffersHook')
            if (self.cfg.get('model_wrapper_cfg') or {}).get('type') == FULLY_SHARD:
                defaults['even_forwards'] = dict(type='EvenForwardsHook')
        hooks = {**defaults, **(hooks or {})}
        own = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')
        super().register_default_hooks({k: v for k, v in hooks.items() if v is not None or k in own})

    def build_model(self, model) -> nn.Module:
        """A run that goes on needs no weights to start from: its checkpoint has them all."""
        resumed = self._resume and (self._resume is not True or find_intact_checkpoint(self._work_dir))
        return super().build_model(without_pretrained(model) if resumed and isinstance(model, Mapping) else model)

    def wrap_model(self, model_wrapper_cfg, model: nn.Module) -> nn.Module:
        if self._train_loop is None:
            self.cfg.sync_bn = None  # evaluation has no statistics to take
        if self.distributed and self.cfg.get('sync_bn'):
            check_sync_bn(model, torch.cuda.is_available())
        if self.distributed and (model_wrapper_cfg or {}).get('type') == FULLY_SHARD:
            return shard(model.to(get_device()), **{k: v for k, v in model_wrapper_cfg.items() if k != 'type'})
        if self.distributed and not torch.cuda.is_available():
            model_wrapper_cfg = {'type': 'MMDistributedDataParallel', 'device_ids': None, 'broadcast_buffers': False,
                                 'find_unused_parameters': self.cfg.get('find_unused_parameters', False),
                                 **(model_wrapper_cfg or {})}
        return super().wrap_model(model_wrapper_cfg, model)

    def _init_model_weights(self) -> None:
        """Nothing: models initialise themselves in their constructors, then load, then expand.

        mmengine would call ``init_weights`` here, after the optimizer was built, and wipe loaded weights. It comes to
        ``activation_checkpointing`` next, which is done here instead: by its own, the copy of a model that an EMA
        keeps would run with the weights of the original, and batch statistics would move twice a step.
        """
        self._checkpointing = self.cfg.pop('activation_checkpointing', None)
        if self._checkpointing:
            checkpoint_modules(unwrapped(self.model), self._checkpointing)

    @staticmethod
    def build_dataloader(dataloader, seed=None, diff_rank_seed: bool = False) -> DataLoader:
        """As mmengine's, with a random generator of its own: making an iterator must not move the training's. Unless a
        ``collate_fn`` is given, batches travel in few pieces (:func:`ewa3d.datasets.packed_collate`)."""
        if isinstance(dataloader, DataLoader):
            return dataloader
        dataloader = {'collate_fn': packed_collate, **copy.deepcopy(dataloader)}
        if dataloader.get('num_workers', 0):
            dataloader.setdefault('timeout', TIMEOUT)
        else:
            for key in ('persistent_workers', 'prefetch_factor', 'timeout'):
                dataloader.pop(key, None)
        loader = _Runner.build_dataloader(dataloader, seed=seed, diff_rank_seed=diff_rank_seed)
        samples, ranks = len(loader.dataset), get_world_size()
        what = f'the data set {type(loader.dataset).__name__}'
        if samples == 0:
            raise ValueError(f'{what} is empty')
        if samples < ranks and getattr(loader.sampler, 'round_up', True):  # in evaluation, a rank may have none
            raise ValueError(f'{what} has {samples} samples, which are fewer than the {ranks} processes: some would '
                             'have nothing to do')
        if len(loader) == 0 and loader.drop_last:
            raise ValueError(f'{what} has {samples} samples{f" for {ranks} processes" if ranks > 1 else ""}, which is '
                             f'less than one batch of {loader.batch_size}, and drop_last=True drops that')
        loader.generator = torch.Generator().manual_seed(int(seed or 0))
        return watched(loader)

    def build_train_loop(self, loop):
        if isinstance(loop, Mapping) and 'type' not in loop and loop.get('by_epoch', True):
            loop = {'type': 'TrainLoop', **{k: v for k, v in loop.items() if k != 'by_epoch'}}
            epochs = loop.get('max_epochs')
            if not isinstance(epochs, int) or epochs < 1:
                raise ValueError(f'train_cfg.max_epochs must be a positive integer, got {epochs!r}')
        return super().build_train_loop(loop)

    def _build_param_scheduler(self, scheduler, optim_wrapper) -> list:
        schedulers = scheduler if isinstance(scheduler, (list, tuple)) else [scheduler]
        schedulers = [copy.deepcopy(s) for s in schedulers]
        for cfg in schedulers:
            if isinstance(cfg, dict) and getattr(PARAM_SCHEDULERS.get(cfg['type']), 'by_iteration', False):
                cfg['by_epoch'] = False  # from this mmengine takes the run's iterations as `end`
        return super()._build_param_scheduler(schedulers, optim_wrapper)

    def scale_lr(self, optim_wrapper, auto_scale_lr=None) -> None:
        """mmengine's linear rule, or ``rule='sqrt'``; gradient accumulation is not counted, as there."""
        if not (auto_scale_lr or {}).get('enable'):
            return
        real, base = self.world_size * batch_size_of(self.train_dataloader), auto_scale_lr['base_batch_size']
        rule = auto_scale_lr.get('rule', 'linear')
        ratio = lr_ratio(real, base, rule)
        scale_rates(optim_wrapper, ratio)
        self.logger.info(f'learning rates are multiplied by {ratio:g}: they were given for a batch of {base}, and one '
                         f'of all ranks is {real} (auto_scale_lr, {rule})')

    def _maybe_compile(self, target: str) -> None:
        """Compile what takes the time, tensors to features, and only for training: evaluation would compile again.

        Heads read samples, which would break the graph; the optimizer step and its hooks are memory-bound.
        """
        if self._checkpointing:
            self.cfg.activation_checkpointing = self._checkpointing  # mmengine has passed it by
        options = self.cfg.get('compile')
        if not options:
            return
        model = unwrapped(self.model)
        name = getattr(model, 'compiled', 'extract' if hasattr(model, 'extract') else 'forward')
        eager = getattr(model, name)
        compiled = torch.compile(eager, **({} if options is True else options))
        setattr(model, name, lambda *args, **kwargs: (compiled if model.training else eager)(*args, **kwargs))
        self.logger.info(f'{type(model).__name__}.{name} is compiled for training; the first step is slow')

    # ---- running -----------------------------------------------------------------------------------------------------
    @property
    def pending_validation(self) -> bool:
        """Whether the run stands at an epoch boundary whose validation has not been run (right after a resume)."""
        loop = self.train_loop
        return (isinstance(loop, TrainLoop) and self.epoch > 0 and self.iter == self.epoch * len(loop.dataloader)
                and loop.validation_due() and self.message_hub.get_info('validated_iter') != self.iter)

    def train(self) -> nn.Module:
        log_start(self)
        start = time.perf_counter()
        with self._guarded():
            with catch_signals() as self.interruption:
                self.interruption.waits = False  # until there is something to save; see InterruptHook
                model = super().train()
            if self._val_loop is None and self._test_loop is not None:
                self._test_loop = self.build_test_loop(self._test_loop)
                self.last_metrics = self.test_loop.run()
        log_result(self)
        log_end(self, 'training', time.perf_counter() - start)
        return model

    def test(self) -> dict:
        start = time.perf_counter()
        with self._guarded():
            metrics = super().test()
        log_end(self, 'test', time.perf_counter() - start)
        return metrics

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever ends what is done in here, no data worker and no other rank is left behind, and the first cause is
        told."""
        with together(self._timeout):
            try:
                yield
            except BaseException as error:
                found = explain(error, self._loaders())
                end_workers(self._loaders())
                if found is not error:
                    raise found from error
                raise
            finally:
                self.interruption = None
                close_displays(self)
                for loader in self._loaders():  # left to the garbage collector, workers can stall what follows
                    loader._iterator = None

    def _loaders(self) -> list[DataLoader]:
        loops = (self._train_loop, self._val_loop, self._test_loop)
        return [loop.dataloader for loop in loops if isinstance(getattr(loop, 'dataloader', None), DataLoader)]

    # ---- checkpoints -------------------------------------------------------------------------------------------------
    def load_or_resume(self) -> None:
        if self._has_loaded:
            return
        path = None
        if self._resume:
            path = find_intact_checkpoint(self._work_dir) if self._resume is True else self._resume
            if path is None:
                self.logger.info(f'nothing to resume in {self._work_dir}: starting from scratch')
                self._resume = False
        if path is not None:
            if self._resume is True and (reason := passed_over(self._work_dir)):
                self.logger.warning(f'{reason.rstrip(".")}. Going on from {path}, the newest intact one')
            self.resume(str(path))
        else:
            if self._load_from is not None:
                self.load_checkpoint(self._load_from, strict=False)
            self._warn_of_earlier_run()
        self._has_loaded = True

    def _warn_of_earlier_run(self) -> None:
        """Its pointer stays until the first checkpoint replaces it: whatever stops this run before, nothing is lost."""
        pointer = Path(self._work_dir) / 'last_checkpoint'
        if self._train_loop is not None and pointer.is_file():
            self.logger.warning(f'{self._work_dir} holds an earlier run, which is not continued (--resume would): its '
                                'checkpoints will be overwritten as this run gets there. Until this run has saved its '
                                f'first one, --resume continues the earlier run from {pointer.read_text().strip()}')

    def load_checkpoint(self, filename, map_location='cpu', strict: bool = True, revise_keys=()) -> dict:
        """Read a checkpoint safely and load its weights: all of them, or, unless ``strict``, a pretrained backbone."""
        checkpoint = read_once(filename) if map_location == 'cpu' else read_checkpoint(filename, map_location)
        if 'format_version' in checkpoint:
            self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        load_any(unwrapped(self.model), checkpoint, checkpoint.get('state_dict', {}), str(filename),
                 transfer=not strict)
        self._has_loaded = True
        kind = (checkpoint.get('meta') or {}).get('weights', 'raw')
        self.logger.info(f'loaded {filename} ({kind} weights)')
        return checkpoint

    def resume(self, filename, resume_optimizer: bool = True, resume_param_scheduler: bool = True,
               map_location='cpu') -> None:
        """Continue a run: weights, optimizer, schedulers, random generators, epoch and iteration.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds weights only, or is of another model.
        """
        checkpoint = self.load_checkpoint(filename, map_location)
        meta = checkpoint.get('meta') or {}
        if 'optimizer' not in checkpoint or 'iter' not in meta:
            raise ValueError(f'{filename} holds weights but no training state, so a run cannot be resumed from it; use '
                             'an epoch_N.pth, or load_from to start a new run from these weights')
        self._warn_differences(meta)
        steps = len(self.train_dataloader)
        self.train_loop._iter = int(meta['iter'])
        if meta.get('epoch_length', steps) != steps:
            self.train_loop._iter = int(meta['epoch']) * steps
        if isinstance(self.train_loop, TrainLoop):
            self.train_loop.start_at(self.train_loop._iter, int(meta.get('epoch', 0)))
        self._restore_info(checkpoint.get('message_hub') or {})
        try:
            self.optim_wrapper.load_state_dict(self._optimizer_state(checkpoint['optimizer']))
        except (ValueError, KeyError) as error:
            raise ValueError(f'{filename}: its optimizer state does not fit this optimizer: {error}') from None
        saved = checkpoint.get('param_schedulers')
        if self.param_schedulers and saved:
            groups = self.param_schedulers if isinstance(self.param_schedulers, dict) else {'': self.param_schedulers}
            saved = saved if isinstance(saved, dict) else {'': saved}
            for name, schedulers in groups.items():
                for scheduler, state in zip(schedulers, saved.get(name, ())):
                    scheduler.load_state_dict(state)
        self._restore_gradients(checkpoint.get('gradients'))
        self._restore_buffers(checkpoint.get('buffers'))
        self.logger.info(f'resumed {filename} after epoch {self.epoch}, iteration {self.iter}')

    def _warn_differences(self, meta: Mapping) -> None:
        now = dict(seed=self.seed, max_epochs=self.max_epochs, world_size=self.world_size,
                   epoch_length=len(self.train_dataloader))
        for key, value in now.items():
            if key in meta and meta[key] != value:
                self.logger.warning(f'{key} was {meta[key]} when the checkpoint was written and is {value} now: the '
                                    'resumed run is another one than the run without a stop'
                                    + (' (schedules follow the new length)' if key == 'max_epochs' else ''))

    def _restore_info(self, info: Mapping) -> None:
        for key, value in info.items():
            if not key.startswith(_KEPT_INFO):
                continue
            if 'ckpt' in key and isinstance(value, str):  # the folder may have moved; and a file names none elsewhere
                value = os.path.join(self._work_dir, os.path.basename(value))
            if key.startswith('keep_ckpt_ids'):
                value = [int(v) for v in value]
            self.message_hub.update_info(key, value)

    def save_checkpoint(self, out_dir, filename, file_client_args=None, save_optimizer: bool = True,
                        save_param_scheduler: bool = True, meta=None, by_epoch: bool = True, backend_args=None) -> None:
        """Write a checkpoint; every rank calls this (their random states are gathered), the first one writes."""
        # Hooks run before the loop counts: the epoch that just ended, or the iteration, is one more.
        position = dict(epoch=self.epoch + bool(by_epoch), iter=self.iter + (not by_epoch))
        checkpoint = dict(meta={**position, **(meta or {})}, state_dict=gathered(unwrapped(self.model).state_dict()))
        if save_optimizer:
            checkpoint['optimizer'] = gathered(self.optim_wrapper.state_dict())
            checkpoint.update(self._accumulated_gradients(), **({} if by_epoch else self._own_buffers()))
        if save_param_scheduler and self.param_schedulers:
            states = self.param_schedulers
            checkpoint['param_schedulers'] = (
                {k: [s.state_dict() for s in v] for k, v in states.items()} if isinstance(states, dict)
                else [s.state_dict() for s in states])
        self.call_hook('before_save_checkpoint', checkpoint=checkpoint)
        if not is_main_process():
            return
        hub = self.message_hub.runtime_info
        checkpoint['message_hub'] = {k: to_plain(v, k) for k, v in hub.items() if k.startswith(_KEPT_INFO)}
        if not save_optimizer:  # weights to use, not a state to resume
            for key in ('rng', 'message_hub', 'epoch_scalars'):
                checkpoint.pop(key, None)
        checkpoint['meta'] = self._meta(checkpoint)
        write_checkpoint(Path(out_dir) / filename, **checkpoint)

    def _optimizer_state(self, state: dict) -> dict:
        """As this run's optimizer takes it: cut up where the model is sharded."""
        if isinstance(self.optim_wrapper, OptimWrapperDict):
            return state
        return shared_out(state, self.optim_wrapper.optimizer)

    def _accumulated_gradients(self) -> dict:
        """Where an epoch ends between two optimizer steps, each rank's gradients so far are part of the state."""
        if isinstance(self.optim_wrapper, OptimWrapperDict) or self.optim_wrapper.should_update():
            return {}
        named = unwrapped(self.model).named_parameters()
        return dict(gradients=all_gather_object({k: p.grad.cpu() for k, p in named if p.grad is not None}))

    def _restore_gradients(self, gradients: list | None) -> None:
        if gradients and len(gradients) == self.world_size:
            for name, parameter in unwrapped(self.model).named_parameters():
                if name in gradients[self.rank]:
                    parameter.grad = gradients[self.rank][name].to(parameter.device, copy=True)

    def _own_buffers(self) -> dict:
        """Up to the end of an epoch, each rank has statistics of its own in a BatchNorm."""
        if not self.distributed:
            return {}
        named = unwrapped(self.model).named_buffers()
        return dict(buffers=all_gather_object({k: v.cpu() for k, v in named if not hasattr(v, 'full_tensor')}))

    def _restore_buffers(self, buffers: list | None) -> None:
        if buffers and len(buffers) == self.world_size:
            for name, buffer in unwrapped(self.model).named_buffers():
                if name in buffers[self.rank]:
                    buffer.copy_(buffers[self.rank][name])

    def _meta(self, checkpoint: dict) -> dict:
        dataset_meta = getattr(self.train_dataloader.dataset, 'metainfo', None) or {}
        validated = self.message_hub.get_info('validated_iter') == checkpoint['meta']['iter']
        return dict(checkpoint['meta'], max_epochs=self.max_epochs, epoch_length=len(self.train_dataloader),
                    seed=self.seed, world_size=self.world_size, cfg=self.cfg.to_dict(), dataset_meta=dict(dataset_meta),
                    weights='ema' if 'ema_state_dict' in checkpoint else 'raw', versions=versions(),
                    metrics=self.last_metrics if validated else {}, time=time.strftime('%Y-%m-%dT%H:%M:%S%z'))
