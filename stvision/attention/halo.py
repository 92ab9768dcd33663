"""Block-local attention (Vaswani et al. 2021, HaloNet, section 3), for clips (B, T, H, W, C).

A grid is cut into blocks of queries; each block sees itself and a halo around it. This is
neighborhood attention with one window per block: stride = block, window = block + 2 halo, on keys
padded so that windows keep their place at the border. The relative term of HaloNet, which depends on
the query, is a product too: a key carries the one-hot code of its place modulo the window, a query
what each place is worth to it. An image is the case T = 1.

Numbers are those of timm's layer, whose weights are public: keys behind the border are zeros that
take part (with the relative term alone), and the relative term is not scaled. Behind the first and
the last frame, which images do not have, keys are masked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.kernels.neighborhood import na3d
from stvision.layers.checks import check_choice, check_volume
from stvision.layers.vision import per_frame

IMPLEMENTATIONS = ("neighborhood", "windows")

#: scores of queries and keys that windows may hold at once where no implementation is asked for:
#: 128 MiB in 16 bits, kept for the backward
MOST_SCORES = 2**26

Tables = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class HaloAxis:
    """Blocks of one axis.

    Args:
        length: keys.
        block: keys of a block, the last one padded.
        halo: keys seen before a block, and behind it unless ``causal``.
        stride: distance in keys between queries; divides ``block``.
        causal: a query sees no key after itself.
    """

    length: int
    block: int
    halo: int
    stride: int = 1
    causal: bool = False

    @property
    def window(self) -> int:
        """Keys that a block sees."""
        return self.block + (1 if self.causal else 2) * self.halo

    @property
    def blocks(self) -> int:
        """Blocks, the last one padded."""
        return -(-self.length // self.block)

    @property
    def queries(self) -> int:
        """Queries of the axis."""
        return -(-self.length // self.stride)

    @property
    def queries_per_block(self) -> int:
        """Queries of one block."""
        return self.block // self.stride

    @property
    def behind(self) -> int:
        """Keys padded behind the axis."""
        return -self.length % self.block + (0 if self.causal else self.halo)

    @property
    def before(self) -> int:
        """Keys padded before the axis, whole blocks, so that blocks stay where they are."""
        return -(-self.halo // self.block) * self.block

    def index(self, device: torch.device) -> Tensor:
        """(queries per block, window): row of the relative table for each query and each place.

        Key place in the window - query place among the block's queries + window - 1, as the
        released tables are indexed; with a stride the query places count queries, not keys.
        """
        query = torch.arange(self.queries_per_block, device=device)
        return torch.arange(self.window, device=device) - query[:, None] + self.window - 1

    def index_by_residue(self, device: torch.device) -> Tensor:
        """(queries, window): the same, for keys named by their padded place modulo the window."""
        first = self.before - self.halo + torch.arange(self.blocks, device=device) * self.block
        place = (torch.arange(self.window, device=device) - first[:, None]) % self.window
        rows = self.index(device)[:, None].expand(-1, self.blocks, -1)
        rows = rows.gather(2, place.expand(self.queries_per_block, -1, -1))
        return rows.transpose(0, 1).flatten(0, 1)[: self.queries]


def _pad(x: Tensor, before: Sequence[int], behind: Sequence[int]) -> Tensor:
    """Zeros before and behind the axes T, H and W of (B, T, H, W, ...)."""
    sizes = [0, 0] * (x.ndim - 4)
    for a in (2, 1, 0):
        sizes += [before[a], behind[a]]
    return F.pad(x, sizes) if any(sizes) else x


def _inside(
    axes: Sequence[HaloAxis], before: Sequence[int], sides: Sequence[bool], device: torch.device
) -> list[Tensor]:
    """Per axis, which padded keys may be seen; ``sides`` says where padding may not."""
    found = []
    for axis, first, hidden in zip(axes, before, sides, strict=True):
        place = torch.arange(first + axis.length + axis.behind, device=device)
        real = (place >= first) & (place < first + axis.length)
        found.append(real if hidden else torch.ones_like(real))
    return found


def _relative(query: Tensor, table: Tensor, rows: Tensor, a: int) -> Tensor:
    """What each place of axis ``a`` is worth to each query: (B, T, H, W, heads, window)."""
    letters = "thw"[a]
    looked_up = table[rows]
    return torch.einsum(f"bthwnd,{letters}rd->bthwnr", query, looked_up.to(query.dtype))


def _neighborhood(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: Sequence[HaloAxis],
    tables: Tables,
    mask_border: bool,
    scale: float,
    relative_scale: float,
    backend: str | None,
) -> Tensor:
    before, behind = [a.before for a in axes], [a.behind for a in axes]
    strided = any(axis.stride > 1 for axis in axes)
    if strided:  # queries stand at the start of equal shares of the keys, so their number divides
        whole = zip(axes, before, behind, strict=True)
        behind = [r + -(p + axis.length + r) % axis.stride for axis, p, r in whole]
    key, value = (_pad(x, before, behind) for x in (key, value))
    parts_q, parts_k = [query * scale], [key]
    for a, (axis, table) in enumerate(zip(axes, tables, strict=True)):
        if table is None:
            continue
        worth = _relative(query, table, axis.index_by_residue(table.device), a) * relative_scale
        code = torch.eye(axis.window, dtype=key.dtype, device=key.device)
        code = code[torch.arange(key.shape[a + 1], device=key.device) % axis.window]
        shape = [1] * 6
        shape[a + 1], shape[5] = code.shape
        parts_q.append(worth)
        parts_k.append(code.view(shape).expand(*key.shape[:5], -1))
    # rows of a multiple of 8 numbers are loaded 16 bytes at a time
    if rest := -sum(x.shape[-1] for x in parts_k) % 8:
        for parts in (parts_q, parts_k):
            parts.append(parts[0].new_zeros(1).expand(*parts[0].shape[:-1], rest))
    query, key = torch.cat(parts_q, -1), torch.cat(parts_k, -1)
    mask = None
    hidden = (True, mask_border, mask_border)
    if any(on and (p or r) for on, p, r in zip(hidden, before, behind, strict=True)):
        inside = _inside(axes, before, hidden, key.device)
        t, h, w = (
            F.pad(x, (0, n - len(x)), value=False) if on else x.new_ones(n)
            for x, n, on in zip(inside, key.shape[1:4], hidden, strict=True)
        )
        seen = t[:, None, None] & h[:, None] & w
        mask = seen.expand(len(key), -1, -1, -1)
    query_map: str | tuple[int, int, int] = cast(tuple[int, int, int], tuple(before))
    first = [p // axis.stride for axis, p in zip(axes, before, strict=True)]
    if strided:
        query_map = "start"
        totals = [n // axis.stride for axis, n in zip(axes, key.shape[1:4], strict=True)]
        behind = [n - p - m for n, p, m in zip(totals, first, query.shape[1:4], strict=True)]
        query = _pad(query, first, behind)
    out = na3d(
        query,
        key,
        value,
        tuple(axis.window for axis in axes),
        stride=tuple(axis.block for axis in axes),
        is_causal=tuple(axis.causal for axis in axes),
        scale=1.0,
        key_mask=mask,
        query_map=query_map,
        backend=backend,
    )
    if strided:
        for a, axis in enumerate(axes):
            out = cast(Tensor, out).narrow(a + 1, first[a], axis.queries)
    return cast(Tensor, out)


def _blocks(x: Tensor, axes: Sequence[HaloAxis]) -> Tensor:
    """(B, T, H, W, heads, d) to (B, nt, nh, nw, queries of a block, heads, d)."""
    (nt, nh, nw), (t, h, w) = [a.blocks for a in axes], [a.queries_per_block for a in axes]
    x = _pad(x, (0, 0, 0), [a.blocks * a.queries_per_block - a.queries for a in axes])
    x = x.reshape(-1, nt, t, nh, h, nw, w, *x.shape[4:])
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7, 8).flatten(4, 6)


def _windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: Sequence[HaloAxis],
    tables: Tables,
    mask_border: bool,
    scale: float,
    relative_scale: float,
) -> Tensor:
    """The definition: each block with its own copy of the keys and values around it."""

    def unfold(x: Tensor) -> Tensor:
        # (B, T, H, W, ...) to (B, nt, nh, nw, ..., wt, wh, ww)
        x = _pad(x, [a.halo for a in axes], [a.behind for a in axes])
        for a, axis in enumerate(axes):
            x = x.unfold(a + 1, axis.window, axis.block)
        return x

    keys, values = (unfold(x).flatten(6).movedim(-1, 4) for x in (key, value))
    q = _blocks(query, axes)
    scores = torch.einsum("bxyzinc,bxyzjnc->bxyznij", q * scale, keys)
    sizes = [a.queries_per_block for a in axes]
    shape = [a.window for a in axes]
    for a, (axis, table) in enumerate(zip(axes, tables, strict=True)):
        if table is None:
            continue
        rows = axis.index(table.device)  # (queries along the axis, window)
        view = [1, 1, 1]
        view[a] = sizes[a]
        of_query = torch.arange(sizes[a], device=table.device).view(view).expand(sizes).flatten()
        looked_up = table[rows[of_query]].to(q.dtype)  # (queries, window, d)
        worth = torch.einsum("bxyzinc,ijc->bxyznij", q, looked_up) * relative_scale
        view = [1, 1, 1]
        view[a] = axis.window
        worth = worth.unflatten(-1, view).expand(*worth.shape[:-1], *shape).flatten(-3)
        scores = scores + worth
    hidden = (True, mask_border, mask_border)
    t, h, w = _inside(axes, [a.halo for a in axes], hidden, key.device)
    seen = (t[:, None, None] & h[:, None] & w)[None]
    for a, axis in enumerate(axes):
        seen = seen.unfold(a + 1, axis.window, axis.block)
    seen = seen.flatten(4)[..., None, None, :]  # (1, nt, nh, nw, 1, 1, keys)
    if axes[0].causal:
        place = torch.arange(axes[0].window, device=key.device) - axes[0].halo
        frame = place[:, None, None].expand(shape).flatten()
        own = torch.arange(sizes[0], device=key.device)[:, None, None].expand(sizes).flatten()
        seen = seen & (frame <= own[:, None])
    scores = scores.masked_fill(~seen, -torch.inf)
    # queries padded behind the last frame may see nothing
    weights = scores.softmax(-1).nan_to_num(0.0)
    out = torch.einsum("bxyznij,bxyzjnc->bxyzinc", weights, values)
    out = out.unflatten(4, sizes).permute(0, 1, 4, 2, 5, 3, 6, 7, 8)
    out = out.flatten(5, 6).flatten(3, 4).flatten(1, 2)
    queries = [a.queries for a in axes]
    return out[:, : queries[0], : queries[1], : queries[2]]


def _frames_alone(axes: Sequence[HaloAxis], mask_border: bool) -> bool:
    """Whether blocks lie within a frame and nothing is masked, as in images."""
    return axes[0].window == 1 and not mask_border


def _shifted(worth: Tensor, first: int, window: int, a: int) -> Tensor:
    """View of (batch, rows, columns, R) as (batch, rows, columns, window).

    The query at place i of axis ``a`` gets what lies from ``first`` - i of the last axis.
    """
    batch, rows, columns, count = worth.shape
    steps = [rows * columns * count, columns * count, count, 1]
    steps[a] -= 1
    # contiguous, since a product has just made it
    return worth.as_strided((batch, rows, columns, window), steps, first)


def _frame_windows(
    query: Tensor,
    pairs: Tensor,
    axes: Sequence[HaloAxis],
    tables: Tables,
    scale: float,
    relative_scale: float,
) -> Tensor:
    """Windows of frames on their own, nothing masked, by few operators.

    Two products and a softmax for all blocks and heads; a copy each of queries, of keys and values
    with their halo, and of the result.

    Args:
        query: (B, T, H / stride, W / stride, heads, d).
        pairs: keys beside their values, (B, T, H, W, heads, d + dv).
        axes: of which the first has windows of one frame.
        tables: see :func:`halo_attention`.
        scale: see :func:`halo_attention`.
        relative_scale: of the relative term.

    Returns:
        (B, T, H / stride, W / stride, heads, dv).
    """
    b, t, rows, columns, heads, d = query.shape
    _, y, x = axes
    many, queries = (b * t, y.blocks, x.blocks), (y.queries_per_block, x.queries_per_block)
    rest = [a.blocks * a.queries_per_block - a.queries for a in (y, x)]
    q = _pad(query, (0, 0, 0), (0, *rest))
    q = q.reshape(b * t, y.blocks, queries[0], x.blocks, queries[1], heads, d)
    q = q.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, queries[0] * queries[1], d)
    kv = _pad(pairs, (0, y.halo, x.halo), (0, y.behind, x.behind)).flatten(0, 1)
    kv = kv.unfold(1, y.window, y.block).unfold(2, x.window, x.block)
    kv = kv.permute(0, 1, 2, 3, 5, 6, 4).reshape(-1, y.window * x.window, pairs.shape[-1])
    k, v = kv.split((d, pairs.shape[-1] - d), dim=-1)
    scores = torch.bmm(q * scale, k.transpose(1, 2))
    given = [(a, table) for a, table in zip((1, 2), tables[1:], strict=True) if table is not None]
    if tables[0] is not None:  # the only frame of a window is the query's own
        scores = scores + q @ (tables[0] * relative_scale).to(q.dtype).t()
    if given:
        table = torch.cat([table for _, table in given]) if len(given) > 1 else given[0][1]
        table = table if relative_scale == 1 else table * relative_scale
        # what each row of the tables is worth to each query; its own window of rows is a view
        worth = F.linear(q, table.to(q.dtype)).view(-1, *queries, len(table))
        scores = scores.view(-1, *queries, y.window, x.window)
        begin = 0
        for a, table in given:
            window = axes[a].window
            own = _shifted(worth, begin + window - 1, window, a)
            scores = scores + (own[..., None] if a == 1 else own[..., None, :])
            begin += len(table)
        scores = scores.flatten(3).flatten(1, 2)
    out = torch.bmm(scores.softmax(-1), v).view(*many, heads, *queries, v.shape[-1])
    out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(
        b, t, y.blocks * queries[0], x.blocks * queries[1], heads, v.shape[-1]
    )
    return out[:, :, :rows, :columns] if any(rest) else out


def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block: tuple[int, int, int],
    halo: tuple[int, int, int],
    tables: Tables = (None, None, None),
    stride: int = 1,
    causal: bool = False,
    mask_border: bool = False,
    scale: float | None = None,
    scale_relative: bool = False,
    implementation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from each block to itself and the halo around it.

    Args:
        query: (B, T, H / stride, W / stride, heads, d), rounded up; query i stands at key
            stride * i.
        key: (B, T, H, W, heads, d).
        value: (B, T, H, W, heads, dv).
        block: frames, rows and columns of a block; what they do not divide is padded.
        halo: keys seen around a block, in frames, rows and columns.
        tables: relative tables of frames, rows and columns, (2 * window - 1, d) each or ``None``,
            shared by heads. Row (key place in the window - query place in its block + window - 1)
            times the query is added to the score; with a stride, places of queries count queries.
        stride: distance of queries in rows and columns; must divide the block.
        causal: a query sees no later frame, and blocks no halo of frames behind them.
        mask_border: hide what lies behind rows and columns, instead of zero keys that take part.
        scale: factor on query times key, ``d ** -0.5`` if ``None``.
        scale_relative: apply ``scale`` to the relative term too.
        implementation: ``"neighborhood"`` (the kernels of :mod:`stvision.kernels.neighborhood`) or
            ``"windows"`` (the definition: a copy of keys and values for each block). ``None`` for
            ``"windows"`` where frames stand alone, nothing is masked and scores are at most
            ``MOST_SCORES``: there a few products cost less than what prepares the kernels; else,
            or where a ``backend`` is asked for, ``"neighborhood"``.
        backend: of :func:`stvision.kernels.neighborhood.na3d`.

    Returns:
        (B, T, H / stride, W / stride, heads, dv) in the dtype of ``query``.

    Raises:
        ValueError: shapes, blocks, halos, stride or tables that do not fit together.
    """
    if key.ndim != 6 or query.ndim != 6 or key.shape[:5] != value.shape[:5]:
        raise ValueError(
            "query, key and value must be (B, T, H, W, heads, head_dim), key and value on one grid, "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if len(block) != 3 or min(block) < 1 or len(halo) != 3 or min(halo) < 0:
        raise ValueError(
            "block must be three numbers of at least 1 and halo of at least 0, got "
            f"{block} and {halo}"
        )
    if stride < 1 or block[1] % stride or block[2] % stride:
        raise ValueError(
            f"stride must divide the block's {block[1:]} rows and columns, got {stride}"
        )
    axes = _axes(key.shape[1:4], block, halo, stride, causal)
    wanted = (key.shape[0], *(axis.queries for axis in axes), *key.shape[4:])
    if tuple(query.shape) != wanted:
        raise ValueError(f"query must be {wanted} beside these keys, got {tuple(query.shape)}")
    for name, axis, table in zip(("frames", "rows", "columns"), axes, tables, strict=True):
        rows = (2 * axis.window - 1, key.shape[-1])
        if table is not None and tuple(table.shape) != rows:
            raise ValueError(f"the table of {name} must be {rows}, got {tuple(table.shape)}")
    implementation = _chosen(implementation, backend, query, axes, mask_border)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    relative_scale = scale if scale_relative else 1.0
    if implementation == "windows" and _frames_alone(axes, mask_border):
        pairs = torch.cat((key, value), dim=-1)
        return _frame_windows(query, pairs, axes, tables, scale, relative_scale)
    options = (query, key, value, axes, tables, mask_border, scale, relative_scale)
    if implementation == "windows":
        return _windows(*options)
    return _neighborhood(*options, backend)


def _axes(
    grid: Sequence[int],
    block: tuple[int, int, int],
    halo: tuple[int, int, int],
    stride: int,
    causal: bool,
) -> tuple[HaloAxis, HaloAxis, HaloAxis]:
    t, h, w = grid
    return (
        HaloAxis(t, block[0], halo[0], causal=causal),
        HaloAxis(h, block[1], halo[1], stride),
        HaloAxis(w, block[2], halo[2], stride),
    )


def _chosen(
    implementation: str | None,
    backend: str | None,
    query: Tensor,
    axes: Sequence[HaloAxis],
    mask_border: bool,
) -> str:
    if implementation is None:
        scores = math.prod(query.shape[:5]) * axes[1].window * axes[2].window
        small = scores <= MOST_SCORES and _frames_alone(axes, mask_border)
        return "windows" if small and backend is None else "neighborhood"
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    return implementation


class _Tables(nn.Module):
    """Relative tables of an attention, keys ``height_rel``, ``width_rel`` and ``time_rel``."""

    def __init__(self, window: int, frame_window: int, dim: int, std: float) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, dim))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, dim))
        self.time_rel: nn.Parameter | None = None
        if frame_window > 1:
            # zero at the start, so that a video model begins as its image model
            self.time_rel = nn.Parameter(torch.zeros(2 * frame_window - 1, dim))
        for table in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(table, std=std)


