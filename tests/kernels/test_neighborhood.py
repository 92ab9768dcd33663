"""Neighborhood attention against the float64 definition, its identities, and its refusals."""

import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from support_neighborhood import Problem, check, problems, relative_error
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from stvision.kernels.neighborhood import (
    api,
    choice,
    explain,
    merge,
    na1d,
    na2d,
    na3d,
    neighborhood_attention_generic,
    ops,
)
from stvision.kernels.neighborhood import blocked as blocked_path
from stvision.kernels.neighborhood import flex as flex_path
from stvision.kernels.neighborhood import reference as reference_path
from stvision.kernels.neighborhood.ops import neighborhood_attention
from stvision.kernels.neighborhood.problem import build_axes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(*grid: int, batch: int = 2, heads: int = 2, dim: int = 8) -> list[torch.Tensor]:
    return [draw(batch, *grid, heads, dim, seed=i) for i in range(3)]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask=None) -> torch.Tensor:
    """Attention over the flattened grid."""
    flat = [x.flatten(1, -3).transpose(1, 2) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*flat, attn_mask=mask)
    return out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_blocked_in_float64(problem: Problem) -> None:
    call = neighborhood_attention_generic
    check(problem.build(torch.float64), call, torch.float64, backend="blocked")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(dims=(40, 80, 160), largest=6))
def test_blocked_in_lower_precision(dtype: torch.dtype, problem: Problem) -> None:
    check(problem.build(dtype), neighborhood_attention_generic, dtype, backend="blocked")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(largest=6))
def test_reference_in_float64(problem: Problem) -> None:
    check(
        problem.build(torch.float64),
        neighborhood_attention_generic,
        torch.float64,
        backend="reference",
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=15, deadline=None, derandomize=True)
@given(problems(largest=6))
def test_flex_forward(problem: Problem) -> None:
    problem.bias = False
    problem.build(torch.float32)
    tile = {1: (4,), 2: (2, 4), 3: (2, 2, 2)}[len(problem.grid)]
    call = neighborhood_attention_generic
    with torch.no_grad():
        check(problem, call, torch.float32, grad=False, backend="flex", q_tile_shape=tile)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(largest=6))
def test_flex_block_mask_is_the_mask(problem: Problem) -> None:
    """Eager FlexAttention ignores the blocks that a GPU skips by, so they are compared apart."""
    query_grid = problem.query_grid or problem.grid
    axes, _ = build_axes(query_grid, problem.grid, **problem.window)
    tile = {1: (4,), 2: (2, 4), 3: (2, 2, 2)}[len(axes)]
    plan = flex_path._plan(axes, tile, tile, "cpu")
    size = 4 if len(axes) == 1 else 8
    exact = reference_path.dense_mask(axes)
    real = (plan.query_order >= 0)[:, None] & (plan.key_order >= 0)[None]
    seen = exact[plan.query_order.clamp_min(0)][:, plan.key_order.clamp_min(0)] & real
    blocks = seen.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)

    def listed(ragged: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        count, order = (x[0, 0] for x in ragged)
        found = torch.zeros(blocks.shape[:2], dtype=torch.bool)
        for row, number in enumerate(count.tolist()):
            found[row, order[row, :number].long()] = True
        return found

    some, every = blocks.any(-1).any(-1), blocks.all(-1).all(-1)
    assert torch.equal(listed(plan.partial_or_full), some)
    assert torch.equal(listed(plan.full), every)
    assert torch.equal(listed(plan.partial), some & ~every)
    at = torch.arange(len(plan.query_order))[:, None], torch.arange(len(plan.key_order))[None]
    assert torch.equal(plan.visible(0, 0, *at), seen)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_small_chunks_change_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_path, "CHUNK_ELEMENTS", 500)
    monkeypatch.setattr(blocked_path, "SCORE_ELEMENTS", 200)
    blocked_path.choose_tile.cache_clear()
    window = {"kernel_size": (2, 3), "dilation": (2, 1), "is_causal": (False, True)}
    problem = Problem(3, 3, (5, 6), 4, 2, 8, 8, window, tokens=2, bias=True, masked=True)
    check(problem.build(torch.float64), na2d, torch.float64, backend=backend)
    blocked_path.choose_tile.cache_clear()


@pytest.mark.parametrize("backend", ["blocked", "reference", "sdpa"])
def test_window_of_the_whole_grid_is_full_attention(backend: str) -> None:
    q, k, v = qkv(3, 4, 5)
    found = na3d(q, k, v, (3, 4, 5), backend=backend)
    assert relative_error(found, dense(q, k, v)) < 1e-12
    found = na3d(q, k, v, (3, 4, 5), stride=(3, 2, 1), backend=backend)
    assert relative_error(found, dense(q, k, v)) < 1e-12


def test_window_of_one_is_the_value() -> None:
    q, k, v = qkv(3, 4, 5)
    assert torch.equal(na3d(q, k, v, 1), v)


@pytest.mark.parametrize("stride", [1, 2, (3, 4, 5)])
def test_causal_whole_window_is_a_product_of_triangles(stride) -> None:
    q, k, v = qkv(3, 4, 5)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for length in (3, 4, 5):
        mask = torch.kron(mask, torch.ones(length, length, dtype=torch.bool).tril())
    found = na3d(q, k, v, (3, 4, 5), stride=stride, is_causal=True)
    assert relative_error(found, dense(q, k, v, mask)) < 1e-12


