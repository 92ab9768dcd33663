"""Dual attention of DaViT (Ding et al. 2022, sections 3.1 and 3.2), for clips (B, T, H, W, C).

Windows attend over space within a frame; channel groups attend over the tokens of a frame or of
the whole clip. An image is the case T = 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.attention.dispatch import dispatch_attention
from stvision.attention.windows import WindowLayout
from stvision.layers.checks import check_volume


def channel_group_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """Mix channels within each head, on the arguments (..., N, heads, D) of equal shape.

    Follows the released weights of DaViT, whose thirds of the qkv projection play the roles
    softmax(key^T value * scale) applied to query, the softmax over value's channels.

    Args:
        query: (..., N, heads, D), what is mixed.
        key: like ``query``; its channels are those of the output.
        value: like ``query``; its channels are what the softmax runs over.
        scale: factor on the scores, ``D ** -0.5`` if ``None``. The scores are sums over N tokens.

    Returns:
        (..., N, heads, D).

    Raises:
        ValueError: if the shapes differ.
    """
    if not query.shape == key.shape == value.shape:
        raise ValueError(
            "query, key and value must have one shape, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shape = query.transpose(-3, -2).shape
    q, k, v = (x.transpose(-3, -2).flatten(0, -3) for x in (query, key, value))
    return _mix(q, k, v, scale).view(shape).transpose(-3, -2)


def _mix(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """:func:`channel_group_attention` of one head after the other, (heads of all, N, D)."""
    # scaled before the sum over tokens, which float16 may not hold
    weights = torch.bmm((key * scale).transpose(1, 2), value).softmax(dim=-1)
    return torch.bmm(query, weights.transpose(1, 2))


class _Projected(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim {dim}, got {num_heads}")
        self.dim, self.num_heads = dim, num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def layout(self, grid: tuple[int, int, int]) -> None:
        """No order of a (T, H, W) grid's tokens saves this attention its own."""
        return


class ChannelGroupAttention(_Projected):
    """Channel attention over the tokens of each frame, or of the whole clip.

    Args:
        dim: channels C.
        num_heads: groups of channels; must divide ``dim``.
        qkv_bias: add a bias to the input projection.
        over_time: take the tokens of all frames together instead of each frame's.
        average_frames: with ``over_time``, average the scores over frames instead of summing them,
            so that a clip of equal frames gives what its frame gives.
        florence: the roles of Florence-2's tower (Xiao et al. 2023): softmax(query^T key / sqrt(N))
            applied to value, N the tokens. The weights of one kind do not fit the other.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        over_time: bool = False,
        *,
        average_frames: bool = False,
        florence: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        self.over_time, self.average_frames, self.florence = over_time, average_frames, florence

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, H, W, C) to the same shape; ValueError for another shape."""
        check_volume(x, self.dim)
        frames = x.shape[1] if self.over_time else 1
        count = frames * x.shape[2] * x.shape[3]
        shared = frames if self.average_frames else 1
        heads, size = self.num_heads, self.dim // self.num_heads
        # one copy brings the tokens of each head together for both products and their gradients
        qkv = self.qkv(x.reshape(-1, self.dim)).view(-1, count, 3, heads, size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, -1, count, size).unbind()
        if self.florence:
            # tokens of equal frames count once where their scores are averaged
            q, k, v = v, q, k
            scale = (count / shared) ** -0.5 / shared
        else:
            scale = size**-0.5 / shared
        out = _mix(q, k, v, scale).view(-1, heads, count, size).transpose(1, 2)
        return self.proj(out.reshape(-1, self.dim)).view(x.shape)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, over_time={self.over_time}"


class SpatialWindowAttention(_Projected):
    """Attention in square windows of each frame.

    Grids that the window does not divide are padded with zeros right and below. The released
    weights were trained with the padded tokens taking part; `mask_padding` leaves them out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        qkv_bias: bool = True,
        mask_padding: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        self.window_size, self.mask_padding = window_size, mask_padding

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, H, W, C) to the same shape; ValueError for another shape."""
        check_volume(x, self.dim)
        b, t, h, w, c = x.shape
        s = self.window_size
        ragged = h % s or w % s
        pad = (0, 0, 0, -w % s, 0, -h % s)
        frames = x if t == 1 else x.reshape(b * t, 1, h, w, c)
        if ragged:  # padding by nothing would still copy
            frames = F.pad(frames, pad)
        layout = WindowLayout((1, h + -h % s, w + -w % s), (s, s))
        windows = layout.pack(frames)
        rows = windows.flatten(0, 1)  # of which linear layers record no views, as of three axes
        qkv = self.qkv(rows).view(*windows.shape[:2], 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.unbind(2)
        mask = None
        if self.mask_padding and ragged:
            inside = F.pad(torch.ones(1, 1, h, w, 1, device=x.device), pad)
            mask = layout.pack(inside.expand(b * t, -1, -1, -1, -1)).bool()[:, None, None, :, 0]
        out = self.proj(dispatch_attention(q, k, v, mask=mask).reshape(rows.shape))
        out = layout.unpack(out.view(windows.shape))
        if ragged:
            out = out[:, :, :h, :w]
        return out if t == 1 else out.view(b, t, h, w, c)
