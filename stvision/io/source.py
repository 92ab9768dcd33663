"""What may be opened, how errors name it, and sizes asked for on decode."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

VideoSource = str | os.PathLike[str] | bytes | BinaryIO

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
ANIMATION_SUFFIXES = frozenset({".gif", ".apng"})


def is_file_object(source: Any) -> bool:
    """Whether ``source`` can be read and sought like a binary file."""
    return hasattr(source, "read") and hasattr(source, "seek")


def is_url(source: Any) -> bool:
    """Whether ``source`` is text of the form ``scheme://...``."""
    return isinstance(source, str) and "://" in source


def describe(source: Any) -> str:
    """The name that error sentences use."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"<{len(source)} bytes>"
    if is_file_object(source):
        name = getattr(source, "name", None)
        return name if isinstance(name, str) else "<file object>"
    return os.fspath(source)


def check_exists(source: Any) -> None:
    """Refuse missing and empty files and empty bytes.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: the file or the bytes are empty.
        TypeError: ``source`` is none of path, bytes and file object.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) == 0:
            raise ValueError("cannot read a video from empty bytes")
        return
    if is_file_object(source) or is_url(source):
        return
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"cannot open {type(source).__name__} as a video; allowed are a path, bytes and a "
            "binary file object"
        )
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")


def as_openable(source: Any) -> Any:
    """A path as text, bytes as a fresh file object, a file object rewound."""
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if is_file_object(source):
        source.seek(0)
        return source
    return os.fspath(source)


def target_size(size: int | tuple[int, int] | None, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels that ``size`` asks of frames of ``height`` x ``width``.

    Args:
        size: (height, width), or the length of the shorter side (the other keeps the aspect
            ratio, rounded), or None for no change.
    """
    if size is None:
        return height, width
    if isinstance(size, int):
        short = min(height, width)
        wanted = (max(1, round(height * size / short)), max(1, round(width * size / short)))
        valid = size >= 1
    else:
        valid = len(size) == 2 and all(int(s) >= 1 for s in size)
        wanted = (int(size[0]), int(size[1])) if valid else (0, 0)
    if not valid:
        raise ValueError(
            f"size is {size}; allowed are (height, width) or the shorter side, at least 1 pixel"
        )
    return wanted
