"""Attention over the frames of each pixel, with rotary positions in frames or in seconds."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stvision.attention.volume import VolumeAttention
from stvision.attention.windows import WindowLayout, window_attention
from stvision.layers.checks import check_volume, may_read
from stvision.layers.rotary import apply_rotary, rotary_table, rotary_table_at


def _check_unit(unit: float) -> None:
    if not (unit > 0 and math.isfinite(unit)):
        raise ValueError(f"rotary_unit must be a number of seconds above 0, got {unit}")


def rotary_positions(
    shape: torch.Size | tuple[int, ...],
    times: Tensor | Sequence[Any] | None,
    fps: float | None,
    unit: float,
    device: torch.device,
) -> Tensor | None:
    """Positions of frames for rotary embeddings, in units of time.

    Args:
        shape: begins with (B, T).
        times: (T,) or (B, T), finite seconds, a tensor or lists of numbers; ``None`` for ``fps`` or
            frame numbers. Numbers on a GPU are not looked at.
        fps: frames a second, for frames at equal distances.
        unit: seconds that count as one position.
        device: where the positions are wanted.

    Returns:
        (T,) or (B, T) float64 (float32 on mps), or ``None`` for frame numbers.

    Raises:
        ValueError: both are given, or a shape or number that does not fit.
    """
    if times is not None and fps is not None:
        raise ValueError("give times or fps, not both")
    _check_unit(unit)
    wide = torch.float32 if device.type == "mps" else torch.float64
    batch, frames = shape[:2]
    if times is not None:
        if not isinstance(times, Tensor):
            try:
                times = torch.tensor(times, dtype=wide)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"times must be a tensor or equally long lists of numbers, got {times!r}"
                ) from error
        if tuple(times.shape) not in {(frames,), (batch, frames)}:
            raise ValueError(
                f"times must be ({frames},) or ({batch}, {frames}), got {tuple(times.shape)}"
            )
        if may_read(times) and not times.isfinite().all():
            raise ValueError(f"times must be finite seconds, got {times.tolist()}")
        return times.to(device=device, dtype=wide) / unit
    if fps is None:
        return None
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps must be a number above 0, got {fps}")
    return torch.arange(frames, device=device, dtype=wide) / fps / unit


def temporal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    times: Tensor | Sequence[Any] | None = None,
    fps: float | None = None,
    rotary_dim: int = 32,
    rotary_unit: float = 1.0,
    theta: float = 1e4,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of each pixel to itself in all frames, rotated by the frames' positions.

    A score depends on the distance of two frames: in frames, or, with ``times`` or ``fps``, in seconds,
    so that a clip means the same at another frame rate or with frames left out.

    Args:
        query: (B, T, H, W, heads, head_dim), any floating dtype.
        key: like ``query``.
        value: like ``query``.
        times: (T,) or (B, T), finite seconds of the frames, a tensor or lists of numbers; ``None``
            for ``fps`` or frame numbers.
        fps: frames a second, for frames at equal distances.
        rotary_dim: rotated channels of a head, at most head_dim is used; 0 for none.
        rotary_unit: seconds that count as one position; with one frame a unit, seconds and frame
            numbers are the same.
        theta: base of the frequencies.
        is_causal: see only earlier frames, in their order, and the own one.
        scale: default head_dim ** -0.5.
        backend: see :func:`stvision.attention.dispatch.dispatch_attention`.

    Returns:
        (B, T, H, W, heads, head_dim).

    Raises:
        ValueError: shapes that differ, both ``times`` and ``fps``, or numbers that do not fit.
    """
    if query.ndim != 6 or query.shape != key.shape:
        raise ValueError(
            "query, key and value must be (B, T, H, W, heads, head_dim) of one shape, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    positions = rotary_positions(query.shape, times, fps, rotary_unit, query.device)
    rotated = min(rotary_dim, query.shape[-1]) // 2 * 2
    if rotated:
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        if positions is None:
            table = rotary_table(query.shape[1], rotated, theta, device=query.device, dtype=dtype)
        else:
            table = rotary_table_at(positions, rotated, theta, dtype=dtype)
        table = table[..., None, None, None, :, :]
        query, key = (apply_rotary(x, table) for x in (query, key))
    return window_attention(
        query, key, value, (1, 1), is_causal=is_causal, scale=scale, backend=backend
    )


class TemporalAttention(VolumeAttention):
    """Each pixel sees itself in all frames: (B, T, H, W, C) to (B, T, H, W, C).

    Rotary positions are frame numbers, or seconds where :meth:`forward` is told them.

    Args:
        dim: channels C.
        heads: attention heads; must divide ``dim``.
        causal: see only earlier frames and the own one.
        rotary_dim: rotated channels per head, at most head_dim; 0 for none.
        rotary_unit: seconds that count as one position, such as the distance of two frames in
            training: then times at that rate are the frame numbers.
        backend: attention backend by name.

    Raises:
        ValueError: a unit that is not above 0.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        rotary_dim: int = 32,
        rotary_unit: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, rotary_dim=rotary_dim, backend=backend)
        _check_unit(rotary_unit)
        self.rotary_unit = rotary_unit

    def window(self, height: int, width: int) -> tuple[int, int]:
        return 1, 1

    def positions(self, layout: WindowLayout, like: Tensor) -> Tensor | None:
        if self.rotary_emb is None:
            return None
        frames, height, width = layout.grid
        table = self.rotary_emb.table(frames, like)[:, None, None]
        return table.expand(-1, height, width, -1, -1)

    def forward(
        self,
        x: Tensor,
        times: Tensor | Sequence[Any] | None = None,
        fps: float | None = None,
    ) -> Tensor:
        """Attend over the frames.

        Args:
            x: (B, T, H, W, C), any floating dtype.
            times: (T,) or (B, T), finite seconds of the frames, a tensor or lists of numbers;
                ``None`` for ``fps`` or frame numbers.
            fps: frames a second, for frames at equal distances.

        Returns:
            (B, T, H, W, C).

        Raises:
            ValueError: another shape, or both ``times`` and ``fps``.
        """
        if times is None and fps is None:
            return super().forward(x)
        check_volume(x, self.to_q.in_features)
        query, key, value = (self.split_heads(to(x)) for to in (self.to_q, self.to_k, self.to_v))
        rotary = self.rotary_emb
        out = temporal_attention(
            query,
            key,
            value,
            times=times,
            fps=fps,
            rotary_dim=0 if rotary is None else rotary.dim,
            rotary_unit=self.rotary_unit,
            theta=1e4 if rotary is None else rotary.theta,
            is_causal=self.causal,
            backend=self.backend,
        )
        return self.to_out[0](out.flatten(-2))
