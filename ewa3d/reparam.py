"""The one idea: a model is always a plain model; training may *expand* some of its modules, ``fuse`` turns them back.

A :class:`Reparam` is what a plain module becomes in training. :func:`expand` puts Reparams in place by rules that name
modules, :func:`fuse` takes them out again. Both work in place on any ``nn.Module``.

Forward and backward hooks that somebody registered on a replaced module move along, in both directions, and their
handles stay valid. Hooks on modules *below* a replaced one belong to the Reparam, which documents what it does.
"""
import difflib
import inspect
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import nn

from ewa3d.registry import MODELS, nearest

__all__ = ['Fused', 'Reparam', 'Report', 'Row', 'expand', 'fuse']

logger = logging.getLogger('ewa3d')
RULE_KEYS = ('type', 'at', 'every', 'last', 'index')


class Reparam(nn.Module):
    """A module that trains as one structure and runs as a plainer one.

    In eval mode it already computes what :meth:`fuse` will, so nothing is swapped around validation or saving.

    Attributes:
        preserves: :meth:`expand` keeps the plain module's function (up to rounding).
        accepts: Reparam classes, or their names, that this one may be put over or into; every other combination of
            two rules on one module is an error.
        opaque: while it stays, what is inside is its own affair and is not fused.
        has_fused_form: its :meth:`fuse` returns a :class:`Fused`, which a rule with ``fused=True`` builds.
    """
    preserves = True
    accepts: tuple = ()
    opaque = False
    has_fused_form = False

    @classmethod
    def at_depth(cls, cfg: dict, position: int, total: int) -> dict:
        """The keywords of :meth:`expand` for the module ``position`` (from 0) of the ``total`` that a rule chose."""
        return cfg

    @classmethod
    def check_place(cls, plain: nn.Module, around: list[nn.Module]) -> None:
        """Raise where ``plain`` stands in a place in which this class would not do what it is for.

        Args:
            around: the modules that hold it, the nearest first.
        """

    @classmethod
    def expand(cls, plain: nn.Module, **cfg) -> 'Reparam':
        """The training form of ``plain``, starting from its weights; ``plain`` itself is left as it was.

        Dtype, device, train/eval mode and ``requires_grad`` flags are kept.
        """
        raise NotImplementedError(f'{cls.__name__}.expand')

    def fuse(self) -> nn.Module:
        """The plain module with the same eval output and the same dtype, device, mode and flags; ``self`` to stay."""
        raise NotImplementedError(f'{type(self).__name__}.fuse')


class Fused(nn.Module):
    """What a Reparam fuses to where that is not the plain class.

    A config can name it, so that fused weights have a model: by the Reparam's own rule with ``fused=True``.
    """


class Row(NamedTuple):
    """One module of a :class:`Report`; ``status`` is ``'expanded'``, ``'fused'`` or ``'kept'``."""
    name: str
    before: str
    after: str
    params_before: int
    params_after: int
    status: str


class Report:
    """What :func:`expand` or :func:`fuse` did: an iterable of :class:`Row`, with the whole model's parameter counts."""

    def __init__(self, rows: Iterable[Row], params_before: int, params_after: int):
        self.rows = list(rows)
        self.params_before = params_before
        self.params_after = params_after

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __str__(self) -> str:
        total = Row(f'model ({len(self)} module{"" if len(self) == 1 else "s"} listed)', '', '', self.params_before,
                    self.params_after, '')
        cells = [('module', 'before', 'after', 'params before', 'params after', 'status')]
        cells += [tuple(f'{cell:,}' if isinstance(cell, int) else cell for cell in row) for row in [*self, total]]
        widths = [max(map(len, column)) for column in zip(*cells)]
        align = ('<', '<', '<', '>', '>', '<')
        lines = ['  '.join(f'{c:{a}{w}}' for c, a, w in zip(row, align, widths)).rstrip() for row in cells]
        rule = '-' * max(map(len, lines))
        return '\n'.join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def expand(model: nn.Module, rules: dict | Iterable[dict]) -> Report:
    """Replace modules of ``model`` by Reparams, in place; all rules apply or, after an error, none.

    Expand after loading plain weights and before anything that holds parameters: optimizer, DDP, compile, EMA.

    Args:
        model: any module; its own class does not change, so it must not be the module that a rule means.
        rules: dicts, applied in order, with

            * ``type``: a Reparam class or its registered name;
            * ``at``: a module name as in ``named_modules()``; ``*`` and ``?`` match within one dotted part;
            * which of the matches, at most one of: ``every=k`` (``matches[k - 1::k]``, default 1), ``last=k``,
              ``index=[...]`` (positions, negative ones from the end);
            * the rest: keywords of the class's ``expand``.

    A module that occurs at several places counts once and is replaced at all of them by one instance.

    Returns:
        A report with one ``'expanded'`` row a module.

    Raises:
        TypeError: a rule has an unknown key, no ``type`` or ``at``, or a ``type`` that is no Reparam.
        KeyError: a ``type`` that is not registered.
        ValueError: a rule matches nothing, or a module that an earlier rule replaced; the model is wrapped or sharded.
        Whatever the class's ``expand`` raises, with the rule and the module in front of the message.
    """
    refuse_wrapped(model, 'expand')
    rules = [rules] if isinstance(rules, dict) else list(rules)
    parsed = [_parse_rule(rule, number) for number, rule in enumerate(rules)]
    before, rows = count_params(model), {}
    with ExitStack() as undo:
        for rule in parsed:
            chosen = _select(model, rule)
            for position, (name, plain) in enumerate(chosen):
                _refuse_fused_kernel(model, name, plain)
                new = _expand(model, name, plain, rule, position, len(chosen))
                _refuse_untied(model, name, plain, new)
                undo.callback(replace(model, plain, new))
                first = rows.get(name)
                rows[name] = Row(name, first.before if first else type(plain).__name__, type(new).__name__,
                                 first.params_before if first else count_params(plain), count_params(new), 'expanded')
        undo.pop_all()  # all went well: what was done stays
    return Report(rows.values(), before, count_params(model))


