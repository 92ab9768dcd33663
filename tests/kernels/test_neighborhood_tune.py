"""Shapes of the box kernels: the model, the cache on disk and the tune command; no GPU needed."""

import math
from pathlib import Path

import pytest
import torch

from stvision.kernels.neighborhood import triton_config, tune
from stvision.kernels.neighborhood.problem import build_axes
from stvision.kernels.neighborhood.triton_tiles import Tiles, cuts, ranked_tiles, runs, three_axes
from stvision.kernels.neighborhood.windows import Axis, visible_keys

AXES = three_axes(build_axes((12, 64, 64), (12, 64, 64), kernel_size=(5, 9, 9))[0])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STVISION_CACHE", str(tmp_path))
    triton_config._tuned.cache_clear()
    triton_config.shapes.cache_clear()
    yield
    triton_config._tuned.cache_clear()
    triton_config.shapes.cache_clear()


@pytest.mark.parametrize(
    "axis",
    [
        Axis(11, 11, 4),
        Axis(11, 11, 5, 3),
        Axis(11, 11, 4, 4, 1, True),
        Axis(5, 11, 4, 2, 1, False, 3),
        Axis(7, 3, 2, query_map="center"),
        Axis(3, 9, 12, query_map="start"),
    ],
)
def test_runs_are_the_visible_pairs(axis: Axis) -> None:
    one = Axis(1, 1, 1)
    of_queries = runs((one, one, axis), False, "cpu")[4:].view(2, axis.query_length)
    of_keys = runs((one, one, axis), True, "cpu")[4:].view(2, axis.key_length)
    wanted = torch.zeros(axis.query_length, axis.key_length, dtype=torch.bool)
    for query in range(axis.query_length):
        wanted[query, list(visible_keys(axis, query))] = True
    key, query = torch.arange(axis.key_length), torch.arange(axis.query_length)
    found = (key >= of_queries[0, :, None]) & (key < of_queries[1, :, None])
    assert torch.equal(found, wanted)
    found = (query >= of_keys[0, :, None]) & (query < of_keys[1, :, None])
    assert torch.equal(found.T, wanted)
    assert bool((of_keys.diff() >= 0).all()) and bool((of_queries.diff() >= 0).all())


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "axis",
    [
        Axis(12, 12, 4, 4),
        Axis(12, 12, 6, 2),
        Axis(12, 12, 12),
        Axis(10, 10, 4, 2),
        Axis(7, 7, 3),
        Axis(8, 8, 4, 4, 1, True),
        Axis(1, 1, 1),
    ],
)
def test_masks_are_left_out_only_where_all_boxes_are_whole(
    axis: Axis, rows: int, columns: int
) -> None:
    seen = torch.zeros(axis.query_length, axis.key_length, dtype=torch.bool)
    for query in range(axis.query_length):
        seen[query, list(visible_keys(axis, query))] = True
    for of_keys, table in ((False, seen), (True, seen.T)):
        whole = True
        for first in range(0, len(table), rows):
            tile = table[first : first + rows]
            union = tile.any(0).nonzero().flatten().tolist()
            for low in range(union[0], union[-1] + 1, columns):
                box = torch.zeros(len(tile), columns, dtype=torch.bool)
                part = tile[:, low : low + columns]
                box[:, : part.shape[1]] = part
                whole &= bool(box.all())
        assert cuts(axis, rows, columns, of_keys) == (not whole)


