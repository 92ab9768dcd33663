"""Linear recurrences ``x_t = a x_(t-1) + b_t`` over the frames of clips, with one number a channel.

The gradient of a scan is the scan backwards, so nothing but the result is kept. Two implementations:
``"blocked"`` takes blocks of about sqrt(T) frames side by side, in plain tensor operations; it reads
and writes the clip about five times. ``"triton"`` is one kernel that walks the frames of all pixels
and channels at once, reading and writing once; its backward sums the gradient of ``a`` on the way.
"""

import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from stvision.layers.checks import check_choice
from stvision.layers.pairs import as_complex, multiply

IMPLEMENTATIONS = ("triton", "blocked")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def _blocked(b: Tensor, a: Tensor, backwards: bool) -> Tensor:
    """The scan of (B, T, ..., P), from the last frame to the first where ``backwards``."""
    frames = b.shape[1]
    size = math.isqrt(frames - 1) + 1
    x = torch.empty_like(b, memory_format=torch.contiguous_format)

    def place(y: Tensor, first: int, end: int, step: int = 1) -> Tensor:
        """Frames first, first + step, ... below ``end``, counted from where the scan begins."""
        if not backwards:
            return y[:, first:end:step]
        last = first + (end - 1 - first) // step * step
        return y[:, frames - 1 - last : frames - first : step]

    place(x, 0, frames, size).copy_(place(b, 0, frames, size))
    for i in range(1, size):
        earlier = place(x, i - 1, frames - 1, size)
        torch.addcmul(place(b, i, frames, size), a, earlier, out=place(x, i, frames, size))
    if size < frames:
        powers = a.expand(size, -1).cumprod(0).view(size, *(1,) * (b.ndim - 3), -1)
        powers = powers.flip(0) if backwards else powers
        for first in range(size, frames, size):
            end = min(first + size, frames)
            used = powers[size - (end - first) :] if backwards else powers[: end - first]
            place(x, first, end).addcmul_(used, place(x, first - 1, first))
    return x


def _grad_a(g: Tensor, x: Tensor, backwards: bool) -> Tensor:
    """Gradient of ``a``, (P,), from that of b and the result."""
    g, before = (g[:, :-1], x[:, 1:]) if backwards else (g[:, 1:], x[:, :-1])
    return (before.conj_physical() * g).flatten(0, -2).sum(0)


# Inside of an operator, and below a compiled graph, nothing may hold the lazy conjugation of torch:
# what resolves it need not run there. Hence ``conj_physical``, and ``resolve_conj`` outside.
@torch.library.custom_op("stvision::linear_scan", mutates_args=())
def _scan(b: Tensor, a: Tensor, backwards: bool, implementation: str) -> Tensor:
    if a.ndim == 2:
        x = _scan_numbers(as_complex(b), as_complex(a), backwards, implementation)
        return torch.view_as_real(x)
    return _scan_numbers(b, a, backwards, implementation)


def _scan_numbers(b: Tensor, a: Tensor, backwards: bool, implementation: str) -> Tensor:
    if implementation == "triton":
        from stvision.layers import linear_scan_triton

        return linear_scan_triton.scan(b, a, backwards)
    return _blocked(b, a, backwards)


@_scan.register_fake
def _(b: Tensor, a: Tensor, backwards: bool, implementation: str) -> Tensor:
    return b.new_empty(b.shape)