def fuse(model: nn.Module) -> Report:
    """Turn every Reparam in ``model`` back into its plain module, in place.

    Parents come first, and what a ``fuse()`` returned is looked at again (average the experts first, fold what is
    inside them after), until only Reparams that stay are left.

    An optimizer, EMA or DDP made before holds the old parameters; a warning in the log says so (not for a model whose
    parameters are frozen, which nothing trains).

    Returns:
        A report with a ``'fused'`` or ``'kept'`` row a module.

    Raises:
        ValueError: ``model`` is itself a Reparam (use its ``fuse()``), or is wrapped by DDP, FSDP or ``torch.compile``,
            or its parameters are sharded.
    """
    refuse_wrapped(model, 'fuse')
    if isinstance(model, Reparam):
        raise ValueError(f'fuse() works on the modules inside a model, and {type(model).__name__} is itself one that '
                         f'fuses: use `model = model.fuse()`')
    trainable = any(p.requires_grad for p in model.parameters())
    before, rows, kept = count_params(model), {}, set()
    with ExitStack() as undo:
        while (found := _next_reparam(model, kept)) is not None:
            name, old = found
            new = old.fuse()
            if not isinstance(new, nn.Module):
                raise TypeError(f'{type(old).__name__}.fuse() of {name!r} returned {type(new).__name__}, not a module')
            if new is old:
                kept.add(old)
            else:
                undo.callback(replace(model, old, new))
            first = rows.get(name)
            rows[name] = Row(name, first.before if first else type(old).__name__, type(new).__name__,
                             first.params_before if first else count_params(old), count_params(new),
                             'kept' if new is old and first is None else 'fused')
        undo.pop_all()
    replaced = sum(row.status == 'fused' for row in rows.values())
    if replaced and trainable:
        logger.warning('fuse() replaced the parameters of %d modules: an optimizer, EMA or DDP made before it is stale '
                       'and must be made anew', replaced)
    return Report(rows.values(), before, count_params(model))


def count_params(module: nn.Module) -> int:
    """Number of parameter elements, tied ones once."""
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------------------------------
class _Rule(NamedTuple):
    cls: type[Reparam]
    at: str
    which: tuple[str, Any]
    cfg: dict
    where: str


