"""Launch the Triton kernels: layouts, tables and shapes. Imported only when this backend runs."""

import math
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from stvision.kernels.neighborhood import blocked, triton_kernels
from stvision.kernels.neighborhood.choice import interpreted
from stvision.kernels.neighborhood.triton_tiles import Tiles, choose_tiles, on_device, three_axes
from stvision.kernels.neighborhood.windows import Axis

#: pipeline depth that fits a device's shared memory, found at the first launch that did not
_DEPTH: dict[tuple[Any, ...], int] = {}


def _launch(
    kernel: Any, programs: int, device: torch.device, arguments: tuple, constants: dict[str, Any]
) -> None:
    """Launch, with a shallower load pipeline where the device has too little shared memory."""
    known = (kernel.__name__, device, *constants.values(), arguments[0].dtype)
    depth = _DEPTH.get(known, constants["num_stages"])
    while True:
        try:
            with torch.cuda.device_of(arguments[0]):
                kernel[(programs,)](*arguments, **(constants | {"num_stages": depth}))
        except OutOfResources:
            if depth == 1:
                raise
            depth -= 1
            _DEPTH[known] = depth
        else:
            return


def _grid3(x: torch.Tensor) -> torch.Tensor:
    """(B, *grid, heads, d) with three grid axes and a dense last axis; a view where it can be."""
    while x.dim() < 6:
        x = x.unsqueeze(1)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _precision(dtype: torch.dtype) -> str:
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def _descriptors(k: torch.Tensor, v: torch.Tensor, box: tuple[int, ...]) -> tuple[Any, Any] | None:
    """Tensor-map descriptors of K and V, or ``None`` where the hardware or layout forbids them."""
    if not interpreted() and (
        torch.version.hip or torch.cuda.get_device_capability(k.device)[0] < 9
    ):
        return None
    found = []
    for x in (k, v):
        size = x.shape[-1]
        if size < 16 or size & (size - 1) or x.stride(-2) != size or max(box) > 256:
            return None
        strides = [*x.stride()[:4], 1]
        if x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in strides[:4]):
            return None
        if any(s <= 0 for s in strides):
            return None
        from triton.tools.tensor_descriptor import TensorDescriptor

        shape = [*x.shape[:4], x.shape[4] * size]
        found.append(TensorDescriptor(x, shape, strides, [1, *box, size]))
    return found[0], found[1]


def _sizes(tile: tuple[int, ...] | None, axes: tuple[Axis, ...], dim: int, bytes_: int) -> Tiles:
    chosen = choose_tiles(three_axes(axes), dim, bytes_) if len(tile or ()) <= len(axes) else None
    if tile is None:
        assert chosen is not None
        return chosen
    rank = len(axes)
    shapes = []
    for name, given in (("q_tile_shape", tile[:rank]), ("kv_tile_shape", tile[rank:])):
        shape = (1,) * (3 - len(given)) + tuple(given)
        if given and (min(shape) < 1 or any(n & (n - 1) for n in shape) or math.prod(shape) < 16):
            raise ValueError(
                f"{name} must hold powers of two with a product of at least 16, not {given}"
            )
        shapes.append((shape[0], shape[1], shape[2]))
    if chosen is not None:
        return Tiles(shapes[0], chosen.key, chosen.warps, chosen.stages)
    large = math.prod(shapes[0]) * math.prod(shapes[1]) >= 128 * 128 or dim >= 128
    return Tiles(shapes[0], shapes[1], 8 if large else 4, 2)


