"""Attention among all tokens of a clip's volume."""

from stvision.attention.volume import VolumeAttention


class FullAttention(VolumeAttention):
    """Every token of the (T, H, W) volume sees every other: (B, T, H, W, C) to (B, T, H, W, C).

    Rotary positions are indices in the flattened volume, so the weights are interchangeable with
    those of :class:`stvision.attention.seer_window.SeerWindowAttention`.

    Args:
        dim: channels C.
        heads: attention heads; must divide ``dim``.
        causal: see only tokens before it in (frame, row, column) order.
        rotary_dim: rotated channels per head, at most head_dim; 0 for none.
        backend: attention backend by name.
    """

    def window(self, height: int, width: int) -> tuple[int, int]:
        return height, width
