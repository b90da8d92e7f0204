"""``python -m ewa3d.reference``: what may stand in a config, from signatures and docstrings, as Markdown.

``docs/configs.md`` is what it prints; ``python -m ewa3d.reference EWAFFN Resample`` prints these components alone.
"""
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ewa3d import registry as R
from ewa3d.registry import nearest
from ewa3d.reparam import Reparam

__all__ = ['Key', 'components', 'keys_of', 'main', 'page', 'undocumented']

PLACES = {  # registry → heading, where its components stand
    'MODELS': ('Models and their parts', '`model`, and what is in it. Those with *rule* stand in `model.expand`'),
    'DATASETS': ('Data sets', '`train_dataloader.dataset`, and so on'),
    'TRANSFORMS': ('Transforms', '`pipeline` of a data set'),
    'SAMPLERS': ('Samplers', '`train_dataloader.sampler` or `batch_sampler`'),
    'METRICS': ('Metrics', '`val_evaluator` and `test_evaluator`'),
    'HOOKS': ('Hooks', '`default_hooks`, under any name; `None` takes one out'),
    'OPTIM_WRAPPERS': ('Optimizer wrappers', '`optim_wrapper`'),
    'OPTIM_WRAPPER_CONSTRUCTORS': ('Parameter groups', '`optim_wrapper.constructor`'),
    'PARAM_SCHEDULERS': ('Learning rate', '`param_scheduler`'),
    'LOOPS': ('Loops', '`train_cfg`'),
}
TOP = {  # key of a config → what it is
    'model': 'what is trained',
    'train_dataloader': "torch's `DataLoader` in training: `dataset`, `sampler`, `batch_size`, …",
    'val_dataloader': 'the same for validation', 'test_dataloader': 'the same for the test',
    'train_cfg': '`max_epochs`, `val_interval`', 'val_cfg': '`dict()` where there is a validation',
    'test_cfg': '`dict()` where there is a test', 'val_evaluator': 'a metric, or a list of them',
    'test_evaluator': 'the same for the test',
    'optim_wrapper': '`optimizer`, `clip_grad`, `accumulative_counts`, `constructor`, `paramwise_cfg`',
    'param_scheduler': 'learning rate over the run', 'default_hooks': 'name → hook; dicts of several files are merged',
    'custom_hooks': 'list of further hooks', 'work_dir': 'folder of the run; `work_dirs/<config>` unless given',
    'randomness': '`seed`, `diff_rank_seed`, `deterministic`', 'load_from': 'weights to start from, all of them',
    'resume': 'continue: `True`, or a checkpoint', 'compile': '`True` or keywords of `torch.compile`',
    'custom_imports': "`dict(imports=['my_package.data'])`: modules with components of your own",
    'default_scope': "`'ewa3d'`", 'launcher': "`'none'`, `'pytorch'`, `'slurm'`; the command sets it",
    'auto_scale_lr': '`enable`, `base_batch_size`: see [scaling](scaling.md)',
    'find_unused_parameters': 'on several devices: parameters that a step does not reach',
    'sync_bn': "`'torch'`: batch statistics over all devices", 'model_wrapper_cfg': 'instead of DDP',
    'data_preprocessor': "that of the model, where the model's own config has none",
    'visualizer': '`Visualizer` with `vis_backends`: see [pictures](pictures.md)', 'log_level': "`'INFO'`",
    'log_processor': "mmengine's: windows of averages in the log", 'experiment_name': 'in the log; the time by default',
    'env_cfg': '`cudnn_benchmark`, `mp_cfg`, `dist_cfg`',
    'activation_checkpointing': "modules to be computed again in the backward pass: `['backbone.blocks.*']`",
    'efficient_conv_bn_eval': "mmengine's", 'runner_type': "`'Runner'`",
}
HEAD = """# Every key of a config

Made by `python -m ewa3d.reference > docs/configs.md` from signatures and docstrings; a test compares. A component is
written as `dict(type='Name', key=value)`. `python -m ewa3d.reference Name` prints one alone, and
`ewa3d train CONFIG --print-config` everything that a config resolves to. How files inherit is in [recipes](recipes.md).
"""
RULE_TEXT = 'As a *rule*, with `at` and one of `every`, `last`, `index`: see [concepts](concepts.md).'
SECTIONS = re.compile(r'^(Args|Shape|Raises|Returns|Yields|Attributes):\s*$', re.MULTILINE)
ROLE = re.compile(r':\w+:`~?(?:[\w.]*\.)?(\w+)`')