def _parse_rule(rule: dict, number: int) -> _Rule:
    where = f'rule {number}'
    if not isinstance(rule, dict):
        raise TypeError(f'{where}: expected a dict like dict(type=..., at=...), got {rule!r}')
    for key in ('type', 'at'):
        if key not in rule:
            raise TypeError(f'{where}: {key!r} is missing in {dict(rule)!r}')
    cls = MODELS.get(rule['type']) if isinstance(rule['type'], str) else rule['type']
    if not (inspect.isclass(cls) and issubclass(cls, Reparam)):
        raise TypeError(f'{where}: type {rule["type"]!r} is no Reparam')
    where = f'{where} ({cls.__name__} at {rule["at"]!r})'
    if not isinstance(rule['at'], str) or not rule['at']:
        raise TypeError(f'{where}: at is a module name, with * for any part of it')
    cfg = {key: value for key, value in rule.items() if key not in RULE_KEYS}
    parameters = list(inspect.signature(cls.expand).parameters.values())[1:]  # the first one is the plain module
    accepted = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in cfg:
        if key not in accepted and not open_ended:
            raise TypeError(f'{where}: unknown key {key!r}; {nearest(key, accepted | set(RULE_KEYS))}')
    given = [(key, rule[key]) for key in ('every', 'last', 'index') if rule.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f'{where}: give one of every, last and index, not {" and ".join(k for k, _ in given)}')
    which = given[0] if given else ('every', 1)
    if which[0] == 'index':
        if not isinstance(which[1], (list, tuple, range)) or not which[1] or not all(map(_is_int, which[1])):
            raise ValueError(f'{where}: index is a list of positions, got {which[1]!r}')
    elif not _is_int(which[1]) or which[1] < 1:
        raise ValueError(f'{where}: {which[0]} is a positive integer, got {which[1]!r}')
    return _Rule(cls, rule['at'], which, cfg, where)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def glob(pattern: str) -> re.Pattern:
    """``*`` and ``?`` of a module name: they match within one dotted part."""
    return re.compile(re.escape(pattern).replace(r'\*', '[^.]*').replace(r'\?', '[^.]'))


def _select(model: nn.Module, rule: _Rule) -> list[tuple[str, nn.Module]]:
    """The modules that a rule means, in the order of ``named_modules()``, each once under its first matching name."""
    names = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    pattern, seen, matches = glob(rule.at), set(), []
    for name, module in names.items():
        if pattern.fullmatch(name) and id(module) not in seen:
            seen.add(id(module))
            matches.append((name, module))
    if not matches:
        raise ValueError(f'{rule.where}: matches no module; {_nearby(rule.at, names)}')
    option, value = rule.which
    if option == 'index':
        wrong = [i for i in value if not -len(matches) <= i < len(matches)]
        if wrong:
            raise ValueError(f'{rule.where}: index {wrong} is out of range, there are {len(matches)} matches')
        chosen = [matches[i] for i in sorted({i % len(matches) for i in value})]
    else:
        if value > len(matches):
            raise ValueError(f'{rule.where}: {option}={value} selects nothing of {len(matches)} matches'
                             if option == 'every' else
                             f'{rule.where}: last={value}, but there are only {len(matches)} matches')
        chosen = matches[value - 1::value] if option == 'every' else matches[-value:]
    for name, module in chosen:
        _refuse_unaccepted(model, name, module, rule)
    return chosen


def _expand(model: nn.Module, name: str, plain: nn.Module, rule: _Rule, position: int, total: int) -> nn.Module:
    try:
        for around in _places(model, plain):
            rule.cls.check_place(plain, around)
        new = rule.cls.expand(plain, **rule.cls.at_depth(rule.cfg, position, total))
    except Exception as error:
        if error.args and isinstance(error.args[0], str):  # the same exception, so that its type and attributes stay
            error.args = (f'{rule.where}: {name!r}: {error.args[0]}', *error.args[1:])
        raise
    if not isinstance(new, (Reparam, Fused)):
        raise TypeError(f'{rule.where}: {name!r}: expand() returned {type(new).__name__}, not a Reparam')
    return new


def _places(model: nn.Module, module: nn.Module) -> Iterator[list[nn.Module]]:
    """Of every place of ``module``: the modules that hold it, the nearest first."""
    for name, found in list(model.named_modules(remove_duplicate=False)):
        if found is module:
            parts = name.split('.')
            yield [model.get_submodule('.'.join(parts[:depth])) for depth in range(len(parts) - 1, -1, -1)]


def _nearby(pattern: str, names: Iterable[str]) -> str:
    """A phrase that names modules of the model that look like the pattern; numbers count as one form."""
    forms = {re.sub(r'(?<![^.])\d+(?![^.])', '*', name): name for name in names}
    close = difflib.get_close_matches(pattern, forms, n=4, cutoff=0.3)
    if not close:
        return nearest(pattern, forms)
    return 'modules that look like it: ' + ', '.join(repr(form) for form in close)


def _refuse_unaccepted(model: nn.Module, name: str, module: nn.Module, rule: _Rule) -> None:
    """A Reparam at or above the module must be one that the rule's class accepts."""
    parts = name.split('.')
    for depth in range(len(parts), 0, -1):
        above = '.'.join(parts[:depth])
        holder = model.get_submodule(above)
        if not isinstance(holder, Reparam):
            continue
        names = {cls.__name__ for cls in type(holder).__mro__}
        if not any(names & {a} if isinstance(a, str) else isinstance(holder, a) for a in rule.cls.accepts):
            place = 'is already' if depth == len(parts) else f'is inside {above!r}, which is already'
            raise ValueError(f'{rule.where}: {name!r} {place} a {type(holder).__name__}, which {rule.cls.__name__} '
                             f'does not accept; change or reorder the rules')
        return


