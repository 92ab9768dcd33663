"""Neighborhood attention over 1-D, 2-D and 3-D grids: the public functions.

A query attends to the ``kernel_size`` nearest tokens of each axis, so the cost is linear in the
number of tokens. Semantics are those of NATTEN (arXiv 2204.07143, 2209.15001, 2403.04690,
2504.16922): windows stay full-sized at borders, where they shift.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from stvision.kernels.neighborhood import dense
from stvision.kernels.neighborhood.choice import Choice, Request, choose, interpreted
from stvision.kernels.neighborhood.ops import attend, first_order, is_autocast, tokens_tile
from stvision.kernels.neighborhood.problem import (
    AXIS_NAMES,
    PerAxisBool,
    PerAxisInt,
    PerAxisStr,
    build_axes,
    check_are_tensors,
    check_rpb,
    check_tensors,
    per_axis,
)
from stvision.kernels.neighborhood.windows import Axis

P = ParamSpec("P")
R = TypeVar("R")


def merge(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attentions of the same queries over disjoint sets of keys.

    Args:
        out: (..., heads, d) output of the first attention.
        lse: (..., heads) its log-sum-exp, minus infinity where it saw no key.
        other_out: (..., heads, d) output of the second.
        other_lse: (..., heads) its log-sum-exp.

    Returns:
        Output and log-sum-exp of the attention over both sets; exact and differentiable.
    """
    top = torch.maximum(lse, other_lse).detach()
    top = top.masked_fill(top == -torch.inf, 0.0)
    first, second = (lse - top).exp(), (other_lse - top).exp()
    total = first + second
    safe = total.masked_fill(total == 0, 1.0)
    merged = (first / safe)[..., None] * out + (second / safe)[..., None] * other_out
    return merged.to(out.dtype), total.log() + top


#: whose ``repr`` says all there is to know, as that of an iterator does not
_PLAIN = frozenset({int, bool, str, type(None)})

#: what :func:`_prepare` found for calls without bias, mask and additional tokens
_KNOWN: dict[tuple[Any, ...], tuple[Any, ...]] = {}
#: calls of which it is remembered
MOST_KNOWN = 1024


class _Call(NamedTuple):
    """A checked call: its problem and the choice of a backend."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    additional_keys: torch.Tensor | None
    additional_values: torch.Tensor | None
    axes: tuple[Axis, ...]
    deterministic: bool
    request: Request
    choice: Choice


def _lowered(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` as autocast has it; numbers of another kind are left to the checks."""
    return x.to(dtype) if x.is_floating_point() else x


def _is_written_out(values: tuple[Any, ...]) -> bool:
    """Whether ``repr`` tells these arguments from all others."""
    for x in values:
        if type(x) in (tuple, list):
            for one in x:
                if type(one) not in _PLAIN:
                    return False
        elif type(x) not in _PLAIN:
            return False
    return True