@pytest.mark.parametrize("backend", ["blocked", "reference", "sdpa"])
def test_stride_of_the_window_is_blocked_attention(backend: str) -> None:
    q, k, v = qkv(16, 24)
    found = na2d(q, k, v, (8, 12), stride=(8, 12), backend=backend)
    for y in (0, 8):
        for x in (0, 12):
            part = [t[:, y : y + 8, x : x + 12] for t in (q, k, v)]
            assert relative_error(found[:, y : y + 8, x : x + 12], dense(*part)) < 1e-12


def test_mask_free_windows_run_densely_with_the_same_gradients() -> None:
    k, v = draw(2, 4, 8, 6, 2, 8, seed=1), draw(2, 4, 8, 6, 2, 8, seed=2)
    for grid, options in (
        ((4, 8, 6), {"kernel_size": (4, 4, 6), "stride": (1, 4, 6)}),
        ((2, 8, 3), {"kernel_size": (4, 8, 6), "query_map": "center"}),
    ):
        q = draw(2, *grid, 4, 8)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        assert explain(*leaves, **options).backend == "sdpa"
        up = draw(*q.shape, seed=7)
        grads = torch.autograd.grad(na3d(*leaves, **options), leaves, up)
        wanted = torch.autograd.grad(na3d(*leaves, **options, backend="blocked"), leaves, up)
        for one, two in zip(grads, wanted, strict=True):
            assert relative_error(one, two) < 1e-11
    q, k, v = qkv(50)
    assert explain(q, k, v, 50, is_causal=True).backend == "sdpa"
    found = na1d(q, k, v, 50, is_causal=True)
    assert relative_error(found, na1d(q, k, v, 50, is_causal=True, backend="blocked")) < 1e-12


def test_dilation_is_the_problem_on_each_strided_slice() -> None:
    q, k, v = qkv(7, 8)
    found = na2d(q, k, v, (3, 2), dilation=(2, 3))
    for y in range(2):
        for x in range(3):
            part = [t[:, y::2, x::3] for t in (q, k, v)]
            assert relative_error(found[:, y::2, x::3], na2d(*part, (3, 2))) < 1e-12


def test_flipping_an_axis_commutes_for_odd_windows_only() -> None:
    q, k, v = qkv(7, 6)
    flipped = [t.flip(1) for t in (q, k, v)]
    assert relative_error(na2d(*flipped, 3).flip(1), na2d(q, k, v, 3)) < 1e-12
    assert relative_error(na2d(*flipped, 4).flip(1), na2d(q, k, v, 4)) > 1e-2


def test_batch_and_heads_do_not_mix() -> None:
    q, k, v = qkv(4, 5, batch=3, heads=4)
    whole = na2d(q, k, v, 3)
    order = torch.tensor([2, 0, 1])
    assert relative_error(na2d(q[order], k[order], v[order], 3), whole[order]) < 1e-12
    alone = na2d(q[1:2, ..., 2:3, :], k[1:2, ..., 2:3, :], v[1:2, ..., 2:3, :], 3)
    assert relative_error(alone, whole[1:2, ..., 2:3, :]) < 1e-12


def test_grouped_queries_equal_repeated_heads() -> None:
    q, k, v = draw(2, 5, 6, 6, 8), draw(2, 5, 6, 2, 8, seed=1), draw(2, 5, 6, 2, 8, seed=2)
    repeated = na2d(q, k.repeat_interleave(3, -2), v.repeat_interleave(3, -2), 3)
    assert relative_error(na2d(q, k, v, 3), repeated) < 1e-12


def test_causal_time_ignores_the_future_bit_for_bit() -> None:
    q, k, v = qkv(6, 4, 4)
    before = na3d(q, k, v, 3, is_causal=(True, False, False))
    k[:, 4:], v[:, 4:] = 100.0, -100.0
    after = na3d(q, k, v, 3, is_causal=(True, False, False))
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_valid_border_is_the_inside_of_the_shifted_one() -> None:
    q, k, v = qkv(9, 8)
    whole = na2d(q, k, v, (3, 4), dilation=(2, 1))
    found = na2d(q, k, v, (3, 4), dilation=(2, 1), border="valid")
    assert found.shape[1:3] == (5, 5)
    assert relative_error(found, whole[:, 2:7, 2:7]) < 1e-12


def test_pad_is_masked_padding() -> None:
    q, k, v = qkv(3, 5)
    padded = [F.pad(t, (0, 0, 0, 0, 0, 0, 0, 3)) for t in (q, k, v)]
    mask = torch.zeros(2, 6, 5, dtype=torch.bool)
    mask[:, :3] = True
    wanted = na2d(*padded, (3, 3), dilation=(2, 1), key_mask=mask)[:, :3]
    found = na2d(q, k, v, (3, 3), dilation=(2, 1), pad=True)
    assert relative_error(found, wanted) < 1e-12


def test_key_mask_of_a_shorter_clip() -> None:
    """With windows as wide as the batch's clips, a masked tail equals the shorter clip alone."""
    q, k, v = qkv(6, 3, 3)
    mask = torch.ones(2, 6, 3, 3, dtype=torch.bool)
    mask[1, 4:] = False
    found = na3d(q, k, v, (6, 3, 3), key_mask=mask)
    alone = na3d(q[1:, :4], k[1:, :4], v[1:, :4], (4, 3, 3))
    assert relative_error(found[1:, :4], alone) < 1e-12


