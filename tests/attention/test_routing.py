"""Bi-level routing: every path against a loop over queries in float64, and the identities."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from stvision.attention import routing
from stvision.attention.routing import (
    BiLevelRoutingAttention,
    RegionLayout,
    bilevel_routing_attention,
    route_regions,
    routing_block_mask,
)

CASES = [
    # grid, region, topk, padding
    pytest.param((1, 6, 8), (1, 3, 2), 3, "masked", id="image"),
    pytest.param((1, 7, 5), (1, 3, 2), 4, "masked", id="image-ragged"),
    pytest.param((1, 7, 5), (1, 3, 2), 4, "zeros", id="image-zeros"),
    pytest.param((4, 4, 6), (2, 2, 3), 5, "masked", id="clip"),
    pytest.param((5, 5, 4), (2, 3, 3), 3, "masked", id="clip-ragged"),
    pytest.param((5, 5, 4), (2, 3, 3), 3, "zeros", id="clip-zeros"),
    pytest.param((3, 4, 4), (1, 2, 2), 2, "masked", id="per-frame"),
    pytest.param((3, 4, 4), (9, 2, 2), 2, "masked", id="tubes"),
]


def inputs(*shape: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]


def looped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region: tuple[int, int, int],
    topk: int,
    padding: str = "masked",
) -> Tensor:
    """The definition, one query after the other, from the coordinates of tokens."""
    grid, (heads, d) = query.shape[1:4], query.shape[4:]
    region = tuple(min(r, n) for r, n in zip(region, grid, strict=True))
    counts = [-(-n // r) for n, r in zip(grid, region, strict=True)]
    names = list(itertools.product(*map(range, counts)))

    def box(name: tuple[int, ...]) -> list[tuple[int, ...]]:
        spans = [range(i * r, (i + 1) * r) for i, r in zip(name, region, strict=True)]
        return list(itertools.product(*spans))

    def exists(place: tuple[int, ...]) -> bool:
        return all(i < n for i, n in zip(place, grid, strict=True))

    out = torch.zeros_like(value)
    for b in range(len(query)):
        means = [
            [sum(x[b][place].flatten() for place in box(r) if exists(place)) for x in (query, key)]
            for r in names
        ]
        sizes = [sum(map(exists, box(r))) for r in names]
        for r, name in enumerate(names):
            answers = [
                float(means[r][0] @ means[o][1]) / sizes[r] / sizes[o] for o in range(len(names))
            ]
            chosen = sorted(range(len(names)), key=lambda o: -answers[o])[:topk]
            keys = [place for o in chosen for place in box(names[o])]
            if padding == "masked":
                keys = [place for place in keys if exists(place)]
            else:
                keys = [place for place in keys if place[0] < grid[0]]
            zero = key.new_zeros(heads, d)
            k = torch.stack([key[b][p] if exists(p) else zero for p in keys])
            v = torch.stack([value[b][p] if exists(p) else zero for p in keys])
            for place in filter(exists, box(name)):
                for h in range(heads):
                    weights = (k[:, h] @ query[b][place][h] / math.sqrt(heads * d)).softmax(0)
                    out[b][place][h] = weights @ v[:, h]
    return out


@pytest.mark.parametrize(("grid", "region", "topk", "padding"), CASES)
def test_every_path_is_the_definition(grid, region, topk, padding, monkeypatch) -> None:
    tensors = inputs(2, *grid, 2, 4)
    wanted = looped(*tensors, region, topk, padding)
    results = {}
    for name in ("gather", "blocked", "chunked", "streamed", "streamed in chunks"):
        for constant in ("CHUNK_ELEMENTS", "CPU_CHUNK_ELEMENTS"):
            monkeypatch.setattr(routing, constant, 1 if "chunk" in name else 1 << 24)
        if "streamed" in name:  # as on a GPU
            monkeypatch.setattr(routing, "_cpu_kernel_fits", lambda query: False)
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = bilevel_routing_attention(
            *leaves,
            region=region,
            topk=topk,
            padding=padding,
            implementation="gather" if name == "gather" else "blocked",
        )
        assert (out - wanted).abs().max() < 1e-12
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results[name] = [x.grad for x in leaves]
    for name in results.keys() - {"gather"}:
        for a, b in zip(results["gather"], results[name], strict=True):
            assert (a - b).abs().max() < 1e-12
    flex = [x.float() for x in tensors]
    out = bilevel_routing_attention(
        *flex, region=region, topk=topk, padding=padding, implementation="flex"
    )
    assert (out - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("grid", "region", "padding"),
    [
        pytest.param((1, 32, 24), (1, 8, 8), "masked", id="a-region-a-block"),
        pytest.param((1, 30, 21), (1, 8, 8), "masked", id="padded"),
        pytest.param((1, 30, 21), (1, 8, 8), "zeros", id="zeros"),
        pytest.param((2, 16, 12), (1, 4, 4), "masked", id="many-in-a-block"),
        pytest.param((2, 15, 13), (2, 4, 3), "masked", id="across-blocks"),
    ],
)
def test_block_mask_covers_what_is_seen_and_little_more(grid, region, padding) -> None:
    """Eager FlexAttention never looks at the blocks, so they are compared with the dense mask."""
    q, k, _ = inputs(2, *grid, 1, 4)
    layout = RegionLayout(grid, region)
    whole = layout.inside(q.device, (True, True, True))
    seen_axes = (True, padding == "masked", padding == "masked")
    inside = layout.inside(q.device, seen_axes)
    index = route_regions(layout.pack(q), layout.pack(k), 3, whole)
    tokens = math.prod(region)
    mask = routing_block_mask(index, tokens, inside)
    allowed = torch.zeros(2, index.shape[1], index.shape[1], dtype=torch.bool)
    allowed.scatter_(2, index, True)
    dense = allowed.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)
    if inside is not None:
        dense = dense & inside.flatten()
    size = mask.BLOCK_SIZE[0]
    length = dense.shape[1]
    fill = (0, -length % size) * 2
    tiles = F.pad(dense, fill).unflatten(1, (-1, size)).unflatten(3, (-1, size))
    full = F.pad(torch.ones_like(dense), fill).unflatten(1, (-1, size)).unflatten(3, (-1, size))
    some, every = tiles.any(4).any(2), (tiles & full).all(4).all(2)

    def listed(counts: Tensor, places: Tensor) -> Tensor:
        found = torch.zeros_like(some)
        for b, i in itertools.product(*map(range, some.shape[:2])):
            found[b, i, places[b, 0, i, : int(counts[b, 0, i])].long()] = True
        return found

    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    whole_blocks = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(whole_blocks, every)
    assert torch.equal(partial & whole_blocks, torch.zeros_like(some))
    assert not (some & ~(partial | whole_blocks)).any()
    if inside is None:
        assert torch.equal(partial | whole_blocks, some)


def test_all_regions_are_plain_attention_with_the_scale_of_all_channels() -> None:
    module = BiLevelRoutingAttention(8, 2, n_win=2, topk=4).double()
    x = torch.randn(2, 1, 6, 4, 8, dtype=torch.float64)
    q, k, v = module.qkv(x.flatten(1, 3)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind()
    out = F.scaled_dot_product_attention(q, k, v, scale=8**-0.5)
    value = v.transpose(1, 2).reshape(x.shape)
    lepe = module.lepe.proj(value[:, 0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, None]
    wanted = module.proj(out.transpose(1, 2).reshape(x.shape) + lepe)
    assert (module(x) - wanted).abs().max() < 1e-12


def test_regions_of_one_token_are_exact_top_k_attention() -> None:
    q, k, v = inputs(1, 2, 3, 4, 2, 4)
    out = bilevel_routing_attention(q, k, v, region=(1, 1, 1), topk=5)
    q, k, v = (x.flatten(1, 3)[0] for x in (q, k, v))
    kept = (q.flatten(1) @ k.flatten(1).T).topk(5).indices
    for i in range(24):
        for h in range(2):
            weights = (k[kept[i], h] @ q[i, h] / math.sqrt(8)).softmax(0)
            wanted = weights @ v[kept[i], h]
            torch.testing.assert_close(out.flatten(1, 3)[0, i, h], wanted)


def test_a_planted_map_is_found() -> None:
    """Each region's queries answer one other region's keys alone, among noise."""
    g = torch.Generator().manual_seed(0)
    partner = torch.randperm(16, generator=g)
    code = torch.eye(16, dtype=torch.float64)
    noise = torch.randn(2, 1, 16, 9, 2, 8, generator=g, dtype=torch.float64) * 0.3
    key = code[None, :, None].expand(1, -1, 9, -1).unflatten(-1, (2, 8)) + noise[0]
    query = code[partner][None, :, None].expand(1, -1, 9, -1).unflatten(-1, (2, 8)) + noise[1]
    assert torch.equal(route_regions(query, key, 1)[0, :, 0], partner)


def test_tokens_outside_the_chosen_regions_do_not_matter() -> None:
    q, k, v = inputs(1, 1, 8, 8, 1, 4)
    layout = RegionLayout((1, 8, 8), (1, 2, 2))
    index = route_regions(layout.pack(q), layout.pack(k), 3)[0]
    before = layout.pack(bilevel_routing_attention(q, k, v, region=(1, 2, 2), topk=3))
    # tokens of region 5 move apart from each other, so that its mean and the ranking stay
    shift = torch.zeros(1, 16, 4, 1, 4, dtype=torch.float64)
    shift[:, 5, 0], shift[:, 5, 1] = 0.7, -0.7
    k2, v2 = k + layout.unpack(shift), v + layout.unpack(shift)
    after = layout.pack(bilevel_routing_attention(q, k2, v2, region=(1, 2, 2), topk=3))
    changed = (before - after).abs().amax((0, 2, 3, 4)) > 1e-9
    assert torch.equal(changed, (index == 5).any(1)) and 0 < changed.sum() < 16


def test_permuting_regions_permutes_the_output() -> None:
    tensors = inputs(2, 2, 6, 6, 2, 4)
    layout = RegionLayout((2, 6, 6), (1, 2, 3))
    order = torch.randperm(12)
    moved = [layout.unpack(layout.pack(x)[:, order]) for x in tensors]
    out = bilevel_routing_attention(*tensors, region=(1, 2, 3), topk=4)
    again = bilevel_routing_attention(*moved, region=(1, 2, 3), topk=4)
    assert (layout.pack(out)[:, order] - layout.pack(again)).abs().max() < 1e-12


def test_attention_costs_what_the_paper_counts() -> None:
    height, width, topk, heads, d = 14, 14, 4, 2, 16
    tensors = [x.float() for x in inputs(1, 1, height, width, heads, d)]
    with FlopCounterMode(display=False) as counter:
        bilevel_routing_attention(*tensors, region=(1, 2, 2), topk=topk, implementation="gather")
    regions, channels = 49, heads * d
    routing_flops = 2 * regions**2 * channels
    attention_flops = 4 * height * width * topk * 4 * channels
    assert counter.get_total_flops() == routing_flops + attention_flops


def test_equal_affinities_take_the_first_regions() -> None:
    same = torch.ones(1, 9, 4, 1, 2)
    assert torch.equal(route_regions(same, same, 3)[0], torch.arange(3).expand(9, 3))


@pytest.mark.parametrize("region", [(1, 3, 2), (2, 3, 3), (2, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_means_on_the_grid_are_those_of_packed_regions(region, dtype) -> None:
    layout = RegionLayout((4, 6, 8), region)
    x = inputs(2, 6, 8, 4, 2, 4)[0].to(dtype).permute(0, 3, 1, 2, 4, 5)  # any strides
    inside = layout.inside(x.device, (True, True, True))
    packed = layout.pack(x).double()
    weight = torch.ones(packed.shape[1:3]) if inside is None else inside
    wanted = torch.einsum("brnhd,rn->brhd", packed, weight.double()).flatten(2)
    wanted = wanted / weight.double().sum(1)[:, None]
    found = layout.mean(x.requires_grad_())
    assert found.shape == (2, packed.shape[1], 1, 8) and not found.requires_grad
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found[:, :, 0].double(), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("batch", "grid", "region", "head_dim", "wanted"),
    [
        pytest.param(16, (1, 56, 56), (1, 8, 8), 32, "gather", id="64-tokens"),
        pytest.param(16, (16, 28, 28), (1, 4, 4), 32, "gather", id="16-tokens"),
        pytest.param(16, (16, 28, 28), (16, 4, 4), 32, "flex", id="256-tokens"),
        pytest.param(16, (16, 28, 28), (16, 4, 4), 24, "gather", id="no-flex"),
        pytest.param(256, (16, 28, 28), (1, 4, 4), 32, "flex", id="large-copies"),
        pytest.param(256, (16, 28, 28), (1, 4, 4), 24, "blocked", id="large-copies-no-flex"),
    ],
)
def test_the_choice_follows_the_measurements(
    batch, grid, region, head_dim, wanted, monkeypatch
) -> None:
    monkeypatch.setattr(routing, "HAS_TRITON", False)
    layout = RegionLayout(grid, region)
    with FakeTensorMode():
        x = torch.empty(batch, *grid, 4, head_dim, device="cuda", dtype=torch.bfloat16)
        assert routing._choose(x, x, x, layout, 4, True) == wanted
        monkeypatch.setattr(routing, "HAS_TRITON", True)
        assert routing._choose(x, x, x, layout, 4, True) == "triton"
        wide = x.double()
        assert routing._choose(wide, wide, wide, layout, 1, True) != "triton"
        cpu = torch.empty(1, *grid, 4, head_dim)
        assert routing._choose(cpu, cpu, cpu, layout, 4, True) == "blocked"


def test_routing_ranks_half_precision_means_in_float32() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 49, 64, 1, 32, generator=g).bfloat16() + 4 for _ in range(2))
    assert torch.equal(route_regions(q, k, 4), route_regions(q.float(), k.float(), 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(route_regions(q, k, 4), route_regions(q.float(), k.float(), 4))


def test_routing_has_no_gradient() -> None:
    q, k, v = inputs(1, 1, 4, 4, 1, 2)
    q.requires_grad_()
    out = bilevel_routing_attention(q, k, v, region=(1, 2, 2), topk=1)
    # of one region of constant keys the weights are equal whatever the query is
    flat = bilevel_routing_attention(q, torch.ones_like(k), v, region=(1, 2, 2), topk=1)
    assert torch.autograd.grad(flat.sum(), q)[0].abs().max() < 1e-15
    assert torch.autograd.grad(out.sum(), q)[0].abs().max() > 1e-6


@pytest.mark.parametrize("flavour", ["nchw", "legacy", "masked"])
@pytest.mark.parametrize("region_frames", [None, 1, 2])
def test_gradients_compile_and_odd_sizes(flavour: str, region_frames: int | None) -> None:
    torch.manual_seed(0)
    module = BiLevelRoutingAttention(
        4, 2, n_win=2, topk=2, flavour=flavour, region_frames=region_frames, frame_kernel=3
    ).double()
    torch.nn.init.normal_(module.lepe.time.weight)
    x = torch.randn(1, 3, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    assert (compiled(x) - module(x)).abs().max() < 1e-12
    (wanted,) = torch.autograd.grad(module(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert (got - wanted).abs().max() < 1e-12


def test_the_operator_is_registered_soundly() -> None:
    q, k, v = (x.detach().requires_grad_() for x in inputs(1, 4, 3, 2, 4))
    index = torch.tensor([[[0, 1], [2, 3], [1, 0], [3, 1]]])
    torch.library.opcheck(torch.ops.stvision.routed_attention, (q, k, v, index, None, 0.5))


def test_half_precision_is_near_the_wide_result() -> None:
    tensors = inputs(1, 2, 8, 8, 2, 16)
    wanted = bilevel_routing_attention(*tensors, region=(2, 4, 4), topk=4)
    for dtype in (torch.bfloat16, torch.float16):
        halves = [x.to(dtype).requires_grad_() for x in tensors]
        half = bilevel_routing_attention(*halves, region=(2, 4, 4), topk=4)
        assert half.dtype == dtype and (half - wanted).abs().max() < 1e-2
        wide = [x.detach().double().requires_grad_() for x in halves]
        exact = bilevel_routing_attention(*wide, region=(2, 4, 4), topk=4)
        for a, b in zip(
            torch.autograd.grad(half.sum(), halves),
            torch.autograd.grad(exact.sum(), wide),
            strict=True,
        ):
            assert (a - b).abs().max() < 2e-2 * b.abs().max().clamp_min(1)


def test_flavours_agree_where_windows_divide_and_differ_where_not() -> None:
    torch.manual_seed(0)
    modules = {
        name: BiLevelRoutingAttention(8, 2, n_win=3, topk=2, flavour=name).double()
        for name in ("nchw", "legacy", "masked")
    }
    for module in modules.values():
        module.load_state_dict(modules["nchw"].state_dict())
    even, odd = (torch.randn(1, 1, n, n, 8, dtype=torch.float64) for n in (6, 7))
    outs = {name: (module(even), module(odd)) for name, module in modules.items()}
    for name in ("legacy", "masked"):
        assert (outs[name][0] - outs["nchw"][0]).abs().max() < 1e-12
        assert (outs[name][1] - outs["nchw"][1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"region": (1, 0, 2)}, r"rows and columns, whole numbers of at least 1, got \(1, 0, 2\)"),
        ({"region": (1, 2.0, 2)}, r"region must be .*, whole numbers .*, got \(1, 2.0, 2\)"),
        ({"topk": 5}, "topk must be a whole number from 1 to the 4 regions there are, got 5"),
        ({"topk": 1.5}, "topk must be a whole number from 1 to the 4 .*, got 1.5"),
        ({"topk": 0}, "got 0"),
        ({"padding": "none"}, "padding must be 'masked' or 'zeros', got 'none'"),
        ({"implementation": "fast"}, "one of 'triton', 'flex', 'blocked', 'gather', got"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    options = {"region": (1, 2, 2), "topk": 2} | arguments
    with pytest.raises(ValueError, match=message):
        bilevel_routing_attention(*inputs(1, 1, 4, 4, 1, 4), **options)


def test_bad_shapes_and_modules_are_named() -> None:
    q, k, v = inputs(1, 1, 4, 4, 1, 4)
    with pytest.raises(ValueError, match="of one shape"):
        bilevel_routing_attention(q, k[:, :, :2], v, region=(1, 2, 2), topk=1)
    with pytest.raises(ValueError, match="'flex' cannot run this: FlexAttention has no backward"):
        bilevel_routing_attention(
            q.requires_grad_(), k, v, region=(1, 2, 2), topk=1, implementation="flex"
        )
    for options, message in (
        ({"num_heads": 3}, "num_heads must divide dim 8, got 3"),
        ({"topk": 0}, "topk must be a whole number of at least 1, got 0"),
        ({"topk": 2.5}, "topk must be a whole number of at least 1, got 2.5"),
        ({"n_win": 0}, "n_win must be a whole number of at least 1, got 0"),
        ({"region_frames": 0}, "region_frames must be a whole number of at least 1, got 0"),
        ({"flavour": "old"}, "flavour must be"),
        ({"lepe_kernel": 4}, "kernel_size must be odd"),
    ):
        with pytest.raises(ValueError, match=message):
            BiLevelRoutingAttention(8, **({"num_heads": 2} | options))
    with pytest.raises(ValueError, match=r"x must be \(B, T, H, W, 8\)"):
        BiLevelRoutingAttention(8, 2)(torch.zeros(1, 4, 4, 8))
    with pytest.raises(ValueError, match="with at least one frame, row and column, got"):
        BiLevelRoutingAttention(8, 2)(torch.zeros(1, 0, 4, 4, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["masked", "zeros"])
@pytest.mark.parametrize(
    ("grid", "region", "topk"),
    [((1, 56, 56), (1, 8, 8), 4), ((1, 30, 21), (1, 4, 3), 5), ((4, 28, 28), (4, 4, 4), 4)],
)
def test_flex_on_a_gpu_is_the_definition(grid, region, topk, padding) -> None:
    tensors = [x.float().cuda() for x in inputs(2, *grid, 2, 32)]
    grads = {}
    for name in ("gather", "flex", "blocked"):
        wide = torch.float64 if name == "gather" else torch.float32
        leaves = [x.detach().to(wide, copy=True).requires_grad_() for x in tensors]
        out = bilevel_routing_attention(
            *leaves, region=region, topk=topk, padding=padding, implementation=name
        )
        (out * torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)).sum().backward()
        grads[name] = [out, *(x.grad for x in leaves)]
    for name in ("flex", "blocked"):
        for got, wanted in zip(grads[name], grads["gather"], strict=True):
            assert (got - wanted).abs().max() < 5e-3 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["masked", "zeros"])
def test_flex_compiled_inside_a_graph_is_the_definition(padding: str) -> None:
    """The block mask is used only here and on a GPU; eager FlexAttention looks at the dense mask."""
    tensors = [x.float() for x in inputs(2, 2, 15, 13, 2, 16)]
    options = {"region": (2, 4, 3), "topk": 3, "padding": padding}
    wanted = bilevel_routing_attention(*tensors, **options, implementation="gather")
    torch.compiler.reset()
    compiled = torch.compile(bilevel_routing_attention, fullgraph=True, dynamic=False)
    assert (compiled(*tensors, **options, implementation="flex") - wanted).abs().max() < 1e-5