def _prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: PerAxisInt,
    stride: PerAxisInt | None,
    dilation: PerAxisInt | None,
    is_causal: PerAxisBool | None,
    additional_keys: torch.Tensor | None,
    additional_values: torch.Tensor | None,
    backend: str | None,
    return_lse: bool,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    border: PerAxisStr,
    pad: bool,
    query_map: str | PerAxisInt | None,
    deterministic: bool | None,
) -> _Call:
    given = (rpb, key_mask, additional_keys, additional_values)
    plain = type(query) is type(key) is type(value) is torch.Tensor
    plain = plain and rpb is key_mask is additional_keys is additional_values is None
    if not plain:
        names = ("rpb", "key_mask", "additional_keys", "additional_values")
        some = {name: x for name, x in zip(names, given, strict=True) if x is not None}
        check_are_tensors(query=query, key=key, value=value, **some)
    return_lse = bool(return_lse)
    if is_autocast(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (_lowered(x, dtype) for x in (query, key, value))
        if additional_keys is not None and additional_values is not None:
            additional_keys = _lowered(additional_keys, dtype)
            additional_values = _lowered(additional_values, dtype)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    needs_grad = torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or any(x is not None and x.requires_grad for x in given)
    )
    label: tuple[Any, ...] | None = None
    windows = (kernel_size, stride, dilation, is_causal, border, pad, query_map)
    words = (*windows, backend, deterministic)
    if plain and not torch.compiler.is_compiling() and _is_written_out(words):
        # checks and choices take as long as a small kernel; repr tells 1 from True and 1.0
        tensors = ((x.shape, x.dtype, x.device, x.layout) for x in (query, key, value))
        label = (*tensors, repr(words), return_lse, needs_grad, interpreted())
    known = None if label is None else _KNOWN.get(label)
    if known is None:
        check_are_tensors(query=query, key=key, value=value)
        if not isinstance(deterministic, bool):
            raise TypeError(f"deterministic must be True, False or None, not {deterministic!r}")
        rank = query.dim() - 3
        if rank not in AXIS_NAMES:
            raise ValueError(
                "query must be (batch, *grid, heads, head_dim) with a grid of one to three axes, "
                f"but has shape {tuple(query.shape)}"
            )
        check_tensors(
            rank,
            query,
            key,
            value,
            rpb=rpb,
            key_mask=key_mask,
            additional_keys=additional_keys,
            additional_values=additional_values,
        )
        axes, kept = build_axes(
            query.shape[1:-2],
            key.shape[1:-2],
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            is_causal=is_causal,
            border=border,
            pad=pad,
            query_map=query_map,
        )
        if rpb is not None:
            check_rpb(rpb, axes)
        cuts = [
            (axis, inner.start, inner.stop - inner.start)
            for axis, inner in enumerate(kept, start=1)
            if inner.stop - inner.start < query.shape[axis]
        ]
        request = Request(
            device=query.device,
            dtype=query.dtype,
            axes=axes,
            head_dim=query.shape[-1],
            value_dim=value.shape[-1],
            has_rpb=rpb is not None,
            has_key_mask=key_mask is not None,
            needs_grad=needs_grad,
            needs_lse=return_lse or bool(additional_keys is not None and additional_keys.shape[1]),
            batch=query.shape[0],
            deterministic=deterministic,
        )
        known = axes, cuts, request, choose(request, backend)
        if label is not None:
            if len(_KNOWN) >= MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[label] = known
    axes, cuts, request, choice = known
    for axis, start, length in cuts:
        query = query.narrow(axis, start, length)
    return _Call(
        query,
        key,
        value,
        additional_keys,
        additional_values,
        axes,
        deterministic,
        request,
        choice,
    )


def _check_token_options(options: dict[str, Any]) -> None:
    """``attention_kwargs`` names a backend and nothing else.

    Raises:
        TypeError: no dictionary.
        ValueError: another option.
    """
    if not isinstance(options, dict):
        raise TypeError(f"attention_kwargs must be a dictionary, not {options!r}")
    unknown = sorted(str(name) for name in set(options) - {"backend"})
    if unknown:
        raise ValueError(f"attention_kwargs takes backend only, not {', '.join(unknown)}")


def _backend_of_tokens(call: _Call, axes: tuple[Axis, ...], options: dict[str, Any]) -> str:
    """Backend of the additional tokens, which ``attention_kwargs`` may name.

    Raises:
        ValueError: an option other than ``backend``, or a backend that cannot run the call.
    """
    request = replace(call.request, axes=axes, has_rpb=False, has_key_mask=False, needs_lse=True)
    return choose(request, options.get("backend", call.choice.backend)).backend


def _listed(axes: tuple[Axis, ...]) -> list[int]:
    return [number for axis in axes for number in axis.encode()]


_remembered = lru_cache(maxsize=512)(_listed)


def _encoded(axes: tuple[Axis, ...]) -> list[int]:
    """The axes as one list of numbers; not to be changed."""
    if torch.compiler.is_compiling():
        return _listed(axes)
    try:
        return _remembered(axes)
    except TypeError:  # lengths without a value have no hash
        return _listed(axes)


def _tile(name: str, shape: PerAxisInt, rank: int) -> tuple[int, ...]:
    """A tile or box, positive on every axis."""
    tile = per_axis(name, shape, rank)
    if min(tile) < 1:
        raise ValueError(f"{name} must hold numbers of at least 1, not {tile}")
    return tile


def _number(scale: float | None, head_dim: int) -> float:
    """The factor of the logits.

    Raises:
        TypeError: no number, or a tensor that wants a gradient, which it would not get.
    """
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, torch.Tensor) and scale.requires_grad:
        raise TypeError("scale must be a number without a gradient; multiply query by it instead")
    try:
        if isinstance(scale, str):
            raise TypeError
        return float(scale)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"scale must be a number or None, not {scale!r}") from None


def _shapes(
    q_tile_shape: PerAxisInt | None, kv_tile_shape: PerAxisInt | None, rank: int
) -> tuple[int, ...]:
    """Tile and box per axis, one after the other; empty where none is given."""
    tile = () if q_tile_shape is None else _tile("q_tile_shape", q_tile_shape, rank)
    if kv_tile_shape is not None:
        if not tile:
            raise ValueError("kv_tile_shape needs q_tile_shape beside it")
        tile += _tile("kv_tile_shape", kv_tile_shape, rank)
    return tile


