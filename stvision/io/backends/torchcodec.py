"""torchcodec behind the common interface, always in its exact mode.

The approximate mode takes the position of a frame to be its number divided by the rate, which is
wrong on files of variable rate.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from stvision.io.backends.common import IndexedReader
from stvision.io.source import as_openable, is_file_object


class TorchCodecReader(IndexedReader):
    """See ``IndexedReader``."""

    backend, module = "torchcodec", "torchcodec.decoders"

    def _open(self, library: Any, source: Any) -> tuple[int, int]:
        given = as_openable(source) if is_file_object(source) else source
        if isinstance(given, os.PathLike):
            given = os.fspath(given)
        elif isinstance(given, bytearray | memoryview):
            given = bytes(given)
        try:
            self._decoder = library.VideoDecoder(
                given,
                dimension_order="NHWC",
                num_ffmpeg_threads=self.threads,
                seek_mode="exact",
            )
            first = self._decoder[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._refusal(error) from error
        if not self.truncated:
            self._check_length(len(self._decoder))
        return first.shape[0], first.shape[1]

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