@pytest.mark.parametrize("backend", ["blocked", "reference", "flex"])
def test_query_without_a_key_gives_zero_and_no_nan(backend: str) -> None:
    q, k, v = (t.float() for t in qkv(6, 6))
    mask = torch.ones(2, 6, 6, dtype=torch.bool)
    mask[0, :3, :3] = False
    out, lse = na2d(q, k, v, 3, key_mask=mask, backend=backend, return_lse=True)
    assert torch.equal(out[0, 0, 0], torch.zeros_like(out[0, 0, 0]))
    assert bool((lse[0, 0, 0] == -torch.inf).all())
    assert not out.isnan().any()


def test_additional_tokens_join_the_softmax() -> None:
    q, k, v = qkv(4, 4)
    more = draw(2, 3, 2, 8, seed=5), draw(2, 3, 2, 8, seed=6)
    found = na2d(q, k, v, 4, additional_keys=more[0], additional_values=more[1])
    keys = [torch.cat([x.flatten(1, 2), y], 1) for x, y in zip((k, v), more, strict=True)]
    wanted = dense(q.flatten(1, 2), *keys).reshape(q.shape)
    assert relative_error(found, wanted) < 1e-12


def test_additional_tokens_may_run_elsewhere() -> None:
    q, k, v = qkv(4, 4)
    more = {"additional_keys": draw(2, 3, 2, 8), "additional_values": draw(2, 3, 2, 8, seed=6)}
    wanted = na2d(q, k, v, 3, **more)
    found = na2d(q, k, v, 3, **more, attention_kwargs={"backend": "reference"})
    assert relative_error(found, wanted) < 1e-12
    with pytest.raises(ValueError, match="backend must be one of"):
        na2d(q, k, v, 3, **more, attention_kwargs={"backend": "cutlass-fmha"})
    with pytest.raises(ValueError, match="takes backend only, not dropout"):
        na2d(q, k, v, 3, **more, attention_kwargs={"dropout": 0.1})


def test_merge_is_associative_and_knows_empty_sets() -> None:
    outs = [draw(3, 2, 8, seed=i) for i in range(3)]
    lses = [draw(3, 2, seed=i + 9) for i in range(3)]
    left = merge(*merge(outs[0], lses[0], outs[1], lses[1]), outs[2], lses[2])
    right = merge(outs[0], lses[0], *merge(outs[1], lses[1], outs[2], lses[2]))
    assert relative_error(left[0], right[0]) < 1e-12
    nothing = torch.zeros(3, 2, 8), torch.full((3, 2), -torch.inf)
    both = merge(*nothing, *nothing)
    assert torch.equal(both[0], nothing[0])
    assert torch.equal(both[1], nothing[1])


def test_first_gradient_matches_finite_differences() -> None:
    window = [
        n for axis in build_axes((4, 3), (4, 3), kernel_size=(3, 2))[0] for n in axis.encode()
    ]
    q, k, v = (x.requires_grad_() for x in qkv(4, 3, batch=1, dim=3))
    rpb = draw(2, 5, 3, seed=4).requires_grad_()

    def call(*inputs: torch.Tensor):
        return neighborhood_attention(*inputs, None, window, 0.5, "blocked", [], False)

    assert torch.autograd.gradcheck(call, (q, k, v, rpb))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": "0.3"}, TypeError, "scale must be a number or None, not '0.3'"),
        (
            {"scale": torch.ones((), requires_grad=True)},
            TypeError,
            "scale must be a number without",
        ),
        ({"attention_kwargs": ["backend"]}, TypeError, "attention_kwargs must be a dictionary"),
        ({"attention_kwargs": {"fast": 1}}, ValueError, "attention_kwargs takes backend only, not"),
        ({"q_tile_shape": 2.5}, TypeError, "q_tile_shape must be int or a tuple, not 2.5"),
        ({"q_tile_shape": (2, 0)}, ValueError, "q_tile_shape must hold numbers of at least 1"),
        ({"kv_tile_shape": (2, 2)}, ValueError, "kv_tile_shape needs q_tile_shape beside it"),
        ({"query_map": ["center", 1]}, TypeError, "query_map takes int values, not 'center'"),
    ],
)
def test_options_are_refused_by_the_call_and_its_explanation(options, error, message) -> None:
    q, k, v = qkv(4, 5)
    for function in (na2d, explain):
        with pytest.raises(error, match=message):
            function(q, k, v, 3, **options)


def test_offsets_may_be_a_list() -> None:
    q, k, v = qkv(4, 5)
    part = q[:, 1:3, :4]
    found = na2d(part, k, v, 3, query_map=[1, 0])
    assert torch.equal(found, na2d(part, k, v, 3, query_map=(1, 0)))


