"""State spaces as token mixers (S4, arXiv 2111.00396; S4D, arXiv 2206.11893), in place of attention."""
import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.block import Pointwise
from ewa3d.layers.ssm_kernels import DiagonalKernel, DPLRKernel, StateSpaceKernel, single
from ewa3d.registry import MODELS
from ewa3d.reparam import Fused, Reparam

__all__ = ['S4', 'S4D', 'LongConvolution', 'StateSpaceMixer', 'StreamState', 'convolve', 'state_space_parameters']


def convolve(u: Tensor, kernel: Tensor) -> Tensor:
    """Linear convolution of whole sequences, by FFT.

    With one kernel ``y_t = Σ_{l≥0} k_l u_{t-l}``, which is causal. A second one adds what comes later:
    ``Σ_{l≥1} k'_l u_{t+l}``; the token itself is counted once.

    Shape:
        - u ``(B, C, L)``, kernel ``(1 or 2, C, L)``; returns ``(B, C, L)``.
    """
    L = u.shape[-1]
    taps = kernel[0]
    if len(kernel) == 2:  # lag -l is lag 2L - l of a circle of 2L
        taps = F.pad(taps, (0, L)) + F.pad(kernel[1][..., 1:].flip(-1), (L + 1, 0))
    return _CircularConvolution.apply(u, taps)


class _CircularConvolution(torch.autograd.Function):
    """The first L values of ``u`` ``(B, C, L)`` convolved with ``taps`` ``(C, L or 2L)`` on a circle of 2L.

    The backward takes transforms of real numbers, where torch's own of ``rfft`` takes complex ones of twice the cost.
    """

    @staticmethod
    def forward(ctx, u: Tensor, taps: Tensor) -> Tensor:
        ctx.sizes = u.shape[-1], taps.shape[-1]
        of_u, of_taps = (torch.fft.rfft(value, n=2 * u.shape[-1]) for value in (u, taps))
        ctx.save_for_backward(of_u if ctx.needs_input_grad[1] else None, of_taps if ctx.needs_input_grad[0] else None)
        return torch.fft.irfft(of_u * of_taps, n=2 * u.shape[-1])[..., :u.shape[-1]]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (L, M), (of_u, of_taps) = ctx.sizes, ctx.saved_tensors
        spectrum = torch.fft.rfft(grad, n=2 * L)
        of_input = None if of_taps is None else torch.fft.irfft(spectrum * of_taps.conj(), n=2 * L)[..., :L]
        of_kernel = None if of_u is None else torch.fft.irfft((spectrum * of_u.conj()).sum(0), n=2 * L)[..., :M]
        return of_input, of_kernel


class StreamState(NamedTuple):
    """What :meth:`StateSpaceMixer.step` carries from token to token: the states ``x`` ``(B, C, N)`` and, the same in
    every step, the :class:`~ewa3d.layers.ssm_kernels.Recurrence`."""
    x: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


