"""Neighborhood attention as small dense attentions: a tile of queries against its box of keys.

The windows of neighbouring queries overlap, so a tile of queries shares one box of keys. Each tile
is one dense product with an additive mask where the box is larger than a window; no key is gathered
twice for the same tile. Any device, any head size, float64 included. Scores of at most
``SCORE_ELEMENTS`` numbers exist at once.
"""

import math
from functools import lru_cache
from itertools import product

import torch

from stvision.kernels.neighborhood.reference import add_at
from stvision.kernels.neighborhood.windows import Axis, AxisTile, axis_tiles, tiling_cost

#: scores held at once; one tile of one batch item may exceed it
SCORE_ELEMENTS = 1 << 24
#: fixed cost of a tile, in query-key pairs (of one head and batch item) that take as long
TILE_OVERHEAD = 40_000
TILE_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)


@lru_cache(maxsize=256)
def choose_tile(axes: tuple[Axis, ...], copies: int = 1) -> tuple[int, ...]:
    """Query tile with the least work, counted exactly from the windows.

    Args:
        axes: the problem.
        copies: batch times heads, over which the fixed cost of a tile is shared.
    """
    options = []
    for axis in axes:
        sizes = {min(size, axis.query_length) for size in TILE_SIZES} | {axis.query_length}
        sizes |= {min(m * axis.stride, axis.query_length) for m in (1, 2, 4)}
        if axis.query_length > 1024:
            sizes = {size for size in sizes if size >= 64}
        options.append([(size, *tiling_cost(axis, size)) for size in sorted(sizes)])
    best, tile = math.inf, tuple(1 for _ in axes)
    for choice in product(*options):
        tiles = math.prod(count for _, count, _ in choice)
        pairs = math.prod(pairs for _, _, pairs in choice)
        largest = math.prod(size for size, _, _ in choice)
        cost = pairs * copies + tiles * TILE_OVERHEAD
        if pairs // tiles > SCORE_ELEMENTS and largest > 1:
            continue
        if cost < best:
            best, tile = cost, tuple(size for size, _, _ in choice)
    return tile


