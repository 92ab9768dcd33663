"""Frame index of a video file: one pass over the packets, nothing decoded.

Sorted presentation times give the length and the true time of every frame; the times of the
keyframes say where decoding may begin. The file's frame rate enters nowhere.
"""

from __future__ import annotations

import itertools
import warnings
from bisect import bisect_right
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import torch
from torch import Tensor

try:  # PyAV before 16 reads and drops the other streams' packets
    from av.stream import Discard
except ImportError:
    Discard = None  # type: ignore[assignment,misc]

from stvision.io.source import as_openable, check_exists, describe


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
        truncated: the file ends before the frames that it announces.
    """

    pts: list[int]
    time_base: Fraction
    keyframes: list[int]
    seek_to: list[tuple[int, int]]
    codec: str
    rate: float | None
    counted: bool = False
    truncated: bool = False
    audio_streams: int = 0
    times: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # One rounding: the product of two exact integers divided once.
        ticks = torch.tensor(self.pts, dtype=torch.float64) * self.time_base.numerator
        self.times = ticks / self.time_base.denominator

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
        return av.open(as_openable(source), mode="r", metadata_errors="ignore")
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
    """Read the packets of ``source`` once and sort their presentation times.

    Warns:
        UserWarning: the file is truncated; the sentence holds its name and how many frames of
            how many are left.

    Raises:
        FileNotFoundError, ValueError: as ``open_container`` and ``video_stream``; also when the
            video stream holds no frames.
    """
    name = describe(source)
    with open_container(source) as container:
        stream = video_stream(container, source)
        ignore_others(container, stream)
        codec = stream.codec_context.codec.canonical_name
        packets: list[tuple[int | None, int, bool]] = []
        damaged = 0
        last_end = 0
        try:
            for packet in container.demux(stream):
                if packet.size == 0 or packet.is_discard or _is_hidden(codec, packet):
                    continue
                if packet.is_corrupt:
                    damaged += 1
                    continue
                dts = packet.dts if packet.dts is not None else packet.pts
                packets.append((packet.pts, 0 if dts is None else dts, packet.is_keyframe))
                if packet.pts is not None:
                    last_end = max(last_end, packet.pts + (packet.duration or 0))
        except av.FFmpegError:
            damaged += 1
        if not packets:
            raise ValueError(f"{name}: the video stream holds no frames that can be read")
        time_base = stream.time_base or Fraction(1, 1)
        announced = stream.frames or 0
        missing = max(announced - len(packets), 0) if damaged or announced else 0
        truncated = damaged > 0 or missing > 0 or _ends_early(stream, last_end, time_base)
        rate = float(stream.average_rate) if stream.average_rate else None
        sounds = len(container.streams.audio)

    ticks = [pts for pts, _, _ in packets]
    if any(pts is None for pts in ticks) or len(set(ticks)) < len(ticks):
        index = _count_frames(source, codec, rate)
        index.audio_streams = sounds
    else:
        packets.sort(key=lambda packet: packet[0] or 0)
        pts = [packet[0] or 0 for packet in packets]
        keyframes = [i for i, packet in enumerate(packets) if packet[2]]
        seek_to = [(pts[i], packets[i][1]) for i in keyframes]
        index = FrameIndex(pts, time_base, keyframes, seek_to, codec, None)
        index.audio_streams = sounds
        index.rate = _mean_rate(index.times, rate)
        if not keyframes:  # a stream of recovery points only: decoding begins at its start
            index.keyframes, index.seek_to = [0], [(pts[0], packets[0][1])]
    index.truncated = truncated
    if truncated:
        total = f" of {announced}" if announced > len(index.pts) else ""
        warnings.warn(
            f"{name}: the file is truncated or damaged; {len(index.pts)}{total} frames can be read",
            stacklevel=2,
        )
    return index


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
        stream.thread_type = "AUTO"
        time_base = stream.time_base or Fraction(1, 1)
        try:
            pts = [-1 if frame.pts is None else frame.pts for frame in container.decode(stream)]
        except av.FFmpegError as error:
            if not pts:
                raise ValueError(f"{describe(source)}: no frame can be decoded ({error})") from None
    if not pts:
        raise ValueError(f"{describe(source)}: the video stream holds no frames")
    if any(a >= b for a, b in itertools.pairwise(pts)) or pts[0] < 0:
        time_base = 1 / Fraction(rate or 25).limit_denominator(1001)
        pts = list(range(len(pts)))
    index = FrameIndex(pts, time_base, [0], [(0, 0)], codec, None, counted=True)
    index.rate = _mean_rate(index.times, rate)
    return index
