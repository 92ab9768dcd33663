"""The default reader: PyAV with a frame index.

For a request the wanted frames are gone through in order. The decoder seeks only when the wanted
frame's keyframe lies beyond what it has already been fed; otherwise it decodes on. On the way to
a wanted H.264 frame, pictures that no other picture refers to (nal_ref_idc 0, ITU-T H.264,
section 7.4.1) are not decoded at all, which changes no other picture.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from stvision.io.index import build_index, ignore_others, open_container, video_stream
from stvision.io.reader import VideoReader, audio_track, default_threads
from stvision.io.source import describe, target_size


class PyAVReader(VideoReader):
    """Reads a path, bytes or a file object. See ``VideoReader`` and ``open_video``."""

    def __init__(
        self,
        source: Any,
        *,
        size: int | tuple[int, int] | None = None,
        threads: int | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        self.name = describe(source)
        self._source = source
        self._threads = default_threads() if threads is None else threads
        self._container: Any = None
        self._index = build_index(source)
        self.times = self._index.times
        self.fps = self._index.rate
        self.audio = audio_track(source, self._index.audio_streams)
        self._rank = {pts: i for i, pts in enumerate(self._index.pts)}
        self._reformatter = VideoReformatter()
        try:
            self._restart()
            first = self._next_frame(frozenset(), -1)
            if first is None:
                raise ValueError(
                    f"{self.name}: not one of {len(self)} frames can be decoded "
                    f"(codec {self._index.codec})"
                )
            self._orient(first[1])
            upright = (first[1].height, first[1].width)[:: -1 if self._transposed else 1]
            self.height, self.width = target_size(size, *upright)
            self._ready.appendleft(first)
            self._position = first[0] - 1
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._container is not None:
            self._packets.close()
            self._ready.clear()
            self._container.close()
            self._container = None
        self._source = None

    # -- positions ---------------------------------------------------------------------------

    def _restart(self) -> None:
        """Open the file anew; the decoder stands before the first frame."""
        if self._container is not None:
            self._packets.close()
            self._container.close()
        self._container = open_container(self._source)
        self._stream = video_stream(self._container, self._source)
        ignore_others(self._container, self._stream)
        codec = self._stream.codec_context
        codec.thread_type = "AUTO"
        codec.thread_count = self._threads
        self._rewound()

    def _rewound(self, first_packet: Any = None) -> None:
        self._packets = self._feed(first_packet)
        self._ready: deque[tuple[int, Any]] = deque()
        self._position = -1  # the last frame that left the decoder
        self._counter = 0
        self._fed = -1  # the furthest frame whose packet entered the decoder
        self._dropped: set[int] = set()

    def _feed(self, first_packet: Any) -> Generator[Any, None, None]:
        if first_packet is not None:
            yield first_packet
        yield from self._container.demux(self._stream)

    def _seek(self, keyframe: int) -> None:
        """Stand at or before a keyframe; the start of the file where seeking fails."""
        for number in dict.fromkeys((keyframe, keyframe - 1, keyframe - 4)):
            if number <= 0 or self._index.counted:
                continue
            wanted = self._index.seek_to[number][0]
            # Some formats look keyframes up by presentation, some by decoding time.
            for tick in dict.fromkeys(self._index.seek_to[number]):
                try:
                    self._packets.close()
                    self._container.seek(tick, stream=self._stream, backward=True)
                    packet = next(iter(self._container.demux(self._stream)))
                except (av.FFmpegError, StopIteration):
                    continue
                if packet.pts is not None and packet.pts <= wanted:
                    self._rewound(packet)
                    return
        self._restart()

    # -- decoding ----------------------------------------------------------------------------

    def _next_frame(self, wanted: frozenset[int], last: int) -> tuple[int, Any] | None:
        """The next frame out of the decoder with its number; None at the end."""
        while not self._ready:
            packet = next(self._packets, None)
            if packet is None:
                return None
            rank = self._rank.get(packet.pts, -1)
            if self._index.codec == "h264" and not self._index.counted and packet.size:
                idle = rank < last and rank not in wanted
                self._stream.codec_context.skip_frame = "NONREF" if idle else "DEFAULT"
                if idle:
                    self._dropped.add(rank)
            self._fed = max(self._fed, rank)
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue  # a damaged packet; whoever asked for its frame is told
            for frame in frames:
                if self._index.counted:
                    self._ready.append((self._counter, frame))
                    self._counter += 1
                elif frame.pts in self._rank:
                    self._ready.append((self._rank[frame.pts], frame))
        return self._ready.popleft()

    def _decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        if self._container is None:
            raise ValueError(f"{self.name}: the reader is closed")
        wanted = frozenset(indices)
        last = indices[-1] if indices else -1
        for index in indices:
            frame = self._find(index, wanted, last)
            if frame is not None:
                yield index, self._convert(frame)

    def _find(self, index: int, wanted: frozenset[int], last: int) -> Any:
        keyframe = self._index.keyframe_for(index)
        behind = index <= self._position or index in self._dropped
        if behind or self._index.keyframes[keyframe] > max(self._position + 1, self._fed):
            self._seek(keyframe)
        frame = self._advance(index, wanted, last)
        # Streams that refresh gradually, or whose keyframes are marked wrongly, need a run-up.
        for run_up in (1, 4, keyframe):
            if frame is not None or keyframe < run_up or run_up == 0:
                break
            self._seek(keyframe - run_up)
            frame = self._advance(index, frozenset(), -1)
        return frame

    def _advance(self, index: int, wanted: frozenset[int], last: int) -> Any:
        while True:
            item = self._next_frame(wanted, last)
            if item is None:
                return None
            if item[0] > index:
                self._ready.appendleft(item)
                return None
            self._position = item[0]
            if item[0] == index:
                return item[1]

    # -- pictures ----------------------------------------------------------------------------

    def _orient(self, frame: Any) -> None:
        """Read the display matrix: (x', y') = (a x + c y, b x + d y), a quarter turn at a time."""
        a, b, c, d = 1, 0, 0, 1
        for side in frame.side_data:
            if side.type.name == "DISPLAYMATRIX":
                a, b, _, c, d = struct.unpack("<5i", bytes(side)[:20])
        self._transposed = abs(b) > abs(a)
        self._mirror_x, self._mirror_y = (c < 0, b < 0) if self._transposed else (a < 0, d < 0)
        turns = {(False, False, False): 0, (False, True, True): 180}
        turns |= {(True, True, False): -90, (True, False, True): 90}
        self.rotation = turns.get((self._transposed, self._mirror_x, self._mirror_y), 0)

    def _convert(self, frame: Any) -> np.ndarray:
        width, height = (self.width, self.height)[:: -1 if self._transposed else 1]
        picture = self._reformatter.reformat(
            frame, width, height, format="rgb24", interpolation="BILINEAR", threads=1
        ).to_ndarray()
        if self._transposed:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self._mirror_y else 1, :: -1 if self._mirror_x else 1]
