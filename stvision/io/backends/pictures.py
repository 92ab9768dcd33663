"""Decoded frames of PyAV to RGB rows, in memory that is used again.

A new picture of megabytes comes page by page from the system, which costs more than converting it
does. FFmpeg's filters hand their pictures out of a pool, so large frames go through a filter graph of
one scaler; it computes the same values as ``VideoReformatter``, which is quicker to set up.
"""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

# Bytes of a picture from which the system's allocator asks for fresh pages (glibc: M_MMAP_THRESHOLD).
_LARGE = 128 * 1024
_BILINEAR = Interpolation.BILINEAR  # exact where the size stays: no filter is applied then


class Pictures:
    """Converts the frames of one video, whose format may change on the way."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._key: tuple[Any, ...] = ()
        self._graph: Any = None  # holds the memory of its filters, which do not hold it
        self._source: Any = None
        self._sink: Any = None

    def rgb(self, frame: Any, height: int, width: int) -> np.ndarray:
        """Rows (H, W, 3) uint8 of a frame, resized to ``height`` x ``width``.

        The array is a view of the picture; the picture lives as long as the view.
        """
        if height * width * 3 < _LARGE:
            picture = self._reformatter.reformat(
                frame, width, height, format="rgb24", interpolation=_BILINEAR, threads=1
            )
        else:
            picture = self._filtered(frame, height, width)
        # Rows without their padding; to_ndarray would copy them.
        plane = picture.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
        return rows[:, : width * 3].reshape(height, width, 3)

    def _filtered(self, frame: Any, height: int, width: int) -> Any:
        shape = (frame.width, frame.height, frame.format.name)
        colour = (int(frame.colorspace), int(frame.color_range))
        if self._key != (*shape, *colour, height, width):
            self._build(shape, colour, height, width)
            self._key = (*shape, *colour, height, width)
        self._source.push(frame)
        return self._sink.pull()

    def _build(
        self, shape: tuple[int, int, str], colour: tuple[int, int], height: int, width: int
    ) -> None:
        graph = av.filter.Graph()
        graph.threads = 1
        source = graph.add(
            "buffer",
            video_size=f"{shape[0]}x{shape[1]}",
            pix_fmt=shape[2],
            time_base="1/1000",  # times are read from the decoded frames
            pixel_aspect="1/1",
            colorspace=str(colour[0]),
            range=str(colour[1]),
        )
        scale = graph.add("scale", f"{width}:{height}:flags=bilinear")
        rgb = graph.add("format", "rgb24")
        sink = graph.add("buffersink")
        source.link_to(scale)
        scale.link_to(rgb)
        rgb.link_to(sink)
        graph.configure()
        self._graph, self._source, self._sink = graph, source, sink
