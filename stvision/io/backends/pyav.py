"""The default reader: PyAV with a frame index.

For a request the wanted frames are gone through in order. The decoder seeks only when the wanted
frame's keyframe lies beyond what it has already been fed; otherwise it decodes on. On the way to
a wanted H.264 frame, pictures that no other picture refers to (nal_ref_idc 0, ITU-T H.264,
section 7.4.1) are not decoded at all, which changes no other picture.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import av
import numpy as np

from stvision.io.backends.pictures import Pictures
from stvision.io.index import (
    FrameIndex,
    file_key,
    ignore_others,
    open_container,
    read_index,
    recall,
    remember,
    sound_packets,
    video_stream,
)
from stvision.io.orientation import read_orientation
from stvision.io.reader import VideoReader, audio_track, default_threads
from stvision.io.source import describe, target_size

# Pixels up to which decoding threads cost more than they bring.
_SMALL = 128 * 128


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
        self._threads = threads
        self._container: Any = None
        self._packets: Any = None
        self._pictures = Pictures()
        try:
            self._index = self._open_with_index()
            self.times = self._index.times.clone()
            self.fps = self._index.rate
            self.truncated, self.announced = self._index.truncated, self._index.announced
            self.audio = audio_track(source, self._index.audio_streams)
            first = self._next_frame(frozenset(), -1)
            if first is None:
                raise ValueError(
                    f"{self.name}: not one of {len(self)} frames can be decoded "
                    f"(codec {self._index.codec})"
                )
            self._orientation = read_orientation(first[1])
            self.rotation = self._orientation.rotation
            upright = (first[1].height, first[1].width)
            upright = upright[:: -1 if self._orientation.transposed else 1]
            self.height, self.width = target_size(size, *upright)
            self._ready.appendleft(first)
            self._position = first[0] - 1
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._packets is not None:
            self._packets.close()
            self._packets = None
            self._ready.clear()
        if self._container is not None:
            self._container.close()
            self._container = None
        self._source = None

    # -- positions ---------------------------------------------------------------------------

    def _open_with_index(self) -> FrameIndex:
        """Open the file, with its index from memory or from one pass over its packets."""
        key = file_key(self._source)
        index = recall(self._source)
        self._restart()
        if index is not None:
            return index
        index = read_index(self._container, self._stream, self._source)
        remember(key, index)
        if index.counted and index.truncated:
            self._threads = 1  # as they were counted: frame threads lose some beside broken ones
        if index.counted or index.truncated or not self._rewind(index):
            self._restart()
        return index

    def _restart(self) -> None:
        """Open the file anew; the decoder stands before the first frame."""
        if self._packets is not None:
            self._packets.close()
        if self._container is not None:
            self._container.close()
        self._container = open_container(self._source)
        self._stream = video_stream(self._container, self._source)
        ignore_others(self._container, self._stream)
        codec = self._stream.codec_context
        if self._threads is None:
            small = codec.width * codec.height <= _SMALL
            self._threads = 1 if small else default_threads()
        codec.thread_type = "AUTO"
        codec.thread_count = self._threads
        self._rewound()

    def _rewind(self, index: FrameIndex) -> bool:
        """Stand before the first packet again; False where the format does not find it."""
        pts, dts, _ = index.first
        tick = dts if dts is not None else pts
        if tick is None:
            return False
        try:
            self._container.seek(tick, stream=self._stream, backward=True)
            packet = next(iter(self._container.demux(self._stream)))
        except (av.FFmpegError, StopIteration):
            return False
        if (packet.pts, packet.dts, packet.size) != index.first:
            return False
        self._rewound(packet)
        return True

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
        yield from sound_packets(self._container, self._stream)

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
            rank = self._index.rank.get(packet.pts, -1)
            if self._index.codec == "h264" and not self._index.counted and packet.size:
                idle = rank < last and rank not in wanted
                self._stream.codec_context.skip_frame = "NONREF" if idle else "DEFAULT"
                if idle:
                    self._dropped.add(rank)
            self._fed = max(self._fed, rank)
            try:
                frames = packet.decode()
            except av.FFmpegError:
                # A damaged packet; whoever asked for its frame is told. Frame threads report it
                # late and lose sound frames with it, so go back and decode without them.
                if self._threads != 1:
                    self._threads = 1
                    following = self._position + 1
                    self._restart()
                    self._seek(self._index.keyframe_for(following))
                continue
            for frame in frames:
                if self._index.counted:
                    self._ready.append((self._counter, frame))
                    self._counter += 1
                elif frame.pts in self._index.rank:
                    self._ready.append((self._index.rank[frame.pts], frame))
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

    def _convert(self, frame: Any) -> np.ndarray:
        width, height = (self.width, self.height)[:: -1 if self._orientation.transposed else 1]
        return self._orientation.apply(self._pictures.rgb(frame, height, width))
