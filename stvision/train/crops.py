"""Random resized crops of training clips, one for all frames of a clip, on the clips' device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def draw_crops(
    count: int,
    height: int,
    width: int,
    scale: Sequence[float],
    ratio: Sequence[float],
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Boxes of a random share of the area and a random shape (Szegedy et al. 2015).

    A box that does not fit is cut to the frame, where image libraries draw again: no draw depends
    on another's outcome, so nothing waits for the host.

    Args:
        count: boxes B.
        height: rows of the frames.
        width: columns of the frames.
        scale: least and greatest share of the area, above 0 and at most 1.
        ratio: least and greatest width over height, drawn by its logarithm.
        generator: source of the draws, on ``device``.
        device: of the result.

    Returns:
        (B, 4) int64: first row, rows, first column, columns.

    Raises:
        ValueError: shares or shapes that do not exist.
    """
    if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
        raise ValueError(
            "crop_scale must be two rising shares above 0 and at most 1 and crop_ratio two rising "
            f"numbers above 0, got {tuple(scale)} and {tuple(ratio)}"
        )
    draws = torch.rand(count, 4, generator=generator, device=device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = (low + (high - low) * draws[:, 1]).exp()
    rows = (area / shape).sqrt().round().long().clamp(1, height)
    columns = (area * shape).sqrt().round().long().clamp(1, width)
    top = (draws[:, 2] * (height - rows + 1)).long().clamp(max=height - 1)
    left = (draws[:, 3] * (width - columns + 1)).long().clamp(max=width - 1)
    return torch.stack([top, rows, left, columns], 1)


def _weights(start: Tensor, length: Tensor, full: int, size: int) -> Tensor:
    """(B, size, full): each row averages the pixels of a stretch under a triangle."""
    step = (length / size)[:, None, None]
    support = step.clamp(min=1)
    places = torch.arange(size, device=start.device, dtype=step.dtype)[:, None] + 0.5
    pixels = torch.arange(full, device=start.device) - start[:, None, None]
    weights = (1 - ((pixels + 0.5 - step * places) / support).abs()).clamp(min=0)
    inside = (pixels >= 0) & (pixels < length[:, None, None])
    weights = weights * inside
    return weights / weights.sum(-1, keepdim=True)


def crop_clips(frames: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """A box of each clip, brought to ``size`` by an antialiased linear filter.

    The same as ``F.interpolate(box, size, mode="bilinear", antialias=True)`` for each clip alone.

    Args:
        frames: (B, C, T, H, W) floating point.
        boxes: (B, 4) int64, see :func:`draw_crops`.
        size: rows and columns.

    Returns:
        (B, C, T, rows, columns).
    """
    height, width = frames.shape[-2:]
    wide = torch.promote_types(frames.dtype, torch.float32)
    top, rows, left, columns = boxes.to(wide).unbind(1)
    down = _weights(top, rows, height, size[0]).to(frames.dtype)
    across = _weights(left, columns, width, size[1]).to(frames.dtype)
    return down[:, None, None] @ frames @ across.mT[:, None, None]


def fit_clips(frames: Tensor, size: Sequence[int]) -> Tensor:
    """Clips scaled until they cover ``size``, and the middle of that: what a test sees of them.

    Args:
        frames: (B, C, T, H, W) floating point.
        size: rows and columns.

    Returns:
        (B, C, T, rows, columns).
    """
    height, width = frames.shape[-2:]
    rows, columns = size
    scale = max(rows / height, columns / width)
    scaled = max(rows, round(height * scale)), max(columns, round(width * scale))
    if scaled != (height, width):
        whole = torch.tensor([[0, height, 0, width]], device=frames.device)
        frames = crop_clips(frames, whole.expand(len(frames), -1), scaled)
    top, left = (scaled[0] - rows) // 2, (scaled[1] - columns) // 2
    return frames[..., top : top + rows, left : left + columns]


def flip_clips(frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Half of the clips (B, C, T, H, W) mirrored left to right, all frames of a clip alike."""
    draws = torch.rand(len(frames), generator=generator, device=frames.device)
    return torch.where((draws < 0.5).view(-1, 1, 1, 1, 1), frames.flip(-1), frames)
