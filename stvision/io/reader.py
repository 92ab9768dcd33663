"""The reader that every backend implements, and the doors ``open_video`` and ``read_clip``."""

from __future__ import annotations

import importlib
import math
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from stvision.io.clip import AudioTrack, Clip
from stvision.io.sampling import fps_indices, mean_rate, shown_indices, uniform_indices
from stvision.io.source import is_file_object

# name -> "module:class"; imported only when asked for.
BACKENDS: dict[str, str] = {
    "pyav": "stvision.io.backends.pyav:PyAVReader",
    "torchcodec": "stvision.io.backends.torchcodec:TorchCodecReader",
    "decord": "stvision.io.backends.decord:DecordReader",
}


class FrameError(ValueError):
    """A frame that the file announces cannot be decoded."""


class VideoReader(ABC):
    """Random and sequential access to the frames of a video.

    Use it in a ``with`` block, or call ``close``. Readers hold one decoder, decode nothing ahead
    beyond what the decoder itself has in flight, and are not safe to share between threads.

    Attributes:
        name: what error sentences call the source.
        times: (T,) float64, seconds at which the frames are shown, ascending.
        fps: mean frames per second, None for one frame.
        height: pixels, after rotation and resizing.
        width: pixels, after rotation and resizing.
        rotation: degrees counter-clockwise that were applied to stand the picture upright.
        audio: the file's first audio stream, or None.
        truncated: the file ends before the frames that it announces; ``len`` counts those left.
        announced: frames that the file claims to hold, 0 where it does not say.
    """

    name: str
    times: Tensor
    fps: float | None
    height: int
    width: int
    rotation: int = 0
    audio: AudioTrack | None = None
    truncated: bool = False
    announced: int = 0
    _told: bool = False  # of the truncation

    @abstractmethod
    def _decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index, frame) for ascending distinct ``indices``; frames are (H, W, 3) uint8.

        A frame that cannot be decoded is left out. A yielded array is valid until the next one.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the decoder and close the file. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.times)

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last, which lasts a mean frame."""
        return float(self.times[-1] - self.times[0]) + (1 / self.fps if self.fps else 0.0)

    def get(self, indices: int | slice | Sequence[int] | Tensor) -> Clip:
        """Read frames by number, in the order asked for; repeats and negatives are allowed.

        Args:
            indices: one number, a slice or a sequence, each in [-T, T).

        Returns:
            A clip of uint8 frames (N, H, W, 3) with their times.

        Raises:
            IndexError: a number lies outside the video.
            FrameError: the file is damaged at one of these frames.
        """
        wanted = self._normalise(indices)
        return self._read(wanted, skip_broken=False)

    def at(self, seconds: float | Sequence[float] | Tensor) -> Clip:
        """Read the frames on screen at the given seconds of the source's clock.

        Raises:
            ValueError: a time lies outside the video (a mean frame of slack at either end).
        """
        wanted = torch.atleast_1d(torch.as_tensor(seconds, dtype=torch.float64))
        slack = 1 / self.fps if self.fps else math.inf
        first, last = float(self.times[0]), float(self.times[-1])
        for time in wanted.tolist():
            if not min(first, 0.0) - slack <= time <= last + slack:
                raise ValueError(
                    f"{self.name}: {time:g} s lies outside the video, which shows frames from "
                    f"{first:g} to {last + (1 / self.fps if self.fps else 0):g} s"
                )
        return self.get(shown_indices(self.times, wanted).tolist())

    def iter_clips(
        self, chunk: int = 16, *, start: float | None = None, end: float | None = None
    ) -> Iterator[Clip]:
        """Read the video once in clips of ``chunk`` frames (the last may be shorter).

        Memory stays bounded however long the video is: one chunk, and a second one where the
        caller still holds the clip before. Frames that cannot be decoded
        are left out; a warning at the end says how many were read.

        Args:
            chunk: frames a clip.
            start: seconds; frames shown from here on.
            end: seconds; frames shown before this.
        """
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be at least 1 frame")
        span = self._span(start, end)
        pool: list[np.ndarray] = []
        into: np.ndarray | None = None
        held: list[int] = []
        read = 0
        for index, frame in self._decode(span):
            if into is None:
                into = _free_buffer(pool, (chunk, *frame.shape))
            into[len(held)] = frame
            held.append(index)
            if len(held) == chunk:
                read += chunk
                clip = [self._clip(torch.from_numpy(into), held)]
                into, held = None, []
                yield clip.pop()  # no reference stays here, so the buffer can return
        if into is not None and held:
            read += len(held)
            yield self._clip(torch.from_numpy(into)[: len(held)], held)
        self._tell_missing(read, len(span))

    def __iter__(self) -> Iterator[Clip]:
        """Clips of one frame each, from the first to the last."""
        return self.iter_clips(1)

    def select(
        self,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> list[int]:
        """Numbers of the frames that such a request means; see ``read_clip``."""
        span = self._span(start, end)
        times = self.times[span[0] : span[-1] + 1]
        if fps is not None:
            picks = fps_indices(times, fps)
            if num_frames is not None and not 1 <= num_frames <= len(picks):
                raise ValueError(
                    f"{self.name}: num_frames is {num_frames}, but at {fps:g} frames per second "
                    f"there are {len(picks)}"
                )
            picks = picks[:num_frames]
        elif num_frames is not None:
            if not 1 <= num_frames <= len(times):
                raise ValueError(
                    f"{self.name}: num_frames is {num_frames}, but there are {len(times)} frames"
                )
            picks = uniform_indices(times, num_frames)
        else:
            picks = list(range(len(times)))
        return [span[0] + pick for pick in picks]

    def read(
        self,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> Clip:
        """Read a sampled clip; see ``read_clip`` for the arguments."""
        wanted = self.select(num_frames=num_frames, fps=fps, start=start, end=end)
        clip = self._read(wanted, skip_broken=num_frames is None and fps is None)
        if fps is not None and self.fps is not None and fps <= self.fps:
            clip.fps = float(fps)
        return clip

    def _span(self, start: float | None, end: float | None) -> range:
        first = 0 if start is None else int(torch.searchsorted(self.times, start - 1e-6))
        stop = len(self) if end is None else int(torch.searchsorted(self.times, end - 1e-6))
        if first >= stop:
            raise ValueError(
                f"{self.name}: no frames between {start} and {end} s; the video shows frames from "
                f"{float(self.times[0]):g} to {float(self.times[-1]):g} s"
            )
        return range(first, stop)

    def _normalise(self, indices: int | slice | Sequence[int] | Tensor) -> list[int]:
        length = len(self)
        if isinstance(indices, slice):
            return list(range(*indices.indices(length)))
        if isinstance(indices, int):
            indices = [indices]
        wanted = [int(i) for i in indices]
        for i in wanted:
            if not -length <= i < length:
                raise IndexError(f"{self.name}: frame {i} of a video of {length} frames")
        return [i % length for i in wanted]

    def _read(self, wanted: list[int], *, skip_broken: bool) -> Clip:
        rows: dict[int, list[int]] = {}
        for row, index in enumerate(wanted):
            rows.setdefault(index, []).append(row)
        frames = torch.empty((len(wanted), self.height, self.width, 3), dtype=torch.uint8)
        into = frames.numpy()
        got: set[int] = set()
        for index, frame in self._decode(sorted(rows)):
            first, *repeats = rows[index]
            into[first] = frame
            for row in repeats:
                into[row] = into[first]
            got.add(index)
        if len(got) == len(rows):
            self._tell_truncated()
            return self._clip(frames, wanted)
        if not skip_broken or not got:
            broken = sorted(set(rows) - got)
            raise FrameError(
                f"{self.name}: {len(broken)} of {len(rows)} frames asked for cannot be "
                f"decoded (the first is frame {broken[0]}); the file is damaged"
            )
        self._tell_missing(len(got), len(rows))
        kept = [row for row, index in enumerate(wanted) if index in got]
        return self._clip(frames[kept], [wanted[row] for row in kept])

    def _tell_truncated(self) -> None:
        """Warn, once a reader, that the file is cut and how many frames are left."""
        if self.truncated and not self._told:
            self._told = True
            total = f" of {self.announced}" if self.announced > len(self) else ""
            _warn(
                f"{self.name}: the file is truncated or damaged; {len(self)}{total} frames can be "
                "read"
            )

    def _tell_missing(self, read: int, asked: int) -> None:
        """Warn that frames asked for were left out; where that was all, of those announced."""
        if read == asked:
            return self._tell_truncated()
        fault = "damaged"
        if self.truncated and not self._told:
            fault, self._told = "truncated or damaged", True
            asked = max(asked, self.announced) if asked == len(self) else asked
        _warn(f"{self.name}: the file is {fault}; {read} of {asked} frames were decoded")

    def _clip(self, frames: Tensor, indices: list[int]) -> Clip:
        times = self.times[torch.tensor(indices, dtype=torch.long)]
        consecutive = len(indices) > 1 and indices == list(range(indices[0], indices[-1] + 1))
        fps = self.fps if consecutive else mean_rate(times)
        audio = self.audio
        if audio is not None and indices:
            low, high = min(indices), max(indices)
            following = self.times[high + 1] if high + 1 < len(self) else None
            end = float(self.times[high]) + (1 / self.fps if self.fps else 0.0)
            audio = AudioTrack(
                audio.path,
                start=float(self.times[low]),
                end=float(following) if following is not None else end,
                stream=audio.stream,
            )
        return Clip(frames, times, fps, audio)


def open_video(
    source: Any,
    backend: str = "pyav",
    *,
    size: int | tuple[int, int] | None = None,
    threads: int | None = None,
) -> VideoReader:
    """Open a video for reading.

    Images, animated images (GIF), folders of images, clips, arrays, tensors and lists of
    ``PIL.Image`` open too; ``backend`` then has no say.

    Args:
        source: path, bytes, binary file object, or anything that ``as_clip`` takes.
        backend: "pyav" (default), "torchcodec" or "decord".
        size: (height, width) in pixels, or the shorter side, to which frames are resized as they
            are decoded.
        threads: decoding threads; by default the cores that this process may use, at most 8, and
            one inside a data loader's worker and for the smallest pictures.

    Returns:
        A reader; use it in a ``with`` block.

    Warns:
        UserWarning: the file is truncated; the sentence tells how many frames are left.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: ``backend`` is unknown, or the file is empty, no video, audio only, without
            frames, cut off before its index, or of a codec that the backend cannot decode.
        ImportError: the backend is not installed; the sentence says how to install it.
    """
    reader = _open(source, backend, size, threads)
    reader._tell_truncated()
    return reader


def _open(
    source: Any, backend: str, size: int | tuple[int, int] | None, threads: int | None
) -> VideoReader:
    """``open_video``, leaving the warning about a truncated file to the first reading."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed are {', '.join(BACKENDS)}")
    from stvision.io.images import open_stills

    stills = open_stills(source, size=size)
    if stills is not None:
        return stills
    module, _, name = BACKENDS[backend].partition(":")
    reader: VideoReader = getattr(importlib.import_module(module), name)(
        source, size=size, threads=threads
    )
    return reader


