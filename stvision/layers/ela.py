"""Efficient local attention (Xu and Wan 2024, ELA, section 3): a gate on rows, columns and frames.

The mean over all other axes gives a sequence along rows, columns or frames; one convolution and one
group norm, shared by all directions, and a sigmoid turn each into a gate, and the gates are
multiplied. It belongs behind the last convolution of a residual block, before the addition.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from stvision.layers.checks import check_whole
from stvision.layers.frames import group_norm
from stvision.layers.light_attention import from_clip, to_clip

#: variant -> taps of the convolution, channels that share a group of it, groups of the norm
ELA_VARIANTS: dict[str, tuple[int, int, int]] = {
    "tiny": (5, 1, 32),
    "base": (7, 1, 16),
    "small": (5, 8, 16),
    "large": (7, 8, 16),
}


def directional_gate(
    sequence: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_groups: int,
    *,
    causal: bool = False,
) -> Tensor:
    """``sigmoid(group_norm(conv(sequence)))`` along one direction.

    Args:
        sequence: (N, C, L), means over the other axes.
        weight: (C, C / groups, K) of a convolution without bias, K odd.
        norm_weight: (C,).
        norm_bias: (C,).
        norm_groups: groups of the norm; where each has one channel and L is 1 the gate is the
            sigmoid of the bias whatever comes in.
        causal: a place sees itself and what comes before it; the norm then takes the channels of a
            group at one place, not along the direction.

    Returns:
        (N, C, L), between 0 and 1.
    """
    taps, groups = weight.shape[2], sequence.shape[1] // weight.shape[1]
    pad = (taps - 1, 0) if causal else (taps // 2, taps // 2)
    mixed = F.conv1d(F.pad(sequence, pad), weight, groups=groups)
    if not causal:
        return group_norm(mixed, norm_groups, norm_weight, norm_bias).sigmoid()
    length = mixed.shape[2]
    places = mixed.transpose(1, 2).flatten(0, 1)  # each place a sample of its own
    normed = group_norm(places, norm_groups, norm_weight, norm_bias)
    return normed.unflatten(0, (-1, length)).transpose(1, 2).sigmoid()


class EfficientLocalAttention(nn.Module):
    """Gate rows and columns, and frames where asked for, of (B, T, H, W, C).

    Args:
        dim: channels C; a multiple of 8 for "small" and "large".
        variant: a name in :data:`ELA_VARIANTS`. The norm's groups are lowered to the greatest that
            divide ``dim``.
        over_time: pool rows and columns over frames too, and gate frames as well; otherwise each
            frame is gated alone.
        causal: with ``over_time``, no frame depends on a later one: rows and columns are gated
            frame by frame, frames with a convolution that looks back and a norm without time.
        channels_last: ``False`` to take (B, C, H, W) and (B, C, T, H, W) as convolutions give them.

    Raises:
        ValueError: an unknown variant, channels that do not fit (a causal norm of single channels
            would see nothing), or ``causal`` without ``over_time``.
    """

    def __init__(
        self,
        dim: int,
        variant: str = "base",
        *,
        over_time: bool = False,
        causal: bool = False,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if variant not in ELA_VARIANTS:
            raise ValueError(
                f"variant must be one of {', '.join(map(repr, ELA_VARIANTS))}, got {variant!r}"
            )
        taps, together, groups = ELA_VARIANTS[variant]
        check_whole(1, dim=dim)
        if dim % together:
            raise ValueError(f"dim must be a multiple of {together} for {variant!r}, got {dim}")
        if causal and not over_time:
            raise ValueError("causal=True needs over_time=True: single frames have no order")
        groups = math.gcd(dim, groups)
        if causal and groups == dim:
            raise ValueError(
                f"causal=True needs two channels in each of the norm's {groups} groups, got dim={dim}"
            )
        self.dim, self.variant = dim, variant
        self.over_time, self.causal, self.channels_last = over_time, causal, channels_last
        self.conv = nn.Conv1d(dim, dim, taps, groups=dim // together, bias=False)
        self.norm = nn.GroupNorm(groups, dim)

    def _gate(self, x: Tensor, axis: int, over: tuple[int, ...], causal: bool = False) -> Tensor:
        """Gate along ``axis`` of (B, T, H, W, C), shaped to multiply it."""
        mean = x.mean(over, keepdim=True)
        lines = mean.movedim(axis, -1)  # the axes left of it are samples or of size 1
        shape = lines.shape
        norm = self.norm
        gate = directional_gate(
            lines.reshape(-1, self.dim, shape[-1]),
            self.conv.weight,
            norm.weight,
            norm.bias,
            norm.num_groups,
            causal=causal,
        )
        return gate.to(x.dtype).view(shape).movedim(-1, axis)

    def forward(self, x: Tensor) -> Tensor:
        """Gate a grid of the shape that the arguments say; the output has the same shape."""
        grid = to_clip(x, self.dim, self.channels_last)
        pooled = self.over_time and not self.causal
        out = grid * self._gate(grid, 2, (1, 3) if pooled else (3,))
        out = out * self._gate(grid, 3, (1, 2) if pooled else (2,))
        if self.over_time:
            out = out * self._gate(grid, 1, (2, 3), self.causal)
        return from_clip(out, x, self.channels_last)

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, over_time={self.over_time}, causal={self.causal}"
