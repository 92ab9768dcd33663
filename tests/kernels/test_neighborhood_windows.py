"""The integer arithmetic of windows against a restatement from token lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stvision.kernels.neighborhood.triton_tiles import bounds, key_tiles, query_tiles
from stvision.kernels.neighborhood.windows import (
    Axis,
    axis_tables,
    axis_tiles,
    decode_axes,
    tiling_cost,
    visible_keys,
)


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    length = draw(st.integers(1, 40))
    window = draw(st.integers(1, length))
    return Axis(
        length,
        length,
        window,
        draw(st.integers(1, window)),
        draw(st.integers(1, length // window)),
        draw(st.booleans()),
    )


def restated(axis: Axis, query: int) -> list[int]:
    """The visible tokens, from lists of tokens instead of arithmetic."""
    group = [i for i in range(axis.key_length) if (i - query) % axis.dilation == 0]
    shared = next(
        part
        for part in (group[i : i + axis.stride] for i in range(0, len(group), axis.stride))
        if query in part
    )
    if axis.causal:
        before = [i for i in group if i <= shared[-1]][-axis.window :]
        return [i for i in before if i <= query]
    middle = shared[axis.stride // 2] if len(shared) > axis.stride // 2 else shared[-1]
    wanted = group.index(middle) - axis.window // 2
    starts = range(len(group) - axis.window + 1)
    start = min(starts, key=lambda candidate: abs(candidate - wanted))
    return group[start : start + axis.window]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(axes())
def test_visible_keys_are_the_restated_ones(axis: Axis) -> None:
    tables = axis_tables(axis)
    for query in range(axis.query_length):
        keys = list(visible_keys(axis, query))
        assert keys == restated(axis, query)
        if not axis.causal:
            assert len(keys) == axis.window
        group, start, stop = (int(t[query]) for t in (tables.group, tables.start, tables.stop))
        assert keys == [group + place * axis.dilation for place in range(start, stop)]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(axes(), st.integers(1, 9))
def test_tiles_cover_every_query_once_and_hold_its_keys(axis: Axis, size: int) -> None:
    seen: list[int] = []
    pairs = 0
    for tile in axis_tiles(axis, size):
        queries = torch.arange(axis.query_length)[tile.queries].tolist()
        box = list(range(axis.key_length))[tile.keys]
        assert len(box) == tile.size
        pairs += len(queries) * len(box)
        seen += queries
        for query, start, stop in zip(queries, tile.start, tile.stop, strict=True):
            assert box[start:stop] == list(visible_keys(axis, query))
    assert sorted(seen) == list(range(axis.query_length))
    assert tiling_cost(axis, size) == (len(axis_tiles(axis, size)), pairs)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(axes(), st.sampled_from([1, 2, 4, 8]))
def test_kernel_tables_hold_the_same_pairs_both_ways(axis: Axis, size: int) -> None:
    """Query tiles with their key boxes and key tiles with their query boxes see the same pairs."""
    start, stop, _ = bounds(axis).tolist()
    step = axis.dilation
    exact = {(i, j) for i in range(axis.query_length) for j in visible_keys(axis, i)}
    forward, whole = set(), set()
    for residue, first, group, low, high, all_low, all_high in query_tiles(axis, size).tolist():
        members = [residue + m * step for m in range(first, first + size)]
        for i in (i for i in members if i < axis.query_length):
            for place in range(low, high):
                if start[i] <= place < stop[i]:
                    forward.add((i, group + place * step))
                if all_low <= place < all_high:
                    whole.add((i, group + place * step))
    assert forward == exact
    assert whole <= exact
    backward, whole = set(), set()
    for residue, first, group, low, high, all_low, all_high in key_tiles(axis, size).tolist():
        places = [p for p in range(first, first + size) if group + p * step < axis.key_length]
        for place in places:
            for i in (residue + m * step for m in range(low, high)):
                if start[i] <= place < stop[i]:
                    backward.add((i, group + place * step))
            for i in (residue + m * step for m in range(all_low, all_high)):
                whole.add((i, group + place * step))
    assert backward == exact
    assert whole <= exact


def test_encoding_returns_the_same_axes() -> None:
    both = (Axis(5, 7, 3, 2, 1, True, 1, "index"), Axis(4, 8, 2, query_map="center"))
    assert decode_axes([n for axis in both for n in axis.encode()]) == both


@pytest.mark.parametrize(
    ("axis", "query", "keys"),
    [
        (Axis(8, 8, 4), 4, [2, 3, 4, 5]),  # an even window leans left
        (Axis(8, 8, 3), 0, [0, 1, 2]),  # a border shifts the window
        (Axis(8, 8, 3, 2), 4, [4, 5, 6]),  # an even stride takes the right-hand middle
        (Axis(8, 8, 3, 3, 1, True), 3, [3]),  # a causal stride shows fewer keys than the window
        (Axis(9, 9, 3, 1, 3), 1, [1, 4, 7]),
        (Axis(4, 8, 3, query_map="center"), 0, [0, 1, 2]),
        (Axis(4, 8, 3, query_map="center"), 2, [4, 5, 6]),
        (Axis(4, 8, 3, query_map="start"), 2, [3, 4, 5]),
    ],
)
def test_examples_by_hand(axis: Axis, query: int, keys: list[int]) -> None:
    assert list(visible_keys(axis, query)) == keys
