"""Seer's spatial-autoregressive window-temporal attention ("SAWT"; Gu et al. 2024, Seer)."""

from torch import Tensor

from stvision.attention.volume import VolumeAttention
from stvision.attention.windows import window_attention


def seer_window(height: int, width: int) -> tuple[int, int]:
    """Window of a map of this size as in Seer: 8 x 8 from 32 rows on, 4 x 4 above 4 rows, else all.

    The number of rows decides alone.
    """
    if height <= 4:
        return height, width
    return (8, 8) if height >= 32 else (4, 4)


def windowed_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | tuple[int, int] | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention in windows of space over all frames.

    A token sees itself and the tokens of its window before it in (frame, row, column) order, so
    the mask is triangular within a frame too. It is never built: each window is one causal
    sequence, which flash attention takes as it is.

    Args:
        query: (B, T, H, W, heads, head_dim), any floating dtype.
        key: like ``query``.
        value: like ``query``.
        window: rows and columns; ``None`` for :func:`seer_window`. Windows that do not divide the
            map are smaller at its lower and right border.
        scale: default head_dim ** -0.5.
        backend: see :func:`stvision.attention.dispatch.dispatch_attention`.

    Returns:
        (B, T, H, W, heads, head_dim).

    Raises:
        ValueError: shapes differ or are not six-dimensional, or a window below 1.
    """
    if window is None:
        size = seer_window(*query.shape[2:4])
    else:
        size = (window, window) if isinstance(window, int) else (window[0], window[1])
    return window_attention(query, key, value, size, is_causal=True, scale=scale, backend=backend)


class SeerWindowAttention(VolumeAttention):
    """Windowed causal self-attention with rotary positions in the flattened volume.

    Maps (B, T, H, W, C) to (B, T, H, W, C). Rotary positions are indices in the whole
    (T, H, W) volume, taken before windows are cut. Keys: ``to_q|to_k|to_v.weight``,
    ``to_out.0.*``, ``rotary_emb.freqs``.

    Args:
        dim: channels C.
        heads: attention heads; must divide ``dim``.
        window_size: rows and columns of a window, ``None`` for :func:`seer_window`.
        rotary_dim: rotated channels per head, at most head_dim; 0 for none.
        backend: attention backend by name.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window_size: int | tuple[int, int] | None = None,
        rotary_dim: int = 32,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=True, rotary_dim=rotary_dim, backend=backend)
        size = (window_size,) * 2 if isinstance(window_size, int) else window_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"window_size must be one or two numbers of at least 1, got {size}")
        self.window_size = size

    def window(self, height: int, width: int) -> tuple[int, int]:
        if self.window_size is None:
            return seer_window(height, width)
        return min(self.window_size[0], height), min(self.window_size[1], width)