#: windows within the grid, and over the whole of it, which are dense attention
@pytest.mark.parametrize("window", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_second_derivative_is_refused(window: int, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv(4, 4))
    (grad,) = torch.autograd.grad(na2d(q, k, v, window).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("window", [3, 4])
def test_vmap_is_refused(window: int) -> None:
    q, k, v = (x[None] for x in qkv(4, 4))
    with pytest.raises(NotImplementedError, match="batch axis"):
        torch.func.vmap(lambda a, b, c: na2d(a, b, c, window))(q, k, v)


def test_dense_windows_keep_their_gradients() -> None:
    """The refusals stand around them."""
    q, k, v = (x.requires_grad_() for x in qkv(4, 5))
    found = torch.autograd.grad(na2d(q, k, v, (4, 5)).square().sum(), (q, k, v))
    other = na2d(q, k, v, (4, 5), backend="reference")
    wanted = torch.autograd.grad(other.square().sum(), (q, k, v))
    loss = torch.func.grad(lambda *x: na2d(*x, (4, 5)).square().sum(), (0, 1, 2))
    through = loss(*(x.detach() for x in (q, k, v)))
    for one, two, three in zip(found, through, wanted, strict=True):
        assert relative_error(one, three) < 1e-12 and relative_error(two, three) < 1e-12
    with torch.no_grad():
        assert relative_error(na2d(q, k, v, (4, 5)), other) < 1e-12


@pytest.mark.parametrize("scale", [0.0, -0.4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scales_that_turn_the_logits_around(scale: float, causal: bool, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv(15))
    runs = []
    for backend in (None, "sdpa", "reference"):
        out = na1d(q, k, v, 15, is_causal=causal, scale=scale, backend=backend)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for found in runs[:2]:
        for one, two in zip(found, runs[2], strict=True):
            assert relative_error(one, two.double()) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(
    ("window", "options"),
    [(4, {}), (9, {"pad": True}), (2, {"stride": 2}), ((4, 6), {"is_causal": False})],
)
def test_dense_windows_compile_with_sizes_left_open(window, options: dict) -> None:
    torch.compiler.reset()
    run = torch.compile(
        lambda *x: na2d(*x, window, **options), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for heads, kv_heads in ((2, 2), (4, 2), (6, 3)):
        q = draw(1, 4, 4, heads, 8, seed=heads) if window == 4 else draw(1, 4, 6, heads, 8)
        k = draw(*q.shape[:3], kv_heads, 8, seed=1)
        assert relative_error(run(q, k, k), na2d(q, k, k, window, **options)) < 1e-12


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_operator_contract(backend: str) -> None:
    axes = build_axes((4, 3), (4, 3), kernel_size=(3, 2))[0]
    window = [n for axis in axes for n in axis.encode()]
    q, k, v = (x.float().requires_grad_() for x in qkv(4, 3))
    rpb = draw(2, 5, 3, dtype=torch.float32).requires_grad_()
    mask = torch.rand(2, 4, 3) > 0.3
    for bias, seen in ((None, None), (rpb, mask)):
        torch.library.opcheck(
            neighborhood_attention, (q, k, v, bias, seen, window, 0.5, backend, [], False)
        )


def test_compiles_without_graph_breaks() -> None:
    def call(q, k, v, more):
        return na3d(
            q, k, v, (3, 3, 2), is_causal=(True, False, False), additional_keys=more,
            additional_values=more, return_lse=True,
        )  # fmt: skip

    q, k, v = (x.float().requires_grad_() for x in qkv(4, 5, 3))
    more = draw(2, 3, 2, 8, dtype=torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, two in zip(compiled(q, k, v, more), call(q, k, v, more), strict=True):
        assert torch.equal(one, two)
    grads = torch.autograd.grad(compiled(q, k, v, more)[0].sum(), (q, k, v))
    wanted = torch.autograd.grad(call(q, k, v, more)[0].sum(), (q, k, v))
    for one, two in zip(grads, wanted, strict=True):
        assert relative_error(one, two) < 1e-6


def test_compiles_once_for_grids_of_any_size() -> None:
    def call(q, k, v):
        return na2d(q, k, v, 3, dilation=(1, 2))

    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=frames)
    for grid in ((6, 7), (8, 9), (11, 6)):
        q, k, v = (x.float().requires_grad_() for x in qkv(*grid))
        assert torch.equal(compiled(q, k, v), call(q, k, v))
    assert frames.frame_count == 1


def test_autocast_computes_in_the_lower_type() -> None:
    q, k, v = (x.float() for x in qkv(5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        out = na2d(q, k, v, 3)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, na2d(q.bfloat16(), k.bfloat16(), v.bfloat16(), 3))


@pytest.mark.parametrize("backend", ["blocked", "reference", "flex"])
def test_views_give_the_same(backend: str) -> None:
    q, k, v = (x.float() for x in qkv(5, 6))
    wanted = na2d(q, k, v, 3, backend=backend)
    packed = torch.stack([q, k, v], -1).unbind(-1)
    assert packed[0].stride(-1) == 3
    assert relative_error(na2d(*packed, 3, backend=backend), wanted) < 1e-6
    one = k[:, :1].expand(-1, 5, -1, -1, -1)
    copied = na2d(q, one.contiguous(), v, 3, backend=backend)
    assert relative_error(na2d(q, one, v, 3, backend=backend), copied) < 1e-6


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_empty_batch(backend: str) -> None:
    q, k, v = (x[:0].requires_grad_() for x in qkv(5, 6))
    out, lse = na2d(q, k, v, 3, backend=backend, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:-1]
    out.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


def test_empty_batch_of_flex() -> None:
    q, k, v = (x[:0] for x in qkv(5, 6))
    out, lse = na2d(q, k, v[..., :4], 3, backend="flex", return_lse=True)
    assert (out.shape, lse.shape) == ((0, 5, 6, 2, 4), q.shape[:-1])


def test_flex_is_not_for_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    q, k, v = (x.float() for x in qkv(5, 6))
    with pytest.raises(ValueError, match=r"'flex' cannot run .* torch\.compile cannot trace"):
        explain(q, k, v, 3, backend="flex")


def test_explain_names_every_backend() -> None:
    q, k, v = qkv(5, 6)
    choice = explain(q, k, v, 3)
    assert choice.backend == "blocked"
    assert set(choice.reasons) == {"sdpa", "triton", "flex", "reference"}
    assert str(choice).startswith("blocked: taken")
    assert explain(q, k, v, 3, backend="reference").backend == "reference"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kernel_size": 6}, ValueError, r"kernel_size 6 .*axis 0 \(height\).* 5 tokens"),
        ({"kernel_size": (3, 4), "dilation": (1, 2)}, ValueError, r"4 x dilation 2 = 8 .*width"),
        ({"kernel_size": 3, "stride": (1, 4)}, ValueError, r"stride on axis 1 .* is 4.* 3"),
        ({"kernel_size": 0}, ValueError, "kernel_size on axis 0"),
        ({"kernel_size": 3, "dilation": 0}, ValueError, "dilation on axis 0"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "has 3 values, but the grid has 2 axes"),
        ({"kernel_size": 2.0}, TypeError, "kernel_size"),
        ({"kernel_size": (3, 2.0)}, TypeError, "kernel_size takes int"),
        ({"kernel_size": 3, "is_causal": 1}, TypeError, "is_causal takes bool"),
        ({"kernel_size": 3, "border": "clip"}, ValueError, "'shift' or 'valid'"),
        ({"kernel_size": 3, "border": "valid", "stride": 2}, ValueError, "needs stride 1"),
        ({"kernel_size": 3, "query_map": "left"}, ValueError, "query_map must be"),
        ({"kernel_size": 3, "query_map": 1}, ValueError, "outside of the 5 keys"),
        ({"kernel_size": 3, "backend": "cutlass"}, ValueError, "one of sdpa, triton"),
        ({"kernel_size": 3, "rpb": torch.zeros(2, 5, 4)}, ValueError, r"shape \(2, 5, 5\)"),
        ({"kernel_size": 3, "key_mask": torch.ones(2, 5, 6)}, TypeError, "key_mask must be bool"),
        ({"kernel_size": 3, "additional_keys": torch.ones(1)}, ValueError, "given together"),
        ({"kernel_size": 3, "rpb": [1.0]}, TypeError, "rpb must be a tensor, not list"),
        ({"kernel_size": 3, "pad": "no"}, TypeError, "pad must be True or False, not 'no'"),
        ({"kernel_size": 3, "deterministic": "no"}, TypeError, "deterministic must be True"),
        ({"kernel_size": 3, "deterministic": [1]}, TypeError, "deterministic must be True"),
        ({"kernel_size": 3, "scale": "x"}, TypeError, "scale must be a number or None, not 'x'"),
        ({"kernel_size": 3, "q_tile_shape": (0, 4)}, ValueError, r"at least 1, not \(0, 4\)"),
        ({"kernel_size": (5, 6), "q_tile_shape": (4,)}, ValueError, "has 1 values, but the grid"),
        (
            {"kernel_size": 3, "q_tile_shape": 4, "kv_tile_shape": (4, -1)},
            ValueError,
            "kv_tile_shape must hold numbers of at least 1",
        ),
    ],
)
def test_bad_arguments_get_one_sentence(options: dict, error: type, words: str) -> None:
    q, k, v = qkv(5, 6)
    with pytest.raises(error, match=words) as caught:
        na2d(q, k, v, **options)
    assert "\n" not in str(caught.value)


def test_bad_tensors_get_one_sentence() -> None:
    q, k, v = qkv(5, 6, heads=4)
    with pytest.raises(ValueError, match=r"na3d takes .*time, height, width"):
        na3d(q, k, v, 3)
    with pytest.raises(ValueError, match=r"na1d takes"):
        na1d(q, k, v, 3)
    with pytest.raises(TypeError, match=r"key is torch.float32 but query is torch.float64"):
        na2d(q, k.float(), v, 3)
    with pytest.raises(TypeError, match="query must be float16"):
        na2d(q.long(), k.long(), v.long(), 3)
    with pytest.raises(ValueError, match="no multiple of key's 3"):
        na2d(q, k[..., :3, :], v[..., :3, :], 3)
    with pytest.raises(ValueError, match="only value may have another head_dim"):
        na2d(q, k[..., :4], v, 3)
    with pytest.raises(ValueError, match="query has 5 tokens on axis 0 .* key has 4"):
        na2d(q, k[:, :4], v[:, :4], 3)
    with pytest.raises(ValueError, match="key has batch 1 but query has 2"):
        na2d(q, k[:1], v[:1], 3)
    with pytest.raises(ValueError, match="key is on meta but query is on cpu"):
        na2d(q, k.to("meta"), v, 3)
    with pytest.raises(TypeError, match="query must be a tensor, not ndarray"):
        na2d(q.numpy(), k, v, 3)
    with pytest.raises(TypeError, match="key must be a tensor, not NoneType"):
        na2d(q, None, v, 3)
    with pytest.raises(TypeError, match="missing 4 required positional arguments: 'query'"):
        na2d()
    for function in (explain, neighborhood_attention_generic):
        with pytest.raises(ValueError, match=r"one to three axes, but has shape \(2, 3\)"):
            function(torch.zeros(2, 3), k, v, 3)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"key must be float16.*not torch\.int64"),
    ):
        na2d(q.float(), k.long(), v, 3)


def test_the_way_past_the_dispatcher_is_the_operator() -> None:
    shape = (2, 3, 5, 6, 2, 8)
    results = []
    for watched in (False, True):
        leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(3)]
        torch.manual_seed(0)
        with torch.no_grad():
            for leaf in leaves:
                leaf.normal_()
        mode = FlopCounterMode(display=False) if watched else nullcontext()
        with mode:
            out, lse = na3d(*leaves, (3, 3, 5), backend="blocked", return_lse=True)
            name = type(out.grad_fn).__name__
            (out.square().sum() + lse.sin().sum()).backward()
        # a mode must see the operator; without one the shorter way is taken
        assert name.startswith("_Direct") != watched, name
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for short, long in zip(*results, strict=True):
        assert torch.equal(short, long)


def test_checkpointing_changes_nothing() -> None:
    leaves = [x.requires_grad_() for x in qkv(4, 5)]
    wanted = torch.autograd.grad(na2d(*leaves, 3).square().sum(), leaves)
    out = checkpoint(na2d, *leaves, 3, use_reentrant=False)
    for got, exact in zip(torch.autograd.grad(out.square().sum(), leaves), wanted, strict=True):
        assert torch.equal(got, exact)


def test_a_remembered_call_is_checked_like_a_new_one() -> None:
    x = torch.randn(1, 6, 6, 2, 8)
    na2d(x, x, x, 3, is_causal=False)
    with pytest.raises(TypeError, match="is_causal takes bool values, not 0"):
        na2d(x, x, x, 3, is_causal=0)
    with pytest.raises(TypeError, match=r"kernel_size"):
        na2d(x, x, x, 3.0)
    with pytest.raises(TypeError, match="value is torch.float64"):
        na2d(x, x, x.double(), 3)
    first = na2d(x, x, x, 3, border="valid")
    assert torch.equal(na2d(x, x, x, 3, border="valid"), first) and first.shape[1:3] == (4, 4)
    with pytest.raises(TypeError, match="query must be a dense tensor, not one of layout"):
        na2d(x.to_sparse(), x, x, 3, is_causal=False)


def test_calls_are_remembered_by_values_not_by_addresses() -> None:
    """An iterator is written by its address, which the next one may have."""
    q, k, v = qkv(5, 6)
    wanted = {size: na2d(q, k, v, size) for size in ((3, 3), (5, 5), (1, 4))}
    for size in [*wanted] * 4:
        assert torch.equal(na2d(q, k, v, (n for n in size)), wanted[size])


def test_determinism_follows_the_global_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def attend(*inputs):
        asked.append(inputs[-1])
        return ops.attend(*inputs)

    monkeypatch.setattr(api, "attend", attend)
    q, k, v = qkv(5, 6)
    for switch, options in ((False, {}), (True, {}), (True, {"deterministic": False}), (False, {})):
        torch.use_deterministic_algorithms(switch)
        try:
            na2d(q, k, v, 3, **options)
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [False, True, False, False]


def test_signature_is_nattens() -> None:
    names = [
        "query",
        "key",
        "value",
        "kernel_size",
        "stride",
        "dilation",
        "is_causal",
        "scale",
        "additional_keys",
        "additional_values",
        "attention_kwargs",
        "backend",
        "q_tile_shape",
        "kv_tile_shape",
        "backward_q_tile_shape",
        "backward_kv_tile_shape",
        "backward_kv_splits",
        "backward_use_pt_reduction",
        "run_persistent_kernel",
        "kernel_schedule",
        "torch_compile",
        "return_lse",
    ]
    given = {
        "stride": 1, "dilation": 1, "is_causal": False, "backward_use_pt_reduction": False,
        "run_persistent_kernel": True, "torch_compile": False, "return_lse": False,
    }  # fmt: skip
    for function in (na1d, na2d, na3d, neighborhood_attention_generic):
        parameters = inspect.signature(function).parameters.values()
        found = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in found] == names
        assert all(p.default is p.empty for p in found[:4])
        assert all(p.default == given.get(p.name) for p in found[4:])
    q, k, v = qkv(5, 6)
    assert torch.equal(na2d(q, k, v, 3, None, None, None), na2d(q, k, v, 3))


