"""The light attention block against sums written out in float64, its identities, and its price."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from stvision.layers import LAYERS
from stvision.layers.light_attention import (
    LightAttention,
    channel_taps,
    conv_channel_logits,
    gate,
    spatial_logits,
)
from stvision.layers.non_local import NonLocalBlock

OPTIONS = [
    {"kind": "channel"},
    {"kind": "channel", "squeeze": "mlp", "reduction": 4, "over_time": True},
    {"kind": "spatial", "kernel_size": 3},
    {"kind": "both", "form": "sigmoid"},
    {"kind": "both", "squeeze": "mlp", "reduction": 4, "over_time": True},
]


def grid(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def made(dim: int = 12, **options) -> LightAttention:
    """A block whose weights are all drawn."""
    torch.manual_seed(0)
    module = LightAttention(dim, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def by_hand(module: LightAttention, x: Tensor) -> Tensor:
    """One frame (H, W, C), place by place; the means of channels may come from elsewhere."""
    height, width, channels = x.shape
    found = []
    if module.channel is not None:
        means = x.mean((0, 1))
        if isinstance(module.channel, nn.Conv1d):
            taps = module.channel.weight[0, 0]
            mixed = torch.zeros_like(means)
            for c, j in itertools.product(range(channels), range(len(taps))):
                at = c + j - len(taps) // 2
                if 0 <= at < channels:
                    mixed[c] += taps[j] * means[at]
        else:
            first, _, last = module.channel
            hidden = (first.weight @ means + first.bias).clamp_min(0)
            mixed = last.weight @ hidden + last.bias
        found.append(mixed)
    if module.spatial is not None:
        weight = module.spatial.weight[0]
        half = weight.shape[-1] // 2
        logits = torch.zeros(height, width, 1, dtype=x.dtype)
        for r, c in itertools.product(range(height), range(width)):
            total = torch.zeros((), dtype=x.dtype)
            for i, j in itertools.product(range(-half, half + 1), repeat=2):
                if 0 <= r + i < height and 0 <= c + j < width:
                    place = x[r + i, c + j]
                    total = total + weight[0, i + half, j + half] * place.mean()
                    total = total + weight[1, i + half, j + half] * place.max()
            logits[r, c] += total
        found.append(logits)
    for logits in found:
        sigmoid = 1 / (1 + (-logits).exp())
        x = x * (sigmoid + 0.5 if module.form == "residual" else sigmoid)
    return x


@pytest.mark.parametrize("kind", ["channel", "spatial", "both"])
@pytest.mark.parametrize("squeeze", ["conv", "mlp"])
@pytest.mark.parametrize("form", ["residual", "sigmoid"])
def test_frames_are_gated_as_written_out(kind: str, squeeze: str, form: str) -> None:
    module = made(kind=kind, squeeze=squeeze, form=form, reduction=4, kernel_size=3)
    x = grid(2, 2, 5, 3, 12)
    out = module(x)
    for b, t in itertools.product(range(2), range(2)):
        assert (out[b, t] - by_hand(module, x[b, t])).abs().max() < 1e-12


def test_means_over_time_are_those_of_all_frames() -> None:
    """Frames laid side by side have the same channel means as frames one after the other."""
    x = grid(1, 3, 4, 5, 12)
    module = made(kind="channel", over_time=True)
    side = x.permute(0, 2, 1, 3, 4).reshape(1, 1, 4, 15, 12)
    wanted = made(kind="channel")(side).reshape(1, 4, 3, 5, 12).permute(0, 2, 1, 3, 4)
    assert (module(x) - wanted).abs().max() < 1e-14
    assert (module(x) - made(kind="channel")(x)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [o for o in OPTIONS if "form" not in o])
def test_a_fresh_block_is_the_identity_bit_by_bit(options: dict, dtype: torch.dtype) -> None:
    x = grid(2, 3, 5, 7, 48, dtype=dtype)
    assert torch.equal(LightAttention(48, **options).to(dtype)(x), x)
    assert torch.equal(NonLocalBlock(48).to(dtype)(x), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LightAttention(48, **options)(x.float()), x.float())


def test_a_fresh_sigmoid_gate_halves() -> None:
    x = grid(1, 2, 3, 5, 8)
    for kind, part in (("channel", 2), ("spatial", 2), ("both", 4)):
        assert torch.equal(LightAttention(8, kind, form="sigmoid").double()(x), x / part)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_fresh_block_learns(options: dict) -> None:
    """Zero last layers still get gradients."""
    torch.manual_seed(0)
    module, x = LightAttention(12, **options).double(), grid(2, 2, 4, 3, 12) + 1
    (module(x) * grid(2, 2, 4, 3, 12).flip(0)).sum().backward()
    last = [module.spatial] if module.spatial is not None else []
    if module.channel is not None:
        last.append(
            module.channel[-1] if isinstance(module.channel, nn.Sequential) else module.channel
        )
    assert all(part.weight.grad.abs().max() > 1e-3 for part in last)


@pytest.mark.parametrize(("form", "low", "high"), [("residual", 0.5, 1.5), ("sigmoid", 0, 1)])
def test_gates_stay_in_their_range(form: str, low: float, high: float) -> None:
    x = grid(2, 3, 4, 5, 12) * 10
    for kind, power in (("channel", 1), ("spatial", 1), ("both", 2)):
        ratio = made(kind=kind, form=form)(x) / x
        assert ratio.min() > low**power - 1e-12 and ratio.max() < high**power + 1e-12
        assert ratio.std() > 1e-2


def test_channel_gates_do_not_see_places_and_spatial_ones_no_order_of_channels() -> None:
    x = grid(1, 1, 6, 5, 12)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    shuffled = x.flatten(2, 3)[:, :, order].view_as(x)
    module = made(kind="channel")
    out = module(x).flatten(2, 3)[:, :, order].view_as(x)
    assert (module(shuffled) - out).abs().max() < 1e-14
    channels = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    module = made(kind="spatial")
    assert (module(x[..., channels]) - module(x)[..., channels]).abs().max() < 1e-14
    module = made(kind="channel")
    assert (module(x[..., channels]) - module(x)[..., channels]).abs().max() > 1e-3


def test_equal_frames_are_gated_as_their_image() -> None:
    x = grid(2, 1, 5, 3, 12)
    for options in OPTIONS:
        module = made(**options)
        assert (module(x.expand(-1, 4, -1, -1, -1)) - module(x)).abs().max() < 1e-14


@pytest.mark.parametrize("options", [*OPTIONS, None])
def test_channels_second_is_the_same(options: dict | None) -> None:
    x = grid(2, 3, 4, 5, 12)

    def block(last: bool) -> nn.Module:
        if options is not None:
            return made(channels_last=last, **options)
        torch.manual_seed(0)
        module = NonLocalBlock(12, channels_last=last).double()
        nn.init.normal_(module.out.weight)
        return module

    out = block(False)(x.permute(0, 4, 1, 2, 3))
    assert (out.permute(0, 2, 3, 4, 1) - block(True)(x)).abs().max() < 1e-14
    image = block(False)(x[:, 0].permute(0, 3, 1, 2))
    assert image.shape == (2, 12, 4, 5) and image.is_contiguous() == out.is_contiguous()
    assert (image.permute(0, 2, 3, 1) - block(True)(x[:, :1])[:, 0]).abs().max() < 1e-14


@pytest.mark.parametrize("over_time", [False, True])
def test_the_heavy_block_is_attention_written_out(over_time: bool) -> None:
    torch.manual_seed(0)
    module = NonLocalBlock(6, over_time=over_time).double()
    nn.init.normal_(module.out.weight)
    x = grid(2, 3, 3, 5, 6)
    places = x.reshape(2, 45, 6) if over_time else x.reshape(6, 15, 6)
    scores = module.query(places) @ module.key(places).mT
    wanted = places + module.out(scores.softmax(-1) @ module.value(places))
    assert (module(x) - wanted.view_as(x)).abs().max() < 1e-12


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 9), (2, 3, 1)])
@pytest.mark.parametrize("options", OPTIONS)
def test_grids_smaller_than_the_kernel(options: dict, size: tuple[int, int, int]) -> None:
    module, x = made(**options), grid(2, *size, 12)
    out = module(x)
    assert out.shape == x.shape and out.isfinite().all()
    assert (out[1:] - module(x[1:])).abs().max() < 1e-14  # samples do not meet
    if size[0] == 1:
        assert (out[0, 0] - by_hand(module, x[0, 0])).abs().max() < 1e-12


@pytest.mark.parametrize("options", [*OPTIONS, None])
def test_gradients_compile_and_half_precision(options: dict | None) -> None:
    torch.manual_seed(0)
    module: nn.Module = NonLocalBlock(12).double() if options is None else made(**options)
    if options is None:
        nn.init.normal_(module.out.weight, std=0.3)
    x = grid(2, 2, 3, 5, 12).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)
    parameters = list(module.parameters())
    wanted = torch.autograd.grad(module(x).square().sum(), [x, *parameters])
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    assert (compiled(x) - module(x)).abs().max() < 1e-12
    got = torch.autograd.grad(compiled(x).square().sum(), [x, *parameters])
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(got, wanted, strict=True))
    expected = module(x).detach()
    module, x = module.float(), x.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x)
    half = module.bfloat16()(x.bfloat16())
    assert mixed.dtype == torch.float32 and half.dtype == torch.bfloat16
    for out in (mixed, half):
        assert (out - expected).abs().max() < 3e-2 * expected.abs().max()


def test_the_output_has_the_dtype_of_the_input_whatever_autocast_makes_of_the_gate() -> None:
    module, x = made(kind="channel").float(), grid(1, 2, 3, 5, 12, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.float16


def test_the_functions_are_what_the_module_computes() -> None:
    module, x = made(), grid(2, 3, 4, 5, 12)
    channel = conv_channel_logits(x.mean((2, 3), keepdim=True), module.channel.weight)
    spatial = spatial_logits(x, module.spatial.weight)
    assert torch.equal(module(x), gate(gate(x, channel), spatial))


def test_taps_grow_with_the_logarithm_of_channels() -> None:
    assert [channel_taps(c) for c in (1, 64, 128, 256, 512, 1024, 2048)] == [1, 3, 5, 5, 5, 5, 7]
    assert LightAttention(2048, "channel").channel.weight.shape == (1, 1, 7)


def test_parameter_counts() -> None:
    def count(**options) -> int:
        return sum(p.numel() for p in LightAttention(256, **options).parameters())

    assert count(kind="channel") == 5
    assert count(kind="spatial") == 2 * 49
    assert count() == 5 + 2 * 49
    assert count(kind="channel", squeeze="mlp") == 2 * 256 * 16 + 16 + 256


@pytest.mark.parametrize(("dim", "rows"), [(256, 64), (512, 32), (1024, 16), (2048, 16)])
def test_it_costs_far_less_than_a_quarter_of_the_heavy_block(dim: int, rows: int) -> None:
    """Multiplications at the places of a ResNet-50 for 256 x 128 crops; nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = {}
    with torch.device("meta"):
        x = torch.empty(1, 1, rows, rows // 2, dim)
        for name, block in (("light", LightAttention(dim)), ("heavy", NonLocalBlock(dim))):
            with FlopCounterMode(display=False) as counter:
                block(x)
            counts[name] = counter.get_total_flops()
    places = rows * rows // 2
    assert counts["light"] == 2 * (dim * channel_taps(dim) + places * 2 * 49)
    assert counts["light"] < counts["heavy"] / 100
    assert counts["heavy"] >= 2 * places * (4 * dim * dim // 2)


def test_they_are_reached_by_name() -> None:
    assert LAYERS["light-attention"] is LightAttention and LAYERS["non-local"] is NonLocalBlock


def test_bad_input_gets_one_sentence() -> None:
    for options, message in (
        ({"kind": "space"}, "kind must be one of 'channel', 'spatial', 'both', got 'space'"),
        ({"squeeze": "fc"}, "squeeze must be one of 'conv', 'mlp', got 'fc'"),
        ({"form": "plain"}, "form must be one of 'residual', 'sigmoid', got 'plain'"),
        ({"reduction": 0}, "reduction must be at least 1, got 0"),
        ({"taps": 4}, "taps must be odd and at least 1, got 4"),
        ({"kernel_size": -1}, "kernel_size must be odd and at least 1, got -1"),
        ({"kind": "spatial", "over_time": True}, "over_time=True needs a gate on channels"),
    ):
        with pytest.raises(ValueError, match=message):
            LightAttention(8, **options)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        LightAttention(0)
    with pytest.raises(ValueError, match="inner must be at least 1, got 0"):
        NonLocalBlock(8, 0)
    for block in (LightAttention, NonLocalBlock):
        with pytest.raises(ValueError, match=r"x must be \(B, T, H, W, 8\) .* got \(1, 4, 4, 8\)"):
            block(8)(torch.zeros(1, 4, 4, 8))
        for shape in ((1, 4, 4, 8), (1, 8, 0, 4, 4), (1, 8, 4, 0)):
            with pytest.raises(
                ValueError, match=r"x must be \(B, 8, H, W\) or \(B, 8, T, H, W\) w"
            ):
                block(8, channels_last=False)(torch.zeros(shape))
