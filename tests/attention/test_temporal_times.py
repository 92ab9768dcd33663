"""Temporal attention with positions in seconds, against attention written out in float64."""

import math

import pytest
import torch
from torch import Tensor

from stvision.attention import ATTENTIONS, TemporalAttention, temporal_attention
from stvision.layers.rotary import rotary_table, rotary_table_at

#: per clip: unequal distances, an offset, a long pause
TIMES = torch.tensor([[0.0, 0.04, 0.11, 0.5, 0.52], [3.0, 3.5, 4.25, 64.0, 64.1]]).double()


def tensors(dtype: torch.dtype = torch.float64, head_dim: int = 11) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = (2, 5, 3, 2, 2, head_dim)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


def written_out(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, dim: int, causal: bool
) -> Tensor:
    """Pixel by pixel and pair by pair, from the definition; positions (B, T)."""
    rate = 1e4 ** (-torch.arange(0, dim, 2).double() / dim)
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.zeros_like(v)
    frames = q.shape[1]
    for b in range(q.shape[0]):
        scores = torch.zeros(frames, frames, *q.shape[2:5], dtype=torch.float64)
        for i in range(frames):
            for j in range(frames):
                angle = (positions[b, i] - positions[b, j]) * rate
                x, y = q[b, i, ..., :dim], k[b, j, ..., :dim]
                even = x[..., ::2] * y[..., ::2] + x[..., 1::2] * y[..., 1::2]
                odd = x[..., 1::2] * y[..., ::2] - x[..., ::2] * y[..., 1::2]
                turned = even * angle.cos() - odd * angle.sin()
                rest = (q[b, i, ..., dim:] * k[b, j, ..., dim:]).sum(-1)
                scores[i, j] = (turned.sum(-1) + rest) / math.sqrt(q.shape[-1])
                if causal and j > i:
                    scores[i, j] = -torch.inf
        weights = scores.softmax(1)
        out[b] = torch.einsum("ijhwn,jhwnd->ihwnd", weights, v[b])
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("unit", [1.0, 0.04])
def test_unequal_times_against_the_definition(causal: bool, unit: float) -> None:
    q, k, v = tensors()
    options = {"rotary_dim": 6, "rotary_unit": unit, "is_causal": causal}
    wanted = written_out(q, k, v, TIMES / unit, 6, causal)
    got = temporal_attention(q, k, v, times=TIMES, **options)
    assert (got - wanted).abs().max() < 1e-12
    shared = temporal_attention(q, k, v, times=TIMES[1], **options)
    wanted = written_out(q, k, v, TIMES[1:].expand(2, -1) / unit, 6, causal)
    assert (shared - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_of_late_times(dtype: torch.dtype) -> None:
    """Two hours into a film, in units of a frame, the angles are still those of float64."""
    q, k, v = tensors(dtype, head_dim=8)
    times = TIMES + 7200
    got = temporal_attention(q, k, v, times=times, rotary_dim=8, rotary_unit=0.04)
    wanted = written_out(q, k, v, TIMES / 0.04, 8, False)
    limit = 2e-6 if dtype == torch.float32 else 2e-2
    assert got.dtype == dtype and (got.double() - wanted).abs().max() < limit


def test_only_distances_matter() -> None:
    q, k, v = tensors()
    wanted = temporal_attention(q, k, v, times=TIMES)
    assert (temporal_attention(q, k, v, times=TIMES - 1.75) - wanted).abs().max() < 1e-12
    moved = TIMES + torch.tensor([[5.0], [-2.0]])
    assert (temporal_attention(q, k, v, times=moved) - wanted).abs().max() < 1e-12
    doubled = temporal_attention(q, k, v, times=2 * TIMES, rotary_unit=2.0)
    assert (doubled - wanted).abs().max() < 1e-12
    assert (temporal_attention(q, k, v, times=2 * TIMES) - wanted).abs().max() > 1e-3


def test_frame_rates() -> None:
    q, k, v = tensors()
    numbers = temporal_attention(q, k, v)
    for fps in (0.5, 24.0, 30000 / 1001):
        got = temporal_attention(q, k, v, fps=fps, rotary_unit=1 / fps)
        assert (got - numbers).abs().max() < 1e-12
    assert torch.equal(temporal_attention(q, k, v, times=torch.arange(5)), numbers)
    # every second frame at half the rate: the same moments
    half = temporal_attention(q[:, ::2], k[:, ::2], v[:, ::2], fps=4.0)
    moments = torch.arange(0, 5, 2) / 8.0
    assert torch.equal(half, temporal_attention(*(x[:, ::2] for x in (q, k, v)), times=moments))
    assert (half - temporal_attention(*(x[:, ::2] for x in (q, k, v)))).abs().max() > 1e-3


def test_gradients() -> None:
    q, k, v = (x[:1, :3, :1, :1].requires_grad_() for x in tensors(head_dim=6))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return temporal_attention(q, k, v, times=TIMES[:1, :3], is_causal=True, backend="math")

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_module_in_seconds_and_in_frames(causal: bool) -> None:
    torch.manual_seed(0)
    module = TemporalAttention(24, 2, causal=causal, rotary_dim=8, rotary_unit=0.25).double()
    assert (
        module.state_dict().keys()
        == ATTENTIONS["temporal"](24, 2, rotary_dim=8).state_dict().keys()
    )
    x = torch.randn(2, 5, 3, 2, 24, dtype=torch.float64)
    frames = module(x)
    assert (module(x, torch.arange(5) * 0.25) - frames).abs().max() < 1e-12
    assert (module(x, fps=4.0) - frames).abs().max() < 1e-12
    assert torch.equal(module(x, TIMES.tolist()), module(x, TIMES))
    assert torch.equal(module(x, tuple(TIMES[0].tolist())), module(x, TIMES[0]))
    q, k, v = (module.split_heads(to(x)) for to in (module.to_q, module.to_k, module.to_v))
    wanted = module.to_out[0](written_out(q, k, v, TIMES / 0.25, 8, causal).flatten(-2))
    assert (module(x, TIMES) - wanted).abs().max() < 1e-12
    changed = x.clone()
    changed[:, 3:] += 1
    same = (module(changed, TIMES)[:, :3] - module(x, TIMES)[:, :3]).abs().max()
    assert (same < 1e-12) == causal
    plain = TemporalAttention(24, 2, rotary_dim=0).double()
    assert (plain(x, TIMES) - plain(x)).abs().max() < 1e-12


def test_times_may_be_mapped_over() -> None:
    """Below a transform of torch.func their numbers cannot be checked."""
    torch.manual_seed(0)
    module = TemporalAttention(24, 2, backend="math").double()
    x = torch.randn(2, 1, 5, 3, 2, 24, dtype=torch.float64)
    mapped = torch.func.vmap(lambda x, times: module(x, times))(x, TIMES)
    assert (mapped[:, 0] - module(x[:, 0], TIMES)).abs().max() < 1e-12


def test_bfloat16_and_autocast() -> None:
    torch.manual_seed(0)
    module, x = TemporalAttention(24, 2, rotary_unit=0.04), torch.randn(2, 5, 3, 2, 24)
    wanted = module(x, TIMES)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x, TIMES)
        mixed.float().sum().backward()
    half = module.bfloat16()(x.bfloat16(), TIMES)
    assert half.dtype == torch.bfloat16
    for got in (mixed, half):
        assert (got.float() - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize("given", ["times", "fps"])
def test_compiles_as_one_graph(given: str) -> None:
    torch.manual_seed(0)
    module, x = TemporalAttention(24, 2, causal=True), torch.randn(2, 5, 3, 2, 24).requires_grad_()
    options = {"times": TIMES} if given == "times" else {"fps": 12.5}
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    outs = [run(x, **options) for run in (module, compiled)]
    assert (outs[0] - outs[1]).abs().max() < 1e-6
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    assert (grads[0] - grads[1]).abs().max() < 1e-5


def test_tables_of_whole_numbers_are_those_of_frames() -> None:
    positions = torch.arange(300).view(2, 150)
    got = rotary_table_at(positions, 10, 77.0)
    assert torch.equal(got.flatten(0, 1), rotary_table(300, 10, 77.0))


def test_bad_input() -> None:
    q, k, v = tensors()
    module = TemporalAttention(24, 2)
    x = torch.zeros(2, 5, 3, 2, 24)
    calls = [
        (lambda: temporal_attention(q, k[:, :4], v), "of one shape"),
        (lambda: temporal_attention(q, k, v, times=TIMES, fps=2.0), "times or fps, not both"),
        (lambda: module(x, TIMES[:, :4]), r"times must be \(5,\) or \(2, 5\), got \(2, 4\)"),
        (lambda: module(x, torch.zeros(5, 2)), r"times must be \(5,\) or \(2, 5\), got \(5, 2\)"),
        (lambda: module(x, [0.0, 1.0]), r"times must be \(5,\) or \(2, 5\), got \(2,\)"),
        (lambda: module(x, [0.0, "b"]), r"times must be a tensor or equally long lists of numbers"),
        (lambda: module(x, [[0.0, 1.0], [1.0]]), "equally long lists of numbers, got"),
        (lambda: module(x, [0, 1, 2, 3, math.nan]), "times must be finite seconds, got .*nan"),
        (lambda: module(x, TIMES / 0), "times must be finite seconds, got .*inf"),
        (lambda: module(x, fps=0.0), "fps must be a number above 0, got 0.0"),
        (lambda: module(x[0], TIMES), r"x must be \(B, T, H, W, 24\)"),
        (lambda: TemporalAttention(24, 2, rotary_unit=0.0), "rotary_unit must be a number"),
        (
            lambda: temporal_attention(q, k, v, times=TIMES, rotary_unit=math.nan),
            "rotary_unit must",
        ),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
def test_on_a_gpu_eager_and_compiled() -> None:
    q, k, v = (x.cuda() for x in tensors(torch.float32, head_dim=16))
    options = {"times": TIMES + 7200, "rotary_dim": 16, "rotary_unit": 0.04, "is_causal": True}
    wanted = written_out(q.cpu(), k.cpu(), v.cpu(), TIMES / 0.04, 16, True)
    torch.compiler.reset()
    compiled = torch.compile(temporal_attention, fullgraph=True, dynamic=False)
    for run in (temporal_attention, compiled):
        assert (run(q, k, v, **options).double().cpu() - wanted).abs().max() < 1e-4
    half = temporal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options)
    assert (half.double().cpu() - wanted).abs().max() < 5e-2
