"""Tiny videos that say which file and which frame they are."""

import functools
import tempfile
from pathlib import Path

import torch

from stvision.io import Clip, VideoWriter


@functools.cache
def _encoded(shade: int, frames: int, fps: float) -> bytes:
    times = torch.arange(frames, dtype=torch.uint8)
    block = torch.full((frames, 16, 24, 3), shade, dtype=torch.uint8)
    block[:, :, 12:] = (times * 4)[:, None, None, None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with VideoWriter(path, lossless=True, threads=1) as writer:
            writer.write(Clip.from_frames(block, fps))
        return path.read_bytes()


def tiny_video(path: Path, shade: int = 0, frames: int = 4, fps: float = 10.0) -> Path:
    """A video whose left half is grey of ``shade`` and whose right half is 4 times the frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encoded(shade, frames, fps))
    return path


def shade(record) -> int:
    """Which video a record is of."""
    return int(record.frames[0, 0, 0, 0])


def shown(record) -> list[int]:
    """Which frames of the video a record holds."""
    return (record.frames[:, 0, -1, 0].int() // 4).tolist()


def facts(reader, *names: str) -> list[tuple]:
    """Key, class number and further facts of each clip, after seeing that names fit numbers."""
    for entry in reader.entries:
        assert reader.class_names[entry.meta["class_id"]] == entry.meta["label"]
    return [
        (entry.key, entry.meta["class_id"], *(entry.meta[name] for name in names))
        for entry in reader.entries
    ]
