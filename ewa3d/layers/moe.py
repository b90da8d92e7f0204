"""Mixtures of experts: a router sends each token to its k best experts, in training and after it.

:class:`RoutedFFN` is what the naive mixture here and the residual one (``residual.py``) share. Losses and statistics of
the routing arrive in the loss dict of an :class:`~ewa3d.models.base.ExpandableModel` by themselves; a loop of one's
own adds ``sum(routing_losses(model).values())``.
"""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.channels import TokenBatchNorm
from ewa3d.layers.partition import autocast
from ewa3d.layers.routing import (
    Choice,
    Router,
    Routes,
    balance_loss,
    capacity_of,
    combine,
    load_of,
    route,
    router_z_loss,
)
from ewa3d.layers.stacked import Experts, StackedExperts, add_noise, check_choice, rows_like
from ewa3d.registry import MODELS
from ewa3d.reparam import Report, Row, count_params, refuse_wrapped, replace

__all__ = ['MoEFFN', 'RoutedFFN', 'begin_routing', 'routing_losses', 'routing_stats', 'to_dense']


class RoutedFFN(Experts):
    """Experts that a router chooses: what is common to all parametrisations of their weights.

    It stays a mixture: :meth:`fuse` returns itself, since what it computes depends on the token.

    Attributes:
        routing: what the last training forward left for :func:`routing_losses`, or ``None``.
        add_up: further calls before it is taken add to it (a layer at several places of a model).

    Shape:
        - ``(..., C)`` to ``(..., C')`` as the plain FFN.
    """
    averaged = False
    DENSE = ('mean',)  # what to_dense() knows

    def setup_routing(self, in_features: int | None, top_k: int, capacity_factor: float | None,
                      eval_capacity_factor: float | None, gate_mode: str, balance_weight: float,
                      z_weight: float) -> None:
        """Checks of what a subclass's ``expand`` is given, and the router."""
        top_k = check_integer('top_k', top_k, 1)
        if top_k > self.num_experts:
            raise ValueError(f'top_k={top_k} is more than num_experts={self.num_experts}')
        check_choice('gate_mode', gate_mode, ('renorm', 'raw'))
        for name, value in (('capacity_factor', capacity_factor), ('eval_capacity_factor', eval_capacity_factor)):
            if value is not None:
                check_number(name, value, '(0, inf)')
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.balance_weight = check_number('balance_weight', balance_weight, '[0, inf)')
        self.z_weight = check_number('z_weight', z_weight, '[0, inf)')
        self.routing: Tensor | None = None
        self.add_up = False
        body = self.body()
        if any(isinstance(layer, TokenBatchNorm) for layer in body.modules()):
            raise ValueError(f'{type(body).__name__} has a batch norm of all tokens, which experts that see some '
                             'of them cannot have; use its norm-free form')
        like = next(body.parameters())
        width = _width_of(body) if in_features is None else check_integer('in_features', in_features, 1)
        self.add_own('router', Router(width, self.num_experts, top_k, gate_mode == 'renorm', device=like.device,
                                      dtype=like.dtype))

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        choice = self.router(tokens)
        routes = route(choice.experts, self.num_experts, self._capacity(choice))
        if self.training and torch.is_grad_enabled():
            self._note(choice, routes)
        if not args and not kwargs and self.fast:
            y = self.run_batched(routes.dispatch(autocast(tokens) if self._starts_linear() else tokens))
        else:
            if self.training:
                self.try_plain(x, args, kwargs)
            y = self._run_each(routes, tokens, x.ndim, args, kwargs)
        y = combine(routes.collect(y), choice.gates)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _starts_linear(self) -> bool:
        return isinstance(next(iter(self.layers().values())), nn.Linear)

    def _capacity(self, choice: Choice) -> int:
        """The slots of an expert in this forward.

        Without a limit that is the largest load, which waits for the device; compiled or exported code, whose shapes
        have to be known before, makes room for all tokens.
        """
        tokens, top_k = choice.experts.shape
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is not None:
            return capacity_of(tokens, self.num_experts, top_k, factor)
        if top_k == self.num_experts or not tokens or torch.compiler.is_compiling():
            return tokens
        return int(choice.experts.reshape(-1).bincount(minlength=self.num_experts).max())

    def _run_each(self, routes: Routes, tokens: Tensor, ndim: int, args: tuple, kwargs: dict) -> Tensor:
        """Any FFN, one call an expert on exactly its tokens: ``(E, M, C')``."""
        slots, counts = routes.dispatch(tokens), routes.counts().tolist()
        outputs = {}
        for i, (expert, count) in enumerate(zip(self.expert_tensors(), counts)):
            if count or (i == 0 and not len(tokens)):
                chunk = slots[i, :count]
                if count == 1 and self.training and self._has_batch_norm():
                    chunk = chunk.expand(2, -1)  # a batch norm refuses a single value: the token stands for two
                y = self.run_with(expert, rows_like(chunk, ndim), *args, **kwargs)
                y = y.reshape(len(chunk), y.shape[-1])[:count]
                outputs[i] = F.pad(y, (0, 0, 0, routes.capacity - count))
        blank = torch.zeros_like(next(iter(outputs.values())))
        return torch.stack([outputs.get(i, blank) for i in range(self.num_experts)])

    def _has_batch_norm(self) -> bool:
        return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in self.modules())

    def _note(self, choice: Choice, routes: Routes) -> None:
        """Keep the weighted losses, the shares of dropped choices and of the fullest expert, and the calls."""
        lost = (routes.slot == len(routes.item)).to(choice.probs.dtype).sum() / max(routes.slot.numel(), 1)
        z_loss = router_z_loss(choice) if self.z_weight else torch.zeros_like(lost)
        note = torch.stack([self.balance_weight * balance_loss(choice), self.z_weight * z_loss, lost,
                            load_of(choice).max() * self.num_experts, torch.ones_like(lost)])
        self.routing = note if self.routing is None or not self.add_up else self.routing + note

    def train(self, mode: bool = True):
        self.routing = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, 'routing': None}  # of one forward, with its graph

    def fuse(self) -> nn.Module:
        """Itself: what a router sends where cannot be one FFN. :meth:`to_dense` is another function, on request."""
        return self

    def to_dense(self, how: str = 'mean') -> nn.Module:
        """One plain FFN in place of the mixture, which is another function.

        Args:
            how: ``'mean'`` of the experts' weights.
        """
        check_choice('to_dense', how, self.DENSE)
        return self.plain(self.mean_tensors())

    def extra_repr(self) -> str:
        return (f'{type(self._plain).__name__}, num_experts={self.num_experts}, '
                f'capacity_factor={self.capacity_factor}, eval_capacity_factor={self.eval_capacity_factor}')


