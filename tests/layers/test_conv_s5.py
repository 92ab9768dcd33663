"""ConvS5: scan against loop, the system against S5 on patches, streaming, convolutions, gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stvision.layers.conv_s5 import READOUTS, ConvS5, ConvSSM, linear_scan


def ssm(kernel_size: int = 3, dtype: torch.dtype = torch.float64, **options: object) -> ConvSSM:
    torch.manual_seed(0)
    return ConvSSM(4, 6, kernel_size, dt_min=0.05, dt_max=0.5, **options).to(dtype)


def layer(readout: str = "resnet", dtype: torch.dtype = torch.float64, **options: object) -> ConvS5:
    torch.manual_seed(0)
    made = ConvS5(4, 6, readout=readout, groups=2, dt_min=0.05, dt_max=0.5, **options)
    return made.to(dtype).eval()


def clip(frames: int = 7, size: tuple[int, int] = (5, 6), dtype=torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, frames, *size, 4, generator=g, dtype=torch.float64).to(dtype)


def loop(b: Tensor, a: Tensor, state: Tensor | None = None) -> Tensor:
    x = torch.zeros_like(b[:, 0]) if state is None else state
    out = []
    for t in range(b.shape[1]):
        x = a * x + b[:, t]
        out.append(x)
    return torch.stack(out, 1)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 9, 10, 17, 50])
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64, torch.float64])
def test_scan_is_the_loop(frames: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    b, a, state = (torch.randn(s, dtype=dtype) for s in ((2, frames, 3, 5), (5,), (2, 3, 5)))
    a = a / a.abs() * torch.linspace(0.5, 1.0, 5)
    for before in (None, state):
        wanted = loop(b, a, before)
        limit = 1e-5 if dtype == torch.complex64 else 1e-12
        assert (linear_scan(b, a, before) - wanted).abs().max() < limit * wanted.abs().max()


@pytest.mark.parametrize("frames", [1, 6, 10])
def test_gradients_of_the_scan(frames: int) -> None:
    torch.manual_seed(0)
    shapes = ((2, frames, 2, 3), (3,), (2, 2, 3))
    leaves = [torch.randn(s, dtype=torch.complex128).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(linear_scan, leaves)


def test_at_a_pixel_the_state_is_s5_on_its_patch() -> None:
    system, u = ssm(), clip()
    a, b, _ = system.system()
    for y, x in ((2, 3), (1, 1)):
        patch = u[:, :, y - 1 : y + 2, x - 1 : x + 2].movedim(-1, 2).flatten(2)  # (B, T, U k k)
        wanted = loop(patch.to(b.dtype) @ b.flatten(1).mT, a)[:, -1]
        state = torch.view_as_complex(system(u)[1])
        assert (state[:, y, x] - wanted).abs().max() < 1e-13


def test_with_kernels_of_one_it_is_s5_on_each_pixel() -> None:
    system, u = ssm(kernel_size=1), clip()
    a, b, c = (x.squeeze(-1).squeeze(-1) if x.ndim > 1 else x for x in system.system())
    states = loop(u.to(b.dtype) @ b.mT, a)
    assert (system(u)[0] - 2 * (states @ c.mT).real).abs().max() < 1e-13


def test_impulse_response_of_a_state() -> None:
    system = ssm()
    a, b, _ = system.system()
    u = torch.zeros(1, 6, 5, 5, 4, dtype=torch.float64)
    u[0, 0, 2, 2, 1] = 1
    for t in range(6):
        state = torch.view_as_complex(system(u[:, : t + 1])[1])[0]
        wanted = a**t * b[:, 1].flip(-1, -2).movedim(0, -1)  # a correlation leaves it flipped
        assert (state[1:4, 1:4] - wanted).abs().max() < 1e-14


@pytest.mark.parametrize("blocks", [1, 3])
def test_states_decay_at_the_start(blocks: int) -> None:
    system = ConvSSM(2, 12, blocks=blocks)
    assert (system.system()[0].abs() < 1).all()
    assert torch.equal(system.lambda_re, torch.full((6,), -0.5))
    assert (system.lambda_im < 0).all()


def test_clipped_eigenvalues_never_grow() -> None:
    free, clipped = ssm(), ssm(clip_eigs=True)
    for system in (free, clipped):
        with torch.no_grad():
            system.lambda_re.fill_(0.3)
    assert (free.system()[0].abs() > 1).all() and (clipped.system()[0].abs() < 1).all()


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("chunks", [[1] * 7, [3, 4]])
def test_streaming_equals_parallel(readout: str, prenorm: bool, chunks: list[int]) -> None:
    made, x = layer(readout, prenorm=prenorm), clip()
    state, parts = None, []
    for part in x.split(chunks, dim=1):
        y, state = made.stream(part, state)
        parts.append(y)
    assert (torch.cat(parts, 1) - made(x)).abs().max() < 1e-12
    assert (made.stream(x)[1] - state).abs().max() < 1e-13


def test_shifted_frames_give_shifted_frames() -> None:
    system, u = ssm(), torch.zeros(1, 4, 12, 13, 4, dtype=torch.float64)
    u[:, :, 3:7, 4:8] = clip(4)[:1, :, :4, :4]
    shifted = system(u.roll((2, 1), (2, 3)))[0]
    assert (shifted - system(u)[0].roll((2, 1), (2, 3))).abs().max() < 1e-13


def test_half_spectrum_gives_the_response_of_the_whole_real_system() -> None:
    """Over all states the system is real, and no phase of the eigenvectors is left in it."""
    system = ssm()
    a, b, c = system.system()
    whole_a = torch.cat([a, a.conj()])
    whole_b, whole_c = torch.cat([b, b.conj()]), torch.cat([c, c.conj()], 1)
    phase = torch.exp(1j * torch.rand(3, dtype=torch.float64))
    turn = torch.cat([phase, phase.conj()])
    whole_b, whole_c = whole_b * turn[:, None, None, None], whole_c / turn[:, None, None]
    u = clip()
    driven = [
        F.conv2d(u[:, t].movedim(-1, 1).to(a.dtype), whole_b, padding=1).movedim(1, -1)
        for t in range(7)
    ]
    states = loop(torch.stack(driven, 1), whole_a)
    for t in range(7):
        y = F.conv2d(states[:, t].movedim(-1, 1), whole_c, padding=1).movedim(1, -1)
        assert y.imag.abs().max() < 1e-13
        assert (y.real - system(u)[0][:, t]).abs().max() < 1e-13


@pytest.mark.parametrize("readout", READOUTS)
def test_gradients(readout: str) -> None:
    made, x = layer(readout), clip(4, (3, 3)).requires_grad_()
    names = [name for name, _ in made.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(made, named, (x,)).sin().sum()

    leaves = (x, *made.parameters())
    assert torch.autograd.gradcheck(run, leaves, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("readout", READOUTS)
def test_compiles_as_one_graph(readout: str) -> None:
    made, x = layer(readout), clip().requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager", dynamic=False)
    assert (compiled(x) - made(x)).abs().max() < 1e-12
    grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (compiled, made)]
    assert (grads[0] - grads[1]).abs().max() < 1e-10


@pytest.mark.parametrize("readout", READOUTS)
def test_half_precision_keeps_the_system_in_float32(readout: str) -> None:
    made, x = layer(readout, torch.float32), clip(dtype=torch.float32)
    wanted, y = made(x), made.ssm(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.ssm(x)[0], y) and made.ssm(x)[1].dtype == torch.float32
        mixed = made(x)
        mixed.float().sum().backward()
    half = made.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for got in (mixed, half):
        assert (got.float() - wanted).square().mean().sqrt() < 0.01 * wanted.square().mean().sqrt()


def test_dropout_is_one_for_all_frames() -> None:
    made = layer(dropout=0.5).train()
    made.norm = torch.nn.Identity()
    made.norm.weight = torch.zeros((), dtype=torch.float64)
    torch.manual_seed(0)
    x = clip()
    branch = made(x) - x
    zero = branch == 0
    assert torch.equal(zero.all(1), zero.any(1)) and 0.3 < zero.double().mean() < 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state_dim": 7}, "state_dim must be a multiple of 2"),
        ({"kernel_size": 2}, "kernel_size must be odd"),
        ({"readout": "glu"}, "readout must be one of resnet, standard, half_glu, got 'glu'"),
        ({"groups": 3}, "groups must divide dim 4, got 3"),
        ({"groups": 3, "readout": "standard"}, "groups must divide dim 4, got 3"),
        ({"dropout": -0.1}, "dropout must be at least 0"),
        ({"dt_min": 1.0, "dt_max": 0.1}, "dt_min must be above 0 and at most dt_max"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvS5(**({"dim": 4, "groups": 2} | arguments))


@pytest.mark.parametrize("readout", READOUTS)
def test_one_place_and_channel_a_group_is_that_of_a_larger_batch(readout: str) -> None:
    """Of a single number the norm is its bias, in a batch of one as of two."""
    made = ConvS5(4, 6, readout=readout, groups=4).double().eval()
    for name, p in made.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p)
    x = clip(1, (1, 1))
    assert (made(x[:1]) - made(x)[:1]).abs().max() < 1e-12


def test_a_readout_without_group_norms_takes_any_channels() -> None:
    made, x = ConvS5(5, 6, readout="half_glu").double().eval(), torch.randn(1, 3, 4, 4, 5).double()
    y = made.ssm(x)[0]
    gated = F.gelu(made.readout.norm(y), approximate="tanh")
    wanted = made.norm(x + gated * made.readout.fc(gated).sigmoid())
    assert (made(x) - wanted).abs().max() < 1e-12


def test_bad_input() -> None:
    made, a = layer(), torch.ones(3)
    with pytest.raises(ValueError, match=r"u must be \(B, T, H, W, 4\)"):
        made(clip()[..., :3])
    with pytest.raises(ValueError, match=r"state must be \(2, 5, 6, 3, 2\), got"):
        made.stream(clip(), torch.zeros(2, 5, 5, 3, 2))
    with pytest.raises(ValueError, match=r"b must be \(B, T, ..., P\)"):
        linear_scan(torch.zeros(2, 4, 5), a)
