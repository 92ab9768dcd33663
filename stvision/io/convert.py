"""``as_clip``: whatever holds frames becomes a ``Clip``."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stvision.io.clip import Clip
from stvision.io.source import check_exists, is_file_object

_CHANNELS = (1, 3, 4)


def as_clip(source: Any, fps: float | None = None) -> Clip:
    """Turn anything that holds frames into a clip.

    Args:
        source: a ``Clip``; a path, bytes or file object of a video, image or GIF; a folder of
            images or a list of image files; a ``PIL.Image`` or a list of them; an array or tensor
            (T, H, W, C), (T, C, H, W), (T, H, W), (H, W, C) or (H, W), uint8 or floating point in
            [0, 1]; or a list of such frames.
        fps: frames per second for sources that carry no times (8 by default); for those that do
            (videos, GIF, clips) the rate to which they are sampled.

    Returns:
        A clip with three channels. A ``Clip`` is returned as it is when no ``fps`` is asked for.

    Raises:
        TypeError: ``source`` holds nothing that can be read as frames.
        ValueError: shapes do not fit, values lie outside the range, or the file is unreadable.
    """
    if isinstance(source, Clip):
        return source if fps is None else source.at_fps(fps)
    from stvision.io.images import ImageReader, is_image_source
    from stvision.io.reader import read_clip

    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    is_list_of_files = (
        isinstance(source, list | tuple)
        and len(source) > 0
        and all(isinstance(item, str | os.PathLike) for item in source)
    )
    if is_list_of_files:
        with ImageReader(list(source), fps=fps) as reader:
            return reader.get(slice(None))
    if not (isinstance(source, str | os.PathLike | bytes) or is_file_object(source)):
        return frames_to_clip(source, fps)
    check_exists(source)
    if not is_image_source(source):
        return read_clip(source, fps=fps)
    with ImageReader(source) as animation:
        if animation.carries_times:
            return animation.read(fps=fps)
    with ImageReader(source, fps=fps) as reader:
        return reader.get(slice(None))


def frames_to_clip(source: Any, fps: float | None = None) -> Clip:
    """The part of ``as_clip`` for frames in memory."""
    if isinstance(source, Clip):
        return source
    frames = _to_tensor(source)
    if frames.shape[-1] != 3:
        frames = frames[..., :1].expand(*frames.shape[:3], 3) if frames.shape[-1] == 1 else frames
        frames = frames[..., :3].contiguous()
    if not len(frames):
        raise ValueError("there are no frames: the first axis has length 0")
    if frames.is_floating_point():
        low, high = float(frames.min()), float(frames.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails too
            raise ValueError(
                f"floating-point frames hold values from {low:g} to {high:g}; allowed is [0, 1]"
            )
    clip = Clip.from_frames(frames, 8.0 if fps is None else fps)
    if len(clip) == 1:
        clip.fps = None
    return clip


def _to_tensor(source: Any) -> Tensor:
    if isinstance(source, Tensor):
        return _arrange(source.detach())
    if isinstance(source, np.ndarray):
        return _arrange(torch.from_numpy(np.ascontiguousarray(source)))
    if hasattr(source, "getexif"):  # PIL.Image, without importing it for every array
        from stvision.io.images import flatten

        return torch.from_numpy(np.array(flatten(source)))[None]
    if isinstance(source, list | tuple):
        if not source:
            raise ValueError("an empty list holds no frames")
        parts = [_to_tensor(item) for item in source]
        shapes = sorted({tuple(part.shape[1:]) for part in parts})
        if len(shapes) > 1:
            raise ValueError(f"frames differ in size: {shapes[0]} and {shapes[1]}")
        return torch.cat(parts)
    raise TypeError(
        f"cannot read frames from {type(source).__name__}; allowed are a Clip, path, bytes, file "
        "object, PIL.Image, array, tensor, and lists of images"
    )


def _arrange(frames: Tensor) -> Tensor:
    """Bring the axes into (T, H, W, C)."""
    if frames.dtype != torch.uint8 and not frames.is_floating_point():
        raise TypeError(
            f"frames have dtype {frames.dtype}; allowed are uint8 and floating point in [0, 1]"
        )
    shape = tuple(frames.shape)
    if frames.ndim == 2:
        return frames[None, :, :, None]
    if frames.ndim == 3:
        if shape[-1] in _CHANNELS:
            return frames[None]
        return frames[None].permute(0, 2, 3, 1) if shape[0] in _CHANNELS else frames[..., None]
    if frames.ndim == 4:
        if shape[-1] in _CHANNELS:
            return frames
        if shape[1] in _CHANNELS:
            return frames.permute(0, 2, 3, 1)
    raise ValueError(
        f"frames have shape {shape}; allowed are (T, H, W, C), (T, C, H, W), (T, H, W), (H, W, C) "
        "and (H, W) with 1, 3 or 4 channels"
    )