@torch.library.custom_op("stvision::linear_scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor, x: Tensor, a: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    if a.ndim == 2:
        grad, x, a = as_complex(grad), as_complex(x), as_complex(a)
        g, grad_a = _scan_backward_numbers(grad, x, a, implementation)
        return torch.view_as_real(g), torch.view_as_real(grad_a)
    return _scan_backward_numbers(grad, x, a, implementation)


def _scan_backward_numbers(
    grad: Tensor, x: Tensor, a: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    if implementation == "triton":
        from stvision.layers import linear_scan_triton

        return linear_scan_triton.backward(grad, x, a)
    g = _blocked(grad, a.conj_physical(), True)
    return g, _grad_a(g, x, False)


@_scan_backward.register_fake
def _(grad: Tensor, x: Tensor, a: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), a.new_empty(a.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, a, ctx.backwards, ctx.implementation = inputs
    ctx.save_for_backward(output, a)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    x, a = ctx.saved_tensors
    grad = grad.resolve_conj()
    if not (ctx.backwards or torch.is_grad_enabled()):
        return *_scan_backward(grad, x, a, ctx.implementation), None, None
    # of these a gradient may be asked for in turn
    if a.ndim == 1:
        g = _scan(grad, a.conj_physical(), not ctx.backwards, ctx.implementation)
        return g, _grad_a(g, x, ctx.backwards), None, None
    re, im = a.unbind(-1)
    g = _scan(grad, torch.stack((re, -im), dim=-1), not ctx.backwards, ctx.implementation)
    grad_a = _grad_a(as_complex(g), as_complex(x), ctx.backwards)
    return g, torch.view_as_real(grad_a), None, None


torch.library.register_autograd(_scan, _gradient, setup_context=_setup)


def why_not_triton(b: Tensor, *, pairs: bool = False) -> str | None:
    """One sentence why the Triton kernels cannot scan this tensor; ``None`` where they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if not b.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a GPU, the tensors are on {b.device}"
    if not (pairs or b.is_complex()):
        return f"it takes complex numbers, not {b.dtype}"
    return None


def linear_scan(
    b: Tensor, a: Tensor, state: Tensor | None = None, *, implementation: str | None = None
) -> Tensor:
    """``x_t = a x_(t-1) + b_t`` for all frames at once.

    Args:
        b: (B, T, ..., P), real or complex; or (B, T, ..., P, 2), pairs of real and imaginary parts,
            which are what a graph for the compiler may hold.
        a: (P,) or pairs (P, 2), of the same dtype.
        state: x before the first frame, (B, ..., P) or pairs; ``None`` for zeros.
        implementation: ``"blocked"`` or ``"triton"`` (complex numbers on a GPU); ``None`` for the
            best that runs here.

    Returns:
        Tensor like ``b``.

    Raises:
        ValueError: shapes or dtypes that do not fit, no frame, or an implementation that is
            unknown or cannot run this. A named implementation is never swapped for another.
    """
    pairs = a.ndim == 2
    fits = a.ndim == 1 or (pairs and a.shape[1] == 2 and not a.is_complex())
    fits = fits and b.ndim >= 2 + a.ndim and b.shape[1] >= 1 and b.shape[-a.ndim :] == a.shape
    if not fits or a.dtype != b.dtype:
        raise ValueError(
            f"b must be (B, T, ..., P) with T at least 1 (and an axis of 2 more where a is pairs "
            f"(P, 2)) and a (P,) of its dtype, "
            f"got {tuple(b.shape)} {b.dtype} and {tuple(a.shape)} {a.dtype}"
        )
    if state is not None:
        shape = b.shape[:1] + b.shape[2:]
        if state.shape != shape:
            raise ValueError(f"state must be {tuple(shape)}, got {tuple(state.shape)}")
    check_implementation(implementation)
    why = why_not_triton(b, pairs=pairs)
    driven = b[:, 0]
    if state is not None:
        driven = driven + (multiply(a, state) if pairs else a * state)
    if implementation is None and b.shape[1] == 1:  # frame by frame there is nothing to scan
        return driven[:, None].clone() if state is None else driven[:, None]
    if implementation is None:
        implementation = "triton" if b.is_cuda and why is None else "blocked"
    if implementation == "triton" and why is not None:
        raise ValueError(f"implementation 'triton' cannot run this scan: {why}")
    if state is not None:
        b = torch.cat([driven[:, None], b[:, 1:]], dim=1)
    return _scan(b.resolve_conj(), a.resolve_conj(), False, implementation)


def check_implementation(implementation: str | None) -> None:
    """ValueError when it is neither ``None`` nor one of :data:`IMPLEMENTATIONS`."""
    check_choice("implementation", implementation, IMPLEMENTATIONS)
