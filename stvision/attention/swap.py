"""Swapped cross-attention between a spatial and a temporal branch (Swap-CA of VideoFactory).

Wang et al., "Swap Attention in Spatiotemporal Diffusions for Text-to-Video Generation" (2023). No
code was released; this follows the equations. Each branch queries the other inside
3-D windows, and from block to block the roles are swapped.
"""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from stvision.attention.volume import AttentionProjections
from stvision.attention.windows import whole_and_rest, window_attention
from stvision.layers.checks import check_volume
from stvision.layers.feed_forward import GatedFeedForward
from stvision.layers.frames import GroupNorm, group_norm_volume

Branch = Literal["temporal", "spatial"]
#: frames, rows and columns of a window; None for all frames
Window3D = tuple[int | None, int, int]


def _check_shift(shift: tuple[int, int, int], window: Window3D) -> None:
    limits = [1 if extent is None else extent for extent in window]
    if len(shift) != 3 or any(not 0 <= n < m for n, m in zip(shift, limits, strict=False)):
        raise ValueError(
            "shift must be frames, rows and columns of at least 0 and below the window's "
            f"{tuple(window)} (0 where it has all frames), got {tuple(shift)}"
        )


def windowed_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window3D,
    *,
    shift: tuple[int, int, int] = (0, 0, 0),
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention from one volume to another inside non-overlapping 3-D windows of both.

    Windows tile the volume from its first frame and upper left corner. Where they do not divide it,
    the last ones are smaller, which is what padding and masking the pads would give.

    Args:
        query: (B, T, H, W, heads, head_dim), any floating dtype.
        key: like ``query``, of the other volume.
        value: like ``key``.
        window: frames, rows and columns; None for all frames. Larger than the volume means all of
            it.
        shift: frames, rows and columns by which the windows are moved, below those of a window
            (0 for all frames). What lies before the first whole window is a smaller one, as in a
            cyclic shift whose ends are masked from each other; an axis that one window covers is
            not shifted.
        scale: default head_dim ** -0.5.
        backend: see :func:`stvision.attention.dispatch.dispatch_attention`.

    Returns:
        (B, T, H, W, heads, head_dim).

    Raises:
        ValueError: shapes differ or are not six-dimensional, a window below 1, or a shift that is
            not below it.
    """
    extent, rows, columns = window
    if extent is not None and extent < 1:
        raise ValueError(f"window must be at least 1 in frames, rows and columns, got {window}")
    if min(rows, columns) >= 1:  # else window_attention says so
        _check_shift(shift, window)
    space = (rows, columns)
    options: dict[str, Any] = {"shift": shift[1:], "scale": scale, "backend": backend}
    if extent is None or query.ndim != 6 or extent >= query.shape[1]:
        return window_attention(query, key, value, space, **options)
    batch, frames = query.shape[:2]
    parts = []
    for part, length in whole_and_rest(frames, extent, shift[0]):
        # spans of frames into the batch
        q, k, v = (x[:, part].unflatten(1, (-1, length)).flatten(0, 1) for x in (query, key, value))
        out = window_attention(q, k, v, space, **options)
        parts.append(out.unflatten(0, (batch, -1)).flatten(1, 2))
    return torch.cat(parts, dim=1)


class WindowCrossAttention(AttentionProjections):
    """:func:`windowed_cross_attention` with projections: two (B, T, H, W, C) to one.

    Args:
        dim: channels C.
        heads: attention heads; must divide ``dim``.
        window: frames, rows and columns of a window; None for all frames.
        shift: see :func:`windowed_cross_attention`.
        backend: attention backend by name.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: Window3D = (None, 8, 8),
        shift: tuple[int, int, int] = (0, 0, 0),
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, heads, backend=backend)
        size = tuple(window)
        if len(size) != 3 or None in size[1:] or min(n for n in size if n is not None) < 1:
            raise ValueError(
                "window must be frames (or None), rows and columns of at least 1, got "
                f"{tuple(window)}"
            )
        self.window = cast(Window3D, size)
        _check_shift(shift, self.window)
        self.shift = cast(tuple[int, int, int], tuple(shift))

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """Attend from ``query`` to ``context``, both (B, T, H, W, C)."""
        q, k, v = (
            self.split_heads(to(x))
            for to, x in ((self.to_q, query), (self.to_k, context), (self.to_v, context))
        )
        out = windowed_cross_attention(q, k, v, self.window, shift=self.shift, backend=self.backend)
        return self.to_out[0](out.flatten(-2))


