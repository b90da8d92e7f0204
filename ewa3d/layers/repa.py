"""Channel-idle FFNs (RePaViT, arXiv 2505.21847): hidden channels that skip the activation fold into one linear map.

Two forms. Norm-free, in place of the FFN of an existing model: two linear maps become ``C → A``, ``A → C`` and, for all
idle channels together, ``C → C``. With batch norm, in place of a block: the layer norm before the FFN becomes a batch
norm and a second one stands before ``fc2``, so that the norms and the shortcut fold into the three maps as well.
"""
import copy
import math

from torch import nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.block import Mlp
from ewa3d.layers.channels import ChannelIdle, TokenBatchNorm
from ewa3d.layers.folding import FoldedFFN, check_eval, fold
from ewa3d.layers.repa_block import FoldedBlock, RePaBlock
from ewa3d.layers.stacked import check_choice, is_mlp, is_pointwise
from ewa3d.registry import MODELS
from ewa3d.reparam import Reparam

__all__ = ['FoldedBlock', 'FoldedFFN', 'RePaBlock', 'RePaFFN', 'active_channels', 'fold', 'idle_ratios']

SCHEDULES = ('static', 'linear')


def active_channels(hidden: int, idle_ratio: float) -> int:
    """How many of ``hidden`` channels are activated: the share that is not idle, rounded up (in double precision, where
    it may come out one higher than on paper)."""
    return math.ceil(hidden * (1 - check_number('idle_ratio', idle_ratio, '[0, 1]')))


def idle_ratios(depth: int, idle_ratio: float = 0.5, schedule: str = 'static') -> list[float]:
    """The idle ratio of each of ``depth`` blocks.

    Args:
        schedule: ``'static'``, the same everywhere; ``'linear'``, rising with a mean of about ``idle_ratio`` up to 1 in
            the last block but one, and 0 in the last.

    Raises:
        ValueError: a ratio outside [0, 1], also one that the linear schedule of a small ratio and many blocks starts
            with; a schedule that is none. TypeError: a number of the wrong kind.
    """
    check_integer('depth', depth, 1)
    check_number('idle_ratio', idle_ratio, '[0, 1]')
    check_choice('schedule', schedule, SCHEDULES)
    if schedule == 'static':
        return [float(idle_ratio)] * depth
    rise = (2 - 2 * idle_ratio) / max(depth - 1, 1)
    ratios = [2 * idle_ratio - 1 + rise * (i + 1) for i in range(depth - 1)]
    if ratios and ratios[0] < 0:
        raise ValueError(f"schedule='linear' with idle_ratio={idle_ratio} would start at {ratios[0]:.3g} in {depth} "
                         f'blocks; use idle_ratio >= {(1 - 2 / (depth - 1)) / (2 - 2 / (depth - 1)):.3g}')
    return [*(min(ratio, 1.) for ratio in ratios), 0.]


