"""What the optional backends share: times come from the packet index, pixels from the library."""

from __future__ import annotations

from typing import Any

import av
import numpy as np
import torch

from stvision.io.clip import Clip
from stvision.io.index import build_index, open_container, sound_packets, video_stream
from stvision.io.orientation import Orientation, read_orientation
from stvision.io.reader import VideoReader, audio_track, default_threads
from stvision.io.source import describe, target_size


class IndexedReader(VideoReader):
    """Index, times, sound and error sentences of a reader whose decoder is another library."""

    def __init__(self, source: Any, threads: int | None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        self.name = describe(source)
        self.threads = default_threads() if threads is None else threads
        index = build_index(source)
        self.codec, self.truncated = index.codec, index.truncated
        self.announced = index.announced
        self.times, self.fps = index.times.clone(), index.rate
        self.audio = audio_track(source, index.audio_streams)
        self._orientation = _orientation(source)
        self.rotation = self._orientation.rotation

    def _take_size(self, size: int | tuple[int, int] | None, height: int, width: int) -> None:
        """Note the size in pixels of the library's own pictures and the one asked for."""
        self._native = (height, width)
        self.height, self.width = target_size(size, height, width)

    def _finish(self, picture: np.ndarray) -> np.ndarray:
        """Mirror and resize a picture that the library has turned already."""
        picture = self._orientation.finish_turn(picture)
        if self._native == (self.height, self.width):
            return picture
        one = Clip(torch.from_numpy(np.ascontiguousarray(picture))[None], self.times[:1])
        return one.resize(self.height, self.width).numpy()[0]

    def _refusal(self, backend: str, error: BaseException) -> ValueError:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        return ValueError(
            f"{self.name}: {backend} cannot read this {self.codec} file ({cause[0][:160]}); "
            "backend='pyav' may"
        )

    def _check_length(self, length: int, backend: str) -> None:
        if length != len(self.times):
            self.close()
            raise ValueError(
                f"{self.name}: {backend} counts {length} frames, the file's packets "
                f"{len(self.times)}; use backend='pyav'"
            )


def _orientation(source: Any) -> Orientation:
    """The display matrix, which PyAV gives with decoded frames only: that of the first one."""
    with open_container(source) as container:
        stream = video_stream(container, source)
        stream.codec_context.thread_count = 1
        for packet in sound_packets(container, stream):
            try:
                for frame in packet.decode():
                    return read_orientation(frame)
            except av.FFmpegError:
                continue
    return Orientation()
