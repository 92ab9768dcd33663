"""What video pipelines return: frames in the asked form, with times, rate and drift."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from stvision.io import Clip

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_output_type(output_type: str) -> None:
    """Raise ValueError unless ``output_type`` is one that every pipeline knows."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {list(OUTPUT_TYPES)}, got {output_type!r}")


@dataclass(frozen=True)
class Drift:
    """How far the last frame's average colour is from the first frame's.

    Args:
        brightness: difference of mean luma (Rec. 709), from -1 (darker) to 1 (brighter).
        colour: length of the difference of mean chroma (Cb, Cr), 0 for none.
    """

    brightness: float
    colour: float


class DriftMeter:
    """Follows brightness and colour over the chunks of a stream; remembers two averages a clip."""

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._last: Tensor | None = None

    def update(self, frames: Tensor) -> list[Drift]:
        """Add frames (B, 3, T, H, W) in [0, 1] and return the drift of each clip so far."""
        means = frames.double().mean((-2, -1)).cpu()
        red, green, blue = means.unbind(1)
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        ycc = torch.stack([luma, (blue - luma) / 1.8556, (red - luma) / 1.5748], dim=1)
        if self._first is None:
            self._first = ycc[:, :, 0]
        self._last = ycc[:, :, -1]
        change = self._last - self._first
        return [Drift(float(item[0]), float(item[1:].norm())) for item in change]


@dataclass
class VideoOutput(BaseOutput):
    """What a video pipeline returns; also readable as a dict or, by index, as a tuple.

    Args:
        frames: by ``output_type``: ``"pil"``: list of lists of images; ``"np"``: float32
            (B, T, H, W, 3) in [0, 1]; ``"pt"``: float (B, T, 3, H, W) in [0, 1]; ``"latent"``:
            scaled latents (B, C, T, h, w).
        times: seconds of every frame, float64 (B, T).
        fps: frames per second of each clip.
        drift: brightness and colour drift of each clip; None for latents.
        interrupted: whether the call was stopped before its end.
        peak_memory: peak bytes: allocated during the call on a GPU, else resident in the process
            since its start.
    """

    frames: Any
    times: Tensor | None = None
    fps: list[float] | None = None
    drift: list[Drift] | None = None
    interrupted: bool = False
    peak_memory: int | None = None

    def clips(self) -> list[Clip]:
        """The videos as clips that carry their times, ready for ``stvision.io.save_clip``."""
        if isinstance(self.frames, Tensor) and (self.drift is None or self.frames.shape[2] != 3):
            raise ValueError("latents are no pictures; ask the pipeline for another output_type")
        clips = []
        for index, video in enumerate(self.frames):
            if isinstance(video, Tensor):
                pixels = video.movedim(1, -1).float().cpu()
            elif isinstance(video, np.ndarray):
                pixels = torch.from_numpy(video)
            else:
                pixels = torch.from_numpy(np.stack([np.asarray(image) for image in video]))
            fps = 8.0 if self.fps is None else self.fps[index]
            times = torch.arange(len(pixels), dtype=torch.float64) / fps
            if self.times is not None:
                times = self.times[index]
            clips.append(Clip(frames=pixels, times=times, fps=fps, audio=None))
        return clips

    def to_dict(self) -> dict[str, Any]:
        """Plain values without pixels, for JSON."""
        shape = list(getattr(self.frames, "shape", ()))
        if not shape and len(self.frames):
            first: Image.Image = self.frames[0][0]
            shape = [len(self.frames), len(self.frames[0]), first.height, first.width, 3]
        return {
            "shape": shape,
            "times": None if self.times is None else self.times.tolist(),
            "fps": self.fps,
            "drift": None if self.drift is None else [asdict(item) for item in self.drift],
            "interrupted": self.interrupted,
            "peak_memory": self.peak_memory,
        }


def convert_frames(frames: Tensor, output_type: str) -> Any:
    """Decoded frames (B, 3, T, H, W), about [-1, 1], as ``output_type`` asks (see VideoOutput)."""
    return VideoProcessor().postprocess_video(frames.float(), output_type=output_type)


def join_frames(parts: list[Any], output_type: str) -> Any:
    """Put chunks of one kind of output together along time."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts, dim=2 if output_type == "latent" else 1)
    if isinstance(first, np.ndarray):
        return np.concatenate(parts, axis=1)
    return [[image for part in parts for image in part[index]] for index in range(len(first))]
