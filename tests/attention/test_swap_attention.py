"""Swap-CA against plain attention, its own description, and what must not matter."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stvision.attention import SwapAttention, windowed_cross_attention
from stvision.layers.feed_forward import GatedFeedForward
from stvision.layers.frames import FrameConv

SHAPE = (2, 4, 6, 5)  # B, T, H, W


def volumes(count, *shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]  # fmt: skip


def plain(query, key, value):
    """(N, L, heads, d), one softmax over all L."""
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    return out.transpose(1, 2)


def shaken(module, seed=1):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.any() or parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    return module.eval()


def test_the_whole_volume_as_window_is_plain_cross_attention():
    q, k, v = volumes(3, *SHAPE, 2, 8)
    expected = plain(*(x.flatten(1, 3) for x in (q, k, v))).view(q.shape)
    for window in ((4, 6, 5), (None, 6, 5), (9, 9, 9)):
        torch.testing.assert_close(windowed_cross_attention(q, k, v, window), expected)


def test_thin_windows_are_temporal_and_spatial_cross_attention():
    q, k, v = volumes(3, *SHAPE, 2, 8)
    # per pixel, over frames: (B, H, W, T, heads, d)
    pixels = [x.permute(0, 2, 3, 1, 4, 5) for x in (q, k, v)]
    expected = plain(*(x.flatten(0, 2) for x in pixels)).view(pixels[0].shape)
    expected = expected.permute(0, 3, 1, 2, 4, 5)
    torch.testing.assert_close(windowed_cross_attention(q, k, v, (None, 1, 1)), expected)
    # per frame, over the picture
    expected = plain(*(x.flatten(0, 1).flatten(1, 2) for x in (q, k, v))).view(q.shape)
    torch.testing.assert_close(windowed_cross_attention(q, k, v, (1, 6, 5)), expected)


def padded_and_masked(query, key, value, window):
    """Pad the volume to whole windows, forbid the pads as keys, cut them off."""
    sizes = query.shape[1:4]
    pads = [-size % extent for size, extent in zip(sizes, window, strict=True)]
    pad = (0, 0, 0, 0, 0, pads[2], 0, pads[1], 0, pads[0])
    grid = [(size + p) // extent for size, p, extent in zip(sizes, pads, window, strict=True)]

    def windows(x):
        x = F.pad(x, pad).unflatten(3, (grid[2], window[2])).unflatten(2, (grid[1], window[1]))
        x = x.unflatten(1, (grid[0], window[0]))
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7, 8)  # (B, nT, nH, nW, tT, tH, tW, heads, d)
        return x.flatten(4, 6).flatten(0, 3)

    inside = windows(torch.ones(1, *sizes, 1, 1)).bool()[..., 0, 0]  # (windows, L)
    inside = inside.repeat(query.shape[0], 1)[:, None, None]
    q, k, v = (windows(x).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=inside).transpose(1, 2)
    out = out.unflatten(1, window).unflatten(0, (-1, *grid))
    out = out.permute(0, 1, 4, 2, 5, 3, 6, 7, 8).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    return out[:, : sizes[0], : sizes[1], : sizes[2]]


@pytest.mark.parametrize("window", [(2, 3, 5), (3, 4, 3), (1, 4, 2), (4, 5, 4)])
def test_windows_and_their_gradients_are_those_of_padding_and_masking(window):
    results = []
    for function in (windowed_cross_attention, padded_and_masked):
        leaves = [x.requires_grad_() for x in volumes(3, *SHAPE, 2, 8)]
        out = function(*leaves, window)
        (out * torch.linspace(0, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("window", "shift"),
    [
        ((3, 4, 2), (1, 2, 1)),
        ((2, 5, 3), (1, 3, 0)),
        ((None, 4, 4), (0, 1, 3)),
        ((4, 2, 5), (3, 1, 4)),  # frames and columns are one window: not shifted
    ],
)
def test_shifted_windows_are_masked_pairs(window, shift):
    """A token sees those in its cell of a raster that begins at the shift."""
    cells = []
    for size, extent, move in zip(SHAPE[1:], window, shift, strict=True):
        whole = extent is None or extent >= size
        cells.append(torch.arange(size) * 0 if whole else (torch.arange(size) - move) // extent)
    t, y, x = torch.meshgrid(*cells, indexing="ij")
    name = (t * 100 + y * 10 + x).flatten()
    q, k, v = volumes(3, *SHAPE, 2, 8)
    flat = [z.flatten(1, 3).transpose(1, 2) for z in (q, k, v)]
    expected = F.scaled_dot_product_attention(*flat, attn_mask=name[:, None] == name)
    found = windowed_cross_attention(q, k, v, window, shift=shift)
    torch.testing.assert_close(found, expected.transpose(1, 2).view(q.shape))
    torch.manual_seed(0)
    moved = shaken(SwapAttention(8, 2, window=window, shift=shift, norm_num_groups=4)).double()
    still = SwapAttention(8, 2, window=window, norm_num_groups=4).double()
    still.load_state_dict(moved.state_dict())
    z_s, z_t = volumes(2, *SHAPE, 8)
    assert (moved(z_s, z_t) - still(z_s, z_t)).abs().max() > 1e-4


@pytest.mark.parametrize("window", [(None, 3, 5), (2, 4, 2)])
def test_a_changed_token_matters_in_its_window_only(window):
    module = shaken(SwapAttention(8, 2, window=window, norm_num_groups=4)).double()
    z_s, z_t = volumes(2, *SHAPE, 8)
    generator = torch.Generator().manual_seed(5)
    u, other = z_s, z_s.clone()
    other[0, 3, 4, 1] += torch.randn(8, generator=generator, dtype=torch.float64)
    # group norms see everything: the rule is that of the block behind them
    block = module.block
    changed = (block(z_t, u) - block(z_t, other)).abs().amax(-1) > 1e-9
    expected = torch.zeros(SHAPE, dtype=torch.bool)
    frames = slice(0, 4) if window[0] is None else slice(2, 4)
    rows = slice(3, 6) if window[1] == 3 else slice(4, 6)
    columns = slice(0, 5) if window[2] == 5 else slice(0, 2)
    expected[0, frames, rows, columns] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("query", ["temporal", "spatial"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_module_adds_the_branches_exactly(query, dtype):
    module = SwapAttention(8, 2, query=query, norm_num_groups=4).to(dtype)
    z_s, z_t = volumes(2, *SHAPE, 8, dtype=dtype)
    assert torch.equal(module(z_s, z_t), z_s + z_t)
    assert torch.equal(module(z_s, torch.zeros_like(z_s)), z_s)


def test_roles_are_swapped_with_the_arguments():
    asking_in_time = shaken(SwapAttention(8, 2, query="temporal", norm_num_groups=4)).double()
    asking_in_space = SwapAttention(8, 2, query="spatial", norm_num_groups=4).double()
    asking_in_space.load_state_dict(asking_in_time.state_dict())
    z_s, z_t = volumes(2, *SHAPE, 8)
    expected = asking_in_time(z_s, z_t)
    torch.testing.assert_close(asking_in_space(z_t, z_s), expected)
    assert (asking_in_space(z_s, z_t) - expected).abs().max() > 1e-2


def written_out(module, asking, answering, norm_frames, skip, window):
    """h' of the equations, float64."""

    def normed(norm, z):
        x = z if norm_frames == z.shape[1] else z.flatten(0, 1)[:, None]
        x = x.unflatten(-1, (norm.num_groups, -1))
        axes = (1, 2, 3, 5)
        mean, var = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, unbiased=False)
        x = ((x - mean) / (var + 1e-6).sqrt()).flatten(-2).view(z.shape)
        return x * norm.weight + norm.bias

    def layer_norm(norm, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * norm.weight + norm.bias

    block = module.block
    u_q = normed(module.norm_q, asking) @ module.proj_q.weight.T + module.proj_q.bias
    u_kv = normed(module.norm_kv, answering) @ module.proj_kv.weight.T + module.proj_kv.bias
    lq, lkv = layer_norm(block.norm_q, u_q), layer_norm(block.norm_kv, u_kv)
    attn = block.attn
    q, k, v = (
        (x @ to.weight.T).unflatten(-1, (attn.heads, -1))
        for to, x in ((attn.to_q, lq), (attn.to_k, lkv), (attn.to_v, lkv))
    )
    mixed = padded_and_masked(q, k, v, window).flatten(-2)
    h = mixed @ attn.to_out[0].weight.T + attn.to_out[0].bias + u_q
    a, b = (layer_norm(block.norm_ff, h) @ block.ff.proj.weight.T + block.ff.proj.bias).chunk(2, -1)
    ff = (a * 0.5 * b * (1 + torch.erf(b / 2**0.5))) @ block.ff.out.weight.T + block.ff.out.bias
    ff[:, :skip] = 0
    return (ff + h) @ module.proj_out.weight.T + module.proj_out.bias


@pytest.mark.parametrize("query", ["temporal", "spatial"])
@pytest.mark.parametrize(("norm_frames", "skip"), [(4, 0), (1, 2)])
@torch.no_grad()
def test_module_is_the_written_out_equations(query, norm_frames, skip):
    module = SwapAttention(8, 2, query=query, window=(3, 4, 2), ff_mult=3, norm_num_groups=4)
    shaken(module).double()
    z_s, z_t = volumes(2, *SHAPE, 8)
    roles = (z_t, z_s) if query == "temporal" else (z_s, z_t)
    expected = z_s + z_t + written_out(module, *roles, norm_frames, skip, (3, 4, 2))
    torch.testing.assert_close(module(z_s, z_t, norm_frames, skip), expected)
    single = module.float()(z_s.float(), z_t.float(), norm_frames, skip)
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_both_branches_and_all_weights_after_one_step():
    torch.manual_seed(0)
    module = SwapAttention(8, 2, window=(2, 3, 3), norm_num_groups=4).double()
    # as in a fresh inflation, the temporal branch is zero behind a projection
    out = nn.Linear(8, 8).double()
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    z_s, features, target = volumes(3, *SHAPE, 8)
    optimizer = torch.optim.SGD([*module.parameters(), *out.parameters()], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (module(z_s, out(features)) - target).square().mean().backward()
        optimizer.step()
    branches = [z_s.requires_grad_(), features.requires_grad_()]
    optimizer.zero_grad()
    z_t = out(branches[1])
    z_t.retain_grad()
    # beyond the sum of the branches
    module.update(branches[0], z_t).square().sum().backward()
    for gradient in (branches[0].grad, z_t.grad, *(p.grad for p in module.parameters())):
        assert gradient is not None and gradient.abs().max() > 0


def test_gradients_are_those_of_differences():
    module = shaken(SwapAttention(4, 2, window=(2, 2, 3), ff_mult=1, norm_num_groups=2)).double()
    names, values = zip(*module.named_parameters(), strict=True)
    branches = [x.requires_grad_() for x in volumes(2, 1, 3, 3, 4, 4)]

    def call(z_s, z_t, *weights):
        state = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(module, state, (z_s, z_t))

    assert torch.autograd.gradcheck(call, (*branches, *values), fast_mode=True)


def test_compiles_as_one_graph():
    module = shaken(SwapAttention(8, 2, window=(3, 4, 2), norm_num_groups=4)).double()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    z_s, z_t = volumes(2, *SHAPE, 8)
    torch.testing.assert_close(compiled(z_s, z_t), module(z_s, z_t))
    branches = [x.requires_grad_() for x in (z_s, z_t)]
    grads = [torch.autograd.grad(m(*branches).square().sum(), branches) for m in (compiled, module)]
    torch.testing.assert_close(*grads)


def test_bfloat16_and_autocast_are_near_the_wide_result():
    module = shaken(SwapAttention(16, 2, window=(3, 4, 2), norm_num_groups=4))
    z_s, z_t = volumes(2, *SHAPE, 16, dtype=torch.float32)
    wanted = module.update(z_s, z_t)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module.update(z_s, z_t)
        mixed.float().sum().backward()
    half = module.bfloat16().update(z_s.bfloat16(), z_t.bfloat16())
    assert half.dtype == torch.bfloat16
    for got in (mixed, half):
        assert (got.float() - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_cost_grows_with_the_number_of_windows():
    def flops(height, window):
        q, k, v = (torch.randn(1, 4, height, 8, 2, 8) for _ in range(3))
        counter = FlopCounterMode(display=False)
        with counter:
            windowed_cross_attention(q, k, v, window, backend="math")
        return counter.get_total_flops()

    one = flops(8, (None, 8, 8))
    assert one > 0
    assert [flops(8 * n, (None, 8, 8)) for n in (2, 3, 5)] == [2 * one, 3 * one, 5 * one]
    assert flops(16, (None, 16, 8)) == 4 * one  # one window twice as large


def test_frame_convolution_is_the_library_one():
    torch.manual_seed(0)
    for size in (1, 3, 5):
        module = FrameConv(6, 4, size).double()
        (x,) = volumes(1, 7, 5, 6)
        expected = F.conv1d(x.transpose(1, 2), module.weight, module.bias, padding=size // 2)
        torch.testing.assert_close(module(x), expected.transpose(1, 2))
    with pytest.raises(ValueError, match="kernel_size must be odd and at least 1, got 2"):
        FrameConv(6, 4, 2)


def test_one_voxel_is_that_of_a_batch_of_two():
    """Groups of a single number are their norm's bias, whatever the batch."""
    module = shaken(SwapAttention(8, 2, norm_num_groups=8).double())
    spatial, temporal = volumes(2, 2, 1, 1, 1, 8)
    both = module(spatial, temporal)
    one = module(spatial[:1], temporal[:1])
    torch.testing.assert_close(one, both[:1])
    bias = [module.norm_q.bias, module.norm_kv.bias]
    u_q, u_kv = (p(b) for p, b in zip((module.proj_q, module.proj_kv), bias, strict=True))
    update = module.proj_out(module.block(*(u.expand(1, 1, 1, 1, 8) for u in (u_q, u_kv))))
    torch.testing.assert_close(one, spatial[:1] + temporal[:1] + update)
    empty = module(spatial[:0], temporal[:0])
    assert empty.shape == (0, 1, 1, 1, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": "time"}, "query must be 'temporal' or 'spatial', got 'time'"),
        ({"window": (None, 0, 8)}, "window must be frames"),
        ({"window": (4, None, 8)}, "window must be frames"),
        ({"heads": 3}, "heads must divide dim"),
        ({"shift": (0, 8, 0)}, r"below the window's \(None, 8, 8\) .*, got \(0, 8, 0\)"),
        ({"shift": (1, 4, 4)}, "shift must be frames, rows and columns"),
        ({"shift": (4, 4)}, "shift must be frames, rows and columns"),
        ({"ff_mult": 0}, "mult must be at least 1"),
        ({"norm_num_groups": 3}, "norm_num_groups must divide dim 8, got 3"),
    ],
)
def test_bad_options_get_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        SwapAttention(**{"dim": 8, "heads": 2, "norm_num_groups": 4, **options})


def test_bad_shapes_get_one_sentence():
    module = SwapAttention(8, 2, norm_num_groups=4)
    z = torch.zeros(1, 2, 4, 4, 8)
    with pytest.raises(ValueError, match="spatial and temporal must be"):
        module(z, z[:, :1])
    with pytest.raises(ValueError, match="spatial and temporal must be .* of one shape"):
        module(z, z[:, :, :3])
    with pytest.raises(ValueError, match=r"spatial and temporal must be \(B, T, H, W, 8\)"):
        module(z[..., :6], z[..., :6])
    with pytest.raises(ValueError, match="must be at least 1"):
        windowed_cross_attention(z[..., None], z[..., None], z[..., None], (0, 1, 1))
    with pytest.raises(ValueError, match="of one shape"):
        windowed_cross_attention(z[..., None], z[:, :, :2, :, :, None], z[..., None], (1, 1, 1))
    assert GatedFeedForward(4, 2)(torch.zeros(3, 4)).shape == (3, 4)