def _refuse_fused_kernel(model: nn.Module, name: str, plain: nn.Module) -> None:
    """In eval, torch's own encoder layer hands its children's weights to one kernel instead of calling them."""
    for parent_name, parent in model.named_modules():
        if isinstance(parent, nn.TransformerEncoderLayer) and any(child is plain for child in parent.children()):
            raise ValueError(f'{name} cannot be replaced: {parent_name or "the model"} is a TransformerEncoderLayer, '
                             f'which reads the weights of its children itself in eval mode. Blocks that call their FFN '
                             f'as a module can be expanded (ewa3d.layers.block.Block, timm\'s, torchvision\'s)')


def _refuse_untied(model: nn.Module, name: str, plain: nn.Module, new: nn.Module) -> None:
    """Replacing one of two modules that share a parameter would silently untie them."""
    own, held = {id(p) for p in plain.parameters()}, {id(p) for p in new.parameters()}
    inside = set(plain.modules())
    for other_name, other in model.named_modules():
        if other in inside:
            continue
        for key, parameter in other.named_parameters(recurse=False):
            if id(parameter) in own - held:
                full = f'{other_name}.{key}'.lstrip('.')
                raise ValueError(f'{name!r} shares a parameter with {full!r}: expanding it would untie the two. Share '
                                 f'the whole module instead, or untie them first')


# ---------------------------------------------------------------------------------------------------------------------
# Replacing
# ---------------------------------------------------------------------------------------------------------------------
_HOOKS = ('_forward_hooks', '_forward_hooks_with_kwargs', '_forward_hooks_always_called', '_forward_pre_hooks',
          '_forward_pre_hooks_with_kwargs', '_backward_hooks', '_backward_pre_hooks', '_is_full_backward_hook')


def replace(model: nn.Module, old: nn.Module, new: nn.Module):
    """Put ``new`` wherever ``old`` is in ``model``, in the same mode and with its hooks; returns what undoes it."""
    places = [(parent, key) for parent in model.modules() if parent is not new
              for key, child in parent._modules.items() if child is old]
    if new.training != old.training:
        new.train(old.training)
    for attribute in _HOOKS:  # the dictionaries themselves, so that RemovableHandles keep working
        new.__dict__[attribute] = old.__dict__[attribute]

    def put(module: nn.Module) -> None:
        for parent, key in places:
            parent._modules[key] = module

    put(new)
    return lambda: put(old)


def _next_reparam(model: nn.Module, kept: set) -> tuple[str, Reparam] | None:
    closed = tuple(f'{name}.' for name, module in model.named_modules() if module in kept and module.opaque)
    for name, module in model.named_modules():  # parents come before their children
        if isinstance(module, Reparam) and module not in kept and not name.startswith(closed):
            return name, module
    return None


def refuse_wrapped(model: nn.Module, action: str) -> None:
    """DDP, FSDP and compiled wrappers hold on to the parameters or the code that is about to change."""
    for name, module in model.named_modules():
        inner = wrapped_attribute(module)
        if inner:
            what = f'its module {name!r}' if name else 'the model'
            path = f'model.{name}.{inner}' if name else f'model.{inner}'
            raise ValueError(f'{action}() needs the unwrapped model: {what} is a {type(module).__name__}, which would '
                             f'keep the old parameters; pass the module inside ({path}) and wrap the result again')
    for name, parameter in model.named_parameters():
        if hasattr(parameter, 'full_tensor'):  # a DTensor, of fully_shard or of tensor parallelism
            raise ValueError(f'{action}() needs a model whose parameters are whole, and {name} is a DTensor, of which '
                             f'each rank has a part: {_WHOLE[action]}')


_WHOLE = {'expand': 'expand first and call fully_shard then',
          'fuse': 'gather its state dict (get_model_state_dict of torch.distributed.checkpoint.state_dict, with '
                  'full_state_dict=True), load that into the same model without shards, and fuse this one'}


def wrapped_attribute(module: nn.Module) -> str | None:
    """Where a wrapper keeps the module it wraps: ``'module'``, ``'_orig_mod'``; ``None`` where it is no wrapper."""
    names = {cls.__name__ for cls in type(module).__mro__}
    if names & {'DistributedDataParallel', 'DataParallel', 'FullyShardedDataParallel'}:
        return 'module'
    return '_orig_mod' if 'OptimizedModule' in names else None
