"""Complex numbers as pairs of real ones, (..., 2): real and imaginary parts side by side.

The kernels that torch's compiler generates know no complex numbers: in Triton a single one that is
copied or padded ends the compilation. So layers that compute with complex numbers hold pairs, which
lie in memory as complex numbers do. Compiled, products are real arithmetic, which is fused, and
Fourier transforms are operators whose insides the compiler does not see, real on both sides. Without
the compiler the same calls take torch's own complex kernels: fewer launches, and every transform of
``torch.func``.
"""

from typing import Any

import torch
from torch import Tensor


def as_complex(x: Tensor) -> Tensor:
    """(..., 2) real as (...) complex: a view where the pairs lie as complex numbers do, or a copy."""
    if torch.compiler.is_compiling():
        return torch.view_as_complex(x.contiguous())
    try:  # faster than to look at strides and offset first
        return torch.view_as_complex(x)
    except RuntimeError:
        return torch.view_as_complex(x.clone(memory_format=torch.contiguous_format))


@torch.compiler.assume_constant_result
def _transforming() -> bool:
    """Whether a transform of ``torch.func`` is at work: operators give it no derivatives."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """Products of pairs (..., 2) and (..., 2), whose other axes are broadcast."""
    if torch.compiler.is_compiling():
        (a, b), (c, d) = x.unbind(-1), y.unbind(-1)
        return torch.stack((a * c - b * d, a * d + b * c), dim=-1)
    return torch.view_as_real(as_complex(x) * as_complex(y))


def divide(x: Tensor, y: Tensor) -> Tensor:
    """Quotients of pairs (..., 2) and (..., 2), whose other axes are broadcast."""
    if torch.compiler.is_compiling():
        (a, b), (c, d) = x.unbind(-1), y.unbind(-1)
        size = c.square() + d.square()
        return torch.stack(((a * c + b * d) / size, (b * c - a * d) / size), dim=-1)
    return torch.view_as_real(as_complex(x) / as_complex(y))


def exp(x: Tensor) -> Tensor:
    """Exponentials of pairs (..., 2)."""
    if torch.compiler.is_compiling():
        size, turn = x[..., 0].exp(), x[..., 1]
        return torch.stack((size * turn.cos(), size * turn.sin()), dim=-1)
    return torch.view_as_real(as_complex(x).exp())


@torch.library.custom_op("stvision::rfft", mutates_args=())
def _rfft(x: Tensor, n: int) -> Tensor:
    return torch.view_as_real(torch.fft.rfft(x.contiguous(), n=n)).contiguous()


@_rfft.register_fake
def _(x: Tensor, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n // 2 + 1, 2)


@torch.library.custom_op("stvision::irfft", mutates_args=())
def _irfft(z: Tensor, n: int) -> Tensor:
    return torch.fft.irfft(as_complex(z), n=n).contiguous()


@_irfft.register_fake
def _(z: Tensor, n: int) -> Tensor:
    return z.new_empty(*z.shape[:-2], n)


def _counts(z: Tensor, n: int) -> Tensor:
    """How many of all n bins each of the half spectrum stands for: (n // 2 + 1, 1)."""
    bins = torch.arange(n // 2 + 1, device=z.device)[:, None]
    single = (bins == 0) | (2 * bins == n)
    return torch.where(single, 1.0, 2.0).to(z.dtype)


# Each transform is the other's gradient, but for how often a bin counts.
def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.size, ctx.n = inputs[0].shape[-1], inputs[1]


def _rfft_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _irfft(grad * (ctx.n / _counts(grad, ctx.n)), ctx.n)[..., : ctx.size], None


def _irfft_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    z = _rfft(grad, ctx.n)
    return z * (_counts(z, ctx.n) / ctx.n), None


torch.library.register_autograd(_rfft, _rfft_gradient, setup_context=_setup)
torch.library.register_autograd(_irfft, _irfft_gradient, setup_context=_setup)


def rfft(x: Tensor, n: int) -> Tensor:
    """Fourier transform of what is real.

    Args:
        x: (..., L) real, float32 or float64.
        n: length of the transform, at least L; the end is filled with zeros.

    Returns:
        (..., n // 2 + 1, 2): bins 0 to n / 2, unscaled.
    """
    if torch.compiler.is_compiling() and not _transforming():
        return _rfft(x, n)
    return torch.view_as_real(torch.fft.rfft(x, n=n))


def irfft(z: Tensor, n: int) -> Tensor:
    """The real signal of a half spectrum, inverse of :func:`rfft`.

    Args:
        z: (..., n // 2 + 1, 2); the imaginary parts of bins 0 and n / 2 count as zero.
        n: length of the transform.

    Returns:
        (..., n), real.
    """
    if torch.compiler.is_compiling() and not _transforming():
        return _irfft(z, n)
    return torch.fft.irfft(as_complex(z), n=n)
