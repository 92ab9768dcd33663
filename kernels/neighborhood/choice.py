"""Which backend runs a problem, and why not the others."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stvision.kernels.neighborhood import dense
from stvision.kernels.neighborhood.triton_tiles import supports
from stvision.kernels.neighborhood.windows import Axis

BACKENDS = ("sdpa", "triton", "flex", "blocked", "reference")
#: order in which an automatic choice tries the backends, by type of device
AUTOMATIC = {
    "cuda": ("sdpa", "triton", "blocked", "reference"),
    "cpu": ("sdpa", "blocked", "reference"),
}

HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on the CPU for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Request:
    """What a backend must be able to do."""

    device: torch.device
    dtype: torch.dtype
    axes: tuple[Axis, ...]
    head_dim: int
    value_dim: int
    has_rpb: bool
    has_key_mask: bool
    needs_grad: bool
    needs_lse: bool
    batch: int
    deterministic: bool


@dataclass(frozen=True)
class Choice:
    """A chosen backend and, for each of the others, one sentence why it was not taken.

    ``print`` it; ``backend`` is the name to pass as ``backend=``.
    """

    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: taken"]
        lines += [f"{name}: {self.reasons[name]}" for name in BACKENDS if name in self.reasons]
        return "\n".join(lines)


def _why_not_sdpa(request: Request) -> str | None:
    if request.has_rpb or request.has_key_mask:
        return "rpb and key_mask are not supported"
    if request.needs_lse:
        return "the log-sum-exp, which return_lse and additional tokens need, is not available"
    if request.head_dim != request.value_dim:
        return f"head_dim {request.head_dim} and value head_dim {request.value_dim} must be equal"
    if request.deterministic and request.needs_grad and request.device.type != "cpu":
        return "a deterministic backward is not promised"
    return dense.why_not(request.axes, request.batch)


def _why_not_triton(request: Request) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed"
    if request.device.type != "cuda" and not interpreted():
        return f"needs a GPU, the tensors are on {request.device}"
    if request.dtype == torch.float64:
        return "float64 is not supported"
    if not supports(request.axes):
        return "query_map='center' or 'start' together with dilation is not supported"
    if max(request.head_dim, request.value_dim) > 256:
        return f"head_dim is at most 256, not {max(request.head_dim, request.value_dim)}"
    return None


def _why_not_flex(request: Request) -> str | None:
    if request.has_rpb:
        return "rpb is not supported"
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace how its block mask is made"
    if request.dtype == torch.float64 and request.device.type == "cuda":
        return "float64 is not supported on a GPU"
    if request.needs_grad and request.device.type == "cpu":
        return "FlexAttention has no backward on the CPU"
    if request.device.type == "cuda":
        for size in (request.head_dim, request.value_dim):
            if size < 16 or size & (size - 1):
                return f"head_dim must be a power of two of at least 16, not {size}"
    return None


def _why_not_always(request: Request) -> str | None:
    return None


WHY_NOT: dict[str, Callable[[Request], str | None]] = {
    "sdpa": _why_not_sdpa,
    "triton": _why_not_triton,
    "flex": _why_not_flex,
    "blocked": _why_not_always,
    "reference": _why_not_always,
}


def _boxes_beat_blocks(request: Request) -> bool:
    """Whether windows that tile the grid are faster as boxes than cut into dense problems.

    Cutting copies every tensor; where a tensor memory unit loads boxes from the grid as it lies,
    forward with backward takes as long as dense attention alone and half of its memory.
    """
    if request.device.type != "cuda" or torch.finfo(request.dtype).bits > 16:
        return False
    if torch.version.hip or torch.cuda.get_device_capability(request.device)[0] < 9:
        return False
    return not all(axis.is_full for axis in request.axes) and not dense.is_triangle(request.axes)


def choose(request: Request, backend: str | None) -> Choice:
    """The backend asked for, or the first of the automatic order that can run the request.

    Raises:
        ValueError: ``backend`` is unknown or cannot run the request.
    """
    automatic = AUTOMATIC.get(request.device.type, AUTOMATIC["cpu"])
    if "triton" in automatic and _boxes_beat_blocks(request):
        automatic = ("triton", *(name for name in automatic if name != "triton"))
    reasons = {}
    for name in BACKENDS:
        why = WHY_NOT[name](request)
        if why is not None:
            reasons[name] = why
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
        if backend in reasons:
            raise ValueError(f"backend {backend!r} cannot run this call: {reasons[backend]}")
        chosen = backend
    else:
        chosen = next(name for name in automatic if name not in reasons)
    for name in BACKENDS:
        if name != chosen and name not in reasons:
            if backend is not None:
                reasons[name] = "could run, but another was asked for"
            elif name in automatic:
                reasons[name] = f"could run, but comes after {chosen}"
            else:
                reasons[name] = "could run, but only when asked for"
    return Choice(chosen, reasons)