class HaloAttention(nn.Module):
    """HaloNet's layer with the parameters of timm's, as linear layers: (B, T, H, W, C) to the same.

    Args:
        dim: channels C.
        num_heads: heads; must divide ``dim_out``.
        dim_out: channels of the output, ``dim`` if ``None``.
        block_size: rows and columns of a block.
        halo_size: rows and columns seen around it.
        stride: 1, or 2 to halve rows and columns: by leaving out queries where 2 divides the block,
            else by pooling the output.
        dim_head: channels of a head's queries and keys; follows from ``qk_ratio`` if ``None``.
        qk_ratio: queries' and keys' channels over ``dim_out``, rounded to a multiple of 8.
        qkv_bias: biases of the projections.
        avg_down: pool the output even where queries could be left out.
        scale_pos_embed: scale the relative term as the rest of the scores.
        block_frames: frames of a block.
        halo_frames: frames seen around it.
        causal: see no later frame.
        mask_border: see :func:`halo_attention`.
        implementation: see :func:`halo_attention`.

    Raises:
        ValueError: heads or a stride that do not fit, or another argument out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        dim_out: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        dim_head: int | None = None,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        block_frames: int = 1,
        halo_frames: int = 0,
        causal: bool = False,
        mask_border: bool = False,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if num_heads < 1 or dim_out % num_heads:
            raise ValueError(f"num_heads must divide dim_out {dim_out}, got {num_heads}")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        if min(block_size, block_frames) < 1 or min(halo_size, halo_frames) < 0:
            raise ValueError(
                "block_size and block_frames must be at least 1, halo_size and halo_frames at "
                f"least 0, got {block_size}, {block_frames}, {halo_size} and {halo_frames}"
            )
        if qk_ratio <= 0 or (dim_head is not None and dim_head < 1):
            raise ValueError(
                "qk_ratio must be above 0 and dim_head None or at least 1, got "
                f"{qk_ratio} and {dim_head}"
            )
        check_choice("implementation", implementation, IMPLEMENTATIONS)
        self.dim, self.num_heads = dim, num_heads
        self.block = (block_frames, block_size, block_size)
        self.halo = (halo_frames, halo_size, halo_size)
        self.causal, self.mask_border = causal, mask_border
        self.scale_pos_embed, self.implementation = scale_pos_embed, implementation
        self.head_qk = (
            _round_to_8(dim_out * qk_ratio) // num_heads if dim_head is None else dim_head
        )
        self.head_v = dim_out // num_heads
        pooled = stride == 2 and (avg_down or block_size % 2 == 1)
        self.stride = 1 if pooled else stride
        self.pool = (
            nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if pooled else nn.Identity()
        )
        self.q = nn.Linear(dim, num_heads * self.head_qk, bias=qkv_bias)
        self.kv = nn.Linear(dim, num_heads * (self.head_qk + self.head_v), bias=qkv_bias)
        frame_window = block_frames + (1 if causal else 2) * halo_frames
        std = self.head_qk**-0.5
        self.pos_embed = _Tables(block_size + 2 * halo_size, frame_window, self.head_qk, std)
        for layer in (self.q, self.kv):
            nn.init.trunc_normal_(layer.weight, std=dim**-0.5)

    def layout(self, grid: tuple[int, int, int]) -> None:
        """No order of a (T, H, W) grid's tokens saves this attention its own."""
        return

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, H, W, C) to (B, T, H / stride, W / stride, dim_out), rounded up."""
        check_volume(x, self.dim)
        heads, size, grid = self.num_heads, self.head_qk, x.shape[:4]
        # linear layers of rows record no views of their own, and share a copy of other orders
        rows = x.reshape(-1, self.dim)
        pairs = self.kv(rows).view(*grid, heads, size + self.head_v)
        if self.stride > 1:
            few = x[:, :, :: self.stride, :: self.stride]
            grid, rows = few.shape[:4], few.reshape(-1, self.dim)
        query = self.q(rows).view(*grid, heads, size)
        tables = (self.pos_embed.time_rel, self.pos_embed.height_rel, self.pos_embed.width_rel)
        axes = _axes(x.shape[1:4], self.block, self.halo, self.stride, self.causal)
        chosen = _chosen(self.implementation, None, query, axes, self.mask_border)
        if chosen == "windows" and _frames_alone(axes, self.mask_border):
            scale = size**-0.5
            relative_scale = scale if self.scale_pos_embed else 1.0
            out = _frame_windows(query, pairs, axes, tables, scale, relative_scale)
        else:
            key, value = pairs.split((size, self.head_v), dim=-1)
            out = halo_attention(
                query,
                key,
                value,
                block=self.block,
                halo=self.halo,
                tables=tables,
                stride=self.stride,
                causal=self.causal,
                mask_border=self.mask_border,
                scale_relative=self.scale_pos_embed,
                implementation=chosen,
            )
        out = out.flatten(-2)
        return out if isinstance(self.pool, nn.Identity) else per_frame(self.pool, out)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, block={self.block}, halo={self.halo}, "
            f"stride={self.stride}, causal={self.causal}"
        )


def _round_to_8(channels: float) -> int:
    """The nearest multiple of 8 that is at least 8 and not below 90 % of ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
