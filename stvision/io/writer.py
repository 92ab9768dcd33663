"""Video files: a streaming writer and ``write_video``.

H.264 in yuv420p with BT.709 colours, tagged and converted to match, and the index at the head of
the file, which is what browsers play.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from stvision.io.clip import AudioTrack, Clip
from stvision.io.convert import as_clip, frames_to_clip
from stvision.io.index import open_container
from stvision.io.source import describe, is_file_object
from stvision.io.temporary import temporary_path

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm"})
_CODECS = {
    "h264": "libx264",
    "hevc": "libx265",
    "vp9": "libvpx-vp9",
    "av1": "libsvtav1",
}
_CLOCK = 90_000  # ticks per second for explicit times; holds 24, 25, 30 and 29.97 exactly


class VideoWriter:
    """Writes a video frame by frame; nothing is held back but what the encoder needs.

    The file appears under its name when the writer closes; until then it lies beside it under a
    temporary one, which an error removes.

        with VideoWriter("out.mp4", fps=25) as writer:
            for clip in reader.iter_clips(16):
                writer.write(clip)

    Args:
        path: .mp4, .m4v, .mov, .mkv or .webm.
        fps: frames per second for frames written without times.
        codec: "h264" (default; "vp9" for .webm), "hevc", "vp9", "av1", or an encoder's name.
        crf: constant quality, 0 to 51 (63 for vp9 and av1); lower is better. 17 to 20 looks like
            the original in H.264.
        preset: x264 and x265 preset name, "ultrafast" to "veryslow".
        lossless: keep every RGB value (H.264 RGB; few browsers play it). Excludes ``codec``.
        audio: sound to copy from its file without recoding, or None.
        threads: encoding threads, 0 for the encoder's choice.

    Raises:
        ValueError: unknown suffix, codec or ``fps``; sound whose codec the container cannot hold.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float | None = None,
        *,
        codec: str | None = None,
        crf: int = 18,
        preset: str = "medium",
        lossless: bool = False,
        audio: AudioTrack | None = None,
        threads: int = 0,
    ) -> None:
        self.path = Path(path)
        suffix = self.path.suffix.lower()
        if suffix not in VIDEO_SUFFIXES:
            raise ValueError(
                f"{self.path}: suffix {suffix!r} is no video; allowed are "
                f"{', '.join(sorted(VIDEO_SUFFIXES))}"
            )
        if fps is not None and not fps > 0:
            raise ValueError(f"fps is {fps}; it must be above 0")
        if lossless and codec is not None:
            raise ValueError("lossless chooses its own codec; leave codec out")
        name = "libx264rgb" if lossless else codec or ("vp9" if suffix == ".webm" else "h264")
        self._codec = _CODECS.get(name, name)
        if self._codec not in av.codecs_available:
            raise ValueError(f"codec is {codec!r}; allowed are {', '.join(_CODECS)}, or an encoder")
        self.fps = fps
        self._crf, self._preset, self._lossless = crf, preset, lossless
        self._threads = threads
        self._track = audio
        self._container: Any = None
        self._sound: _SoundCopy | None = None
        self._held: tuple[Any, int] | None = None  # a frame waits for the next one's time
        self._first: float | None = None
        self._written = 0
        self._closed = False
        self._reformatter = VideoReformatter()
        self._durations: dict[int, int] = {}
        self._temporary = temporary_path(self.path)

    # -- life ----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __len__(self) -> int:
        return self._written

    def close(self) -> None:
        """Finish the file and give it its name.

        Raises:
            ValueError: no frame was written.
        """
        if self._closed:
            return
        if self._container is None:
            self.abort()
            raise ValueError(f"{self.path}: no frames were written")
        try:
            self._release(self._last_duration())
            self._mux(self._stream.encode(None))
            if self._sound is not None:
                self._copy_sound(None)
            self._container.close()
            os.replace(self._temporary, self.path)
        except BaseException:
            self.abort()
            raise
        self._finish()

    def abort(self) -> None:
        """Drop what was written; the file at ``path``, if any, stays as it was."""
        if self._closed:
            return
        if self._container is not None:
            try:
                self._container.close()
            except av.FFmpegError:
                pass  # the file is thrown away
        self._finish()
        self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._closed = True
        if self._sound is not None:
            self._sound.close()

    # -- frames --------------------------------------------------------------------------------

    def write(self, frames: Any, times: Any = None) -> None:
        """Append frames.

        Args:
            frames: a ``Clip``, or frames in memory as ``as_clip`` takes them: (T, H, W, C),
                (H, W, C), ``PIL.Image`` and lists, uint8 or floating point in [0, 1].
            times: (T,) seconds, strictly ascending over all calls. A clip brings its own, unless
                the writer was given ``fps``; other frames follow at ``fps``. The first frame
                written is second 0 of the file.

        Raises:
            ValueError: the size differs from the first frame's, times do not ascend, or there are
                neither times nor ``fps``.
        """
        if self._closed:
            raise ValueError(f"{self.path}: the writer is closed")
        clip = frames_to_clip(frames)
        if times is None and isinstance(frames, Clip) and self.fps is None:
            times = clip.times
        if times is None and self.fps is None:
            raise ValueError(f"{self.path}: frames without times need VideoWriter(fps=...)")
        seconds = None if times is None else np.asarray(times, dtype=np.float64).reshape(-1)
        if seconds is not None and len(seconds) != len(clip):
            raise ValueError(f"{self.path}: {len(seconds)} times for {len(clip)} frames")
        for row in range(len(clip)):  # one at a time, so that floats are never all copied
            picture = clip.frames[row : row + 1]
            picture = Clip(picture, clip.times[row : row + 1]).to_uint8().frames[0]
            array = np.ascontiguousarray(picture.cpu().numpy())
            if array.shape[-1] != 3:
                array = np.repeat(array[..., :1], 3, axis=-1)
            self._append(array, None if seconds is None else float(seconds[row]), clip.fps)

    def _append(self, picture: np.ndarray, second: float | None, rate: float | None) -> None:
        if self._container is None:
            self._open(picture.shape[0], picture.shape[1], second, rate)
        if picture.shape[:2] != (self._height, self._width):
            raise ValueError(
                f"{self.path}: a frame of {picture.shape[0]}x{picture.shape[1]} pixels after "
                f"frames of {self._height}x{self._width}"
            )
        if second is None:
            tick = self._written
            if self._time_base.numerator * self._clock_rate != self._time_base.denominator:
                tick = round(self._written / (self._clock_rate * self._time_base))
        else:
            tick = round((second - (self._first or 0.0)) / self._time_base)
        if self._held is not None:
            if tick <= self._held[1]:
                raise ValueError(
                    f"{self.path}: times must ascend; frame {self._written} follows at "
                    f"{float(tick * self._time_base):g} s"
                )
            self._release(tick - self._held[1])
        self._held = (self._to_frame(picture), tick)
        self._written += 1

    def _open(self, height: int, width: int, second: float | None, rate: float | None) -> None:
        if self._codec == "libx265" and min(height, width) < 64:
            # Seen on some runs, never traced: the process dies while encoding such pictures.
            raise ValueError(f"{self.path}: {height}x{width} pixels; hevc needs at least 64x64")
        self._height, self._width, self._first = height, width, second
        even = not self._lossless
        self._pad = (height % 2, width % 2) if even else (0, 0)
        if any(self._pad):
            warnings.warn(
                f"{self.path}: {height}x{width} pixels padded to "
                f"{height + self._pad[0]}x{width + self._pad[1]} (sides must be even)",
                stacklevel=5,
            )
        nominal = Fraction(self.fps or rate or 25).limit_denominator(1001)
        self._clock_rate = nominal
        self._time_base = 1 / nominal if second is None else Fraction(1, _CLOCK)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        isobmff = self.path.suffix.lower() in {".mp4", ".m4v", ".mov"}
        self._container = av.open(
            os.fspath(self._temporary),
            mode="w",
            container_options={"movflags": "+faststart"} if isobmff else {},
        )
        self._stream = self._container.add_stream(self._codec, rate=nominal)
        stream = self._stream
        stream.height, stream.width = height + self._pad[0], width + self._pad[1]
        stream.pix_fmt = "rgb24" if self._lossless else "yuv420p"
        stream.codec_context.time_base = self._time_base
        stream.time_base = self._time_base
        stream.codec_context.thread_count = self._threads
        stream.options = self._options()
        if not self._lossless:
            context = stream.codec_context
            context.colorspace, context.color_primaries, context.color_trc = 1, 1, 1  # BT.709
            context.color_range = 1  # limited, 16 to 235
        if self._track is not None:
            self._sound = _SoundCopy(self._container, self._track, self.path, second or 0.0)

    def _options(self) -> dict[str, str]:
        if self._lossless:
            return {"qp": "0", "preset": self._preset}
        options = {"crf": str(self._crf)}
        if self._codec in {"libx264", "libx265"}:
            options["preset"] = self._preset
        if self._codec == "libx265":
            options["x265-params"] = "log-level=error"
        if self._codec == "libvpx-vp9":
            options |= {"b:v": "0", "row-mt": "1"}
        return options

    def _to_frame(self, picture: np.ndarray) -> Any:
        if any(self._pad):
            picture = np.pad(picture, ((0, self._pad[0]), (0, self._pad[1]), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        if self._lossless:
            return frame
        return self._reformatter.reformat(
            frame,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation="BICUBIC",
            threads=1,
        )

    def _last_duration(self) -> int:
        before = list(self._durations.values())[-1:] or [
            round(1 / self._clock_rate / self._time_base)
        ]
        return max(1, before[0])

    def _release(self, duration: int) -> None:
        if self._held is None:
            return
        frame, tick = self._held
        frame.pts, frame.time_base, frame.duration = tick, self._time_base, duration
        self._durations[tick] = duration
        self._held = None
        self._mux(self._stream.encode(frame))

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            # Containers close the last frame with its own duration; encoders forget it.
            if packet.pts in self._durations:
                packet.duration = self._durations[packet.pts]
                if len(self._durations) > 512:
                    self._durations.pop(packet.pts)
            if self._sound is not None and packet.pts is not None:
                self._copy_sound(float(packet.pts * packet.time_base))
            self._container.mux(packet)

    def _copy_sound(self, until: float | None) -> None:
        assert self._sound is not None
        if until is None:
            until = max(t + d for t, d in self._durations.items()) * float(self._time_base)
        for packet in self._sound.packets(until):
            self._container.mux(packet)


class _SoundCopy:
    """Packets of one audio stream, moved to the video's clock and cut to its span."""

    def __init__(self, output: Any, track: AudioTrack, path: Path, zero: float) -> None:
        self._track, self._zero = track, zero
        self._input = open_container(track.path)
        name = describe(track.path)
        streams = self._input.streams.audio
        if track.stream >= len(streams):
            self._input.close()
            raise ValueError(f"{name}: no audio stream {track.stream} ({len(streams)} in the file)")
        source = streams[track.stream]
        try:
            self._output = output.add_stream_from_template(source)
        except (ValueError, av.FFmpegError) as error:
            codec = source.codec_context.name
            self._input.close()
            raise ValueError(
                f"{path}: a {path.suffix} file cannot hold the {codec} sound of {name}"
            ) from error
        if track.start > 0:
            self._input.seek(int(track.start / source.time_base), stream=source, backward=True)
        self._packets: Iterator[Any] = self._input.demux(source)
        self._next: Any = None

    def packets(self, until: float) -> Iterator[Any]:
        """Packets that begin before second ``until`` of the written file, each once."""
        while True:
            packet = self._next if self._next is not None else next(self._packets, None)
            self._next = None
            if packet is None or packet.size == 0:
                return
            begin = float((packet.pts if packet.pts is not None else packet.dts) * packet.time_base)
            if begin < self._track.start - 1e-6 or begin < self._zero - 1e-6:
                continue
            if self._track.end is not None and begin >= self._track.end:
                return
            if begin - self._zero >= until:
                self._next = packet
                return
            shift = round(self._zero / packet.time_base)
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.dts = None if packet.dts is None else packet.dts - shift
            packet.stream = self._output
            yield packet

    def close(self) -> None:
        self._input.close()


def write_video(
    clip: Any,
    path: str | os.PathLike[str],
    *,
    fps: float | None = None,
    audio: AudioTrack | bool | None = None,
    codec: str | None = None,
    crf: int = 18,
    preset: str = "medium",
    lossless: bool = False,
) -> Path:
    """Write a clip as a video file; see ``VideoWriter`` for what is not listed here.

    Args:
        clip: anything that ``as_clip`` takes. Its frame times are kept, also uneven ones.
        path: .mp4, .m4v, .mov, .mkv or .webm.
        fps: frames per second in place of the clip's times (nothing is resampled).
        audio: a track, or True for the clip's own, copied without recoding.

    Returns:
        The path.
    """
    is_media = isinstance(clip, str | os.PathLike | bytes) or is_file_object(clip)
    held = as_clip(clip) if is_media or isinstance(clip, Clip) else as_clip(clip, fps)
    if audio is True and held.audio is None:
        raise ValueError(f"{path}: audio=True, but the clip has no sound")
    track = held.audio if audio is True else audio or None
    with VideoWriter(
        path, fps, codec=codec, crf=crf, preset=preset, lossless=lossless, audio=track
    ) as writer:
        writer.write(held)
    return Path(path)
