"""Block-local attention: both paths against a loop over queries in float64, and the identities."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stvision.attention import halo
from stvision.attention.halo import IMPLEMENTATIONS, HaloAttention, halo_attention
from stvision.kernels.neighborhood import na2d
from stvision.optional import mend_torchvision

CASES = [
    # grid, block, halo, stride, causal, mask_border
    pytest.param((1, 6, 8), (1, 2, 4), (0, 1, 2), 1, False, False, id="image"),
    pytest.param((1, 7, 5), (1, 4, 2), (0, 1, 3), 1, False, False, id="odd"),
    pytest.param((1, 7, 5), (1, 4, 2), (0, 1, 3), 1, False, True, id="odd-masked"),
    pytest.param((1, 8, 6), (1, 4, 2), (0, 3, 1), 2, False, False, id="stride"),
    pytest.param((2, 7, 5), (1, 4, 2), (1, 2, 1), 2, False, True, id="clip-stride-odd"),
    pytest.param((3, 7, 5), (1, 4, 2), (0, 2, 1), 2, False, False, id="frames-alone"),
    pytest.param((2, 3, 4), (1, 1, 2), (0, 2, 0), 1, True, False, id="rows-of-one"),
    pytest.param((5, 4, 3), (2, 2, 2), (1, 1, 1), 1, False, False, id="clip"),
    pytest.param((5, 4, 3), (2, 2, 2), (3, 1, 0), 1, True, False, id="causal"),
    pytest.param((4, 4, 4), (3, 4, 2), (1, 0, 1), 2, True, False, id="causal-stride"),
]


def inputs(grid, stride, *, heads: int = 2, d: int = 4, dv: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    few = (grid[0], -(-grid[1] // stride), -(-grid[2] // stride))
    shapes = ((2, *few, heads, d), (2, *grid, heads, d), (2, *grid, heads, dv))
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def tables_for(block, halo, causal: bool, d: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    sides = (1 if causal else 2, 2, 2)
    windows = [b + s * h for b, h, s in zip(block, halo, sides, strict=True)]
    return tuple(torch.randn(2 * w - 1, d, generator=g, dtype=torch.float64) for w in windows)


def looped(
    query, key, value, *, block, halo, tables, stride=1, causal=False, mask_border=False
) -> Tensor:
    """The definition, one query after the other, from the coordinates of tokens."""
    grid = key.shape[1:4]
    steps = (1, stride, stride)
    out = value.new_zeros(*query.shape[:-1], value.shape[-1])
    for b, *place in itertools.product(*(range(n) for n in query.shape[:4])):
        spans, own = [], []
        for i, step, size, around in zip(place, steps, block, halo, strict=True):
            first = i * step // size * size
            behind = 0 if causal and not spans else around
            spans.append(range(first - around, first + size + behind))
            own.append(i - first // step)
        for h in range(query.shape[4]):
            q = query[b, *place, h]
            scores, values = [], []
            for at in itertools.product(*spans):
                exists = [0 <= y < n for y, n in zip(at, grid, strict=True)]
                if not exists[0] or (causal and at[0] > place[0]):
                    continue
                if mask_border and not all(exists):
                    continue
                score = sum(
                    q @ table[y - span.start - o + len(span) - 1]
                    for y, span, o, table in zip(at, spans, own, tables, strict=True)
                    if table is not None
                )
                if all(exists):
                    scores.append(score + q @ key[b, *at, h] / math.sqrt(len(q)))
                    values.append(value[b, *at, h])
                else:
                    scores.append(score + q.new_zeros(()))
                    values.append(value.new_zeros(value.shape[-1]))
            out[b, *place, h] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize(("grid", "block", "halo", "stride", "causal", "mask_border"), CASES)
def test_both_paths_are_the_definition(grid, block, halo, stride, causal, mask_border) -> None:
    tensors = inputs(grid, stride)
    tables = tables_for(block, halo, causal)
    options = {
        "block": block,
        "halo": halo,
        "stride": stride,
        "causal": causal,
        "mask_border": mask_border,
    }
    wanted = looped(*tensors, tables=tables, **options)
    bare = looped(*tensors, tables=(None,) * 3, **options)
    grads = {}
    for name in IMPLEMENTATIONS:
        leaves = [x.clone().requires_grad_() for x in (*tensors, *tables)]
        out = halo_attention(*leaves[:3], tables=tuple(leaves[3:]), implementation=name, **options)
        assert (out - wanted).abs().max() < 1e-12
        again = halo_attention(*tensors, implementation=name, **options)
        assert (again - bare).abs().max() < 1e-12
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        grads[name] = [leaf.grad for leaf in leaves]
    for a, b in zip(*grads.values(), strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_halo_is_attention_in_blocks(name: str) -> None:
    q, k, v = inputs((1, 4, 6), 1, dv=4)
    out = halo_attention(q, k, v, block=(1, 2, 3), halo=(0, 0, 0), implementation=name)

    def cut(x: Tensor) -> Tensor:
        x = x[:, 0].reshape(2, 2, 2, 2, 3, 2, 4).permute(0, 1, 3, 5, 2, 4, 6)
        return x.flatten(4, 5)

    wanted = F.scaled_dot_product_attention(cut(q), cut(k), cut(v))
    torch.testing.assert_close(cut(out), wanted)


def test_one_block_is_attention_of_all_with_relative_positions() -> None:
    q, k, v = inputs((1, 4, 4), 1)
    tables = (None, *tables_for((1, 4, 4), (0, 0, 0), False)[1:])
    out = halo_attention(q, k, v, block=(1, 4, 4), halo=(0, 0, 0), tables=tables)
    place = torch.arange(4)
    offset = place - place[:, None] + 3  # key minus query
    rows, columns = tables[1][offset], tables[2][offset]
    scores = torch.einsum("byxnd,buvnd->bnyxuv", q[:, 0], k[:, 0]) / 2
    scores = scores + torch.einsum("byxnd,yud->bnyxu", q[:, 0], rows)[..., None]
    scores = scores + torch.einsum("byxnd,xvd->bnyxv", q[:, 0], columns)[..., None, :]
    weights = scores.flatten(-2).softmax(-1).view_as(scores)
    wanted = torch.einsum("bnyxuv,buvnd->byxnd", weights, v[:, 0])
    torch.testing.assert_close(out[:, 0], wanted)


def test_moving_by_a_block_moves_the_interior() -> None:
    q, k, v = inputs((1, 12, 4), 1)
    options = {"block": (1, 2, 2), "halo": (0, 1, 1)}
    options["tables"] = tables_for(*options.values(), False)
    out = halo_attention(q, k, v, **options)
    moved = halo_attention(*(x.roll(2, 2) for x in (q, k, v)), **options)
    torch.testing.assert_close(moved[:, :, 4:10], out[:, :, 2:8])


def test_blocks_of_one_token_are_a_window_of_its_own_with_zeros_around() -> None:
    q, k, v = inputs((1, 4, 5), 1, heads=1)
    out = halo_attention(q, k, v, block=(1, 1, 1), halo=(0, 1, 1))
    keys, values = (
        F.unfold(x[:, 0, ..., 0, :].permute(0, 3, 1, 2), 3, padding=1).unflatten(1, (-1, 9))
        for x in (k, v)
    )
    scores = torch.einsum("bld,bdjl->blj", q.flatten(1, 3)[..., 0, :], keys) / 2
    wanted = torch.einsum("blj,bdjl->bld", scores.softmax(-1), values)
    torch.testing.assert_close(out.flatten(1, 3)[..., 0, :], wanted)


def test_a_stride_leaves_out_queries() -> None:
    """Without tables; those of the released models count places of queries, not of keys."""
    q, k, v = inputs((1, 8, 8), 1)
    options = {"block": (1, 4, 4), "halo": (0, 1, 1)}
    out = halo_attention(q, k, v, **options)
    few = halo_attention(q[:, :, ::2, ::2], k, v, stride=2, **options)
    torch.testing.assert_close(few, out[:, :, ::2, ::2])


def test_the_interior_is_neighborhood_attention() -> None:
    q, k, v = inputs((1, 16, 12), 1)
    out = halo_attention(q, k, v, block=(1, 4, 4), halo=(0, 2, 3), implementation="windows")
    near = na2d(q[:, 0], k[:, 0], v[:, 0], (8, 10), stride=4)
    torch.testing.assert_close(out[:, 0, 4:12, 4:8], near[:, 4:12, 4:8])
    assert (out[:, 0, :4] - near[:, :4]).abs().max() > 1e-3  # padding there, shifting here


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_later_frames_change_nothing_before_them(name: str) -> None:
    q, k, v = inputs((6, 4, 4), 1)
    options = {"block": (3, 2, 2), "halo": (2, 1, 1), "causal": True, "implementation": name}
    before = halo_attention(q, k, v, **options)
    for x in (q, k, v):
        x[:, 4:] += 50
    after = halo_attention(q, k, v, **options)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4], after[:, 4])


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"block_size": 8, "halo_size": 3}, (16, 24)),
        ({"block_size": 8, "halo_size": 2, "stride": 2}, (16, 8)),
        ({"block_size": 7, "halo_size": 2, "stride": 2, "qk_ratio": 0.33}, (14, 28)),
        ({"block_size": 4, "halo_size": 5, "dim_head": 16, "scale_pos_embed": True}, (8, 12)),
        ({"block_size": 4, "halo_size": 1, "stride": 2, "avg_down": True}, (8, 12)),
        ({"block_size": 4, "halo_size": 1, "qkv_bias": True, "dim_out": 32}, (8, 12)),
    ],
)
def test_the_layer_is_that_of_timm(options: dict, size: tuple[int, int]) -> None:
    mend_torchvision()
    timm = pytest.importorskip("timm.layers.halo_attn", reason="timm (extra `vision`) is missing")
    torch.manual_seed(0)
    peer = timm.HaloAttn(64, num_heads=4, **options).double()
    module = HaloAttention(64, 4, **options).double()
    state = {k: x.flatten(1) if x.ndim == 4 else x for k, x in peer.state_dict().items()}
    module.load_state_dict(state)
    x = torch.randn(2, 64, *size, dtype=torch.float64)
    wanted = peer(x).permute(0, 2, 3, 1)
    for name in IMPLEMENTATIONS:
        module.implementation = name
        out = module(x.permute(0, 2, 3, 1)[:, None])
        assert (out[:, 0] - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equal_frames_give_what_their_frame_gives(name: str) -> None:
    torch.manual_seed(0)
    image = HaloAttention(16, 2, block_size=2, halo_size=1, implementation=name).double()
    video = HaloAttention(
        16, 2, block_size=2, halo_size=1, block_frames=2, halo_frames=1, implementation=name
    ).double()
    left = video.load_state_dict(image.state_dict(), strict=False)
    assert left.missing_keys == ["pos_embed.time_rel"]
    x = torch.randn(1, 1, 5, 4, 16, dtype=torch.float64)
    clip = x.expand(-1, 5, -1, -1, -1)
    assert (video(clip) - image(x)).abs().max() < 1e-12


def test_the_kernels_get_rows_of_a_multiple_of_8_numbers(monkeypatch) -> None:
    sizes = []

    def spy(query: Tensor, key: Tensor, *args, **kwargs) -> Tensor:
        sizes.append((query.shape[-1], key.shape[-1]))
        return na3d(query, key, *args, **kwargs)

    na3d = halo.na3d
    monkeypatch.setattr(halo, "na3d", spy)
    layer = HaloAttention(24, num_heads=2, block_size=4, halo_size=1, halo_frames=1)
    layer(torch.randn(1, 3, 5, 6, 24))
    assert sizes and all(q == k and k % 8 == 0 for q, k in sizes)


def test_windows_are_automatic_where_frames_stand_alone_and_scores_are_few(monkeypatch) -> None:
    def kernels(**options: object) -> bool:
        given: dict[str, object] = {"block": (1, 2, 2), "halo": (0, 1, 1)} | options
        with monkeypatch.context() as patch:
            patch.setattr(halo, "_neighborhood", lambda query, *_: query.new_full((), 7.0))
            return halo_attention(*inputs((1, 4, 4), 1), **given).ndim == 0

    assert not kernels()
    assert kernels(mask_border=True) and kernels(halo=(1, 1, 1)) and kernels(backend="reference")
    assert not kernels(mask_border=True, implementation="windows")
    scores = 2 * 16 * 2 * 16  # queries, heads and keys of a window
    monkeypatch.setattr(halo, "MOST_SCORES", scores)
    assert not kernels()
    monkeypatch.setattr(halo, "MOST_SCORES", scores - 1)
    assert kernels() and not kernels(implementation="windows")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("halo_frames", [0, 1])
def test_gradients_compile_and_half_precision(name: str, stride: int, halo_frames: int) -> None:
    torch.manual_seed(0)
    module = HaloAttention(
        8, 2, block_size=2, halo_size=1, stride=stride, halo_frames=halo_frames, implementation=name
    ).double()
    if halo_frames:
        torch.nn.init.normal_(module.pos_embed.time_rel)
    x = torch.randn(1, 2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    assert (compiled(x) - module(x)).abs().max() < 1e-12
    wanted = module(x)
    module, x = module.float(), x.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x)
    half = module.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for got in (mixed, half):
        assert (got - wanted).abs().max() < 3e-2 * wanted.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": (1, 0, 2)}, "block must be three numbers of at least 1"),
        ({"halo": (0, -1, 1)}, "halo of at least 0"),
        ({"stride": 3}, r"stride must divide the block's \(2, 2\) rows and columns, got 3"),
        ({"stride": 2}, r"query must be \(2, 1, 2, 2, 2, 4\) beside these keys"),
        ({"implementation": "fast"}, "one of 'neighborhood', 'windows', got 'fast'"),
        ({"tables": (None, torch.zeros(5, 4), None)}, r"the table of rows must be \(7, 4\)"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    options = {"block": (1, 2, 2), "halo": (0, 1, 1)} | arguments
    with pytest.raises(ValueError, match=message):
        halo_attention(*inputs((1, 4, 4), 1), **options)


def test_bad_modules_are_named() -> None:
    for options, message in (
        ({"num_heads": 3}, "num_heads must divide dim_out 16, got 3"),
        ({"stride": 3}, "stride must be 1 or 2, got 3"),
        ({"block_size": 0}, "block_size and block_frames must be at least 1"),
        ({"dim_head": 0}, "dim_head None or at least 1, got 1.0 and 0"),
        ({"qk_ratio": -1.0}, "qk_ratio must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            HaloAttention(16, **options)
    with pytest.raises(ValueError, match=r"x must be \(B, T, H, W, 16\)"):
        HaloAttention(16)(torch.zeros(1, 4, 4, 16))
    q, k, v = inputs((1, 4, 4), 1)
    with pytest.raises(ValueError, match="key and value on one grid"):
        halo_attention(q, k, v[:, :, :2], block=(1, 2, 2), halo=(0, 1, 1))
