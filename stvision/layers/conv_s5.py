"""ConvS5 (Smith et al. 2023): convolutional state spaces over the frames of a clip (B, T, H, W, C).

``x_t = A x_(t-1) + conv(B, u_t)``, ``y_t = 2 Re conv(C, x_t)`` with one complex number of A for each
channel of the state, so that all frames are computed at once by a scan, or one after another with the
memory of one. Of each conjugate pair of states one is kept. Convolutions are those of images,
zero-padded, and the system runs in float32 (float64 for float64 weights) under autocast too.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.layers.checks import check_volume
from stvision.layers.frames import GroupNorm
from stvision.layers.linear_scan import check_implementation, linear_scan
from stvision.layers.pairs import as_complex, divide, exp, multiply
from stvision.layers.state_space import hippo_legs
from stvision.layers.vision import per_frame

READOUTS = ("resnet", "standard", "half_glu")


def zero_order_hold(rate: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Discrete A, and what B is multiplied by, for inputs that stay over a step.

    Args:
        rate: (P, 2), real and imaginary parts of eigenvalues, none of them zero.
        dt: (P,) step sizes.

    Returns:
        ``exp(rate dt)`` and ``(exp(rate dt) - 1) / rate``, both (P, 2).
    """
    a = exp(rate * dt[:, None])
    less = torch.stack((a[:, 0] - 1, a[:, 1]), dim=-1)
    return a, divide(less, rate)


