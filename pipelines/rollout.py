"""Videos longer than the trained window: windows whose first frames are the last ones before.

``RollOut`` holds one call, checked and prepared, and everything that its windows share; it knows
no network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stvision.io import Clip
from stvision.models.sampling import Seed, randn_per_sample
from stvision.pipelines.prompts import TextStates
from stvision.pipelines.results import DriftMeter, VideoOutput, join_frames

StepEnd = Callable[[Any, int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]


@dataclass(kw_only=True)
class RollOut:
    """One call of a pipeline.

    Args:
        references: reference clips, one a video, all of one length.
        num_frames: length of the videos, references included.
        window: frames of one window.
        overlap: last frames of a window that are the references of the next.
        height: pixels.
        width: pixels.
        steps: denoising steps a window.
        guidance_scale: weight of guidance.
        eta: DDIM's eta.
        generator: noise, one entry a video.
        latents: noise that the caller gave (B, C, future frames, h, w).
        output_type: see ``VideoOutput``.
        fps: frames per second of every video.
        attention_backend: of this call.
        callback: after each step.
        callback_inputs: names of the tensors that it is given.

    Attributes:
        text: what the videos read; set once the windows are known to be right.
        drift: of colour, over the windows so far.

    Raises:
        ValueError: windows that could not move on.
    """

    references: list[Clip]
    num_frames: int
    window: int
    overlap: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    eta: float
    generator: Seed
    latents: Tensor | None
    output_type: str
    fps: list[float]
    attention_backend: str | None
    callback: StepEnd | None
    callback_inputs: Sequence[str]
    text: TextStates = field(init=False)
    drift: DriftMeter = field(default_factory=DriftMeter)

    def __post_init__(self) -> None:
        known = self.num_references
        if self.num_frames <= known:
            raise ValueError(
                f"num_frames counts the reference frames and must exceed their number {known}, "
                f"got {self.num_frames}"
            )
        if self.window <= max(known, self.overlap) or self.overlap < 1:
            raise ValueError(
                "overlap must be at least 1 and window must exceed overlap and reference frames, "
                f"got window {self.window}, overlap {self.overlap} and {known} reference frames"
            )

    @property
    def num_references(self) -> int:
        """Reference frames of every video."""
        return len(self.references[0])

    def windows(self) -> list[tuple[int, int]]:
        """(first, past the last) frame of every window, its reference frames included."""
        windows = [(0, min(self.window, self.num_frames))]
        while windows[-1][1] < self.num_frames:
            start = windows[-1][1] - self.overlap
            windows.append((start, start + self.window))
        return windows

    def noise(self, reference: Tensor, done: int, length: int) -> Tensor:
        """Standard normal noise of one window, float32; what the caller gave comes first.

        Args:
            reference: latents (B, C, R, h, w) of the window's reference frames.
            done: frames of the whole video that are finished.
            length: frames of the window.
        """
        batch, channels, kept = reference.shape[:3]
        shape = (batch, channels, length - kept, *reference.shape[3:])
        noise = randn_per_sample(shape, self.generator, reference.device)
        if self.latents is not None:
            start = max(done - self.num_references, 0)
            given = self.latents[:, :, start : start + shape[2]].to(noise)
            noise[:, :, : given.shape[2]] = given
        return noise

    def times(self, first: int, count: int) -> Tensor:
        """Seconds (B, ``count``), float64, of frames from number ``first`` on.

        Reference frames have their own times; the later ones are one frame's duration apart.
        """
        rows = []
        for clip, fps in zip(self.references, self.fps, strict=True):
            numbers = torch.arange(first, first + count, dtype=torch.float64)
            later = clip.times[-1].double() + (numbers - (len(clip) - 1)) / fps
            known = clip.times[first : first + count].double()
            rows.append(torch.cat([known, later[len(known) :]]))
        return torch.stack(rows)


def joined(chunks: Sequence[VideoOutput], output_type: str) -> VideoOutput:
    """The chunks of one call as one result."""
    last = chunks[-1]
    return VideoOutput(
        frames=join_frames([chunk.frames for chunk in chunks], output_type),
        times=torch.cat([chunk.times for chunk in chunks if chunk.times is not None], dim=1),
        fps=last.fps,
        drift=last.drift,
        interrupted=last.interrupted,
        peak_memory=last.peak_memory,
    )