@pytest.mark.parametrize("leaf", [False, True])
def test_forward_mode_is_refused(leaf: bool) -> None:
    q, k, v = qkv(4, 5)
    v.requires_grad_(leaf)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        na2d(q, forward_ad.make_dual(k, k), v, 3)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: na2d(x, k, v, 3), (q,), (q,))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: na2d(x, k, v, (4, 5)), (q,), (q,))
    with forward_ad.dual_level():  # nothing to carry along
        assert torch.equal(na2d(q, k, v, 3), na2d(q, k, v, 3, backend="blocked"))


def test_gradients_of_functions_are_the_gradients() -> None:
    q, k, v = qkv(4, 5)
    rpb, more = draw(2, 5, 5, seed=3), draw(2, 3, 2, 8, seed=4)

    def loss(q, k, v, rpb, more):
        tokens = {"additional_keys": more, "additional_values": more}
        out, lse = na2d(q, k, v, 3, rpb=rpb, return_lse=True, **tokens)
        return out.square().sum() + lse.sin().sum()

    inputs = [x.requires_grad_() for x in (q, k, v, rpb, more)]
    wanted = torch.autograd.grad(loss(*inputs), inputs)
    found = torch.func.grad(loss, (0, 1, 2, 3, 4))(*(x.detach() for x in inputs))
    for one, two in zip(found, wanted, strict=True):
        assert relative_error(one, two) < 1e-12
    q, k, v = (x.detach() for x in (q, k, v))
    first = torch.func.grad(lambda x: na2d(x, k, v, 3).square().sum())
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda x: first(x).sum())(q)
    with pytest.raises(NotImplementedError, match="batch axis"):
        torch.func.vmap(first)(q[None])


