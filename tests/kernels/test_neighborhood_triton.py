"""The Triton kernels: through the interpreter on a CPU, compiled where there is a GPU.

The interpreter has no bfloat16 products, so float32 and float16 stand for all types there.
"""

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support_neighborhood import Problem, check, problems, relative_error

from stvision.kernels.neighborhood import na2d, na3d, neighborhood_attention_generic
from stvision.kernels.neighborhood.choice import interpreted
from stvision.kernels.neighborhood.problem import build_axes
from stvision.kernels.neighborhood.reference import dense_attention
from stvision.kernels.neighborhood.triton_tiles import choose_tiles, three_axes

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if not torch.cuda.is_available() and not interpreted():
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(dtype: torch.dtype, problem: Problem, **options: Any) -> None:
    problem.build(dtype, DEVICE)
    call = neighborhood_attention_generic
    check(problem, call, dtype, backend="triton", **options)


W3 = {"kernel_size": (2, 3, 3)}
CASES = {
    "shifted windows": Problem(0, 1, (3, 5, 4), 2, 2, 16, 16, W3),
    "grouped, batch, head sizes 40 and 24": Problem(1, 2, (3, 4, 5), 2, 1, 40, 24, W3),
    "dilation": Problem(2, 1, (5, 7), 2, 2, 16, 16, {"kernel_size": (2, 3), "dilation": (2, 2)}),
    "stride": Problem(3, 1, (6, 7), 2, 1, 16, 16, {"kernel_size": (4, 3), "stride": (4, 2)}),
    "causal": Problem(
        4, 1, (3, 4, 4), 1, 1, 16, 16, W3 | {"is_causal": (True, False, True), "stride": (2, 1, 2)}
    ),
    "one axis, tokens": Problem(5, 1, (37,), 2, 2, 8, 8, {"kernel_size": (6,)}, tokens=3),
    "key mask": Problem(6, 2, (4, 6), 1, 1, 16, 16, {"kernel_size": (3, 3)}, masked=True),
    "bias": Problem(7, 1, (5, 6), 2, 2, 16, 16, {"kernel_size": (3, 4), "dilation": 1}, bias=True),
    "valid": Problem(8, 1, (5, 6), 1, 1, 16, 16, {"kernel_size": (3, 4), "border": "valid"}),
    "other grid": Problem(
        9,
        1,
        (6, 8),
        1,
        1,
        16,
        16,
        {"kernel_size": (3, 4), "query_map": "center"},
        query_grid=(3, 5),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    run(torch.float32, CASES[name], deterministic=False)


def test_deterministic_gradient_of_the_bias() -> None:
    run(torch.float32, CASES["bias"], deterministic=True)


def test_float16() -> None:
    run(torch.float16, CASES["shifted windows"])


BOX_CASES = {
    "shifted windows": ((2, 4, 4), (2, 2, 4), CASES["shifted windows"]),
    "grouped, batch, head sizes 40 and 24": (
        (1, 4, 4),
        (4, 1, 8),
        CASES["grouped, batch, head sizes 40 and 24"],
    ),
    "stride": ((4, 4), (2, 8), CASES["stride"]),
    "causal": ((2, 2, 4), (1, 4, 4), CASES["causal"]),
    "one axis": ((16,), (32,), Problem(5, 1, (37,), 2, 2, 8, 8, {"kernel_size": (6,)})),
    "valid": ((4, 4), (2, 8), CASES["valid"]),
    "other grid": ((2, 8), (4, 4), CASES["other grid"]),
    "whole boxes": (
        (4, 4),
        (4, 4),
        Problem(10, 2, (8, 12), 2, 1, 16, 16, {"kernel_size": (4, 8), "stride": (4, 4)}),
    ),
    "whole on one axis": (
        (2, 8),
        (4, 4),
        Problem(11, 1, (8, 7), 1, 1, 16, 16, {"kernel_size": (8, 3)}),
    ),
}


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", BOX_CASES)
def test_box_kernels(name: str, deterministic: bool) -> None:
    """Tiles and boxes that end past the grid and past the windows, in both backwards."""
    from stvision.kernels.neighborhood import triton_boxes

    dtype = torch.float32 if interpreted() else torch.bfloat16
    query, key, problem = BOX_CASES[name]
    ran = []
    kernel = triton_boxes.forward_boxes
    hook = kernel.pre_run_hooks
    hook.append(lambda *args, **kwargs: ran.append(True))
    try:
        # six keys and 8 numbers a head: nearest roundings to bfloat16 alone make 3.3e-3 on average
        run(
            dtype,
            problem,
            rounded=name == "one axis" and dtype != torch.float32,
            q_tile_shape=query,
            kv_tile_shape=key,
            deterministic=deterministic,
        )
    finally:
        hook.pop()
    assert ran or (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9)


@pytest.mark.parametrize("layout", ["heads first", "one tensor of heads", "an odd address"])
def test_boxes_take_any_strides(layout: str) -> None:
    """Copied where a tensor map cannot describe them, rather than left to slower kernels."""
    from stvision.kernels.neighborhood import triton_boxes

    dtype = torch.float32 if interpreted() else torch.bfloat16
    problem = CASES["grouped, batch, head sizes 40 and 24"]
    problem = Problem(20, 2, (3, 4, 5), 2, 2, 40, 40, problem.window)
    problem.build(dtype, DEVICE)
    for name, x in problem.inputs.items():
        x = x.detach()
        if layout == "heads first":
            x = x.movedim(-2, 1).contiguous().movedim(1, -2)
        elif layout == "one tensor of heads":
            x = torch.stack([x, x, x], -2).select(-2, 1)
        else:
            whole = x.new_empty(x.numel() + 1)
            x = whole[1:].view(x.shape).copy_(x)
        problem.inputs[name] = x.requires_grad_()
    ran: list[str] = []
    kernels = (triton_boxes.forward_boxes, triton_boxes.query_gradient_boxes)
    for kernel in kernels:
        kernel.pre_run_hooks.append(lambda *a, name=str(kernel), **k: ran.append(name))
    try:
        check(problem, neighborhood_attention_generic, dtype, backend="triton", deterministic=True)
    finally:
        for kernel in kernels:
            kernel.pre_run_hooks.pop()
    capable = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
    assert len(set(ran)) == (2 if capable else 0)


def test_pointers_take_the_shapes_that_were_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    from stvision.kernels.neighborhood import triton_config, triton_launch
    from stvision.kernels.neighborhood.triton_tiles import Tiles

    forward, backward = Tiles((1, 4, 4), (1, 2, 8), 4, 1), Tiles((1, 2, 8), (1, 4, 4), 4, 1)
    tuned = {"pointers": forward, "pointers_backward": backward}
    axes = three_axes(build_axes((5, 7), (5, 7), **CASES["dilation"].window)[0])
    known = {triton_config.problem_key(name, axes, 16, 4): x for name, x in tuned.items()}
    monkeypatch.setattr(triton_config, "_tuned", lambda device: known)
    triton_config.pointer_shapes.cache_clear()
    taken: list[Tiles] = []
    real = triton_launch._with_room
    monkeypatch.setattr(
        triton_launch,
        "_with_room",
        lambda run, tiles, *rest: (taken.append(tiles), real(run, tiles, *rest)),
    )
    run(torch.float32, CASES["dilation"])
    triton_config.pointer_shapes.cache_clear()
    assert taken == [forward, backward, backward]


def test_both_backwards_agree_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one-pass backward sums the gradient of queries for a share of the heads at a time."""
    from stvision.kernels.neighborhood import triton_config, triton_launch
    from stvision.kernels.neighborhood.triton_tiles import Tiles

    monkeypatch.setitem(triton_config._FORCED, "once", Tiles((1, 4, 8), (2, 4, 4), 4, 2))
    triton_config.shapes.cache_clear()
    monkeypatch.setattr(triton_launch, "WORKSPACE_SHARE", 0.0)
    monkeypatch.setattr(triton_launch, "BUSY", 1)
    g = torch.Generator().manual_seed(0)
    dtype = torch.float32 if interpreted() else torch.bfloat16
    q = torch.randn(1, 3, 6, 5, 6, 16, generator=g).to(DEVICE, dtype).requires_grad_()
    k, v = (
        torch.randn(1, 3, 6, 5, 3, 16, generator=g).to(DEVICE, dtype).requires_grad_()
        for _ in range(2)
    )
    two, one = (
        torch.autograd.grad(
            na3d(q, k, v, (2, 3, 3), backend="triton", deterministic=deterministic).square().sum(),
            (q, k, v),
        )
        for deterministic in (True, False)
    )
    for a, b in zip(two, one, strict=True):
        assert relative_error(b, a.double().cpu()) < (1e-5 if interpreted() else 1e-2)


def test_shapes_too_large_for_the_device_are_halved() -> None:
    """The caller's own never in the forward; what fits is remembered."""
    from triton.runtime.errors import OutOfResources

    from stvision.kernels.neighborhood import triton_launch
    from stvision.kernels.neighborhood.triton_tiles import Tiles

    tried = []

    def run(tiles: Tiles) -> None:
        tried.append((tiles.query, tiles.key))
        if len(tried) < 3:
            raise OutOfResources(262144, 101376, "shared memory")

    tiles, key = Tiles((2, 4, 8), (1, 4, 8), 8, 3), ("a test", object())
    triton_launch._with_room(run, tiles, key)
    wanted = [((2, 4, 8), (1, 4, 8)), ((2, 4, 4), (1, 4, 8)), ((2, 2, 4), (1, 4, 8))]
    assert tried == wanted
    triton_launch._with_room(run, tiles, key)
    assert tried[3:] == wanted[2:]
    tried.clear()
    with pytest.raises(ValueError, match=r"q_tile_shape=\(2, 4, 8\).*Hardware limit: 101376"):
        triton_launch._with_room(run, tiles, ("another", object()), own=True)
    assert Tiles((1, 4, 4), (2, 2, 4)).halved() is None


def test_small_tiles_reach_every_border() -> None:
    run(torch.float32, CASES["shifted windows"], q_tile_shape=(2, 4, 2))


#: type, head sizes, bias, mask: few, because each pair of kernels takes seconds to compile; "odd"
#: rows begin at any address
BINARIES = {
    "float32": (torch.float32, 40, 24, False, False),
    "float32 bias mask": (torch.float32, 32, 32, True, True),
    "float32 odd mask": (torch.float32, 59, 36, False, True),
    "float16": (torch.float16, 64, 64, False, False),
    "float16 bias": (torch.float16, 80, 80, True, False),
    "float16 mask": (torch.float16, 160, 160, False, True),
    "bfloat16": (torch.bfloat16, 128, 128, False, False),
    "bfloat16 bias mask": (torch.bfloat16, 40, 80, True, True),
    "bfloat16 odd": (torch.bfloat16, 91, 67, False, False),
}
TILES = {1: ((32,), (32,)), 2: ((4, 8), (2, 16)), 3: ((2, 4, 4), (1, 4, 8))}


@pytest.mark.gpu
@pytest.mark.parametrize("name", BINARIES)
@settings(
    max_examples=45,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors],
)
@given(problem=problems())
def test_random_problems_on_a_gpu(name: str, problem: Problem) -> None:
    dtype, problem.dim, problem.value_dim, problem.bias, problem.masked = BINARIES[name]
    half = dtype != torch.float32
    if problem.bias or problem.masked or half:
        problem.tokens = 0
    if problem.query_grid is not None and isinstance(problem.window.get("query_map"), str):
        problem.window["dilation"] = (1,) * len(problem.grid)
    query, key = TILES[len(problem.grid)]
    options = {"q_tile_shape": query, "kv_tile_shape": key, "deterministic": False}
    run(dtype, problem, rounded=half, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_additional_tokens_of_16_bits(dtype: torch.dtype) -> None:
    """Enough of them and of queries that roundings average out."""
    if dtype == torch.bfloat16 and interpreted():
        pytest.skip("the interpreter has no bfloat16 products")
    window = {"kernel_size": (7, 9)}
    run(dtype, Problem(12, 1, (9, 14), 2, 1, 64, 64, window, tokens=24), deterministic=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_boxes_as_large_as_the_head_on_a_gpu(dim: int) -> None:
    """A query tile and a key box of exactly head_dim tokens, over many tiles and borders."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, 20, 21, 2, dim, generator=g) for _ in range(3))
    axes, _ = build_axes((9, 20, 21), (9, 20, 21), kernel_size=(5, 9, 9))
    half = [x.cuda().bfloat16() for x in (q, k, v)]
    wanted, _ = dense_attention(*(x.cpu().double() for x in half), axes=axes)
    found = na3d(*half, (5, 9, 9), backend="triton")
    assert relative_error(found, wanted) <= 3e-3


@pytest.mark.parametrize("dim", [16, 32])
def test_boxes_through_tensor_descriptors(dim: int) -> None:
    from stvision.kernels.neighborhood import triton_launch

    if not interpreted() and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need a GPU of compute capability 9")
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 6, 2, dim, generator=g).to(DEVICE) for _ in range(3))
    axes, _ = build_axes((3, 5, 6), (3, 5, 6), kernel_size=(2, 3, 4))
    wanted, wanted_lse = dense_attention(*(x.cpu().double() for x in (q, k, v)), axes=axes)
    out, lse = triton_launch.forward(q, k, v, None, None, axes, dim**-0.5, boxes=True)
    assert relative_error(out, wanted) <= 1e-5
    assert relative_error(lse, wanted_lse) <= 1e-5


def test_descriptors_refuse_what_they_cannot_load() -> None:
    from stvision.kernels.neighborhood import triton_launch

    q = torch.randn(1, 4, 6, 2, 6, device=DEVICE)
    axes, _ = build_axes((4, 6), (4, 6), kernel_size=3)
    with pytest.raises(ValueError, match="tensor descriptors cannot load"):
        triton_launch.forward(q, q, q, None, None, axes, 0.2, boxes=True)


def test_views_give_the_same() -> None:
    g = torch.Generator().manual_seed(0)
    packed = torch.randn(1, 4, 5, 3, 2, 16, generator=g).to(DEVICE)
    q, k, v = packed.unbind(3)
    wanted = na2d(q.contiguous(), k.contiguous(), v.contiguous(), 3, backend="triton")
    assert relative_error(na2d(q, k, v, 3, backend="triton"), wanted.double().cpu()) < 1e-6
    k = k[:, :1].expand(-1, 4, -1, -1, -1)
    wanted = na2d(q, k.contiguous(), v, 3, backend="triton")
    assert relative_error(na2d(q, k, v, 3, backend="triton"), wanted.double().cpu()) < 1e-6


def test_backward_repeats_bit_by_bit() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 6, 2, 16, generator=g).to(DEVICE) for _ in range(3))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    runs = [
        torch.autograd.grad(
            na2d(q, k, v, 3, backend="triton", deterministic=True).square().sum(), (q, k, v)
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_empty_batch() -> None:
    q = torch.randn(0, 4, 6, 2, 16, device=DEVICE, requires_grad=True)
    out = na2d(q, q, q, 3, backend="triton")
    out.sum().backward()
    assert out.shape == q.shape


def test_chosen_tiles_fit_the_windows() -> None:
    """On the grid of a video model the box starts at the window, so the waste stays small."""
    axes = build_axes((30, 48, 80), (30, 48, 80), kernel_size=(18, 24, 24))[0]
    tiles = choose_tiles(three_axes(axes), 128, 2)
    pairs = 1.0
    for axis, query, key in zip(axes, tiles.query, tiles.key, strict=True):
        from stvision.kernels.neighborhood.triton_tiles import query_tiles

        table = query_tiles(axis, query)
        boxes = (table[:, 4] - table[:, 3] + key - 1) // key
        pairs *= query * key * int(boxes.sum()) / (axis.query_length * axis.window)
    assert pairs < 2.2, tiles


def test_a_scattered_last_axis_is_copied_aloud() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 5, 2, 16, generator=g).to(DEVICE)
    scattered = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.warns(UserWarning, match="last axis is not dense is copied at every call"):
        found = na2d(scattered, x, x, 3, backend="triton")
    assert relative_error(found, na2d(x, x, x, 3, backend="triton").double().cpu()) < 1e-6
