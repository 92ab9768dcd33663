"""What the optional backends share: times come from the packet index, pixels from the library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
import torch

from stvision.io.clip import Clip
from stvision.io.index import build_index, open_container, sound_packets, video_stream
from stvision.io.orientation import Orientation, read_orientation
from stvision.io.reader import VideoReader, audio_track, default_threads
from stvision.io.source import describe, target_size
from stvision.optional import require


class IndexedReader(VideoReader):
    """A path, bytes or a file object (held in memory) through another library's decoder.

    Index, times, sound and error sentences are the same for all of them; a subclass names its
    library, opens a decoder and gives pictures. See ``VideoReader`` and ``open_video``.
    """

    backend: str  # what users and error sentences call it; also its distribution
    module: str  # what is imported of it

    def __init__(
        self,
        source: Any,
        *,
        size: int | tuple[int, int] | None = None,
        threads: int | None = None,
    ) -> None:
        library = require(self.module, extra="video", distribution=self.backend)
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
        self._decoder: Any = None
        height, width = self._open(library, source)
        self._native = (height, width)
        self.height, self.width = target_size(size, height, width)

    def _open(self, library: Any, source: Any) -> tuple[int, int]:
        """Set ``_decoder``; height and width of the library's own pictures.

        Raises:
            ValueError: the library cannot read this file.
        """
        raise NotImplementedError

    def _picture(self, index: int) -> np.ndarray | None:
        """A frame (H, W, 3) uint8 as the library turns it, None where it is damaged."""
        raise NotImplementedError

    def _decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        if self._decoder is None:
            raise ValueError(f"{self.name}: the reader is closed")
        for index in indices:
            picture = self._picture(index)
            if picture is not None:
                yield index, self._finish(picture)

    def close(self) -> None:
        self._decoder = None

    def _finish(self, picture: np.ndarray) -> np.ndarray:
        """Mirror and resize a picture that the library has turned already."""
        picture = self._orientation.finish_turn(picture)
        if self._native == (self.height, self.width):
            return picture
        one = Clip(torch.from_numpy(np.ascontiguousarray(picture))[None], self.times[:1])
        return one.resize(self.height, self.width).numpy()[0]

    def _refusal(self, error: BaseException) -> ValueError:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        return ValueError(
            f"{self.name}: {self.backend} cannot read this {self.codec} file ({cause[0][:160]}); "
            "backend='pyav' may"
        )

    def _check_length(self, length: int) -> None:
        if length != len(self.times):
            self.close()
            raise ValueError(
                f"{self.name}: {self.backend} counts {length} frames, the file's packets "
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
