"""Launch the Triton kernels: layouts, tables and shapes. Imported only when this backend runs."""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from stvision.kernels.neighborhood import blocked, triton_boxes, triton_config, triton_kernels
from stvision.kernels.neighborhood.choice import interpreted
from stvision.kernels.neighborhood.triton_tiles import (
    Tiles,
    choose_tiles,
    cuts,
    on_device,
    runs,
    three_axes,
)
from stvision.kernels.neighborhood.windows import Axis

LOG2E = math.log2(math.e)

#: largest float32 sum of the one-pass backward, over the bytes of all its other tensors
WORKSPACE_SHARE = 0.07

#: programs of one launch that keep every processor of a large GPU busy
BUSY = 512

#: pipeline depth that fits a device's shared memory, found at the first launch that did not
_DEPTH: dict[tuple[Any, ...], int] = {}

#: shapes that fit, by what :func:`_with_room` was asked for
_FITTING: dict[tuple[Any, ...], Tiles] = {}

#: compiled kernels, with their constants in the order of the signature
_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

#: integers above this are of another type to a kernel
LARGEST_INT32 = 2**31 - 1


def _on(device: torch.device) -> AbstractContextManager:
    """``device`` as the present one; costs nothing where it is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _compile_key(kernel: Any, device: torch.device, arguments: tuple, values: tuple) -> tuple:
    """All that decides which compiled form of a kernel a launch takes.

    Kernels declare their integers unspecialised, so of those only the width counts; descriptors have
    their shapes among the constants.
    """
    kinds: list[Any] = []
    for x in arguments:
        if isinstance(x, int):
            kinds.append(x > LARGEST_INT32)
        elif isinstance(x, torch.Tensor):
            kinds.append((x.dtype, x.data_ptr() % 16 == 0))
        elif not isinstance(x, float):
            kinds.append(x.base.dtype)
    return (kernel, device, *kinds, *values)


def _launch(
    kernel: Any, programs: int, device: torch.device, arguments: tuple, constants: dict[str, Any]
) -> None:
    """Launch, with a shallower load pipeline where the device has too little shared memory.

    Triton looks at every argument of every launch anew, which takes longer than many a kernel; what
    it found is kept here.
    """
    key = _compile_key(kernel, device, arguments, tuple(constants.values()))
    with _on(device):
        if key in _COMPILED and not kernel.pre_run_hooks:
            compiled, ordered = _COMPILED[key]
            compiled[(programs, 1, 1)](*arguments, *ordered)
            return
        depth = _DEPTH.get(key, constants["num_stages"])
        while True:
            try:
                compiled = kernel[(programs,)](*arguments, **(constants | {"num_stages": depth}))
            except OutOfResources:
                if depth == 1:
                    raise
                depth -= 1
                _DEPTH[key] = depth
            else:
                break
    # on AMD a kernel also depends on whether its tensors hold more than 2 GiB
    if not interpreted() and not torch.version.hip:
        # runtime arguments come first in every signature
        names = kernel.arg_names[len(arguments) :]
        _COMPILED[key] = compiled, tuple(constants[name] for name in names)


def _grid3(x: torch.Tensor) -> torch.Tensor:
    """(B, *grid, heads, d) with three grid axes and a dense last axis; a view where it can be."""
    while x.dim() < 6:
        x = x.unsqueeze(1)
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    warnings.warn(
        "a query, key or value whose last axis is not dense is copied at every call; calling "
        "contiguous() once, where it is made, saves that",
        stacklevel=2,
    )
    return x.contiguous()


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
        shape = [*x.shape[:4], x.shape[4] * size]
        found.append(TensorDescriptor(x, shape, strides, [1, *box, size]))
    return found[0], found[1]


@lru_cache(maxsize=16)
def _device_name(device: torch.device) -> str | None:
    """Name of a device with a tensor memory unit, ``None`` for others."""
    if interpreted():
        return "interpreter"
    if torch.version.hip or torch.cuda.get_device_capability(device)[0] < 9:
        return None
    return torch.cuda.get_device_name(device)


@lru_cache(maxsize=512)
def _box_layout(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    bytes_: int,
    box: tuple[int, int, int],
    width: int,
) -> tuple[tuple[int, ...], ...] | None:
    """Shape, strides and block of a descriptor, see :func:`_box`."""
    *lengths, heads, size = shape
    *steps, head_stride, _ = strides
    if heads > 1 and (head_stride != size or size * bytes_ % 16):
        return None
    # the stride of an axis of one token is never walked, but must be a valid one
    whole = -(-heads * size // 16) * 16
    steps = [whole if n == 1 else s for n, s in zip(lengths, steps, strict=True)]
    if any(s <= 0 or s * bytes_ % 16 for s in steps):
        return None
    return (*lengths, heads * size), (*steps, 1), (1, *box, width)


#: fields of a checked descriptor, without its tensor
_DESCRIBED: dict[tuple[Any, ...], dict[str, Any]] = {}


def _box(x: torch.Tensor, box: tuple[int, int, int], width: int) -> Any | None:
    """Tensor-map descriptor that loads boxes of one head, ``None`` where the layout forbids it.

    Args:
        x: (B, T, H, W, heads, d) with a dense last axis.
        box: tokens of a box per axis.
        width: columns of a box, at least d.
    """
    layout = _box_layout(tuple(x.shape), x.stride(), x.element_size(), box, width)
    if layout is None or x.data_ptr() % 16:
        return None
    fields = _DESCRIBED.get((layout, x.dtype))
    if fields is None:
        made = TensorDescriptor(x, *map(list, layout))
        if len(_DESCRIBED) >= 512:
            _DESCRIBED.clear()
        _DESCRIBED[layout, x.dtype] = vars(made) | {"base": None}
        return made
    # without the checks of its fields, which are those of the first one
    made = object.__new__(TensorDescriptor)
    vars(made).update(fields, base=x)
    return made


def _for_boxes(x: torch.Tensor) -> torch.Tensor:
    """``x`` as boxes can be loaded from it, copied where only its strides forbid that.

    Such as those of heads before tokens, transposed: a forward and backward of 115 200 tokens in
    windows of 10 368 takes 65 ms with copies and 241 ms through pointers (8 heads of 128, one H100).
    What was expanded is not blown up.
    """
    size, bytes_ = x.shape[-1], x.element_size()
    if size * bytes_ % 16 or min(x.stride()) <= 0 or _device_name(x.device) is None:
        return x
    if _box(x, (1, 1, 1), _padded(size)) is not None:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _lean_shapes(
    kernel: triton_config.Kernel,
    q: torch.Tensor,
    v: torch.Tensor,
    axes: tuple[Axis, Axis, Axis],
    tile: tuple[int, ...] | None,
    rank: int,
) -> Tiles | None:
    name = _device_name(q.device)
    if name is None:
        return None
    size = max(q.shape[-1], v.shape[-1])
    if tile is not None:
        return _sizes(tile, axes[3 - rank :], size, q.element_size())
    return triton_config.shapes(kernel, axes, size, q.element_size(), name)


@lru_cache(maxsize=512)
def _lean_constants(
    d: int,
    dv: int,
    precision: str,
    tiles: Tiles,
    align: int,
    axes: tuple[Axis, Axis, Axis],
    of_keys: bool = False,
) -> dict[str, Any]:
    """Constants of a box kernel; shared, so copied by whoever adds to them."""
    names = ("QT", "QH", "QW", "KT", "KH", "KW")
    rows, columns = (tiles.key, tiles.query) if of_keys else (tiles.query, tiles.key)
    cut = [cuts(a, r, c, of_keys) for a, r, c in zip(axes, rows, columns, strict=True)]
    constants = dict(zip(names, (*tiles.query, *tiles.key), strict=True)) | {
        "D": d,
        "DV": dv,
        "BD": _padded(d),
        "BDV": _padded(dv),
        "ALIGN": align,
        "PRECISION": precision,
        "MASK": cut[0] + 2 * cut[1] + 4 * cut[2],
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return constants | ({"maxnreg": tiles.registers} if tiles.registers else {})


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _is_lean(
    query: torch.Tensor,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    axes: tuple[Axis, ...],
    scale: float,
) -> bool:
    """Whether ``triton_boxes`` computes this; float32 on a GPU has no product that feeds on it."""
    plain = rpb is None and key_mask is None and scale > 0
    fits = query.element_size() == 2 or interpreted()
    return plain and fits and all(axis.dilation == 1 for axis in axes)


def _divided(*tensors: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Common divisor of the strides, at most 16, and the strides divided by it."""
    strides = [stride for x in tensors for stride in x.stride()[:5]]
    align = math.gcd(16, *strides)
    return align, tuple(stride // align for stride in strides)


def _lean_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    axes: tuple[Axis, Axis, Axis],
    scale: float,
    tile: tuple[int, ...] | None,
    rank: int,
) -> bool:
    """Fill ``out`` and ``lse`` where a box kernel can; whether it did."""
    tiles = _lean_shapes("forward", q, v, axes, tile, rank)
    if tiles is None:
        return False
    align, strides = _divided(q)
    constants = _lean_constants(q.shape[-1], v.shape[-1], _precision(q.dtype), tiles, align, axes)
    boxes = _box(k, tiles.key, constants["BD"]), _box(v, tiles.key, constants["BDV"])
    if None in boxes:
        return False
    counts = [-(-n // t) for n, t in zip(q.shape[1:4], tiles.query, strict=True)]
    heads = q.shape[4]
    arguments = (
        q,
        *boxes,
        out,
        lse,
        runs(axes, False, str(q.device)),
        counts[1],
        counts[2],
        math.prod(counts),
        heads,
        heads // k.shape[4],
        scale * LOG2E,
        *q.shape[1:4],
        *strides,
    )
    programs = math.prod(counts) * q.shape[0] * heads
    _launch(triton_boxes.forward_boxes, programs, q.device, arguments, constants)
    return True


def _lean_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    axes: tuple[Axis, Axis, Axis],
    scale: float,
    tile: tuple[int, ...] | None,
    rank: int,
    one_pass: bool,
) -> bool:
    """Fill the gradients of query, key and value where box kernels can; whether they did."""
    batch, *grid, heads, d = q.shape
    kv_heads, dv = k.shape[4], v.shape[-1]
    groups = heads // kv_heads
    keys = _lean_shapes("once" if one_pass else "key", q, v, axes, tile, rank)
    queries = _lean_shapes("query", q, v, axes, tile, rank)
    if keys is None or queries is None:
        return False
    up = grad_out.view(batch, *grid, heads, dv)
    align, strides = _divided(k, v)
    precision = _precision(q.dtype)
    constants = _lean_constants(d, dv, precision, keys, align, axes, True)
    walked = _box(q, keys.query, constants["BD"]), _box(up, keys.query, constants["BDV"])
    q_align, q_strides = _divided(q)
    q_constants = _lean_constants(d, dv, precision, queries, q_align, axes)
    boxes = _box(k, queries.key, q_constants["BD"]), _box(v, queries.key, q_constants["BDV"])
    if None in walked or (None in boxes and not one_pass):
        return False
    device = str(q.device)
    # products of float32 run in the interpreter alone
    kind = torch.float32 if interpreted() else torch.bfloat16
    stats = torch.empty((batch * heads, *grid, 1, 8), dtype=kind, device=q.device)
    sums = _box(stats, keys.query, 16)
    rows = lse.numel()
    block = max(16, min(128, 4096 // constants["BDV"]))
    _launch(
        triton_boxes.row_sums,
        -(-rows // block),
        q.device,
        (
            out,
            up,
            lse,
            grad_lse,
            stats,
            rows,
            math.prod(grid),
            heads,
            scale,
        ),
        {"DV": dv, "BDV": constants["BDV"], "R": block, "num_warps": 4, "num_stages": 1},
    )
    # Triton's interpreter has no bulk sums
    bulk = not interpreted() and d % 4 == 0
    settle = not interpreted() and torch.cuda.get_device_capability(q.device)[0] == 9
    grad_q, grad_k, grad_v = grads
    counts = [-(-n // t) for n, t in zip(k.shape[1:4], keys.key, strict=True)]
    share = kv_heads
    workspace = grad_q6 = None
    if one_pass and grad_q.dtype != q.dtype:
        # float32 already, so the sums of all heads have room there
        workspace = grad_q6 = grad_q.view(batch, *grid, heads, d)
    elif one_pass:
        bytes_ = q.element_size() * (4 * q.numel() + 2 * k.numel() + 2 * v.numel())
        allowed = WORKSPACE_SHARE * bytes_ / (4 * q.numel() / kv_heads)
        # at least as many programs at a time as keep every processor busy
        busy = BUSY / (math.prod(counts) * batch)
        share = min(kv_heads, max(1, math.ceil(busy), int(allowed)))
        while kv_heads % share:
            share -= 1
        workspace = torch.empty(
            (batch, *grid, share * groups, d), dtype=torch.float32, device=q.device
        )
        grad_q6 = grad_q.view(batch, *grid, heads, d)
    bounds = runs(axes, True, device)
    for head0 in range(0, kv_heads, share):
        target: Any = grad_q
        if workspace is not None:
            workspace.zero_()
            target = _box(workspace, keys.query, constants["BD"]) if bulk else workspace
        arguments = (
            walked[0],
            k,
            v,
            walked[1],
            sums,
            grad_k,
            grad_v,
            target,
            bounds,
            counts[1],
            counts[2],
            math.prod(counts),
            share,
            groups,
            scale * LOG2E,
            scale,
            head0,
            kv_heads,
            *k.shape[1:4],
            *grid,
            *strides,
        )
        _launch(
            triton_boxes.key_gradient_boxes,
            math.prod(counts) * batch * share,
            q.device,
            arguments,
            constants | {"GRAD_Q": one_pass, "BULK": bulk, "SETTLE": settle},
        )
        if workspace is not None and grad_q6 is not None:
            part = grad_q6[..., head0 * groups : (head0 + share) * groups, :]
            torch.mul(workspace, scale, out=part)
    if one_pass:
        return True
    counts = [-(-n // t) for n, t in zip(grid, queries.query, strict=True)]
    arguments = (
        q,
        *boxes,
        up,
        stats,
        grad_q,
        runs(axes, False, device),
        counts[1],
        counts[2],
        math.prod(counts),
        heads,
        groups,
        scale * LOG2E,
        scale,
        *grid,
        *q_strides,
    )
    _launch(
        triton_boxes.query_gradient_boxes,
        math.prod(counts) * batch * heads,
        q.device,
        arguments,
        q_constants,
    )
    return True


def _fits(run: Callable[..., bool], *arguments: Any) -> bool:
    """Whether ``run`` did its work; shapes too large for the device leave it to other kernels."""
    try:
        return run(*arguments)
    except OutOfResources:
        return False


def _needs(
    name: str,
    q: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> tuple:
    """What decides beside the shapes how much memory a kernel takes, and where it lies."""
    return (name, q.device, q.dtype, q.shape[-1], v.shape[-1], rpb is None, key_mask is None)


def _with_room(run: Callable[[Tiles], None], tiles: Tiles, key: tuple, own: bool = False) -> None:
    """``run`` with these shapes, or with smaller ones where the device has too little memory.

    GPUs differ by a factor of four in shared memory, and the shapes are chosen for the largest.
    ``key`` names what else decides how much is needed; what fitted is kept. The caller's ``own``
    shapes are his forward's: they are left as they are there, and halved in the backward, which
    needs more.

    Raises:
        ValueError: the caller's own shapes do not fit.
    """
    key = (*key, tiles)
    tiles = _FITTING.get(key, tiles)
    while True:
        try:
            run(tiles)
        except OutOfResources as error:
            if own:
                raise ValueError(
                    f"q_tile_shape={tiles.query} and kv_tile_shape={tiles.key} do not fit this "
                    f"device: {error} Give smaller ones, or none to have them chosen."
                ) from error
            smaller = tiles.halved()
            if smaller is None:
                raise
            tiles = _FITTING[key] = smaller
        else:
            return


@lru_cache(maxsize=16)
def _any_device_name(device: torch.device) -> str:
    return "interpreter" if interpreted() else torch.cuda.get_device_name(device)


def _pointer_sizes(
    kernel: triton_config.Kernel,
    tile: tuple[int, ...] | None,
    axes: tuple[Axis, ...],
    query: torch.Tensor,
    value: torch.Tensor,
) -> Tiles:
    """Shapes of a kernel that loads through pointers: the caller's, tuned ones, or the model's."""
    size, bytes_ = max(query.shape[-1], value.shape[-1]), query.element_size()
    if tile is None:
        name = _any_device_name(query.device)
        found = triton_config.pointer_shapes(kernel, three_axes(axes), size, bytes_, name)
        if found is not None:
            return found
    # two products more live at once in the backward, so its boxes are those of twice the size
    return _sizes(tile, axes, size if kernel == "pointers" else 2 * size, bytes_)


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


def _deltas(out: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> torch.Tensor:
    """``sum(grad_out * out) - grad_lse`` of each row, float32 like ``grad_lse``."""
    delta = torch.empty_like(grad_lse)
    rows, size = delta.numel(), out.shape[-1]
    padded = _padded(size)
    block = max(16, min(128, 4096 // padded))
    _launch(
        triton_kernels.delta_kernel,
        -(-rows // block),
        out.device,
        (out, grad_out, grad_lse, delta, rows),
        {"DV": size, "BDV": padded, "R": block, "num_warps": 4, "num_stages": 1},
    )
    return delta


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
    part: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, *grid, H, dv) and float32 log-sum-exp (B, *grid, H).

    Args:
        query, key, value, rpb, key_mask, axes, scale: the problem.
        tile: queries of a tile per axis, then optionally keys of a box per axis; chosen when not
            given.
        boxes: load keys through tensor descriptors; ``None`` does where the device can.
        part: return the output in float32, to be joined with that of other keys.
    """
    dtype = torch.float32 if part else query.dtype
    out = query.new_empty(*query.shape[:-1], value.shape[-1], dtype=dtype)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if not out.numel():
        return out, lse
    q, k, v = _grid3(query), _grid3(key), _grid3(value)
    filled = three_axes(axes)
    if boxes is not False and _is_lean(query, rpb, key_mask, axes, scale):
        k, v = _for_boxes(k), _for_boxes(v)
        if _fits(_lean_forward, q, k, v, out, lse, filled, scale, tile, len(axes)):
            return out, lse
    tiles = _pointer_sizes("pointers", tile, axes, query, value)

    def run(tiles: Tiles) -> None:
        tables = on_device(filled, tiles.query, "query", str(q.device))
        bounds = on_device(filled, tiles.query, "bounds", str(q.device))
        numbers, constants = _common(q, k, v, filled, tiles, rpb, key_mask)
        descriptors = None
        if boxes is not False and all(axis.dilation == 1 for axis in axes):
            descriptors = _descriptors(k, v, tiles.key)
        if boxes and descriptors is None:
            raise ValueError(
                "tensor descriptors cannot load these keys: dilation, head_dim or strides"
            )
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

    _with_room(run, tiles, _needs("forward", q, v, rpb, key_mask), tile is not None)
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
    boxes: bool | None = None,
    part: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key, value and rpb.

    With ``deterministic`` all of them repeat bit by bit; a call with ``rpb`` then runs its backward
    on the blocked path. Else that of ``rpb``, and on GPUs with a tensor memory unit that of
    ``query``, may be sums in the order in which programs come by. ``boxes=False`` keeps to the kernels
    that load through pointers. With ``part``, ``out`` and ``lse`` are those of an attention to more
    keys than these, and the gradient of ``query``, one term of a sum, is float32.
    """
    if rpb is not None and deterministic:
        problem = (grad_out, grad_lse, query, key, value, rpb, key_mask, out, lse, axes, scale)
        return blocked.backward(*problem, part=part, deterministic=True)
    grad_q, grad_k, grad_v = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    if part:
        grad_q = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    grad_bias = None
    if rpb is not None:
        grad_bias = torch.zeros(rpb.shape, dtype=torch.float32, device=rpb.device)
        rpb = rpb.contiguous()
    if not query.numel():
        return grad_q, grad_k, grad_v, None if rpb is None else torch.zeros_like(rpb)
    grad_out, lse, grad_lse = grad_out.contiguous(), lse.contiguous(), grad_lse.contiguous()
    q, k, v = _grid3(query), _grid3(key), _grid3(value)
    filled = three_axes(axes)
    grads = grad_q, grad_k, grad_v
    rank = len(axes)
    if boxes is not False and _is_lean(query, rpb, key_mask, axes, scale):
        q, k, v = (_for_boxes(x) for x in (q, k, v))
        given = (grad_out, grad_lse, q, k, v, out, lse, grads, filled, scale, tile, rank)
        # the kernel of one pass needs the most memory
        if (not deterministic and _fits(_lean_backward, *given, True)) or _fits(
            _lean_backward, *given, False
        ):
            return *grads, None
    tiles = _pointer_sizes("pointers_backward", tile, axes, query, value)
    delta = _deltas(out, grad_out, grad_lse)
    mask = q if key_mask is None else key_mask.contiguous().view(torch.uint8)
    batch, heads, kv_heads = q.shape[0], q.shape[-2], k.shape[-2]
    inputs = (q, k, v, q if rpb is None else rpb, mask, grad_out, lse, delta)

    def run(kernel: Any, of_keys: bool, grads: tuple[torch.Tensor, ...], tiles: Tiles) -> None:
        bounds = on_device(filled, tiles.query, "bounds", str(q.device))
        numbers, constants = _common(q, k, v, filled, tiles, rpb, key_mask)
        part, name, own = (tiles.key, "key", kv_heads) if of_keys else (tiles.query, "query", heads)
        tables = on_device(filled, part, name, str(q.device))
        counts = [len(table) for table in tables]
        arguments = (
            *inputs,
            *grads,
            *tables,
            *bounds,
            *counts,
            own,
            heads // kv_heads,
            scale,
            *numbers,
        )
        _launch(kernel, math.prod(counts) * batch * own, q.device, arguments, constants)

    needs = _needs("backward", q, v, rpb, key_mask)
    first = partial(
        run,
        triton_kernels.query_gradient_kernel,
        False,
        (grad_q, q if grad_bias is None else grad_bias),
    )
    _with_room(first, tiles, (*needs, "query"))
    second = partial(run, triton_kernels.key_gradient_kernel, True, (grad_k, grad_v))
    _with_room(second, tiles, (*needs, "key"))
    if grad_bias is not None and rpb is not None:
        grad_bias = grad_bias.to(rpb.dtype)
    return grad_q, grad_k, grad_v, grad_bias