@MODELS.register_module()
class MoEFFN(RoutedFFN, StackedExperts):
    """A mixture of E experts in place of one FFN (Shazeer et al. 2017, Fedus et al. 2022).

    Each token goes to its k best experts by the router's softmax; their outputs are summed with the gates as weights.
    A choice that finds no free slot at its expert gives zero, so that only the block's shortcut carries the token. The
    experts start as copies: while the gates sum to one and nothing is dropped, that is the plain FFN's function.

    :func:`ewa3d.attach_ewa` averages its experts like any others; "early EWA" is that with ``end=0.5``. Fusing keeps
    it. Frozen in eval mode or trained, its parameters have the plain names and a leading expert dimension; the router's
    is ``router.weight``.

    Build it with :meth:`expand`.

    Shape:
        - ``(..., C)`` to ``(..., C')`` as the plain FFN.

    Raises:
        ValueError: tokens of another width than the router's.
        TypeError: in training, an FFN that does not map tokens one by one.
    """
    accepts = ('RePaFFN',)

    @classmethod
    def expand(cls, plain: nn.Module, num_experts: int = 4, top_k: int = 2, capacity_factor: float | None = 1.25,
               eval_capacity_factor: float | None = None, gate_mode: str = 'renorm', balance_weight: float = 0.01,
               z_weight: float = 0., init_noise_std: float = 0., in_features: int | None = None) -> 'MoEFFN':
        """Experts and a router from a plain FFN.

        Args:
            plain: any module that maps tokens one by one, with at least one parameter.
            num_experts: E, at least 2. top_k: k, from 1 to E.
            capacity_factor, eval_capacity_factor: an expert has this times its share of the choices as slots; ``None``
                drops nothing (and waits for the device to know the largest load). With a factor in eval, 2 being
                usual, the plain function is kept as far as no expert overflows.
            gate_mode: ``'renorm'``, the gates of the k chosen sum to one, or ``'raw'``, the softmax over all experts.
                With one expert a token, renormalised gates are constant: the router learns from its losses alone.
            balance_weight, z_weight: of the load-balance and the router z-loss (0.01 and 1e-3 are usual).
            init_noise_std: standard deviation of noise on the experts, with mean zero over them.
            in_features: C; by default that of the FFN's first layer.

        Raises:
            TypeError, ValueError: a number of the wrong kind or out of range, ``top_k`` above ``num_experts``, a
                ``gate_mode`` that is none, an FFN that does not tell its width.
        """
        check_number('init_noise_std', init_noise_std, '[0, inf)')
        module = cls(plain, num_experts)
        module.setup_routing(in_features, top_k, capacity_factor, eval_capacity_factor, gate_mode, balance_weight,
                             z_weight)
        if init_noise_std:
            add_noise(module, init_noise_std)
        return module


