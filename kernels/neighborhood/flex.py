"""Neighborhood attention through FlexAttention, with tokens permuted into tiles.

In row-major order the windows of 128 neighbouring tokens touch most blocks of keys. So tokens are
first re-ordered tile by tile, tiles of ``block`` tokens, and the block mask follows from the axes:
a pair of tiles is visible when their intervals meet on every axis. On the CPU only the forward
exists, without tiling speed; on a GPU the operator is compiled.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils._python_dispatch import _disable_current_modes

from stvision.kernels.neighborhood.windows import Axis, axis_tables

#: query and key tiles per rank, 128 tokens
TILES = {1: (128,), 2: (8, 16), 3: (4, 4, 8)}


class _Side:
    """One side's order of tokens on one axis: by dilation group, each padded to whole tiles."""

    def __init__(self, group: torch.Tensor, tile: int, groups: int):
        order = []
        for one in range(groups):
            members = (group == one).nonzero().flatten()
            padding = members.new_full((-len(members) % tile,), -1)
            order += [members, padding]
        self.order = torch.cat(order)
        self.tiles = len(self.order) // tile


def _axis_pairs(
    axis: Axis, query_tile: int, key_tile: int
) -> tuple[_Side, _Side, tuple[torch.Tensor, ...], torch.Tensor]:
    """Token orders of one axis, its tables in that order, and its visibility tile by tile."""
    tables = axis_tables(axis)
    keys = torch.arange(axis.key_length, device="cpu")
    query = _Side(tables.group, query_tile, axis.dilation)
    key = _Side(keys % axis.dilation, key_tile, axis.dilation)
    # a padded query or key belongs to no group, so it sees and is seen by nothing
    q, k = query.order.clamp_min(0), key.order.clamp_min(0)
    group = torch.where(query.order < 0, -1, tables.group[q])
    start, stop = tables.start[q], tables.stop[q]
    key_group = torch.where(key.order < 0, -2, k % axis.dilation)
    place = k // axis.dilation
    seen = (group[:, None] == key_group) & (place >= start[:, None]) & (place < stop[:, None])
    tiled = seen.reshape(query.tiles, query_tile, key.tiles, key_tile)
    return query, key, (group, start, stop, key_group, place), tiled


class _Plan(NamedTuple):
    """All that FlexAttention needs to know of a problem, on the device."""

    query_order: torch.Tensor
    key_order: torch.Tensor
    back: torch.Tensor
    visible: Callable[..., torch.Tensor]
    partial: tuple[torch.Tensor, torch.Tensor]
    full: tuple[torch.Tensor, torch.Tensor]
    partial_or_full: tuple[torch.Tensor, torch.Tensor]

    def block_mask(self, key_mask: torch.Tensor | None, blocks: tuple[int, int]) -> BlockMask:
        """The block mask, with a (B, keys) mask of real keys in tile order or without."""
        lengths = (len(self.query_order), len(self.key_order))
        if key_mask is None:
            return BlockMask.from_kv_blocks(
                *self.partial,
                *self.full,
                BLOCK_SIZE=blocks,
                mask_mod=self.visible,
                seq_lengths=lengths,
            )
        visible = self.visible

        def visible_and_real(batch, head, query, key):
            return visible(batch, head, query, key) & key_mask[batch, key]

        # blocks that the windows fill may hold masked keys now: none counts as wholly visible
        return BlockMask.from_kv_blocks(
            *self.partial_or_full,
            BLOCK_SIZE=blocks,
            mask_mod=visible_and_real,
            seq_lengths=lengths,
        )


def _flat_order(
    orders: list[torch.Tensor], tile: tuple[int, ...], lengths: list[int]
) -> torch.Tensor:
    """Flat grid index of every token in tile order, -1 for padding."""
    index = torch.zeros((), dtype=torch.long, device="cpu")
    exists = torch.ones((), dtype=torch.bool, device="cpu")
    for a, (order, length) in enumerate(zip(orders, lengths, strict=True)):
        shape = [1] * (2 * len(tile))
        shape[a], shape[len(tile) + a] = len(order) // tile[a], tile[a]
        index = index * length + order.clamp_min(0).reshape(shape)
        exists = exists & (order >= 0).reshape(shape)
    return torch.where(exists, index, -1).flatten()


