"""S4: convolution, recurrence and chunks against one another and against a float64 loop."""

import pytest
import torch
from torch import Tensor

from stvision.layers.state_space import (
    S4,
    causal_convolution,
    hippo_legs,
    s4_matrices,
    s4_scan,
)


def layer(dim: int = 3, l_max: int = 24, dtype: torch.dtype = torch.float64) -> S4:
    torch.manual_seed(0)
    return S4(dim, l_max, d_state=8, dt_min=0.02, dt_max=0.3).to(dtype).eval()


def tokens(length: int, dim: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, length, dim, generator=g, dtype=torch.float64).to(dtype)


def written_out(s4: S4, x: Tensor) -> Tensor:
    """The layer as a recurrence over dense matrices of the continuous system."""
    *system, dt = s4.system()
    w, b, c = (torch.view_as_complex(x) for x in system)
    out = torch.zeros_like(x)
    for channel in range(s4.dim):
        modes = torch.cat([w, w.conj()])
        inputs, p = (torch.cat([v, v.conj()]) for v in b[channel])
        outputs, q = (torch.cat([v, v.conj()]) for v in c[channel])
        a = torch.diag(modes) - p[:, None] * q.conj()[None]
        eye = torch.eye(len(modes), dtype=a.dtype)
        step = dt[channel]
        inverse = torch.linalg.inv(eye - step / 2 * a)
        a_bar, b_bar = inverse @ (eye + step / 2 * a), inverse @ (step * inputs)
        c_bar = outputs.conj() @ torch.linalg.inv(eye - torch.linalg.matrix_power(a_bar, s4.l_max))
        for sample in range(x.shape[0]):
            state = torch.zeros_like(b_bar)
            for t in range(x.shape[1]):
                state = a_bar @ state + b_bar * x[sample, t, channel]
                out[sample, t, channel] = (c_bar @ state).real
    out = torch.nn.functional.gelu(out + x * s4.D)
    return out @ s4.output_linear.weight.T + s4.output_linear.bias