@pytest.mark.parametrize("kernel", triton_config.KERNELS)
@pytest.mark.parametrize("dim", [32, 40, 128, 160, 256])
def test_candidates_are_ordered_by_their_pairs(kernel: str, dim: int) -> None:
    found = triton_config.candidates(kernel, AXES, dim, 2)
    assert found and len(set(found)) == len(found)
    of_keys = kernel in {"key", "once"}
    pairs = []
    for tiles in found:
        rows, columns = (tiles.key, tiles.query) if of_keys else (tiles.query, tiles.key)
        number = 1
        for axis, r, c in zip(AXES, rows, columns, strict=True):
            table = runs((Axis(1, 1, 1), Axis(1, 1, 1), axis), of_keys, "cpu")[4:].view(2, -1)
            number *= sum(
                r * c * -(-int(table[1, min(i + r, table.shape[1]) - 1] - table[0, i]) // c)
                for i in range(0, table.shape[1], r)
            )
        pairs.append(number)
    exact = math.prod(axis.query_length * axis.window for axis in AXES)
    assert all(number >= exact for number in pairs)
    assert pairs[0] <= 1.5 * min(pairs)


def test_cache_forced_and_shipped_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    key = triton_config.problem_key("forward", AXES, 64, 2)
    assert key == "forward 12:5 64:9 64:9 d64 b2"
    model = triton_config.shapes("forward", AXES, 64, 2, "A GPU")
    shipped, tuned = Tiles((1, 8, 8), (1, 8, 8), 4, 2), Tiles((2, 4, 8), (1, 8, 16), 8, 3, 128)
    monkeypatch.setitem(triton_config.SHIPPED, key, shipped)
    triton_config.shapes.cache_clear()
    assert triton_config.shapes("forward", AXES, 64, 2, "A GPU") == shipped != model
    path = triton_config.save("A GPU", key, tuned)
    assert path.name == "a-gpu.json"
    assert triton_config.shapes("forward", AXES, 64, 2, "A GPU") == tuned
    assert triton_config.shapes("forward", AXES, 64, 2, "Another") == shipped
    with triton_config.forced(forward=shipped):
        assert triton_config.shapes("forward", AXES, 64, 2, "A GPU") == shipped
    assert triton_config.shapes("forward", AXES, 64, 2, "A GPU") == tuned
    wrong = ("[1, 2]", "[3, 5, 7, 1, 8, 8, 4, 2, 0]", "[0, 0, 0, 1, 8, 8, 4, 2, 0]", '"fast"')
    for text in (*(f'{{"{key}": {row}}}' for row in wrong), "[1, 2]", "{", ""):
        path.write_text(text)
        triton_config._tuned.cache_clear()
        triton_config.shapes.cache_clear()
        assert triton_config.shapes("forward", AXES, 64, 2, "A GPU") == shipped


def test_one_pass_only_where_it_was_measured() -> None:
    key = triton_config.problem_key("once", AXES, 64, 2)
    assert triton_config.shapes("once", AXES, 64, 2, "A GPU") is None
    tuned = Tiles((2, 4, 8), (1, 8, 16), 8, 3)
    triton_config.save("A GPU", key, tuned)
    assert triton_config.shapes("once", AXES, 64, 2, "A GPU") == tuned
    triton_config.save("A GPU", key, None)
    assert triton_config.shapes("once", AXES, 64, 2, "A GPU") is None
    with triton_config.forced(once=tuned):
        assert triton_config.shapes("once", AXES, 64, 2, "A GPU") == tuned


def test_variants_hold_the_favourite_of_the_model() -> None:
    problem = tune.Problem(1, (12, 64, 64), 8, 64, (5, 9, 9))
    for kernel in triton_config.KERNELS:
        best = triton_config.candidates(kernel, problem.axes, 64, 2)[0]
        found = tune.variants(kernel, problem, 2)
        assert any((t.query, t.key) == (best.query, best.key) for t in found)


def test_command_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    from stvision.cli.main import main

    sizes = ["--heads", "2", "--head-dim", "64"]
    assert main(["tune", "--grid", "4,4", "--window", "7", *sizes]) == 2
    assert "kernel_size 7 is larger than axis 0 (height)" in capsys.readouterr().err


def test_command_refuses_bad_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--heads", "2", "--head-dim", "64"]
    assert tune.main(["--grid", "4,4", "--window", "7", *sizes]) == 2
    assert "kernel_size 7 is larger than axis 0 (height)" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert tune.main(["--grid", "8,8", "--window", "7", *sizes]) == 2
        assert "needs a GPU of NVIDIA or AMD" in capsys.readouterr().err
    for options, message in (
        (["--grid", "1,2,3,4", "--window", "1", *sizes], "--grid takes one to three sizes"),
        (["--grid", "8,0", "--window", "1", *sizes], "--grid takes one to three sizes"),
        (["--grid", "8", "--window", "3", "--heads", "3", "--head-dim", "0"], "--head-dim must be"),
        (["--grid", "8", "--window", "3", *sizes, "--kv-heads", "4"], "must divide --heads"),
        (["--grid", "8,8", "--window", "3", "--dilation", "3", *sizes], "dilation 3 = 9 is larger"),
    ):
        assert tune.main(options) == 2
        assert message in capsys.readouterr().err


def test_shapes_of_pointers_are_named_with_their_dilation() -> None:
    problem = tune.Problem(1, (12, 64, 64), 8, 64, (3, 5, 5), dilation=(1, 2, 4))
    key = triton_config.problem_key("pointers", problem.axes, 64, 2)
    assert key == "pointers 12:3 64:5x2 64:5x4 d64 b2"
    assert triton_config.pointer_shapes("pointers", problem.axes, 64, 2, "A GPU") is None
    for kernel in triton_config.POINTER_KERNELS:
        found = tune.variants(kernel, problem, 2)
        assert len(set(found)) == len(found) >= 12
        size = 64 if kernel == "pointers" else 128
        best = ranked_tiles(problem.axes, size, 2)[0]
        assert any((t.query, t.key) == (best.query, best.key) for t in found)
    tuned = Tiles((1, 8, 8), (1, 8, 8), 8, 1)
    triton_config.save("A GPU", key, tuned)
    assert triton_config.pointer_shapes("pointers", problem.axes, 64, 2, "A GPU") == tuned
    with triton_config.forced(pointers=None):
        assert triton_config.pointer_shapes("pointers", problem.axes, 64, 2, "A GPU") is None