class Key(NamedTuple):
    """One key of a component; ``default`` is ``inspect.Parameter.empty`` where it has to be given, ``text`` is empty
    where no docstring tells, ``foreign`` the package whose key it is where it is not this one."""
    name: str
    default: object
    text: str
    foreign: str = ''


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page, or the components that are named."""
    from ewa3d.cli.options import Parser
    parser = Parser('python -m ewa3d.reference', description='The keys of components, as Markdown.')
    parser.add_argument('names', nargs='*', metavar='NAME', help='such as EWAFFN; default: all')
    names = parser.parse_args(argv).names
    known = {name: cls for found in components().values() for name, cls in found.items()}
    for name in names:
        if name not in known:
            raise KeyError(f'there is no component {name!r}; {nearest(name, known)}')
    sys.stdout.write('\n'.join(_entry(name, known[name]) for name in names) if names else page())
    return 0


def components() -> dict[str, dict[str, type]]:
    """Registry → name → class, of all that this package registers, sorted."""
    found = {}
    for registry in PLACES:
        of_registry = getattr(R, registry)
        of_registry.import_from_location()
        found[registry] = {name: cls for name, cls in sorted(of_registry.module_dict.items()) if _is_ours(cls)}
    return found


def undocumented() -> list[str]:
    """``Component.key`` of all keys that no docstring tells about."""
    return [f'{name}.{key.name}' for found in components().values() for name, cls in found.items()
            for key in keys_of(cls)[0] if not key.text and not key.foreign]


def keys_of(cls) -> tuple[list[Key], type | None]:
    """The keys of a component, and the registered one that it passes all further keys on to, where it does."""
    if inspect.isclass(cls) and issubclass(cls, Reparam):
        parameters = list(inspect.signature(cls.expand).parameters.values())[1:]
        return [_key(cls, cls, p, parameters) for p in parameters], None
    found: dict[str, Key] = {}
    for owner in cls.__mro__ if inspect.isclass(cls) else [cls]:
        function = owner.__dict__.get('__init__') if inspect.isclass(owner) else owner
        if function is None or owner is object:
            continue
        if owner is not cls and _registered(owner):
            return list(found.values()), owner
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != 'self']
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                found.setdefault(p.name, _key(cls, owner, p, parameters))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(found.values()), None


def page() -> str:
    """All of it."""
    parts = [HEAD, '## At the top\n', _table(Key(name, None, text) for name, text in TOP.items())]
    for registry, found in components().items():
        heading, where = PLACES[registry]
        parts += [f'## {heading}\n', f'In {where}.\n', *(_entry(name, cls) for name, cls in found.items())]
    return '\n'.join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Docstrings
# ---------------------------------------------------------------------------------------------------------------------
def _is_ours(cls) -> bool:
    return cls.__module__.partition('.')[0] == R.SCOPE


def _registered(cls: type) -> bool:
    return any(cls in found.values() for found in components().values())


def _key(cls, owner, parameter: inspect.Parameter, siblings: Iterable[inspect.Parameter]) -> Key:
    foreign = '' if _is_ours(owner) else owner.__module__.partition('.')[0]
    names = [p.name for p in siblings]
    told = list(filter(None, (_arguments(doc, names).get(parameter.name) for doc in _docs(cls))))
    text = told[0] if told else ''
    if len(told) > 1:  # "see `ExpandableModel`" is of no use here, what is told there is
        text = re.sub(r'^see `\w+`', lambda _: told[1], text)
    return Key(parameter.name, parameter.default, text, '' if text else foreign)


def _docs(cls) -> Iterator[str]:
    """Where a key may be told about, the nearest first."""
    for owner in cls.__mro__ if inspect.isclass(cls) else [cls]:
        if _is_ours(owner):
            for one in (owner.__dict__.get('expand'), owner, *map(owner.__dict__.get, ('__init__', 'finish'))):
                one = getattr(one, '__func__', one)
                if one is not None and one.__doc__:
                    yield inspect.cleandoc(one.__doc__)


def _arguments(doc: str, names: Sequence[str]) -> dict[str, str]:
    """Name → text, of the ``Args`` of a docstring; an entry may have several names, a line several entries."""
    match = re.search(r'^Args:\n((?:[ ]+.*\n?|\n)*)', doc, re.MULTILINE)
    if match is None:
        return {}
    any_name = '|'.join(sorted(map(re.escape, names), key=len, reverse=True))
    start = re.compile(rf'(?:^(\w+(?:, \w+)*)|(?<=[.;] )((?:{any_name})(?:, (?:{any_name}))*)): ')
    found = {}
    for entry in re.split(r'\n(?= {4}\S)', match[1].rstrip()):
        pieces = start.split(' '.join(line.strip() for line in entry.splitlines()))
        for first, later, text in zip(pieces[1::3], pieces[2::3], pieces[3::3]):
            found.update(dict.fromkeys((first or later).split(', '), _plain(text)))
    return found


def _plain(text: str) -> str:
    """reStructuredText as Markdown, on one line, without the last full stop."""
    text = ROLE.sub(r'`\1`', ' '.join(text.split())).replace('``', '`')
    return text.strip().removesuffix('.')


# ---------------------------------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------------------------------
def _entry(name: str, cls) -> str:
    doc = SECTIONS.split(inspect.cleandoc(cls.__doc__ or ''))[0]
    keys, base = keys_of(cls)
    lines = [f'### {name}\n', _plain(doc.split('\n\n')[0]).removesuffix('::').removesuffix(':') + '.\n']
    if inspect.isclass(cls) and issubclass(cls, Reparam):
        lines.append(f'{RULE_TEXT}\n')
    if keys:
        lines.append(_table(keys))
    if base is not None:
        link = f'[{base.__name__}](#{base.__name__.lower()})' if _is_ours(base) else base.__name__
        lines.append(f'{"And" if keys else "With"} the keys of {link}.\n')
    return '\n'.join(lines)


def _table(keys: Iterable[Key]) -> str:
    keys = list(keys)
    defaults = any(key.default is not None for key in keys)
    rows = ['| key | default | |\n|---|---|---|' if defaults else '| key | |\n|---|---|']
    for key in keys:
        text = key.text or f"{key.foreign}'s"
        cells = [f'`{key.name}`', *([_default(key.default)] if defaults else []), text]
        rows.append('| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |')
    return '\n'.join(rows) + '\n'


def _default(value) -> str:
    if value is inspect.Parameter.empty:
        return '–'
    if inspect.isclass(value) or inspect.isfunction(value):
        return f'`{value.__name__}`'
    return f'`{round(value, 6) if isinstance(value, float) else value!r}`'


if __name__ == '__main__':
    sys.exit(main())
