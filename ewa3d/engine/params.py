"""Parameter groups: no weight decay by *name*, and learning rates of their own for experts and state spaces.

Rules by ``param.ndim == 1`` alone would decay the experts' biases and norms, which have a leading expert dimension.
"""
import copy
import re
from collections.abc import Iterable

from mmengine.model import is_model_wrapper
from torch import nn

from ewa3d.checks import check_number
from ewa3d.layers.experts import iter_experts
from ewa3d.layers.ssm import state_space_parameters
from ewa3d.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, nearest

__all__ = ['NO_DECAY', 'ParamGroups', 'freeze', 'layer_numbers', 'param_groups']

NO_DECAY = ('bias', 'norm', 'token')
"""The names that Point-MAE leaves without decay (besides everything one-dimensional); its ``cls_pos`` decays."""

KINDS = tuple(f'{kind}{rule}' for kind in ('', 'experts.', 'core.', 'ssm.') for rule in ('decay', 'no_decay'))
_NORMS = tuple(getattr(nn, name) for name in ('LayerNorm', 'GroupNorm', 'RMSNorm', 'LocalResponseNorm')
               if hasattr(nn, name)) + (nn.modules.batchnorm._NormBase,)


def param_groups(model: nn.Module, lr: float | None = None, weight_decay: float | None = None,
                 no_decay: Iterable[str] = NO_DECAY, expert_lr_mult: float = 1.,
                 core_lr_mult: float = 1., layer_decay: float = 1., ssm_lr: float | None = 1e-3) -> list[dict]:
    """Groups for an optimizer, in a fixed order: ``decay``, ``no_decay``, ``experts.decay``, ``experts.no_decay``, and
    where there are residual mixtures, ``core.decay``, ``core.no_decay``; of state spaces, ``ssm.no_decay``.

    Not decayed are: parameters that are one-dimensional in the plain model, so that a stacked bias is as safe as a
    plain one; parameters of normalisation layers whatever they are called; names that ``no_decay`` covers, or that a
    module's ``no_weight_decay()`` returns, as timm's models have it. Frozen parameters are left out, tied ones come
    once, empty groups not at all.

    Args:
        lr: of the plain parameters; the experts' is ``lr * expert_lr_mult``. ``None`` leaves it to the optimizer.
        weight_decay: of the decayed groups; ``None`` leaves it to the optimizer.
        no_decay: whole words of a parameter's dotted name: ``'token'`` covers ``cls_token`` and not ``tokenizer``,
            ``'norm'`` covers ``norm1`` and ``layer_norm``; ``'blocks.0'`` and ``*`` (within one part) work as well.
        expert_lr_mult: between 1 and √E makes up for what averaging takes from the steps of Adam-like optimizers.
        core_lr_mult: for the cores of residual mixtures. To freeze them, expand with ``freeze_core=True``.
        layer_decay: below 1, each block's learning rate is this share of the next one's, the last block's is this share
            of ``lr``, and what comes before the first block has one share less than it. These are then the groups of
            each layer, ``layer0.decay`` and so on (see :func:`layer_numbers`).
        ssm_lr: the largest learning rate of the step sizes, poles and input maps of state spaces (S4, S4D), which are
            not decayed; ``None`` sets no limit.

    Returns:
        Dicts with ``params``, ``name``, ``weight_decay`` (0 where not decayed) and ``lr``.

    Raises:
        ValueError: a multiplier or ``ssm_lr`` is not above 0 or infinite, or needs an ``lr``; a name that matches no
            parameter and is not one of the defaults; nothing to train; ``layer_decay`` is not in (0, 1], or needs an
            ``lr`` or a model with blocks.
        TypeError: ``no_decay`` is one string, or a multiplier no number.
    """
    mults = dict(experts=check_number('expert_lr_mult', expert_lr_mult, '(0, inf)'),
                 core=check_number('core_lr_mult', core_lr_mult, '(0, inf)'))
    if isinstance(no_decay, str):
        raise TypeError(f'no_decay is a list of names, got the string {no_decay!r}')
    experts = {id(p) for _, module in iter_experts(model) for p in module.expert_parameters()}
    cores = {id(p) for _, module in iter_experts(model) for p in module.core_parameters()}
    for held, key in ((experts, 'expert_lr_mult'), (cores, 'core_lr_mult')):
        if lr is None and held and (expert_lr_mult if held is experts else core_lr_mult) != 1:
            raise ValueError(f'{key} needs a learning rate to multiply: give lr')
    spaces = {id(p) for p in state_space_parameters(model)}
    if ssm_lr is not None:
        check_number('ssm_lr', ssm_lr, '(0, inf)')
        if lr is None and spaces:
            raise ValueError('state spaces learn at the smaller one of lr and ssm_lr: give lr, or ssm_lr=None')
    check_number('layer_decay', layer_decay, '(0, 1]')
    if lr is None and layer_decay != 1:
        raise ValueError('layer_decay needs a learning rate to multiply: give lr')
    covered = _covered([name for name, _ in model.named_parameters()], tuple(no_decay)) | _spared_by_modules(model)
    layers = layer_numbers(model) if layer_decay != 1 else {}
    top = max(layers.values(), default=0)
    groups: dict[tuple[int, str], list] = {}
    norms = {id(p) for module in model.modules() if _is_norm(module) for p in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():  # each once, under its first name
        if parameter.requires_grad:
            is_expert = id(parameter) in experts
            flat = parameter.ndim - is_expert <= 1
            is_space = id(parameter) in spaces
            spared = flat or is_space or id(parameter) in norms or name in covered
            kind = 'experts.' if is_expert else 'core.' if id(parameter) in cores else 'ssm.' if is_space else ''
            kind += 'no_decay' if spared else 'decay'
            groups.setdefault((layers.get(name, top), kind), []).append(parameter)
    if not groups:
        raise ValueError(f'{type(model).__name__} has no parameter that requires a gradient')
    return [_group(f'layer{layer}.{kind}' if layers else kind, groups[layer, kind],
                   None if lr is None else lr * layer_decay ** (top - layer), weight_decay, mults, ssm_lr)
            for layer in range(top + 1) for kind in KINDS if (layer, kind) in groups]


def freeze(model: nn.Module, trainable: Iterable[str]) -> list[str]:
    """Train the parameters that ``trainable`` covers and freeze all others: no gradient, no decay, no step.

    A frozen backbone with adapters, its final norm and the head (ZeroI2V)::

        freeze(model, ['adapter', 'temporal_embed', 'backbone.norm.*', 'head'])

    Call it before the optimizer and DDP are made; ``TaskModel(trainable=[...])`` does. Running statistics of frozen
    batch norms are no parameters and go on.

    Args:
        trainable: whole words of parameters' names, as ``no_decay`` of :func:`param_groups`. (``'backbone.norm'`` would
            cover ``backbone.norm_pre``, too; ``'backbone.norm.*'`` does not.)

    Returns:
        The names of the parameters that are trained.

    Raises:
        TypeError: ``trainable`` is one string. ValueError: a name that matches no parameter.
    """
    if isinstance(trainable, str):
        raise TypeError(f'trainable is a list of names, got the string {trainable!r}')
    parameters = dict(model.named_parameters())
    chosen = _covered([*parameters], tuple(trainable), 'trainable')
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    return [name for name in parameters if name in chosen]


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """The layer of every parameter, in the order in which the model names them: 0 before its first block, then the
    blocks' 1, 2, … (through all stages of a Swin), and one more behind the last: the final norm, neck and head.

    Blocks are what is called ``blocks.N`` (``layers.M.blocks.N``).

    Raises:
        ValueError: the model has no blocks.
    """
    found = {name: re.match(r'(.*?\bblocks\.\d+)\.', name) for name, _ in model.named_parameters()}
    blocks = list(dict.fromkeys(match[1] for match in found.values() if match))
    if not blocks:
        raise ValueError(f'layer_decay: {type(model).__name__} has no parameters called blocks.0.…, blocks.1.…')
    numbers, behind = {}, 0
    for name, match in found.items():
        behind = blocks.index(match[1]) + 1 if match else behind
        last = not match and behind == len(blocks)
        numbers[name] = behind + last
    return numbers


def _group(name: str, parameters: list, lr: float | None, weight_decay: float | None, mults: dict[str, float],
           ssm_lr: float | None) -> dict:
    group = dict(params=parameters, name=name)
    if lr is not None:
        group['lr'] = lr * next((mult for kind, mult in mults.items() if kind in name.split('.')), 1.)
        if 'ssm' in name.split('.') and ssm_lr is not None:
            group['lr'] = min(lr, ssm_lr)
    if name.endswith('no_decay'):
        group['weight_decay'] = 0.
    elif weight_decay is not None:
        group['weight_decay'] = weight_decay
    return group


def _spared_by_modules(model: nn.Module) -> set[str]:
    """Names that ``no_weight_decay()`` of the model or of a part of it returns."""
    spared = set()
    for prefix, module in model.named_modules():
        names = getattr(module, 'no_weight_decay', None)
        if callable(names):
            spared |= {f'{prefix}.{name}'.lstrip('.') for name in names()}
    return spared


def _covered(names: list[str], patterns: tuple[str, ...], key: str = 'no_decay') -> set[str]:
    """The names in which a pattern stands as whole words; words end at dots, underscores and digits."""
    covered = set()
    for pattern in patterns:
        words = re.compile(rf'(^|[._]){re.escape(pattern)}\d*($|[._])'.replace(r'\*', '[^.]*'))
        hits = {name for name in names if words.search(name)}
        if not hits and (key != 'no_decay' or pattern not in NO_DECAY):
            parts = {part for name in names for part in name.split('.')}
            raise ValueError(f'{key} name {pattern!r} matches no parameter; {nearest(pattern, parts)}')
        covered |= hits
    return covered


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or any('norm' in cls.__name__.lower() for cls in type(module).__mro__[:-2])


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ParamGroups:
    """:func:`param_groups` for mmengine: ``optim_wrapper=dict(constructor='ParamGroups', paramwise_cfg=dict(...))``.

    Schedulers scale each group's own initial learning rate, so the experts' multiplier lasts.

    Args:
        optim_wrapper_cfg: config of the optimizer wrapper, with ``optimizer``.
        paramwise_cfg: ``no_decay``, ``expert_lr_mult``, ``core_lr_mult``, ``layer_decay`` and ``ssm_lr`` of
            :func:`param_groups`.

    Raises:
        TypeError: an unknown key of ``paramwise_cfg``, or no ``optimizer``.
    """
    KEYS = ('no_decay', 'expert_lr_mult', 'core_lr_mult', 'layer_decay', 'ssm_lr')

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        if not isinstance(optim_wrapper_cfg, dict) or 'optimizer' not in optim_wrapper_cfg:
            raise TypeError(f'optim_wrapper is a dict with an optimizer, got {optim_wrapper_cfg!r}')
        for key in paramwise_cfg or {}:
            if key not in self.KEYS:
                raise TypeError(f'paramwise_cfg takes no {key!r}; {nearest(key, self.KEYS)}')
        self.optim_wrapper_cfg = copy.deepcopy(optim_wrapper_cfg)
        self.paramwise_cfg = dict(paramwise_cfg or {})

    def __call__(self, model: nn.Module):
        """The optimizer wrapper for ``model``."""
        wrapper = copy.deepcopy(self.optim_wrapper_cfg)
        wrapper.setdefault('type', 'OptimWrapper')
        optimizer = wrapper.pop('optimizer')
        model = model.module if is_model_wrapper(model) else model
        groups = param_groups(model, optimizer.get('lr'), optimizer.get('weight_decay'), **self.paramwise_cfg)
        return OPTIM_WRAPPERS.build(wrapper, default_args=dict(optimizer=OPTIMIZERS.build(dict(optimizer,
                                                                                               params=groups))))
