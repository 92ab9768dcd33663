"""Pairs of real numbers against complex ones: products, transforms, their operators and gradients."""

import pytest
import torch
from torch import Tensor

from stvision.layers import pairs as module
from stvision.layers.pairs import as_complex, divide, exp, irfft, multiply, rfft


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def one_graph(run):
    torch.compiler.reset()
    return torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)


def test_complex_of_any_layout() -> None:
    x = draw(3, 4, 2)
    wanted = torch.complex(x[..., 0], x[..., 1])
    strewn = x.movedim(-1, 0).contiguous().movedim(0, -1)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    for y in (x, strewn, shifted, x.mT.contiguous().mT):
        assert torch.equal(as_complex(y), wanted)
    assert as_complex(x).data_ptr() == x.data_ptr()
    assert torch.equal(as_complex(x.transpose(0, 1)), wanted.T)


def test_products_quotients_and_exponentials_are_those_of_complex_numbers() -> None:
    x, y = draw(5, 1, 3, 2), draw(4, 3, 2) + 1
    for run, wanted in (
        (multiply, as_complex(x) * as_complex(y)),
        (divide, as_complex(x) / as_complex(y)),
        (lambda x, _: exp(x), as_complex(x).exp()),
    ):
        wanted = torch.view_as_real(wanted)
        assert torch.equal(run(x, y), wanted)
        assert (one_graph(run)(x, y) - wanted).abs().max() < 1e-14


@pytest.mark.parametrize("n", [1, 2, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_are_the_transforms_and_their_gradients(n: int, dtype: torch.dtype) -> None:
    limit = 1e-5 if dtype == torch.float32 else 1e-13
    x = draw(2, 3, n // 2 + 1, dtype=dtype).requires_grad_()
    z = draw(2, 3, n // 2 + 1, 2, dtype=dtype).requires_grad_()
    for plain, operator, leaf in ((rfft, module._rfft, x), (irfft, module._irfft, z)):
        wanted, got = plain(leaf, n), operator(leaf, n)
        weight = draw(*wanted.shape, dtype=dtype)
        assert (got - wanted).abs().max() < limit
        grads = [torch.autograd.grad((y * weight).sum(), leaf)[0] for y in (wanted, got)]
        assert (grads[0] - grads[1]).abs().max() < limit
        if dtype == torch.float64:
            assert torch.autograd.gradcheck(lambda y, f=operator: f(y, n), leaf)
            assert torch.autograd.gradgradcheck(lambda y, f=operator: f(y, n), leaf)


@pytest.mark.parametrize("operator", [module._rfft, module._irfft])
def test_operators_keep_the_rules(operator) -> None:
    for n in (8, 9):
        x = draw(2, 5, 5) if operator is module._rfft else draw(3, 5, 2)
        strewn = x.movedim(-1, 0).contiguous().movedim(0, -1)
        for leaf in (x, strewn):
            torch.library.opcheck(operator, (leaf.requires_grad_(), n))


def test_transforms_of_functions() -> None:
    """What ``torch.func`` did with plain Fourier transforms it does with these, compiled as well."""
    x, y = draw(4, 3, 7), draw(4, 7) + 1

    def run(a: Tensor, b: Tensor) -> Tensor:
        return irfft(multiply(rfft(a, 12), rfft(b, 12)), 12)[..., :7].sin().sum()

    def plain(a: Tensor, b: Tensor) -> Tensor:
        product = torch.fft.rfft(a, n=12) * torch.fft.rfft(b, n=12)
        return torch.fft.irfft(product, n=12)[..., :7].sin().sum()

    def grads(f):
        return torch.func.vmap(torch.func.grad(f, argnums=(0, 1)))

    wanted = grads(plain)(x, y)
    for got in (grads(run)(x, y), one_graph(grads(run))(x, y)):
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(got, wanted, strict=True))
    tangents = torch.func.jvp(run, (x[0], y[0]), (y[:3], y[1]))[1]
    assert (tangents - torch.func.jvp(plain, (x[0], y[0]), (y[:3], y[1]))[1]).abs() < 1e-12
