"""One door to scaled dot-product attention: SDPA, xFormers, or written out."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: more sequences than this in one call overflow the launch grid of CUDA attention kernels
MAX_SEQUENCES = 65535


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    if query.is_cuda and query.shape[0] > MAX_SEQUENCES:
        parts = []
        for start in range(0, query.shape[0], MAX_SEQUENCES):
            part = slice(start, start + MAX_SEQUENCES)
            part_mask = (
                mask[part] if mask is not None and mask.shape[:1] == query.shape[:1] else mask
            )
            parts.append(_sdpa(query[part], key[part], value[part], part_mask, causal, scale))
        return torch.cat(parts)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
    )
    return out.transpose(1, 2)


def _math(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    # softmax in at least float32, so that half-precision results differ by rounding alone
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("blhd,bmhd->bhlm", query.to(wide) * scale, key.to(wide))
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~keep, -torch.inf)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    out = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), value.to(wide))
    return out.to(query.dtype)


def load_xformers() -> Any:
    """The module ``xformers.ops``; ImportError with the command that installs it."""
    try:
        return importlib.import_module("xformers.ops")
    except (ImportError, OSError) as error:
        raise ImportError(
            f"attention backend 'xformers' does not load ({error}); "
            "install it with: pip install --no-deps xformers"
        ) from error


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    if mask is not None:
        raise ValueError(
            "attention backend 'xformers' takes no mask here (its masks need padded memory); "
            "use backend='sdpa' or 'math'"
        )
    if not query.is_cuda:
        raise ValueError(
            f"attention backend 'xformers' needs tensors on a CUDA device, got {query.device}; "
            "use backend='sdpa' or 'math'"
        )
    ops = load_xformers()
    bias = ops.LowerTriangularMask() if causal else None
    return ops.memory_efficient_attention(query, key, value, attn_bias=bias, scale=scale)


_Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], Tensor]

#: name -> implementation
BACKENDS: dict[str, _Backend] = {"sdpa": _sdpa, "xformers": _xformers, "math": _math}


def check_backend(name: str) -> str:
    """Return ``name`` when it is a backend, raise ``ValueError`` with the choices otherwise."""
    if name not in BACKENDS:
        raise ValueError(
            f"attention backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}"
        )
    return name


def dispatch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scaled dot-product attention, ``softmax(query key^T * scale + mask) value``.

    Args:
        query: (B, L, heads, head_dim), any floating dtype.
        key: (B, M, heads, head_dim).
        value: (B, M, heads, head_dim).
        mask: bool (True: may be seen) or additive, broadcastable to (B, heads, L, M).
        is_causal: token i sees tokens 0..i; needs L = M and no mask.
        scale: default head_dim ** -0.5.
        backend: "sdpa" (default), "xformers" (CUDA only, refuses masks) or "math".

    Returns:
        (B, L, heads, head_dim), dtype of ``query``.

    Raises:
        ValueError: wrong shapes, unknown backend, or a mask the backend cannot take.
    """
    if query.ndim != 4 or key.shape != value.shape or key.shape[2:] != query.shape[2:]:
        raise ValueError(
            "query, key and value must be (B, L, heads, head_dim) with equal heads, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if is_causal and mask is not None:
        raise ValueError("give either mask or is_causal=True, not both")
    if is_causal and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"is_causal needs as many keys as queries, got {key.shape[1]} and {query.shape[1]}"
        )
    run = BACKENDS[check_backend("sdpa" if backend is None else backend)]
    return run(
        query, key, value, mask, is_causal, query.shape[-1] ** -0.5 if scale is None else scale
    )