def _spread(values: torch.Tensor, a: int, tiles: list[int], tile: tuple[int, ...]) -> torch.Tensor:
    """A table of axis ``a``, repeated for every token in tile order."""
    shape = [1] * (2 * len(tile))
    shape[a], shape[len(tile) + a] = tiles[a], tile[a]
    return values.reshape(shape).expand(*tiles, *tile).flatten().to(torch.int32)


def _ragged(blocks: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Number and indices of the true entries of each row, as FlexAttention lists them."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return (
        blocks.sum(1).to(device, torch.int32)[None, None],
        order.to(device, torch.int32).contiguous()[None, None],
    )


@lru_cache(maxsize=32)
def _plan(
    axes: tuple[Axis, ...], query_tile: tuple[int, ...], key_tile: tuple[int, ...], device: str
) -> _Plan:
    sides = [_axis_pairs(*one) for one in zip(axes, query_tile, key_tile, strict=True)]
    query_order = _flat_order(
        [s[0].order for s in sides], query_tile, [a.query_length for a in axes]
    )
    key_order = _flat_order([s[1].order for s in sides], key_tile, [a.key_length for a in axes])
    query_tiles, key_tiles = [s[0].tiles for s in sides], [s[1].tiles for s in sides]
    tables = []
    some = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    every = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for a, (_, _, (group, start, stop, key_group, place), tiled) in enumerate(sides):
        of_queries = [_spread(x, a, query_tiles, query_tile) for x in (group, start, stop)]
        of_keys = [_spread(x, a, key_tiles, key_tile) for x in (key_group, place)]
        tables.append([x.to(device) for x in (*of_queries, *of_keys)])
        some = torch.kron(some, tiled.any(3).any(1))
        every = torch.kron(every, tiled.all(3).all(1))

    def visible(batch, head, query, key):
        seen = query >= 0
        for group, start, stop, key_group, place in tables:
            at = place[key]
            seen = seen & (group[query] == key_group[key])
            seen = seen & (at >= start[query]) & (at < stop[query])
        return seen

    back = torch.empty(math.prod(a.query_length for a in axes), dtype=torch.long, device="cpu")
    back[query_order[query_order >= 0]] = (query_order >= 0).nonzero().flatten()
    return _Plan(
        query_order.to(device),
        key_order.to(device),
        back.to(device),
        visible,
        _ragged(some & ~every, device),
        _ragged(every, device),
        _ragged(some, device),
    )


def _kept_plan(axes: tuple[Axis, ...], tile: tuple[int, ...], device: torch.device) -> _Plan:
    """The plan, which is kept, so it must be built outside of any mode that is on for one call."""
    with torch.inference_mode(False), torch.device("cpu"), _disable_current_modes():
        return _plan(axes, tile, tile, str(device))


#: problems of one process that FlexAttention is compiled for
MOST_PROBLEMS = 1024


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def compiled_flex(*arguments: Any, **options: Any) -> Any:
    """FlexAttention compiled for these sizes.

    After eight sizes the compiler gives up by default, and FlexAttention then runs without a kernel
    and keeps the whole score matrix.
    """
    import torch._dynamo

    limits = {"recompile_limit": MOST_PROBLEMS, "accumulated_recompile_limit": MOST_PROBLEMS}
    with torch._dynamo.config.patch(limits):
        return _compiled()(*arguments, **options)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    axes: tuple[Axis, ...],
    scale: float,
    tile: tuple[int, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp; ``tile`` is the tile of queries and of keys, 128 tokens or more."""
    grid, heads = query.shape[1:-2], query.shape[-2]
    tile = tile or TILES[len(axes)]
    plan = _kept_plan(axes, tile, query.device)

    def tiled(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return x.flatten(1, -3).index_select(1, order.clamp_min(0)).transpose(1, 2)

    if key_mask is not None:
        key_mask = key_mask.flatten(1)[:, plan.key_order.clamp_min(0)]
    run: Any = flex_attention if query.device.type == "cpu" else compiled_flex
    out, aux = run(
        tiled(query, plan.query_order),
        tiled(key, plan.key_order),
        tiled(value, plan.key_order),
        block_mask=plan.block_mask(key_mask, (math.prod(tile), math.prod(tile))),
        scale=scale,
        enable_gqa=heads != key.shape[-2],
        return_aux=AuxRequest(lse=True),
    )
    out = out.transpose(1, 2).index_select(1, plan.back).unflatten(1, grid)
    return out, aux.lse.transpose(1, 2).index_select(1, plan.back).unflatten(1, grid)
