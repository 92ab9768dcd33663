"""Still sources behind the reader's interface: images, image folders, GIF, arrays, tensors."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stvision.io.clip import Clip
from stvision.io.reader import VideoReader
from stvision.io.sampling import mean_rate
from stvision.io.source import (
    ANIMATION_SUFFIXES,
    IMAGE_SUFFIXES,
    as_openable,
    check_exists,
    describe,
    is_file_object,
    is_url,
    target_size,
)

_SIGNATURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"P6")
_DEFAULT_FPS = 8.0


class ClipReader(VideoReader):
    """Frames that already lie in memory."""

    def __init__(self, clip: Clip, *, size: int | tuple[int, int] | None = None) -> None:
        if not len(clip):
            raise ValueError("the clip holds no frames")
        self.name = "<clip>"
        self.height, self.width = target_size(size, clip.height, clip.width)
        self._frames: Tensor | None = clip.frames
        self.times, self.fps, self.audio = clip.times, clip.fps, clip.audio

    def _decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        if self._frames is None:
            raise ValueError(f"{self.name}: the reader is closed")
        for index in indices:
            one = Clip(self._frames[index : index + 1], self.times[index : index + 1]).to_uint8()
            picture = one.resize(self.height, self.width).numpy()[0]
            yield index, np.broadcast_to(picture, (self.height, self.width, 3))

    def close(self) -> None:
        self._frames = None


class ImageReader(VideoReader):
    """One image after another: the files of a folder, or the frames of an animated image."""

    def __init__(
        self,
        source: Any,
        *,
        fps: float | None = None,
        size: int | tuple[int, int] | None = None,
    ) -> None:
        from PIL import Image

        self.name = describe(source) if not isinstance(source, list) else "<image files>"
        self._opened: Any = None
        self._owned = not is_file_object(source)  # a caller's file stays open
        self._files: list[Any] | None = None
        if isinstance(source, list):
            self._files = source
        elif not is_file_object(source) and not isinstance(source, bytes):
            path = Path(source)
            self._files = image_files(path) if path.is_dir() else None
        if self._files is None:
            self._opened = _open_image(as_openable(source), self.name)
            times = _animation_times(self._opened, fps)
        else:
            times = [i / (fps or _DEFAULT_FPS) for i in range(len(self._files))]
        self.times = torch.tensor(times, dtype=torch.float64)
        self.fps = mean_rate(self.times)
        self.carries_times = self._files is None and len(times) > 1
        first = self._opened if self._files is None else _open_image(self._files[0], self.name)
        try:
            self._upright = self._shape(first)
        finally:
            if first is not self._opened:
                first.close()
        self.height, self.width = target_size(size, *self._upright)
        self._resample = Image.Resampling.BILINEAR

    @staticmethod
    def _shape(image: Any) -> tuple[int, int]:
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations that swap the sides
        return (image.width, image.height) if turned else (image.height, image.width)

    def _decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        from PIL import ImageOps

        if self._opened is None and self._files is None:
            raise ValueError(f"{self.name}: the reader is closed")
        for index in indices:
            try:
                if self._files is None:
                    self._opened.seek(index)
                    still = not self.carries_times
                    image = flatten(
                        ImageOps.exif_transpose(self._opened) if still else self._opened
                    )
                else:
                    with _open_image(self._files[index], self.name) as opened:
                        image = flatten(ImageOps.exif_transpose(opened))
            except (OSError, EOFError, SyntaxError):
                continue  # the file is cut or damaged here; the base class reports it
            if self._files is not None and (image.height, image.width) != self._upright:
                raise ValueError(
                    f"{describe(self._files[index])}: {image.height}x{image.width} pixels in a "
                    f"folder whose first image has {self._upright[0]}x{self._upright[1]}"
                )
            if (image.height, image.width) != (self.height, self.width):
                image = image.resize((self.width, self.height), self._resample)
            yield index, np.asarray(image)

    def close(self) -> None:
        if self._opened is not None and self._owned:
            self._opened.close()
        self._opened = self._files = None


def flatten(image: Any) -> Any:
    """RGB of a ``PIL.Image`` of any mode; transparent parts are laid over white."""
    from PIL import Image

    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey
        grey = np.asarray(image, dtype=np.float64) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder, numbers in names in counting order (frame2 before frame10).

    Raises:
        ValueError: the folder holds none.
    """
    names = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    names = [p for p in names if not p.name.startswith(".")]
    if not names:
        raise ValueError(
            f"{folder}: the folder holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return sorted(
        names,
        key=lambda p: [
            (not t.isdigit(), int(t) if t.isdigit() else 0, t) for t in re.split(r"(\d+)", p.name)
        ],
    )


def is_image_source(source: Any) -> bool:
    """Whether a path, bytes or a file object holds an image rather than a video."""
    if isinstance(source, str | os.PathLike):
        if is_url(source):
            return False
        path = Path(source)
        if path.is_dir():
            return True
        if path.suffix.lower() in IMAGE_SUFFIXES | ANIMATION_SUFFIXES:
            return True
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            head = file.read(16)
    elif isinstance(source, bytes | bytearray | memoryview):
        head = bytes(source[:16])
    else:
        source.seek(0)
        head = source.read(16)
        source.seek(0)
    return head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def open_stills(
    source: Any, *, fps: float | None = None, size: int | tuple[int, int] | None = None
) -> VideoReader | None:
    """A reader for a source that is no video file, or None when it is one (or unknown)."""
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    if isinstance(source, str | os.PathLike | bytes) or is_file_object(source):
        check_exists(source)
        return ImageReader(source, fps=fps, size=size) if is_image_source(source) else None
    if isinstance(source, list | tuple) and source and isinstance(source[0], str | os.PathLike):
        for path in source:
            check_exists(path)
        return ImageReader(list(source), fps=fps, size=size)
    from stvision.io.convert import frames_to_clip

    return ClipReader(frames_to_clip(source, fps), size=size)


def _open_image(file: Any, name: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file)
    except (UnidentifiedImageError, SyntaxError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        which = name if isinstance(file, io.IOBase) else describe(file)
        raise ValueError(f"{which}: not an image, or one cut off at its head") from error


def _animation_times(image: Any, fps: float | None) -> list[float]:
    """Seconds at which the frames of an animated image begin (it stores durations in ms)."""
    count = getattr(image, "n_frames", 1)
    if fps is not None:
        return [i / fps for i in range(count)]
    times, now = [], 0.0
    for i in range(count):
        times.append(now / 1000)
        if count > 1:
            image.seek(i)
            # Viewers show frames that state no duration for a tenth of a second.
            now += image.info.get("duration") or 100
    return times
