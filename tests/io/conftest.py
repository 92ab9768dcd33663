"""Small videos of every kind, made on the fly."""

import importlib.util
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

BACKENDS = ("pyav", "torchcodec", "decord")
FRAMES = 48


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A frame that tells its number by content: moving stripes and a bar code of 8 bits."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([(x * 3 + number * 7) % 256, (y * 4 + number * 5) % 256, (x + y) % 256], -1)
    for bit in range(8):
        frame[: height // 3, bit * width // 8 : (bit + 1) * width // 8] = 255 * (number >> bit & 1)
    return frame.astype(np.uint8)


def encode(
    path: Path,
    codec: str = "libx264",
    *,
    ticks: list[int] | None = None,
    clock: int = 1000,
    count: int = FRAMES,
    height: int = 48,
    width: int = 64,
    rotation: dict | None = None,
    **options: str,
) -> Path:
    """Encode ``count`` pictures; ``ticks`` are presentation times in seconds / ``clock``."""
    ticks = [clock * i // 25 for i in range(count)] if ticks is None else ticks
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, clock)
        if rotation is not None:
            stream.set_display_rotation(**rotation)
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture(number, height, width))
            frame.pts, frame.time_base = tick, Fraction(1, clock)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def sequential(path: Path) -> tuple[np.ndarray, list[float]]:
    """All frames and times by a plain decode from the first to the last."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        pairs = [
            (f.to_ndarray(format="rgb24"), float(f.pts * f.time_base))
            for f in container.decode(stream)
        ]
    return np.stack([p[0] for p in pairs]), [p[1] for p in pairs]


def add_tone(container, seconds: float) -> None:
    """Add an AAC stream with a tone, all of it at once."""
    sound = container.add_stream("aac", rate=16000)
    wave = np.sin(np.arange(int(16000 * seconds)) ** 1.1 / 8).astype(np.float32)[None]
    frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
    frame.rate, frame.pts = 16000, 0
    for packet in [*sound.encode(frame), *sound.encode(None)]:
        container.mux(packet)


def with_sound(path: Path, seconds: float) -> Path:
    """25 pictures per second with a tone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        sound = container.add_stream("aac", rate=16000)
        for number in range(round(25 * seconds)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number))))
        wave = np.sin(np.arange(int(16000 * seconds)) ** 1.1 / 8).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.rate, frame.pts = 16000, 0
        container.mux([*sound.encode(frame), *sound.encode(None)])
        container.mux(stream.encode(None))
    return path


def faststart(source: Path, target: Path) -> Path:
    """The same packets with the index at the head, so that a cut file still opens."""
    options = {"movflags": "+faststart"}
    with av.open(str(source)) as old, av.open(str(target), "w", container_options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0], opaque=True)
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    return target


VARIABLE = list(np.cumsum(np.random.default_rng(0).integers(8, 130, FRAMES)).tolist())

KINDS: dict[str, tuple] = {
    "h264": ("h.mp4", "libx264", {"g": "12", "bf": "3"}),
    "h264-one-keyframe": (
        "one.mp4",
        "libx264",
        {"g": "250", "bf": "2", "x264-params": "b-pyramid=normal"},
    ),
    "h264-open-gop": ("open.mkv", "libx264", {"g": "10", "bf": "3", "x264-params": "open-gop=1"}),
    "h264-every-key": ("intra.mov", "libx264", {"g": "1"}),
    "h264-intra-refresh": ("refresh.mp4", "libx264", {"g": "12", "x264-params": "intra-refresh=1"}),
    "h264-ts": ("h.ts", "libx264", {"g": "12", "bf": "2"}),
    "hevc": ("h.mkv", "libx265", {"x265-params": "keyint=12:bframes=3:open-gop=0:log-level=none"}),
    "hevc-open-gop": (
        "open-h.mkv",
        "libx265",
        {"x265-params": "keyint=12:bframes=3:open-gop=1:log-level=none"},
    ),
    "vp8": (
        "v8.webm",
        "libvpx",
        {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8", "deadline": "realtime"},
    ),
    "vp9": (
        "v.webm",
        "libvpx-vp9",
        {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "10", "cpu-used": "8"},
    ),
    "av1": ("a.mp4", "libsvtav1", {"g": "16", "preset": "12", "svtav1-params": "lp=1"}),
    "variable": ("vfr.mp4", "libx264", {"g": "12", "bf": "2"}),
    "mpeg4-avi": ("m.avi", "mpeg4", {"g": "12"}),
}


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    made = {}
    for kind, (name, codec, options) in KINDS.items():
        ticks = VARIABLE if kind == "variable" else None
        clock = 25 if name.endswith("avi") else 1000
        height = 64 if codec == "libx265" else 48  # x265 crashes below its coding unit
        made[kind] = encode(
            folder / name, codec, ticks=ticks, clock=clock, height=height, **options
        )
    return made


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name != "pyav":
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
        try:
            __import__(name)
        except (ImportError, OSError, RuntimeError) as error:
            pytest.skip(f"{name} does not load: {error}")
    return name


@pytest.fixture(scope="session")
def tools():
    """The functions above, for tests that make files of their own."""

    class Tools:
        pass

    found = Tools()
    for function in (picture, encode, sequential, add_tone, with_sound, faststart):
        setattr(found, function.__name__, function)
    found.VARIABLE = VARIABLE
    return found
