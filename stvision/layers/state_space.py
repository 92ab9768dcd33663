"""Structured state spaces (Gu et al. 2022, S4) on sequences (B, L, C), as convolution and recurrence.

A channel is the linear system ``x' = A x + B u``, ``y = C x + D u`` with A = diag(w) - p q* from
HiPPO-LegS, made discrete by the bilinear transform. Of each conjugate pair of modes one is kept.
What is learned in place of C is ``C (I - A^l_max)``, with which the response over ``l_max`` steps is
one rational function at the roots of unity; keys are those of ViS4mer (Islam and Bertasius 2022).
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.layers.checks import check_volume
from stvision.layers.pairs import divide, irfft, multiply, rfft

P = ParamSpec("P")
R = TypeVar("R")


def _without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function compute in the dtype of its tensors, of which the first argument is one."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(cast(Tensor, args[0]).device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def hippo_legs(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """HiPPO-LegS as a normal matrix plus one of rank one.

    The matrix is ``V diag(w) V* - p p^T`` over all modes; returned is the half with negative
    imaginary parts, in ascending order.

    Args:
        size: states N, even.

    Returns:
        w (N / 2,) complex128 with real parts -1/2; V (N, N / 2) complex128, orthonormal columns;
        p (N,) and b (N,) float64, the correction and the input matrix.

    Raises:
        ValueError: an odd or too small size.
    """
    if size < 2 or size % 2:
        raise ValueError(f"size must be even and at least 2, got {size}")
    n = torch.arange(size, dtype=torch.float64)
    p, b = (n + 0.5).sqrt(), (2 * n + 1).sqrt()
    outer = p[:, None] * p
    skew = outer.triu(1) - outer.tril(-1)  # HiPPO plus p p^T is this less 1/2 on the diagonal
    imaginary, vectors = torch.linalg.eigh(skew * -1j)
    half = slice(0, size // 2)
    w = torch.complex(torch.full((size // 2,), -0.5, dtype=torch.float64), imaginary[half])
    return w, vectors[:, half], p, b


def causal_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """``y_t = sum over s <= t of kernel_(t - s) u_s`` per channel, through a transform of length 2 L.

    Args:
        u: (..., C, L), real.
        kernel: (C, L') with L' at least L; what is longer is not used.

    Returns:
        (..., C, L).
    """
    length = u.shape[-1]
    if u.numel() == 0:  # transforms refuse an empty batch; the gradient of the kernel is zero
        return u * kernel[..., :length]
    spectrum = multiply(rfft(u, 2 * length), rfft(kernel[..., :length], 2 * length))
    return irfft(spectrum, 2 * length)[..., :length]


@_without_autocast
def s4_kernel(w: Tensor, b: Tensor, c: Tensor, dt: Tensor, length: int) -> Tensor:
    """Impulse response of the bilinear system over ``length`` steps.

    Args:
        w: (N / 2, 2), real and imaginary parts of one mode of each pair, real parts negative.
        b: (C, 2, N / 2, 2): input matrix, and p of the correction, as pairs too.
        c: (C, 2, N / 2, 2): the conjugate of ``C (I - A^length)``, and q of the correction.
        dt: (C,) step sizes.
        length: steps L, at least 1.

    Returns:
        (C, L). The terms of the sums over modes are complete in memory: C · N / 2 · L / 2 numbers.
    """
    # Each mode and its conjugate give v / (z - r) + conj(v) / (z - conj(r)), where z of a node
    # exp(-2i theta) is 2 (1 - node) / (1 + node) = 2i sin / cos of theta. Together that is
    #     2 cos (2i sin v_re - 2 cos Re(v conj(h))) / (near + i far h_re)
    # for h = r / 2, near = |2 cos h|^2 - (2 sin)^2, far = -2 (2 sin) (2 cos): real arithmetic, of
    # which little is as large as modes times nodes. The compiler fuses it, and without it too it
    # takes half the time of complex arithmetic where it matters.
    nodes = torch.arange(length // 2 + 1, device=w.device, dtype=dt.dtype)
    theta = nodes * (math.pi / length)
    phase = 2 * torch.stack((theta.cos(), theta.sin()), dim=-1)
    (cos, sin), (cos_2, sin_2) = phase.unbind(-1), phase.square().unbind(-1)  # of twice each
    half = w * (dt / 2)[:, None, None]  # h, (C, N / 2, 2)
    (re, im), (re_2, im_2) = half.unbind(-1), half.square().unbind(-1)
    (b_re, b_im), (c_re, c_im) = b[:, :, None].unbind(-1), c[:, None].unbind(-1)
    v_re = torch.addcmul(b_re * c_re, b_im, c_im).flatten(1, 2)  # BC, Bq, pC, pq
    v_im = torch.addcmul(b_im * c_re, b_re, c_im, value=-1).flatten(1, 2)
    rows = torch.addcmul(v_re * re[:, None], v_im, im[:, None])
    rows = torch.cat([v_re, rows], dim=1) * dt[:, None, None]
    near = (re_2 + im_2)[..., None] * cos_2 - sin_2
    far = -2 * cos * sin
    below = torch.addcmul(near * near, re_2[..., None], far.square()).reciprocal()
    v_near, r_near = (rows @ (near * below)).chunk(2, dim=1)
    v_far, r_far = (((rows * re[:, None]) @ below) * far).chunk(2, dim=1)
    # (C, 4, L / 2 + 1, 2), over 2 cos and less their phases exp(i theta)
    sums = torch.stack(
        (
            torch.addcmul(sin * v_far, cos, r_near, value=-1),
            torch.addcmul(sin * v_near, cos, r_far),
        ),
        dim=-1,
    )
    bc, bq, pc, pq = sums.unbind(1)
    back = cos[:, None]
    one = phase[0] / 2
    share = divide(multiply(bq, pc), torch.addcmul(one, back, pq))
    return irfft(multiply(torch.addcmul(bc, back, share, value=-1), phase), length)


class S4Matrices(NamedTuple):
    """The discrete system of each channel, on real parts of its modes, then imaginary ones.

    Attributes:
        a: (C, N, N) real.
        b: (C, N) real.
        c: (C, N) real.
    """

    a: Tensor
    b: Tensor
    c: Tensor


def _parts(half: Tensor) -> Tensor:
    """(..., N / 2, 2) to (..., N): real parts, then imaginary ones."""
    return half.mT.flatten(-2)


def _solve(a: Tensor, b: Tensor) -> Tensor:
    """Solve ``a x = b`` for columns, without asking the device whether ``a`` is singular.

    The question waits for the device, which a CUDA graph refuses; the real parts of the modes are
    negative, so no matrix here is.
    """
    return torch.linalg.solve_ex(a, b, check_errors=False).result


def _dense(w: Tensor, b: Tensor, c: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Discrete A (C, N, N) and B (C, N) of the arguments of :func:`s4_kernel`, on parts.

    Both modes of a pair act on conjugate states, so parts of one say all, and a product with a
    conjugate is twice the product of parts.
    """
    inputs, p = _parts(b[:, 0]), _parts(b[:, 1])
    re, im = w.unbind(-1)
    modes = torch.cat(
        [
            torch.cat([torch.diag(re), torch.diag(-im)], dim=1),
            torch.cat([torch.diag(im), torch.diag(re)], dim=1),
        ]
    )
    a = modes - 2 * p[:, :, None] * _parts(c[:, 1])[:, None]
    half = a * (dt / 2)[:, None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    right = torch.cat([eye + half, (inputs * dt[:, None])[..., None]], dim=-1)
    solved = _solve(eye - half, right)
    return solved[..., :-1], solved[..., -1]


@_without_autocast
def s4_matrices(w: Tensor, b: Tensor, c: Tensor, dt: Tensor, length: int) -> S4Matrices:
    """The recurrence whose response :func:`s4_kernel` gives for ``length``.

    Args:
        w: as in :func:`s4_kernel`, as ``b``, ``c`` and ``dt``.
        b: see above.
        c: see above.
        dt: see above.
        length: the length that ``c`` was made for.
    """
    a, inputs = _dense(w, b, c, dt)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    wanted = eye - torch.linalg.matrix_power(a, length)
    outputs = _solve(wanted.mT, 2 * _parts(c[:, 0])[..., None])[..., 0]
    return S4Matrices(a, inputs, outputs)


@_without_autocast
def s4_scan(u: Tensor, matrices: S4Matrices, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a chunk, all its steps at once.

    Args:
        u: (B, C, L).
        matrices: of :func:`s4_matrices`.
        state: (B, C, N), after the steps before the chunk; ``None`` for zeros.

    Returns:
        y (B, C, L), without the direct path D u, and the state after the chunk.
    """
    a, b, c = matrices
    length = u.shape[-1]
    power = a
    inputs, outputs = b[..., None], c[:, None]  # A^l B as columns, C A^l as rows
    while inputs.shape[-1] < length:
        inputs = torch.cat([inputs, power @ inputs], dim=-1)
        outputs = torch.cat([outputs, outputs @ power], dim=1)
        power = power @ power
    inputs, outputs = inputs[..., :length], outputs[:, :length]
    y = causal_convolution(u, (c[:, None] @ inputs)[:, 0])
    final = torch.einsum("cnl,bcl->bcn", inputs.flip(-1), u)
    if state is not None:
        y = y + torch.einsum("cln,bcn->bcl", outputs @ a, state)
        final = final + torch.einsum("cmn,bcn->bcm", torch.linalg.matrix_power(a, length), state)
    return y, final


class S4(nn.Module):
    """S4 layer: convolution, direct path, GELU, dropout of channels, linear layer.

    The system and its transforms run in float32, or in float64 for float64 weights, whatever autocast
    says. Inputs longer than ``l_max`` are taken too: the response is continued as the recurrence
    would continue it.

    Args:
        dim: channels C.
        l_max: steps that the learned ``C`` is made for, at least 1.
        d_state: states N of a channel, even.
        dropout: chance to drop a channel of a sample over all its steps.
        dt_min: least step size at the start, drawn log-uniformly.
        dt_max: greatest step size at the start.

    Raises:
        ValueError: sizes or steps that do not fit.
    """

    def __init__(
        self,
        dim: int,
        l_max: int,
        d_state: int = 64,
        dropout: float = 0.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        if dim < 1 or l_max < 1:
            raise ValueError(f"dim and l_max must be at least 1, got {dim} and {l_max}")
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state must be even and at least 2, got {d_state}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min must be above 0 and at most dt_max, got {dt_min}, {dt_max}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.dim, self.l_max, self.d_state, self.dropout = dim, l_max, d_state, dropout
        w, vectors, p, b = hippo_legs(d_state)
        low_rank = vectors.mH @ p.to(vectors)
        b = torch.stack([vectors.mH @ b.to(vectors), low_rank]).to(torch.complex64)
        c = torch.randn(dim, d_state // 2, dtype=torch.complex64)
        c = torch.stack([c, low_rank.to(c).expand_as(c)], dim=1)
        low, high = math.log(dt_min), math.log(dt_max)
        self.D = nn.Parameter(torch.randn(dim))
        self.log_dt = nn.Parameter(torch.rand(dim) * (high - low) + low)
        self.w = nn.Parameter(torch.view_as_real(w.to(torch.complex64)))
        self.B = nn.Parameter(torch.view_as_real(b).repeat(dim, 1, 1, 1))
        self.C = nn.Parameter(torch.view_as_real(c).contiguous())
        self.output_linear = nn.Linear(dim, dim)

    def system(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``w``, ``b``, ``c`` and ``dt`` as :func:`s4_kernel` takes them.

        Args:
            dtype: torch.float32 or torch.float64; ``None`` for that of the weights, half
                precision as float32.
        """
        if dtype is None:
            dtype = torch.promote_types(self.w.dtype, torch.float32)
        w, b, c, log_dt = (x.to(dtype) for x in (self.w, self.B, self.C, self.log_dt))
        return w, b, c, log_dt.exp()

    def kernel(self, length: int) -> Tensor:
        """Impulse response (C, at least ``length``)."""
        w, b, c, dt = self.system()
        covered = self.l_max
        if length > covered:
            with torch.autocast(w.device.type, enabled=False):
                a, _ = _dense(w, b, c, dt)
                power = torch.linalg.matrix_power(a, covered)
                row = _parts(c[:, 0])
                while covered < length:  # C (I - A^2l) = C (I - A^l) (I + A^l)
                    row = row + (row[:, None] @ power)[:, 0]
                    power = power @ power
                    covered *= 2
                c = torch.stack([row.unflatten(-1, (2, -1)).mT, c[:, 1]], dim=1)
        return s4_kernel(w, b, c, dt, covered)

    def matrices(self) -> S4Matrices:
        """The recurrence, solved in float64 and given in the precision of the transforms."""
        found = s4_matrices(*self.system(torch.float64), self.l_max)
        if self.w.dtype == torch.float64:
            return found
        return S4Matrices(*(x.float() for x in found))

    def _out(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """What follows the system: (B, C, L) to (B, L, C)."""
        y = F.gelu(y)
        if self.training and self.dropout:
            kept = y.new_empty(*y.shape[:2], 1).bernoulli_(1 - self.dropout)
            y = y * (kept / (1 - self.dropout))
        return self.output_linear(y.mT.to(dtype))

    def _sequence(self, x: Tensor) -> Tensor:
        if x.ndim == 5:
            check_volume(x, self.dim)
        elif x.ndim != 3 or x.shape[-1] != self.dim or x.shape[1] == 0:
            raise ValueError(
                f"x must be (B, L, {self.dim}) with L at least 1 or (B, T, H, W, {self.dim}), "
                f"got {tuple(x.shape)}"
            )
        return x.flatten(1, -2).mT.to(torch.promote_types(self.w.dtype, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Transform sequences, all steps at once.

        Args:
            x: (B, L, C), or a clip (B, T, H, W, C) whose places are read frame by frame, row by row.

        Returns:
            The same shape. No step depends on a later one.

        Raises:
            ValueError: another shape.
        """
        u = self._sequence(x)
        with torch.autocast(x.device.type, enabled=False):
            y = causal_convolution(u, self.kernel(u.shape[-1])) + u * self.D.to(u.dtype)[:, None]
        return self._out(y, self.output_linear.weight.dtype).view(x.shape)

    def stream(
        self, x: Tensor, state: Tensor | None = None, matrices: S4Matrices | None = None
    ) -> tuple[Tensor, Tensor]:
        """Transform the next chunk of sequences, of one step or many, with memory of one chunk.

        Args:
            x: (B, L, C) or a clip (B, T, H, W, C).
            state: what the call for the chunk before returned; ``None`` at the start.
            matrices: of :meth:`matrices`, to compute them once for all chunks.

        Returns:
            What :meth:`forward` gives for these steps of the whole, and the state
            (B, C, N).

        Raises:
            ValueError: another shape of ``x`` or ``state``.
        """
        u = self._sequence(x)
        wanted = (u.shape[0], self.dim, self.d_state)
        if state is not None and state.shape != wanted:
            raise ValueError(f"state must be {wanted}, got {tuple(state.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            y, state = s4_scan(u, self.matrices() if matrices is None else matrices, state)
            y = y + u * self.D.to(u.dtype)[:, None]
        return self._out(y, self.output_linear.weight.dtype).view(x.shape), state

    def extra_repr(self) -> str:
        return f"dim={self.dim}, l_max={self.l_max}, d_state={self.d_state}"
