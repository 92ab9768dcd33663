"""Lean Triton kernels for GPUs with a tensor memory unit: no bias, no key mask, dilation 1.

What is walked (keys in the forward and in the gradient of queries, queries in the gradient of keys)
comes as boxes through tensor descriptors over the untouched (B, T, H, W, heads * head_dim) tensor.
Rows, that is the tile a program owns, come through pointers. On an axis the columns that a row sees
are one run, so a mask is the sum of three terms that are 0 or minus infinity; it is the start value
of the accumulator of the first product and costs one addition per score.

A head size that is no power of two reads columns of the next head, up to the padded size: the rows
are zero there, and results are not stored there.

``MASK`` names the axes on which some row of some tile does not see all of a box: 1 (T), 2 (H), 4 (W).
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)

#: integers that must not make Triton compile anew, see ``triton_kernels.INTEGERS``
SHARED = [
    "n_h",
    "n_w",
    "tiles",
    "heads",
    "groups",
    "LRT",
    "LRH",
    "LRW",
    "srb",
    "srt",
    "srh",
    "srw",
    "srn",
]
KEY_INTEGERS = [
    *SHARED,
    "LQT",
    "LQH",
    "LQW",
    "svb",
    "svt",
    "svh",
    "svw",
    "svn",
    "head0",
    "all_heads",
]


@triton.jit
def _rows(index, n_h, n_w, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """First row of tile ``index`` on each axis."""
    return index // (n_h * n_w) * T, index // n_w % n_h * H, index % n_w * W


@triton.jit
def _three(index, B: tl.constexpr, C: tl.constexpr):
    """Row-major coordinates inside a box of (any, B, C)."""
    return index // (B * C), index // C % B, index % C


@triton.jit
def _walk(bounds, first, length, SIZE: tl.constexpr):
    """Run of columns that any row of a tile sees on one axis; bounds never step back."""
    low = tl.load(bounds + first)
    return low, tl.load(bounds + length + tl.minimum(first + SIZE, length) - 1)


@triton.jit
def _run(bounds, row, real, length):
    """Columns that each row sees on one axis; none past the grid."""
    start = tl.load(bounds + row, mask=real, other=0)
    return start, tl.load(bounds + length + row, mask=real, other=0)


@triton.jit
def _barred(start, stop, first, column):
    """(rows, columns) of 0 where a column is in the row's run, minus infinity elsewhere."""
    inside = (column[None, :] >= (start - first)[:, None]) & (
        column[None, :] < (stop - first)[:, None]
    )
    return tl.where(inside, 0.0, float("-inf"))


@triton.jit
def _bars(
    MASK: tl.constexpr, start_t, stop_t, t, ct, start_h, stop_h, h, ch, start_w, stop_w, w, cw
):  # fmt: skip
    """Sum of :func:`_barred` over the axes in ``MASK``, a sum of 1 (T), 2 (H) and 4 (W), not 0."""
    if MASK & 4:
        barred = _barred(start_w, stop_w, w, cw)
    if MASK & 1:
        if MASK & 4:
            barred += _barred(start_t, stop_t, t, ct)
        else:
            barred = _barred(start_t, stop_t, t, ct)
    if MASK & 2:
        if MASK & 5:
            barred += _barred(start_h, stop_h, h, ch)
        else:
            barred = _barred(start_h, stop_h, h, ch)
    return barred