def _attend(
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    axes: tuple[Axis, ...],
    scale: float,
    tile: tuple[int, ...],
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "flex" and not query.shape[0]:
        backend = "reference"  # FlexAttention fails on an empty batch
    if backend == "flex":
        from stvision.kernels.neighborhood import flex

        return flex.attention(query, key, value, key_mask, axes, scale, tile[: len(axes)] or None)
    return attend(
        query, key, value, rpb, key_mask, _encoded(axes), scale, backend, list(tile), deterministic
    )


def neighborhood_attention_generic(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: PerAxisInt,
    stride: PerAxisInt | None = 1,
    dilation: PerAxisInt | None = 1,
    is_causal: PerAxisBool | None = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: PerAxisInt | None = None,
    kv_tile_shape: PerAxisInt | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    backward_kv_splits: Sequence[int] | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | None = None,
    torch_compile: bool = False,
    return_lse: bool = False,
    *,
    rpb: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    border: PerAxisStr = "shift",
    pad: bool = False,
    query_map: str | PerAxisInt | None = None,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Neighborhood attention; ``na1d``, ``na2d`` and ``na3d`` are this function for one rank.

    The first arguments are those of NATTEN 0.21, those after ``return_lse`` are additions. A value
    "per axis" is one number for all axes or a tuple with one for each; ``None`` for ``stride``,
    ``dilation`` and ``is_causal`` is their default.

    Args:
        query: (B, *grid, H, d) float16, bfloat16, float32 or float64; grid is (L,), (H, W) or
            (T, H, W). Any d.
        key: (B, *grid, Hk, d). H is a multiple of Hk; query head h uses key head h * Hk // H.
        value: (B, *grid, Hk, dv); dv may differ from d.
        kernel_size: per axis, keys that a query sees, even or odd.
        stride: per axis, neighbouring queries that share one window, that of their middle query;
            from 1 (each its own) to ``kernel_size`` (blocked attention).
        dilation: per axis, distance between visible keys.
        is_causal: per axis, whether a query sees no key after itself on that axis.
        scale: factor of the logits, d ** -0.5 when not given.
        additional_keys: (B, M, Hk, d) tokens that every query sees, such as text.
        additional_values: (B, M, Hk, dv) their values.
        attention_kwargs: ``{"backend": name}`` for the additional tokens.
        backend: ``"sdpa"``, ``"triton"``, ``"flex"``, ``"blocked"``, ``"reference"``, or ``None`` to
            choose (:func:`explain` says what and why).
        q_tile_shape: per axis, queries of one tile, where the backend has tiles; powers of two on
            ``"triton"``.
        kv_tile_shape: per axis, keys of one box on ``"triton"``; needs ``q_tile_shape``.
        backward_q_tile_shape: accepted so that calls written for NATTEN run; without effect, like
            ``backward_kv_tile_shape``, ``backward_kv_splits``, ``backward_use_pt_reduction``,
            ``run_persistent_kernel``, ``kernel_schedule`` and ``torch_compile``.
        return_lse: also return the log-sum-exp of the scaled logits; gradients flow through it.
        rpb: (H, 2 * kernel_size - 1, ...) relative position bias of NAT and DiNAT, added to the
            scaled logits at index (key place - query place + kernel_size - 1) per axis, where
            places count steps of ``dilation``. Learned: it gets a gradient.
        key_mask: (B, *grid) bool, True where a key takes part; for clips of different true size in
            one batch. Masked keys stay in the windows, they do not shift them.
        border: per axis, ``"shift"`` keeps windows full-sized by shifting them, ``"valid"`` gives
            only the queries whose window needs no shift, so an axis of L tokens has
            L - (kernel_size - 1) * dilation outputs.
        pad: let a window be larger than the grid: it then ends with the grid, as if the grid were
            padded with masked tokens.
        query_map: needed when the query grid differs from the key grid. ``"center"`` puts query i
            of an axis at key floor((2 i + 1) Lk / (2 Lq)), ``"start"`` at floor(i Lk / Lq), an
            int per axis at i plus that offset. Windows, stride and causality count from there.
        deterministic: choose a backward whose results repeat bit by bit; ``None`` follows
            ``torch.use_deterministic_algorithms``.

    Returns:
        (B, *query grid, H, dv) in the dtype of ``query``; with ``return_lse`` also (B, *query grid,
        H) float32 (float64 for float64 inputs). A query whose keys are all masked gives 0 and minus
        infinity.

    Raises:
        ValueError: sizes that do not fit together, a window larger than the grid, an unknown
            backend or one that cannot run the call; the sentence names axis and numbers.
        TypeError: a dtype or a value of the wrong kind.
        NotImplementedError: a second derivative, a forward-mode one, or ``torch.func.vmap``.
    """
    call = _prepare(
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        additional_keys,
        additional_values,
        backend,
        return_lse,
        rpb,
        key_mask,
        border,
        pad,
        query_map,
        deterministic,
    )
    query, key, value = call.query, call.key, call.value
    more_keys, more_values = call.additional_keys, call.additional_values
    dtype = query.dtype
    rank, scale = len(call.axes), _number(scale, query.shape[-1])
    tile = _shapes(q_tile_shape, kv_tile_shape, rank)
    if attention_kwargs:
        _check_token_options(attention_kwargs)
    if call.choice.backend == "sdpa":
        query, key, value = first_order(query, key, value)
        return dense.attention(query, key, value, call.axes, scale)
    name = call.choice.backend
    if more_keys is None or more_values is None or not more_keys.shape[1]:
        out, lse = _attend(
            name, query, key, value, rpb, key_mask, call.axes, scale, tile, call.deterministic
        )
        return (out, lse) if return_lse else out
    tokens, grid = more_keys.shape[1], query.shape[1:-2]
    every = (Axis(math.prod(grid), tokens, tokens, query_map="start"),)
    more_name = name
    if attention_kwargs:
        more_name = _backend_of_tokens(call, every, attention_kwargs)
    if "flex" not in (name, more_name):
        out, lse = attend(
            query,
            key,
            value,
            rpb,
            key_mask,
            _encoded(call.axes),
            scale,
            name,
            list(tile),
            call.deterministic,
            more_keys,
            more_values,
            more_name,
        )
    else:
        if name in {"blocked", "reference"}:
            # these compute in float32 anyway; staying there rounds the merged gradients once
            wide = torch.promote_types(dtype, torch.float32)
            query, key, value = (x.to(wide) for x in (query, key, value))
            more_keys, more_values = more_keys.to(wide), more_values.to(wide)
        out, lse = _attend(
            name, query, key, value, rpb, key_mask, call.axes, scale, tile, call.deterministic
        )
        more_out, more_lse = _attend(
            more_name,
            query.flatten(1, -3),
            more_keys,
            more_values,
            None,
            None,
            every,
            scale,
            tokens_tile(more_name, tile, rank),
            call.deterministic,
        )
        out, lse = merge(out, lse, more_out.unflatten(1, grid), more_lse.unflatten(1, grid))
    if out.dtype != dtype:
        out = out.to(dtype)
    return (out, lse) if return_lse else out


def _of_rank(rank: int, function: Callable[P, R]) -> Callable[P, R]:
    """``function`` for tensors of one rank only."""

    @wraps(function)
    def attend(*args: P.args, **kwargs: P.kwargs) -> R:
        query: Any = args[0] if args else kwargs.get("query")
        if isinstance(query, torch.Tensor) and query.dim() != rank + 3:
            raise ValueError(
                f"na{rank}d takes (batch, {', '.join(AXIS_NAMES[rank])}, heads, head_dim), "
                f"{rank + 3} axes, but query has shape {tuple(query.shape)}"
            )
        return function(*args, **kwargs)

    attend.__name__ = attend.__qualname__ = f"na{rank}d"
    return attend


na1d = _of_rank(1, neighborhood_attention_generic)
na2d = _of_rank(2, neighborhood_attention_generic)
na3d = _of_rank(3, neighborhood_attention_generic)


def _explained(function: Callable[P, Any]) -> Callable[P, Choice]:
    signature = inspect.signature(function)
    wanted = set(inspect.signature(_prepare).parameters)

    def explain(*args: P.args, **kwargs: P.kwargs) -> Choice:
        """Which backend a call with these arguments would run on, and why not the others.

        Takes what :func:`na1d`, :func:`na2d` and :func:`na3d` take; computes nothing. ``print`` the
        result.

        Raises:
            ValueError, TypeError: as the call itself would.
        """
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        call = _prepare(**{name: value for name, value in given.items() if name in wanted})
        _number(given["scale"], call.query.shape[-1])
        _shapes(given["q_tile_shape"], given["kv_tile_shape"], len(call.axes))
        if given["attention_kwargs"]:
            _check_token_options(given["attention_kwargs"])
        return call.choice

    return explain


explain = _explained(neighborhood_attention_generic)
