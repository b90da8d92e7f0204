"""Convolution kernels of linear state spaces, one a channel: diagonal (S4D) and diagonal plus low rank (S4).

``x'(t) = A x(t) + B u(t)``, ``y(t) = Re(C x(t))``, sampled every ``Δ``, is the recurrence ``x ← Ā x + B̄ u``,
``y = Re(C x)`` and, for a whole sequence, the convolution with ``K_l = Re(C Ā^l B̄)``. States come in conjugate pairs,
so half of them are kept.
"""
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ewa3d.checks import check_integer, check_number
from ewa3d.registry import nearest

__all__ = ['INITS', 'DPLRKernel', 'DiagonalKernel', 'Recurrence', 'StateSpaceKernel', 'geometric_sum', 'hippo_legs',
           'legs_spectrum', 'single']

MOST_QUOTIENTS = 1 << 22  # complex numbers, 32 MiB in single precision, that S4's kernel holds at a time


class Recurrence(NamedTuple):
    """What a step needs: ``x ← A x + B u``, ``y = Re(C x)``.

    Shape:
        - A: ``(H, N)``, a diagonal, or ``(H, N, N)``; B: ``(H, N)``; C: ``(directions, H, N)``; all complex.
    """
    A: Tensor
    B: Tensor
    C: Tensor


def single(x: Tensor) -> Tensor:
    """Exponentials and Fourier transforms of half-precision numbers are taken in single precision.

    Shape:
        - any; kept.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def geometric_sum(weight: Tensor, log_base: Tensor, length: int) -> Tensor:
    """``Re Σ_n weight_n exp(l · log_base_n)`` for every ``l`` below ``length``.

    With ``l = a m + b`` for ``m ≈ √length`` the exponential is a product of one that depends on ``a`` and one that
    depends on ``b``: some ``2 √length`` exponentials a state instead of ``length``, and one real matrix product.

    Shape:
        - weight ``(R, H, N)``, log_base ``(H, N)``, complex; returns ``(R, H, length)``, real.
    """
    inner = math.isqrt(length - 1) + 1
    outer = -(-length // inner)
    steps = torch.arange(max(inner, outer), device=log_base.device, dtype=log_base.real.dtype)
    fine = torch.exp(log_base.unsqueeze(-1) * steps[:inner])  # (H, N, inner)
    coarse = torch.exp(log_base.unsqueeze(-2) * (inner * steps[:outer, None]))  # (H, outer, N)
    coarse = weight.transpose(0, 1).unsqueeze(2) * coarse.unsqueeze(1)  # (H, R, outer, N)
    left = torch.cat([coarse.real, -coarse.imag], -1).flatten(1, 2)  # (H, R·outer, 2N)
    right = torch.cat([fine.real, fine.imag], 1)  # (H, 2N, inner)
    return (left @ right).unflatten(1, (len(weight), outer)).flatten(2)[..., :length].transpose(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Where the states start
# ---------------------------------------------------------------------------------------------------------------------
def hippo_legs(n: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS (Gu et al. 2020): ``A`` ``(n, n)`` and ``B`` ``(n,)``, in float64.

    ``A + P Pᵀ + ½ I`` is skew-symmetric for ``P_i = √(i + ½)``.
    """
    i = torch.arange(n, dtype=torch.float64)
    root = (2 * i + 1).sqrt()
    return -torch.outer(root, root).tril(-1) - torch.diag(i + 1), root


