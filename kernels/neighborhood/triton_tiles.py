"""What the Triton kernels read: tiles, boxes and windows as small integer tables; tile shapes.

Nothing here imports Triton. Kernels work on three axes; lower ranks get leading axes of length one.
On an axis, queries with the same remainder modulo the dilation form a group and see one group of
keys; "place" counts inside the group of keys, "member" inside the group of queries.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product

import torch

from stvision.kernels.neighborhood.windows import Axis, axis_tables

#: columns of a tile table
TILE_COLUMNS = ("residue", "first", "group", "low", "high", "inner_low", "inner_high")


@dataclass(frozen=True)
class Tiles:
    """Shapes of one kernel: all extents powers of two.

    Args:
        query: queries of a tile per axis.
        key: keys of a box per axis.
        warps: warps of a program.
        stages: depth of the load pipeline.
        registers: most registers of a thread, 0 for no limit.
    """

    query: tuple[int, int, int]
    key: tuple[int, int, int]
    warps: int = 4
    stages: int = 2
    registers: int = 0

    def halved(self) -> "Tiles | None":
        """The larger of the two shapes halved on its longest axis; ``None`` where both hold 16."""
        shapes = [list(self.query), list(self.key)]
        large = max(shapes, key=math.prod)
        if math.prod(large) <= 16:
            return None
        large[large.index(max(large))] //= 2
        (a, b, c), (d, e, f) = shapes
        return replace(self, query=(a, b, c), key=(d, e, f), warps=min(4, self.warps))


def three_axes(axes: tuple[Axis, ...]) -> tuple[Axis, Axis, Axis]:
    """The problem with leading axes of one token."""
    filled = (Axis(1, 1, 1),) * (3 - len(axes)) + axes
    return filled[0], filled[1], filled[2]


def supports(axes: tuple[Axis, ...]) -> bool:
    """Whether queries of one remainder modulo the dilation see one group of keys."""
    return all(axis.dilation == 1 or axis.query_map == "index" for axis in axes)


def _groups(axis: Axis) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Residue of the queries, group of their keys, and the members' window starts and stops."""
    tables = axis_tables(axis)
    for residue in range(min(axis.dilation, axis.query_length)):
        members = slice(residue, None, axis.dilation)
        group = int(tables.group[residue])
        yield residue, group, tables.start[members], tables.stop[members]


@lru_cache(maxsize=512)
def query_tiles(axis: Axis, tile: int) -> torch.Tensor:
    """(tiles, 7) int32, one row per tile of ``tile`` queries: see ``TILE_COLUMNS``.

    ``first`` is a member, ``low``/``high`` the places of the box that holds every window of the
    tile, ``inner_low``/``inner_high`` the places that every query of the tile sees.
    """
    rows = []
    for residue, group, start, stop in _groups(axis):
        for first in range(0, len(start), tile):
            low, high = start[first : first + tile], stop[first : first + tile]
            box = (int(low.min()), int(high.max()), int(low.max()), int(high.min()))
            rows.append([residue, first, group, *box])
    return torch.tensor(rows, dtype=torch.int32, device="cpu")


@lru_cache(maxsize=512)
def key_tiles(axis: Axis, tile: int) -> torch.Tensor:
    """(tiles, 7) int32, one row per tile of ``tile`` keys: see ``TILE_COLUMNS``.

    ``first`` is a place, ``low``/``high`` the members that see any key of the tile,
    ``inner_low``/``inner_high`` the members that see all of it. Windows move forward with their
    query, so both are runs.
    """
    rows = []
    groups = {group: (residue, start, stop) for residue, group, start, stop in _groups(axis)}
    nobody = torch.empty(0, dtype=torch.long, device="cpu")
    for group in range(min(axis.dilation, axis.key_length)):
        residue, start, stop = groups.get(group, (0, nobody, nobody))
        length = (axis.key_length - group + axis.dilation - 1) // axis.dilation
        for first in range(0, length, tile):
            last = min(first + tile, length)
            row = [residue, first, group]
            for members in (
                ((start < last) & (stop > first)).nonzero().flatten(),
                ((start <= first) & (stop >= last)).nonzero().flatten(),
            ):
                row += [int(members[0]), int(members[-1]) + 1] if len(members) else [0, 0]
            rows.append(row)
    return torch.tensor(rows, dtype=torch.int32, device="cpu")


@lru_cache(maxsize=256)
def bounds(axis: Axis) -> torch.Tensor:
    """(3, query_length) int32: first visible place, place after the last, own place."""
    tables = axis_tables(axis)
    return torch.stack([tables.start, tables.stop, tables.place]).to(torch.int32)


