"""Bi-level routing attention (Zhu et al. 2023, BiFormer, section 3.2), for clips (B, T, H, W, C).

A grid is cut into regions. Each region picks the ``topk`` regions whose mean key answers its mean
query best, over all channels and for all heads alike, and its tokens attend to all tokens of those.
An image is the case T = 1; regions of a clip are boxes, of one frame or of many.

The authors' layers differ where regions do not divide the grid. Their first layer pads its input, so
padding has keys made of the bias, which enter means and attention; their second one pads queries,
keys and values with zeros, which stay out of means but take part in attention. Here padding is
masked unless one of the two is asked for.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.kernels.neighborhood.choice import interpreted
from stvision.layers.checks import check_choice, check_volume, check_whole
from stvision.layers.vision import DepthwiseConv

#: elements of the largest tensor that the path "blocked" makes at once: scores, and copies of keys
#: and values on the CPU, which its caches should hold
CHUNK_ELEMENTS = 1 << 24
CPU_CHUNK_ELEMENTS = 1 << 20

#: Where the Triton kernels cannot run: what FlexAttention and the gather took on one H100 (torch 2.11,
#: bfloat16, batch 16, 4 heads of 32 numbers, topk 4, forward and backward), by tokens of a region and
#: number of regions:
#:      64 tokens,  49 regions:  4.73 and  2.54 ms, 187 and  516 MiB
#:     256 tokens,  49 regions:  6.43 and 14.74 ms, 740 and 6762 MiB
#:      16 tokens, 784 regions: 18.59 and  6.84 ms, 752 and 1302 MiB
#: A block of FlexAttention is 128 tokens. Regions that fill one are for it; smaller ones waste most of
#: a block, and are gathered as long as copies and scores together stay below ``GATHER_BYTES``. The
#: gather needs 2.6 to 3.5 times these.
FLEX_TOKENS = 128
GATHER_BYTES = 1 << 31

IMPLEMENTATIONS = ("triton", "flex", "blocked", "gather")

HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class RegionLayout:
    """Regions of a volume, the last of each axis padded where they do not divide it.

    Args:
        grid: (T, H, W) of the volume.
        extent: frames, rows and columns of a region.
    """

    grid: tuple[int, int, int]
    extent: tuple[int, int, int]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Regions along T, H and W."""
        t, h, w = (-(-n // e) for n, e in zip(self.grid, self.extent, strict=True))
        return t, h, w

    @property
    def padding(self) -> tuple[int, int, int]:
        """Tokens added behind T, H and W."""
        t, h, w = (-n % e for n, e in zip(self.grid, self.extent, strict=True))
        return t, h, w

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, H, W, *rest) to (B, regions, tokens, *rest), padded with zeros."""
        if any(self.padding):
            t, h, w = self.padding
            x = F.pad(x, (0, 0) * (x.ndim - 4) + (0, w, 0, h, 0, t))
        (nt, nh, nw), (et, eh, ew) = self.counts, self.extent
        rest = x.shape[4:]
        x = x.reshape(-1, nt, et, nh, eh, nw, ew, *rest)
        order = (0, 1, 3, 5, 2, 4, 6, *range(7, x.ndim))
        return x.permute(order).reshape(-1, nt * nh * nw, et * eh * ew, *rest)

    def unpack(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`pack`; what was padded is cut off."""
        (nt, nh, nw), (et, eh, ew) = self.counts, self.extent
        rest = x.shape[3:]
        x = x.reshape(-1, nt, nh, nw, et, eh, ew, *rest)
        x = x.permute(0, 1, 4, 2, 5, 3, 6, *range(7, x.ndim))
        x = x.reshape(-1, nt * et, nh * eh, nw * ew, *rest)
        t, h, w = self.grid
        return x[:, :t, :h, :w]

    def mean(self, x: Tensor) -> Tensor:
        """(B, T, H, W, *rest) to the means (B, regions, 1, channels) of the tokens there are.

        In at least float32, without a gradient, and without the copy that packing makes where
        regions divide the grid.
        """
        x = x.detach().flatten(4)
        if any(self.padding):
            t, h, w = self.padding
            x = F.pad(x, (0, 0, 0, w, 0, h, 0, t))
        for axis in (3, 2, 1):
            x = x.unflatten(axis, (self.counts[axis - 1], self.extent[axis - 1]))
        wide = torch.promote_types(x.dtype, torch.float32)
        if not any(self.padding):
            return x.mean((2, 4, 6), dtype=wide).flatten(1, 3)[:, :, None]
        whole = torch.ones((), dtype=wide, device=x.device)
        for axis, (n, e, c) in enumerate(zip(self.grid, self.extent, self.counts, strict=True)):
            number = (n - e * torch.arange(c, device=x.device)).clamp_max(e)
            whole = whole * number.view(*(-1 if i == axis else 1 for i in range(3)))
        total = x.sum((2, 4, 6), dtype=wide)
        return (total / whole[..., None]).flatten(1, 3)[:, :, None]

    def inside(self, device: torch.device, axes: tuple[bool, bool, bool]) -> Tensor | None:
        """(regions, tokens) bool, False for what was padded on ``axes``; ``None`` if all are True."""
        if not any(pad and on for pad, on in zip(self.padding, axes, strict=True)):
            return None
        parts = []
        for n, pad, on in zip(self.grid, self.padding, axes, strict=True):
            place = torch.arange(n + pad, device=device)
            parts.append(place < (n if on else n + pad))
        t, h, w = parts
        whole = RegionLayout((len(t), len(h), len(w)), self.extent)
        return whole.pack((t[:, None, None] & h[:, None] & w)[None, ..., None])[0, ..., 0]


def route_regions(query: Tensor, key: Tensor, topk: int, inside: Tensor | None = None) -> Tensor:
    """The regions that each region attends to.

    Args:
        query: (B, regions, tokens, ...) packed queries, all heads.
        key: like ``query``.
        topk: regions to pick.
        inside: (regions, tokens) bool, what the means take; ``None`` for all.

    Returns:
        (B, regions, topk) int64, best first; of equal ones the first comes first. No gradient
        flows through it. Means and affinities are computed in at least float32.
    """

    def mean(x: Tensor) -> Tensor:
        x = x.detach().flatten(3).to(torch.promote_types(x.dtype, torch.float32))
        if x.shape[2] == 1:
            return x[:, :, 0]
        if inside is None:
            return x.mean(2)
        weight = inside.to(x.dtype) / inside.sum(1, keepdim=True)
        return torch.einsum("brnc,rn->brc", x, weight)

    with torch.autocast(query.device.type, enabled=False):
        affinity = mean(query) @ mean(key).mT
    return affinity.sort(dim=-1, descending=True, stable=True)[1][..., :topk]


def _gather(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, inside: Tensor | None, scale: float
) -> Tensor:
    """The definition: each region with its own copies of the keys and values it attends to."""
    batch = torch.arange(len(index), device=index.device)[:, None, None]
    keys, values = key[batch, index], value[batch, index]  # (B, R, k, n, heads, head_dim)
    keys, values = keys.flatten(2, 3), values.flatten(2, 3)
    scores = torch.einsum("brnhd,brmhd->brhnm", query * scale, keys)
    if inside is not None:
        seen = inside[index].flatten(2)  # (B, R, k n)
        scores = scores.masked_fill(~seen[:, :, None, None], -torch.inf)
    return torch.einsum("brhnm,brmhd->brnhd", scores.softmax(-1), values)


def _chunks(regions: int, elements: int, limit: int) -> list[slice]:
    """Runs of regions of which each needs ``elements``."""
    size = max(1, limit // elements)
    return [slice(i, i + size) for i in range(0, regions, size)]


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, R, n, heads, d) to (B R, heads, n, d)."""
    return x.flatten(0, 1).transpose(1, 2).to(dtype)


def _packed(x: Tensor, like: Tensor) -> Tensor:
    """(B R, heads, n, d) to the contiguous layout (B, R, n, heads, d) and dtype of ``like``."""
    return x.transpose(1, 2).unflatten(0, like.shape[:2]).to(like.dtype).contiguous()


def _flat_index(index: Tensor) -> Tensor:
    """Regions of each sample to regions of the batch: (B, R, k) to (B R, k)."""
    regions = index.shape[1]
    first = torch.arange(len(index), device=index.device)[:, None, None] * regions
    return (index + first).flatten(0, 1)


def _scores(query: Tensor, key: Tensor, at: Tensor, inside: Tensor | None, scale: float) -> Tensor:
    scores = query @ key[at].mT * scale
    if inside is None:
        return scores
    return scores.masked_fill(~inside[at % len(inside)][:, None, None], -torch.inf)


def _cpu_kernel_fits(query: Tensor) -> bool:
    """Whether torch's fused attention of the CPU takes the chunks."""
    return query.device.type == "cpu" and query.dtype != torch.float16


def _cpu_chunks(query: Tensor, index: Tensor) -> list[slice]:
    tokens, heads, head_dim = query.shape[2:]
    elements = 2 * index.shape[2] * tokens * heads * head_dim
    return _chunks(index.shape[0] * index.shape[1], elements, CPU_CHUNK_ELEMENTS)


def _copies(x: Tensor, at: Tensor) -> Tensor:
    """What the regions of a chunk attend to: (B R, heads, n, d) at (c, k) to (c, heads, k n, d)."""
    return x[at].transpose(1, 2).flatten(2, 3)


def _cpu_mask(inside: Tensor | None, at: Tensor, like: Tensor) -> Tensor | None:
    """(c, 1, n, k n) added to the scores of a chunk, ``None`` where all may be seen."""
    if inside is None:
        return None
    seen = inside[at % len(inside)].flatten(1)[:, None, None].expand(-1, 1, like.shape[2], -1)
    return like.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, inside: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Torch's fused attention on a few regions at a time, each with copies that live briefly."""
    q, k, v = (_flat(x, x.dtype) for x in (query, key, value))
    places = _flat_index(index)
    outs, lses = [], []
    for part in _cpu_chunks(query, index):
        at = places[part]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[part],
            _copies(k, at),
            _copies(v, at),
            attn_mask=_cpu_mask(inside, at, q),
            scale=scale,
        )
        outs.append(out)
        lses.append(lse)
    return _packed(torch.cat(outs), query), torch.cat(lses).contiguous()