def read_clip(
    source: Any,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    indices: Sequence[int] | Tensor | None = None,
    size: int | tuple[int, int] | None = None,
    backend: str = "pyav",
    threads: int | None = None,
) -> Clip:
    """Read a clip: all of it, a span, given frames, or a sample.

    Args:
        source: as ``open_video``.
        num_frames: that many frames spread evenly in time over the span, ends included; together
            with ``fps`` the first so many at that rate.
        fps: the frames nearest to a grid of this many per second; never repeated.
        start: seconds; frames shown from here on.
        end: seconds; frames shown before this.
        indices: frame numbers; excludes the four above.
        size: (height, width) in pixels, or the shorter side.
        backend: "pyav", "torchcodec" or "decord".
        threads: as ``open_video``.

    Returns:
        uint8 frames (T, H, W, 3) with their true times in seconds.

    Raises:
        As ``open_video``; ValueError also when fewer frames exist than asked for, and FrameError
        (a ValueError) when one of the frames asked for is damaged. A whole damaged file or span
        gives the frames that decode and one warning with their number.
    """
    if indices is not None and not (num_frames is None and fps is None and start is end is None):
        raise ValueError("indices excludes num_frames, fps, start and end")
    with _open(source, backend, size, threads) as reader:
        if indices is not None:
            return reader.get(indices)
        return reader.read(num_frames=num_frames, fps=fps, start=start, end=end)


def _warn(message: str) -> None:
    """Warn in the name of the code that called into this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("stvision.io"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _free_buffer(pool: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """A buffer of the pool that no tensor uses any more, or a new one.

    Fresh memory of this size comes page by page from the system, which costs as much as
    converting the frames. A tensor made of an array keeps a reference to it, and so do all its
    views, so the count tells whether anyone still looks.
    """
    for position in range(len(pool)):
        if sys.getrefcount(pool[position]) == 2:  # the pool's and the call's own
            return pool[position]
    buffer = np.empty(shape, dtype=np.uint8)
    pool.append(buffer)
    del pool[:-2]  # the consumer's current clip and the next one
    return buffer


def default_threads() -> int:
    """Cores that this process may use, at most 8; one inside a data loader's worker."""
    from torch.utils.data import get_worker_info

    if get_worker_info() is not None:
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(8, cores))


def audio_track(source: Any, streams: int) -> AudioTrack | None:
    """The reference to the first audio stream of a path or of bytes (file objects pass by)."""
    if not streams or is_file_object(source):
        return None
    held = bytes(source) if isinstance(source, bytes | bytearray | memoryview) else source
    return AudioTrack(Path(held) if isinstance(held, os.PathLike) else held)
