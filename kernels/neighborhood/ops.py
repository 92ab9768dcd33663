"""The two custom operators behind every backend with a hand-written backward.

``stvision::neighborhood_attention`` returns output and log-sum-exp; both are differentiable once.
The backend is an argument, so that ``torch.compile`` sees one operator whatever runs.

Additional tokens are a second attention of the same queries. Both parts join in one softmax as those
of ring attention (arXiv 2310.01889) do: each weighs a pair by the *joint* log-sum-exp and sums rows
from the *joint* output, so the backward of a part needs nothing of the other, nothing of the parts
is kept, and what the parts add to the gradient of queries is rounded once.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.autograd import forward_ad

from stvision.kernels.neighborhood.windows import Axis, decode_axes


@lru_cache(maxsize=512)
def _axes(numbers: tuple[int, ...]) -> tuple[Axis, ...]:
    return decode_axes(numbers)


def is_autocast(device: str) -> bool:
    """Whether autocast is on; tensors without memory have none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def own_settings(device: str) -> contextlib.AbstractContextManager:
    """The backends choose their own types and devices.

    Autocast must not round their float32 products, and the tables of windows, which are kept, are
    built on the CPU whatever the default device.
    """
    autocast, modes = is_autocast(device), torch._C._len_torch_function_stack()
    if not autocast and not modes:
        return contextlib.nullcontext()
    settings = contextlib.ExitStack()
    if autocast:
        settings.enter_context(torch.autocast(device, enabled=False))
    if modes:
        settings.enter_context(torch.device("cpu"))
    return settings


def _module(backend: str) -> Any:
    if backend == "triton":
        from stvision.kernels.neighborhood import triton_launch

        return triton_launch
    if backend == "blocked":
        from stvision.kernels.neighborhood import blocked

        return blocked
    from stvision.kernels.neighborhood import reference

    return reference


