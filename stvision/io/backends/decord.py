"""decord behind the common interface, for those who know it; never the default.

It opens no VP9 and no AV1, turns pictures but never mirrors them, and can hang inside native code
on damaged files. The packet index names such files in a sentence before decord sees them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stvision.io.backends.common import IndexedReader
from stvision.io.source import as_openable


class DecordReader(IndexedReader):
    """See ``IndexedReader``."""

    backend = module = "decord"

    def _open(self, library: Any, source: Any) -> tuple[int, int]:
        if self.truncated:  # decord may hang on such files, where no signal reaches
            raise ValueError(
                f"{self.name}: decord does not read truncated files; use backend='pyav'"
            )
        try:
            self._decoder = library.VideoReader(
                as_openable(source), ctx=library.cpu(0), num_threads=self.threads
            )
            height, width = self._decoder[0].shape[:2]
        except (library.DECORDError, RuntimeError) as error:
            raise self._refusal(error) from error
        self._check_length(len(self._decoder))
        return height, width

    def _picture(self, index: int) -> np.ndarray:
        return _without_padding(self._decoder[index].asnumpy())


def _without_padding(picture: np.ndarray) -> np.ndarray:
    """Undo decord's reading of padded rows (after a rotation) as pixels of four channels."""
    height, width, channels = picture.shape
    if channels == 3:
        return picture
    return picture.reshape(height, width * channels)[:, : width * 3].reshape(height, width, 3)