def _truncated_he(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """He-normal draws, cut at two standard deviations and widened to the wanted variance."""
    std = math.sqrt(2 / fan_in) / 0.87962566103423978
    return nn.init.trunc_normal_(
        torch.empty(shape, dtype=torch.float64), std=std, a=-2 * std, b=2 * std
    )


class ConvSSM(nn.Module):
    """The linear system of ConvS5, without what follows it.

    Args:
        dim: channels U of the input and the output.
        state_dim: states before halving; the state has ``P = state_dim / 2`` complex channels.
        kernel_size: rows and columns of the convolutions B and C, odd.
        blocks: equal HiPPO blocks that the states begin as.
        clip_eigs: keep the real parts of the eigenvalues at or below -0.0001.
        dt_min: least step size at the start, drawn log-uniformly.
        dt_max: greatest step size at the start.
        implementation: of the scan, see :func:`stvision.layers.linear_scan.linear_scan`.

    Raises:
        ValueError: sizes that do not fit, or an unknown implementation.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int,
        kernel_size: int = 3,
        blocks: int = 1,
        clip_eigs: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or blocks < 1 or state_dim < 2 * blocks or state_dim % (2 * blocks):
            raise ValueError(
                f"state_dim must be a multiple of 2 * blocks ({2 * max(1, blocks)}) and dim and "
                f"blocks at least 1, got state_dim={state_dim}, dim={dim}, blocks={blocks}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min must be above 0 and at most dt_max, got {dt_min}, {dt_max}")
        self.dim, self.state_dim, self.kernel_size = dim, state_dim, kernel_size
        self.clip_eigs = clip_eigs
        check_implementation(implementation)
        self.implementation = implementation
        half = state_dim // 2
        w, vectors, _, _ = hippo_legs(state_dim // blocks)
        basis = torch.block_diag(*[vectors] * blocks)
        area = kernel_size**2
        b = basis.mH @ _truncated_he((state_dim, dim * area), dim * area).to(basis)
        c = _truncated_he((dim * area, state_dim), state_dim * area).to(basis) @ basis
        c = c.view(dim, area, half).transpose(1, 2)
        square = (kernel_size, kernel_size)
        low, high = math.log(dt_min), math.log(dt_max)
        self.lambda_re = nn.Parameter(w.real.repeat(blocks).float())
        self.lambda_im = nn.Parameter(w.imag.repeat(blocks).float())
        self.log_step = nn.Parameter(torch.rand(half) * (high - low) + low)
        #: (P, 2, U, k, k) and (U, P, 2, k, k): the axis of 2 holds real and imaginary parts
        b = b.view(half, 1, dim, *square)
        c = c.reshape(dim, half, 1, *square)
        self.B = nn.Parameter(torch.cat([b.real, b.imag], 1).float())
        self.C = nn.Parameter(torch.cat([c.real, c.imag], 2).float())

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Discrete A (P,), B (P, U, k, k) and C (U, P, k, k), complex."""
        a, b, c = self._system()
        return as_complex(a), torch.complex(b[:, 0], b[:, 1]), torch.complex(c[:, :, 0], c[:, :, 1])

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same as parts: (P, 2), (P, 2, U, k, k) and (U, P, 2, k, k)."""
        dtype = torch.promote_types(self.B.dtype, torch.float32)
        real = self.lambda_re.to(dtype)
        if self.clip_eigs:
            real = real.clamp(max=-1e-4)
        rate = torch.stack((real, self._imaginary()), dim=-1)
        a, gain = zero_order_hold(rate, self.log_step.to(dtype).exp())
        b = multiply(self.B.to(dtype).movedim(1, -1), gain[:, None, None, None])
        return a, b.movedim(-1, 1), self.C.to(dtype)

    def _imaginary(self) -> Tensor:
        return self.lambda_im.to(torch.promote_types(self.B.dtype, torch.float32))

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run over the frames of a clip, all at once.

        Args:
            u: (B, T, H, W, U).
            state: (B, H, W, P, 2), real and imaginary parts, after the frames before these; ``None``
                for zeros.

        Returns:
            y (B, T, H, W, U) in float32 or float64, and the state after the last frame.

        Raises:
            ValueError: another shape.
        """
        check_volume(u, self.dim, "u")
        pad = self.kernel_size // 2
        with torch.autocast(u.device.type, enabled=False):
            a, b, c = self._system()
            # real and imaginary parts lie side by side as channels, as complex numbers in memory
            kernel = b.flatten(0, 1)
            pairs = per_frame(lambda x: F.conv2d(x, kernel, padding=pad), u.to(kernel.dtype))
            driven = pairs.unflatten(-1, (-1, 2)).contiguous()
            x = linear_scan(driven, a, state, implementation=self.implementation)
            # 2 Re(c x) = 2 c_re x_re - 2 c_im x_im
            back = torch.stack((2 * c[:, :, 0], -2 * c[:, :, 1]), dim=2).flatten(1, 2)
            y = per_frame(lambda z: F.conv2d(z, back, padding=pad), x.flatten(-2))
        return y, x[:, -1]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, state_dim={self.state_dim}, kernel_size={self.kernel_size}"


def _gelu(x: Tensor) -> Tensor:
    """GELU as its authors' tanh approximation, with which the released weights were trained."""
    return F.gelu(x, approximate="tanh")


class _Resnet(nn.Module):
    """Two times group norm, GELU and convolution beside the identity; GELU after the sum."""

    def __init__(self, dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        pad = kernel_size // 2
        self.norm1 = GroupNorm(groups, dim, eps=1e-6)
        self.conv1 = nn.Conv2d(dim, dim, kernel_size, padding=pad)
        self.norm2 = GroupNorm(groups, dim, eps=1e-6)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size, padding=pad)

    def _image(self, x: Tensor) -> Tensor:
        y = self.conv1(_gelu(self.norm1(x)))
        return _gelu(x + self.conv2(_gelu(self.norm2(y))))

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        return per_frame(self._image, y)


class _Standard(nn.Module):
    """The system's output plus a convolution of its input, group norm, GELU."""

    def __init__(self, dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2)
        self.norm = GroupNorm(groups, dim, eps=1e-6)

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        return per_frame(lambda x: _gelu(self.norm(x)), y + per_frame(self.conv, u))


class _HalfGlu(nn.Module):
    """Layer norm, GELU, and a gate from a linear layer."""

    def __init__(self, dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, dim)

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        y = _gelu(self.norm(y))
        return y * self.fc(y).sigmoid()


class ConvS5(nn.Module):
    """One layer: the linear system, a nonlinear readout frame by frame, dropout, identity, norm.

    Args:
        dim: channels C.
        state_dim: see :class:`ConvSSM`; ``None`` for ``dim``.
        kernel_size: rows and columns of all convolutions, odd.
        readout: ``"resnet"`` (all released models; no direct path from the input), ``"standard"``
            or ``"half_glu"``.
        groups: of the group norms, which "half_glu" has none of; must divide ``dim``.
        dropout: chance to drop a value of a pixel and channel in all frames.
        prenorm: normalise what goes into the layer instead of what comes out.
        options: ``blocks``, ``clip_eigs``, ``dt_min``, ``dt_max`` and ``implementation`` of
            :class:`ConvSSM`.

    Raises:
        ValueError: an unknown readout, or sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int | None = None,
        kernel_size: int = 3,
        readout: str = "resnet",
        groups: int = 32,
        dropout: float = 0.0,
        prenorm: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if readout not in READOUTS:
            raise ValueError(f"readout must be one of {', '.join(READOUTS)}, got {readout!r}")
        if readout != "half_glu" and (groups < 1 or dim % groups):
            raise ValueError(f"groups must divide dim {dim}, got {groups}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        state_dim = dim if state_dim is None else state_dim
        self.dropout, self.prenorm = dropout, prenorm
        self.ssm = ConvSSM(dim, state_dim, kernel_size, **options)
        kind = {"resnet": _Resnet, "standard": _Standard, "half_glu": _HalfGlu}[readout]
        self.readout = kind(dim, kernel_size, groups)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def stream(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next frames of a clip, one or many.

        Args:
            x: (B, T, H, W, C).
            state: what the call for the frames before returned; ``None`` at the start.

        Returns:
            (B, T, H, W, C), equal to these frames of the whole clip's, and the state
            (B, H, W, state_dim / 2, 2), real and imaginary parts.

        Raises:
            ValueError: another shape.
        """
        u = self.norm(x) if self.prenorm else x
        y, state = self.ssm(u, state)
        y = self.readout(y.to(self.norm.weight.dtype), u)
        if self.training and self.dropout:
            kept = y.new_empty(y.shape[0], 1, *y.shape[2:]).bernoulli_(1 - self.dropout)
            y = y * (kept / (1 - self.dropout))
        x = x + y
        return (x if self.prenorm else self.norm(x)), state

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, T, H, W, C) to the same shape; no frame depends on a later one."""
        return self.stream(x)[0]
