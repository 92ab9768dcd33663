"""decord behind the common interface, for those who know it; never the default.

It opens no VP9 and no AV1, turns pictures but never mirrors them, and can hang inside native code
on damaged files. The packet index names such files in a sentence before decord sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from stvision.io.backends.common import IndexedReader
from stvision.io.source import as_openable
from stvision.optional import require


class DecordReader(IndexedReader):
    """Reads a path, bytes or a file object (held in memory). See ``VideoReader``."""

    def __init__(
        self,
        source: Any,
        *,
        size: int | tuple[int, int] | None = None,
        threads: int | None = None,
    ) -> None:
        decord = require("decord", extra="video")
        super().__init__(source, threads)
        if self.truncated:  # decord may hang on such files, where no signal reaches
            raise ValueError(
                f"{self.name}: decord does not read truncated files; use backend='pyav'"
            )
        try:
            self._decoder: Any = decord.VideoReader(
                as_openable(source), ctx=decord.cpu(0), num_threads=self.threads
            )
            height, width = self._decoder[0].shape[:2]
        except (decord.DECORDError, RuntimeError) as error:
            raise self._refusal("decord", error) from error
        self._check_length(len(self._decoder), "decord")
        self._take_size(size, height, width)

    def _decode(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        if self._decoder is None:
            raise ValueError(f"{self.name}: the reader is closed")
        for index in indices:
            yield index, self._finish(_without_padding(self._decoder[index].asnumpy()))

    def close(self) -> None:
        self._decoder = None


def _without_padding(picture: np.ndarray) -> np.ndarray:
    """Undo decord's reading of padded rows (after a rotation) as pixels of four channels."""
    height, width, channels = picture.shape
    if channels == 3:
        return picture
    return picture.reshape(height, width * channels)[:, : width * 3].reshape(height, width, 3)
