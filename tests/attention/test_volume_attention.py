"""The attention mechanisms against references written out in float64."""

import math

import pytest
import torch
from torch import Tensor

from stvision.attention import (
    ATTENTIONS,
    SeerWindowAttention,
    VolumeAttention,
    dispatch_attention,
    windowed_causal_attention,
)
from stvision.attention.seer_window import seer_window


def visible(grid: tuple[int, int, int], window: tuple[int, int], causal: bool) -> Tensor:
    """(N, N) mask of the volume's tokens in (frame, row, column) order."""
    _, y, x = torch.meshgrid(*[torch.arange(n) for n in grid], indexing="ij")
    cell = (y // window[0] * 10_000 + x // window[1]).flatten()
    same = cell[:, None] == cell[None, :]
    # inside a window the order of the volume and that of the window agree
    index = torch.arange(cell.numel())
    return same & (index[:, None] >= index[None, :]) if causal else same


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(B, T, H, W, heads, d) attention over all tokens with a mask, in float64."""
    shape = q.shape
    q, k, v = (x.double().flatten(1, 3) for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(shape[-1])
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).reshape(shape)


CASES = [
    ((3, 8, 8), None),  # windows of 4
    ((2, 9, 6), None),  # ragged right and below
    ((2, 5, 7), (2, 3)),
    ((3, 4, 9), None),  # whole map: height 4
    ((1, 1, 1), None),
    ((2, 32, 10), None),  # height decides: windows of 8, ragged in width
    ((2, 3, 5), (7, 7)),  # larger than the map
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_windowed_causal_attention_is_the_masked_one(grid, window, dtype) -> None:
    q, k, v = (torch.randn(2, *grid, 2, 10).to(dtype) for _ in range(3))
    got = windowed_causal_attention(q, k, v, window)
    size = seer_window(*grid[1:]) if window is None else window
    expected = written_out(q, k, v, visible(grid, size, causal=True))
    assert got.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    math_backend = windowed_causal_attention(q, k, v, window, backend="math")
    torch.testing.assert_close(math_backend.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_of_windowed_causal_attention() -> None:
    grid = (2, 5, 6)
    q, k, v = (torch.randn(1, *grid, 2, 4).double().requires_grad_() for _ in range(3))
    direction = torch.randn(1, *grid, 2, 4).double()
    got = torch.autograd.grad(windowed_causal_attention(q, k, v), (q, k, v), direction)
    mask = visible(grid, (4, 4), causal=True)
    expected = torch.autograd.grad(written_out(q, k, v, mask), (q, k, v), direction)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def module_reference(module: VolumeAttention, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """The module's attention over all tokens with a mask, rotary written out, in float64."""
    weights = {name: value.double() for name, value in module.state_dict().items()}
    x = x.double()
    shape = (*x.shape[:4], module.heads, module.head_dim)
    q, k, v = ((x @ weights[f"to_{n}.weight"].T).reshape(shape) for n in "qkv")
    dim = 2 * weights["rotary_emb.freqs"].shape[0]
    angle = positions.double()[..., None] * 1e4 ** (-torch.arange(0, dim, 2).double() / dim)
    turn = torch.polar(torch.ones_like(angle), angle)[:, :, :, None]

    def rotate(y: Tensor) -> Tensor:
        pairs = torch.view_as_complex(y[..., :dim].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat((torch.view_as_real(pairs * turn).flatten(-2), y[..., dim:]), -1)

    out = written_out(rotate(q), rotate(k), v, mask).flatten(-2)
    return out @ weights["to_out.0.weight"].T + weights["to_out.0.bias"]


@pytest.mark.parametrize("grid", [(3, 8, 8), (2, 6, 9), (2, 4, 3)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seer-window", {}),
        ("seer-window", {"window_size": (2, 3)}),
        ("full", {}),
        ("full", {"causal": True}),
        ("temporal", {}),
        ("temporal", {"causal": True}),
    ],
)
def test_modules_against_the_masked_reference(name, options, grid) -> None:
    module = ATTENTIONS[name](24, 2, rotary_dim=8, **options)
    x = torch.randn(2, *grid, 24)
    flat = torch.arange(math.prod(grid)).reshape(grid)
    if name == "temporal":
        flat = torch.arange(grid[0])[:, None, None].expand(grid)
    mask = visible(grid, module.window(*grid[1:]), module.causal)
    expected = module_reference(module, x, mask, flat)
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_neighborhood_with_a_box_over_everything_is_full_attention() -> None:
    full = ATTENTIONS["full"](16, 2)
    near = ATTENTIONS["neighborhood"](16, 2, kernel_size=(9, 9, 9))
    near.load_state_dict(full.state_dict())
    x = torch.randn(1, 3, 4, 5, 16)
    torch.testing.assert_close(near(x), full(x), rtol=1e-5, atol=1e-5)


def test_neighborhood_sees_its_box_only() -> None:
    module = ATTENTIONS["neighborhood"](16, 2, kernel_size=(1, 3, 3))
    x = torch.randn(1, 2, 7, 7, 16)
    moved = x.clone()
    moved[0, 0, 3, 3] += torch.randn(16)
    changed = (module(x) - module(moved)).abs().amax(-1)[0] > 1e-7
    expected = torch.zeros(2, 7, 7, dtype=torch.bool)
    expected[0, 2:5, 2:5] = True
    assert torch.equal(changed, expected)


def test_e_a_token_changes_only_later_tokens_of_its_window() -> None:
    """Proof (e)."""
    module = SeerWindowAttention(16, 2)
    grid = (3, 8, 12)
    x = torch.randn(1, *grid, 16)
    frame, row, column = 1, 2, 5
    moved = x.clone()
    moved[0, frame, row, column] += torch.randn(16)
    changed = ((module(x) - module(moved)).abs().amax(-1)[0] > 0).flatten()
    index = torch.arange(math.prod(grid)).reshape(grid)[frame, row, column]
    assert torch.equal(changed, visible(grid, (4, 4), causal=True)[:, index])


def test_packed_attention_is_the_volume_attention() -> None:
    module = SeerWindowAttention(24, 3)
    x = torch.randn(2, 2, 8, 12, 24)
    layout = module.layout((2, 8, 12))
    assert layout is not None and layout.counts == (2, 3)
    assert torch.equal(layout.unpack(layout.pack(x)), x)
    ragged = module.attend_ragged(x)
    torch.testing.assert_close(module(x), ragged, rtol=1e-5, atol=1e-6)
    assert module.layout((2, 9, 12)) is None


VOLUME_KINDS = [
    ("seer-window", {}),
    ("full", {"causal": True}),
    ("temporal", {}),
    ("neighborhood", {"causal": True}),
]


@pytest.mark.parametrize(("name", "options"), VOLUME_KINDS)
def test_modules_compile_as_one_graph_for_changing_sizes(name, options) -> None:
    """The sizes become symbols from the second clip on, but for windows, whose borders they cut."""
    module = ATTENTIONS[name](16, 2, **options).double()
    torch.compiler.reset()
    dynamic = False if name == "seer-window" else None
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for grid in ((3, 8, 8), (2, 5, 9), (6, 13, 11)):
        x = torch.randn(1, *grid, 16, dtype=torch.float64, requires_grad=True)
        got, expected = compiled(x), module(x)
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("name", "options"), VOLUME_KINDS)
def test_gradients_of_modules_are_those_of_differences(name, options) -> None:
    module = ATTENTIONS[name](8, 2, **options).double()
    names, values = zip(*module.named_parameters(), strict=True)
    x = torch.randn(1, 3, 5, 6, 8, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


@pytest.mark.parametrize(("name", "options"), VOLUME_KINDS)
def test_modules_in_bfloat16_and_under_autocast(name, options) -> None:
    module = ATTENTIONS[name](32, 2, **options)
    x = torch.randn(2, 3, 9, 10, 32)
    wanted = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x)
        mixed.float().sum().backward()
    half = module.bfloat16()(x.bfloat16())
    assert mixed.dtype == half.dtype == torch.bfloat16
    for got in (mixed, half):
        assert (got.float() - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_weights_are_interchangeable() -> None:
    keys = {
        name: list(kind(16, 2).state_dict())
        for name, kind in ATTENTIONS.items()
        if issubclass(kind, VolumeAttention)
    }
    assert set(map(tuple, keys.values())) == {tuple(keys["seer-window"])}


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_dispatch_takes_masks(backend: str) -> None:
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    mask = torch.rand(2, 3, 5, 7) > 0.3
    mask[..., 0] = True
    scores = torch.einsum("bihd,bjhd->bhij", q, k).double() / math.sqrt(8)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v.double())
    got = dispatch_attention(q, k, v, mask=mask, backend=backend)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    bias = torch.zeros(2, 3, 5, 7).masked_fill(~mask, -1e9)
    got = dispatch_attention(q, k, v, mask=bias, backend=backend)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_dispatch_refuses_what_it_cannot_do() -> None:
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="one of 'sdpa', 'xformers', 'math', got 'flash9'"):
        dispatch_attention(x, x, x, backend="flash9")
    with pytest.raises(ValueError, match="'xformers' takes no mask"):
        dispatch_attention(x, x, x, mask=torch.ones(4, 4, dtype=torch.bool), backend="xformers")
    with pytest.raises(ValueError, match="needs tensors on a CUDA device"):
        dispatch_attention(x, x, x, backend="xformers")
    with pytest.raises(ValueError, match="either mask or is_causal"):
        dispatch_attention(x, x, x, mask=torch.ones(4, 4, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match="as many keys as queries"):
        dispatch_attention(x, x[:, :2], x[:, :2], is_causal=True)
    with pytest.raises(ValueError, match="equal heads"):
        dispatch_attention(x, x[:, :, :1], x[:, :, :1])


def test_bad_module_arguments() -> None:
    with pytest.raises(ValueError, match="heads must divide dim"):
        SeerWindowAttention(10, 3)
    with pytest.raises(ValueError, match="window_size must be"):
        SeerWindowAttention(8, 2, window_size=0)
    with pytest.raises(ValueError, match="rotary_dim must be a whole number of at least 0, got -4"):
        SeerWindowAttention(8, 2, rotary_dim=-4)
    for name in ("seer-window", "full", "temporal", "neighborhood"):
        for shape in ((2, 3, 8), (1, 2, 4, 4, 6), (1, 0, 4, 4, 8)):
            with pytest.raises(ValueError, match=r"x must be \(B, T, H, W, 8\) with at least one"):
                ATTENTIONS[name](8, 2)(torch.randn(shape))
    with pytest.raises(ValueError, match="kernel_size must be"):
        ATTENTIONS["neighborhood"](8, 2, kernel_size=(1, 2))
