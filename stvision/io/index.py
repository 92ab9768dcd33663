"""Frame index of a video file: one pass over the packets, nothing decoded.

Sorted presentation times give the length and the true time of every frame; the times of the
keyframes say where decoding may begin. The file's frame rate enters nowhere.
"""

from __future__ import annotations

import itertools
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import av
import torch
from torch import Tensor

try:  # PyAV before 16 reads and drops the other streams' packets
    from av.stream import Discard
except ImportError:
    Discard = None  # type: ignore[assignment,misc]

from stvision.io.source import as_openable, check_exists, describe, is_file_object, is_url

# Text tags in odd encodings must not stop a reader; from version 19 on PyAV sees to that itself.
_TAGS: dict[str, Any] = {}
if int(av.__version__.split(".")[0]) < 19:
    _TAGS["metadata_errors"] = "ignore"


@dataclass
class FrameIndex:
    """Frames of one video stream in the order they are shown.

    Attributes:
        pts: presentation times in ticks of ``time_base``, ascending and distinct; empty ticks
            (``counted``) are frame numbers.
        time_base: seconds a tick lasts.
        keyframes: positions in ``pts`` at which decoding may begin.
        seek_to: for each keyframe the ticks (presentation, decoding) that find it.
        counted: the file gives no usable times, so frames are known by their number alone and
            reading always begins at the first.
        codec: name of the codec, such as "h264".
        rate: mean frames per second, None for one frame.
        truncated: the file ends before the frames that it announces, or holds packets that its
            demuxer calls corrupt.
        announced: how many frames the file claims to hold, 0 where it does not say.
        first: (pts, dts, size) of the first packet, by which a rewound demuxer is recognised.
    """

    pts: list[int]
    time_base: Fraction
    keyframes: list[int]
    seek_to: list[tuple[int, int]]
    codec: str
    rate: float | None
    counted: bool = False
    truncated: bool = False
    announced: int = 0
    audio_streams: int = 0
    first: tuple[int | None, int | None, int] = (None, None, 0)
    times: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # One rounding: the product of two exact integers divided once.
        ticks = torch.tensor(self.pts, dtype=torch.float64) * self.time_base.numerator
        self.times = ticks / self.time_base.denominator

    @cached_property
    def rank(self) -> dict[int, int]:
        """Frame number of each presentation time."""
        return {pts: number for number, pts in enumerate(self.pts)}

    def keyframe_for(self, position: int) -> int:
        """Number of the last keyframe shown at or before frame ``position``."""
        return max(0, bisect_right(self.keyframes, position) - 1)


def open_container(source: Any) -> Any:
    """Open with PyAV, or say in one sentence why the source is no video.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the source is empty, is no media file, or is cut off before its index.
    """
    check_exists(source)
    name = describe(source)
    try:
        return av.open(as_openable(source), mode="r", **_TAGS)
    except (av.FFmpegError, UnicodeError) as error:
        if isinstance(error, PermissionError):
            raise PermissionError(f"{name}: no permission to read the file") from error
        fault = "not a video file, or one cut off before its index"
        if isinstance(error, EOFError):
            fault = "the file ends before its first frame: no frames"
        cause = getattr(error, "strerror", None) or error
        raise ValueError(f"{name}: {fault} ({cause})") from error


def video_stream(container: Any, source: Any) -> Any:
    """The file's first real video stream (cover pictures do not count).

    Raises:
        ValueError: the file has no video, or no decoder here reads its codec.
    """
    name = describe(source)
    streams = [s for s in container.streams.video if not _is_cover(s)]
    if not streams:
        kind = "only sound" if container.streams.audio else "no video stream"
        raise ValueError(f"{name}: the file holds {kind}")
    stream = streams[0]
    if stream.codec_context is None:
        tag = getattr(stream, "codec_tag", "") or "unknown"
        raise ValueError(f"{name}: no decoder for this video's codec (tag {tag!r})")
    return stream


def _is_cover(stream: Any) -> bool:
    disposition = getattr(stream, "disposition", None)
    cover = getattr(type(disposition), "attached_pic", None)
    return bool(cover is not None and disposition & cover)


def build_index(source: Any) -> FrameIndex:
    """The index of ``source``, which is opened for it unless the index is still in memory.

    Raises:
        FileNotFoundError, ValueError: as ``open_container``, ``video_stream`` and ``read_index``.
    """
    index = recall(source)
    if index is None:
        key = file_key(source)
        with open_container(source) as container:
            index = read_index(container, video_stream(container, source), source)
        remember(key, index)
    return index