@pytest.mark.parametrize("backend", ["blocked", "reference", "flex"])
def test_tables_do_not_follow_the_default_device(backend: str) -> None:
    """They are kept, so a call under other settings must not spoil them."""
    q, k, v = (x.float() for x in qkv(23, 19))
    with torch.device("meta"), torch.inference_mode():
        found = na2d(q, k, v, 3, dilation=(1, 2), backend=backend)
    for x in (q, k, v):
        x.requires_grad_(backend != "flex")
    again = na2d(q, k, v, 3, dilation=(1, 2), backend=backend)
    assert found.device == q.device and torch.equal(found, again)
    if backend != "flex":
        with torch.device("meta"):
            again.sum().backward()
        assert q.grad is not None and q.grad.device == q.device
    with torch.inference_mode():
        plan = flex_path._kept_plan(build_axes((23,), (23,), kernel_size=3)[0], (4,), q.device)
    assert not plan.back.is_inference()


def test_export_leaves_the_grid_open() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return na2d(q, k, v, 3, dilation=(1, 2))

    height = {1: torch.export.Dim("height", min=4, max=64)}
    inputs = tuple(x.float() for x in qkv(6, 7))
    for strict in (False, True):
        program = torch.export.export(
            Layer(), inputs, dynamic_shapes=(height, height, height), strict=strict
        )
        taller = [x.float() for x in qkv(11, 7)]
        assert torch.equal(program.module()(*taller), Layer()(*taller))
    graph = make_fx(Layer(), tracing_mode="symbolic")(*inputs)
    assert torch.equal(graph(*taller), Layer()(*taller))