def _options(
    backend: str, tile: Sequence[int], rank: int, deterministic: bool | None
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if backend in {"blocked", "triton"} and tile:
        options["tile"] = tuple(tile) if backend == "triton" else tuple(tile[:rank])
    if deterministic is not None:
        options["deterministic"] = deterministic
    return options


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _out_dtype(query: torch.Tensor, backend: str, joint: bool) -> torch.dtype:
    """Type of the output, which is what the backward sums rows from.

    Where a row sees a few keys the rounding of a 16-bit output shows in these sums. Alone, backends
    in plain PyTorch form them from the weights, which a part has not all of; so their joint output
    stays in float32.
    """
    return _wide(query.dtype) if joint and backend != "triton" else query.dtype


def _tokens_axes(query: torch.Tensor, more_keys: torch.Tensor) -> tuple[Axis, ...]:
    """Every query, in flat order, sees every additional token."""
    queries, tokens = math.prod(query.shape[1:-2]), more_keys.shape[1]
    return _axes(tuple(Axis(queries, tokens, tokens, query_map="start").encode()))


def tokens_tile(backend: str, tile: Sequence[int], rank: int) -> tuple[int, ...]:
    """The tile and box of the grid in flat order, where both are given."""
    if backend != "triton" or len(tile) <= rank:
        return ()
    return math.prod(tile[:rank]), math.prod(tile[rank:])


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    axes: Sequence[int],
    scale: float,
    backend: str,
    tile: Sequence[int],
    deterministic: bool,
    more_keys: torch.Tensor | None = None,
    more_values: torch.Tensor | None = None,
    more_backend: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    rank = query.dim() - 3
    inputs = (query, key, value, rpb, key_mask, _axes(tuple(axes)), scale)
    options = _options(backend, tile, rank, None)
    with own_settings(query.device.type):
        if more_keys is None or more_values is None:
            return _module(backend).forward(*inputs, **options)
        out, lse = _module(backend).forward(*inputs, part=True, **options)
        more_axes = _tokens_axes(query, more_keys)
        options = _options(more_backend, tokens_tile(more_backend, tile, rank), 1, None)
        flat = query.flatten(1, -3)
        more_out, more_lse = _module(more_backend).forward(
            flat, more_keys, more_values, None, None, more_axes, scale, part=True, **options
        )
        more_out, more_lse = more_out.reshape(out.shape), more_lse.reshape(lse.shape)
        # NaN where no part saw a key: both outputs are zero there
        share = torch.sigmoid(more_lse - lse).nan_to_num_(0.0)
        torch.lerp(out, more_out, share[..., None], out=out)
        return out.to(_out_dtype(query, backend, True)), torch.logaddexp(lse, more_lse)


#: (query, key, value, rpb, key_mask, axes, scale, backend, tile, deterministic) -> output, lse; with
#: additional tokens also (more_keys, more_values, more_backend)
neighborhood_attention = torch.library.custom_op(
    "stvision::neighborhood_attention", _forward, mutates_args=()
)


@neighborhood_attention.register_fake
def _(
    query,
    key,
    value,
    rpb,
    key_mask,
    axes,
    scale,
    backend,
    tile,
    deterministic,
    more_keys=None,
    more_values=None,
    more_backend="",
):
    joint = more_keys is not None and more_values is not None
    return (
        query.new_empty(
            *query.shape[:-1], value.shape[-1], dtype=_out_dtype(query, backend, joint)
        ),
        query.new_empty(query.shape[:-1], dtype=_wide(query.dtype)),
    )


def _backward_now(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    more_keys: torch.Tensor | None,
    more_values: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    axes: Sequence[int],
    scale: float,
    backend: str,
    tile: Sequence[int],
    deterministic: bool,
    more_backend: str,
) -> tuple[torch.Tensor | None, ...]:
    rank = query.dim() - 3
    inputs = (query, key, value, rpb, key_mask, out, lse, _axes(tuple(axes)), scale)
    options = _options(backend, tile, rank, deterministic)
    with own_settings(query.device.type):
        if more_keys is None or more_values is None:
            grads = _module(backend).backward(grad_out, grad_lse, *inputs, **options)
            return *grads, None, None
        grad_out, grad_lse = grad_out.contiguous(), grad_lse.contiguous()
        dq, dk, dv, drpb = _module(backend).backward(
            grad_out, grad_lse, *inputs, part=True, **options
        )
        options = _options(more_backend, tokens_tile(more_backend, tile, rank), 1, deterministic)
        if more_backend == "triton":  # whose products take one type; the values are its already
            grad_out = grad_out.to(query.dtype)
        flat, flat_out, flat_up = (x.flatten(1, -3) for x in (query, out, grad_out))
        more_dq, more_dk, more_dv, _ = _module(more_backend).backward(
            flat_up,
            grad_lse.flatten(1, -2),
            flat,
            more_keys,
            more_values,
            None,
            None,
            flat_out,
            lse.flatten(1, -2),
            _tokens_axes(query, more_keys),
            scale,
            part=True,
            **options,
        )
        total = query.new_empty(query.shape)
        torch.add(dq, more_dq.reshape(dq.shape), out=total)
        return total, dk, dv, drpb, more_dk, more_dv


def _backward_filled(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    more_keys: torch.Tensor | None,
    more_values: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    axes: Sequence[int],
    scale: float,
    backend: str,
    tile: Sequence[int],
    deterministic: bool,
    more_backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`_backward_now` with empty tensors for what is not there: operators return tensors."""
    grads = _backward_now(
        grad_out,
        grad_lse,
        query,
        key,
        value,
        rpb,
        key_mask,
        more_keys,
        more_values,
        out,
        lse,
        axes,
        scale,
        backend,
        tile,
        deterministic,
        more_backend,
    )
    dq, dk, dv, drpb, more_dk, more_dv = (query.new_empty(0) if x is None else x for x in grads)
    return dq, dk, dv, drpb, more_dk, more_dv


neighborhood_attention_backward = torch.library.custom_op(
    "stvision::neighborhood_attention_backward", _backward_filled, mutates_args=()
)


@neighborhood_attention_backward.register_fake
def _(
    grad_out,
    grad_lse,
    query,
    key,
    value,
    rpb,
    key_mask,
    more_keys,
    more_values,
    out,
    lse,
    axes,
    scale,
    backend,
    tile,
    deterministic,
    more_backend,
):
    return tuple(
        query.new_empty(0) if x is None else x.new_empty(x.shape)
        for x in (query, key, value, rpb, more_keys, more_values)
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, value, rpb, key_mask, *options, more_keys, more_values, more_backend = inputs
    ctx.save_for_backward(query, key, value, rpb, key_mask, more_keys, more_values, *output)
    ctx.options = (*options, more_backend)


def _gradients(
    run: Callable[..., tuple[torch.Tensor | None, ...]],
    saved: tuple[torch.Tensor, ...],
    options: tuple,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
) -> tuple:
    rpb, more_keys = saved[3], saved[5]
    dq, dk, dv, drpb, more_dk, more_dv = run(grad_out, grad_lse, *saved, *options)
    if rpb is None:
        drpb = None
    if more_keys is None:
        more_dk = more_dv = None
    return dq, dk, dv, drpb, None, None, None, None, None, None, more_dk, more_dv, None


def _backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple:
    run = neighborhood_attention_backward
    return _gradients(run, ctx.saved_tensors, ctx.options, grad_out, grad_lse)


def _setup_nothing(ctx: Any, inputs: tuple, output: tuple) -> None:
    """The backward operator keeps nothing: it has no derivative."""


def _no_second_derivative(ctx: Any, *grads: torch.Tensor) -> tuple:
    raise NotImplementedError(
        "neighborhood attention has no second derivative; take the second derivative through "
        "scaled_dot_product_attention with a mask, or drop create_graph=True"
    )


def _no_vmap(*args: Any) -> None:
    raise NotImplementedError(
        "neighborhood attention does not run under torch.func.vmap; put the mapped axis into the "
        "batch axis instead"
    )


torch.library.register_autograd(neighborhood_attention, _backward, setup_context=_setup)
torch.library.register_autograd(
    neighborhood_attention_backward, _no_second_derivative, setup_context=_setup_nothing
)
torch.library.register_vmap(neighborhood_attention, _no_vmap)
torch.library.register_vmap(neighborhood_attention_backward, _no_vmap)


class _Direct(torch.autograd.Function):
    """The operator without its dispatch, which takes longer than the kernels of a small clip."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple:
        saved = ctx.saved_tensors  # once: checkpointing gives them a single time
        # what watches a backward, such as create_graph=True, must see the operator
        plain = not torch.is_grad_enabled() and _is_plain(grad_out, grad_lse, *saved)
        run = _backward_now if plain else neighborhood_attention_backward
        return _gradients(run, saved, ctx.options, grad_out, grad_lse)


class _TransformedBackward(torch.autograd.Function):
    """The operator of the backward, for the transforms of ``torch.func``."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return neighborhood_attention_backward(*inputs)

    setup_context = staticmethod(_setup_nothing)
    backward = staticmethod(_no_second_derivative)
    vmap = staticmethod(_no_vmap)


class _Transformed(torch.autograd.Function):
    """The operator for the transforms of ``torch.func``, which custom operators do not know."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return neighborhood_attention(*inputs)

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple:
        run = _TransformedBackward.apply
        return _gradients(run, ctx.saved_tensors, ctx.options, grad_out, grad_lse)

    vmap = staticmethod(_no_vmap)


def _is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether nothing watches operators on these tensors: no compiler, transform or mode.

    Kernels read memory as it lies, so tensors without any and lazily negated ones are not plain.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    traced = torch._C._get_tracing_state() is not None  # by torch.jit, which would record is_neg
    for x in tensors:
        if x is not None:
            if type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_meta:
                return False
            if not traced and x.is_neg():
                return False
    return True


def _refuse_tangents(*tensors: torch.Tensor | None) -> None:
    """No kernel carries a tangent along, and none must be dropped in silence.

    Raises:
        NotImplementedError: a tensor has a forward-mode derivative.
    """
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "neighborhood attention has no forward-mode derivative (jvp, make_dual); use backward, "
            "torch.autograd.grad or torch.func.grad"
        )


def _is_differentiating() -> bool:
    """Whether the innermost transform of ``torch.func`` is one that needs :class:`_Transformed`."""
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is None:
        return False
    kinds = torch._C._functorch.TransformType
    return transform.key() in (kinds.Grad, kinds.Jvp, kinds.Vmap)


class _Second(torch.autograd.Function):
    """Gradients as they are, which have none of their own."""

    @staticmethod
    def forward(*grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in grads)

    setup_context = staticmethod(_setup_nothing)
    backward = staticmethod(_no_second_derivative)
    vmap = staticmethod(_no_vmap)


class _First(torch.autograd.Function):
    """Tensors as they are, whose gradients pass :class:`_Second`."""

    @staticmethod
    def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    setup_context = staticmethod(_setup_nothing)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _Second.apply(*grads) if torch.is_grad_enabled() else grads

    vmap = staticmethod(_no_vmap)


def first_order(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same tensors for a kernel of PyTorch, with the refusals of :func:`attend`.

    Dense kernels have no second derivative either, and say so with an internal name, if at all.

    Raises:
        NotImplementedError: a tensor has a forward-mode derivative, or is mapped by ``vmap``.
    """
    if torch.compiler.is_compiling():
        return query, key, value
    if forward_ad._current_level >= 0:
        _refuse_tangents(query, key, value)
    if any(torch._C._functorch.is_batchedtensor(x) for x in (query, key, value)):
        _no_vmap()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        query, key, value = _First.apply(query, key, value)
    return query, key, value


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    axes: Sequence[int],
    scale: float,
    backend: str,
    tile: Sequence[int],
    deterministic: bool,
    more_keys: torch.Tensor | None = None,
    more_values: torch.Tensor | None = None,
    more_backend: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`neighborhood_attention`, past the dispatcher where nothing watches it.

    ``more_keys`` (B, M, Hk, d) and ``more_values`` (B, M, Hk, dv) are at least one token that every
    query sees too; ``more_backend`` runs them. The output is then float32 for 16-bit inputs, unless
    ``backend`` is ``"triton"``.
    """
    tensors = (query, key, value, rpb, more_keys, more_values)
    window = (axes, scale, backend, tile, deterministic)
    inputs = (query, key, value, rpb, key_mask, *window, more_keys, more_values, more_backend)
    if not torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            _refuse_tangents(*tensors)
        tracing = torch._C._get_tracing_state() is not None
        if tracing and "triton" in (backend, more_backend):
            raise NotImplementedError(
                "torch.jit.trace cannot record Triton kernels; use torch.export, or trace with "
                "backend='blocked'"
            )
        if _is_differentiating():
            return _Transformed.apply(*inputs)
    if not _is_plain(*tensors, key_mask):
        return neighborhood_attention(*inputs)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Direct.apply(*inputs)
    return _forward(*inputs)
