"""Structured state spaces (Gu et al. 2022, S4) on sequences (B, L, C), as convolution and recurrence.

A channel is the linear system ``x' = A x + B u``, ``y = C x + D u`` with A = diag(w) - p q* from
HiPPO-LegS, made discrete by the bilinear transform. Of each conjugate pair of modes one is kept.
What is learned in place of C is ``C (I - A^l_max)``, with which the response over ``l_max`` steps is
one rational function at the roots of unity; keys are those of ViS4mer (Islam and Bertasius 2022).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel[..., :length], n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length]


def s4_kernel(w: Tensor, b: Tensor, c: Tensor, dt: Tensor, length: int) -> Tensor:
    """Impulse response of the bilinear system over ``length`` steps.

    Args:
        w: (N / 2,) complex, one mode of each pair, real parts negative.
        b: (C, 2, N / 2) complex: input matrix, and p of the correction.
        c: (C, 2, N / 2) complex: the conjugate of ``C (I - A^length)``, and q of the correction.
        dt: (C,) real, step sizes.
        length: steps L, at least 1.

    Returns:
        (C, L) real. The sums over modes are complete in memory: C · N · L complex numbers.
    """
    steps = torch.arange(length // 2 + 1, device=w.device, dtype=dt.dtype)
    angle = steps * (-2 * math.pi / length)
    node = torch.complex(angle.cos(), angle.sin())
    rate = w * dt[:, None]  # (C, N / 2)
    products = (b[:, :, None] * c[:, None].conj()).flatten(1, 2)  # BC, Bq, pC, pq
    # 1 / (z - rate) with z = 2 (1 - node) / (1 + node), kept finite at node = -1
    front, back = 2 * (1 - node), 1 + node
    sums = products @ (front - rate[..., None] * back).reciprocal()
    sums = sums + products.conj() @ (front - rate[..., None].conj() * back).reciprocal()
    bc, bq, pc, pq = (sums * dt[:, None, None]).unbind(1)
    return torch.fft.irfft(2 * (bc - back * bq * pc / (1 + back * pq)), n=length)


class S4Matrices(NamedTuple):
    """The discrete system of each channel over both halves of its modes.

    Attributes:
        a: (C, N, N) complex.
        b: (C, N) complex.
        c: (C, N) complex, applied without conjugation.
    """

    a: Tensor
    b: Tensor
    c: Tensor


def _both(half: Tensor) -> Tensor:
    return torch.cat([half, half.conj()], dim=-1)


def _solve(a: Tensor, b: Tensor) -> Tensor:
    """Solve ``a x = b`` for columns, without asking the device whether ``a`` is singular.

    The question waits for the device, which a CUDA graph refuses; the real parts of the modes are
    negative, so no matrix here is.
    """
    return torch.linalg.solve_ex(a, b, check_errors=False).result


def _dense(w: Tensor, b: Tensor, c: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Discrete A (C, N, N) and B (C, N) of the arguments of :func:`s4_kernel`."""
    inputs, p = _both(b[:, 0]), _both(b[:, 1])
    q = _both(c[:, 1]).conj()
    a = torch.diag_embed(_both(w)) - p[:, :, None] * q[:, None]
    half = a * (dt / 2)[:, None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    right = torch.cat([eye + half, (inputs * dt[:, None])[..., None]], dim=-1)
    solved = _solve(eye - half, right)
    return solved[..., :-1], solved[..., -1]


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
    outputs = _solve(wanted.mT, _both(c[:, 0]).conj()[..., None])[..., 0]
    return S4Matrices(a, inputs, outputs)


def s4_scan(u: Tensor, matrices: S4Matrices, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a chunk, all its steps at once.

    Args:
        u: (B, C, L) real.
        matrices: of :func:`s4_matrices`.
        state: (B, C, N) complex, after the steps before the chunk; ``None`` for zeros.

    Returns:
        y (B, C, L) real, without the direct path D u, and the state after the chunk.
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
    y = causal_convolution(u, (c[:, None] @ inputs)[:, 0].real)
    final = torch.einsum("cnl,bcl->bcn", inputs.flip(-1), u.to(inputs.dtype))
    if state is not None:
        y = y + torch.einsum("cln,bcn->bcl", outputs @ a, state).real
        final = final + torch.einsum("cmn,bcn->bcm", torch.linalg.matrix_power(a, length), state)
    return y, final


class S4(nn.Module):
    """S4 layer: convolution, direct path, GELU, dropout of channels, linear layer.

    Complex and Fourier parts run in float32, or in float64 for float64 weights, whatever autocast
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
        w, b, c = (
            torch.view_as_complex(x.to(dtype).contiguous()) for x in (self.w, self.B, self.C)
        )
        return w, b, c, self.log_dt.to(dtype).exp()

    def kernel(self, length: int) -> Tensor:
        """Impulse response (C, at least ``length``)."""
        w, b, c, dt = self.system()
        covered = self.l_max
        if length > covered:
            a, _ = _dense(w, b, c, dt)
            power = torch.linalg.matrix_power(a, covered)
            row = _both(c[:, 0]).conj()
            while covered < length:  # C (I - A^2l) = C (I - A^l) (I + A^l)
                row = row + (row[:, None] @ power)[:, 0]
                power = power @ power
                covered *= 2
            half = row[:, : self.d_state // 2].conj()
            c = torch.stack([half, c[:, 1]], dim=1)
        return s4_kernel(w, b, c, dt, covered)

    def matrices(self) -> S4Matrices:
        """The recurrence, solved in float64 and given in the precision of the Fourier parts."""
        found = s4_matrices(*self.system(torch.float64), self.l_max)
        if self.w.dtype == torch.float64:
            return found
        return S4Matrices(*(x.to(torch.complex64) for x in found))

    def _out(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """What follows the system: (B, C, L) to (B, L, C)."""
        y = F.gelu(y)
        if self.training and self.dropout:
            kept = y.new_empty(*y.shape[:2], 1).bernoulli_(1 - self.dropout)
            y = y * (kept / (1 - self.dropout))
        return self.output_linear(y.mT.to(dtype))

    def _sequence(self, x: Tensor) -> Tensor:
        if x.ndim not in (3, 5) or x.shape[-1] != self.dim or x[..., 0].numel() == 0:
            raise ValueError(
                f"x must be (B, L, {self.dim}) or (B, T, H, W, {self.dim}) and not empty, "
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
            (B, C, N) complex.

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
