"""The mask-free limit: windows that tile the grid without overlap, as plain dense attention.

When a window covers an axis, or ``stride`` equals ``kernel_size`` and divides the axis, every query
of a block sees exactly the keys of its block. Blocks become the batch of
``scaled_dot_product_attention``, which picks the fastest dense kernel of the device.
"""

from typing import Any

import torch
import torch.nn.functional as F

from stvision.kernels.neighborhood.windows import Axis

#: largest batch that the dense kernels launch
LARGEST_BATCH = 65_535


def is_triangle(axes: tuple[Axis, ...]) -> bool:
    """One causal axis whose window is the whole of it."""
    if len(axes) != 1:
        return False
    axis = axes[0]
    same = axis.query_length == axis.key_length and axis.query_map == "index"
    return axis.causal and axis.dilation == 1 and same and axis.window >= axis.key_length


def blocks(axis: Axis) -> int | None:
    """Blocks into which the windows cut an axis without overlap, or ``None`` where they overlap."""
    if axis.is_full:
        return 1
    same = axis.query_length == axis.key_length and axis.query_map == "index"
    if axis.causal or axis.dilation > 1 or not same or axis.stride != axis.window:
        return None
    return None if axis.key_length % axis.window else axis.key_length // axis.window


def why_not(axes: tuple[Axis, ...], batch: int) -> str | None:
    """One sentence why the problem is no dense attention, or ``None`` when it is."""
    if is_triangle(axes):
        return None
    number = tokens = 1
    for axis in axes:
        count = blocks(axis)
        if count is None:
            return "windows are neither the whole grid nor blocks without overlap"
        number *= count
        tokens *= axis.key_length // count
    if number > 1 and tokens < 64:
        return f"blocks of {tokens} tokens are too small to be dense problems of their own"
    if number * batch > LARGEST_BATCH:
        return f"{number * batch} blocks are more than {LARGEST_BATCH} dense problems of one launch"
    return None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    axes: tuple[Axis, ...],
    scale: float,
) -> torch.Tensor:
    """Output (B, *grid, H, dv) of a problem for which :func:`why_not` is ``None``."""
    rank, triangle = len(axes), is_triangle(axes)
    if scale <= 0:  # with which the causal kernels of a CPU give NaN
        query, scale = (-query, -scale) if scale < 0 else (query * 0, 1.0)
    counts = [1 if triangle else blocks(axis) or 1 for axis in axes]
    order = [0, *range(1, 2 * rank, 2), 2 * rank + 1, *range(2, 2 * rank + 1, 2), 2 * rank + 2]

    def cut(x: torch.Tensor) -> torch.Tensor:
        """(B, *grid, H, d) -> (B * blocks, H, tokens, d)."""
        shape = [x.shape[0]]
        for count, length in zip(counts, x.shape[1:-2], strict=True):
            shape += [count, length // count]
        x = x.reshape(*shape, *x.shape[-2:]).permute(order)
        x = x.flatten(rank + 2, 2 * rank + 1)
        return x.flatten(0, rank)

    # a branch, since the compiler's comparison of open sizes is no bool
    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[-2] != key.shape[-2] else {}
    out = F.scaled_dot_product_attention(
        cut(query),
        cut(key),
        cut(value),
        is_causal=triangle,
        scale=scale,
        **grouped,
    )
    grid = query.shape[1:-2]
    sizes = [length // count for count, length in zip(counts, grid, strict=True)]
    out = out.reshape(query.shape[0], *counts, query.shape[-2], *sizes, value.shape[-1])
    back = [order.index(i) for i in range(len(order))]
    return out.permute(back).reshape(*query.shape[:-1], value.shape[-1])