def _axis_view(values: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    """Put an (n, m) per-axis matrix where it broadcasts over (*queries, *keys)."""
    shape = [1] * (2 * rank)
    shape[axis], shape[rank + axis] = values.shape
    return values.reshape(shape)


def _mask(tiles: tuple[AxisTile, ...], device: torch.device) -> torch.Tensor | None:
    """(queries, keys) bool of one tile, or ``None`` where every query sees the whole box."""
    if all(tile.whole for tile in tiles):
        return None
    mask = torch.ones((), dtype=torch.bool, device="cpu")
    for axis, tile in enumerate(tiles):
        key = torch.arange(tile.size, device="cpu")
        start, stop = (torch.tensor(x, device="cpu") for x in (tile.start, tile.stop))
        seen = (key >= start[:, None]) & (key < stop[:, None])
        mask = mask & _axis_view(seen, axis, len(tiles))
    queries = math.prod(len(tile.place) for tile in tiles)
    return mask.reshape(queries, -1).to(device)


def _relative(tiles: tuple[AxisTile, ...], axes: tuple[Axis, ...]) -> torch.Tensor:
    """(queries, keys) flat index into the bias table, key minus query."""
    index = torch.zeros((), dtype=torch.long, device="cpu")
    for rank, (tile, axis) in enumerate(zip(tiles, axes, strict=True)):
        last = 2 * axis.window - 2
        place = torch.tensor(tile.place, device="cpu")
        steps = torch.arange(tile.size, device="cpu") - place[:, None] + axis.window - 1
        index = index * (last + 1) + _axis_view(steps.clamp(0, last), rank, len(tiles))
    queries = math.prod(len(tile.place) for tile in tiles)
    return index.reshape(queries, -1)


def _take(x: torch.Tensor, tiles: tuple[AxisTile, ...], keys: bool) -> torch.Tensor:
    """The tile's queries or keys of a (B, *grid, ...) tensor; a view unless queries are uneven."""
    for axis, tile in enumerate(tiles, start=1):
        where = tile.keys if keys else tile.queries
        if isinstance(where, torch.Tensor):
            x = x.index_select(axis, where.to(x.device))
        else:
            x = x.movedim(axis, 0)[where].movedim(0, axis)
    return x


def _put(target: torch.Tensor, tiles: tuple[AxisTile, ...], part: torch.Tensor) -> None:
    """Write a tile's queries into a (B, *grid, ...) tensor."""
    if all(isinstance(tile.queries, slice) for tile in tiles):
        _take(target, tiles, False).copy_(part)
        return
    flat = torch.zeros((), dtype=torch.long, device="cpu")
    for axis, tile in enumerate(tiles):
        index = torch.arange(target.shape[axis + 1], device="cpu")[tile.queries]
        flat = flat[..., None] * target.shape[axis + 1] + index
    last = len(tiles)
    target.flatten(1, last).index_copy_(1, flat.flatten().to(target.device), part.flatten(1, last))


class _Tiling:
    """The tiles of a problem and their masks, which most tiles share."""

    def __init__(
        self,
        axes: tuple[Axis, ...],
        batch: int,
        heads: int,
        rpb: torch.Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        tile: tuple[int, ...] | None,
    ):
        self.axes, self.rpb, self.device, self.dtype = axes, rpb, device, dtype
        self.batch, self.heads = batch, heads
        tile = tile or choose_tile(axes, batch * heads)
        self.tiles = list(
            product(*(axis_tiles(a, size) for a, size in zip(axes, tile, strict=True)))
        )
        self._biases: dict[tuple, torch.Tensor | None] = {}
        self._relative: dict[tuple, torch.Tensor] = {}

    @staticmethod
    def _shape(tiles: tuple[AxisTile, ...]) -> tuple:
        return tuple((tile.place, tile.start, tile.stop, tile.size) for tile in tiles)

    def items(self, tiles: tuple[AxisTile, ...]) -> list[slice]:
        """Batch slices small enough for their scores."""
        pairs = self.heads * math.prod(len(tile.place) * tile.size for tile in tiles)
        size = max(1, SCORE_ELEMENTS // max(1, pairs))
        return [slice(i, i + size) for i in range(0, self.batch, size)]

    def relative(self, tiles: tuple[AxisTile, ...]) -> torch.Tensor:
        shape = self._shape(tiles)
        if shape not in self._relative:
            self._relative[shape] = _relative(tiles, self.axes).to(self.device)
        return self._relative[shape]

    def bias(self, tiles: tuple[AxisTile, ...]) -> torch.Tensor | None:
        """(queries, keys) or, with rpb, (H, queries, keys) to add to the scaled scores."""
        shape = self._shape(tiles)
        if shape not in self._biases:
            mask = _mask(tiles, self.device)
            bias = None
            if self.rpb is not None:
                bias = self.rpb.to(self.dtype).flatten(1)[:, self.relative(tiles)]
                if mask is not None:
                    bias = bias.masked_fill(~mask, -torch.inf)
            elif mask is not None:
                bias = torch.zeros(mask.shape, dtype=self.dtype, device=self.device)
                bias = bias.masked_fill(~mask, -torch.inf)
            self._biases[shape] = bias
        return self._biases[shape]


def _rows(x: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, *tile, H, d) -> (B, Hk, H / Hk * queries, d), the query heads of a KV head in a row."""
    x = x.flatten(1, -3).unflatten(2, (kv_heads, -1))
    return x.permute(0, 2, 3, 1, 4).to(dtype).flatten(2, 3)


def _unrows(x: torch.Tensor, heads: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Inverse of :func:`_rows`; ``x`` may lack the last axis."""
    x = x.unflatten(2, (heads // x.shape[1], -1)).flatten(1, 2)
    return x.transpose(1, 2).unflatten(1, shape)


def _boxes(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, *box, Hk, d) -> (B, Hk, keys, d)."""
    return x.flatten(1, -3).transpose(1, 2).to(dtype)


def _add_bias(
    scores: torch.Tensor,
    bias: torch.Tensor | None,
    seen: torch.Tensor | None,
    groups: tuple[int, int],
) -> torch.Tensor:
    """Add mask, rpb and key mask to (B, Hk, G * queries, keys) scores in place."""
    if bias is not None:
        view = scores.unflatten(2, (groups[1], -1))
        view.add_(bias if bias.dim() == 2 else bias.unflatten(0, groups))
    if seen is not None:
        scores.masked_fill_(~seen.flatten(1)[:, None, None], -torch.inf)
    return scores


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    axes: tuple[Axis, ...],
    scale: float,
    tile: tuple[int, ...] | None = None,
    part: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, *grid, H, dv) and log-sum-exp (B, *grid, H) of the problem ``axes``.

    With ``part`` the output is not rounded to the dtype of ``query``.
    """
    batch, *grid, heads, _ = query.shape
    kv_heads = key.shape[-2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    tiling = _Tiling(axes, batch, heads, rpb, query.device, dtype, tile)
    out = query.new_empty(
        batch, *grid, heads, value.shape[-1], dtype=dtype if part else query.dtype
    )
    lse = torch.empty(batch, *grid, heads, dtype=dtype, device=query.device)
    guard = key_mask is not None
    for tiles in tiling.tiles:
        shape = tuple(len(one.place) for one in tiles)
        bias = tiling.bias(tiles)
        for item in tiling.items(tiles):
            q = _rows(_take(query[item], tiles, False), kv_heads, dtype) * scale
            k = _boxes(_take(key[item], tiles, True), dtype)
            v = _boxes(_take(value[item], tiles, True), dtype)
            seen = None if key_mask is None else _take(key_mask[item], tiles, True)
            scores = q @ k.transpose(-1, -2)
            _add_bias(scores, bias, seen, (kv_heads, heads // kv_heads))
            top = scores.amax(-1, keepdim=True)
            if guard:
                top = top.masked_fill(top == -torch.inf, 0.0)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            found = (weights @ v).div_(total.clamp_min(1e-30) if guard else total)
            _put(out[item], tiles, _unrows(found, heads, shape).to(out.dtype))
            _put(lse[item], tiles, _unrows((total.log() + top)[..., 0], heads, shape))
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
    part: bool = False,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key, value and rpb; the weights are recomputed from ``lse``.

    With ``part``, ``out`` and ``lse`` are those of an attention to more keys than these, and the
    gradient of ``query``, one term of a sum, is not rounded to its dtype. With ``deterministic`` all
    repeat bit by bit.
    """
    batch, heads, kv_heads = query.shape[0], query.shape[-2], key.shape[-2]
    groups = (kv_heads, heads // kv_heads)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    tiling = _Tiling(axes, batch, heads, rpb, query.device, dtype, tile)
    wide = dtype if part else query.dtype
    dq = torch.empty(query.shape, dtype=wide, device=query.device)
    dk = torch.zeros(key.shape, dtype=dtype, device=key.device)
    dv = torch.zeros(value.shape, dtype=dtype, device=value.device)
    drpb = None if rpb is None else torch.zeros(rpb.shape, dtype=dtype, device=rpb.device)
    # rounding of a 16-bit output would show where the weights of a row are nearly one and nothing,
    # so there the row's sum is formed from the weights instead, where all of them are here
    exact = out.dtype != dtype and not part
    shift = grad_lse
    if not exact:
        shift = grad_lse - (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    safe_lse = lse.masked_fill(lse == -torch.inf, 0.0)
    for tiles in tiling.tiles:
        shape = tuple(len(one.place) for one in tiles)
        bias = tiling.bias(tiles)
        for item in tiling.items(tiles):
            q = _rows(_take(query[item], tiles, False), kv_heads, dtype) * scale
            do = _rows(_take(grad_out[item], tiles, False), kv_heads, dtype)
            k = _boxes(_take(key[item], tiles, True), dtype)
            v = _boxes(_take(value[item], tiles, True), dtype)
            seen = None if key_mask is None else _take(key_mask[item], tiles, True)
            rows = _rows(_take(safe_lse[item], tiles, False)[..., None], kv_heads, dtype)
            delta = _rows(_take(shift[item], tiles, False)[..., None], kv_heads, dtype)
            scores = q @ k.transpose(-1, -2)
            _add_bias(scores, bias, seen, groups)
            weights = scores.sub_(rows).exp_()
            box = tuple(one.size for one in tiles)
            part = (weights.transpose(-1, -2) @ do).transpose(1, 2).unflatten(1, box)
            _take(dv[item], tiles, True).add_(part)
            ds = do @ v.transpose(-1, -2)
            if exact:
                delta = delta - (weights * ds).sum(-1, keepdim=True)
            ds = ds.add_(delta).mul_(weights)
            found = (ds @ k).mul_(scale)
            _put(dq[item], tiles, _unrows(found, heads, shape).to(dq.dtype))
            part = (ds.transpose(-1, -2) @ q).transpose(1, 2).unflatten(1, box)
            _take(dk[item], tiles, True).add_(part)
            if drpb is not None:
                summed = ds.unflatten(2, (groups[1], -1)).sum(0).flatten(0, 1).flatten(1)
                relative = tiling.relative(tiles).flatten()
                add_at(drpb.flatten(1), 1, relative, summed, deterministic)
    return (
        dq,
        dk.to(key.dtype),
        dv.to(value.dtype),
        None if drpb is None or rpb is None else drpb.to(rpb.dtype),
    )
