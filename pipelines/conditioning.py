"""Reference frames of a video pipeline: whatever the user has, as clips of one length."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stvision.io import Clip, as_clip, open_video

#: Files that are read as a whole; anything else is a video, of which only the needed frames are.
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}


def as_reference_clips(
    frames: Any, image: Any, count: int | None, usual: int, fps: float | None
) -> list[Clip]:
    """The first frames of every source, as clips of equal length.

    Args:
        frames: what ``stvision.io.as_clip`` takes; a list of clips, paths or arrays of frames, or
            a five-dimensional array, holds one source a video.
        image: one image (path, PIL, array) or a list with one a video; used when ``frames`` is
            None.
        count: frames wanted of each source; ``usual``, or as many as there are, when None.
        usual: frames that the model was trained with.
        fps: rate at which frames of a source of known rate are taken; every frame when None.

    Raises:
        ValueError: a source has fewer frames than ``count``, or there is no source.
    """
    if count is not None and count < 1:
        raise ValueError(f"num_reference_frames must be at least 1, got {count}")
    wanted = usual if count is None else count
    if frames is None:
        images = list(image) if isinstance(image, list | tuple) else [image]
        clips = [as_clip(item)[:1] for item in images]
        wanted = 1 if count is None else count
    else:
        clips = [source_clip(source, wanted, fps=fps) for source in _sources(frames)]
    if not clips:
        raise ValueError("frames and image must hold at least one picture, got an empty list")
    shortest = min(len(clip) for clip in clips)
    if shortest == 0 or (count is not None and shortest < count):
        raise ValueError(
            f"num_reference_frames is {wanted}, but a reference clip has only {shortest} frames"
        )
    return [clip[: min(wanted, shortest)] for clip in clips]


def _sources(frames: Any) -> list[Any]:
    """Split a batch into its clips; a single clip is a batch of one."""
    if isinstance(frames, np.ndarray | Tensor) and frames.ndim == 5:
        return list(frames)
    if isinstance(frames, list | tuple) and frames and all(map(_is_clip_like, frames)):
        return list(frames)
    return [frames]


def _is_clip_like(item: Any) -> bool:
    """Whether one entry of a list is a clip by itself rather than a frame of one."""
    if isinstance(item, np.ndarray | Tensor):
        return item.ndim == 4
    if isinstance(item, list | tuple):
        return True
    return isinstance(item, Clip | str | Path)


def source_clip(source: Any, count: int, *, fps: float | None = None, start: float = 0.0) -> Clip:
    """The first ``count`` frames of a source, fewer when it ends; of a video no others are decoded.

    Args:
        source: what ``stvision.io.as_clip`` takes.
        count: frames wanted.
        fps: rate at which they are taken when the source's own is known; every frame when None.
        start: seconds after the source's beginning.

    Raises:
        ValueError: ``start`` is past the end.
    """
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.is_file() and path.suffix.lower() not in _PICTURES:
        with open_video(path) as reader:
            chosen = _frame_numbers(reader.times, reader.fps, count, fps, start)
            clip = reader.get(chosen)
    else:
        clip = as_clip(source)
        clip = clip[_frame_numbers(clip.times, clip.fps, count, fps, start)]
    return clip if fps is None else replace(clip, fps=fps)


def _frame_numbers(
    times: Any, rate: float | None, count: int, fps: float | None, start: float
) -> list[int]:
    """Numbers of the frames shown at ``start``, ``start + 1 / fps`` ..., counted from the first."""
    moments = np.asarray(times, dtype=np.float64)
    moments = moments - moments[0]
    last = moments[-1] + (1 / rate if rate else 0.0)
    if start > 0 and start >= last:
        raise ValueError(f"start {start} s is past the end of the clip, which has {last:.3f} s")
    if fps is None or rate is None or count == 1 or abs(fps - rate) < 1e-6:
        first = int(np.searchsorted(moments, start + 1e-6, side="right")) - 1
        return list(range(first, min(first + count, len(moments))))
    wanted = start + np.arange(count) / fps
    wanted = wanted[(wanted < last - 1e-6) | (np.arange(count) == 0)]
    # A frame is shown from its own time until the next one's.
    chosen = [int(n) for n in np.searchsorted(moments, wanted + 1e-6, side="right") - 1]
    if len(set(chosen)) < len(chosen):
        raise ValueError(
            f"fps {fps:g} is above the clip's own rate {rate:g}: reference frames would repeat; "
            f"give fps of at most {rate:g} or one reference frame"
        )
    return chosen


def frames_to_tensor(clip: Clip, height: int, width: int) -> Tensor:
    """Frames (3, T, height, width) in [-1, 1], scaled to cover the size and cut around the middle."""
    own_height, own_width = clip.frames.shape[1:3]
    if (own_height, own_width) != (height, width):
        scale = max(height / own_height, width / own_width)
        covering = (
            max(height, round(own_height * scale)),
            max(width, round(own_width * scale)),
        )
        clip = clip.resize(*covering).center_crop(height, width)
    pixels = clip.to_float().frames
    if pixels.shape[-1] == 1:
        pixels = pixels.expand(-1, -1, -1, 3)
    if pixels.shape[-1] != 3:
        raise ValueError(f"reference frames must have 1 or 3 channels, got {pixels.shape[-1]}")
    return pixels.movedim(-1, 0).to(torch.float32) * 2 - 1


def fitted_clip(clip: Clip, height: int, width: int) -> Clip:
    """The clip as the pipeline sees it, for a comparison with what it predicts."""
    frames = frames_to_tensor(clip, height, width).movedim(0, -1) / 2 + 0.5
    return Clip(frames=frames.clamp(0, 1), times=clip.times, fps=clip.fps, audio=None)