@pytest.mark.parametrize("size", [2, 8, 64])
def test_hippo_is_normal_plus_rank_one(size: int) -> None:
    w, v, p, b = hippo_legs(size)
    n = torch.arange(size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    hippo = -(torch.outer(root, root).tril(-1) + torch.diag(n + 1))
    rebuilt = 2 * (v @ torch.diag(w) @ v.mH).real - torch.outer(p, p)
    assert (rebuilt - hippo).abs().max() < 1e-10 * size
    assert torch.equal(w.real, torch.full((size // 2,), -0.5, dtype=torch.float64))
    assert (w.imag < 0).all() and torch.equal(b, root)
    modes = torch.linalg.eigvals(hippo + torch.outer(p, p))
    assert (modes.real + 0.5).abs().max() < 1e-10 * size


def test_real_parts_of_modes_are_minus_a_half_at_the_start() -> None:
    assert torch.equal(S4(2, 9).w[:, 0], torch.full((32,), -0.5))


def test_convolution_is_the_explicit_causal_sum() -> None:
    u, k = tokens(11).mT, torch.randn(3, 14, dtype=torch.float64)
    wanted = torch.zeros_like(u)
    for t in range(11):
        for s in range(t + 1):
            wanted[..., t] += k[:, t - s] * u[..., s]
    assert (causal_convolution(u, k) - wanted).abs().max() < 1e-12


@pytest.mark.parametrize(("length", "l_max"), [(1, 1), (7, 24), (24, 24), (23, 23), (61, 13)])
def test_layer_is_the_recurrence(length: int, l_max: int) -> None:
    s4, x = layer(l_max=l_max), tokens(length)
    wanted = written_out(s4, x)
    assert (s4(x) - wanted).abs().max() < 1e-10
    assert (layer(l_max=l_max, dtype=torch.float32)(x.float()) - wanted).abs().max() < 2e-5


@pytest.mark.parametrize("chunks", [[1] * 13, [13], [1, 5, 7], [4, 9]])
def test_streaming_equals_parallel(chunks: list[int]) -> None:
    s4, x = layer(l_max=9), tokens(13)
    matrices, state, parts = s4.matrices(), None, []
    for part in x.split(chunks, dim=1):
        y, state = s4.stream(part, state, matrices)
        parts.append(y)
    assert (torch.cat(parts, 1) - s4(x)).abs().max() < 1e-11
    assert (s4.stream(x)[1] - state).abs().max() < 1e-11


def test_streaming_in_float32() -> None:
    s4, x = layer(l_max=64, dtype=torch.float32), tokens(64, dtype=torch.float32)
    first, state = s4.stream(x[:, :40])
    second, _ = s4.stream(x[:, 40:], state)
    whole = s4(x)
    assert (torch.cat([first, second], 1) - whole).abs().max() < 2e-5 * whole.abs().max()


def test_nothing_comes_from_the_future_and_samples_are_apart() -> None:
    s4, x = layer(), tokens(20)
    changed = x.clone()
    changed[:, 12:] += 1
    assert (s4(x)[:, :12] - s4(changed)[:, :12]).abs().max() < 1e-12
    assert (s4(changed)[:, 12:] - s4(x)[:, 12:]).abs().min() > 0
    assert (s4(x[1:]) - s4(x)[1:]).abs().max() < 1e-12


def test_clips_are_read_frame_by_frame() -> None:
    s4, x = layer(), tokens(2 * 3 * 4)
    assert torch.equal(s4(x.view(2, 2, 3, 4, 3)), s4(x).view(2, 2, 3, 4, 3))


@pytest.mark.parametrize("length", [9, 21])
def test_gradients(length: int) -> None:
    s4, x = layer(2, 9), tokens(length, 2).requires_grad_()
    inputs = (x, *s4.parameters())
    names = [name for name, _ in s4.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(s4, named, (x,)).sin().sum()

    assert torch.autograd.gradcheck(run, inputs, atol=1e-6, fast_mode=True)


def test_gradients_of_scan_reach_state_and_system() -> None:
    s4 = layer(2, 5)
    u, state = tokens(4, 2).mT.requires_grad_(), torch.randn(2, 2, 8, dtype=torch.float64)
    state.requires_grad_()
    system = s4.system()

    def run(u: Tensor, state: Tensor, *system: Tensor) -> Tensor:
        y, last = s4_scan(u, s4_matrices(*system, 5), state)
        return y.sum() + last.square().sum()

    leaves = tuple(x.detach().requires_grad_() for x in system)
    assert torch.autograd.gradcheck(run, (u, state, *leaves), atol=1e-6, fast_mode=True)


def test_half_precision_keeps_the_fourier_parts_in_float32() -> None:
    s4, x = layer(dtype=torch.float32), tokens(24, dtype=torch.float32)
    wanted, kernel = s4(x), s4.kernel(24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(s4.kernel(24), kernel) and kernel.dtype == torch.float32
        mixed = s4(x)
        mixed.float().sum().backward()
    assert (mixed.float() - wanted).abs().max() < 0.02 * wanted.abs().max()
    half = s4.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and s4.kernel(5).dtype == torch.float32
    assert (half.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("length", [12, 40])
def test_compiles_as_one_graph(length: int) -> None:
    s4, x = layer(), tokens(length)
    torch.compiler.reset()
    compiled = torch.compile(s4, fullgraph=True, backend="aot_eager", dynamic=False)
    assert (compiled(x) - s4(x)).abs().max() < 1e-12


def test_dropout_takes_whole_channels() -> None:
    torch.manual_seed(0)
    s4 = S4(64, 9, d_state=4, dropout=0.5)
    with torch.no_grad():
        s4.output_linear.weight.copy_(torch.eye(64))
        s4.output_linear.bias.zero_()
        x = torch.randn(3, 9, 64)
        dropped, whole = s4.train()(x), s4.eval()(x)
    zero = (dropped == 0).all(1, keepdim=True)
    assert torch.allclose(dropped, torch.where(zero, 0.0, 2 * whole))
    assert 60 < zero.sum() < 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_state": 7}, "d_state must be even and at least 2, got 7"),
        ({"l_max": 0}, "dim and l_max must be at least 1"),
        ({"dt_min": 0.0}, "dt_min must be above 0 and at most dt_max"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S4(**({"dim": 2, "l_max": 4} | arguments))


def test_bad_input() -> None:
    s4 = layer()
    for bad in (torch.zeros(2, 3), torch.zeros(2, 5, 4), torch.zeros(2, 0, 3)):
        with pytest.raises(
            ValueError, match=r"x must be \(B, L, 3\) with L at .* \(B, T, H, W, 3\)"
        ):
            s4(bad)
    with pytest.raises(ValueError, match=r"state must be \(2, 3, 8\)"):
        s4.stream(tokens(3), torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="size must be even"):
        hippo_legs(3)


def test_longer_sequences_ask_the_device_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.linalg.solve`` reads back whether a matrix is singular, which a CUDA graph refuses."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the host waits for the device")

    layer = S4(4, l_max=8, d_state=4)
    monkeypatch.setattr(torch.linalg, "solve", refuse)
    layer(torch.randn(1, 30, 4)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
