"""Which frames to take: all choices are made on frame times in seconds, never on index / rate."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def mean_rate(times: Tensor) -> float | None:
    """Mean frames per second of (T,) times, None for fewer than two distinct times."""
    if len(times) < 2:
        return None
    span = float(times[-1] - times[0])
    return (len(times) - 1) / span if span > 0 else None


def nearest_indices(times: Tensor, wanted: Tensor) -> Tensor:
    """Index of the frame nearest to each wanted second; the earlier one on a tie.

    Args:
        times: (T,) float64 ascending seconds.
        wanted: (N,) float64 seconds.

    Returns:
        (N,) int64.
    """
    right = torch.searchsorted(times, wanted).clamp(0, len(times) - 1)
    left = (right - 1).clamp(min=0)
    # Half a nanosecond of slack: on a tie rounding must not decide.
    take_left = (wanted - times[left]).abs() <= (times[right] - wanted).abs() + 5e-10
    return torch.where(take_left, left, right)


def shown_indices(times: Tensor, wanted: Tensor) -> Tensor:
    """Index of the frame on screen at each wanted second: the last one that has begun.

    Seconds before the first frame give the first frame.
    """
    # Times that callers computed from fractions may lie a rounding step before the frame's.
    return (torch.searchsorted(times, wanted + 1e-6, right=True) - 1).clamp(min=0)


def uniform_indices(times: Tensor, n: int) -> list[int]:
    """Indices of ``n`` distinct frames spread evenly in time, first and last included.

    One frame asked for gives the middle one. Where the rate varies so much that two picks would
    fall on one frame, the picks are spread evenly over frame numbers instead.

    Raises:
        ValueError: ``n`` is below 1 or above the number of frames.
    """
    length = len(times)
    if not 1 <= n <= length:
        raise ValueError(f"num_frames is {n}; the clip has {length} frames, so 1 to {length}")
    if n == 1:
        return [(length - 1) // 2]
    wanted = torch.linspace(float(times[0]), float(times[-1]), n, dtype=torch.float64)
    picks = nearest_indices(times, wanted).tolist()
    if len(set(picks)) < n:
        picks = torch.linspace(0, length - 1, n, dtype=torch.float64).round().long().tolist()
    return picks


def segment_indices(times: Tensor, places: Tensor) -> list[int]:
    """Indices of distinct frames, one from each of equal parts of the clip's time.

    Args:
        times: (T,) float64 ascending seconds.
        places: (n,) where in its part each lies, 0 to 1; n is at most T.

    Raises:
        ValueError: more parts than frames.
    """
    n, length = len(places), len(times)
    if not 1 <= n <= length:
        raise ValueError(f"num_frames is {n}; the clip has {length} frames, so 1 to {length}")
    shares = (torch.arange(n, dtype=torch.float64) + places.clamp(0, 1 - 1e-9)) / n
    picks = nearest_indices(times, times[0] + shares * (times[-1] - times[0]))
    if len(picks.unique()) < n:  # parts of frames instead of time, which hold at least one each
        starts = torch.arange(n + 1) * length // n
        room = (starts[1:] - starts[:-1]).double()
        picks = starts[:-1] + (places.clamp(0, 1 - 1e-9) * room).long()
    return picks.tolist()


def view_indices(times: Tensor, n: int, number: int, count: int) -> list[int]:
    """Indices of ``n`` frames for one of several views of a clip, all spread over its whole time.

    Time is cut into ``n`` equal parts, and view k of K takes the frame at (k + 1/2) / K of each, so
    that the views lie between each other. A single view is :func:`uniform_indices`.

    Raises:
        ValueError: ``n`` is below 1 or above the number of frames, or there is no such view.
    """
    if not 0 <= number < count:
        raise ValueError(f"view {number} of {count}: views are numbered from 0")
    if count == 1:
        return uniform_indices(times, n)
    return segment_indices(times, torch.full((n,), (number + 0.5) / count, dtype=torch.float64))


def fps_indices(times: Tensor, fps: float) -> list[int]:
    """Indices of the frames nearest to the grid ``times[0] + k / fps``, each at most once.

    The grid ends where the last frame's time on screen (a mean frame) ends, so 10 s of 25 frames
    per second give 20 frames at 2, 5 at 0.5 and 73 at 7.3.

    Raises:
        ValueError: ``fps`` is not above 0.
    """
    if not fps > 0:
        raise ValueError(f"fps is {fps}; it must be above 0")
    rate = mean_rate(times)
    if rate is None:
        return list(range(len(times)))
    if fps > rate * 1.001:
        warnings.warn(
            f"asked for {fps:g} frames per second of a clip with {rate:g}: every frame is taken "
            "once, none is repeated",
            stacklevel=3,
        )
        return list(range(len(times)))
    duration = float(times[-1] - times[0]) + 1 / rate
    count = max(1, int(-(-(duration * fps - 1e-6) // 1)))
    wanted = times[0] + torch.arange(count, dtype=torch.float64) / fps
    return torch.unique_consecutive(nearest_indices(times, wanted)).tolist()
