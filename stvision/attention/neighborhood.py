"""Attention in a 3-D neighborhood of each token (Hassani et al. 2023, Neighborhood Attention)."""

import operator
from typing import cast

from torch import Tensor

from stvision.attention.volume import VolumeAttention
from stvision.attention.windows import WindowLayout
from stvision.kernels.neighborhood.choice import BACKENDS
from stvision.layers.checks import check_choice


class NeighborhoodAttention(VolumeAttention):
    """Each token sees the (T, H, W) box around it: (B, T, H, W, C) to (B, T, H, W, C).

    A box that would leave the volume is shifted inwards, and is cut to the volume where the
    volume is smaller than the box. Rotary positions are indices in the flattened volume, so the
    weights are interchangeable with those of the other mechanisms.

    Args:
        dim: channels C.
        heads: attention heads; must divide ``dim``.
        kernel_size: frames, rows and columns of the box; one number for all three.
        causal: per axis (or one for frames only): see nothing later along it.
        rotary_dim: rotated channels per head, at most head_dim; 0 for none.
        kernel: backend of :func:`stvision.kernels.neighborhood.na3d`, ``None`` to choose.
        backend: accepted because all mechanisms have it; dense backends have no part here.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kernel_size: int | tuple[int, int, int] = (5, 7, 7),
        causal: bool | tuple[bool, bool, bool] = False,
        rotary_dim: int = 32,
        kernel: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, heads, rotary_dim=rotary_dim, backend=backend)
        size = (kernel_size,) * 3 if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(size) != 3 or min(size) < 1:
            raise ValueError(
                f"kernel_size must be one or three numbers of at least 1, got {kernel_size}"
            )
        check_choice("kernel", kernel, BACKENDS)
        self.kernel_size = size
        self.kernel = kernel
        self.causal_axes = (causal, False, False) if isinstance(causal, bool) else tuple(causal)

    def window(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def mix(self, query: Tensor, key: Tensor, value: Tensor, layout: WindowLayout) -> Tensor:
        from stvision.kernels.neighborhood import na3d

        volume = [x.unflatten(1, layout.grid) for x in (query, key, value)]
        frames, rows, columns = (
            size if size <= extent else operator.index(extent)
            for size, extent in zip(self.kernel_size, layout.grid, strict=True)
        )
        out = na3d(
            volume[0],
            volume[1],
            volume[2],
            (frames, rows, columns),
            is_causal=self.causal_axes,
            backend=self.kernel,
        )
        return cast(Tensor, out).flatten(1, 3)
