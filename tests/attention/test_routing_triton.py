"""The Triton kernels of bi-level routing against the gather in float64.

Through the interpreter on a CPU, where float32 and float16 stand for all types, as it has no
bfloat16 products; compiled where there is a GPU.
"""

import math
from typing import Any

import pytest
import torch
from support_neighborhood import RELATIVE, poisoned, relative_error
from torch import Tensor

from stvision.attention import BiLevelRoutingAttention, routing
from stvision.attention.routing import bilevel_routing_attention
from stvision.kernels.neighborhood.choice import interpreted

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not routing.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)
if not CUDA and not interpreted():
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from stvision.attention import routing_triton

HALVES = [torch.float16] if interpreted() else [torch.float16, torch.bfloat16]

CASES = [
    # grid, region, topk, batch, heads, head_dim, padding
    pytest.param((1, 6, 8), (1, 3, 2), 3, 2, 2, 8, "masked", id="image"),
    pytest.param((1, 7, 5), (1, 3, 2), 4, 2, 2, 24, "masked", id="image-ragged"),
    pytest.param((1, 7, 5), (1, 3, 2), 4, 1, 1, 24, "zeros", id="image-zeros"),
    pytest.param((1, 7, 5), (1, 3, 2), 9, 1, 1, 32, "masked", id="all-regions"),
    pytest.param((5, 5, 4), (2, 3, 3), 3, 1, 2, 32, "zeros", id="clip-zeros"),
    pytest.param((5, 5, 4), (2, 3, 3), 1, 1, 2, 40, "masked", id="clip-ragged-one-region"),
    pytest.param((3, 4, 4), (9, 2, 2), 2, 1, 3, 16, "masked", id="tubes"),
    pytest.param((2, 3, 3), (1, 1, 1), 18, 1, 1, 8, "masked", id="regions-of-a-token"),
    pytest.param((1, 16, 24), (1, 8, 8), 2, 1, 1, 32, "masked", id="a-region-a-tile"),
    pytest.param((4, 8, 8), (2, 4, 4), 3, 1, 1, 64, "masked", id="regions-of-32"),
    pytest.param((4, 16, 8), (2, 8, 8), 2, 1, 1, 32, "masked", id="tiles-of-a-region"),
    pytest.param((1, 13, 24), (1, 9, 8), 2, 1, 1, 72, "masked", id="tiles-and-rests"),
    pytest.param((2, 3, 3), (1, 2, 2), 3, 1, 1, 256, "masked", id="widest-head"),
]


def problem(
    seed: int, batch: int, grid: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype
) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, *grid, heads, head_dim)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype) for _ in "qkvo"]


