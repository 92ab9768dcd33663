"""Efficient local attention against written-out sums in float64, and the identities of its gate."""

import itertools

import pytest
import torch
from torch import Tensor

from stvision.layers.ela import ELA_VARIANTS, EfficientLocalAttention

COUNTS = {"tiny": 5 * 64, "base": 7 * 64, "small": 8 * 5 * 64, "large": 8 * 7 * 64}


def made(variant: str = "small", dim: int = 16, **options: bool) -> EfficientLocalAttention:
    torch.manual_seed(0)
    module = EfficientLocalAttention(dim, variant, **options).double()
    torch.nn.init.normal_(module.norm.weight)
    torch.nn.init.normal_(module.norm.bias)
    return module


def grid(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def gate_by_hand(module: EfficientLocalAttention, line: Tensor) -> Tensor:
    """(C, L) means to (C, L) gates, channel by channel."""
    channels, length = line.shape
    weight, taps = module.conv.weight, module.conv.weight.shape[2]
    together = weight.shape[1]
    mixed = torch.zeros_like(line)
    for c, i, t, j in itertools.product(
        range(channels), range(length), range(taps), range(together)
    ):
        at = i + t - taps // 2
        if 0 <= at < length:
            mixed[c, i] += weight[c, j, t] * line[c // together * together + j, at]
    groups = mixed.view(module.norm.num_groups, -1)
    groups = groups - groups.mean(1, keepdim=True)
    groups = groups / (groups.square().mean(1, keepdim=True) + 1e-5).sqrt()
    mixed = groups.view(line.shape)
    return (mixed * module.norm.weight[:, None] + module.norm.bias[:, None]).sigmoid()


@pytest.mark.parametrize("variant", ELA_VARIANTS)
def test_images_are_gated_as_written_out(variant: str) -> None:
    module, x = made(variant), grid(2, 2, 5, 7, 16)
    out = module(x)
    for b, t in itertools.product(range(2), range(2)):
        rows = gate_by_hand(module, x[b, t].mean(1).T)
        columns = gate_by_hand(module, x[b, t].mean(0).T)
        wanted = x[b, t] * rows.T[:, None] * columns.T[None]
        assert (out[b, t] - wanted).abs().max() < 1e-12


def test_clips_are_gated_as_written_out() -> None:
    module, x = made(over_time=True), grid(1, 3, 4, 5, 16)
    out = module(x)[0]
    times = gate_by_hand(module, x[0].mean((1, 2)).T)
    rows = gate_by_hand(module, x[0].mean((0, 2)).T)
    columns = gate_by_hand(module, x[0].mean((0, 1)).T)
    wanted = x[0] * times.T[:, None, None] * rows.T[:, None] * columns.T
    assert (out - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("variant", ELA_VARIANTS)
def test_parameter_counts(variant: str) -> None:
    module = EfficientLocalAttention(64, variant)
    assert sum(p.numel() for p in module.parameters()) == COUNTS[variant] + 2 * 64
    assert module.norm.num_groups == ELA_VARIANTS[variant][2]
    assert EfficientLocalAttention(24, variant).norm.num_groups == 8


def test_without_weights_the_gate_is_a_quarter_and_an_eighth() -> None:
    x = grid(1, 3, 4, 5, 16)
    for over_time, part in ((False, 4), (True, 8)):
        module = EfficientLocalAttention(16, over_time=over_time).double()
        torch.nn.init.zeros_(module.conv.weight)
        assert (module(x) - x / part).abs().max() < 1e-15


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_flips_commute_only_with_symmetric_kernels(axis: int) -> None:
    module, x = made(over_time=True), grid(1, 4, 5, 6, 16)
    assert (module(x.flip(axis)) - module(x).flip(axis)).abs().max() > 1e-3
    with torch.no_grad():
        module.conv.weight.add_(module.conv.weight.flip(2).clone())
    assert (module(x.flip(axis)) - module(x).flip(axis)).abs().max() < 1e-12


def test_swapping_rows_and_columns_swaps_the_output() -> None:
    module, x = made(), grid(2, 1, 5, 7, 16)
    assert (module(x.transpose(2, 3)) - module(x).transpose(2, 3)).abs().max() < 1e-12


def test_equal_columns_have_a_row_gate_of_their_own() -> None:
    """The row gate sees the mean over columns: how many equal ones there are does not matter."""
    module, line = made(), grid(1, 1, 6, 1, 16)
    gates = [module._gate(line.expand(-1, -1, -1, width, -1), 2, (3,)) for width in (1, 4, 9)]
    assert all((gate - gates[0]).abs().max() < 1e-14 for gate in gates)


@pytest.mark.parametrize("over_time", [False, True])
def test_the_output_lies_between_zero_and_the_input(over_time: bool) -> None:
    module, x = made(over_time=over_time), grid(2, 3, 4, 5, 16)
    out = module(x)
    assert (out * x >= 0).all() and (out.abs() <= x.abs()).all()


def test_causal_gates_do_not_see_later_frames() -> None:
    module, x = made(dim=32, over_time=True, causal=True), grid(1, 5, 4, 4, 32)
    y = x.clone()
    y[:, 3:] += 5
    before, after = module(x), module(y)
    assert (before[:, :3] - after[:, :3]).abs().max() < 1e-14
    assert (before[:, 3] - after[:, 3]).abs().max() > 1e-3
    y = x.clone()
    y[:, :1] += 5
    assert (module(y)[:, 4] - before[:, 4]).abs().max() > 1e-9  # 5 taps look back to it
    module = made(dim=32, over_time=True)
    assert (module(x) - module(y))[:, 4].abs().max() > 1e-6


def test_channels_second_is_the_same_gate() -> None:
    x = grid(2, 3, 4, 5, 16)
    for over_time in (False, True):
        last, second = (made(over_time=over_time, channels_last=v) for v in (True, False))
        out = second(x.permute(0, 4, 1, 2, 3))
        assert (out.permute(0, 2, 3, 4, 1) - last(x)).abs().max() < 1e-15
    image = made(channels_last=False)(x[:, 0].permute(0, 3, 1, 2))
    assert (image.permute(0, 2, 3, 1) - made()(x)[:, 0]).abs().max() < 1e-15


@pytest.mark.parametrize("options", [{}, {"over_time": True}, {"over_time": True, "causal": True}])
def test_gradients_compile_and_half_precision(options: dict) -> None:
    module, x = made(dim=32, **options), grid(1, 3, 2, 2, 32).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    assert (compiled(x) - module(x)).abs().max() < 1e-12
    wanted = module(x)
    module, x = module.float(), x.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x)
    half = module.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and mixed.dtype == torch.float32
    for got in (mixed, half):
        assert (got - wanted).abs().max() < 3e-2 * wanted.abs().max()


def test_bad_input_gets_one_sentence() -> None:
    with pytest.raises(ValueError, match="variant must be one of 'tiny'.*, got 'huge'"):
        EfficientLocalAttention(16, "huge")
    with pytest.raises(ValueError, match="dim must be a multiple of 8 for 'small', got 12"):
        EfficientLocalAttention(12, "small")
    with pytest.raises(ValueError, match="causal=True needs over_time=True"):
        EfficientLocalAttention(16, causal=True)
    with pytest.raises(
        ValueError, match="two channels in each of the norm's 16 groups, got dim=16"
    ):
        EfficientLocalAttention(16, over_time=True, causal=True)
    with pytest.raises(ValueError, match="dim must be a whole number of at least 1, got 0"):
        EfficientLocalAttention(0)
    with pytest.raises(
        ValueError, match=r"x must be \(B, T, H, W, 16\) with .*, got \(1, 4, 4, 16"
    ):
        made()(grid(1, 4, 4, 16))
    for shape in ((1, 4, 4, 16), (1, 16, 4, 0), (1, 16, 0, 4, 4)):
        with pytest.raises(ValueError, match=r"x must be \(B, 16, H, W\) or .* at least one frame"):
            made(channels_last=False)(grid(*shape))


def test_a_norm_of_single_numbers_leaves_its_bias() -> None:
    module = made("tiny", 32, over_time=True)
    x = grid(1, 1, 4, 5, 32).requires_grad_()
    out = module(x)
    rows = gate_by_hand(module, x[0, 0].mean(1).T)
    columns = gate_by_hand(module, x[0, 0].mean(0).T)
    frames = module.norm.bias.sigmoid()
    wanted = x[0, 0] * rows.T[:, None] * columns.T * frames
    assert (out[0, 0] - wanted).abs().max() < 1e-12
    grads = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (out, wanted)]
    assert (grads[0] - grads[1]).abs().max() < 1e-10
    one = made("tiny", 32)(grid(1, 1, 1, 1, 32))
    assert (one - grid(1, 1, 1, 1, 32) * module.norm.bias.sigmoid() ** 2).abs().max() < 1e-12
