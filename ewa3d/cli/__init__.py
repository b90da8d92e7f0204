"""The commands: ``ewa3d VERB …``; ``tools/*.py`` are the same verbs in a checkout.

A command is a function ``main(argv) -> exit code``. A new one is a line in :data:`COMMANDS`; its module is imported
when it is asked for.
"""
import sys
from collections.abc import Sequence
from importlib import import_module

from ewa3d.cli.errors import USER_ERRORS, end_rank, one_line, tell
from ewa3d.cli.options import Parser, load_config
from ewa3d.registry import nearest

__all__ = ['COMMANDS', 'USER_ERRORS', 'load_config', 'main', 'one_line']

COMMANDS = {  # verb → (module:function, what it does)
    'quickstart': ('ewa3d.quickstart:main', 'train plain and with EWA on embedded data, fuse, compare'),
    'train': ('ewa3d.cli.train:main', 'train a model'),
    'test': ('ewa3d.cli.evaluate:main', 'evaluate a checkpoint'),
    'predict': ('ewa3d.cli.predict:main', 'what a checkpoint says about files'),
    'fewshot': ('ewa3d.cli.fewshot:main', 'train on every fold of a few-shot task; mean and std over folds'),
    'fuse': ('ewa3d.cli.weights:fuse', 'write the plain weights of a checkpoint'),
    'export': ('ewa3d.cli.export:main', 'write a checkpoint for ONNX, torch.export or safetensors'),
    'convert': ('ewa3d.cli.weights:convert', 'official Point-MAE, Point-BERT and 3DETR weights to ours'),
    'data': ('ewa3d.cli.data:main', 'download published data, check data, order clouds ahead of training'),
    'bench': ('ewa3d.bench:main', 'compare variants of steps, layers and operators'),
    'browse': ('ewa3d.browse:main', 'pictures of what a model is given, after the transforms'),
    'plot': ('ewa3d.plot:main', 'curves of runs over one another; the confusion matrix of one'),
    'compare': ('ewa3d.compare:main', 'results of runs as a table, mean ± std over seeds'),
    'report': ('ewa3d.report:main', 'write report.html of runs anew'),
    'configs': ('ewa3d.cli.configs:main', 'list the configs'),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code.

    0: done, or a training that SIGTERM ended once its checkpoint was written. 1: ``fuse``, ``convert`` or ``export``
    refuses to write, ``data check`` found something wrong, ``data prepare`` leaves something to be done by hand. 2: bad
    input, told in one line. 3: anything else, with its traceback. 4: of several processes, another one failed first.
    130: interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0].startswith('-'):
            return _overview(argv)
        if argv[0] not in COMMANDS:
            raise ValueError(f'there is no command {argv[0]!r}; {nearest(argv[0], COMMANDS)}')
        module, _, function = COMMANDS[argv[0]][0].partition(':')
        return getattr(import_module(module), function)(argv[1:])
    except USER_ERRORS as error:
        if '--debug' in argv:
            raise
        return end_rank(tell(error))
    except Exception as error:
        return end_rank(tell(error))
    except KeyboardInterrupt:
        sys.stderr.write('interrupted; train --resume (or fewshot again) continues from the last checkpoint\n')
        return end_rank(130)


def _overview(argv: Sequence[str]) -> int:
    """``ewa3d``, ``ewa3d --help`` and ``ewa3d --version``."""
    from ewa3d import __version__
    width = max(map(len, COMMANDS))
    lines = [f'  {verb:<{width}}  {what}' for verb, (_, what) in COMMANDS.items()]
    parser = Parser('ewa3d', usage='ewa3d COMMAND …', description='Train, evaluate and fuse point transformers.',
                    keep_lines=True, epilog='\n'.join(['commands:', *lines, '', 'ewa3d COMMAND --help tells more']))
    parser.add_argument('--version', action='version', version=f'ewa3d {__version__}')
    parser.parse_args(argv)
    parser.print_help()
    return 2