def _cpu_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    inside: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    g, q, k, v, o = (_flat(x, x.dtype) for x in (grad, query, key, value, out))
    places = _flat_index(index)
    # of a region that many attend to the gradients are added in at least float32
    dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
    parts = []
    for part in _cpu_chunks(query, index):
        at = places[part]
        mask = _cpu_mask(inside, at, q)
        dq, *copies = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g[part],
            q[part],
            _copies(k, at),
            _copies(v, at),
            o[part],
            lse[part],
            0.0,
            False,
            attn_mask=mask,
            scale=scale,
        )
        parts.append(dq)
        for total, copy in zip((dk, dv), copies, strict=True):
            copy = copy.unflatten(2, (at.shape[1], -1)).transpose(1, 2).flatten(0, 1)
            total.index_add_(0, at.flatten(), copy.to(total.dtype))

    return _packed(torch.cat(parts), query), _packed(dk, query), _packed(dv, query)


def _blocked_forward(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, inside: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One region after the other of those that are attended to, with a running maximum and sum."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (_flat(x, wide) for x in (query, key, value))
    places = _flat_index(index)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1])
    for part in _chunks(len(q), q.shape[1] * q.shape[2] ** 2, CHUNK_ELEMENTS):
        top = q.new_full(q[part].shape[:-1], -torch.inf)
        total, mixed = torch.zeros_like(top), torch.zeros_like(q[part])
        for at in places[part].unbind(1):
            scores = _scores(q[part], k, at, inside, scale)
            # every region has a token inside, so the maximum is finite
            higher = torch.maximum(top, scores.amax(-1))
            weights = (scores - higher[..., None]).exp()
            fade = (top - higher).exp()
            total = total * fade + weights.sum(-1)
            mixed = mixed * fade[..., None] + weights @ v[at]
            top = higher
        out[part] = mixed / total[..., None]
        lse[part] = top + total.log()
    return _packed(out, query), lse