def _common(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    axes: tuple[Axis, Axis, Axis],
    tiles: Tiles,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> tuple[list[Any], dict[str, Any]]:
    """Strides and constants that all kernels take in the same places."""
    strides = [stride for x in (q, k, v) for stride in x.stride()[:5]]
    align = math.gcd(16, *strides)
    numbers = [*q.shape[1:4], *k.shape[1:4]]
    numbers += [stride // align for stride in strides]
    numbers += [axis.dilation for axis in axes]
    numbers += [axis.window for axis in axes]
    names = ("QT", "QH", "QW", "KT", "KH", "KW")
    constants = dict(zip(names, (*tiles.query, *tiles.key), strict=True))
    d, dv = q.shape[-1], v.shape[-1]
    constants |= {
        "D": d,
        "DV": dv,
        "BD": max(16, 1 << (d - 1).bit_length()),
        "BDV": max(16, 1 << (dv - 1).bit_length()),
        "ALIGN": align,
        "HAS_BIAS": rpb is not None,
        "HAS_MASK": key_mask is not None,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return numbers, constants | {"PRECISION": _precision(q.dtype)}


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    axes: tuple[Axis, ...],
    scale: float,
    tile: tuple[int, ...] | None = None,
    boxes: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, *grid, H, dv) and float32 log-sum-exp (B, *grid, H).

    Args:
        query, key, value, rpb, key_mask, axes, scale: the problem.
        tile: queries of a tile per axis, then optionally keys of a box per axis; chosen when not
            given.
        boxes: load keys through tensor descriptors; ``None`` does where the device can.
    """
    tiles = _sizes(tile, axes, max(key.shape[-1], value.shape[-1]), query.element_size())
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if not out.numel():
        return out, lse
    q, k, v = _grid3(query), _grid3(key), _grid3(value)
    filled = three_axes(axes)
    tables = on_device(filled, tiles.query, "query", str(q.device))
    bounds = on_device(filled, tiles.query, "bounds", str(q.device))
    numbers, constants = _common(q, k, v, filled, tiles, rpb, key_mask)
    descriptors = None
    if boxes is not False and all(axis.dilation == 1 for axis in axes):
        descriptors = _descriptors(k, v, tiles.key)
    if boxes and descriptors is None:
        raise ValueError("tensor descriptors cannot load these keys: dilation, head_dim or strides")
    heads = q.shape[-2]
    counts = [len(table) for table in tables]
    programs = math.prod(counts) * q.shape[0] * heads
    arguments = (
        q,
        *(descriptors or (k, v)),
        q if rpb is None else rpb.contiguous(),
        q if key_mask is None else key_mask.contiguous().view(torch.uint8),
        out,
        lse,
        *tables,
        *bounds,
        *counts,
        heads,
        heads // k.shape[-2],
        scale,
        *numbers,
    )
    _launch(
        triton_kernels.forward_kernel,
        programs,
        q.device,
        arguments,
        constants | {"BOXES": descriptors is not None},
    )
    return out, lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    tile: tuple[int, ...] | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key, value and rpb.

    Those of query, key and value repeat bit by bit. That of ``rpb`` is summed over all tiles with
    atomics; with ``deterministic`` a call with ``rpb`` runs its backward on the blocked path.
    """
    if rpb is not None and deterministic:
        return blocked.backward(
            grad_out, grad_lse, query, key, value, rpb, key_mask, out, lse, axes, scale
        )
    grad_q, grad_k, grad_v = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    grad_bias = None
    if rpb is not None:
        grad_bias = torch.zeros(rpb.shape, dtype=torch.float32, device=rpb.device)
        rpb = rpb.contiguous()
    if not query.numel():
        return grad_q, grad_k, grad_v, None if rpb is None else torch.zeros_like(rpb)
    size = max(key.shape[-1], value.shape[-1])
    # two products more live at once than in the forward, so the boxes are those of twice the size
    tiles = _sizes(tile, axes, 2 * size, query.element_size())
    q, k, v = _grid3(query), _grid3(key), _grid3(value)
    filled = three_axes(axes)
    grad_out = grad_out.contiguous()
    delta = (grad_out.float() * out).sum(-1) - grad_lse
    lse = lse.contiguous()
    bounds = on_device(filled, tiles.query, "bounds", str(q.device))
    numbers, constants = _common(q, k, v, filled, tiles, rpb, key_mask)
    mask = q if key_mask is None else key_mask.contiguous().view(torch.uint8)
    batch, heads, kv_heads = q.shape[0], q.shape[-2], k.shape[-2]
    tables = on_device(filled, tiles.query, "query", str(q.device))
    counts = [len(table) for table in tables]
    arguments = (
        q,
        k,
        v,
        q if rpb is None else rpb,
        mask,
        grad_out,
        lse,
        delta,
        grad_q,
        q if grad_bias is None else grad_bias,
        *tables,
        *bounds,
        *counts,
        heads,
        heads // kv_heads,
        scale,
        *numbers,
    )
    _launch(
        triton_kernels.query_gradient_kernel,
        math.prod(counts) * batch * heads,
        q.device,
        arguments,
        constants,
    )
    tables = on_device(filled, tiles.key, "key", str(q.device))
    counts = [len(table) for table in tables]
    arguments = (
        q,
        k,
        v,
        q if rpb is None else rpb,
        mask,
        grad_out,
        lse,
        delta,
        grad_k,
        grad_v,
        *tables,
        *bounds,
        *counts,
        kv_heads,
        heads // kv_heads,
        scale,
        *numbers,
    )
    _launch(
        triton_kernels.key_gradient_kernel,
        math.prod(counts) * batch * kv_heads,
        q.device,
        arguments,
        constants,
    )
    if grad_bias is not None and rpb is not None:
        grad_bias = grad_bias.to(rpb.dtype)
    return grad_q, grad_k, grad_v, grad_bias