def _width_of(body: nn.Module) -> int:
    """The width of the tokens by the first layer that tells one."""
    for layer in body.modules():
        if isinstance(layer, nn.Linear):
            return layer.in_features
        if isinstance(layer, nn.LayerNorm):
            return layer.normalized_shape[-1]
    raise ValueError(f'{type(body).__name__} has no linear layer that tells the width of the tokens: give in_features')


# ---------------------------------------------------------------------------------------------------------------------
# Models with routers
# ---------------------------------------------------------------------------------------------------------------------
def _routed(model: nn.Module) -> Iterator[tuple[str, RoutedFFN]]:
    for name, module in model.named_modules():
        if isinstance(module, RoutedFFN):
            yield name, module


def begin_routing(model: nn.Module) -> None:
    """Forget what earlier forwards left; until it is taken, every call of a layer counts."""
    for _, module in _routed(model):
        module.routing, module.add_up = None, True


def routing_stats(model: nn.Module) -> dict[str, Tensor]:
    """Losses and statistics that the last training forward left; they are taken, a second call finds nothing.

    Returns:
        ``loss_balance`` and, where it has a weight, ``loss_router_z``, summed over the layers and with their weights;
        ``dropped``, the percentage of choices that found no slot, and ``load_max``, what the fullest expert was sent
        relative to its share, as means over the layers. Empty where nothing was routed in training.
    """
    modules = [module for _, module in _routed(model) if module.routing is not None]
    if not modules:
        return {}
    notes = [module.routing for module in modules]
    for module in modules:
        module.routing = None
    total, *rest = (n.to(notes[0].device) for n in notes)
    for note in rest:
        total = total + note
    found = dict(loss_balance=total[0])
    if any(module.z_weight for module in modules):
        found['loss_router_z'] = total[1]
    total = total.detach()
    return {**found, 'dropped': 100 * total[2] / total[4], 'load_max': total[3] / total[4]}


def routing_losses(model: nn.Module) -> dict[str, Tensor]:
    """The losses of :func:`routing_stats`, for a training loop of one's own::

        loss = criterion(model(x), y) + sum(routing_losses(model).values())
    """
    return {name: value for name, value in routing_stats(model).items() if name.startswith('loss')}


def to_dense(model: nn.Module, how: str = 'mean') -> Report:
    """Replace every routed mixture in ``model`` by one plain FFN, in place. That is another function: nothing does it
    unless asked to.

    Args:
        how: ``'mean'`` of the experts; ``'core'`` of a residual mixture drops the residuals.

    Raises:
        ValueError: nothing is routed, or a mixture does not know ``how``; ``model`` is itself a mixture (use its
            ``to_dense()``), or is wrapped by DDP, FSDP or ``torch.compile``.
    """
    refuse_wrapped(model, 'to_dense')
    if isinstance(model, RoutedFFN):
        raise ValueError(f'to_dense() works on the mixtures inside a model, and {type(model).__name__} is itself one: '
                         'use `model = model.to_dense()`')
    found = list(_routed(model))
    if not found:
        raise ValueError(f'{type(model).__name__} has no routed experts to make dense')
    before, rows, new = count_params(model), [], [module.to_dense(how) for _, module in found]
    for (name, old), dense in zip(found, new):
        replace(model, old, dense)
        rows.append(Row(name, type(old).__name__, type(dense).__name__, count_params(old), count_params(dense), how))
    return Report(rows, before, count_params(model))