# Opaque to the compiler, which would unroll the loops.
@torch.library.custom_op("stvision::routed_attention", mutates_args=())
def _blocked_op(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, inside: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        run = _cpu_forward if _cpu_kernel_fits(query) else _blocked_forward
        return run(query, key, value, index, inside, scale)


@_blocked_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, inside: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    b, r, n, h, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(b * r, h, n, dtype=wide)


def _blocked_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    inside: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = lse.dtype
    g, q, k, v, o = (_flat(x, wide) for x in (grad, query, key, value, out))
    places = _flat_index(index)
    shift = (g * o).sum(-1, keepdim=True)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for part in _chunks(len(q), q.shape[1] * q.shape[2] ** 2, CHUNK_ELEMENTS):
        for at in places[part].unbind(1):
            weights = (_scores(q[part], k, at, inside, scale) - lse[part][..., None]).exp()
            dv.index_add_(0, at, weights.mT @ g[part])
            slope = weights * (g[part] @ v[at].mT - shift[part]) * scale
            dq[part] += slope @ k[at]
            dk.index_add_(0, at, slope.mT @ q[part])

    return _packed(dq, query), _packed(dk, query), _packed(dv, query)


@torch.library.custom_op("stvision::routed_attention_backward", mutates_args=())
def _blocked_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    inside: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        run = _cpu_backward if _cpu_kernel_fits(query) else _blocked_backward
        return run(grad, query, key, value, index, inside, out, lse, scale)


@_blocked_backward_op.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    inside: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, index, inside, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, index, inside, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, index, inside, out, lse = ctx.saved_tensors
    grads = _blocked_backward_op(
        grad.contiguous(), query, key, value, index, inside, out, lse, ctx.scale
    )
    return *grads, None, None, None


_blocked_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("stvision::routed_volume_attention", mutates_args=())
def _triton_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extent: Sequence[int],
    topk: int,
    zeros: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and picked regions: one operator, since each costs the host's time."""
    from stvision.attention import routing_triton

    et, eh, ew = extent
    index = routing_triton.route(query, key, (et, eh, ew), topk)
    out, lse = routing_triton.forward(query, key, value, index, (et, eh, ew), zeros, scale)
    return out, lse, index


@_triton_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extent: Sequence[int],
    topk: int,
    zeros: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    b, t, h, w, heads, _ = query.shape
    lse = query.new_empty((b, heads, t, h, w), dtype=torch.float32)
    regions = math.prod(-(-n // e) for n, e in zip((t, h, w), extent, strict=True))
    index = query.new_empty((b, regions, topk), dtype=torch.int32)
    return query.new_empty(query.shape), lse, index


@torch.library.custom_op("stvision::routed_volume_attention_backward", mutates_args=())
def _triton_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    extent: Sequence[int],
    zeros: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from stvision.attention import routing_triton

    et, eh, ew = extent
    return routing_triton.backward(
        grad, query, key, value, index, out, lse, (et, eh, ew), zeros, scale
    )


@_triton_backward_op.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    extent: Sequence[int],
    zeros: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )


def _triton_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, extent, _, zeros, scale = inputs
    out, lse, index = output
    ctx.options = extent, zeros, scale
    ctx.save_for_backward(query, key, value, index, out, lse)
    ctx.set_materialize_grads(False)  # no one asks for gradients of the log-sum-exp


def _triton_gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    grads = _triton_backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The backward operators keep nothing: they have no derivative."""


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError(
        "this implementation of bi-level routing attention has no second derivative; take "
        "implementation='gather', or drop create_graph=True"
    )


_triton_op.register_autograd(_triton_gradient, setup_context=_triton_setup)
for _operator in (_triton_backward_op, _blocked_backward_op):
    _operator.register_autograd(_no_second_derivative, setup_context=_setup_nothing)


def why_not_triton(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """One sentence why the Triton kernels cannot take these; ``None`` where they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if query.device.type != "cuda" and not interpreted():
        return f"it needs a GPU, the tensors are on {query.device}"
    if not query.dtype == key.dtype == value.dtype:
        return f"it takes one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, got {query.dtype}"
    if query.shape[-1] > 256:
        return f"head_dim is at most 256, not {query.shape[-1]}"
    return None


def _block_size(tokens: int) -> int:
    """Tokens of a block of FlexAttention: one that regions fill, where there is one."""
    return next((size for size in (128, 64) if tokens % size == 0), 128)


# Opaque to the compiler: a mask function that reads what its own graph has just computed is
# compiled wrongly on the CPU (torch 2.13).
@torch.library.custom_op("stvision::allowed_regions", mutates_args=())
def _allowed_op(index: Tensor) -> Tensor:
    allowed = index.new_zeros(*index.shape[:2], index.shape[1], dtype=torch.bool)
    return allowed.scatter_(2, index, True)


@_allowed_op.register_fake
def _(index: Tensor) -> Tensor:
    return index.new_empty(*index.shape[:2], index.shape[1], dtype=torch.bool)


def routing_block_mask(index: Tensor, tokens: int, inside: Tensor | None) -> Any:
    """The FlexAttention block mask of a routing, for tokens in the order of regions.

    Args:
        index: (B, regions, k) from :func:`route_regions`.
        tokens: tokens of a region.
        inside: (regions, tokens) bool, keys that may be seen; ``None`` for all.

    Returns:
        A ``BlockMask`` of (B, 1, regions * tokens, regions * tokens).
    """
    from torch.nn.attention.flex_attention import BlockMask

    regions = index.shape[1]
    length, block = regions * tokens, _block_size(tokens)
    blocks = -(-length // block)
    allowed = _allowed_op(index)

    place = torch.arange(blocks * block, device=index.device)
    region = (place // tokens).clamp_max(regions - 1).view(blocks, block)
    member = index.new_zeros(blocks, regions, dtype=torch.float32).scatter(1, region, 1.0)
    # a block is wholly visible when each of its pairs of regions is and all its tokens exist
    some = member @ allowed.float() @ member.T > 0
    lacking = member @ (~allowed).float() @ member.T > 0
    exists = place < length
    real = exists if inside is None else exists & F.pad(inside.flatten(), (0, len(place) - length))
    every = some & ~lacking & real.view(blocks, block).all(1)
    every = every & exists.view(blocks, block).all(1)[:, None]

    def ragged(which: Tensor) -> tuple[Tensor, Tensor]:
        order = which.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return which.sum(-1).to(torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = allowed[b, q // tokens, k // tokens]
        return seen if inside is None else seen & inside[k // tokens, k % tokens]

    return BlockMask.from_kv_blocks(
        *ragged(some & ~every),
        *ragged(every),
        BLOCK_SIZE=block,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _flex(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, inside: Tensor | None, scale: float
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    from stvision.kernels.neighborhood.flex import compiled_flex

    tokens = query.shape[2]
    mask = routing_block_mask(index, tokens, inside)
    eager = query.device.type == "cpu" or torch.compiler.is_compiling()
    run: Any = flex_attention if eager else compiled_flex
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cpu":  # its compiled template reads the layout under a view
        q, k, v = (x.contiguous() for x in (q, k, v))
    out = run(q, k, v, block_mask=mask, scale=scale)
    return cast(Tensor, out).transpose(1, 2).unflatten(1, query.shape[1:3])


def _why_not_flex(query: Tensor, needs_grad: bool) -> str | None:
    size = query.shape[-1]
    if query.device.type == "cpu":
        return "FlexAttention has no backward on the CPU" if needs_grad else None
    if query.device.type != "cuda":
        return f"FlexAttention needs a GPU, the tensors are on {query.device}"
    if query.dtype == torch.float64:
        return "FlexAttention has no float64 on a GPU"
    if size < 16 or size & (size - 1):
        return f"FlexAttention needs a head_dim of a power of two of at least 16, got {size}"
    return None


def _choose(
    query: Tensor, key: Tensor, value: Tensor, layout: RegionLayout, topk: int, needs_grad: bool
) -> str:
    """The implementation to take where none is named."""
    if query.device.type != "cuda":
        return "blocked"
    if why_not_triton(query, key, value) is None:
        return "triton"
    tokens, (heads, head_dim) = math.prod(layout.extent), query.shape[-2:]
    length = query.shape[0] * math.prod(layout.counts) * tokens
    numbers = length * heads * topk * (2 * head_dim + tokens)
    flex = _why_not_flex(query, needs_grad) is None
    if flex and tokens >= FLEX_TOKENS:
        return "flex"
    if numbers * query.element_size() <= GATHER_BYTES:
        return "gather"
    return "flex" if flex else "blocked"


def bilevel_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    region: tuple[int, int, int],
    topk: int,
    scale: float | None = None,
    padding: str = "masked",
    implementation: str | None = None,
) -> Tensor:
    """Attend from each region to the tokens of the ``topk`` regions that it picks.

    Args:
        query: (B, T, H, W, heads, head_dim), any floating dtype.
        key: like ``query``.
        value: like ``query``.
        region: frames, rows and columns of a region; the last ones of an axis may be smaller.
        topk: regions that each region attends to, 1 to their number.
        scale: factor on the scores of tokens, ``(heads * head_dim) ** -0.5`` if ``None`` as in the
            released weights. The choice of regions does not depend on it.
        padding: of what fills up smaller regions. ``"masked"`` hides it; ``"zeros"`` lets zero
            keys behind H and W take part, as in the authors' second layer (behind T never).
        implementation: ``"triton"`` (kernels for a GPU that read keys and values where they lie),
            ``"flex"`` (FlexAttention with a block mask; compiled on a GPU, without gradients on the
            CPU), ``"blocked"`` (any device: copies of keys and values for few regions at a time on
            the CPU, of one region for each elsewhere), or ``"gather"`` (the definition, ``topk``
            copies). ``None`` takes on a GPU ``"triton"``, where it cannot run ``"flex"`` for
            regions of at least 128 tokens, ``"gather"`` for smaller ones while its copies and
            scores stay below 2 GiB, each as far as it fits, and else ``"blocked"``. Only
            ``"gather"`` has second derivatives.

    Returns:
        (B, T, H, W, heads, head_dim) in the dtype of ``query``. Gradients flow to queries, keys
        and values, none through the choice of regions.

    Raises:
        ValueError: shapes differ, a region or ``topk`` does not fit the grid, or an implementation
            that is unknown or does not fit. A named implementation is never swapped for another.
    """
    if query.ndim != 6 or not query.shape == key.shape == value.shape:
        raise ValueError(
            "query, key and value must be (B, T, H, W, heads, head_dim) of one shape, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    grid = cast(tuple[int, int, int], tuple(query.shape[1:4]))
    if len(region) != 3 or any(isinstance(n, float) for n in region) or min(region) < 1:
        raise ValueError(
            "region must be frames, rows and columns, whole numbers of at least 1, "
            f"got {tuple(region)}"
        )
    layout = RegionLayout(grid, cast(tuple[int, int, int], tuple(map(min, region, grid))))
    count = math.prod(layout.counts)
    if isinstance(topk, float) or not 1 <= topk <= count:
        raise ValueError(
            f"topk must be a whole number from 1 to the {count} regions there are, got {topk}"
        )
    if padding not in {"masked", "zeros"}:
        raise ValueError(f"padding must be 'masked' or 'zeros', got {padding!r}")
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if implementation is None:
        implementation = _choose(query, key, value, layout, topk, needs_grad)
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    why = None
    if implementation == "flex":
        why = _why_not_flex(query, needs_grad)
    elif implementation == "triton":
        why = why_not_triton(query, key, value)
    if why is not None:
        raise ValueError(f"implementation {implementation!r} cannot run this: {why}")
    if query.shape[0] == 0:  # an empty batch, of which no kernel has to know
        implementation = "gather"
    scale = math.prod(query.shape[-2:]) ** -0.5 if scale is None else scale

    if implementation == "triton":
        zeros = padding == "zeros"
        return _triton_op(query, key, value, layout.extent, topk, zeros, float(scale))[0]
    index = route_regions(layout.mean(query), layout.mean(key), topk)
    q, k, v = (layout.pack(x) for x in (query, key, value))
    spatial = padding == "masked"
    inside = layout.inside(query.device, (True, spatial, spatial))
    if implementation == "gather":
        out = _gather(q, k, v, index, inside, scale)
    elif implementation == "blocked":
        out = _blocked_op(q, k, v, index, inside, scale)[0]
    else:
        out = _flex(q, k, v, index, inside, scale)
    return layout.unpack(out)


class BiLevelRoutingAttention(nn.Module):
    """Multi-head self-attention between regions that pick each other: (B, T, H, W, C) to the same.

    Args:
        dim: channels C.
        num_heads: heads; must divide ``dim``.
        n_win: regions along H and along W. Where they do not divide the grid there may be more,
            smaller ones at the end, as ``flavour`` says.
        topk: regions that each region attends to; all of them where there are fewer.
        region_frames: frames of a region; ``None`` for all frames of a clip.
        flavour: what happens where ``n_win`` does not divide H or W. ``"nchw"``, the authors'
            second layer: regions of floor(H / n_win) rows, zero keys behind the grid.
            ``"legacy"``, their first: the input is padded to a multiple of ``n_win``, and its
            padding takes part as any token. ``"masked"``: as ``"nchw"`` without the zero keys.
        lepe_kernel: rows and columns of the depthwise convolution of the values that is added
            (locally enhanced position encoding), odd; 0 for none.
        frame_kernel: frames of a convolution over time beside it, 0 for none.
        implementation: see :func:`bilevel_routing_attention`.

    Raises:
        ValueError: heads that do not divide the channels, or another argument out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int = 7,
        topk: int = 4,
        *,
        region_frames: int | None = None,
        flavour: str = "nchw",
        lepe_kernel: int = 5,
        frame_kernel: int = 0,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim {dim}, got {num_heads}")
        check_whole(1, n_win=n_win, topk=topk)
        if region_frames is not None:
            check_whole(1, region_frames=region_frames)
        if flavour not in {"nchw", "legacy", "masked"}:
            raise ValueError(f"flavour must be 'nchw', 'legacy' or 'masked', got {flavour!r}")
        check_choice("implementation", implementation, IMPLEMENTATIONS)
        self.dim, self.num_heads, self.n_win, self.topk = dim, num_heads, n_win, topk
        self.region_frames, self.flavour = region_frames, flavour
        self.implementation = implementation
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = DepthwiseConv(dim, lepe_kernel, frame_kernel) if lepe_kernel else None
        self.proj = nn.Linear(dim, dim)

    def layout(self, grid: tuple[int, int, int]) -> None:
        """No order of a (T, H, W) grid's tokens saves this attention its own."""
        return

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, H, W, C) to the same shape; ValueError for another shape."""
        check_volume(x, self.dim)
        frames, height, width = x.shape[1:4]
        down, right = -height % self.n_win, -width % self.n_win
        padded = self.flavour == "legacy" and bool(down or right)
        if padded:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        rows, columns = (max(1, n // self.n_win) for n in x.shape[2:4])
        region = (self.region_frames or frames, rows, columns)
        grid = cast(tuple[int, int, int], tuple(x.shape[1:4]))
        extent = cast(tuple[int, int, int], tuple(map(min, region, grid)))
        count = math.prod(RegionLayout(grid, extent).counts)
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        heads = (self.num_heads, self.dim // self.num_heads)
        out = bilevel_routing_attention(
            *(y.unflatten(-1, heads) for y in (query, key, value)),
            region=region,
            topk=min(self.topk, count),
            padding="zeros" if self.flavour == "nchw" else "masked",
            implementation=self.implementation,
        ).flatten(-2)
        if self.lepe is not None:
            out = out + self.lepe(value)
        return self.proj(out[:, :, :height, :width] if padded else out)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}, "
            f"region_frames={self.region_frames}, flavour={self.flavour!r}"
        )
