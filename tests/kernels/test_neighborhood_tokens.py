"""Additional tokens and neighborhoods in one softmax: the joint forward and backward."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from support_neighborhood import Problem, check, problems, relative_error
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from stvision.kernels.neighborhood import blocked as blocked_path
from stvision.kernels.neighborhood import merge, na2d, na3d, neighborhood_attention_generic, ops
from stvision.kernels.neighborhood import reference as reference_path
from stvision.kernels.neighborhood.choice import interpreted
from stvision.kernels.neighborhood.ops import neighborhood_attention
from stvision.kernels.neighborhood.problem import build_axes

#: pairs of backends, of the neighborhoods and of the tokens
PAIRS = [("blocked", "blocked"), ("reference", "reference"), ("blocked", "reference")]
TRITON = importlib.util.find_spec("triton") is not None and interpreted()
if TRITON:
    PAIRS += [("triton", "triton"), ("triton", "blocked"), ("reference", "triton")]
CASES = {
    "more queries than tokens": Problem(0, 1, (9, 14), 2, 1, 64, 64, {"kernel_size": (7, 9)}, 24),
    "grouped, batch, other value head": Problem(
        1, 2, (3, 4, 5), 4, 2, 16, 24, {"kernel_size": (2, 3, 3), "is_causal": True}, tokens=40
    ),
    "one token, dilation, stride": Problem(
        2, 1, (6, 7), 2, 2, 16, 16, {"kernel_size": 3, "dilation": 2, "stride": 2}, tokens=1
    ),
    "rows without a key of the grid": Problem(
        3, 2, (6, 6), 2, 2, 16, 16, {"kernel_size": (2, 2)}, tokens=3, masked=True
    ),
    "bias": Problem(4, 1, (5, 6), 2, 1, 16, 16, {"kernel_size": (3, 4)}, tokens=5, bias=True),
    "valid": Problem(
        5, 1, (7, 8), 2, 2, 16, 16, {"kernel_size": (3, 4), "border": "valid"}, tokens=5
    ),
}


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(
    *grid: int, tokens: int = 3, dtype: torch.dtype = torch.float64, batch: int = 2
) -> list[torch.Tensor]:
    """Query, key, value, keys and values of tokens; four query heads over two."""
    shapes = [(*grid, 4, 8), (*grid, 2, 8), (*grid, 2, 8), (tokens, 2, 8), (tokens, 2, 8)]
    found = [draw(batch, *shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return [x.requires_grad_() for x in found]


def call(q, k, v, more_keys, more_values, *, tokens_on: str | None = None, **options: Any) -> Any:
    """``na2d`` with windows of 3 x 3."""
    kwargs = {} if tokens_on is None else {"attention_kwargs": {"backend": tokens_on}}
    more = {"additional_keys": more_keys, "additional_values": more_values}
    return na2d(q, k, v, 3, **more, **kwargs, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_both_parts_against_the_definition(
    pair: tuple[str, str], name: str, dtype: torch.dtype
) -> None:
    if "triton" in pair and dtype in (torch.float64, torch.bfloat16):
        pytest.skip("kernels have no float64, and their interpreter no bfloat16 products")
    if pair[0] == "triton" and dtype == torch.float16 and CASES[name].tokens < 24:
        pytest.skip("few keys a row: roundings of a 16-bit output alone may pass the limit")
    problem = CASES[name].build(dtype)
    for deterministic in {False, "triton" in pair}:
        options = {"backend": pair[0], "attention_kwargs": {"backend": pair[1]}}
        options["deterministic"] = deterministic
        check(problem, neighborhood_attention_generic, dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(largest=6))
def test_random_problems_with_tokens(dtype: torch.dtype, problem: Problem) -> None:
    problem.tokens = 1 + problem.seed % 7
    options = {"backend": "blocked", "attention_kwargs": {"backend": "reference"}}
    check(problem.build(dtype), neighborhood_attention_generic, dtype, **options)


@pytest.mark.parametrize("backend", sorted({first for first, _ in PAIRS}))
def test_parts_are_added_before_they_are_rounded(backend: str) -> None:
    """In units of what rounding the exact gradient of the queries costs.

    Backends in float32 round nothing else. Kernels also round weights and gradients of scores, once
    for each pair; parts of 16 bits would cost two units or more.
    """
    problem = CASES["more queries than tokens"].build(torch.float16)
    out, _, exact = problem.expected()
    up = draw(*out.shape).half()
    (wanted,) = torch.autograd.grad(out, [exact["query"]], up.double())
    found = neighborhood_attention_generic(
        **problem.inputs, **problem.window, backend=backend, deterministic=True
    )
    (grad,) = torch.autograd.grad(found, [problem.inputs["query"]], up)
    unit = relative_error(wanted.half(), wanted)
    assert relative_error(grad, wanted) <= (1.65 if backend == "triton" else 1.02) * unit
    unit = relative_error(out.half(), out)
    assert relative_error(found, out) <= (1.4 if backend == "triton" else 1.02) * unit


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_clip_without_keys_sees_the_tokens(pair: tuple[str, str]) -> None:
    leaves = inputs(5, 6, dtype=torch.float32)
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[0] = False
    options = {"backend": pair[0], "tokens_on": pair[1], "return_lse": True}
    out, lse = call(*leaves, key_mask=mask, **options)
    keys, values = (x.double().repeat_interleave(2, 2)[0] for x in leaves[3:])
    scores = torch.einsum("hwnd,mnd->hwnm", leaves[0].double()[0], keys) * 8**-0.5
    alone = torch.einsum("hwnm,mnd->hwnd", scores.softmax(-1), values)
    assert relative_error(out[0], alone) < 1e-6
    assert relative_error(lse[0], scores.logsumexp(-1)) < 1e-6
    grads = torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves)
    assert not grads[1][0].any() and not grads[2][0].any() and grads[0][0].any()
    assert not any(x.isnan().any() for x in grads)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_rows_that_no_part_gives_a_key(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are never masked, so the kernels are told here that those of the first clip are."""
    real = {"blocked": blocked_path, "reference": reference_path}[backend]

    def masked(run, at: int):
        def masked_run(*inputs, **options):
            inputs = list(inputs)
            if inputs[at] is None:
                inputs[at] = torch.ones(inputs[at - 3].shape[:-2], dtype=torch.bool)
                inputs[at][0] = False
            return run(*inputs, **options)

        return masked_run

    kernels = SimpleNamespace(forward=masked(real.forward, 4), backward=masked(real.backward, 6))
    monkeypatch.setattr(ops, "_module", lambda name: kernels)
    leaves = inputs(5, 6, dtype=torch.bfloat16)
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[0] = False
    out, lse = call(*leaves, key_mask=mask, backend=backend, return_lse=True)
    assert not out[0].any() and bool((lse[0] == -torch.inf).all())
    assert out[1].all() and lse[1].isfinite().all()
    for x in torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse))):
        assert not x[0].any() and x[1].any() and not x.isnan().any()