# Never evicted: a captured graph, or a kernel on another stream, may still read the table.
@cache
def runs(axes: tuple[Axis, Axis, Axis], of_keys: bool, device: str) -> torch.Tensor:
    """Runs of the kernels in ``triton_boxes``: int32 first and past-the-last, axis after axis.

    The run of a query holds the keys that it sees, that of a key (``of_keys``) the queries that see
    it; neither end steps back from one token to the next. Dilation 1 only.
    """
    parts = []
    for axis in axes:
        tables = axis_tables(axis)
        start, stop = tables.start, tables.stop
        if of_keys:
            keys = torch.arange(axis.key_length, device="cpu")
            start, stop = (torch.searchsorted(x, keys, right=True) for x in (stop, start))
        parts += [start, stop]
    return torch.cat(parts).to(torch.int32).to(device)


@lru_cache(maxsize=4096)
def cuts(axis: Axis, rows: int, columns: int, of_keys: bool) -> bool:
    """Whether some row of some tile does not see all of a box on this axis; see :func:`runs`.

    Args:
        axis: the axis, dilation 1.
        rows: rows of a tile.
        columns: columns of a box; boxes begin where the first row's run does.
        of_keys: rows are keys and columns queries.
    """
    one = Axis(1, 1, 1)
    start, stop = runs((one, one, axis), of_keys, "cpu")[4:].view(2, -1)
    first = torch.arange(len(start), device="cpu") // rows * rows
    uneven = bool((start != start[first]).any() | (stop != stop[first]).any())
    return uneven or bool(((stop - start) % columns).any())


# never evicted, as above
@cache
def on_device(
    axes: tuple[Axis, Axis, Axis], tile: tuple[int, int, int], kind: str, device: str
) -> tuple[torch.Tensor, ...]:
    """The three tile tables (``kind`` ``"query"`` or ``"key"``) or bounds, on the device."""
    if kind == "bounds":
        return tuple(bounds(axis).to(device) for axis in axes)
    build = query_tiles if kind == "query" else key_tiles
    return tuple(build(axis, size).to(device) for axis, size in zip(axes, tile, strict=True))


@lru_cache(maxsize=4096)
def _axis_work(axis: Axis, query: int, key: int) -> int:
    """Pairs that a query tile size and a key box size compute on one axis, padding included."""
    table = query_tiles(axis, query)
    boxes = (table[:, 4] - table[:, 3] + key - 1) // key
    return query * key * int(boxes.sum())


def _shapes(tokens: int, axes: tuple[Axis, ...], keys: bool) -> list[tuple[int, int, int]]:
    """All boxes of ``tokens`` tokens with extents that make sense for the grid."""
    limits = []
    for axis in axes:
        length = axis.key_length if keys else axis.query_length
        limits.append(1 << (max(1, -(-length // axis.dilation)) - 1).bit_length())
    sizes = [1 << i for i in range(tokens.bit_length())]
    found = []
    for t, h in product(sizes, sizes):
        if tokens % (t * h) == 0:
            shape = (t, h, tokens // (t * h))
            if all(size <= limit for size, limit in zip(shape, limits, strict=True)):
                found.append(shape)
    # a grid smaller than the tile still needs one shape
    return found or [(1, 1, tokens)]


@lru_cache(maxsize=256)
def ranked_tiles(
    axes: tuple[Axis, Axis, Axis], head_dim: int, element_size: int
) -> tuple[Tiles, ...]:
    """Shapes by the pairs that they compute, weighted by how well a size feeds the tensor cores.

    Args:
        axes: the problem.
        head_dim: the larger head size of key and value.
        element_size: bytes of an element.
    """
    room = head_dim * element_size
    if room > 512:
        sizes = [(64, 16, 1.0), (32, 32, 1.0)]
    elif room > 256:
        sizes = [(64, 64, 1.0), (64, 32, 1.05)]
    else:
        sizes = [(128, 128, 1.0), (128, 64, 1.03), (64, 64, 1.15)]
    found = []
    for queries, keys, weight in sizes:
        for query, key in product(_shapes(queries, axes, False), _shapes(keys, axes, True)):
            work = weight * math.prod(
                _axis_work(*one) for one in zip(axes, query, key, strict=True)
            )
            warps = 8 if queries * keys >= 128 * 128 or head_dim >= 128 else 4
            found.append((work, Tiles(query, key, warps, 2 if room > 256 else 3)))
    found.sort(key=lambda one: one[0])
    return tuple(tiles for _, tiles in found)


def choose_tiles(axes: tuple[Axis, Axis, Axis], head_dim: int, element_size: int) -> Tiles:
    """The first of :func:`ranked_tiles`."""
    return ranked_tiles(axes, head_dim, element_size)[0]