@pytest.mark.filterwarnings("ignore")
def test_torch_jit_records_what_it_can() -> None:
    for leaf in (False, True):
        inputs = [x.float().requires_grad_(leaf) for x in qkv(4, 5)]
        traced = torch.jit.trace(lambda q, k, v: na2d(q, k, v, 3), inputs, check_trace=False)
        others = [x + 1 for x in inputs]
        assert relative_error(traced(*others), na2d(*others, 3).double()) < 1e-6
    axes = [n for axis in build_axes((4, 5), (4, 5), kernel_size=3)[0] for n in axis.encode()]
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace cannot record"):
        torch.jit.trace(
            lambda q, k, v: ops.attend(q, k, v, None, None, axes, 0.3, "triton", [], False), inputs
        )


@pytest.mark.parametrize("backend", [None, "blocked", "reference"])
def test_tensors_without_memory_give_shapes(backend: str | None) -> None:
    q, k, v = (x.to("meta").requires_grad_() for x in qkv(5, 6))
    out, lse = na2d(q, k, v[..., :4], 3, backend=backend, return_lse=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", (2, 5, 6, 2, 4), (2, 5, 6, 2))
    out.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


def test_lazily_negated_tensors_take_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory holds their negative; only the dispatcher hands kernels the values."""
    q, k, v = qkv(5, 6)
    lazy = torch.complex(q, -q).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, q)
    seen = []

    def forward(query, *rest, **options):
        seen.append(query.is_neg())
        return blocked_path.forward(query, *rest, **options)

    part = SimpleNamespace(forward=forward, backward=blocked_path.backward)
    monkeypatch.setattr(ops, "_module", lambda backend: part)
    assert torch.equal(na2d(lazy, k, v, 3), na2d(q, k, v, 3))
    assert seen == [False, False]


@pytest.mark.parametrize(
    ("capability", "dtype", "window", "backend"),
    [
        ((9, 0), torch.bfloat16, (2, 4, 4), "triton"),
        ((8, 0), torch.bfloat16, (2, 4, 4), "sdpa"),
        ((9, 0), torch.float32, (2, 4, 4), "sdpa"),
        ((9, 0), torch.bfloat16, (4, 8, 8), "sdpa"),  # the whole grid is one dense problem
    ],
)
def test_blocks_run_as_boxes_where_they_can(
    capability, dtype, window, backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = (4, 8, 8)
    axes, _ = build_axes(grid, grid, kernel_size=window, stride=window)
    monkeypatch.setattr(choice, "HAS_TRITON", True)
    monkeypatch.setitem(choice.AUTOMATIC, "cuda", ("sdpa", "triton", "blocked", "reference"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(choice.dense, "why_not", lambda axes, batch: None)
    request = choice.Request(
        torch.device("cuda"), dtype, axes, 64, 64, False, False, True, False, 1, False
    )
    assert choice.choose(request, None).backend == backend


def on_gpu(*grid: int, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [x.to("cuda", dtype).requires_grad_() for x in qkv(*grid, dim=dim)]


@pytest.mark.gpu
@pytest.mark.parametrize("dilation", [1, 2])  # boxes, and loads through pointers
def test_triton_operator_contract_on_a_gpu(dilation: int) -> None:
    axes, _ = build_axes((4, 9, 10), (4, 9, 10), kernel_size=(2, 3, 4), dilation=(1, 1, dilation))
    window = [n for axis in axes for n in axis.encode()]
    torch.library.opcheck(
        neighborhood_attention,
        (*on_gpu(4, 9, 10), None, None, window, 0.125, "triton", [], False),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dilation", [1, 2])
def test_compiled_triton_calls_on_a_gpu(dilation: int) -> None:
    def call(q, k, v):
        return na3d(q, k, v, (2, 3, 4), dilation=(1, 1, dilation), backend="triton")

    inputs = on_gpu(4, 9, 10)
    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(*inputs), call(*inputs))
    grads = torch.autograd.grad(compiled(*inputs).float().square().sum(), inputs)
    wanted = torch.autograd.grad(call(*inputs).float().square().sum(), inputs)
    for one, two in zip(grads, wanted, strict=True):
        assert relative_error(one, two.double().cpu()) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("dilation", "deterministic"), [(1, True), (1, False), (2, False)])
def test_a_cuda_graph_replays_the_call(dilation: int, deterministic: bool) -> None:
    """After other problems have come and gone, whose tables are kept beside the graph's."""

    # few shapes of kernels, so that few are compiled
    options = {"dilation": (1, 1, dilation), "backend": "triton", "q_tile_shape": (1, 4, 8)}
    options |= {"kv_tile_shape": (1, 4, 16), "deterministic": deterministic}
    # boxes of a shape of the caller's take the backward of one pass, which adds up the gradient of
    # queries in the order in which programs come by
    in_any_order = dilation == 1 and not deterministic

    def call():
        out = na3d(*inputs, (2, 3, 4), **options)
        return out, *torch.autograd.grad(out.float().square().sum(), inputs)

    inputs = on_gpu(4, 9, 10)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for length in range(6, 106):
        na3d(*on_gpu(2, 4, length), (1, 2, 3), **options).sum().backward()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for i, (one, two) in enumerate(zip(found, call(), strict=True)):
        if i == 1 and in_any_order:
            assert relative_error(one, two.double().cpu()) < 1e-3
        else:
            assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["packed", "strided", "padded", "odd start", "expanded"])
