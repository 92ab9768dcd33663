"""What vision transformers on grids (B, T, H, W, C) share: MLP, stochastic depth, convolutions."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: endings of what a frame convolution adds, which image weights lack and which starts at zero
FRAME_WEIGHTS = (".time.weight",)


def per_frame(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a module of images (N, C, H, W) to each frame of (B, T, H, W, C), channels last.

    Returns:
        (B, T, H', W', C').
    """
    batch, frames = x.shape[:2]
    out = module(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return out.view(batch, frames, *out.shape[1:])


class PatchConv(nn.Conv2d):
    """Strided convolution that first zero-pads right and below to multiples of its stride."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        height, width = input.shape[-2:]
        rows, columns = self.stride
        if height % rows or width % columns:  # padding by nothing would still copy
            input = F.pad(input, (0, -width % columns, 0, -height % rows))
        return super().forward(input)


class DropPath(nn.Module):
    """Drop a residual branch for a whole sample in training (Huang et al. 2016, Stochastic Depth).

    Args:
        rate: probability of dropping, 0 to below 1; what is kept is divided by ``1 - rate``.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate must be at least 0 and below 1, got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Keep or zero the samples along the first axis."""
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(x.shape[:1] + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_rates(rate: float, count: int) -> list[float]:
    """Rates of ``count`` branches, growing linearly from 0 to ``rate``."""
    return [rate * i / max(1, count - 1) for i in range(count)]


class Mlp(nn.Module):
    """Two linear layers with GELU between them on (..., C), keys ``fc1`` and ``fc2``.

    Args:
        dim: channels of the input and the output.
        ratio: hidden over outer channels.
        drop: dropout after each layer.
    """

    def __init__(self, dim: int, ratio: float = 4.0, drop: float = 0.0) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., C)."""
        # linear layers of rows record no views of their own, forward and backward
        hidden = F.gelu(self.fc1(x.reshape(-1, x.shape[-1])))
        if not self.drop.p:
            return cast(Tensor, self.fc2(hidden)).view(x.shape)
        return cast(Tensor, self.drop(self.fc2(self.drop(hidden)))).view(x.shape)


class FrameMix(nn.Module):
    """Depthwise convolution over the frames of each pixel, zero-padded, zero at the start.

    Fresh, it adds nothing, so a video model that holds it beside image layers gives what the image
    model gives.

    Args:
        dim: channels C.
        kernel_size: frames, odd.
    """

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        self.weight = nn.Parameter(torch.zeros(dim, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, T, H, W, C) to the same shape."""
        taps, frames = self.weight.shape[1], x.shape[1]
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, taps // 2, taps // 2))
        weight = self.weight.to(x.dtype)
        out = padded[:, :frames] * weight[:, 0]
        for tap in range(1, taps):
            out = out + padded[:, tap : tap + frames] * weight[:, tap]
        return out


class DepthwiseConv(nn.Module):
    """Depthwise convolution of each frame, with one over frames beside it where asked for.

    Args:
        dim: channels C.
        kernel_size: rows and columns, odd.
        frame_kernel: frames of an added :class:`FrameMix`, 0 for none.
    """

    def __init__(self, dim: int, kernel_size: int = 3, frame_kernel: int = 0) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        self.proj = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.time = FrameMix(dim, frame_kernel) if frame_kernel else None

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, T, H, W, C) to the same shape."""
        out = per_frame(self.proj, x)
        return out if self.time is None else out + self.time(x)


class PositionConv(DepthwiseConv):
    """``x`` plus a :class:`DepthwiseConv` of it: a position encoding that knows no grid size."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, T, H, W, C) to the same shape."""
        if self.time is None:
            return per_frame(lambda y: y + self.proj(y), x)
        return x + super().forward(x)