@MODELS.register_module()
class RePaFFN(Reparam, Mlp):
    """An FFN in which only the first ``A = ceil(hidden · (1 - idle_ratio))`` hidden channels are activated.

    By itself it is a module with timm's signature. :meth:`expand` makes it of an FFN of two linear maps with an
    activation between them, or of a whole block (see :class:`RePaBlock`). Eval mode folds to :class:`FoldedFFN`.

    As an expert inside EWA, by a second rule at the same ``mlp``, experts are averaged first and folded after; batch
    norms see all tokens and are shared by the experts.

    Args:
        in_features, hidden_features, out_features, act_layer, bias, drop: as timm's ``Mlp``.
        norm_layer: none; a norm between the linear maps is what ``norm`` says.
        idle_ratio: in [0, 1].
        norm: ``'none'``, or ``'batch'`` for a batch norm before ``fc2``.

    Shape:
        - ``(..., in_features)`` to ``(..., out_features)``.

    Raises:
        ValueError: an idle ratio outside [0, 1], an activation that is not one for each channel alone, another norm.
    """
    preserves = False
    has_fused_form = True

    def __init__(self, in_features: int, hidden_features: int | None = None, out_features: int | None = None,
                 act_layer=nn.GELU, norm_layer=None, bias: bool = True, drop: float = 0., idle_ratio: float = 0.5,
                 norm: str = 'none', device=None, dtype=None):
        check_choice('norm', norm, ('none', 'batch'))
        if norm_layer is not None:
            raise ValueError(f"norm_layer={norm_layer!r} cannot be folded; norm='batch' can")
        Mlp.__init__(self, in_features, hidden_features, out_features, act_layer, None, bias, drop, device, dtype)
        self._renames: dict[str, str] = {}
        self._idle(idle_ratio, norm)

    def _idle(self, idle_ratio: float, norm: str) -> None:
        hidden = self.fc1.out_features
        if not is_pointwise(self.act):
            raise ValueError(f'{type(self.act).__name__} is not known to act on each channel alone')
        self.act = ChannelIdle(self.act, active_channels(hidden, idle_ratio))
        self.norm = nn.Identity() if norm == 'none' else \
            TokenBatchNorm(hidden, device=self.fc1.weight.device, dtype=self.fc1.weight.dtype)

    @classmethod
    def at_depth(cls, cfg: dict, position: int, total: int) -> dict:
        if cfg.get('schedule', 'static') == 'static':
            return cfg
        ratios = idle_ratios(total, cfg.get('idle_ratio', 0.5), cfg['schedule'])
        return {**cfg, 'idle_ratio': ratios[position], 'schedule': 'static'}

    @classmethod
    def expand(cls, plain: nn.Module, idle_ratio: float = 0.5, norm: str | None = None, schedule: str = 'static',
               fused: bool = False) -> nn.Module:
        """The channel-idle form of an FFN or of a block, with the weights of its linear maps.

        Args:
            plain: timm's ``Mlp`` or ours, a ``Sequential`` of linear, activation, linear and dropouts; or a block with
                ``norm1 attn norm2 mlp`` that adds both branches to its input.
            idle_ratio: in [0, 1]; of the first chosen module in a schedule's formula, see :func:`idle_ratios`.
            norm: ``'none'`` or ``'batch'``; by default none for an FFN and batch for a block, where the shortcut and
                the norm before the FFN fold too.
            schedule: ``'static'`` or ``'linear'`` over the modules that a rule chooses.
            fused: give the folded form at once, for fused weights.

        Raises:
            TypeError: an FFN of another form, or a block that computes something else.
            ValueError: an idle ratio outside [0, 1], another ``norm`` or ``schedule``.
        """
        check_choice('schedule', schedule, SCHEDULES)
        if schedule != 'static':
            raise ValueError(f'schedule={schedule!r} is one over the modules of a rule: use ewa3d.expand(model, rules)')
        if norm is not None:
            check_choice('norm', norm, ('none', 'batch'))
        if isinstance(getattr(plain, 'mlp', None), nn.Module):
            if norm == 'none':
                raise ValueError("norm='none' is the form for an FFN: name the block's mlp in the rule")
            new = RePaBlock(plain, cls.expand(plain.mlp, idle_ratio, 'batch'))
        else:
            new = cls._of_ffn(plain, idle_ratio, norm or 'none')
        new.train(plain.training)
        return new.eval().fuse().train(plain.training) if fused else new

    @classmethod
    def _of_ffn(cls, plain: nn.Module, idle_ratio: float, norm: str) -> 'RePaFFN':
        parts, renames = _parts(plain)
        new = object.__new__(cls)
        nn.Module.__init__(new)
        new._renames = renames
        for name in ('fc1', 'act', 'drop1', 'norm', 'fc2', 'drop2'):
            new.add_module(name, copy.deepcopy(parts.get(name)) or nn.Identity())
        new._idle(idle_ratio, norm)
        if isinstance(new.norm, TokenBatchNorm):
            new.norm.requires_grad_(new.fc2.weight.requires_grad)
        return new

    def fuse(self) -> 'FoldedFFN':
        """Three linear maps.

        Raises:
            ValueError: in training mode, where batch statistics and dropout are something else.
        """
        check_eval(self)
        return fold(self)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for key in [key for key in state_dict if self._renames and key.startswith(prefix)]:
            first, _, rest = key[len(prefix):].partition('.')
            if first in self._renames:
                state_dict[f'{prefix}{self._renames[first]}.{rest}'] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _parts(plain: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers of an FFN by timm's names, and how those of a ``Sequential`` are renamed."""
    wanted = f'RePaFFN needs linear, activation, linear (timm\'s Mlp, or a Sequential of them); {type(plain).__name__}'
    if is_mlp(plain):
        if not isinstance(plain.norm, nn.Identity):
            raise TypeError(f'{wanted} has a {type(plain.norm).__name__} between them, which cannot be folded')
        parts, renames = dict(plain.named_children()), {}
    elif isinstance(plain, nn.Sequential) and type(plain).forward is nn.Sequential.forward:
        layers = {k: m for k, m in plain.named_children() if not isinstance(m, (nn.Dropout, nn.Identity))}
        drops = [m for m in plain.children() if isinstance(m, nn.Dropout)]
        if len(layers) != 3 or len(drops) > 2:
            raise TypeError(f'{wanted} has the layers {", ".join(type(m).__name__ for m in plain.children())}')
        parts = dict(zip(('fc1', 'act', 'fc2'), layers.values()))
        order = list(plain.children())
        for drop in drops:
            parts['drop2' if order.index(drop) > order.index(parts['fc2']) else 'drop1'] = drop
        renames = {old: new for old, new in zip(layers, ('fc1', 'act', 'fc2')) if new != 'act'}
    else:
        raise TypeError(f'{wanted} is another FFN')
    if not all(type(parts[name]).forward is nn.Linear.forward for name in ('fc1', 'fc2')):
        raise TypeError(f'{wanted} has other layers than plain linear ones')
    if not is_pointwise(parts['act']):
        raise TypeError(f'{wanted} has {type(parts["act"]).__name__} as activation, which is not known to act on each '
                        'channel alone')
    return parts, renames
