"""Attention inside windows in space over all frames of a volume, and the order of their tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stvision.attention.dispatch import dispatch_attention


@dataclass(frozen=True)
class WindowLayout:
    """Windows in space over all frames, each one a sequence in (frame, row, column) order.

    Args:
        grid: (T, H, W) of the volume.
        window: (rows, columns) of a window; H and W must be multiples.
    """

    grid: tuple[int, int, int]
    window: tuple[int, int]

    @property
    def counts(self) -> tuple[int, int]:
        """Windows along H and along W."""
        return self.grid[1] // self.window[0], self.grid[2] // self.window[1]

    @property
    def length(self) -> int:
        """Tokens of one window: T · rows · columns."""
        return self.grid[0] * self.window[0] * self.window[1]

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one frame inside one window."""
        return self.window[0] * self.window[1]

    def split(self, x: Tensor, start: int = 1) -> Tensor:
        """View axes T, H, W from ``start`` as (T, windows, rows, windows, columns)."""
        (nh, nw), (sh, sw) = self.counts, self.window
        return x.view(*x.shape[: start + 1], nh, sh, nw, sw, *x.shape[start + 3 :])

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) to (B · windows, length, C), one copy at most."""
        packed = self.split(x).permute(0, 2, 4, 1, 3, 5, 6)
        return packed.reshape(-1, self.length, x.shape[-1])

    def unpack_view(self, packed: Tensor) -> Tensor:
        """(B · windows, length, C) to a view (B, T, windows, rows, windows, columns, C)."""
        (nh, nw), (sh, sw) = self.counts, self.window
        shape = (-1, nh, nw, self.grid[0], sh, sw, packed.shape[-1])
        return packed.reshape(shape).permute(0, 3, 1, 4, 2, 5, 6)

    def unpack(self, packed: Tensor) -> Tensor:
        """(B · windows, length, C) to (B, T, H, W, C), one copy at most."""
        return self.unpack_view(packed).reshape(-1, *self.grid, packed.shape[-1])


def whole_and_rest(size: int, window: int, shift: int = 0) -> list[tuple[slice, int]]:
    """The part of an axis covered by whole windows, and the rests, each with its window.

    The first whole window begins at ``shift``; an axis that one window covers is not shifted.
    """
    first = shift if window < size else 0
    covered = first + (size - first) // window * window
    pieces = [
        (slice(0, first), first),
        (slice(first, covered), window),
        (slice(covered, size), size - covered),
    ]
    return [(part, extent) for part, extent in pieces if part.stop > part.start]


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: tuple[int, int],
    *,
    shift: tuple[int, int] = (0, 0),
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention inside windows of ``window`` rows and columns over all frames.

    Windows tile the map from its upper left corner. Where they do not divide it, the last row
    and column of windows are smaller: those borders are attended apart, so no call needs a mask.

    Args:
        query: (B, T, H, W, heads, head_dim), any floating dtype.
        key: like ``query``.
        value: like ``query``.
        window: rows and columns; larger than the map means the whole map.
        shift: rows and columns by which the windows are moved, below those of a window; what lies
            before the first whole window is a smaller one.
        is_causal: a token sees itself and what comes before it in its window in (frame, row,
            column) order.
        scale: default head_dim ** -0.5.
        backend: see :func:`stvision.attention.dispatch.dispatch_attention`.

    Returns:
        (B, T, H, W, heads, head_dim).

    Raises:
        ValueError: shapes differ or are not six-dimensional, a window below 1, or a shift that is
            not below it.
    """
    if query.ndim != 6 or query.shape != key.shape or key.shape != value.shape:
        raise ValueError(
            "query, key and value must be (B, T, H, W, heads, head_dim) of one shape, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if min(window) < 1:
        raise ValueError(f"window must be at least 1 in rows and columns, got {window}")
    if any(not 0 <= move < extent for move, extent in zip(shift, window, strict=True)):
        raise ValueError(f"shift must be at least 0 and below the window {window}, got {shift}")
    frames, height, width = query.shape[1:4]
    heads = query.shape[4:]
    strips = []
    for rows, row_extent in whole_and_rest(height, window[0], shift[0]):
        parts = []
        for columns, column_extent in whole_and_rest(width, window[1], shift[1]):
            grid = (frames, rows.stop - rows.start, columns.stop - columns.start)
            layout = WindowLayout(grid, (row_extent, column_extent))
            packed = (
                layout.pack(x[:, :, rows, columns].flatten(-2)).unflatten(-1, heads)
                for x in (query, key, value)
            )
            out = dispatch_attention(*packed, is_causal=is_causal, scale=scale, backend=backend)
            parts.append(layout.unpack(out.flatten(-2)))
        strips.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=3))
    out = strips[0] if len(strips) == 1 else torch.cat(strips, dim=2)
    return out.unflatten(-1, heads)
