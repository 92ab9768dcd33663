"""The scan over frames: both implementations against the loop, second derivatives, one graph."""

import os

import pytest
import torch
from torch import Tensor

from stvision.layers import linear_scan as module
from stvision.layers.conv_s5 import ConvSSM
from stvision.layers.linear_scan import linear_scan

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_triton = pytest.mark.skipif(
    not module.HAS_TRITON or not (CUDA or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="no triton, or neither a GPU nor its interpreter",
)
IMPLEMENTATIONS = [None, "blocked", pytest.param("triton", marks=needs_triton)]

#: (B, T, ..., P): one frame, primes, a lane count beyond one program's
SHAPES = [(2, 1, 3, 5), (1, 7, 5), (2, 13, 3, 5, 7), (3, 16, 2, 3, 11)]


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: str = DEVICE) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (shape, shape[-1:], shape[:1] + shape[2:])
    b, a, state = (torch.randn(s, generator=g, dtype=torch.complex128) for s in shapes)
    a = a / a.abs() * torch.linspace(0.6, 1.0, len(a))
    return [x.to(device, dtype).requires_grad_() for x in (b, a, state)]


def loop(b: Tensor, a: Tensor, state: Tensor) -> Tensor:
    out = []
    for frame in b.unbind(1):
        state = a * state + frame
        out.append(state)
    return torch.stack(out, 1)


def results(run, leaves: list[Tensor]) -> list[Tensor]:
    """The scan and the gradients of a sum with random weights over it."""
    y = run(*leaves)
    weight = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.complex128
    )
    weight = weight.to(y)
    return [y.detach(), *torch.autograd.grad((y * weight).real.sum(), leaves)]


def error(got: list[Tensor], wanted: list[Tensor]) -> float:
    pairs = zip(got, wanted, strict=True)
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_equals_the_loop(
    implementation: str | None, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    wanted = results(loop, problem(shape, torch.complex128, "cpu"))
    leaves = problem(shape, dtype)
    got = results(lambda *x: linear_scan(*x, implementation=implementation), leaves)
    assert all(x.dtype == dtype for x in got)
    limit = 3e-6 if dtype == torch.complex64 else 1e-13
    assert error([x.cpu() for x in got], wanted) < limit


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_views_that_are_not_contiguous(implementation: str | None) -> None:
    def turned(b: Tensor, a: Tensor, state: Tensor) -> Tensor:
        b, state = b.conj().transpose(2, 3), state.conj().transpose(1, 2)
        return linear_scan(b, a.conj(), state, implementation=implementation)

    leaves = problem((2, 6, 3, 4, 5), torch.complex128)
    wanted = [x.conj().movedim(-3, -2) for x in results(loop, leaves)[:1]]
    assert error(results(turned, leaves)[:1], wanted) < 1e-13


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_and_second_derivatives(frames: int, implementation: str | None) -> None:
    leaves = problem((1, frames, 2, 2), torch.complex128)

    def run(*x: Tensor) -> Tensor:
        return linear_scan(*x, implementation=implementation)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("frames", [1, 7])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pairs_are_complex_numbers(implementation: str | None, frames: int) -> None:
    leaves = problem((2, frames, 3, 5), torch.complex128)

    def run(*x: Tensor) -> Tensor:
        pairs = (torch.view_as_real(y) for y in x)
        return torch.view_as_complex(linear_scan(*pairs, implementation=implementation))

    assert error(results(run, leaves), results(loop, leaves)) < 1e-13
    b, a, state = (torch.view_as_real(x.detach()).requires_grad_() for x in leaves)
    # real and imaginary parts that do not lie side by side
    strewn = b.movedim(-1, 1).contiguous().movedim(1, -1), a.mT.contiguous().mT
    wanted = linear_scan(b, a, state, implementation=implementation)
    assert torch.equal(linear_scan(*strewn, state, implementation=implementation), wanted)
    assert torch.autograd.gradgradcheck(
        lambda *x: linear_scan(*x, implementation=implementation), (b, a, state), fast_mode=True
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_is_one_operator_to_the_compiler(implementation: str | None) -> None:
    leaves = problem((2, 7, 3, 5), torch.complex64)

    def run(*x: Tensor) -> Tensor:
        return linear_scan(*x, implementation=implementation)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    assert error(results(compiled, leaves), results(run, leaves)) < 1e-6

    def conjugated(*x: Tensor) -> Tensor:
        return run(*(y.conj() for y in x)).conj()

    compiled = torch.compile(conjugated, fullgraph=True, backend="aot_eager", dynamic=False)
    assert error(results(compiled, leaves), results(run, leaves)) < 1e-6
    b, a = (x.detach() for x in leaves[:2])
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    name = implementation or "blocked"
    for x, y in ((b, a), (torch.view_as_real(b), torch.view_as_real(a))):
        torch.library.opcheck(module._scan, (x, y, False, name), test_utils=checks)
        torch.library.opcheck(module._scan_backward, (x, x, y, name), test_utils=checks)


def test_the_system_uses_the_implementation_it_is_told() -> None:
    system = ConvSSM(4, 6, implementation="triton")
    real = torch.complex(torch.ones(2), torch.ones(2))
    if module.why_not_triton(real) is None:
        other = ConvSSM(4, 6, implementation="blocked")
        other.load_state_dict(system.state_dict())
        u = torch.randn(1, 5, 3, 3, 4)
        assert (system(u)[0] - other(u)[0]).abs().max() < 1e-6 * system(u)[0].abs().max()
    else:
        with pytest.raises(ValueError, match="implementation 'triton' cannot run this scan: "):
            system(torch.zeros(1, 2, 3, 3, 4))


def test_bad_input() -> None:
    b, a, state = problem((2, 3, 4, 5), torch.complex64)
    with pytest.raises(ValueError, match="must be None or one of 'triton', 'blocked', got 'fast'"):
        linear_scan(b, a, implementation="fast")
    with pytest.raises(ValueError, match=r"a \(P,\) of its dtype, got .*float32"):
        linear_scan(b, a.real)
    with pytest.raises(ValueError, match=r"state must be \(2, 4, 5\), got \(2, 4, 4\)"):
        linear_scan(b, a, state[..., :4])
    with pytest.raises(ValueError, match="implementation 'triton' cannot run this scan: "):
        linear_scan(b.real.cpu(), a.real.cpu(), implementation="triton")
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        ConvSSM(4, 6, implementation="fast")


@pytest.mark.gpu
def test_three_hundred_frames_on_a_gpu() -> None:
    """At a size of use: more lanes than one wave of programs, float32 against float64."""
    shape = (2, 300, 16, 16, 128)
    wanted = results(
        lambda *x: linear_scan(*x, implementation="blocked"), problem(shape, torch.complex128)
    )
    leaves = problem(shape, torch.complex64)
    for name in module.IMPLEMENTATIONS:
        got = results(lambda *x, name=name: linear_scan(*x, implementation=name), leaves)
        assert error(got, wanted) < 1e-4, name
        again = results(lambda *x, name=name: linear_scan(*x, implementation=name), leaves)
        assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True)), name