def legs_spectrum(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS as ``V (diag(λ) - P P*) V*``: of the n conjugate eigenvalues those ``n / 2`` above the real axis.

    Returns:
        ``λ``, ``P`` and ``B`` in the basis ``V``, each ``(n / 2,)``, complex128.
    """
    A, B = hippo_legs(n)
    P = (torch.arange(n, dtype=torch.float64) + 0.5).sqrt()
    skew = A + torch.outer(P, P) + 0.5 * torch.eye(n, dtype=torch.float64)
    frequencies, V = torch.linalg.eigh(-1j * skew)  # ascending: the upper half is above the axis
    V = V[:, n // 2:].mH
    return torch.complex(torch.full((n // 2,), -0.5, dtype=torch.float64), frequencies[n // 2:]), \
        V @ P.to(V.dtype), V @ B.to(V.dtype)


def _lin(n: int) -> tuple[Tensor, Tensor | None]:
    k = torch.arange(n // 2, dtype=torch.float64)
    return torch.complex(torch.full_like(k, -0.5), math.pi * k), None


def _inv(n: int) -> tuple[Tensor, Tensor | None]:
    k = torch.arange(n // 2, dtype=torch.float64)
    return torch.complex(torch.full_like(k, -0.5), n / math.pi * (n / (2 * k + 1) - 1)), None


def _legs(n: int) -> tuple[Tensor, Tensor | None]:
    A, _, B = legs_spectrum(n)
    return A, B


def _real(n: int) -> tuple[Tensor, Tensor | None]:
    k = torch.arange(n // 2, dtype=torch.float64)
    return torch.complex(-(k + 1), torch.zeros_like(k)), None


INITS: dict[str, Callable[[int], tuple[Tensor, Tensor | None]]] = {'lin': _lin, 'inv': _inv, 'legs': _legs,
                                                                   'real': _real}
"""Of the diagonal kernel: state size → ``A`` and, where it is not 1, ``B``."""


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------
class StateSpaceKernel(nn.Module):
    """What the kernels share: ``log_dt`` ``(H,)`` and the complex readout ``C`` ``(H, N/2, 2)``, with two directions
    ``(2, H, N/2, 2)``; real and imaginary part come last. Directions differ by ``C`` alone.

    Raises:
        TypeError, ValueError: a number out of range or of another type, an odd number of states.
    """

    def __init__(self, dim: int, d_state: int, directions: int, dt_min: float, dt_max: float):
        super().__init__()
        self.dim = check_integer('dim', dim, 1)
        self.d_state = check_integer('d_state', d_state, 2)
        if d_state % 2:
            raise ValueError(f'd_state={d_state} must be even: states come in conjugate pairs')
        self.directions = directions
        low, high = (check_number(name, value, '(0, inf)') for name, value in (('dt_min', dt_min), ('dt_max', dt_max)))
        if low > high:
            raise ValueError(f'dt_min={dt_min} is larger than dt_max={dt_max}')
        self.log_dt = nn.Parameter(torch.rand(dim) * (math.log(high) - math.log(low)) + math.log(low))

    def set_readout(self, C: Tensor) -> None:
        """``C`` ``(directions, H, N/2)``, complex."""
        pairs = torch.view_as_real(C).to(torch.get_default_dtype())
        self.C = nn.Parameter((pairs if self.directions > 1 else pairs[0]).clone())

    def readout(self) -> Tensor:
        """``(directions, H, N/2)``, complex."""
        C = _complex(self.C)
        return C if self.directions > 1 else C.unsqueeze(0)

    def poles(self) -> Tensor:
        """The eigenvalues ``A``, complex, left of the imaginary axis."""
        return torch.complex(-single(self.log_A_real).exp(), single(self.A_imag))

    def dynamics(self) -> list[nn.Parameter]:
        """What learns slowly and without decay: everything but the readout."""
        return [p for name, p in self.named_parameters() if name != 'C']

    def forward(self, length: int) -> Tensor:
        """The first ``length`` values: ``(directions, H, length)``."""
        raise NotImplementedError(f'{type(self).__name__}.forward')

    def recurrence(self) -> Recurrence:
        """The same system for one step at a time."""
        raise NotImplementedError(f'{type(self).__name__}.recurrence')

    def extra_repr(self) -> str:
        return f'dim={self.dim}, d_state={self.d_state}, directions={self.directions}'


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(single(pairs).contiguous())


class DiagonalKernel(StateSpaceKernel):
    """S4D (Gu et al. 2022): ``K_l = 2 Re Σ_n C_n B̄_n Ā_n^l`` with its own ``A`` for each channel, and ``B = 1``.

    Args:
        init: of ``A``, one of :data:`INITS`; its ``B`` is multiplied into ``C``.
        discretization: ``'zoh'``, ``Ā = exp(ΔA)``, or ``'bilinear'``.

    Shape:
        - returns the kernel, ``(directions, dim, L)``.

    Raises:
        TypeError, ValueError: see the base class; an unknown ``init`` or ``discretization``.
    """

    def __init__(self, dim: int, d_state: int = 64, directions: int = 1, init: str = 'lin',
                 discretization: str = 'zoh', dt_min: float = 1e-3, dt_max: float = 0.1):
        super().__init__(dim, d_state, directions, dt_min, dt_max)
        for key, value, valid in (('init', init, INITS), ('discretization', discretization, ('zoh', 'bilinear'))):
            if value not in valid:
                raise ValueError(f'{key}={value!r}: {nearest(value, valid)}')
        self.discretization = discretization
        A, B = INITS[init](d_state)
        C = torch.randn(directions, dim, d_state // 2, dtype=torch.complex64).to(A.dtype)
        self.set_readout(C if B is None else C * B)
        A = A.expand(dim, -1)
        self.log_A_real = nn.Parameter((-A.real).log().to(self.C.dtype))
        self.A_imag = nn.Parameter(A.imag.to(self.C.dtype).clone())

    def _sampled(self) -> tuple[Tensor, Tensor]:
        """``log Ā`` and ``B̄``, ``(H, N/2)``."""
        A, dt = self.poles(), single(self.log_dt).exp().unsqueeze(-1)
        if self.discretization == 'zoh':
            return A * dt, torch.expm1(A * dt) / A
        half = A * dt / 2
        return torch.log((1 + half) / (1 - half)), dt / (1 - half)

    def forward(self, length: int) -> Tensor:
        log_base, B = self._sampled()
        return geometric_sum(2 * self.readout() * B, log_base, length)

    def recurrence(self) -> Recurrence:
        log_base, B = self._sampled()
        return Recurrence(log_base.exp(), B, 2 * self.readout())


class DPLRKernel(StateSpaceKernel):
    """S4 (Gu et al. 2022): ``A = diag(λ) - P P*``, started as HiPPO-LegS and sampled by the bilinear rule.

    The kernel is the inverse Fourier transform of its generating function at the roots of unity, which by Woodbury's
    identity takes four Cauchy products; with ``z`` written as an angle, nothing is singular at ``-1``. What is learnt
    is not ``C`` but ``C (I - Ā^length)``, which that function needs. A longer kernel doubles the length as often as it
    takes, at the cost of dense products.

    Args:
        length: of the generating function: what the kernel costs, whatever part of it is used.
        num_ssm: how many different ``λ``, ``P``, ``B`` the channels share.

    Shape:
        - returns the kernel, ``(directions, dim, L)``.

    Raises:
        TypeError, ValueError: see the base class; ``num_ssm`` does not divide ``dim``.
    """

    def __init__(self, dim: int, d_state: int = 64, directions: int = 1, length: int = 256, num_ssm: int = 1,
                 dt_min: float = 1e-3, dt_max: float = 0.1):
        super().__init__(dim, d_state, directions, dt_min, dt_max)
        self.length = check_integer('length', length, 1)
        self.num_ssm = check_integer('num_ssm', num_ssm, 1)
        if dim % num_ssm:
            raise ValueError(f'dim={dim} cannot be split among num_ssm={num_ssm}')
        dtype = torch.get_default_dtype()
        A, P, B = (value.expand(num_ssm, -1) for value in legs_spectrum(d_state))
        self.log_A_real = nn.Parameter((-A.real).log().to(dtype))
        self.A_imag = nn.Parameter(A.imag.to(dtype).clone())
        self.P = nn.Parameter(torch.view_as_real(P).to(dtype).clone())
        self.B = nn.Parameter(torch.view_as_real(B).to(dtype).clone())
        C = torch.randn(directions, dim, d_state // 2, dtype=torch.complex64).to(A.dtype)
        with torch.no_grad():
            both = _paired(C)
            self.set_readout((both - _times_power(both, self.sampled(torch.complex128)[0], self.length))[
                ..., :d_state // 2])

    def _system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``λ``, ``P`` and ``B`` ``(H, N)``, with their conjugates, and ``Δ`` ``(H, 1)``."""
        repeat = self.dim // self.num_ssm
        values = (self.poles(), _complex(self.P), _complex(self.B))
        return *(_paired(value).repeat_interleave(repeat, 0) for value in values), \
            single(self.log_dt).exp().unsqueeze(-1)

    def sampled(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The dense ``Ā`` ``(H, N, N)`` and ``B̄`` ``(H, N)``."""
        A, P, B, dt = self._system()
        A, P, B = (value.to(dtype or value.dtype) for value in (A, P, B))
        half = (torch.diag_embed(A) - P.unsqueeze(-1) * P.conj().unsqueeze(-2)) * (dt.unsqueeze(-1) / 2)
        one = torch.eye(self.d_state, dtype=half.dtype, device=half.device)
        both = torch.linalg.solve(one - half, torch.cat([one + half, (B * dt).unsqueeze(-1)], -1))
        return both[..., :-1], both[..., -1]

    def forward(self, length: int) -> Tensor:
        size, C = self.length, _paired(self.readout())
        if length > size:
            A = self.sampled()[0]
            while size < length:
                C, size = C + _times_power(C, A, size), 2 * size
        return self._of_length(C, size)[..., :length]

    def _of_length(self, C: Tensor, size: int) -> Tensor:
        """The kernel whose truncated generating function has the readout ``C`` ``(directions, H, N)``."""
        A, P, B, dt = self._system()
        angle = torch.arange(size // 2 + 1, device=dt.device, dtype=dt.dtype) * (math.pi / size)
        sin, cos = angle.sin(), angle.cos()
        left = torch.cat([C, P.conj().unsqueeze(0)]).transpose(0, 1).unsqueeze(2)  # (H, directions + 1, 1, N)
        right = torch.stack([B, P], 1).unsqueeze(1)  # (H, 1, 2, N)
        terms = _cauchy((left * right).flatten(1, 2), A, dt, sin, cos)
        terms = terms.unflatten(1, (-1, 2))  # (H, directions + 1, 2, F)
        of_C, of_P = terms[:, :-1], terms[:, -1:]
        spectrum = of_C[:, :, 0] - cos * of_C[:, :, 1] * of_P[:, :, 0] / (1 + cos * of_P[:, :, 1])
        spectrum = spectrum * torch.complex(cos, sin)
        return torch.fft.irfft(spectrum, n=size).transpose(0, 1)

    def recurrence(self) -> Recurrence:
        with torch.no_grad():  # for streaming: nothing is learnt through it
            A, B = self.sampled(torch.complex128)
            C, power = _paired(self.readout()).to(A.dtype), torch.linalg.matrix_power(A, self.length)
            rest = torch.eye(self.d_state, dtype=A.dtype, device=A.device) - power
            C = torch.linalg.solve(rest.transpose(-1, -2), C.permute(1, 2, 0)).permute(2, 0, 1)
            dtype = torch.promote_types(single(self.log_dt).dtype, torch.complex64)
            return Recurrence(A.to(dtype), B.to(dtype), C.to(dtype))

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, length={self.length}, num_ssm={self.num_ssm}'


def _cauchy(weights: Tensor, A: Tensor, dt: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """``Σ_n weights_n Δ / (2i sin - Δ λ_n cos)``, a part of the frequencies at a time, because the quotients of all of
    them, ``(H, N, F)``, are by far the largest thing in a layer; the backward pass computes those of a part again.

    With ``ω = exp(-2i·angle)`` the denominator is ``(1 - ω) - Δ λ (1 + ω) / 2``, without the factor ``exp(-i·angle)``.

    Shape:
        - weights ``(H, R, N)``, A ``(H, N)``, dt ``(H, 1)``, sin and cos ``(F,)``; returns ``(H, R, F)``.
    """
    part = max(MOST_QUOTIENTS // A.numel(), 1)
    if len(sin) <= part:
        return _cauchy_part(weights, A, dt, sin, cos)
    run = _cauchy_part if not torch.is_grad_enabled() else \
        partial(checkpoint, _cauchy_part, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([run(weights, A, dt, *piece) for piece in zip(sin.split(part), cos.split(part))], -1)


def _cauchy_part(weights: Tensor, A: Tensor, dt: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    return weights @ (dt.unsqueeze(-1) / (2j * sin - (dt * A).unsqueeze(-1) * cos))


def _paired(value: Tensor) -> Tensor:
    """``(..., N/2)`` with the conjugates: ``(..., N)``."""
    return torch.cat([value, value.conj()], -1)


def _times_power(rows: Tensor, A: Tensor, exponent: int) -> Tensor:
    """``rows Ā^exponent`` by squaring: ``(R, H, N)`` and ``(H, N, N)`` to ``(R, H, N)``."""
    rows = rows.transpose(0, 1)
    while exponent:
        if exponent & 1:
            rows = rows @ A
        exponent >>= 1
        A = A @ A if exponent else A
    return rows.transpose(0, 1)
