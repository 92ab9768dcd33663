"""Triton kernels of the scan over frames. Imported only where this implementation runs.

A program owns some of the numbers of a frame ("lanes": pixels times channels) of one clip and walks
all frames of them with the state in registers. Neighbouring lanes lie side by side in memory, and a
clip has enough of them to fill a GPU, so nothing is gained by cutting time into blocks. What the next
frames hold is loaded ahead.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: lanes of a program, its warps, and the frames that are on their way at once
LANES, WARPS, STAGES = 64, 1, 6


@triton.jit
def _read(pointer, at, inside):
    """Real and imaginary parts of a lane's complex number."""
    return tl.split(tl.load(pointer + at, mask=inside, other=0.0))


@triton.jit(do_not_specialize=["frames"])
def _scan_kernel(
    b, a, x, frames, lanes, channels, BACKWARDS: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = (lane < lanes)[:, None]
    part = tl.arange(0, 2)[None, :]
    frame = 2 * lanes.to(tl.int64)
    at = tl.program_id(1) * frames * frame + 2 * lane[:, None] + part
    a_re, a_im = _read(a, 2 * (lane % channels)[:, None] + part, inside)
    step = frame
    if BACKWARDS:
        at += (frames - 1) * frame
        step = -frame
    x_re = tl.zeros_like(a_re)
    x_im = tl.zeros_like(a_re)
    for t in tl.range(0, frames, num_stages=STAGES):
        now = at + t * step
        b_re, b_im = _read(b, now, inside)
        re = a_re * x_re - a_im * x_im + b_re
        x_im = a_re * x_im + a_im * x_re + b_im
        x_re = re
        tl.store(x + now, tl.join(x_re, x_im), mask=inside)


@triton.jit(do_not_specialize=["frames"])
def _backward_kernel(
    grad, x, a, g, sums, frames, lanes, channels, LANES: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = (lane < lanes)[:, None]
    part = tl.arange(0, 2)[None, :]
    frame = 2 * lanes.to(tl.int64)
    own = 2 * lane[:, None] + part
    at = tl.program_id(1) * frames * frame + own
    a_re, a_im = _read(a, 2 * (lane % channels)[:, None] + part, inside)
    g_re = tl.zeros_like(a_re)
    g_im = tl.zeros_like(a_re)
    sum_re = tl.zeros_like(a_re)
    sum_im = tl.zeros_like(a_re)
    for t in tl.range(0, frames, num_stages=STAGES):
        left = frames - 1 - t
        now = at + left * frame
        d_re, d_im = _read(grad, now, inside)
        x_re, x_im = _read(x, now - frame, inside & (left > 0))
        re = a_re * g_re + a_im * g_im + d_re
        g_im = a_re * g_im - a_im * g_re + d_im
        g_re = re
        sum_re += x_re * g_re + x_im * g_im
        sum_im += x_re * g_im - x_im * g_re
        tl.store(g + now, tl.join(g_re, g_im), mask=inside)
    tl.store(sums + tl.program_id(1) * frame + own, tl.join(sum_re, sum_im), mask=inside)


def _launch(kernel: Any, like: Tensor, *arguments: Any, **constants: Any) -> None:
    batch, lanes = len(like), like[0, 0].numel()
    if not like.numel():
        return
    real = [torch.view_as_real(y) for y in arguments]
    on: AbstractContextManager[Any] = nullcontext()
    if like.is_cuda:
        on = torch.cuda.device(like.device)
    with on:
        kernel[(triton.cdiv(lanes, LANES), batch)](
            *real, like.shape[1], lanes, like.shape[-1],
            LANES=LANES, STAGES=STAGES, num_warps=WARPS, **constants,
        )  # fmt: skip


def scan(b: Tensor, a: Tensor, backwards: bool) -> Tensor:
    """The scan of (B, T, ..., P) complex, from the last frame to the first where ``backwards``."""
    b = b.contiguous()
    x = torch.empty_like(b)
    _launch(_scan_kernel, b, b, a.contiguous(), x, BACKWARDS=backwards)
    return x


def backward(grad: Tensor, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of b and of a from that of x, the result of the scan from first to last frame."""
    grad, x = grad.contiguous(), x.contiguous()
    g = torch.empty_like(x)
    sums = torch.zeros_like(x[:, 0])
    _launch(_backward_kernel, x, grad, x, a.contiguous(), g, sums)
    return g, sums.flatten(0, -2).sum(0)
