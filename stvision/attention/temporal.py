"""Attention over the frames of each pixel."""

from torch import Tensor

from stvision.attention.volume import VolumeAttention
from stvision.attention.windows import WindowLayout


class TemporalAttention(VolumeAttention):
    """Each pixel sees itself in all frames: (B, T, H, W, C) to (B, T, H, W, C).

    Rotary positions are frame numbers.

    Args:
        dim: channels C.
        heads: attention heads; must divide ``dim``.
        causal: see only earlier frames and the own one.
        rotary_dim: rotated channels per head, at most head_dim; 0 for none.
        backend: attention backend by name.
    """

    def window(self, height: int, width: int) -> tuple[int, int]:
        return 1, 1

    def positions(self, layout: WindowLayout, like: Tensor) -> Tensor | None:
        if self.rotary_emb is None:
            return None
        frames, height, width = layout.grid
        table = self.rotary_emb.table(frames, like)[:, None, None]
        return table.expand(-1, height, width, -1, -1)