def read_index(container: Any, stream: Any, source: Any) -> FrameIndex:
    """Read the packets of a freshly opened container once and sort their presentation times.

    The container stands at its end afterwards. Where ``counted`` or ``truncated`` came out true,
    ``source`` was opened a second time, which moves a file object under the first container.

    Raises:
        ValueError: the video stream holds no frames that can be read.
    """
    name = describe(source)
    ignore_others(container, stream)
    codec = stream.codec_context.codec.canonical_name
    packets: list[tuple[int | None, int, bool]] = []
    first: tuple[int | None, int | None, int] | None = None
    damaged = 0
    last_end = 0
    try:
        for packet in container.demux(stream):
            if first is None:
                first = (packet.pts, packet.dts, packet.size)
            if packet.size == 0 or packet.is_discard or _is_hidden(codec, packet):
                continue
            if packet.is_corrupt:
                damaged += 1
                continue
            pts, dts = packet.pts, packet.dts
            if dts is None:
                dts = 0 if pts is None else pts
            packets.append((pts, dts, packet.is_keyframe))
            if pts is not None:
                last_end = max(last_end, pts + (packet.duration or 0))
    except av.FFmpegError:
        damaged += 1
    if not packets:
        raise ValueError(f"{name}: the video stream holds no frames that can be read")
    time_base = Fraction(stream.time_base or 1)
    announced = stream.frames or 0
    missing = announced > len(packets)
    truncated = damaged > 0 or missing or _ends_early(stream, last_end, time_base)
    rate = float(stream.average_rate) if stream.average_rate else None

    ticks = [pts for pts, _, _ in packets]
    usable = None not in ticks and len(set(ticks)) == len(ticks)
    if usable:
        packets.sort(key=lambda packet: packet[0] or 0)
        if truncated:
            packets = _decodable(source, packets)
    if usable and packets:
        index = _sorted_index(packets, time_base, codec, rate)
    else:
        index = _count_frames(source, codec, rate)
    index.audio_streams = len(container.streams.audio)
    index.truncated, index.announced = truncated, announced
    index.first = first or index.first
    return index


def _sorted_index(
    packets: list[tuple[int | None, int, bool]],
    time_base: Fraction,
    codec: str,
    rate: float | None,
) -> FrameIndex:
    pts = [packet[0] or 0 for packet in packets]
    keyframes = [i for i, packet in enumerate(packets) if packet[2]]
    if not keyframes:  # a stream of recovery points only: decoding begins at its start
        keyframes = [0]
    seek_to = [(pts[i], packets[i][1]) for i in keyframes]
    index = FrameIndex(pts, time_base, keyframes, seek_to, codec, None)
    index.rate = _mean_rate(index.times, rate)
    return index


def _decodable(
    source: Any, packets: list[tuple[int | None, int, bool]]
) -> list[tuple[int | None, int, bool]]:
    """The sorted packets of a cut file without those at its end whose frames do not decode.

    Only what follows the last keyframe but one can have lost what it refers to, so only that is
    decoded. Empty where frames do not leave the decoder in the order of the packets' times, which
    then say nothing (H.264 in AVI without its index).

    Raises:
        ValueError: no frame decodes.
    """
    keyframes = [i for i, packet in enumerate(packets) if packet[2]]
    for start in (keyframes[-2] if len(keyframes) > 1 else 0, 0):
        shown: list[int | None] = []
        with open_container(source) as container:
            stream = video_stream(container, source)
            ignore_others(container, stream)
            stream.codec_context.thread_count = 1  # threads lose sound frames beside broken ones
            if start:
                container.seek(packets[start][0] or 0, stream=stream, backward=True)
            for packet in sound_packets(container, stream):
                try:
                    shown += [frame.pts for frame in packet.decode() if not frame.is_corrupt]
                except av.FFmpegError:
                    continue
        if any(a is None or b is None or a >= b for a, b in itertools.pairwise(shown)):
            return []
        decoded = set(shown)
        if packets[start][0] in decoded:  # else the seek went astray
            break
    kept = [p for i, p in enumerate(packets) if i < start or p[0] in decoded]
    if not kept:
        raise ValueError(
            f"{describe(source)}: not one of {len(packets)} frames can be decoded; the file is "
            "truncated or damaged"
        )
    return kept


def sound_packets(container: Any, stream: Any) -> Any:
    """Packets that are whole, then the empty one that drains the decoder, whatever happens."""
    drained = False
    try:
        for packet in container.demux(stream):
            if not packet.is_corrupt:
                drained = packet.size == 0
                yield packet
    except av.FFmpegError:
        if not drained:
            last = av.Packet()
            last.stream = stream
            yield last


