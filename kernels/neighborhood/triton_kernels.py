"""Triton kernels of neighborhood attention: forward, gradient of queries, gradient of keys.

Checked on an H100 and through Triton's interpreter on a CPU; compiled for sm_80 and gfx942, on which they
have not run.

Every kernel walks boxes: a tile of queries against boxes of keys that start exactly at the first
key its windows reach, or a tile of keys against boxes of queries. Keys come through pointers (any
GPU, any dilation) or, with ``BOXES``, through tensor descriptors over the untouched (B, T, H, W,
heads * head_dim) tensor, so that a box is one copy by the tensor memory unit. Queries always come
through pointers. Only the gradient of rpb is accumulated with atomics; all else repeats bit by bit.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: One binary serves all grids, windows and dilations: Triton must not compile anew for an integer
#: that is 1 or a multiple of 16. What vector loads need, it learns from ``ALIGN``, the common
#: divisor of all strides, which are passed divided by it.
INTEGERS = [
    "n_t",
    "n_h",
    "n_w",
    "heads",
    "groups",
    "LQT",
    "LQH",
    "LQW",
    "LKT",
    "LKH",
    "LKW",
    "sqb",
    "sqt",
    "sqh",
    "sqw",
    "sqn",
    "skb",
    "skt",
    "skh",
    "skw",
    "skn",
    "svb",
    "svt",
    "svh",
    "svw",
    "svn",
    "DT",
    "DH",
    "DW",
    "WT",
    "WH",
    "WW",
]
KEY_INTEGERS = ["kv_heads" if name == "heads" else name for name in INTEGERS]


@triton.jit
def _tile(tables, index, COLUMN: tl.constexpr):
    return tl.load(tables + index * 7 + COLUMN)


@triton.jit
def _three(index, B: tl.constexpr, C: tl.constexpr):
    """Row-major coordinates inside a box of (any, B, C)."""
    return index // (B * C), index // C % B, index % C


@triton.jit
def _seen(start, stop, place):
    return (place >= start) & (place < stop)


@triton.jit
def _row_offset(t, h, w, stride_t, stride_h, stride_w):
    return t.to(tl.int64) * stride_t + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w


@triton.jit
def _bias_index(kt, kh, kw, qt, qh, qw, WT, WH, WW):
    """Flat index into one head's rpb of (key minus query) places."""
    at = kt - qt + (WT - 1)
    at = at * (2 * WH - 1) + kh - qh + (WH - 1)
    return at * (2 * WW - 1) + kw - qw + (WW - 1)


