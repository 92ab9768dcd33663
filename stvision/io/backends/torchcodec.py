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
from stvision.io.clip import Clip
from stvision.io.source import as_openable, is_file_object, target_size
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
        self._check_length(len(self._decoder), "torchcodec")
        self._decoded_size = (first.shape[0], first.shape[1])
        self.height, self.width = target_size(size, *self._decoded_size)

    def _decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        if self._decoder is None:
            raise ValueError(f"{self.name}: the reader is closed")
        for index in indices:
            try:
                frame = self._decoder[index]
            except RuntimeError:
                continue  # damaged here; the base class reports it
            if self._decoded_size != (self.height, self.width):
                one = Clip(frame[None], self.times[:1])
                frame = one.resize(self.height, self.width).frames[0]
            yield index, frame.numpy()

    def close(self) -> None:
        self._decoder = None
