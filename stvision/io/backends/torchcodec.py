"""torchcodec behind the common interface, always in its exact mode.

The approximate mode takes the position of a frame to be its number divided by the rate, which is
wrong on files of variable rate.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from stvision.io.backends.common import IndexedReader
from stvision.io.source import as_openable, is_file_object
from stvision.optional import require


class TorchCodecReader(IndexedReader):
    """Reads a path, bytes or a file object. See ``VideoReader`` and ``open_video``."""

    def __init__(
        self,
        source: Any,
        *,
        size: int | tuple[int, int] | None = None,
        threads: int | None = None,
    ) -> None:
        decoders = require("torchcodec.decoders", extra="video", distribution="torchcodec")
        super().__init__(source, threads)
        given = as_openable(source) if is_file_object(source) else source
        if isinstance(given, os.PathLike):
            given = os.fspath(given)
        elif isinstance(given, bytearray | memoryview):
            given = bytes(given)
        try:
            self._decoder: Any = decoders.VideoDecoder(
                given,
                dimension_order="NHWC",
                num_ffmpeg_threads=self.threads,
                seek_mode="exact",
            )
            first = self._decoder[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._refusal("torchcodec", error) from error
        if not self.truncated:
            self._check_length(len(self._decoder), "torchcodec")
        self._take_size(size, first.shape[0], first.shape[1])

    def _decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        if self._decoder is None:
            raise ValueError(f"{self.name}: the reader is closed")
        for index in indices:
            picture = self._picture(index)
            if picture is not None:
                yield index, self._finish(picture)

    def _picture(self, index: int) -> np.ndarray | None:
        """A frame by its number, None where it is damaged.

        torchcodec also counts the broken packets of a cut file, so there the time decides.
        """
        surplus = len(self._decoder) - len(self) if self.truncated else 0
        for number in range(index, index + surplus + 1):
            try:
                frame = self._decoder.get_frame_at(number)
            except (RuntimeError, IndexError):
                continue
            if not self.truncated or abs(frame.pts_seconds - float(self.times[index])) < 1e-5:
                picture: np.ndarray = frame.data.numpy()
                return picture
        return None

    def close(self) -> None:
        self._decoder = None