def results(tensors: list[Tensor], up: Tensor, **options: Any) -> list[Tensor]:
    """The output and the three gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = bilevel_routing_attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, up.to(out.dtype))]


def check(tensors: list[Tensor], up: Tensor, **options: Any) -> list[float]:
    """Compare with the gather in float64, with buffers full of NaN; the errors found."""
    exact = [x.detach().double() for x in tensors]
    # the routing of the given numbers, which float64 may break a tie of in another way
    wanted = results(exact, up.double(), **options, implementation="gather")
    with poisoned():
        found = results(tensors, up, **options, implementation="triton")
    assert all(x.dtype == tensors[0].dtype for x in found)
    errors = [relative_error(a, b.cpu()) for a, b in zip(found, wanted, strict=True)]
    assert max(errors) <= RELATIVE[tensors[0].dtype], errors
    return errors


@pytest.mark.parametrize(("grid", "region", "topk", "batch", "heads", "head_dim", "padding"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_equals_the_gather(grid, region, topk, batch, heads, head_dim, padding, dtype) -> None:
    *tensors, up = problem(0, batch, grid, heads, head_dim, dtype)
    check(tensors, up, region=region, topk=topk, padding=padding)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_gather_at_random_sizes(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    grid = (draw(1, 3), draw(1, 9), draw(1, 9))
    region = (draw(1, 3), draw(1, 6), draw(1, 6))
    count = math.prod(-(-n // min(n, r)) for n, r in zip(grid, region, strict=True))
    *tensors, up = problem(seed, draw(1, 2), grid, draw(1, 2), 8 * draw(1, 5), torch.float32)
    options = {"topk": draw(1, min(count, 12)), "padding": ("masked", "zeros")[draw(0, 1)]}
    check(tensors, up, region=region, scale=0.1 * draw(-3, 9), **options)


def test_reads_any_strides() -> None:
    """Parts of one projection, heads before places, and an expanded gradient."""
    g = torch.Generator().manual_seed(0)
    joint = torch.randn(1, 2, 5, 6, 3, 2, 8, generator=g).to(DEVICE)
    check([*joint.unbind(4)], torch.ones((), device=DEVICE).expand(1, 2, 5, 6, 2, 8),
          region=(2, 3, 3), topk=2)  # fmt: skip
    outer = torch.randn(3, 1, 2, 2, 5, 6, 8, generator=g).to(DEVICE).permute(0, 1, 3, 4, 5, 2, 6)
    spread = torch.randn(1, 2, 5, 6, 2, 16, generator=g).to(DEVICE)[..., ::2]
    check([*outer[:2], spread], spread * 2, region=(2, 3, 3), topk=2)


def test_a_region_that_all_pick_and_regions_that_none_picks() -> None:
    *tensors, up = problem(3, 1, (1, 8, 8), 1, 16, torch.float32)
    query, key = tensors[:2]
    query[..., 0], key[..., 0] = 1.0, 0.0
    key[:, :, 2:4, 4:6, :, 0] = 100.0  # region 6 answers all
    for topk in (1, 2):
        check(tensors, up, region=(1, 2, 2), topk=topk, scale=0.01)
    with poisoned():
        _, _, dk, dv = results(tensors, up, region=(1, 2, 2), topk=1, implementation="triton")
    picked = torch.zeros(1, 1, 8, 8, dtype=torch.bool, device=DEVICE)
    picked[:, :, 2:4, 4:6] = True
    for x in (dk, dv):
        assert torch.equal(x.ne(0).any(-1).any(-1), picked)


def test_scores_far_below_zero_leave_padding_without_weight() -> None:
    """The sum of exponentials underflows, so a key of zeros behind the grid would weigh infinitely."""
    *tensors, up = problem(4, 1, (1, 5, 5), 1, 16, torch.float32)
    query, key = tensors[:2]
    query.mul_(0.1).add_(2.6)
    key.mul_(0.1).sub_(2.6)
    check(tensors, up, region=(1, 3, 3), topk=2, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    ("grid", "region", "heads", "head_dim", "topk"),
    [
        ((1, 6, 8), (1, 3, 2), 2, 8, 3),
        ((5, 7, 5), (2, 3, 2), 3, 24, 24),
        ((1, 20, 9), (1, 1, 1), 1, 40, 2),
        ((2, 19, 9), (2, 19, 4), 1, 200, 3),
        ((1, 10, 10), (1, 1, 1), 1, 16, 70),
    ],
)
def test_picks_the_regions_of_the_definition(grid, region, heads, head_dim, topk, dtype) -> None:
    """Also from tensors of other strides than one another, and more picks than the kernel takes."""
    query, key = problem(6, 2, grid, heads, head_dim, dtype)[:2]
    key = key.transpose(1, 3).contiguous().transpose(1, 3)
    found = poisoned_route(query, key, region, topk)
    layout = routing.RegionLayout(grid, region)
    wanted = routing.route_regions(layout.mean(query.double()), layout.mean(key.double()), topk)
    assert found.dtype == torch.int32
    assert torch.equal(found.cpu().long(), wanted.cpu())


def poisoned_route(query: Tensor, key: Tensor, region: Any, topk: int) -> Tensor:
    with poisoned():
        return routing_triton.route(query, key, region, topk)


def test_picks_the_first_of_equals_and_each_once() -> None:
    """Affinities that tie, that overflow, and that are no numbers."""
    query = torch.ones(1, 1, 3, 3, 1, 8, device=DEVICE)
    first = torch.arange(9, device=DEVICE)
    found = poisoned_route(query, query, (1, 1, 1), 9)
    assert torch.equal(found[0].long(), first.expand(9, 9))
    key = query.clone()
    key[:, :, 1, 1] = 2.0
    key[:, :, 0, 2] = -torch.inf
    found = poisoned_route(query, key, (1, 1, 1), 9)
    assert found[0, 0].tolist() == [4, 0, 1, 3, 5, 6, 7, 8, 2]
    key[:, :, 2, 2] = torch.nan
    found = poisoned_route(query, key, (1, 1, 1), 9)
    assert found[0, 0].tolist() == [8, 4, 0, 1, 3, 5, 6, 7, 2]
    found = poisoned_route(query * torch.nan, key, (1, 1, 1), 5)
    assert torch.equal(found[0].long(), first[:5].expand(9, 5))


@pytest.mark.parametrize(("regions", "topk"), [(1, 1), (5, 5), (9, 2), (40, 30)])
def test_the_inversion_lists_who_picked(regions: int, topk: int) -> None:
    """More picks than a program reads at once among them."""
    g = torch.Generator().manual_seed(0)
    index = torch.rand(3, regions, regions, generator=g).square().argsort(-1)[..., :topk]
    if regions == 9:
        index[0] = torch.tensor([4, 7])
    askers, starts = routing_triton.invert(index.int().contiguous().to(DEVICE))
    for b in range(3):
        for r in range(regions):
            wanted = [i for i in range(regions) if r in index[b, i]]
            begin, end = starts[b, r : r + 2].tolist()
            assert askers.view(3, -1)[b, begin:end].tolist() == wanted
    assert starts[:, -1].tolist() == [regions * topk] * 3


def test_tiles_shrink_to_what_a_device_has_room_for(monkeypatch) -> None:
    *tensors, up = problem(5, 1, (1, 16, 16), 1, 16, torch.float32)
    launch, refused = routing_triton._launch, []

    def small(kernel: Any, programs: int, device: Any, arguments: tuple, constants: dict) -> None:
        if constants.get("M", 0) * constants.get("N", 0) > 256:
            refused.append(kernel)
            raise OutOfResources(2, 1, "shared memory")
        launch(kernel, programs, device, arguments, constants)

    monkeypatch.setattr(routing_triton, "_launch", small)
    monkeypatch.setattr(routing_triton, "_FITTING", {})
    check(tensors, up, region=(1, 8, 8), topk=2)
    assert len(set(refused)) == 3
    before = len(refused)
    check(tensors, up, region=(1, 8, 8), topk=2)
    assert len(refused) == before


def test_one_graph_autocast_and_sound_operators() -> None:
    *tensors, up = problem(1, 1, (1, 4, 3), 1, 8, torch.float32)
    options = {"region": (1, 2, 2), "topk": 2, "implementation": "triton"}
    wanted = results(tensors, up, **options)
    leaves = [x.detach().requires_grad_() for x in tensors]
    torch.compiler.reset()
    for dynamic in (False, True):
        compiled = torch.compile(
            bilevel_routing_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic
        )
        out = compiled(*leaves, **options)
        found = [out, *torch.autograd.grad(out, leaves, up)]
        assert max(relative_error(a, b.cpu()) for a, b in zip(found, wanted, strict=True)) < 1e-6
    with torch.autocast(DEVICE, torch.bfloat16):
        found = results(tensors, up, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    arguments = (*leaves, [1, 2, 2], 2, False, 0.3)
    torch.library.opcheck(routing._triton_op, arguments)
    out, lse, index = (x.detach() for x in routing._triton_op(*arguments))
    arguments = (up, *tensors, index, out, lse, [1, 2, 2], False, 0.3)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(routing._triton_backward_op, arguments, test_utils=checks)


def test_the_module_runs_on_them() -> None:
    torch.manual_seed(0)
    for flavour in ("nchw", "legacy", "masked"):
        options = {"n_win": 2, "topk": 2, "flavour": flavour, "frame_kernel": 3}
        module = BiLevelRoutingAttention(16, 2, **options, implementation="triton").to(DEVICE)
        peer = BiLevelRoutingAttention(16, 2, **options, implementation="gather").to(DEVICE)
        peer.load_state_dict(module.state_dict())
        peer.double()
        x = torch.randn(1, 3, 5, 7, 16, device=DEVICE)
        grads = []
        for net in (module, peer):
            net(x.to(net.qkv.weight.dtype)).square().sum().backward()
            grads.append([p.grad for p in net.parameters()])
        for a, b in zip(*grads, strict=True):
            assert relative_error(a, b.cpu()) < 1e-5


def test_refusals_are_sentences() -> None:
    *tensors, up = problem(0, 1, (1, 4, 4), 1, 8, torch.float32)
    options = {"region": (1, 2, 2), "topk": 2, "implementation": "triton"}
    refused = "implementation 'triton' cannot run this: "
    with pytest.raises(ValueError, match=refused + "it takes float32, float16 and bfloat16, got"):
        bilevel_routing_attention(*(x.double() for x in tensors), **options)
    with pytest.raises(ValueError, match=refused + "it takes one dtype, got"):
        bilevel_routing_attention(tensors[0].half(), *tensors[1:], **options)
    wide = [x.new_zeros(1, 1, 4, 4, 1, 264) for x in tensors]
    with pytest.raises(ValueError, match=refused + "head_dim is at most 256, not 264"):
        bilevel_routing_attention(*wide, **options)
    leaves = [x.requires_grad_() for x in tensors]
    for name in ("triton", "blocked"):
        out = bilevel_routing_attention(*leaves, **(options | {"implementation": name}))
        (first,) = torch.autograd.grad(out, leaves[0], up.requires_grad_(), create_graph=True)
        with pytest.raises(NotImplementedError, match="has no second derivative; take"):
            torch.autograd.grad(first.sum(), leaves[1])


GPU_CASES = [
    # grid, region, topk, padding: regions of 64, 256, 16 and 4 tokens; ragged ones
    pytest.param((1, 56, 56), (1, 8, 8), 4, "masked", id="56"),
    pytest.param((16, 28, 28), (16, 4, 4), 4, "masked", id="clip-tubes"),
    pytest.param((16, 28, 28), (1, 4, 4), 4, "masked", id="clip-per-frame"),
    pytest.param((1, 14, 14), (1, 2, 2), 16, "masked", id="14"),
    pytest.param((3, 30, 21), (2, 4, 3), 5, "masked", id="ragged"),
    pytest.param((3, 30, 21), (2, 4, 3), 5, "zeros", id="ragged-zeros"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("grid", "region", "topk", "padding"), GPU_CASES)
def test_a_gpu_equals_the_gather(grid, region, topk, padding, dtype, head_dim) -> None:
    """At sizes of use, and the same twice, bit by bit."""
    *tensors, up = problem(0, 1, grid, 2, head_dim, dtype)
    options = {"region": region, "topk": topk, "padding": padding}
    check(tensors, up, **options)
    first, second = (results(tensors, up, **options, implementation="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 24, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("grid", "region"), [((1, 16, 16), (1, 8, 8)), ((1, 10, 10), (1, 4, 4)), ((3, 9, 9), (2, 5, 5))]
)
def test_other_heads_on_a_gpu(grid, region, dtype, head_dim) -> None:
    *tensors, up = problem(0, 2, grid, 4, head_dim, dtype)
    check(tensors, up, region=region, topk=2)


@pytest.mark.gpu
@pytest.mark.parametrize(("grid", "region", "topk", "padding"), GPU_CASES)
def test_compiled_on_a_gpu(grid, region, topk, padding) -> None:
    *tensors, up = problem(0, 2, grid, 2, 32, torch.bfloat16)
    options = {"region": region, "topk": topk, "padding": padding, "implementation": "triton"}
    wanted = results(tensors, up, **options)
    torch.compiler.reset()
    compiled = torch.compile(bilevel_routing_attention, fullgraph=True, dynamic=False)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = compiled(*leaves, **options)
    found = [out, *torch.autograd.grad(out, leaves, up)]
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b.cpu()) <= RELATIVE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize(("grid", "region", "topk", "padding"), GPU_CASES)
def test_captured_as_a_cuda_graph(grid, region, topk, padding) -> None:
    """A replay on new numbers, whose routing is another one."""
    options = {"region": region, "topk": topk, "padding": padding, "implementation": "triton"}
    *static, up = problem(0, 2, grid, 2, 32, torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            results(static, up, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(static, up, **options)
    *fresh, fresh_up = problem(1, 2, grid, 2, 32, torch.bfloat16)
    for old, new in zip((*static, up), (*fresh, fresh_up), strict=True):
        old.copy_(new)
    graph.replay()
    wanted = results(fresh, fresh_up, **options)
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


@pytest.mark.gpu
def test_only_the_inputs_and_the_output_lie_in_memory() -> None:
    """What a forward and backward add: output, its copy in the gradient, and three gradients."""
    *tensors, up = problem(0, 16, (1, 56, 56), 4, 32, torch.bfloat16)
    options = {"region": (1, 8, 8), "topk": 4}
    peaks = {}
    for name in ("triton", "gather"):
        results(tensors, up, **options, implementation=name)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results(tensors, up, **options, implementation=name)
        peaks[name] = torch.cuda.max_memory_allocated() - before
    size = up.numel() * up.element_size()
    assert peaks["triton"] < 6 * size
    assert peaks["gather"] > 2 * peaks["triton"]