class _ConvolutionMixer(nn.Module):
    """A long convolution of each channel, ``D u`` beside it, then GELU, dropout and a gated linear map.

    A base class: a subclass has :meth:`taps`. Names are those of the published layer. A dropped channel is dropped in
    all tokens of a sample.
    """

    def __init__(self, dim: int, dropout: float, bidirectional: bool):
        super().__init__()
        self.dim = check_integer('dim', dim, 1)
        self.bidirectional = bool(bidirectional)
        self.D = nn.Parameter(torch.randn(dim))
        self.dropout = nn.Dropout1d(check_number('dropout', dropout, '[0, 1)'))
        self.output_linear = Pointwise(dim, 2 * dim)

    def taps(self, length: int) -> Tensor:
        """The kernel of a sequence of this length, ``(1 or 2, dim, length)``."""
        raise NotImplementedError(f'{type(self).__name__}.taps')

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != self.dim:
            raise ValueError(f'{type(self).__name__}: tokens (B, L, {self.dim}) with L >= 1 expected, got '
                             f'{tuple(x.shape)}')
        if attn_mask is not None:
            raise ValueError(f'{type(self).__name__} takes no attn_mask: every token reaches every other one (or, with '
                             'bidirectional=False, every later one)')
        if is_causal and self.bidirectional:
            raise ValueError(f'{type(self).__name__}: is_causal=True needs bidirectional=False')
        with torch.autocast(x.device.type, enabled=False):
            u = single(x).transpose(1, 2)  # (B, C, L)
            y = convolve(u, self.taps(x.shape[1]).to(u.dtype)) + u * single(self.D).unsqueeze(-1)
        return self._gated(y.to(x.dtype))

    def _gated(self, y: Tensor) -> Tensor:
        """``(B, C, L)`` to ``(B, L, C)``."""
        return F.glu(self.output_linear(self.dropout(F.gelu(y)).transpose(1, 2)), -1)

    def extra_repr(self) -> str:
        return f'dim={self.dim}, bidirectional={self.bidirectional}'


class LongConvolution(Fused, _ConvolutionMixer):
    """What :class:`S4D` and :class:`S4` are after training: the same layer, its ``kernel`` computed once.

    Args:
        kernel: ``(1 or 2, dim, length)``.

    Shape:
        - ``(B, L, dim)`` with ``L <= length``, kept.

    Raises:
        ValueError: a longer sequence.
    """

    def __init__(self, kernel: Tensor, dropout: float = 0.):
        _ConvolutionMixer.__init__(self, kernel.shape[1], dropout, len(kernel) == 2)
        self.kernel = nn.Parameter(kernel)

    def taps(self, length: int) -> Tensor:
        if length > self.kernel.shape[-1]:
            raise ValueError(f'a sequence of {length} tokens is longer than the precomputed kernel, which is of '
                             f'length={self.kernel.shape[-1]}: fuse again with a larger length in the rule')
        return single(self.kernel[..., :length])

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, length={self.kernel.shape[-1]}'