def test_half_precision_views_on_a_gpu(layout: str) -> None:
    """What tensor maps can load, and what must be copied or read through pointers."""
    q, k, v = (x.detach() for x in on_gpu(4, 9, 10))
    views = {
        "packed": torch.stack([q, k, v], -3).unbind(-3),
        "strided": torch.stack([q, k, v], -1).unbind(-1),
        "padded": [F.pad(x, (0, 3))[..., :-3] for x in (q, k, v)],
        "odd start": [F.pad(x, (1, 7))[..., 1:-7] for x in (q, k, v)],
        "expanded": (q, k[:, :1].expand(k.shape), v),
    }[layout]
    leaves = [x.requires_grad_() for x in views]
    exact = [x.detach().cpu().double().requires_grad_() for x in views]
    up = torch.randn_like(q)
    out = na3d(*leaves, (2, 3, 4), backend="triton")
    axes, _ = build_axes((4, 9, 10), (4, 9, 10), kernel_size=(2, 3, 4))
    wanted, _ = reference_path.dense_attention(*exact, axes=axes)
    limit = 3e-3 if q.dtype == torch.bfloat16 else 1e-5
    assert relative_error(out, wanted) <= limit
    grads = torch.autograd.grad(out, leaves, up)
    for one, two in zip(grads, torch.autograd.grad(wanted, exact, up.cpu().double()), strict=True):
        assert relative_error(one, two) <= limit


@pytest.mark.gpu
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_half_precision_gradients_repeat_on_a_gpu(dilation: int, biased: bool) -> None:
    inputs = on_gpu(6, 20, 21)
    options: dict = {"dilation": (1, 1, dilation), "backend": "triton"}
    if biased:
        options["rpb"] = torch.randn(2, 5, 9, 9, device=inputs[0].device).requires_grad_()
        inputs.append(options["rpb"])
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            torch.autograd.grad(na3d(*inputs[:3], (3, 5, 5), **options).square().sum(), inputs)
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "blocked", "reference"])
def test_a_call_repeats_on_a_gpu_where_it_asks_for_it(backend: str, dtype: torch.dtype) -> None:
    """By its own argument; the gradient of the bias is a sum over all queries."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in on_gpu(40, 37)[:3])
    rpb = torch.randn(q.shape[-2], 9, 13, device=q.device).requires_grad_()
    runs = []
    for _ in range(4):
        out = na2d(q, k, v, (5, 7), rpb=rpb, backend=backend, deterministic=True)
        runs.append(torch.autograd.grad(out.square().sum(), (q, k, v, rpb)))
    for again in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], again, strict=True))
    out = na2d(q, k, v, (5, 7), rpb=rpb, backend=backend, deterministic=False)
    free = torch.autograd.grad(out.square().sum(), (q, k, v, rpb))
    for one, two in zip(runs[0], free, strict=True):
        assert relative_error(one, two.double().cpu()) < (1e-5 if dtype == torch.float32 else 6e-3)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements_on_a_gpu() -> None:
    shape = (1, 64, 256, 256, 8, 72)
    assert torch.Size(shape).numel() > 2**31
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB")
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    q, k, v, up = inputs
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = na3d(*leaves, (3, 5, 5), backend="triton")
    grads = torch.autograd.grad(out, leaves, up)
    part = [x.detach()[:, -8:, ..., -1:, :].contiguous().requires_grad_() for x in (q, k, v)]
    alone = na3d(*part, (3, 5, 5), backend="triton")
    # frames whose windows lie in the part, and whose keys are seen from there only
    inside = (slice(None), slice(-4, None))
    assert relative_error(out[:, -8:, ..., -1:, :][inside], alone[inside].double().cpu()) < 3e-3
    wanted = torch.autograd.grad(alone, part, up[:, -8:, ..., -1:, :].contiguous())
    for one, two in zip(grads, wanted, strict=True):
        assert relative_error(one[:, -8:, ..., -1:, :][inside], two[inside].double().cpu()) < 3e-3
