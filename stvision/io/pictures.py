"""Clips as pictures: GIF, a folder of frames, a strip for documents; and saving by suffix."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stvision.io.clip import Clip
from stvision.io.convert import as_clip
from stvision.io.sampling import uniform_indices
from stvision.io.source import IMAGE_SUFFIXES
from stvision.io.temporary import temporary_path, written_whole
from stvision.io.writer import VIDEO_SUFFIXES, write_video


def write_gif(
    clip: Any,
    path: str | os.PathLike[str],
    *,
    fps: float | None = None,
    loop: int = 0,
    colors: int = 256,
    dither: bool = False,
) -> Path:
    """Write an animated GIF with one palette for all frames, so that still parts do not flicker.

    Args:
        clip: anything that ``as_clip`` takes. Times are kept to the format's hundredth of a
            second; rounding does not add up.
        path: ends in .gif.
        fps: frames per second in place of the clip's times. Browsers show nothing faster than 50.
        loop: times to repeat, 0 for ever.
        colors: 2 to 256.
        dither: Floyd-Steinberg error diffusion; smoother gradients, larger files.

    Returns:
        The path.
    """
    from PIL import Image

    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"{path}: write_gif needs a name that ends in .gif")
    if not 2 <= colors <= 256:
        raise ValueError(f"colors is {colors}; allowed are 2 to 256")
    held = as_clip(clip)
    images = held.to_pil()
    sample = [images[i] for i in uniform_indices(held.times, min(len(images), 8))]
    mosaic = Image.fromarray(np.concatenate([np.asarray(i.convert("RGB")) for i in sample]))
    palette = mosaic.quantize(colors, method=Image.Quantize.MEDIANCUT)
    kind = Image.Dither.FLOYDSTEINBERG if dither else Image.Dither.NONE
    indexed = [image.convert("RGB").quantize(palette=palette, dither=kind) for image in images]
    if fps is not None:
        if not fps > 0:
            raise ValueError(f"fps is {fps}; it must be above 0")
        starts = [i / fps for i in range(len(held) + 1)]
    else:
        zero = float(held.times[0])
        starts = [float(t) - zero for t in held.times]
        starts.append(held.duration)
    ticks = [round(100 * start) for start in starts]
    lasting = [max(1, b - a) * 10 for a, b in itertools.pairwise(ticks)]
    with written_whole(path) as temporary:
        indexed[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=indexed[1:],
            duration=lasting if len(lasting) > 1 else lasting[0],
            loop=loop,
            optimize=False,
        )
    return Path(path)


def write_frames(
    clip: Any, folder: str | os.PathLike[str], *, pattern: str = "{:06d}.png", first: int = 0
) -> list[Path]:
    """Write every frame as an image of its own, without loss as .png.

    The folder appears when it is complete; one that exists already gains the files instead.

    Args:
        clip: anything that ``as_clip`` takes.
        folder: is made if need be.
        pattern: name of frame 0, 1, ...; the suffix chooses the format.
        first: number of the clip's first frame.

    Returns:
        The paths in order.
    """
    held, target = as_clip(clip), Path(folder)
    suffix = Path(pattern.format(0)).suffix.lower()
    if suffix not in IMAGE_SUFFIXES or pattern.format(0) == pattern.format(1):
        raise ValueError(
            f"pattern is {pattern!r}; it needs a number field and one of "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    work = temporary_path(target)
    work.mkdir()
    try:
        names = []
        for number in range(len(held)):
            names.append(pattern.format(first + number))
            held[number].to_pil()[0].save(work / names[-1])
        if target.is_dir():
            for name in names:
                os.replace(work / name, target / name)
        else:
            os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [target / name for name in names]


def write_strip(
    rows: Any,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    gap: int = 2,
    times: bool = False,
) -> Path:
    """Lay frames side by side, one clip a row, as one picture.

    Args:
        rows: one clip or a sequence of clips, each anything that ``as_clip`` takes (one list of
            images is one row).
        path: the picture; the suffix chooses the format.
        labels: a text for each row, written at its left.
        num_frames: frames shown per row, spread evenly; all of them by default. Shorter rows show
            what they have.
        height: pixels of a frame; by default that of the tallest row.
        gap: pixels of white between frames.
        times: write the seconds of each frame of the first row above it.

    Returns:
        The path.
    """
    from PIL import Image, ImageDraw, ImageFont

    clips = [as_clip(row) for row in _as_rows(rows)]
    if not clips:
        raise ValueError("rows is empty; a strip needs at least one clip")
    if labels is not None and len(labels) != len(clips):
        raise ValueError(f"{len(labels)} labels for {len(clips)} rows")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; it must be at least 1")
    if num_frames is not None:
        clips = [clip.sample_uniform(min(num_frames, len(clip))) for clip in clips]
    tall = height or max(clip.height for clip in clips)
    clips = [
        clip.to_uint8().resize(tall, max(1, round(clip.width * tall / clip.height)))
        for clip in clips
    ]
    font = ImageFont.load_default(size=max(10, min(18, tall // 4)))
    line = sum(font.getmetrics()) + 2 * gap if hasattr(font, "getmetrics") else 16
    left = max((int(font.getlength(text)) + 4 * gap for text in labels or []), default=0)
    top = line if times else 0
    wide = max(len(clip) * (clip.width + gap) for clip in clips)
    canvas = Image.new("RGB", (left + wide + gap, top + len(clips) * (tall + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for row, clip in enumerate(clips):
        y = top + gap + row * (tall + gap)
        if labels is not None:
            draw.text((gap, y + tall / 2), labels[row], "black", font, anchor="lm")
        for column, image in enumerate(clip.to_pil()):
            x = left + gap + column * (clip.width + gap)
            canvas.paste(image, (x, y))
            if times and row == 0:
                text = f"{float(clip.times[column]):.2f} s"
                draw.text((x + clip.width / 2, gap), text, "black", font, anchor="ma")
    with written_whole(path) as temporary:
        canvas.save(temporary)
    return Path(path)


def _as_rows(rows: Any) -> list[Any]:
    """Rows of a strip: a sequence whose items are clips, else the one clip given."""
    if isinstance(rows, torch.Tensor | np.ndarray):
        return list(rows) if rows.ndim == 5 else [rows]
    if not isinstance(rows, list | tuple):
        return [rows]
    images = all(hasattr(item, "getexif") or getattr(item, "ndim", 0) in (2, 3) for item in rows)
    return [rows] if rows and images else list(rows)


def save_clip(clip: Any, path: str | os.PathLike[str], **options: Any) -> Path:
    """Save by suffix: video file, GIF, strip picture, or a folder of frames (no suffix).

    Args:
        clip: anything that ``as_clip`` takes.
        path: .mp4, .m4v, .mov, .mkv, .webm, .gif, an image suffix, or none.
        options: go to ``write_video``, ``write_gif``, ``write_strip`` or ``write_frames``.

    Returns:
        The path.
    """
    suffix = Path(path).suffix.lower()
    held: Clip = as_clip(clip)
    if suffix in VIDEO_SUFFIXES:
        return write_video(held, path, **options)
    if suffix == ".gif":
        return write_gif(held, path, **options)
    if suffix in IMAGE_SUFFIXES:
        return write_strip([held], path, **options)
    if suffix == "":
        write_frames(held, path, **options)
        return Path(path)
    allowed = ", ".join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES | {".gif"}))
    raise ValueError(f"{path}: suffix {suffix!r}; allowed are {allowed}, or none for a folder")
