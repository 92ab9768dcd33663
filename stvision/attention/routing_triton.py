"""Triton kernels of bi-level routing attention. Imported only where this implementation runs.

Queries, keys and values stay where they are, (B, T, H, W, heads, head_dim) of any strides. A program
owns tokens of one region and one head. What they attend to is a flat list: token ``j % n`` of the
region that was picked in place ``j // n``, so a box of columns holds tokens of several regions where
these are small. Which regions picked a region is counted on the device, hence nothing waits for it,
and each gradient has one writer: results repeat bit by bit.

The choice of regions is two kernels and a product: small inputs cost what the host needs to launch,
and written with tensors it is some thirty operators.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from stvision.kernels.neighborhood.triton_launch import _launch, _padded, _precision

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: picks that a program of the inversion reads at once
PICKS = 1024

#: what the kernel that picks takes: more regions do not fit its registers, and more picks, one after
#: another, take longer than a sort
MOST_REGIONS = 8192
MOST_PICKS = 64

#: tiles that fit a device, where those of :func:`sizes` did not
_FITTING: dict[tuple[Any, ...], dict[str, int]] = {}

#: Regions' sizes are compiled in, since a token's place takes divisions by them; all else is not.
INTEGERS = [
    "regions", "heads", "topk", "LT", "LH", "LW",
    "sqb", "sqt", "sqh", "sqw", "sqn", "skb", "skt", "skh", "skw", "skn",
    "svb", "svt", "svh", "svw", "svn",
]  # fmt: skip


@triton.jit
def _place(region, token, ET: tl.constexpr, EH: tl.constexpr, EW: tl.constexpr,
           NH: tl.constexpr, NW: tl.constexpr):  # fmt: skip
    """Frame, row and column of tokens of regions."""
    t = region // (NH * NW) * ET + token // (EH * EW)
    h = region // NW % NH * EH + token // EW % EH
    w = region % NW * EW + token % EW
    return t, h, w


@triton.jit
def _listed(regions, first, length, N: tl.constexpr, ET: tl.constexpr, EH: tl.constexpr,
            EW: tl.constexpr, NH: tl.constexpr, NW: tl.constexpr):  # fmt: skip
    """Places of N tokens of a flat list of regions' tokens, and whether there are so many."""
    TOKENS: tl.constexpr = ET * EH * EW
    at = first + tl.arange(0, N)
    listed = at < length
    if TOKENS % N == 0:  # all of one region
        region = tl.load(regions + first // TOKENS)
        token = first % TOKENS + tl.arange(0, N)
    else:
        region = tl.load(regions + at // TOKENS, mask=listed, other=0)
        token = at % TOKENS
    t, h, w = _place(region, token, ET, EH, EW, NH, NW)
    return t, h, w, listed


@triton.jit
def _offset(t, h, w, stride_t, stride_h, stride_w):
    return t.to(tl.int64) * stride_t + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w


@triton.jit
def _row(batch, head, heads, t, h, w, LT, LH, LW):
    """Number of a row of (B, heads, T, H, W)."""
    return (((batch.to(tl.int64) * heads + head) * LT + t) * LH + h) * LW + w


@triton.jit
def _dense(batch, head, heads, t, h, w, LT, LH, LW):
    """Number of a row of (B, T, H, W, heads)."""
    return (((batch.to(tl.int64) * LT + t) * LH + h) * LW + w) * heads + head


@triton.jit
def _load(pointer, rows, real, D: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of D numbers, padded with zeros to BD; zeros where not ``real``."""
    dim = tl.arange(0, BD)
    at = pointer + rows[:, None] + dim[None, :]
    if WHOLE and D == BD:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=real[:, None] & (dim < D)[None, :], other=0.0)
    return x


@triton.jit
def _store(pointer, rows, real, x, D: tl.constexpr, BD: tl.constexpr):
    dim = tl.arange(0, BD)
    tl.store(
        pointer + rows[:, None] * D + dim[None, :],
        x.to(pointer.dtype.element_ty),
        mask=real[:, None] & (dim < D)[None, :],
    )


@triton.jit(do_not_specialize=[name for name in INTEGERS if name[:2] != "sv" and name != "topk"])
def means_kernel(
    q, k, means, batches, regions, heads, LT, LH, LW,
    sqb, sqt, sqh, sqw, sqn, skb, skt, skh, skw, skn,
    ET: tl.constexpr, EH: tl.constexpr, EW: tl.constexpr, NH: tl.constexpr, NW: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program per region and head, for queries and then for keys: the mean of their tokens."""
    TOKENS: tl.constexpr = ET * EH * EW
    head, copy = tl.program_id(0) % heads, tl.program_id(0) // heads
    region, copy = copy % regions, copy // regions
    batch = (copy % batches).to(tl.int64)
    dim = tl.arange(0, BD)
    total = tl.zeros([M, BD], tl.float32)
    number = tl.zeros([M], tl.int32)
    for first in range(0, TOKENS, M):
        token = first + tl.arange(0, M)
        t, h, w = _place(region, token, ET, EH, EW, NH, NW)
        real = (token < TOKENS) & (t < LT) & (h < LH) & (w < LW)
        if copy < batches:
            rows = batch * sqb + head * sqn + _offset(t, h, w, sqt, sqh, sqw)
            x = _load(q, rows * ALIGN, real, D, BD, WHOLE and TOKENS % M == 0)
        else:
            rows = batch * skb + head * skn + _offset(t, h, w, skt, skh, skw)
            x = _load(k, rows * ALIGN, real, D, BD, WHOLE and TOKENS % M == 0)
        total += x.to(tl.float32)
        number += real.to(tl.int32)
    mean = tl.sum(total, 0) / tl.sum(number, 0)
    row = (copy.to(tl.int64) * regions + region) * heads + head
    tl.store(means + row * D + dim, mean, mask=dim < D)


@triton.jit(do_not_specialize=["regions", "topk"])
def pick_kernel(affinity, index, regions, topk, BLOCK: tl.constexpr):
    """One program per region: the places of its ``topk`` largest affinities, the first of equals."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(affinity + row * regions + at, mask=at < regions, other=0.0)
    # what is taken becomes minus infinity, so no affinity may be that; NaN comes first, as in a sort
    x = tl.maximum(tl.where(x <= float("inf"), x, float("inf")), -3.0e38)
    x = tl.where(at < regions, x, float("-inf"))
    for i in range(topk):
        best = tl.argmax(x, 0)
        tl.store(index + row * topk + i, best.to(tl.int32))
        x = tl.where(at == best, float("-inf"), x)


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(
    q, k, v, index, out, lse, regions, heads, topk, LT, LH, LW, scale,
    sqb, sqt, sqh, sqw, sqn, skb, skt, skh, skw, skn, svb, svt, svh, svw, svn,
    ET: tl.constexpr, EH: tl.constexpr, EW: tl.constexpr, NH: tl.constexpr, NW: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, ZEROS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile of a region's queries.

    ``WHOLE``: regions divide the grid; ``EVEN``: N divides the list of keys; ``ZEROS``: keys behind
    H and W take part as zeros.
    """
    TOKENS: tl.constexpr = ET * EH * EW
    TILES: tl.constexpr = (TOKENS + M - 1) // M
    tile, copy = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    region, copy = copy % regions, copy // regions
    batch, head = copy // heads, copy % heads
    token = tile * M + tl.arange(0, M)
    t, h, w = _place(region, token, ET, EH, EW, NH, NW)
    real = (token < TOKENS) & (t < LT) & (h < LH) & (w < LW)
    rows = batch.to(tl.int64) * sqb + head * sqn + _offset(t, h, w, sqt, sqh, sqw)
    qq = _load(q, rows * ALIGN, real, D, BD, WHOLE and TOKENS % M == 0)
    picks = index + (batch.to(tl.int64) * regions + region) * topk
    k_base, v_base = batch.to(tl.int64) * skb + head * skn, batch.to(tl.int64) * svb + head * svn
    # a finite first maximum: minus infinity minus itself would be NaN where no key was seen yet
    top = tl.full([M], -1.0e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BD], tl.float32)
    for first in range(0, topk * TOKENS, N):
        kt, kh, kw, seen = _listed(picks, first, topk * TOKENS, N, ET, EH, EW, NH, NW)
        inside = seen & (kt < LT) & (kh < LH) & (kw < LW)
        k_rows = (k_base + _offset(kt, kh, kw, skt, skh, skw)) * ALIGN
        kk = _load(k, k_rows, inside, D, BD, WHOLE and EVEN)
        v_rows = (v_base + _offset(kt, kh, kw, svt, svh, svw)) * ALIGN
        vv = _load(v, v_rows, inside, D, BD, WHOLE and EVEN)
        scores = tl.dot(qq, tl.trans(kk), input_precision=PRECISION) * (scale * LOG2E)
        if not (WHOLE and EVEN):
            takes_part = (seen & (kt < LT)) if ZEROS else inside
            scores = tl.where(takes_part[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(vv.dtype), vv, acc, input_precision=PRECISION)
        top = higher
    tl.store(
        lse + _row(batch, head, heads, t, h, w, LT, LH, LW),
        (top + tl.log2(total)) * LN2,
        mask=real,
    )
    rows = _dense(batch, head, heads, t, h, w, LT, LH, LW)
    _store(out, rows, real, acc / total[:, None], D, BD)


@triton.jit(do_not_specialize=INTEGERS)
def query_gradient_kernel(
    q, k, v, index, out, grad_out, lse, stats, grad_q, regions, heads, topk, LT, LH, LW, scale,
    sqb, sqt, sqh, sqw, sqn, skb, skt, skh, skw, skn, svb, svt, svh, svw, svn,
    ET: tl.constexpr, EH: tl.constexpr, EW: tl.constexpr, NH: tl.constexpr, NW: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, ZEROS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Like the forward; also writes ``stats`` for the keys.

    These are the log-sum-exp of each row, in base 2, and beside it sum(grad_out * out).
    """
    TOKENS: tl.constexpr = ET * EH * EW
    TILES: tl.constexpr = (TOKENS + M - 1) // M
    tile, copy = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    region, copy = copy % regions, copy // regions
    batch, head = copy // heads, copy % heads
    token = tile * M + tl.arange(0, M)
    t, h, w = _place(region, token, ET, EH, EW, NH, NW)
    real = (token < TOKENS) & (t < LT) & (h < LH) & (w < LW)
    rows = batch.to(tl.int64) * sqb + head * sqn + _offset(t, h, w, sqt, sqh, sqw)
    qq = _load(q, rows * ALIGN, real, D, BD, WHOLE and TOKENS % M == 0)
    rows = _dense(batch, head, heads, t, h, w, LT, LH, LW)
    do = _load(grad_out, rows * D, real, D, BD, WHOLE and TOKENS % M == 0)
    oo = _load(out, rows * D, real, D, BD, WHOLE and TOKENS % M == 0)
    shift = tl.sum(do.to(tl.float32) * oo.to(tl.float32), 1)
    numbers = _row(batch, head, heads, t, h, w, LT, LH, LW)
    log_total = tl.load(lse + numbers, mask=real, other=float("inf")) * LOG2E
    pair = 2 * numbers[:, None] + tl.arange(0, 2)[None, :]
    tl.store(stats + pair, tl.join(log_total, shift), mask=real[:, None])
    picks = index + (batch.to(tl.int64) * regions + region) * topk
    k_base, v_base = batch.to(tl.int64) * skb + head * skn, batch.to(tl.int64) * svb + head * svn
    acc = tl.zeros([M, BD], tl.float32)
    for first in range(0, topk * TOKENS, N):
        kt, kh, kw, seen = _listed(picks, first, topk * TOKENS, N, ET, EH, EW, NH, NW)
        inside = seen & (kt < LT) & (kh < LH) & (kw < LW)
        k_rows = (k_base + _offset(kt, kh, kw, skt, skh, skw)) * ALIGN
        kk = _load(k, k_rows, inside, D, BD, WHOLE and EVEN)
        v_rows = (v_base + _offset(kt, kh, kw, svt, svh, svw)) * ALIGN
        vv = _load(v, v_rows, inside, D, BD, WHOLE and EVEN)
        scores = tl.dot(qq, tl.trans(kk), input_precision=PRECISION) * (scale * LOG2E)
        # keys of zeros add nothing here, so those that are not inside need no case of their own
        if not (WHOLE and EVEN):
            scores = tl.where(inside[None, :], scores, float("-inf"))
        weights = tl.exp2(scores - log_total[:, None])
        ds = weights * (tl.dot(do, tl.trans(vv), input_precision=PRECISION) - shift[:, None])
        acc = tl.dot(ds.to(kk.dtype), kk, acc, input_precision=PRECISION)
    _store(grad_q, rows, real, acc * scale, D, BD)


@triton.jit(do_not_specialize=["regions", "topk"])
def invert_kernel(index, askers, starts, regions, topk, BLOCK: tl.constexpr):
    """Who picked a region: one program writes its part of ``askers`` and where that begins.

    Each program reads all picks of its sample, which is less work than the affinities that were
    computed for them.
    """
    region, batch = tl.program_id(0) % regions, tl.program_id(0) // regions
    picks = regions * topk
    index += batch.to(tl.int64) * picks
    askers += batch.to(tl.int64) * picks
    starts += batch.to(tl.int64) * (regions + 1)
    before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, picks, BLOCK):
        at = first + tl.arange(0, BLOCK)
        pick = tl.load(index + at, mask=at < picks, other=regions)
        before += (pick < region).to(tl.int32)
    slot = tl.sum(before, 0)
    tl.store(starts + region, slot)
    if region == regions - 1:
        tl.store(starts + regions, picks)
    for first in range(0, picks, BLOCK):
        at = first + tl.arange(0, BLOCK)
        pick = tl.load(index + at, mask=at < picks, other=regions)
        mine = (pick == region).to(tl.int32)
        tl.store(askers + slot + tl.cumsum(mine, 0) - 1, at // topk, mask=mine != 0)
        slot += tl.sum(mine, 0)


KEY_INTEGERS = ["picks", *(name for name in INTEGERS if name != "topk")]


@triton.jit(do_not_specialize=KEY_INTEGERS)
def key_gradient_kernel(
    q, k, v, askers, starts, grad_out, stats, grad_k, grad_v, picks,
    regions, heads, LT, LH, LW, scale,
    sqb, sqt, sqh, sqw, sqn, skb, skt, skh, skw, skn, svb, svt, svh, svw, svn,
    ET: tl.constexpr, EH: tl.constexpr, EW: tl.constexpr, NH: tl.constexpr, NW: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile of M keys of a region; walks the queries of regions that picked it."""
    TOKENS: tl.constexpr = ET * EH * EW
    TILES: tl.constexpr = (TOKENS + M - 1) // M
    tile, copy = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    region, copy = copy % regions, copy // regions
    batch, head = copy // heads, copy % heads
    token = tile * M + tl.arange(0, M)
    t, h, w = _place(region, token, ET, EH, EW, NH, NW)
    real = (token < TOKENS) & (t < LT) & (h < LH) & (w < LW)
    k_rows = batch.to(tl.int64) * skb + head * skn + _offset(t, h, w, skt, skh, skw)
    kk = _load(k, k_rows * ALIGN, real, D, BD, WHOLE and TOKENS % M == 0)
    v_rows = batch.to(tl.int64) * svb + head * svn + _offset(t, h, w, svt, svh, svw)
    vv = _load(v, v_rows * ALIGN, real, D, BD, WHOLE and TOKENS % M == 0)
    starts += batch.to(tl.int64) * (regions + 1) + region
    begin, end = tl.load(starts), tl.load(starts + 1)
    askers += batch.to(tl.int64) * picks + begin
    q_base = batch.to(tl.int64) * sqb + head * sqn
    acc_k = tl.zeros([M, BD], tl.float32)
    acc_v = tl.zeros([M, BD], tl.float32)
    for first in range(0, (end - begin) * TOKENS, N):
        qt, qh, qw, seen = _listed(askers, first, (end - begin) * TOKENS, N, ET, EH, EW, NH, NW)
        inside = seen & (qt < LT) & (qh < LH) & (qw < LW)
        q_rows = (q_base + _offset(qt, qh, qw, sqt, sqh, sqw)) * ALIGN
        qq = _load(q, q_rows, inside, D, BD, WHOLE and EVEN)
        q_rows = _dense(batch, head, heads, qt, qh, qw, LT, LH, LW)
        do = _load(grad_out, q_rows * D, inside, D, BD, WHOLE and EVEN)
        numbers = _row(batch, head, heads, qt, qh, qw, LT, LH, LW)
        # in one load, which the compiler does not give to every thread that needs a number of it
        pair = stats + 2 * numbers[:, None] + tl.arange(0, 2)[None, :]
        if WHOLE and EVEN:
            pair = tl.load(pair)
        else:  # queries that do not exist are zeros with a gradient of zero, and so add nothing
            pair = tl.load(pair, mask=inside[:, None], other=0.0)
        log_total, shift = tl.split(pair)
        scores = tl.dot(kk, tl.trans(qq), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.exp2(scores - log_total[None, :])
        acc_v = tl.dot(weights.to(do.dtype), do, acc_v, input_precision=PRECISION)
        ds = weights * (tl.dot(vv, tl.trans(do), input_precision=PRECISION) - shift[None, :])
        acc_k = tl.dot(ds.to(qq.dtype), qq, acc_k, input_precision=PRECISION)
    rows = _dense(batch, head, heads, t, h, w, LT, LH, LW)
    _store(grad_k, rows, real, acc_k * scale, D, BD)
    _store(grad_v, rows, real, acc_v, D, BD)


def _pow2(n: int) -> int:
    """The power of two from ``n`` on, at least the 16 rows or columns that a product takes."""
    return max(16, 1 << (n - 1).bit_length())


def sizes(
    kernel: str, own: int, walked: int, whole: bool, head_dim: int, bytes_: int
) -> dict[str, int]:
    """Rows and columns of a tile, warps and stages: the largest that keep all in registers.

    Compiled for sm_90 (Triton 3.6), heads of 16 to 256 numbers spill nothing, or in float32 and with
    odd regions up to 28 bytes, and take at most 97 KiB of shared memory.

    Args:
        kernel: ``"forward"``, ``"query"`` or ``"key"`` (gradients).
        own: tokens of a region.
        walked: tokens of the list that a program walks, about.
        whole: whether regions divide the grid.
        head_dim: numbers of a head, padded.
        bytes_: of a number.
    """
    rows, key = min(64, _pow2(own)), kernel == "key"
    masked = not whole or own % rows != 0  # which takes registers
    if bytes_ == 4:  # without tensor cores the operands of a product lie in registers
        rows = min(rows, 64 if head_dim <= 64 else 32 if head_dim <= 128 else 16)
        columns = 32 if rows == 16 and head_dim <= 64 else 16
        warps = 8 if rows == 64 or head_dim > 64 else 4
    elif head_dim <= 64:
        columns = 32 if key and (masked or rows < 64) else 64
        warps = 2 if rows == 16 and not (masked and head_dim == 64) else 4
    elif head_dim <= 128:
        columns = 32 if key or masked else 64
        warps = 8 if key and rows == 64 else 4
    else:
        rows, columns = min(rows, 32), 32
        warps = 8 if rows == 32 and (key or masked) else 4
    columns = min(columns, _pow2(walked))
    return {"M": rows, "N": columns, "num_warps": warps, "num_stages": 2}


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Strides of all axes but the last over their common divisor, and that."""
    strides = [stride for x in tensors for stride in x.stride()[:5]]
    align = math.gcd(16, *strides)
    return [stride // align for stride in strides], align


def _on_last_axis(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@lru_cache(maxsize=256)
def _places(grid: tuple[int, int, int], extent: tuple[int, int, int]) -> tuple[int, dict[str, Any]]:
    """The number of regions of a grid, and what kernels compile in of their tokens' places."""
    counts = [-(-n // e) for n, e in zip(grid, extent, strict=True)]
    return math.prod(counts), {
        **dict(zip(("ET", "EH", "EW"), extent, strict=True)),
        "NH": counts[1],
        "NW": counts[2],
        "WHOLE": not any(n % e for n, e in zip(grid, extent, strict=True)),
    }


@lru_cache(maxsize=256)
def _tile(
    name: str, extent: tuple[int, int, int], walked: int, whole: bool, head_dim: int, bytes_: int
) -> tuple[tuple[str, int], ...]:
    """What :func:`sizes` chooses, kept."""
    found = sizes(name, math.prod(extent), walked, whole, head_dim, bytes_)
    return tuple(found.items())


def _run(
    kernel: Any,
    name: str,
    like: Tensor,
    extent: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int | float, ...],
    walked: int,
    strided: tuple[Tensor, Tensor, Tensor],
    flags: dict[str, bool],
) -> None:
    """Launch with the shapes of :func:`sizes`, halved where the device has too little memory."""
    b, t, h, w, heads, head_dim = like.shape
    regions, places = _places((t, h, w), extent)
    tokens, padded = math.prod(extent), _padded(head_dim)
    strides, align = _strides(*strided)
    shape = _tile(name, extent, walked, places["WHOLE"], padded, like.element_size())
    key = (name, like.device, like.dtype, padded, places["WHOLE"], shape)
    tile = _FITTING.get(key) or dict(shape)
    while True:
        even = (tokens if name == "key" else walked) % tile["N"] == 0
        constants: dict[str, Any] = {
            **places,
            "D": head_dim,
            "BD": padded,
            "ALIGN": align,
            "EVEN": even,
            "PRECISION": _precision(like.dtype),
            **tile,
            **flags,
        }
        programs = -(-tokens // tile["M"]) * regions * b * heads
        try:
            _launch(kernel, programs, like.device, (*tensors, *numbers, *strides), constants)
        except OutOfResources:
            if tile["M"] == tile["N"] == 16:
                raise
            larger = "M" if tile["M"] > tile["N"] else "N"
            tile = _FITTING[key] = tile | {larger: tile[larger] // 2}
        else:
            return


def route(query: Tensor, key: Tensor, extent: tuple[int, int, int], topk: int) -> Tensor:
    """The regions that each region attends to, best first, of equal ones the first.

    Means and affinities are float32; the latter are a product like others, of TF32 where that is
    allowed.

    Args:
        query, key: (B, T, H, W, heads, head_dim) of one dtype.
        extent: frames, rows and columns of a region.
        topk: regions to pick.

    Returns:
        (B, regions, topk) int32, contiguous.
    """
    q, k = _on_last_axis(query), _on_last_axis(key)
    b, t, h, w, heads, head_dim = q.shape
    regions, places = _places((t, h, w), extent)
    index = torch.empty((b, regions, topk), dtype=torch.int32, device=q.device)
    if not index.numel():
        return index
    means = torch.empty((2, b, regions, heads * head_dim), dtype=torch.float32, device=q.device)
    padded = _padded(head_dim)
    strides, align = _strides(q, k)
    rows = min(_pow2(math.prod(extent)), max(16, 2048 // padded))
    _launch(
        means_kernel,
        2 * b * regions * heads,
        q.device,
        (q, k, means, b, regions, heads, t, h, w, *strides),
        {
            **places,
            "M": rows,
            "D": head_dim,
            "BD": padded,
            "ALIGN": align,
            "num_warps": 4,
            "num_stages": 1,
        },
    )
    # written to a given tensor, which autocast leaves alone
    affinity = torch.empty((b, regions, regions), dtype=torch.float32, device=q.device)
    torch.bmm(means[0], means[1].mT, out=affinity)
    if regions > MOST_REGIONS or topk > MOST_PICKS:
        index.copy_(affinity.sort(dim=-1, descending=True, stable=True)[1][..., :topk])
        return index
    block = _pow2(regions)
    _launch(
        pick_kernel,
        b * regions,
        q.device,
        (affinity, index, regions, topk),
        {"BLOCK": block, "num_warps": min(8, max(1, block // 512)), "num_stages": 1},
    )
    return index


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    extent: tuple[int, int, int],
    zeros: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output like ``query`` and float32 log-sum-exp (B, heads, T, H, W).

    Args:
        query, key, value: (B, T, H, W, heads, head_dim).
        index: (B, regions, k) int32, the regions that each region attends to.
        extent: frames, rows and columns of a region.
        zeros: whether keys behind H and W take part as zeros.
        scale: factor on the scores.
    """
    q, k, v = (_on_last_axis(x) for x in (query, key, value))
    b, t, h, w, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((b, heads, t, h, w), dtype=torch.float32, device=q.device)
    if out.numel():
        _run(
            forward_kernel,
            "forward",
            q,
            extent,
            (q, k, v, index, out, lse),
            (index.shape[1], heads, index.shape[2], t, h, w, scale),
            index.shape[2] * math.prod(extent),
            (q, k, v),
            {"ZEROS": zeros},
        )
    return out, lse


def invert(index: Tensor) -> tuple[Tensor, Tensor]:
    """Who picked a region.

    Args:
        index: (B, regions, k) int32, contiguous.

    Returns:
        (B, regions, k) int32: of each sample first the regions that picked region 0, in their order,
        then those that picked region 1, and so on; and (B, regions + 1) int32, where each begins.
    """
    batch, regions, topk = index.shape
    askers = torch.empty_like(index)
    starts = torch.empty((batch, regions + 1), dtype=torch.int32, device=index.device)
    block = min(PICKS, _pow2(regions * topk))
    _launch(
        invert_kernel,
        batch * regions,
        index.device,
        (index, askers, starts, regions, topk),
        {"BLOCK": block, "num_warps": 4, "num_stages": 1},
    )
    return askers, starts


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    extent: tuple[int, int, int],
    zeros: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, contiguous."""
    q, k, v = (_on_last_axis(x) for x in (query, key, value))
    grad = grad.contiguous()
    t, h, w, heads = q.shape[1:5]
    grad_q, grad_k, grad_v = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)
    )
    if not out.numel():
        return grad_q, grad_k, grad_v
    regions, topk = index.shape[1:]
    walked = topk * math.prod(extent)
    stats = torch.empty((*lse.shape, 2), dtype=lse.dtype, device=lse.device)
    _run(
        query_gradient_kernel,
        "query",
        q,
        extent,
        (q, k, v, index, out, grad, lse, stats, grad_q),
        (regions, heads, topk, t, h, w, scale),
        walked,
        (q, k, v),
        {"ZEROS": zeros},
    )
    askers, starts = invert(index)
    _run(
        key_gradient_kernel,
        "key",
        q,
        extent,
        (q, k, v, askers, starts, grad, stats, grad_k, grad_v),
        (regions * topk, regions, heads, t, h, w, scale),
        walked,
        (q, k, v),
        {},
    )
    return grad_q, grad_k, grad_v