@triton.jit
def _settle(x):
    """``x``, once all products that were started are done.

    Triton lets the last products of a round run on into the next one; where that one begins with a
    product on a start value, the assembler then runs all products one by one.
    """
    return tl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;",
        "=r,r",
        [x],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _next(t, h, w, low_h, low_w, high_h, high_w, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """The box after (t, h, w) in row-major order."""
    w += W
    turn_w = w >= high_w
    w = tl.where(turn_w, low_w, w)
    h = tl.where(turn_w, h + H, h)
    turn_h = h >= high_h
    h = tl.where(turn_h, low_h, h)
    t = tl.where(turn_h, t + T, t)
    return t, h, w


@triton.jit(do_not_specialize=SHARED)
def forward_boxes(
    q, k, v, out, lse, bounds,
    n_h, n_w, tiles, heads, groups, scale,
    LRT, LRH, LRW, srb, srt, srh, srw, srn,
    QT: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries of a head; ``scale`` is positive and holds log2(e)."""
    M: tl.constexpr = QT * QH * QW
    N: tl.constexpr = KT * KH * KW
    copy = tl.program_id(0) // tiles
    batch, head = copy // heads, copy % heads
    kv_head = head // groups
    t0, h0, w0 = _rows(tl.program_id(0) % tiles, n_h, n_w, QT, QH, QW)
    bounds_h, bounds_w = bounds + 2 * LRT, bounds + 2 * (LRT + LRH)
    low_t, high_t = _walk(bounds, t0, LRT, QT)
    low_h, high_h = _walk(bounds_h, h0, LRH, QH)
    low_w, high_w = _walk(bounds_w, w0, LRW, QW)
    rt, rh, rw = _three(tl.arange(0, M), QH, QW)
    qt, qh, qw = t0 + rt, h0 + rh, w0 + rw
    real = (qt < LRT) & (qh < LRH) & (qw < LRW)
    start_t, stop_t = _run(bounds, qt, real, LRT)
    start_h, stop_h = _run(bounds_h, qh, real, LRH)
    start_w, stop_w = _run(bounds_w, qw, real, LRW)
    dim, dim_v = tl.arange(0, BD), tl.arange(0, BDV)
    at = qt.to(tl.int64) * srt + qh.to(tl.int64) * srh + qw.to(tl.int64) * srw
    at += batch.to(tl.int64) * srb + head * srn
    qq = tl.load(
        q + (at * ALIGN)[:, None] + dim[None, :],
        mask=real[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    ct, ch, cw = _three(tl.arange(0, N), KH, KW)
    boxes = tl.cdiv(high_t - low_t, KT) * tl.cdiv(high_h - low_h, KH) * tl.cdiv(high_w - low_w, KW)
    # a finite first maximum: minus infinity minus itself would be NaN in rows without a key yet
    top = tl.full([M], -1.0e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BDV], tl.float32)
    t, h, w = low_t, low_h, low_w
    for _ in range(boxes):
        kk = tl.reshape(k.load([batch, t, h, w, kv_head * D]), [N, BD])
        vv = tl.reshape(v.load([batch, t, h, w, kv_head * DV]), [N, BDV])
        if MASK:
            barred = _bars(
                MASK, start_t, stop_t, t, ct, start_h, stop_h, h, ch, start_w, stop_w, w, cw
            )
            scores = tl.dot(qq, tl.trans(kk), barred, input_precision=PRECISION)
        else:
            scores = tl.dot(qq, tl.trans(kk), input_precision=PRECISION)
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(vv.dtype), vv, acc, input_precision=PRECISION)
        top = higher
        t, h, w = _next(t, h, w, low_h, low_w, high_h, high_w, KT, KH, KW)
    some = total > 0
    acc = acc * (1.0 / tl.where(some, total, 1.0))[:, None]
    rows = ((batch.to(tl.int64) * LRT + qt) * LRH + qh) * LRW + qw
    rows = rows * heads + head
    log_total = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    tl.store(lse + rows, log_total, mask=real)
    tl.store(
        out + rows[:, None] * DV + dim_v[None, :],
        acc.to(out.dtype.element_ty),
        mask=real[:, None] & (dim_v < DV)[None, :],
    )


@triton.jit
def _thirds(x, dtype: tl.constexpr):
    """Three numbers of a short type whose sum is ``x`` to the precision of float32."""
    high = x.to(dtype)
    rest = x - high.to(tl.float32)
    middle = rest.to(dtype)
    return high, middle, (rest - middle.to(tl.float32)).to(dtype)


@triton.jit
def _ones(rows: tl.constexpr, first: tl.constexpr, dtype: tl.constexpr):
    """(rows, 16) that takes the sum of columns ``first`` to ``first + 2`` in a product."""
    column = tl.arange(0, 16)[None, :] + tl.zeros([rows, 1], tl.int32)
    return ((column >= first) & (column < first + 3)).to(dtype)


@triton.jit(do_not_specialize=["rows", "tokens", "heads"])
def row_sums(
    out, grad_out, lse, grad_lse, stats, rows, tokens, heads, factor,
    DV: tl.constexpr, BDV: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """What the backward subtracts in each row, as (B, heads, T, H, W, 8).

    Columns 0 to 2 sum to -lse / factor, in the unit of unscaled scores, and far below every score
    for rows without a key, so that they weigh nothing; columns 3 to 5 to
    grad_lse - sum(grad_out * out). Split so that a product of 16-bit numbers subtracts them.
    ``tokens`` is T * H * W.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    real = row < rows
    dim = tl.arange(0, BDV)
    at = row[:, None] * DV + dim[None, :]
    mask = real[:, None] & (dim < DV)[None, :]
    a = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
    below = tl.load(grad_lse + row, mask=real, other=0.0) - tl.sum(a * b, 1)
    log_total = tl.load(lse + row, mask=real, other=0.0)
    # finite: it is multiplied by zero too
    least = tl.where(log_total == float("-inf"), -1.0e30, -log_total / factor)
    token, head = row // heads, row % heads
    to = stats + ((token // tokens * heads + head) * tokens + token % tokens) * 8
    high, middle, low = _thirds(least, stats.dtype.element_ty)
    tl.store(to, high, mask=real)
    tl.store(to + 1, middle, mask=real)
    tl.store(to + 2, low, mask=real)
    high, middle, low = _thirds(below, stats.dtype.element_ty)
    tl.store(to + 3, high, mask=real)
    tl.store(to + 4, middle, mask=real)
    tl.store(to + 5, low, mask=real)
    zero = tl.zeros([R], stats.dtype.element_ty)
    tl.store(to + 6, zero, mask=real)
    tl.store(to + 7, zero, mask=real)


@triton.jit
def _sum3(at, real):
    """Sum of three neighbouring numbers of each row, in float32."""
    total = tl.load(at, mask=real, other=0.0).to(tl.float32)
    total += tl.load(at + 1, mask=real, other=0.0).to(tl.float32)
    return total + tl.load(at + 2, mask=real, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SHARED)
def query_gradient_boxes(
    q, k, v, grad_out, stats, grad_q, bounds,
    n_h, n_w, tiles, heads, groups, scale, factor,
    LRT, LRH, LRW, srb, srt, srh, srw, srn,
    QT: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries; ``factor`` is the scale, ``scale`` the same in base 2."""
    M: tl.constexpr = QT * QH * QW
    N: tl.constexpr = KT * KH * KW
    copy = tl.program_id(0) // tiles
    batch, head = copy // heads, copy % heads
    kv_head = head // groups
    t0, h0, w0 = _rows(tl.program_id(0) % tiles, n_h, n_w, QT, QH, QW)
    bounds_h, bounds_w = bounds + 2 * LRT, bounds + 2 * (LRT + LRH)
    low_t, high_t = _walk(bounds, t0, LRT, QT)
    low_h, high_h = _walk(bounds_h, h0, LRH, QH)
    low_w, high_w = _walk(bounds_w, w0, LRW, QW)
    rt, rh, rw = _three(tl.arange(0, M), QH, QW)
    qt, qh, qw = t0 + rt, h0 + rh, w0 + rw
    real = (qt < LRT) & (qh < LRH) & (qw < LRW)
    start_t, stop_t = _run(bounds, qt, real, LRT)
    start_h, stop_h = _run(bounds_h, qh, real, LRH)
    start_w, stop_w = _run(bounds_w, qw, real, LRW)
    dim, dim_v = tl.arange(0, BD), tl.arange(0, BDV)
    at = qt.to(tl.int64) * srt + qh.to(tl.int64) * srh + qw.to(tl.int64) * srw
    at += batch.to(tl.int64) * srb + head * srn
    qq = tl.load(
        q + (at * ALIGN)[:, None] + dim[None, :],
        mask=real[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    rows = ((batch.to(tl.int64) * LRT + qt) * LRH + qh) * LRW + qw
    rows = rows * heads + head
    do = tl.load(
        grad_out + rows[:, None] * DV + dim_v[None, :],
        mask=real[:, None] & (dim_v < DV)[None, :],
        other=0.0,
    )
    place = stats + (((copy.to(tl.int64) * LRT + qt) * LRH + qh) * LRW + qw) * 8
    least, below = _sum3(place, real), _sum3(place + 3, real)
    ct, ch, cw = _three(tl.arange(0, N), KH, KW)
    boxes = tl.cdiv(high_t - low_t, KT) * tl.cdiv(high_h - low_h, KH) * tl.cdiv(high_w - low_w, KW)
    acc = tl.zeros([M, BD], tl.float32)
    t, h, w = low_t, low_h, low_w
    for _ in range(boxes):
        kk = tl.reshape(k.load([batch, t, h, w, kv_head * D]), [N, BD])
        vv = tl.reshape(v.load([batch, t, h, w, kv_head * DV]), [N, BDV])
        # what is subtracted from each row is the start of the sums too
        if MASK & 4:
            barred = _barred(start_w, stop_w, w, cw) + least[:, None]
        else:
            barred = tl.broadcast_to(least[:, None], [M, N])
        if MASK & 1:
            barred += _barred(start_t, stop_t, t, ct)
        if MASK & 2:
            barred += _barred(start_h, stop_h, h, ch)
        scores = tl.dot(qq, tl.trans(kk), barred, input_precision=PRECISION)
        ds = tl.broadcast_to(below[:, None], [M, N])
        ds = tl.dot(do, tl.trans(vv), ds, input_precision=PRECISION)
        ds = tl.exp2(scores * scale) * ds
        acc = tl.dot(ds.to(kk.dtype), kk, acc, input_precision=PRECISION)
        t, h, w = _next(t, h, w, low_h, low_w, high_h, high_w, KT, KH, KW)
    tl.store(
        grad_q + rows[:, None] * D + dim[None, :],
        (acc * factor).to(grad_q.dtype.element_ty),
        mask=real[:, None] & (dim < D)[None, :],
    )


@triton.jit(do_not_specialize=KEY_INTEGERS)
def key_gradient_boxes(
    q, k, v, grad_out, stats, grad_k, grad_v, grad_q, bounds,
    n_h, n_w, tiles, heads, groups, scale, factor, head0, all_heads,
    LRT, LRH, LRW, LQT, LQH, LQW, srb, srt, srh, srw, srn, svb, svt, svh, svw, svn,
    QT: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, MASK: tl.constexpr,
    GRAD_Q: tl.constexpr, BULK: tl.constexpr, SETTLE: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys of a KV head; walks the boxes of queries that see the tile.

    ``bounds`` are the runs of queries that see a key. Works on ``heads`` of the ``all_heads`` KV
    heads, from ``head0``. With ``GRAD_Q`` it also adds to the gradient of queries over ``factor``, a
    zeroed float32 (B, T, H, W, heads * groups * D), in the order in which programs come by; with
    ``BULK`` by whole boxes through a descriptor. ``SETTLE`` where products are those of Hopper.
    """
    M: tl.constexpr = QT * QH * QW
    N: tl.constexpr = KT * KH * KW
    copy = tl.program_id(0) // tiles
    batch, kv_head = copy // heads, copy % heads + head0
    t0, h0, w0 = _rows(tl.program_id(0) % tiles, n_h, n_w, KT, KH, KW)
    bounds_h, bounds_w = bounds + 2 * LRT, bounds + 2 * (LRT + LRH)
    low_t, high_t = _walk(bounds, t0, LRT, KT)
    low_h, high_h = _walk(bounds_h, h0, LRH, KH)
    low_w, high_w = _walk(bounds_w, w0, LRW, KW)
    rt, rh, rw = _three(tl.arange(0, N), KH, KW)
    kt, kh, kw = t0 + rt, h0 + rh, w0 + rw
    real = (kt < LRT) & (kh < LRH) & (kw < LRW)
    start_t, stop_t = _run(bounds, kt, real, LRT)
    start_h, stop_h = _run(bounds_h, kh, real, LRH)
    start_w, stop_w = _run(bounds_w, kw, real, LRW)
    dim, dim_v = tl.arange(0, BD), tl.arange(0, BDV)
    at = kt.to(tl.int64) * srt + kh.to(tl.int64) * srh + kw.to(tl.int64) * srw
    at += batch.to(tl.int64) * srb + kv_head * srn
    kk = tl.load(
        k + (at * ALIGN)[:, None] + dim[None, :],
        mask=real[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    at = kt.to(tl.int64) * svt + kh.to(tl.int64) * svh + kw.to(tl.int64) * svw
    at += batch.to(tl.int64) * svb + kv_head * svn
    vv = tl.load(
        v + (at * ALIGN)[:, None] + dim_v[None, :],
        mask=real[:, None] & (dim_v < DV)[None, :],
        other=0.0,
    )
    least, below = _ones(N, 0, stats.dtype), _ones(N, 3, stats.dtype)
    ct, ch, cw = _three(tl.arange(0, M), QH, QW)
    boxes = tl.maximum(high_t - low_t, 0) * tl.maximum(high_h - low_h, 0)
    boxes = tl.where(boxes * tl.maximum(high_w - low_w, 0) > 0, 1, 0)
    boxes *= tl.cdiv(high_t - low_t, QT) * tl.cdiv(high_h - low_h, QH) * tl.cdiv(high_w - low_w, QW)
    acc_k = tl.zeros([N, BD], tl.float32)
    acc_v = tl.zeros([N, BDV], tl.float32)
    t, h, w = low_t, low_h, low_w
    head = kv_head * groups
    for _ in range(boxes * groups):
        qq = tl.reshape(q.load([batch, t, h, w, head * D]), [M, BD])
        do = tl.reshape(grad_out.load([batch, t, h, w, head * DV]), [M, BDV])
        row = tl.reshape(stats.load([batch * all_heads * groups + head, t, h, w, 0]), [M, 16])
        # two narrow products subtract the sums of rows, which here lie along the columns
        if MASK:
            barred = _bars(
                MASK, start_t, stop_t, t, ct, start_h, stop_h, h, ch, start_w, stop_w, w, cw
            )
            scores = tl.dot(least, tl.trans(row), barred, input_precision="ieee")
        else:
            scores = tl.dot(least, tl.trans(row), input_precision="ieee")
        scores = tl.dot(kk, tl.trans(qq), scores, input_precision=PRECISION)
        ds = tl.dot(below, tl.trans(row), input_precision="ieee")
        ds = tl.dot(vv, tl.trans(do), ds, input_precision=PRECISION)
        weights = tl.exp2(scores * scale)
        ds = (weights * ds).to(qq.dtype)
        acc_v = tl.dot(weights.to(do.dtype), do, acc_v, input_precision=PRECISION)
        acc_k = tl.dot(ds, qq, acc_k, input_precision=PRECISION)
        if GRAD_Q:
            dq = tl.dot(tl.trans(ds), kk, input_precision=PRECISION)
            part = head - head0 * groups
            if BULK:
                grad_q.atomic_add([batch, t, h, w, part * D], tl.reshape(dq, [1, QT, QH, QW, BD]))
            else:
                qt, qh, qw = t + ct, h + ch, w + cw
                inside = (qt < LQT) & (qh < LQH) & (qw < LQW)
                place = ((batch.to(tl.int64) * LQT + qt) * LQH + qh) * LQW + qw
                place = (place * heads * groups + part) * D
                tl.atomic_add(
                    grad_q + place[:, None] + dim[None, :],
                    dq,
                    mask=inside[:, None] & (dim < D)[None, :],
                    sem="relaxed",
                )
        if SETTLE:
            t = _settle(t)
        t, h, w = _next(t, h, w, low_h, low_w, high_h, high_w, QT, QH, QW)
        last = t >= high_t
        t = tl.where(last, low_t, t)
        head = tl.where(last, head + 1, head)
    keys = ((batch.to(tl.int64) * LRT + kt) * LRH + kh) * LRW + kw
    keys = keys * all_heads + kv_head
    tl.store(
        grad_k + keys[:, None] * D + dim[None, :],
        (acc_k * factor).to(grad_k.dtype.element_ty),
        mask=real[:, None] & (dim < D)[None, :],
    )
    tl.store(
        grad_v + keys[:, None] * DV + dim_v[None, :],
        acc_v.to(grad_v.dtype.element_ty),
        mask=real[:, None] & (dim_v < DV)[None, :],
    )