class StateSpaceMixer(Reparam, _ConvolutionMixer):
    """A :class:`_ConvolutionMixer` whose kernel a state space makes: the base class of :class:`S4D` and :class:`S4`.

    The kernel and the convolution are computed in float32 (float64 for float64) also under autocast. Where a plain
    module was expanded, its weights have no place here: of a plain checkpoint they are left out.

    Args:
        kernel: what makes the kernel.
        length: of the kernel that :meth:`fuse` computes; without it, the mixer stays.

    Shape:
        - ``(B, L, dim)``, kept.
    """
    preserves = False
    has_fused_form = True

    def __init__(self, kernel: StateSpaceKernel, dropout: float, length: int | None, device=None, dtype=None):
        _ConvolutionMixer.__init__(self, kernel.dim, dropout, kernel.directions == 2)
        self.kernel = kernel
        self.length = None if length is None else check_integer('length', length, 1)
        self._plain_names: frozenset[str] = frozenset()
        self.to(device=device, dtype=dtype)

    @classmethod
    def _expanded(cls, plain: nn.Module, fused: bool, **cfg) -> nn.Module:
        """A new mixer of the width, device, dtype and mode of ``plain``."""
        like = next((p for p in plain.parameters() if p.is_floating_point()), None)
        width = width_of(plain, cls.__name__)
        refuse_inputs(plain, cls.__name__)
        new = cls(width, **cfg)
        if like is not None:
            new.to(device=like.device, dtype=like.dtype)
        new._plain_names = frozenset(plain.state_dict()) - frozenset(new.state_dict())
        new.train(plain.training)
        if fused and cfg['length'] is None:
            raise ValueError(f'{cls.__name__}: fused=True needs the length of the kernel')
        return new.fuse() if fused else new

    def taps(self, length: int) -> Tensor:
        return self.kernel(length)

    def fuse(self, length: int | None = None) -> nn.Module:
        """The same layer with a kernel of ``length``, by default the mixer's own; without either it stays."""
        length = self.length if length is None else check_integer('length', length, 1)
        if length is None:
            return self
        with torch.no_grad(), torch.autocast(self.D.device.type, enabled=False):
            kernel = self.kernel(length).to(self.D.dtype).contiguous()
        fused = LongConvolution(kernel, self.dropout.p).to(self.D)
        for name, parameter in fused.named_parameters():
            own = self.kernel.C if name == 'kernel' else self.get_parameter(name)
            parameter.requires_grad_(own.requires_grad)
            if name != 'kernel':
                parameter.data.copy_(own.data)
        return fused.train(self.training)

    def initial_state(self, batch_size: int) -> StreamState:
        """Before the first token: zeros, and the recurrence of the weights as they are now.

        Raises:
            ValueError: a mixer of two directions, which needs the whole sequence.
        """
        if self.bidirectional:
            raise ValueError(f'{type(self).__name__} with bidirectional=True needs the whole sequence; streaming needs '
                             'bidirectional=False')
        with torch.autocast(self.D.device.type, enabled=False):
            recurrence = self.kernel.recurrence()
        x = recurrence.B.new_zeros(check_integer('batch_size', batch_size, 1), *recurrence.B.shape)
        return StreamState(x, *recurrence)

    def step(self, u: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """One more token of every stream, at a cost and memory that do not depend on how many there were.

        Shape:
            - u ``(B, dim)``; returns the output ``(B, dim)`` and the next state.

        Raises:
            ValueError: another shape than the state's.
        """
        if u.shape != state.x.shape[:2]:
            raise ValueError(f'{type(self).__name__}: one token of every stream, {tuple(state.x.shape[:2])}, expected, '
                             f'got {tuple(u.shape)}')
        with torch.autocast(u.device.type, enabled=False):
            value = single(u)
            x = state.A * state.x if state.A.ndim == 2 else (state.A @ state.x.unsqueeze(-1)).squeeze(-1)
            x = x + state.B * value.unsqueeze(-1)
            y = (state.C[0] * x).sum(-1).real + single(self.D) * value
        return self._gated(y.to(u.dtype).unsqueeze(-1)).squeeze(1), state._replace(x=x)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in self._plain_names:
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, length={self.length}'


@MODELS.register_module()
class S4D(StateSpaceMixer):
    """The diagonal state space S4D as a token mixer.

    Args:
        dim: C. d_state: N states a channel, an even number.
        bidirectional: a second kernel for what comes later; a layer by itself is causal, one that replaces attention
            (:meth:`expand`) is not.
        dropout: of whole channels, before the gated linear map.
        length: of the sequences; needed by :meth:`fuse` alone.
        init, discretization, dt_min, dt_max: see :class:`~ewa3d.layers.ssm_kernels.DiagonalKernel`.

    Shape:
        - ``(B, L, dim)``, kept.

    Raises:
        TypeError, ValueError: a value out of range or of another type; tokens of another width, or with a mask.
    """

    def __init__(self, dim: int, d_state: int = 64, bidirectional: bool = False, dropout: float = 0.,
                 length: int | None = None, init: str = 'lin', discretization: str = 'zoh', dt_min: float = 1e-3,
                 dt_max: float = 0.1, device=None, dtype=None):
        kernel = DiagonalKernel(dim, d_state, 2 if bidirectional else 1, init, discretization, dt_min, dt_max)
        super().__init__(kernel, dropout, length, device, dtype)

    @classmethod
    def expand(cls, plain: nn.Module, d_state: int = 64, bidirectional: bool = True, dropout: float = 0.,
               length: int | None = None, init: str = 'lin', discretization: str = 'zoh', dt_min: float = 1e-3,
               dt_max: float = 0.1, fused: bool = False) -> nn.Module:
        """A new S4D of the width of ``plain``, an attention; it is trainable whatever ``plain`` was.

        Args:
            length: of the longest sequence, the class token included, for :meth:`fuse`.
            fused: give the form with a precomputed kernel at once, for fused weights.

        Raises:
            TypeError: ``plain`` has no linear layer that tells its width, is torch's ``MultiheadAttention``, which
                returns a tuple, or takes more than tokens (Swin's mask, EVA's rotary positions, BEiT's biases).
                ValueError: ``fused`` without ``length``, and as the class.
        """
        return cls._expanded(plain, fused, d_state=d_state, bidirectional=bidirectional, dropout=dropout,
                             length=length, init=init, discretization=discretization, dt_min=dt_min, dt_max=dt_max)


@MODELS.register_module()
class S4(StateSpaceMixer):
    """The state space S4 (HiPPO-LegS, diagonal plus low rank) as a token mixer.

    Args:
        fused: of a rule: give the form with a precomputed kernel at once, for fused weights.
        length: of the sequences, 256 unless given: the kernel costs that much. Longer sequences work and cost more;
            for :meth:`fuse` it has to be given.
        num_ssm: how many different state spaces the channels share.
        dim, d_state, bidirectional, dropout, dt_min, dt_max: as :class:`S4D`.

    Shape:
        - ``(B, L, dim)``, kept.

    Raises:
        TypeError, ValueError: as :class:`S4D`; ``num_ssm`` does not divide ``dim``.
    """

    def __init__(self, dim: int, d_state: int = 64, bidirectional: bool = False, dropout: float = 0.,
                 length: int | None = None, num_ssm: int = 1, dt_min: float = 1e-3, dt_max: float = 0.1, device=None,
                 dtype=None):
        kernel = DPLRKernel(dim, d_state, 2 if bidirectional else 1, 256 if length is None else length, num_ssm,
                            dt_min, dt_max)
        super().__init__(kernel, dropout, length, device, dtype)

    @classmethod
    def expand(cls, plain: nn.Module, d_state: int = 64, bidirectional: bool = True, dropout: float = 0.,
               length: int | None = None, num_ssm: int = 1, dt_min: float = 1e-3, dt_max: float = 0.1,
               fused: bool = False) -> nn.Module:
        """A new S4 of the width of ``plain``: see :meth:`S4D.expand`."""
        return cls._expanded(plain, fused, d_state=d_state, bidirectional=bidirectional, dropout=dropout,
                             length=length, num_ssm=num_ssm, dt_min=dt_min, dt_max=dt_max)


def width_of(plain: nn.Module, name: str) -> int:
    """The width of the tokens that a mixer takes, from its first linear layer."""
    linear = next((module for module in plain.modules() if isinstance(module, nn.Linear)), None)
    if isinstance(plain, nn.MultiheadAttention) or linear is None:
        why = 'returns a tuple' if linear is not None else 'has no linear layer that tells the width of its tokens'
        raise TypeError(f'{name} takes the place of a mixer that is called as attn(x); {type(plain).__name__} {why}')
    return linear.in_features


SPARED = ('attn_mask', 'is_causal', 'pos', 'context', 'context_pos')
"""Inputs of attentions that blocks pass on only where they are given themselves."""


def refuse_inputs(plain: nn.Module, name: str) -> None:
    """Raise where ``plain`` is called with more than the tokens: with a mask of windows, rotary positions or biases."""
    inputs = list(inspect.signature(plain.forward).parameters.values())
    wanted = [p.name for p in inputs[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in SPARED
              and (p.default is p.empty or p.default is None)]
    if wanted:
        raise TypeError(f'{name} takes the place of a mixer that is called as attn(x); {type(plain).__name__} takes '
                        f'{", ".join(wanted)} besides, and its block passes that on')


def state_space_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of state spaces in ``model`` that have a learning rate of their own and no decay: step sizes,
    poles and input maps."""
    return [p for module in model.modules() if isinstance(module, StateSpaceKernel) for p in module.dynamics()]
