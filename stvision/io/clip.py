"""Clips: frames with their true times, held as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stvision.io.sampling import fps_indices, mean_rate, uniform_indices


@dataclass(frozen=True)
class AudioTrack:
    """Where a clip's sound lies; nothing is decoded until a writer copies it.

    Attributes:
        path: file (or the bytes of a file) that holds the sound.
        start: first second of the sound that belongs to the clip, on the file's own clock.
        end: second at which it stops; None for the end of the file.
        stream: which of the file's audio streams, counted from 0.
    """

    path: str | PathLike[str] | bytes
    start: float = 0.0
    end: float | None = None
    stream: int = 0


@dataclass
class Clip:
    """Frames in RGB and the second at which each is shown.

    Attributes:
        frames: (T, H, W, C), uint8 in [0, 255] or floating point in [0, 1].
        times: (T,) float64, seconds on the clock of the source. Frame rates may vary: no code
            should derive a time from an index and a rate.
        fps: mean rate in frames per second, None where it has no meaning (one frame).
        audio: sound of the same span of the source, or None.

    Raises:
        TypeError: frames or times are not tensors of the dtypes above.
        ValueError: frames are not 4-dimensional or times do not match them.
    """

    frames: Tensor
    times: Tensor
    fps: float | None = None
    audio: AudioTrack | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.frames, Tensor) or not isinstance(self.times, Tensor):
            raise TypeError(
                "Clip takes frames and times as tensors; as_clip and Clip.from_frames convert "
                f"others (got {type(self.frames).__name__} and {type(self.times).__name__})"
            )
        if self.frames.ndim != 4:
            raise ValueError(f"frames has shape {tuple(self.frames.shape)}; a clip is (T, H, W, C)")
        if self.frames.dtype != torch.uint8 and not self.frames.is_floating_point():
            raise TypeError(
                f"frames has dtype {self.frames.dtype}; allowed are uint8 and floating point"
            )
        if self.times.shape != (len(self.frames),):
            raise ValueError(
                f"times has shape {tuple(self.times.shape)}; {len(self.frames)} frames need "
                f"({len(self.frames)},)"
            )
        self.times = self.times.to(torch.float64)

    @classmethod
    def from_frames(cls, frames: Tensor | np.ndarray, fps: float = 8.0) -> Clip:
        """Make a clip of frames shown at a constant rate from second 0.

        Args:
            frames: (T, H, W, C) tensor or array, uint8 or floating point in [0, 1].
            fps: frames per second, above 0.
        """
        if not fps > 0:
            raise ValueError(f"fps is {fps}; it must be above 0")
        tensor = torch.from_numpy(frames) if isinstance(frames, np.ndarray) else frames
        times = torch.arange(len(tensor), dtype=torch.float64) / fps
        return cls(tensor, times, float(fps))

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, which: slice | int | Sequence[int] | Tensor) -> Clip:
        """Select frames; an int gives a clip of one frame. Times stay those of the source."""
        index: Any
        if isinstance(which, slice):
            backwards = which.step is not None and which.step < 0  # tensors refuse such slices
            index = list(range(*which.indices(len(self)))) if backwards else which
        elif isinstance(which, int):
            if not -len(self) <= which < len(self):
                raise IndexError(f"frame {which} of a clip of {len(self)} frames")
            index = [which]
        else:
            index = torch.as_tensor(which, dtype=torch.long)
        return self._select(index)

    def _select(self, index: Any) -> Clip:
        times = self.times[index]
        fps = self.fps
        if len(times) != len(self.times):
            fps = mean_rate(times)
        audio = self.audio
        if audio is not None and len(times):
            end = float(times.max()) + 1 / (self.fps or 1)
            audio = replace(audio, start=float(times.min()), end=end)
        return replace(self, frames=self.frames[index], times=times, fps=fps, audio=audio)

    @property
    def height(self) -> int:
        """Pixels."""
        return self.frames.shape[1]

    @property
    def width(self) -> int:
        """Pixels."""
        return self.frames.shape[2]

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last (which lasts a mean frame)."""
        if not len(self):
            return 0.0
        return float(self.times[-1] - self.times[0]) + (1 / self.fps if self.fps else 0.0)

    def to_float(self, dtype: torch.dtype = torch.float32) -> Clip:
        """Frames as floating point in [0, 1]."""
        if self.frames.dtype == torch.uint8:
            return replace(self, frames=self.frames.to(dtype) / 255)
        return replace(self, frames=self.frames.to(dtype))

    def to_uint8(self) -> Clip:
        """Frames as uint8 in [0, 255], rounded to nearest; values outside [0, 1] are clamped."""
        if self.frames.dtype == torch.uint8:
            return self
        scaled = self.frames.float().clamp(0, 1).mul(255).round()
        return replace(self, frames=scaled.to(torch.uint8))

    def resize(self, height: int, width: int) -> Clip:
        """Resize with an antialiased bilinear filter; the dtype stays."""
        if height < 1 or width < 1:
            raise ValueError(f"size {height}x{width}: height and width must be at least 1 pixel")
        if (height, width) == (self.height, self.width):
            return self
        out = self.frames.new_empty((len(self), height, width, self.frames.shape[3]))
        for start in range(0, len(self), 32):  # bounds the floating-point copy
            part = self.frames[start : start + 32].permute(0, 3, 1, 2)
            part = part if part.dtype == torch.float64 else part.float()
            part = F.interpolate(
                part, (height, width), mode="bilinear", antialias=True, align_corners=False
            )
            if out.dtype == torch.uint8:
                part = part.round().clamp(0, 255)
            out[start : start + 32] = part.permute(0, 2, 3, 1).to(out.dtype)
        return replace(self, frames=out)

    def center_crop(self, height: int, width: int | None = None) -> Clip:
        """Cut the middle ``height`` x ``width`` pixels (a square without ``width``)."""
        width = height if width is None else width
        if not (1 <= height <= self.height and 1 <= width <= self.width):
            raise ValueError(
                f"cannot crop {height}x{width} from frames of {self.height}x{self.width}"
            )
        top, left = (self.height - height) // 2, (self.width - width) // 2
        return replace(self, frames=self.frames[:, top : top + height, left : left + width])

    def sample_uniform(self, n: int) -> Clip:
        """Pick ``n`` frames spread evenly over the clip's time, first and last included."""
        return self[uniform_indices(self.times, n)]

    def at_fps(self, fps: float) -> Clip:
        """Pick the frames nearest to a grid of ``fps`` frames per second.

        Frames are never repeated: a rate above the clip's own gives every frame once, at the
        clip's own rate, with a warning.
        """
        index = fps_indices(self.times, fps)
        return replace(self[index], fps=fps if len(index) < len(self) else self.fps)

    def numpy(self) -> np.ndarray:
        """Frames as an array (T, H, W, C) of the same dtype."""
        return self.frames.detach().cpu().numpy()

    def to_pil(self) -> list[Any]:
        """Frames as a list of ``PIL.Image``."""
        from PIL import Image

        frames = self.to_uint8().numpy()
        return [Image.fromarray(f[..., 0] if f.shape[-1] == 1 else f) for f in frames]