class SwapBlock(nn.Module):
    """``h = attention(LN(u_q), LN(u_kv)) + u_q``, then ``FFN(LN(h)) + h``.

    Args:
        dim: channels C.
        heads: attention heads.
        window: see :class:`WindowCrossAttention`.
        shift: see :func:`windowed_cross_attention`.
        ff_mult: width of the gated feed-forward over C.
        backend: attention backend by name.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: Window3D = (None, 8, 8),
        shift: tuple[int, int, int] = (0, 0, 0),
        ff_mult: int = 4,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.norm_q = nn.LayerNorm(dim)
        self.norm_kv = nn.LayerNorm(dim)
        self.attn = WindowCrossAttention(dim, heads, window=window, shift=shift, backend=backend)
        self.norm_ff = nn.LayerNorm(dim)
        self.ff = GatedFeedForward(dim, ff_mult)

    def forward(self, query: Tensor, context: Tensor, skip_frames: int = 0) -> Tensor:
        """Transform ``query`` (B, T, H, W, C) by what it finds in ``context`` of the same shape.

        Args:
            query: projected branch that asks; it is the residual too.
            context: projected branch that answers.
            skip_frames: leading frames that the feed-forward leaves as they are.
        """
        h = self.attn(self.norm_q(query), self.norm_kv(context)) + query
        if skip_frames == 0:
            return self.ff(self.norm_ff(h)) + h
        later = h[:, skip_frames:]
        return torch.cat([h[:, :skip_frames], self.ff(self.norm_ff(later)) + later], dim=1)


class SwapAttention(nn.Module):
    """Join a spatial and a temporal branch, each (B, T, H, W, C), by windowed cross-attention.

    ``u = proj(group_norm(z))`` of each branch, :class:`SwapBlock` from the asking to the answering
    one, and ``z_s + z_t + proj_out(h')`` with ``proj_out`` zero-initialised: fresh, it is the sum of
    the branches. Weights belong to the roles, so a block that asks from the temporal branch is, with
    its arguments swapped, one that asks from the spatial branch.

    It takes two volumes and is therefore not in :data:`stvision.attention.ATTENTIONS`; an inflated
    U-Net uses it by ``temporal="swap"``.

    Args:
        dim: channels C.
        heads: attention heads; must divide ``dim``.
        window: frames, rows and columns of a window; None for all frames. The paper's sizes are not
            known.
        shift: frames, rows and columns by which the windows are moved, see
            :func:`windowed_cross_attention`; whether the paper shifts is not known.
        query: the branch that asks, "temporal" or "spatial".
        ff_mult: width of the gated feed-forward over C.
        norm_num_groups: groups of the group norms; must divide ``dim``.
        backend: attention backend by name.

    Raises:
        ValueError: heads or groups that do not divide ``dim``, or another option out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: Window3D = (None, 8, 8),
        shift: tuple[int, int, int] = (0, 0, 0),
        query: Branch = "temporal",
        ff_mult: int = 4,
        norm_num_groups: int = 32,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if query not in ("temporal", "spatial"):
            raise ValueError(f"query must be 'temporal' or 'spatial', got {query!r}")
        if norm_num_groups < 1 or dim % norm_num_groups:
            raise ValueError(f"norm_num_groups must divide dim {dim}, got {norm_num_groups}")
        self.query = query
        self.norm_q = GroupNorm(norm_num_groups, dim, eps=1e-6)
        self.norm_kv = GroupNorm(norm_num_groups, dim, eps=1e-6)
        self.proj_q = nn.Linear(dim, dim)
        self.proj_kv = nn.Linear(dim, dim)
        self.block = SwapBlock(
            dim, heads, window=window, shift=shift, ff_mult=ff_mult, backend=backend
        )
        self.proj_out = nn.Linear(dim, dim)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def update(
        self,
        spatial: Tensor,
        temporal: Tensor,
        norm_frames: int | None = None,
        skip_frames: int = 0,
    ) -> Tensor:
        """What is added to the sum of the branches; arguments as in :meth:`forward`."""
        if spatial.shape != temporal.shape:
            raise ValueError(
                "spatial and temporal must be (B, T, H, W, C) of one shape, got "
                f"{tuple(spatial.shape)} and {tuple(temporal.shape)}"
            )
        check_volume(spatial, self.proj_q.in_features, "spatial and temporal")
        asking, answering = spatial, temporal
        if self.query == "temporal":
            asking, answering = temporal, spatial
        frames = spatial.shape[1]
        shared = frames if norm_frames is None else norm_frames

        def projected(norm: nn.GroupNorm, proj: nn.Linear, z: Tensor) -> Tensor:
            images = z.flatten(0, 1).permute(0, 3, 1, 2)
            return proj(group_norm_volume(norm, images, frames, shared))

        u_q = projected(self.norm_q, self.proj_q, asking)
        u_kv = projected(self.norm_kv, self.proj_kv, answering)
        return self.proj_out(self.block(u_q, u_kv, skip_frames))

    def forward(
        self,
        spatial: Tensor,
        temporal: Tensor,
        norm_frames: int | None = None,
        skip_frames: int = 0,
    ) -> Tensor:
        """Join the branches.

        Args:
            spatial: z_s, (B, T, H, W, C), any floating dtype.
            temporal: z_t, the same shape.
            norm_frames: frames that share group-norm statistics, T (default) or 1.
            skip_frames: leading frames that the feed-forward leaves as they are.

        Returns:
            (B, T, H, W, C).

        Raises:
            ValueError: the shapes differ, are not five-dimensional or of another width.
        """
        update = self.update(spatial, temporal, norm_frames, skip_frames)
        return spatial + temporal + update
