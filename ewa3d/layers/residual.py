"""Residual mixture of experts (RMoE, arXiv 2204.09636): expert i is a shared core plus a residual of its own.

The weights factor into an input-independent core and input-dependent residuals, so that a dense checkpoint becomes a
mixture that starts as the dense model, and the residuals are cheap to train.
"""
import copy

import torch
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.moe import RoutedFFN
from ewa3d.layers.stacked import check_plain, upgrade_keys
from ewa3d.registry import MODELS

__all__ = ['ResidualMoEFFN', 'Residuals']


class Residuals(nn.Module):
    """E differences to the parameters of a plain module, by their names: ``(E, ...)`` each, zero at first.

    Args:
        plain: the module. num_experts: E.
        rank: of the residuals of matrices, as ``up @ down`` with ``(E, H, r)`` and ``(E, r, C)``; ``None`` for full
            ones. Parameters of other dimensions have full residuals.

    Raises:
        ValueError: a rank larger than a matrix has.
    """

    def __init__(self, plain: nn.Module, num_experts: int, rank: int | None = None):
        super().__init__()
        self._names: dict[str, str] = {}  # tied parameters have one residual
        first: dict[int, str] = {}
        for name, parameter in plain.named_parameters(remove_duplicate=False):
            self._names[name] = first.setdefault(id(parameter), name)
        for name, parameter in plain.named_parameters():
            zeros = parameter.detach().new_zeros(num_experts, *parameter.shape)
            if rank is None or parameter.ndim != 2:
                self._put(name, zeros, parameter.requires_grad)
                continue
            rows, columns = parameter.shape
            if rank > min(rows, columns):
                raise ValueError(f'rank={rank} is larger than that of {name}, which is {rows} × {columns}')
            self._put(f'{name}_up', zeros[:, :, :rank].clone(), parameter.requires_grad)
            down = torch.randn_like(zeros[:, :rank]) * columns ** -0.5
            self._put(f'{name}_down', down, parameter.requires_grad)

    def _put(self, name: str, value: Tensor, requires_grad: bool) -> None:
        *path, leaf = name.split('.')
        node = self
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]
        node.register_parameter(leaf, nn.Parameter(value, requires_grad))

    def of(self, name: str) -> Tensor:
        """``(E, ...)``: the residuals of one parameter."""
        *path, leaf = self._names[name].split('.')
        node = self
        for part in path:
            node = node._modules[part]
        full = node._parameters.get(leaf)
        return node._parameters[f'{leaf}_up'] @ node._parameters[f'{leaf}_down'] if full is None else full


@MODELS.register_module()
class ResidualMoEFFN(RoutedFFN):
    """A core FFN with E residuals in place of one FFN: ``y = Σ g_i(x) · FFN(x; core + residual_i)`` over the k chosen.

    The core has the plain FFN's names and shapes, so a dense checkpoint loads into it; what is new are
    ``residual.*`` and ``router.weight``. With zero residuals and gates that sum to one it computes what the core does.
    Decay of the residuals pulls experts to the core, as averaging does. It stays a mixture; :meth:`to_dense` drops the
    residuals or takes their mean.

    Build it with :meth:`expand`. :func:`ewa3d.param_groups` gives the core a learning rate of its own by
    ``core_lr_mult``.

    Shape:
        - ``(..., C)`` to ``(..., C')`` as the plain FFN.

    Raises:
        ValueError: tokens of another width than the router's.
        TypeError: in training, an FFN that does not map tokens one by one.
    """
    DENSE = ('core', 'mean')
    accepts = ('RePaFFN',)

    def __init__(self, plain: nn.Module, num_experts: int, rank: int | None = None):
        check_plain(plain)
        check_integer('num_experts', num_experts, 2)
        super().__init__(copy.deepcopy(plain), num_experts)
        self.can_average = rank is None
        self.add_own('residual', Residuals(plain, num_experts, rank))

    @classmethod
    def expand(cls, plain: nn.Module, num_experts: int = 4, top_k: int = 2, capacity_factor: float | None = None,
               eval_capacity_factor: float | None = None, gate_mode: str = 'renorm', balance_weight: float = 0.01,
               z_weight: float = 0., freeze_core: bool = False, rank: int | None = None, init_noise_std: float = 0.,
               in_features: int | None = None) -> 'ResidualMoEFFN':
        """A residual mixture that starts as the plain FFN.

        Args:
            plain: any module that maps tokens one by one, with at least one parameter; it becomes the core.
            num_experts, top_k, capacity_factor, eval_capacity_factor, gate_mode, balance_weight, z_weight,
                in_features: as for :class:`~ewa3d.layers.moe.MoEFFN`; nothing is dropped unless a factor is given, and
                ``'raw'`` gates do not keep the plain function.
            freeze_core: train the residuals and the router alone.
            rank: low-rank residuals of matrices; ``None`` for full ones.
            init_noise_std: standard deviation of the residuals at first (of ``up`` where they are low-rank).

        Raises:
            TypeError, ValueError: as for ``MoEFFN``; ``freeze_core`` is no bool; a rank below 1 or larger than a matrix
                has.
        """
        check_number('init_noise_std', init_noise_std, '[0, inf)')
        if not isinstance(freeze_core, bool):
            raise TypeError(f'freeze_core must be True or False, got {freeze_core!r}')
        module = cls(plain, num_experts, None if rank is None else check_integer('rank', rank, 1))
        module.setup_routing(in_features, top_k, capacity_factor, eval_capacity_factor, gate_mode, balance_weight,
                             z_weight)
        if init_noise_std:
            for name, parameter in module.residual.named_parameters():
                if not name.endswith('_down'):
                    nn.init.normal_(parameter, std=init_noise_std)
        if freeze_core:
            module.body().requires_grad_(False)
        return module

    def core_parameters(self) -> list[nn.Parameter]:
        return list(self.body().parameters())

    def expert_parameters(self) -> list[nn.Parameter]:
        return list(self.residual.parameters())

    def stacked(self, name: str, tensor: Tensor) -> Tensor | None:
        """The core's parameter plus the residuals; buffers are the core's."""
        return tensor + self.residual.of(name) if isinstance(tensor, nn.Parameter) else None

    def to_dense(self, how: str = 'core') -> nn.Module:
        """One plain FFN in place of the mixture, which is another function.

        Args:
            how: ``'core'`` without the residuals, or ``'mean'`` with their mean.
        """
        if how == 'core':
            return self.plain({id(t): t for t in (*self.body().parameters(), *self.body().buffers())})
        return super().to_dense(how)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        upgrade_keys(self._plain, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