def test_first_gradient_matches_finite_differences() -> None:
    axes, _ = build_axes((4, 3), (4, 3), kernel_size=(3, 2))
    window = [n for axis in axes for n in axis.encode()]
    q, k, v = (draw(1, 4, 3, 2, 3, seed=i).requires_grad_() for i in range(3))
    rpb = draw(2, 5, 3, seed=4).requires_grad_()
    more = [draw(1, 2, 2, 3, seed=i).requires_grad_() for i in (5, 6)]

    def joint(q, k, v, rpb, *more: torch.Tensor):
        rest = (None, window, 0.5, "blocked", [], False, *more, "reference")
        return neighborhood_attention(q, k, v, rpb, *rest)

    assert torch.autograd.gradcheck(joint, (q, k, v, rpb, *more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_inputs_output_and_log_sum_exp_are_all_that_is_kept(
    pair: tuple[str, str], dtype: torch.dtype
) -> None:
    if "triton" in pair and dtype == torch.bfloat16:
        dtype = torch.float16
    leaves = inputs(5, 6, dtype=dtype)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out, lse = call(*leaves, backend=pair[0], tokens_on=pair[1], return_lse=True)
    own = {x.data_ptr() for x in leaves}
    assert own < {x.data_ptr() for x in kept}
    rest = {x.data_ptr(): x for x in kept if x.data_ptr() not in own}.values()
    # what the backward sums rows from, in float32 where the backend computes in it
    wide = torch.float32 if pair[0] != "triton" else dtype
    wanted = sorted([(out.numel(), wide), (lse.numel(), torch.float32)], key=str)
    assert sorted([(x.numel(), x.dtype) for x in rest], key=str) == wanted


@pytest.mark.parametrize("pair", PAIRS[:3], ids="-".join)
def test_operator_contract(pair: tuple[str, str]) -> None:
    axes, _ = build_axes((4, 3), (4, 3), kernel_size=(3, 2))
    window = [n for axis in axes for n in axis.encode()]
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, *more = inputs(4, 3, dtype=dtype)
        rpb = draw(4, 5, 3, dtype=torch.float32).requires_grad_()
        rest = (torch.rand(2, 4, 3) > 0.3, window, 0.5, pair[0], [], False, *more, pair[1])
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if dtype == torch.float32:
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(neighborhood_attention, (q, k, v, rpb, *rest), test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_graph_breaks(dtype: torch.dtype, dynamic: bool) -> None:
    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        out, lse = call(*leaves, dilation=(1, 2), return_lse=True)
        return out.float().square().sum() + lse.sin().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for grid in ((6, 7), (8, 9)):
        leaves = inputs(*grid, dtype=dtype)
        for one, two in zip(
            torch.autograd.grad(compiled(*leaves), leaves),
            torch.autograd.grad(loss(*leaves), leaves),
            strict=True,
        ):
            assert one.dtype == dtype and torch.equal(one, two)


def test_the_way_past_the_dispatcher_is_the_operator() -> None:
    results = []
    for watched in (False, True):
        leaves = inputs(5, 6)
        if watched:
            with FlopCounterMode(display=False):
                out, lse = call(*leaves, return_lse=True)
        else:
            out, lse = call(*leaves, return_lse=True)
        assert type(out.grad_fn).__name__.startswith("_Direct") != watched
        grads = torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves)
        results.append([out.detach(), lse.detach(), *grads])
    for short, long in zip(*results, strict=True):
        assert torch.equal(short, long)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_transforms_and_their_refusals(dtype: torch.dtype) -> None:
    leaves = inputs(4, 5, dtype=dtype)

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return call(*leaves).square().sum()

    wanted = torch.autograd.grad(loss(*leaves), leaves)
    plain = [x.detach() for x in leaves]
    for one, two in zip(torch.func.grad(loss, (0, 1, 2, 3, 4))(*plain), wanted, strict=True):
        assert torch.equal(one, two)
    keys = plain[3]

    def of_keys(x: torch.Tensor) -> torch.Tensor:
        return loss(*plain[:3], x, plain[4])

    first = torch.func.grad(of_keys)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda x: first(x).sum())(keys)
    with pytest.raises(NotImplementedError, match="batch axis"):
        torch.func.vmap(first)(keys[None])
    with pytest.raises(NotImplementedError, match="batch axis"):
        torch.func.vmap(of_keys)(keys[None])
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(of_keys, (keys,), (keys,))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        of_keys(forward_ad.make_dual(keys, keys))
    (grad,) = torch.autograd.grad(loss(*leaves), leaves[3], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_checkpointing_changes_nothing() -> None:
    leaves = inputs(4, 5)
    wanted = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    out = checkpoint(call, *leaves, use_reentrant=False)
    for got, exact in zip(torch.autograd.grad(out.square().sum(), leaves), wanted, strict=True):
        assert torch.equal(got, exact)


def test_a_part_alone_may_need_gradients() -> None:
    """Frozen queries, keys and values with learned tokens, and the other way round."""
    for learned in ([3], [4], [0], [1, 2]):
        leaves = inputs(4, 5)
        wanted = torch.autograd.grad(call(*leaves).square().sum(), [leaves[i] for i in learned])
        some = [x.detach().requires_grad_(i in learned) for i, x in enumerate(leaves)]
        found = torch.autograd.grad(call(*some).square().sum(), [some[i] for i in learned])
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_no_token_and_no_clip(backend: str) -> None:
    leaves = inputs(5, 6, tokens=0, dtype=torch.bfloat16)
    found = call(*leaves, backend=backend)
    assert torch.equal(found, na2d(*leaves[:3], 3, backend=backend))
    for tokens_on in ("blocked", "reference"):
        leaves = inputs(5, 6, batch=0, dtype=torch.bfloat16)
        out, lse = call(*leaves, backend=backend, tokens_on=tokens_on, return_lse=True)
        assert (out.shape, out.dtype) == ((0, 5, 6, 4, 8), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((0, 5, 6, 4), torch.float32)
        grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
        assert all(x.shape == y.shape for x, y in zip(grads, leaves, strict=True))


def test_autocast_lowers_both_parts() -> None:
    leaves = inputs(5, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = call(*leaves, return_lse=True)
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
    lowered = [x.bfloat16() for x in leaves]
    wanted, wanted_lse = call(*lowered, return_lse=True)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)
    exact = torch.autograd.grad(wanted.float().square().sum(), leaves)
    assert all(torch.equal(one, two) for one, two in zip(grads, exact, strict=True))


def test_views_give_the_same() -> None:
    leaves = [x.detach() for x in inputs(5, 6)]
    wanted = call(*leaves)
    scattered = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in leaves]
    for backend in ("blocked", "reference"):
        views = [x.requires_grad_() for x in scattered]
        out = call(*views, backend=backend)
        assert relative_error(out, wanted) < 1e-12
        up = draw(*reversed(out.shape)).permute(4, 3, 2, 1, 0)
        grads = torch.autograd.grad(out, views, up)
        plain = [x.requires_grad_() for x in leaves]
        exact = torch.autograd.grad(call(*plain), plain, up.contiguous())
        for one, two in zip(grads, exact, strict=True):
            assert relative_error(one, two) < 1e-12


def test_both_parts_are_as_deterministic_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def forward(*inputs, tile=None, part=False):
        return reference_path.forward(*inputs, part=part)

    def backward(*inputs, tile=None, deterministic, part):
        asked.append((deterministic, part, tile))
        return reference_path.backward(*inputs, part=part)

    kernels = SimpleNamespace(forward=forward, backward=backward)
    monkeypatch.setattr(ops, "_module", lambda backend: kernels)
    q, k, v, *more = inputs(5, 6)
    axes, _ = build_axes((5, 6), (5, 6), kernel_size=3)
    window = [n for axis in axes for n in axis.encode()]
    for deterministic in (False, True):
        rest = (None, None, window, 0.5, "triton", [2, 8, 4, 4], deterministic, *more, "triton")
        out, _ = ops.attend(q, k, v, *rest)
        out.sum().backward()
        # the tile and box of the grid hold as many queries and keys where it is flat
        assert asked == [(deterministic, True, (2, 8, 4, 4)), (deterministic, True, (16, 16))]
        asked.clear()


def test_the_joint_output_is_the_merged_one() -> None:
    q, k, v, *more = (x.detach() for x in inputs(5, 6))
    out, lse = na2d(q, k, v, 3, return_lse=True)
    axes = (ops.Axis(30, 3, 3, query_map="start"),)
    more_out, more_lse = blocked_path.forward(
        q.flatten(1, 2), *more, None, None, axes, q.shape[-1] ** -0.5
    )
    wanted = merge(out, lse, more_out.view(out.shape), more_lse.view(lse.shape))
    for one, two in zip(call(q, k, v, *more, return_lse=True), wanted, strict=True):
        assert relative_error(one, two) < 1e-14


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_keeps_its_own_way() -> None:
    leaves = [x.detach() for x in inputs(5, 6, dtype=torch.float32)]
    wanted, wanted_lse = call(*leaves, return_lse=True, backend="reference")
    for pair in (("flex", "flex"), ("flex", "blocked"), ("blocked", "flex")):
        out, lse = call(*leaves, backend=pair[0], tokens_on=pair[1], return_lse=True)
        assert relative_error(out, wanted.double()) < 1e-6
        assert relative_error(lse, wanted_lse.double()) < 1e-6


@pytest.mark.skipif(not TRITON, reason="needs TRITON_INTERPRET=1")
def test_the_one_pass_backward_sums_where_it_returns() -> None:
    """The gradient of queries is float32 there, so it needs no second float32 tensor."""
    leaves = [draw(1, 3, 6, 5, h, 16, dtype=torch.float16, seed=h) for h in (4, 2, 2)]
    leaves += [draw(1, 20, 2, 16, dtype=torch.float16, seed=i) for i in (5, 6)]
    leaves = [x.requires_grad_() for x in leaves]
    more = {"additional_keys": leaves[3], "additional_values": leaves[4], "backend": "triton"}
    up = draw(*leaves[0].shape).half()
    two, one = (
        torch.autograd.grad(
            na3d(*leaves[:3], (2, 3, 3), **more, deterministic=deterministic), leaves, up
        )
        for deterministic in (True, False)
    )
    for a, b in zip(two, one, strict=True):
        assert relative_error(b, a.double()) < 1e-3


W = {"kernel_size": (7, 9)}
#: enough keys a row that roundings average out: box kernels, then those that load through pointers
GPU_CASES = {
    "boxes": Problem(12, 1, (9, 14), 2, 1, 64, 64, W, tokens=24),
    "three axes": Problem(16, 2, (4, 7, 8), 4, 2, 64, 40, {"kernel_size": (3, 5, 5)}, tokens=24),
    "dilation": Problem(
        13, 1, (10, 15), 2, 1, 64, 64, {"kernel_size": (5, 7), "dilation": (2, 2)}, tokens=24
    ),
    "key mask": Problem(14, 1, (9, 14), 2, 2, 64, 64, W, tokens=24, masked=True),
    "bias": Problem(15, 1, (9, 14), 2, 2, 64, 64, W, tokens=24, bias=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("tokens_on", ["triton", "blocked"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_half_precision_on_a_gpu(
    name: str, tokens_on: str, deterministic: bool, dtype: torch.dtype
) -> None:
    problem = GPU_CASES[name].build(dtype, "cuda")
    options = {"backend": "triton", "attention_kwargs": {"backend": tokens_on}}
    options["deterministic"] = deterministic
    check(problem, neighborhood_attention_generic, dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dilation", [1, 2])
def test_compiled_calls_on_a_gpu(dilation: int) -> None:
    leaves = [x.detach().to("cuda", torch.bfloat16) for x in inputs(8, 9, tokens=20)]
    leaves = [x.requires_grad_() for x in leaves]

    def out(*leaves: torch.Tensor) -> torch.Tensor:
        return call(*leaves, backend="triton", dilation=dilation, deterministic=True)

    compiled = torch.compile(out, fullgraph=True)
    assert torch.equal(compiled(*leaves), out(*leaves))
    up = torch.randn_like(leaves[0])
    grads = torch.autograd.grad(compiled(*leaves), leaves, up)
    wanted = torch.autograd.grad(out(*leaves), leaves, up)
    assert all(torch.equal(one, two) for one, two in zip(grads, wanted, strict=True))


@pytest.mark.gpu
def test_what_a_gpu_keeps_for_the_backward() -> None:
    """One output of the clip's size and one log-sum-exp beside the inputs."""
    leaves = [torch.randn(1, 16, 64, 64, 8, 64, device="cuda").bfloat16() for _ in range(3)]
    leaves += [torch.randn(1, 64, 8, 64, device="cuda").bfloat16() for _ in range(2)]
    leaves = [x.requires_grad_() for x in leaves]
    more = {"additional_keys": leaves[3], "additional_values": leaves[4], "backend": "triton"}
    na3d(*leaves[:3], (3, 5, 5), **more)  # tables of windows are kept
    before = torch.cuda.memory_allocated()
    out = na3d(*leaves[:3], (3, 5, 5), **more)
    kept = torch.cuda.memory_allocated() - before
    clip = out.numel() * out.element_size()
    assert kept <= clip + out.numel() // 64 * 4 + 2**20, kept / clip