@triton.jit
def _bias(
    bias, head, kt, kh, kw, qt, qh, qw, WT, WH, WW, seen
):  # fmt: skip
    """rpb of (key minus query) places; only where ``seen``."""
    at = _bias_index(kt, kh, kw, qt, qh, qw, WT, WH, WW)
    size = (2 * WT - 1) * (2 * WH - 1) * (2 * WW - 1)
    return tl.load(bias + head * size + at, mask=seen, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(
    q, k, v, bias, key_mask, out, lse,
    tiles_t, tiles_h, tiles_w, bounds_t, bounds_h, bounds_w,
    n_t, n_h, n_w, heads, groups, scale,
    LQT, LQH, LQW, LKT, LKH, LKW,
    sqb, sqt, sqh, sqw, sqn, skb, skt, skh, skw, skn, svb, svt, svh, svw, svn,
    DT, DH, DW, WT, WH, WW,
    QT: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, BOXES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = QT * QH * QW
    N: tl.constexpr = KT * KH * KW
    tiles = n_t * n_h * n_w
    index, copy = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, head = copy // heads, copy % heads
    kv_head = head // groups
    it, ih, iw = index // (n_h * n_w), index // n_w % n_h, index % n_w
    row = tl.arange(0, M)
    rt, rh, rw = _three(row, QH, QW)
    qt = _tile(tiles_t, it, 0) + (_tile(tiles_t, it, 1) + rt) * DT
    qh = _tile(tiles_h, ih, 0) + (_tile(tiles_h, ih, 1) + rh) * DH
    qw = _tile(tiles_w, iw, 0) + (_tile(tiles_w, iw, 1) + rw) * DW
    real = (qt < LQT) & (qh < LQH) & (qw < LQW)
    # rows past the grid get an empty window
    start_t = tl.load(bounds_t + qt, mask=real, other=0)[:, None]
    start_h = tl.load(bounds_h + qh, mask=real, other=0)[:, None]
    start_w = tl.load(bounds_w + qw, mask=real, other=0)[:, None]
    stop_t = tl.load(bounds_t + LQT + qt, mask=real, other=0)[:, None]
    stop_h = tl.load(bounds_h + LQH + qh, mask=real, other=0)[:, None]
    stop_w = tl.load(bounds_w + LQW + qw, mask=real, other=0)[:, None]
    place_t = tl.load(bounds_t + 2 * LQT + qt, mask=real, other=0)[:, None]
    place_h = tl.load(bounds_h + 2 * LQH + qh, mask=real, other=0)[:, None]
    place_w = tl.load(bounds_w + 2 * LQW + qw, mask=real, other=0)[:, None]
    group_t, low_t, high_t = _tile(tiles_t, it, 2), _tile(tiles_t, it, 3), _tile(tiles_t, it, 4)
    group_h, low_h, high_h = _tile(tiles_h, ih, 2), _tile(tiles_h, ih, 3), _tile(tiles_h, ih, 4)
    group_w, low_w, high_w = _tile(tiles_w, iw, 2), _tile(tiles_w, iw, 3), _tile(tiles_w, iw, 4)
    all_low_t, all_high_t = _tile(tiles_t, it, 5), _tile(tiles_t, it, 6)
    all_low_h, all_high_h = _tile(tiles_h, ih, 5), _tile(tiles_h, ih, 6)
    all_low_w, all_high_w = _tile(tiles_w, iw, 5), _tile(tiles_w, iw, 6)

    dim, dim_v = tl.arange(0, BD), tl.arange(0, BDV)
    q_rows = batch.to(tl.int64) * sqb + head * sqn + _row_offset(qt, qh, qw, sqt, sqh, sqw)
    q_rows = q + q_rows * ALIGN
    qq = tl.load(q_rows[:, None] + dim[None, :], mask=real[:, None] & (dim < D)[None, :], other=0.0)
    column = tl.arange(0, N)
    ct, ch, cw = _three(column, KH, KW)
    boxes_h, boxes_w = tl.cdiv(high_h - low_h, KH), tl.cdiv(high_w - low_w, KW)
    boxes = tl.cdiv(high_t - low_t, KT) * boxes_h * boxes_w
    # a finite first maximum: minus infinity minus itself would be NaN in rows without a key yet
    top = tl.full([M], -1.0e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BDV], tl.float32)
    for j in range(boxes):
        first_t = low_t + j // (boxes_h * boxes_w) * KT
        first_h = low_h + j // boxes_w % boxes_h * KH
        first_w = low_w + j % boxes_w * KW
        kt, kh, kw = first_t + ct, first_h + ch, first_w + cw
        inside = (kt < high_t) & (kh < high_h) & (kw < high_w)
        if BOXES:
            kk = tl.reshape(k.load([batch, first_t, first_h, first_w, kv_head * D]), [N, BD])
            vv = tl.reshape(v.load([batch, first_t, first_h, first_w, kv_head * DV]), [N, BDV])
        else:
            at, ah, aw = group_t + kt * DT, group_h + kh * DH, group_w + kw * DW
            k_rows = batch.to(tl.int64) * skb + kv_head * skn
            k_rows = k + (k_rows + _row_offset(at, ah, aw, skt, skh, skw)) * ALIGN
            kk = tl.load(
                k_rows[:, None] + dim[None, :],
                mask=inside[:, None] & (dim < D)[None, :],
                other=0.0,
            )
            v_rows = batch.to(tl.int64) * svb + kv_head * svn
            v_rows = v + (v_rows + _row_offset(at, ah, aw, svt, svh, svw)) * ALIGN
            vv = tl.load(
                v_rows[:, None] + dim_v[None, :],
                mask=inside[:, None] & (dim_v < DV)[None, :],
                other=0.0,
            )
        scores = tl.dot(qq, tl.trans(kk), input_precision=PRECISION) * (scale * LOG2E)
        whole = (first_t >= all_low_t) & (first_t + KT <= all_high_t)
        whole &= (first_h >= all_low_h) & (first_h + KH <= all_high_h)
        whole &= (first_w >= all_low_w) & (first_w + KW <= all_high_w)
        if HAS_BIAS:
            seen = _seen(start_t, stop_t, kt[None, :]) & _seen(start_h, stop_h, kh[None, :])
            seen &= _seen(start_w, stop_w, kw[None, :])
            scores += LOG2E * _bias(
                bias, head, kt[None, :], kh[None, :], kw[None, :], place_t, place_h, place_w,
                WT, WH, WW, seen,
            )  # fmt: skip
        if not whole:
            seen = _seen(start_t, stop_t, kt[None, :]) & _seen(start_h, stop_h, kh[None, :])
            seen &= _seen(start_w, stop_w, kw[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        if HAS_MASK:
            at, ah, aw = group_t + kt * DT, group_h + kh * DH, group_w + kw * DW
            flat = ((batch.to(tl.int64) * LKT + at) * LKH + ah) * LKW + aw
            takes_part = tl.load(key_mask + flat, mask=inside, other=0) != 0
            scores = tl.where(takes_part[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(vv.dtype), vv, acc, input_precision=PRECISION)
        top = higher
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    rows = ((batch.to(tl.int64) * LQT + qt) * LQH + qh) * LQW + qw
    rows = rows * heads + head
    log_total = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    tl.store(lse + rows, log_total, mask=real)
    tl.store(
        out + rows[:, None] * DV + dim_v[None, :],
        acc.to(out.dtype.element_ty),
        mask=real[:, None] & (dim_v < DV)[None, :],
    )


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(
    out, grad_out, grad_lse, delta, rows,
    DV: tl.constexpr, BDV: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """``sum(grad_out * out) - grad_lse`` of each row, without float32 copies of the tensors."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    real = row < rows
    dim = tl.arange(0, BDV)
    at = row[:, None] * DV + dim[None, :]
    mask = real[:, None] & (dim < DV)[None, :]
    a = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
    less = tl.load(grad_lse + row, mask=real, other=0.0)
    tl.store(delta + row, tl.sum(a * b, 1) - less, mask=real)


@triton.jit(do_not_specialize=INTEGERS)
def query_gradient_kernel(
    q, k, v, bias, key_mask, grad_out, lse, delta, grad_q, grad_bias,
    tiles_t, tiles_h, tiles_w, bounds_t, bounds_h, bounds_w,
    n_t, n_h, n_w, heads, groups, scale,
    LQT, LQH, LQW, LKT, LKH, LKW,
    sqb, sqt, sqh, sqw, sqn, skb, skt, skh, skw, skn, svb, svt, svh, svw, svn,
    DT, DH, DW, WT, WH, WW,
    QT: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries; ``delta`` is sum(grad_out * out) - grad_lse of each row."""
    M: tl.constexpr = QT * QH * QW
    N: tl.constexpr = KT * KH * KW
    tiles = n_t * n_h * n_w
    index, copy = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, head = copy // heads, copy % heads
    kv_head = head // groups
    it, ih, iw = index // (n_h * n_w), index // n_w % n_h, index % n_w
    row = tl.arange(0, M)
    rt, rh, rw = _three(row, QH, QW)
    qt = _tile(tiles_t, it, 0) + (_tile(tiles_t, it, 1) + rt) * DT
    qh = _tile(tiles_h, ih, 0) + (_tile(tiles_h, ih, 1) + rh) * DH
    qw = _tile(tiles_w, iw, 0) + (_tile(tiles_w, iw, 1) + rw) * DW
    real = (qt < LQT) & (qh < LQH) & (qw < LQW)
    start_t = tl.load(bounds_t + qt, mask=real, other=0)[:, None]
    start_h = tl.load(bounds_h + qh, mask=real, other=0)[:, None]
    start_w = tl.load(bounds_w + qw, mask=real, other=0)[:, None]
    stop_t = tl.load(bounds_t + LQT + qt, mask=real, other=0)[:, None]
    stop_h = tl.load(bounds_h + LQH + qh, mask=real, other=0)[:, None]
    stop_w = tl.load(bounds_w + LQW + qw, mask=real, other=0)[:, None]
    place_t = tl.load(bounds_t + 2 * LQT + qt, mask=real, other=0)[:, None]
    place_h = tl.load(bounds_h + 2 * LQH + qh, mask=real, other=0)[:, None]
    place_w = tl.load(bounds_w + 2 * LQW + qw, mask=real, other=0)[:, None]
    group_t, low_t, high_t = _tile(tiles_t, it, 2), _tile(tiles_t, it, 3), _tile(tiles_t, it, 4)
    group_h, low_h, high_h = _tile(tiles_h, ih, 2), _tile(tiles_h, ih, 3), _tile(tiles_h, ih, 4)
    group_w, low_w, high_w = _tile(tiles_w, iw, 2), _tile(tiles_w, iw, 3), _tile(tiles_w, iw, 4)

    dim, dim_v = tl.arange(0, BD), tl.arange(0, BDV)
    q_rows = batch.to(tl.int64) * sqb + head * sqn + _row_offset(qt, qh, qw, sqt, sqh, sqw)
    q_rows = q + q_rows * ALIGN
    qq = tl.load(q_rows[:, None] + dim[None, :], mask=real[:, None] & (dim < D)[None, :], other=0.0)
    rows = ((batch.to(tl.int64) * LQT + qt) * LQH + qh) * LQW + qw
    rows = rows * heads + head
    do = tl.load(
        grad_out + rows[:, None] * DV + dim_v[None, :],
        mask=real[:, None] & (dim_v < DV)[None, :],
        other=0.0,
    )
    # plus infinity: rows without a key, and rows past the grid, weigh nothing
    log_total = tl.load(lse + rows, mask=real, other=float("inf")) * LOG2E
    log_total = tl.where(log_total == float("-inf"), float("inf"), log_total)
    shift = tl.load(delta + rows, mask=real, other=0.0)
    column = tl.arange(0, N)
    ct, ch, cw = _three(column, KH, KW)
    boxes_h, boxes_w = tl.cdiv(high_h - low_h, KH), tl.cdiv(high_w - low_w, KW)
    boxes = tl.cdiv(high_t - low_t, KT) * boxes_h * boxes_w
    acc = tl.zeros([M, BD], tl.float32)
    for j in range(boxes):
        kt = low_t + j // (boxes_h * boxes_w) * KT + ct
        kh = low_h + j // boxes_w % boxes_h * KH + ch
        kw = low_w + j % boxes_w * KW + cw
        inside = (kt < high_t) & (kh < high_h) & (kw < high_w)
        at, ah, aw = group_t + kt * DT, group_h + kh * DH, group_w + kw * DW
        k_rows = batch.to(tl.int64) * skb + kv_head * skn
        k_rows = k + (k_rows + _row_offset(at, ah, aw, skt, skh, skw)) * ALIGN
        kk = tl.load(
            k_rows[:, None] + dim[None, :], mask=inside[:, None] & (dim < D)[None, :], other=0.0
        )
        v_rows = batch.to(tl.int64) * svb + kv_head * svn
        v_rows = v + (v_rows + _row_offset(at, ah, aw, svt, svh, svw)) * ALIGN
        vv = tl.load(
            v_rows[:, None] + dim_v[None, :],
            mask=inside[:, None] & (dim_v < DV)[None, :],
            other=0.0,
        )
        seen = _seen(start_t, stop_t, kt[None, :]) & _seen(start_h, stop_h, kh[None, :])
        seen &= _seen(start_w, stop_w, kw[None, :])
        if HAS_MASK:
            flat = ((batch.to(tl.int64) * LKT + at) * LKH + ah) * LKW + aw
            seen &= (tl.load(key_mask + flat, mask=inside, other=0) != 0)[None, :]
        scores = tl.dot(qq, tl.trans(kk), input_precision=PRECISION) * (scale * LOG2E)
        if HAS_BIAS:
            scores += LOG2E * _bias(
                bias, head, kt[None, :], kh[None, :], kw[None, :], place_t, place_h, place_w,
                WT, WH, WW, seen,
            )  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
        weights = tl.exp2(scores - log_total[:, None])
        ds = tl.dot(do, tl.trans(vv), input_precision=PRECISION) - shift[:, None]
        ds = weights * ds
        if HAS_BIAS:
            at = _bias_index(
                kt[None, :], kh[None, :], kw[None, :], place_t, place_h, place_w, WT, WH, WW
            )
            size = (2 * WT - 1) * (2 * WH - 1) * (2 * WW - 1)
            tl.atomic_add(grad_bias + head * size + at, ds, mask=seen)
        acc = tl.dot(ds.to(kk.dtype), kk, acc, input_precision=PRECISION)
    tl.store(
        grad_q + rows[:, None] * D + dim[None, :],
        (acc * scale).to(grad_q.dtype.element_ty),
        mask=real[:, None] & (dim < D)[None, :],
    )


@triton.jit(do_not_specialize=KEY_INTEGERS)
def key_gradient_kernel(
    q, k, v, bias, key_mask, grad_out, lse, delta, grad_k, grad_v,
    tiles_t, tiles_h, tiles_w, bounds_t, bounds_h, bounds_w,
    n_t, n_h, n_w, kv_heads, groups, scale,
    LQT, LQH, LQW, LKT, LKH, LKW,
    sqb, sqt, sqh, sqw, sqn, skb, skt, skh, skw, skn, svb, svt, svh, svw, svn,
    DT, DH, DW, WT, WH, WW,
    QT: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys of a KV head; walks the boxes of queries that see the tile."""
    M: tl.constexpr = QT * QH * QW
    N: tl.constexpr = KT * KH * KW
    tiles = n_t * n_h * n_w
    index, copy = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, kv_head = copy // kv_heads, copy % kv_heads
    it, ih, iw = index // (n_h * n_w), index // n_w % n_h, index % n_w
    row = tl.arange(0, N)
    rt, rh, rw = _three(row, KH, KW)
    kt, kh, kw = _tile(tiles_t, it, 1) + rt, _tile(tiles_h, ih, 1) + rh, _tile(tiles_w, iw, 1) + rw
    at = _tile(tiles_t, it, 2) + kt * DT
    ah = _tile(tiles_h, ih, 2) + kh * DH
    aw = _tile(tiles_w, iw, 2) + kw * DW
    real = (at < LKT) & (ah < LKH) & (aw < LKW)
    residue_t, low_t, high_t = _tile(tiles_t, it, 0), _tile(tiles_t, it, 3), _tile(tiles_t, it, 4)
    residue_h, low_h, high_h = _tile(tiles_h, ih, 0), _tile(tiles_h, ih, 3), _tile(tiles_h, ih, 4)
    residue_w, low_w, high_w = _tile(tiles_w, iw, 0), _tile(tiles_w, iw, 3), _tile(tiles_w, iw, 4)
    dim, dim_v = tl.arange(0, BD), tl.arange(0, BDV)
    k_rows = batch.to(tl.int64) * skb + kv_head * skn
    k_rows = k + (k_rows + _row_offset(at, ah, aw, skt, skh, skw)) * ALIGN
    kk = tl.load(k_rows[:, None] + dim[None, :], mask=real[:, None] & (dim < D)[None, :], other=0.0)
    v_rows = batch.to(tl.int64) * svb + kv_head * svn
    v_rows = v + (v_rows + _row_offset(at, ah, aw, svt, svh, svw)) * ALIGN
    vv = tl.load(
        v_rows[:, None] + dim_v[None, :], mask=real[:, None] & (dim_v < DV)[None, :], other=0.0
    )
    keys = ((batch.to(tl.int64) * LKT + at) * LKH + ah) * LKW + aw
    takes_part = real
    if HAS_MASK:
        takes_part &= tl.load(key_mask + keys, mask=real, other=0) != 0
    column = tl.arange(0, M)
    ct, ch, cw = _three(column, QH, QW)
    boxes_h, boxes_w = tl.cdiv(high_h - low_h, QH), tl.cdiv(high_w - low_w, QW)
    boxes = tl.cdiv(high_t - low_t, QT) * boxes_h * boxes_w
    acc_k = tl.zeros([N, BD], tl.float32)
    acc_v = tl.zeros([N, BDV], tl.float32)
    for step in range(boxes * groups):
        head, j = kv_head * groups + step // boxes, step % boxes
        mt = low_t + j // (boxes_h * boxes_w) * QT + ct
        mh = low_h + j // boxes_w % boxes_h * QH + ch
        mw = low_w + j % boxes_w * QW + cw
        inside = (mt < high_t) & (mh < high_h) & (mw < high_w)
        qt, qh, qw = residue_t + mt * DT, residue_h + mh * DH, residue_w + mw * DW
        start_t = tl.load(bounds_t + qt, mask=inside, other=0)[None, :]
        start_h = tl.load(bounds_h + qh, mask=inside, other=0)[None, :]
        start_w = tl.load(bounds_w + qw, mask=inside, other=0)[None, :]
        stop_t = tl.load(bounds_t + LQT + qt, mask=inside, other=0)[None, :]
        stop_h = tl.load(bounds_h + LQH + qh, mask=inside, other=0)[None, :]
        stop_w = tl.load(bounds_w + LQW + qw, mask=inside, other=0)[None, :]
        q_rows = batch.to(tl.int64) * sqb + head * sqn
        q_rows = q + (q_rows + _row_offset(qt, qh, qw, sqt, sqh, sqw)) * ALIGN
        qq = tl.load(
            q_rows[:, None] + dim[None, :], mask=inside[:, None] & (dim < D)[None, :], other=0.0
        )
        rows = ((batch.to(tl.int64) * LQT + qt) * LQH + qh) * LQW + qw
        rows = rows * (kv_heads * groups) + head
        do = tl.load(
            grad_out + rows[:, None] * DV + dim_v[None, :],
            mask=inside[:, None] & (dim_v < DV)[None, :],
            other=0.0,
        )
        log_total = tl.load(lse + rows, mask=inside, other=float("inf")) * LOG2E
        log_total = tl.where(log_total == float("-inf"), float("inf"), log_total)
        shift = tl.load(delta + rows, mask=inside, other=0.0)
        seen = _seen(start_t, stop_t, kt[:, None]) & _seen(start_h, stop_h, kh[:, None])
        seen &= _seen(start_w, stop_w, kw[:, None]) & takes_part[:, None]
        scores = tl.dot(kk, tl.trans(qq), input_precision=PRECISION) * (scale * LOG2E)
        if HAS_BIAS:
            place_t = tl.load(bounds_t + 2 * LQT + qt, mask=inside, other=0)[None, :]
            place_h = tl.load(bounds_h + 2 * LQH + qh, mask=inside, other=0)[None, :]
            place_w = tl.load(bounds_w + 2 * LQW + qw, mask=inside, other=0)[None, :]
            scores += LOG2E * _bias(
                bias, head, kt[:, None], kh[:, None], kw[:, None], place_t, place_h, place_w,
                WT, WH, WW, seen,
            )  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
        weights = tl.exp2(scores - log_total[None, :])
        acc_v = tl.dot(weights.to(do.dtype), do, acc_v, input_precision=PRECISION)
        ds = tl.dot(vv, tl.trans(do), input_precision=PRECISION) - shift[None, :]
        ds = weights * ds
        acc_k = tl.dot(ds.to(qq.dtype), qq, acc_k, input_precision=PRECISION)
    keys = keys * kv_heads + kv_head
    tl.store(
        grad_k + keys[:, None] * D + dim[None, :],
        (acc_k * scale).to(grad_k.dtype.element_ty),
        mask=real[:, None] & (dim < D)[None, :],
    )
    tl.store(
        grad_v + keys[:, None] * DV + dim_v[None, :],
        acc_v.to(grad_v.dtype.element_ty),
        mask=real[:, None] & (dim_v < DV)[None, :],
    )
