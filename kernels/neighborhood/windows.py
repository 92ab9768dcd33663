"""Which keys a query sees: exact integer arithmetic, one axis at a time.

The visible set of a query on a grid is the product of one set per axis, so everything here is about
a single axis. Definitions follow "Faster Neighborhood Attention" (arXiv 2403.04690, section 3) for
windows and dilation and "Generalized Neighborhood Attention" (arXiv 2504.16922, section 3) for the
stride; borders shift a window, they never shorten it.

An axis with dilation ``D`` falls into ``D`` groups of tokens ``g, g + D, g + 2 D, ...`` that do not
see each other. Inside a group a token has a *place* 0, 1, 2, ...; windows are runs of places.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

QueryMap = Literal["index", "center", "start"]
QUERY_MAPS: tuple[QueryMap, ...] = ("index", "center", "start")


@dataclass(frozen=True)
class Axis:
    """One axis of a neighborhood attention problem.

    Args:
        query_length: queries on this axis.
        key_length: keys on this axis.
        window: keys a query sees (``kernel_size`` of the public functions).
        stride: neighbouring queries that share one window.
        dilation: distance between neighbouring visible keys.
        causal: a query sees no key after itself.
        offset: with ``query_map="index"``, query ``i`` stands at key position ``i + offset``.
        query_map: where a query stands on the key axis: ``"index"`` at ``i + offset``,
            ``"center"`` at the key whose cell holds the centre of the query's cell,
            ``"start"`` at the key whose cell holds the start of the query's cell.
    """

    query_length: int
    key_length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    offset: int = 0
    query_map: QueryMap = "index"

    def encode(self) -> list[int]:
        """The axis as eight integers, the form that a custom operator's schema takes."""
        return [
            self.query_length,
            self.key_length,
            self.window,
            self.stride,
            self.dilation,
            int(self.causal),
            self.offset,
            QUERY_MAPS.index(self.query_map),
        ]

    @property
    def is_full(self) -> bool:
        """Every query sees every key."""
        return not self.causal and self.dilation == 1 and self.window >= self.key_length


def decode_axes(numbers: list[int] | tuple[int, ...]) -> tuple[Axis, ...]:
    """Inverse of :meth:`Axis.encode` for the concatenated numbers of all axes."""
    return tuple(
        Axis(queries, keys, window, stride, dilation, bool(causal), offset, QUERY_MAPS[rule])
        for queries, keys, window, stride, dilation, causal, offset, rule in (
            numbers[i : i + 8] for i in range(0, len(numbers), 8)
        )
    )


def key_position(axis: Axis, query: int) -> int:
    """Where query ``query`` stands on the key axis."""
    if axis.query_map == "center":
        return (2 * query + 1) * axis.key_length // (2 * axis.query_length)
    if axis.query_map == "start":
        return query * axis.key_length // axis.query_length
    return query + axis.offset


def window_places(axis: Axis, place: int, length: int) -> tuple[int, int]:
    """First place and the place after the last that a query at ``place`` sees.

    Args:
        axis: the axis.
        place: place of the query inside its dilation group.
        length: tokens of that group.
    """
    first_of_stride_group = place // axis.stride * axis.stride
    if axis.causal:
        leader = min(first_of_stride_group + axis.stride - 1, length - 1)
        return max(leader - axis.window + 1, 0), place + 1
    leader = min(first_of_stride_group + axis.stride // 2, length - 1)
    start = max(min(leader - axis.window // 2, length - axis.window), 0)
    return start, min(start + axis.window, length)


def visible_keys(axis: Axis, query: int) -> range:
    """The keys that ``query`` sees on this axis, as a range of key positions."""
    position = key_position(axis, query)
    group, place = position % axis.dilation, position // axis.dilation
    length = (axis.key_length - group + axis.dilation - 1) // axis.dilation
    start, stop = window_places(axis, place, length)
    return range(group + start * axis.dilation, group + stop * axis.dilation, axis.dilation)


class AxisTables(NamedTuple):
    """:func:`visible_keys` for all queries of an axis at once; int64 tensors of (query_length,)."""

    group: torch.Tensor
    place: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor


@lru_cache(maxsize=256)
def axis_tables(axis: Axis) -> AxisTables:
    """Dilation group, place, and window (start and stop place) of every query, on the CPU."""
    query = torch.arange(axis.query_length, device="cpu")
    if axis.query_map == "center":
        position = (2 * query + 1) * axis.key_length // (2 * axis.query_length)
    elif axis.query_map == "start":
        position = query * axis.key_length // axis.query_length
    else:
        position = query + axis.offset
    group, place = position % axis.dilation, position // axis.dilation
    length = (axis.key_length - group + axis.dilation - 1) // axis.dilation
    first = place // axis.stride * axis.stride
    if axis.causal:
        leader = torch.minimum(first + axis.stride - 1, length - 1)
        start, stop = (leader - axis.window + 1).clamp_min(0), place + 1
    else:
        leader = torch.minimum(first + axis.stride // 2, length - 1)
        start = torch.minimum(leader - axis.window // 2, length - axis.window).clamp_min(0)
        stop = torch.minimum(start + axis.window, length)
    return AxisTables(group, place, start, stop)


class AxisTile(NamedTuple):
    """Neighbouring queries of one dilation group and the box of keys that holds their windows.

    Attributes:
        queries: query positions, a slice or, where queries are unevenly spread, an index tensor.
        keys: key positions, always a slice.
        place: (n,) place of each query minus the box's first place.
        start: (n,) first visible key of each query, counted in the box.
        stop: (n,) key after the last visible one, counted in the box.
        size: keys in the box.
    """

    queries: slice | torch.Tensor
    keys: slice
    place: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    size: int

    @property
    def whole(self) -> bool:
        """Every query of the tile sees the whole box."""
        return not any(self.start) and min(self.stop) == self.size


@lru_cache(maxsize=1024)
def axis_tiles(axis: Axis, tile: int) -> tuple[AxisTile, ...]:
    """Cut an axis into tiles of at most ``tile`` queries of one dilation group each."""
    tables = axis_tables(axis)
    tiles = []
    for group in range(axis.dilation):
        members = (tables.group == group).nonzero().flatten()
        for chunk in members.split(tile):
            if not len(chunk):
                continue
            start, stop = tables.start[chunk], tables.stop[chunk]
            low, high = int(start.min()), int(stop.max())
            first, last = int(chunk[0]), int(chunk[-1])
            step = int(chunk[1]) - first if len(chunk) > 1 else 1
            even = torch.equal(chunk, torch.arange(first, last + 1, step, device="cpu"))
            tiles.append(
                AxisTile(
                    slice(first, last + 1, step) if even else chunk,
                    slice(
                        group + low * axis.dilation,
                        group + (high - 1) * axis.dilation + 1,
                        axis.dilation,
                    ),
                    tuple((tables.place[chunk] - low).tolist()),
                    tuple((start - low).tolist()),
                    tuple((stop - low).tolist()),
                    high - low,
                )
            )
    return tuple(tiles)


@lru_cache(maxsize=1024)
def tiling_cost(axis: Axis, tile: int) -> tuple[int, int]:
    """Tiles of :func:`axis_tiles`, and the query-key pairs they compute on this axis."""
    tiles = axis_tiles(axis, tile)
    return len(tiles), sum(len(one.place) * one.size for one in tiles)
