"""How a display matrix stands a decoded picture upright: quarter turns and mirrors."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Orientation:
    """Swap the axes if ``transposed``, then reverse the columns and rows that are mirrored."""

    transposed: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @property
    def is_mirror_image(self) -> bool:
        """Whether no turn alone does it."""
        return self.transposed ^ self.mirror_x ^ self.mirror_y

    @property
    def rotation(self) -> int:
        """Degrees counter-clockwise, 0 for mirror images."""
        turns = {(False, True, True): 180, (True, True, False): -90, (True, False, True): 90}
        return turns.get((self.transposed, self.mirror_x, self.mirror_y), 0)

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """A view of an (H, W, C) picture, upright."""
        if self.transposed:
            picture = picture.transpose(1, 0, 2)
        if self.mirror_x or self.mirror_y:
            picture = picture[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]
        return picture

    def finish_turn(self, picture: np.ndarray) -> np.ndarray:
        """What is left to do where a library has applied the matrix's turn but not its mirror.

        FFmpeg takes the turn from the matrix's first column (``av_display_rotation_get``); of a
        mirror image that leaves a reversal along the axis that this column does not fix.
        """
        if not self.is_mirror_image:
            return picture
        return picture[:, ::-1] if self.transposed else picture[::-1]


def read_orientation(frame: Any) -> Orientation:
    """The display matrix of a decoded frame: (x', y') = (a x + c y, b x + d y)."""
    try:
        side = frame.side_data["DISPLAYMATRIX"]
    except KeyError:
        return Orientation()
    a, b, _, c, d = struct.unpack("<5i", bytes(side)[:20])
    transposed = abs(b) > abs(a)
    if transposed:
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)