# -- indexes of files read before ----------------------------------------------------------------

CACHED_FRAMES = 100_000  # about 150 bytes a frame: 15 MB at most, in each process
_cache: OrderedDict[tuple[Any, ...], FrameIndex] = OrderedDict()
_cached = 0  # frames in it
_cache_lock = threading.Lock()


def file_key(source: Any) -> tuple[Any, ...] | None:
    """What identifies a file and its content; None for bytes, file objects and URLs."""
    if isinstance(source, bytes | bytearray | memoryview) or is_file_object(source):
        return None
    if is_url(source):
        return None
    try:
        status = os.stat(source)
    except OSError:
        return None
    path = os.path.abspath(os.fspath(source))
    return path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def recall(source: Any) -> FrameIndex | None:
    """The index of a file that this process has read before and that has not changed since."""
    key = file_key(source)
    if key is None:
        return None
    with _cache_lock:
        index = _cache.get(key)
        if index is not None:
            _cache.move_to_end(key)
    return index


def remember(key: tuple[Any, ...] | None, index: FrameIndex) -> None:
    """Keep an index; the ones not used for longest make room.

    ``key`` is taken before the file is read: a file that changes meanwhile is then not found.
    Truncated files are not kept, since they may be growing.
    """
    if key is None or index.truncated or len(index.pts) > CACHED_FRAMES // 4:
        return
    global _cached
    with _cache_lock:
        former = _cache.pop(key, None)
        _cached += len(index.pts) - (len(former.pts) if former is not None else 0)
        _cache[key] = index
        while _cached > CACHED_FRAMES:
            _cached -= len(_cache.popitem(last=False)[1].pts)


def forget_indexes() -> None:
    """Drop every index kept."""
    global _cached
    with _cache_lock:
        _cache.clear()
        _cached = 0


def ignore_others(container: Any, stream: Any) -> None:
    """Let the demuxer skip every stream but ``stream`` instead of reading and dropping it."""
    for other in container.streams:
        if other.index != stream.index and Discard is not None:
            other.discard = Discard.all


def _is_hidden(codec: str, packet: Any) -> bool:
    """A VP8 packet that is decoded but never shown (RFC 6386, section 9.1: bit 4, show_frame)."""
    return codec == "vp8" and packet.size > 0 and not (memoryview(packet)[0] >> 4) & 1


def _ends_early(stream: Any, last_end: int, time_base: Fraction) -> bool:
    """Whether a Matroska stream stops before the length that its own tag announces."""
    tag = next((v for k, v in stream.metadata.items() if k.upper().startswith("DURATION")), None)
    if tag is None:
        return False
    try:
        hours, minutes, seconds = tag.split(":")
        announced = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return False
    frame = 1 / float(stream.average_rate) if stream.average_rate else 0.1
    return announced - float(last_end * time_base) > 2.5 * frame


def _mean_rate(times: Tensor, declared: float | None) -> float | None:
    """Frames per second from the times; the declared rate where both agree (it is exact)."""
    if len(times) < 2:
        return None
    rate = (len(times) - 1) / float(times[-1] - times[0])
    return declared if declared and abs(declared / rate - 1) < 1e-3 else rate


def _count_frames(source: Any, codec: str, rate: float | None) -> FrameIndex:
    """Index of a file without usable packet times: decode it once and take the frames' own.

    Where the frames carry no times either, the declared rate is all there is.
    """
    pts: list[int] = []
    with open_container(source) as container:
        stream = video_stream(container, source)
        ignore_others(container, stream)
        stream.codec_context.thread_count = 1  # threads lose sound frames beside broken ones
        time_base = Fraction(stream.time_base or 1)
        fault: Exception | None = None
        for packet in sound_packets(container, stream):
            try:
                pts += [-1 if frame.pts is None else frame.pts for frame in packet.decode()]
            except av.FFmpegError as error:
                fault = error
    if not pts and fault is not None:
        raise ValueError(f"{describe(source)}: no frame can be decoded ({fault})")
    if not pts:
        raise ValueError(f"{describe(source)}: the video stream holds no frames")
    if any(a >= b for a, b in itertools.pairwise(pts)) or pts[0] < 0:
        time_base = 1 / Fraction(rate or 25).limit_denominator(1001)
        pts = list(range(len(pts)))
    index = FrameIndex(pts, time_base, [0], [(0, 0)], codec, None, counted=True)
    index.rate = _mean_rate(index.times, rate)
    return index
