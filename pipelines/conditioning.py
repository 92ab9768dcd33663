"""Reference frames of a video pipeline: whatever the user has, as clips of one length."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stvision.io import Clip, VideoReader, as_clip, open_video
from stvision.io.images import is_image_source

#: Files that hold one picture: a list of them is one clip, a list of others one clip each.
STILLS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}


def as_reference_clips(
    frames: Any,
    image: Any,
    count: int | None,
    usual: int,
    fps: float | None,
    untimed_fps: float,
) -> list[Clip]:
    """The first frames of every source, as clips of equal length that keep their source's rate.

    Args:
        frames: what :func:`source_clip` takes; a list of clips, videos or arrays of frames,
            or a five-dimensional array, holds one source a video. A list of image files is one
            clip.
        image: one image (path, PIL, array) or a list with one a video; used when ``frames`` is
            None.
        count: frames wanted of each source; ``usual``, or as many as there are, when None.
        usual: frames that the model was trained with.
        fps: rate at which frames of a source of known rate are taken; every frame when None.
        untimed_fps: rate of sources that carry no times, such as arrays and images.

    Raises:
        ValueError: a source has fewer frames than ``count``, sources shorter than ``usual`` differ
            in length, or there is no source.
    """
    if count is not None and count < 1:
        raise ValueError(f"num_reference_frames must be at least 1, got {count}")
    wanted = usual if count is None else count
    if frames is None:
        sources = list(image) if isinstance(image, list | tuple) else [image]
        wanted = 1 if count is None else count
    else:
        sources = _sources(frames)
    if not sources:
        raise ValueError("frames and image must hold at least one picture, got an empty list")
    clips = [source_clip(item, wanted, fps=fps, untimed_fps=untimed_fps) for item in sources]
    lengths = [len(clip) for clip in clips]
    if min(lengths) == 0 or (count is not None and min(lengths) < count):
        raise ValueError(
            f"num_reference_frames is {wanted}, but a reference clip has only {min(lengths)} frames"
        )
    if min(lengths) != max(lengths):
        raise ValueError(
            f"the reference clips have {lengths} frames of the {wanted} that are used; videos of "
            f"one call share their number: give num_reference_frames={min(lengths)}, or clips of "
            "one length"
        )
    return clips


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
    if isinstance(item, str | Path):
        return Path(item).suffix.lower() not in STILLS
    return isinstance(item, list | tuple | Clip)


def source_clip(
    source: Any,
    count: int,
    *,
    fps: float | None = None,
    start: float = 0.0,
    untimed_fps: float = 8.0,
) -> Clip:
    """The first ``count`` frames of a source, fewer when it ends; no others of a video are decoded.

    Args:
        source: what ``stvision.io.as_clip`` takes, an open ``VideoReader``, or an iterator of
            frames, of which no more are taken than are used.
        count: frames wanted.
        fps: rate at which they are taken when the source has times; every frame when None.
        start: seconds after the source's beginning.
        untimed_fps: rate of sources that carry no times, used when ``fps`` is None.

    Returns:
        A clip whose ``fps`` is that at which its frames were taken.

    Raises:
        ValueError: ``start`` is past the end, or ``fps`` is so high that frames would repeat.
    """
    if isinstance(source, VideoReader):
        rate = source.fps
        clip = source.get(_frame_numbers(source.times, rate, count, fps, start))
    elif _is_video(source):
        with open_video(source) as reader:
            rate = reader.fps
            clip = reader.get(_frame_numbers(reader.times, rate, count, fps, start))
    elif isinstance(source, Iterator):
        rate = fps or untimed_fps
        skipped = int(start * rate + 1e-6)
        taken = list(islice(source, skipped, skipped + count))
        if not taken:
            raise ValueError(f"the iterator of frames ends before second {start:g}")
        clip = as_clip(taken, fps=rate)
    else:
        timed = isinstance(source, Clip) or Path(str(source)).suffix.lower() == ".gif"
        clip = as_clip(source) if timed else as_clip(source, fps=fps or untimed_fps)
        rate = clip.fps if timed else fps or untimed_fps
        clip = clip[_frame_numbers(clip.times, rate, count, fps, start)]
    return replace(clip, fps=rate if fps is None else fps)


def _is_video(source: Any) -> bool:
    """Whether ``source`` is an existing video file, rather than pictures or frames in memory."""
    if isinstance(source, bytes) or hasattr(source, "read"):
        return not is_image_source(source)
    if not isinstance(source, str | Path) or not Path(source).is_file():
        return False
    return Path(source).suffix.lower() not in {*STILLS, ".gif"}


def _frame_numbers(
    times: Any, rate: float | None, count: int, fps: float | None, start: float
) -> list[int]:
    """Numbers of the frames shown at ``start``, ``start + 1 / fps`` ..., counted from the first."""
    moments = np.asarray(times, dtype=np.float64)
    count = min(count, len(moments))
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
