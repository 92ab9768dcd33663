"""A light attention block for convolutional networks: a gate on channels, on places, or on both.

Eisenbach et al. 2023 (arXiv 2302.14574) ask where a cheap attention block is worth its time in a
network that tells people apart on a robot. Neither its exact form nor code is public, so this is a
family of such blocks and not theirs: a gate on channels (ECA, Wang et al. 2020; squeeze and excite, Hu
et al. 2018), a gate on places (as in CBAM, Woo et al. 2018), or both side by side, multiplied.
:mod:`stvision.models.placement` puts blocks into networks and searches where;
:mod:`stvision.layers.non_local` is the heavy block that such a gate is held against.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.layers.checks import check_volume

KINDS = ("channel", "spatial", "both")
SQUEEZES = ("conv", "mlp")
FORMS = ("residual", "sigmoid")


def channel_taps(dim: int) -> int:
    """Taps of the convolution over ``dim`` channels: the odd number at or above half of
    ``log2(dim) + 1``, cut to an integer first (Wang et al. 2020, ECA-Net, section 3.2)."""
    taps = int((math.log2(dim) + 1) / 2)
    return taps + 1 - taps % 2


def conv_channel_logits(squeezed: Tensor, weight: Tensor) -> Tensor:
    """Mix neighbouring channels of means.

    Args:
        squeezed: (..., C).
        weight: (1, 1, K), K odd; channels past the ends are zero.

    Returns:
        (..., C).
    """
    lines = squeezed.reshape(-1, 1, squeezed.shape[-1])
    return F.conv1d(lines, weight, padding=weight.shape[2] // 2).view(squeezed.shape)


def spatial_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Mean and maximum over channels, and one convolution over both.

    Args:
        x: (B, T, H, W, C).
        weight: (1, 2, K, K), K odd, first for the mean; places past the borders are zero.

    Returns:
        (B, T, H, W, 1); each frame by itself.
    """
    maps = torch.stack((x.mean(-1), x.amax(-1)), 2).flatten(0, 1)
    mixed = F.conv2d(maps, weight, padding=weight.shape[3] // 2)
    return mixed.view(*x.shape[:4], 1)


def gate(x: Tensor, logits: Tensor, form: str = "residual") -> Tensor:
    """``x (1/2 + sigmoid(logits))``, exactly ``x`` where logits are 0, or ``x sigmoid(logits)``.

    Args:
        x: any shape.
        logits: a shape that broadcasts to ``x``; taken to the dtype of ``x`` after the sigmoid.
        form: "residual" for the first, gates between 1/2 and 3/2, or "sigmoid" for the second.
    """
    scale = logits.sigmoid()
    if form == "residual":
        scale = scale + 0.5
    return x * scale.to(x.dtype)


def to_clip(x: Tensor, dim: int, channels_last: bool) -> Tensor:
    """Check a grid and bring it to (B, T, H, W, C) without a copy.

    Args:
        x: (B, T, H, W, C), or without ``channels_last`` (B, C, H, W) or (B, C, T, H, W).
        dim: C.
        channels_last: which of the two.

    Raises:
        ValueError: another shape, or no place in it.
    """
    grid = x
    if not channels_last and x.ndim in (4, 5):
        grid = (x.unsqueeze(2) if x.ndim == 4 else x).permute(0, 2, 3, 4, 1)
    if channels_last:
        check_volume(x, dim)
    elif grid.ndim != 5 or grid.shape[-1] != dim or 0 in grid.shape[1:4]:
        raise ValueError(
            f"x must be (B, {dim}, H, W) or (B, {dim}, T, H, W) with at least one frame, row and "
            f"column, got {tuple(x.shape)}"
        )
    return grid


def from_clip(grid: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """Inverse of :func:`to_clip`; ``like`` is what went into it."""
    if channels_last:
        return grid
    out = grid.permute(0, 4, 1, 2, 3)
    return out.squeeze(2) if like.ndim == 4 else out


class LightAttention(nn.Module):
    """Gate channels, places or both of (B, T, H, W, C); fresh, its logits are 0.

    In the form "residual" a fresh block gives back its input bit by bit, so it can be put into a
    trained network. An image is the case T = 1.

    Args:
        dim: channels C.
        kind: "channel", "spatial" or "both"; both gates see the input and are multiplied, which
            spares the network a sigmoid of each of its numbers.
        squeeze: for channels, "conv" for one convolution over neighbouring channels, "mlp" for
            C -> C / reduction -> C with a ReLU between.
        reduction: of "mlp"; at least one hidden channel remains.
        taps: of "conv", odd; ``None`` for :func:`channel_taps`.
        kernel_size: of the convolution over places, odd.
        form: "residual" for ``x (1/2 + sigmoid)``, "sigmoid" for ``x sigmoid``.
        over_time: channel means over all frames; otherwise each frame is gated alone.
        channels_last: ``False`` to take (B, C, H, W) and (B, C, T, H, W) as convolutions give them.

    Raises:
        ValueError: an unknown name, sizes that are no positive (odd) numbers, or ``over_time``
            without a gate on channels.
    """

    def __init__(
        self,
        dim: int,
        kind: str = "both",
        *,
        squeeze: str = "conv",
        reduction: int = 16,
        taps: int | None = None,
        kernel_size: int = 7,
        form: str = "residual",
        over_time: bool = False,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("kind", kind, KINDS),
            ("squeeze", squeeze, SQUEEZES),
            ("form", form, FORMS),
        ):
            if value not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}"
                )
        for name, size in (("dim", dim), ("reduction", reduction)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        taps = channel_taps(dim) if taps is None else taps
        for name, size in (("taps", taps), ("kernel_size", kernel_size)):
            if size < 1 or size % 2 == 0:
                raise ValueError(f"{name} must be odd and at least 1, got {size}")
        if over_time and kind == "spatial":
            raise ValueError("over_time=True needs a gate on channels, got kind='spatial'")
        self.dim, self.kind, self.squeeze, self.form = dim, kind, squeeze, form
        self.over_time, self.channels_last = over_time, channels_last
        self.channel: nn.Module | None = None
        self.spatial: nn.Conv2d | None = None
        if kind != "spatial":
            if squeeze == "conv":
                last: nn.Module = nn.Conv1d(1, 1, taps, bias=False)
                self.channel = last
            else:
                hidden = max(1, dim // reduction)
                last = nn.Linear(hidden, dim)
                self.channel = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), last)
                nn.init.zeros_(last.bias)
            nn.init.zeros_(cast(Tensor, last.weight))
        if kind != "channel":
            self.spatial = nn.Conv2d(2, 1, kernel_size, bias=False)
            nn.init.zeros_(self.spatial.weight)

    def logits(self, x: Tensor) -> list[Tensor]:
        """What the sigmoids take, from (B, T, H, W, C), in shapes that broadcast to it."""
        found = []
        if self.channel is not None:
            squeezed = x.mean((1, 2, 3) if self.over_time else (2, 3), keepdim=True)
            if isinstance(self.channel, nn.Conv1d):
                found.append(conv_channel_logits(squeezed, self.channel.weight))
            else:
                found.append(self.channel(squeezed))
        if self.spatial is not None:
            found.append(spatial_logits(x, self.spatial.weight))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Gate a grid of the shape that the arguments say; the output has the same shape."""
        grid = to_clip(x, self.dim, self.channels_last)
        out = grid
        for logits in self.logits(grid):
            out = gate(out, logits, self.form)
        return from_clip(out, x, self.channels_last)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, kind={self.kind!r}, squeeze={self.squeeze!r}, form={self.form!r}, "
            f"over_time={self.over_time}"
        )
