"""``ewa3d test``."""
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from ewa3d.cli.options import Parser, prepare, running

__all__ = ['evaluate', 'main']

PICTURES = {'PartIoU': 'PartPicturesHook', 'BoxAP': 'BoxPicturesHook'}  # what draws what a metric judges
EVALUATING = ('LoggerHook', 'LinearSVMHook', 'PicturesHook', 'VotingHook', *PICTURES.values())  # a test keeps them


def main(argv: Sequence[str] | None = None) -> int:
    """``ewa3d test CONFIG CHECKPOINT``."""
    parser = running(Parser('ewa3d test', description='Evaluate a checkpoint.'))
    parser.add_argument('checkpoint')
    parser.add_argument('--weights', choices=['default', 'ema', 'raw'], default='default',
                        help="of a run with EMA; default: the averaged ones, which its 'state_dict' holds")
    parser.add_argument('--vote', type=int, nargs='?', const=10, metavar='TIMES',
                        help='report beside the plain numbers those of logits averaged over so many (10) passes, each '
                             "drawn and augmented by the config's vote_pipeline, or else as in training")
    parser.add_argument('--pictures', type=int, nargs='?', const=1, metavar='N',
                        help='pictures/*.png and .html in the work dir: of part segmentation and detection the N (1) '
                             'best, median and worst samples, else predictions of 8·N, half of them wrong ones')
    return evaluate(parser.parse_args(argv))


def evaluate(args) -> int:
    """Evaluate a checkpoint; writes ``metrics.json`` into the work dir."""
    cfg = prepare(args)
    from mmengine.dist import is_main_process

    from ewa3d.engine.checkpoint import load_any, read_checkpoint, select_weights
    from ewa3d.engine.hooks import unwrapped
    from ewa3d.engine.provenance import describe_data, train_fingerprint
    from ewa3d.engine.ranks import leave_group
    from ewa3d.engine.runner import Runner
    from ewa3d.engine.validate import check_config
    from ewa3d.evaluation import is_of_one_class
    from ewa3d.files import atomic_write
    from ewa3d.models.build import without_pretrained
    check_config(cfg, training=False)  # all that it has, before the parts for training are left out
    checkpoint = read_checkpoint(args.checkpoint)
    weights, kind = select_weights(checkpoint, args.weights)
    meta = checkpoint.get('meta') or {}
    keep = {k: v for k, v in (cfg.get('default_hooks') or {}).items() if v and v.get('type') in EVALUATING}
    if args.vote is not None:
        keep['vote'] = dict(type='VotingHook', times=args.vote, pipeline=_vote_pipeline(cfg))
    if args.pictures is not None:
        keep['pictures'] = _pictures(cfg, args.pictures)
    trained_on = train_fingerprint(cfg.get('train_dataloader')) if (meta.get('data') or {}).get('train') else None
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader', 'val_cfg',
                'val_evaluator', 'load_from', 'compile', 'auto_scale_lr', 'model_wrapper_cfg'):
        cfg[key] = None
    cfg.resume = False
    cfg.model = without_pretrained(cfg.model)  # the checkpoint has it all, and the file may be elsewhere by now
    cfg.default_hooks, cfg.custom_hooks = keep, None
    runner = Runner.from_cfg(cfg)
    _check_classes(meta, runner, args.checkpoint)
    load_any(unwrapped(runner.model), checkpoint, weights, args.checkpoint)
    runner.logger.info(f'{args.checkpoint}: {kind} weights')
    metrics = runner.test()
    data = runner.test_dataloader.dataset
    result = {**{k: float(v) for k, v in metrics.items()}, 'config': args.config, 'checkpoint': args.checkpoint,
              'weights': kind, 'epoch': meta.get('epoch'), **describe_data(cfg.test_dataloader, data),
              'seed': meta.get('seed', runner.seed)}
    result.update(_changed_data(meta, runner, trained_on))
    _tell_points(meta, result, runner)
    if is_main_process():
        out = atomic_write(Path(cfg.work_dir) / 'metrics.json', json.dumps(result, indent=2) + '\n')
        shown = (f'{k} {v:.2f}' for k, v in metrics.items() if not is_of_one_class(k))
        sys.stdout.write('  '.join(shown) + f'  → {out}\n')
    leave_group()
    return 0


def _pictures(cfg: Config, count: int) -> dict:
    """The hook for what the metric judges."""
    metrics = cfg.get('test_evaluator') or []
    for metric in metrics if isinstance(metrics, list) else [metrics]:
        if metric.get('type') in PICTURES:
            return dict(type=PICTURES[metric['type']], num_samples=count)
    return dict(type='PicturesHook', num_samples=8 * count)


def _vote_pipeline(cfg: Config) -> list:
    from ewa3d.engine.derive import dataset_cfgs
    training = dataset_cfgs(cfg.get('train_dataloader'))
    pipeline = cfg.get('vote_pipeline') or (training[-1].get('pipeline') if training else None)
    if not pipeline:
        raise ValueError('--vote: the config has neither a vote_pipeline nor a pipeline of its training data')
    return pipeline


def _check_classes(meta: dict, runner, checkpoint: str) -> None:
    """Refuse to evaluate on the same classes in another order: the numbers would mean nothing."""
    trained = (meta.get('dataset_meta') or {}).get('classes')
    data = getattr(runner.build_test_loop(runner._test_loop).dataloader.dataset, 'metainfo', None) or {}
    here = list(data.get('classes') or [])
    if trained and here and sorted(trained) == sorted(here) and list(trained) != here:
        raise ValueError(f'{checkpoint} was trained with the classes in another order: {trained[:5]} … there, '
                         f'{here[:5]} … in the data set')


def _tell_points(meta: dict, result: dict, runner) -> None:
    """Warn where clouds have another number of points than those that the training was judged on."""
    then, now = (meta.get('judged') or {}).get('points'), result['points']
    if then and now and then != now:
        runner.logger.warning(f'the training was judged on clouds of {then} points, this test has {now}: numbers at '
                              'different numbers of points do not compare')


def _changed_data(meta: dict, runner, train: dict | None) -> dict:
    """``changed_data``, what differs between the data now and those that the training recorded, where something does;
    says so."""
    from ewa3d.datasets.fingerprint import fingerprint
    from ewa3d.engine.provenance import changed_data
    if not meta.get('data'):
        return {}
    now = dict(test=fingerprint(runner.test_dataloader.dataset), **({} if train is None else dict(train=train)))
    texts = changed_data(meta['data'], now)
    for text in texts:
        runner.logger.warning(text)
    return dict(changed_data=texts) if texts else {}
