"""Attention in a 3-D neighborhood of each token (Hassani et al. 2023, Neighborhood Attention)."""

import operator
from typing import cast

from torch import Tensor

from stvision.attention.volume import VolumeAttention
from stvision.attention.windows import WindowLayout
from stvision.kernels.neighborhood.choice import BACKENDS
from stvision.kernels.neighborhood.problem import per_axis
from stvision.layers.checks import check_choice


class NeighborhoodAttention(VolumeAttention):
    """Each token sees the (T, H, W) box around it: (B, T, H, W, C) to (B, T, H, W, C).

    A box that would leave the volume is shifted inwards, and is cut to the volume where the
    volume is smaller than the box: with ``dilation``, to as many tokens at that distance as every
    token has there, and ``stride`` to the box. Rotary positions are indices in the flattened
    volume, so the weights are interchangeable with those of the other mechanisms.

    Args:
        dim: channels C.
        heads: attention heads; must divide ``dim``.
        kernel_size: frames, rows and columns of the box; one number for all three.
        stride: per axis or for all three, neighbours in a row that share the box of one of them, 1
            to ``kernel_size``; as in :func:`stvision.kernels.neighborhood.na3d`.
        dilation: per axis or for all three, distance between the tokens of a box, at least 1.
        causal: per axis (or one for frames only): see nothing later along it.
        rotary_dim: rotated channels per head, at most head_dim; 0 for none.
        kernel: backend of :func:`stvision.kernels.neighborhood.na3d`, ``None`` to choose.
        backend: accepted because all mechanisms have it; dense backends have no part here.

    Raises:
        ValueError: numbers that do not fit.
        TypeError: a stride or dilation that is not a whole number.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kernel_size: int | tuple[int, int, int] = (5, 7, 7),
        stride: int | tuple[int, int, int] = 1,
        dilation: int | tuple[int, int, int] = 1,
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
        self.stride = per_axis("stride", stride, 3)
        self.dilation = per_axis("dilation", dilation, 3)
        if any(not 1 <= one <= most for one, most in zip(self.stride, size, strict=True)):
            raise ValueError(
                f"stride must be at least 1 and at most kernel_size {size}, got {stride}"
            )
        if min(self.dilation) < 1:
            raise ValueError(f"dilation must be one or three numbers of at least 1, got {dilation}")
        self.kernel = kernel
        self.causal_axes = (causal, False, False) if isinstance(causal, bool) else tuple(causal)

    def window(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def mix(self, query: Tensor, key: Tensor, value: Tensor, layout: WindowLayout) -> Tensor:
        from stvision.kernels.neighborhood import na3d

        volume = [x.unflatten(1, layout.grid) for x in (query, key, value)]
        sizes, strides, dilations = zip(
            *map(_within, layout.grid, self.kernel_size, self.stride, self.dilation), strict=True
        )
        out = na3d(
            volume[0],
            volume[1],
            volume[2],
            sizes,
            stride=strides,
            dilation=dilations,
            is_causal=self.causal_axes,
            backend=self.kernel,
        )
        return cast(Tensor, out).flatten(1, 3)


def _within(extent: int, size: int, stride: int, dilation: int) -> tuple[int, int, int]:
    """Size, stride and dilation of a box along an axis, cut where the axis is too short for it."""
    if size * dilation <= extent:
        return size, stride, dilation
    cut = max(1, operator.index(extent) // dilation)
    return cut, min(stride, cut), dilation if cut > 1 else 1
