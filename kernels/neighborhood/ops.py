"""The two custom operators behind every backend with a hand-written backward.

``stvision::neighborhood_attention`` returns output and log-sum-exp; both are differentiable once.
The backend is an argument, so that ``torch.compile`` sees one operator whatever runs.
"""

import contextlib
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
    if backend == "triton" and deterministic is not None:
        options["deterministic"] = deterministic
    return options


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
) -> tuple[torch.Tensor, torch.Tensor]:
    options = _options(backend, tile, query.dim() - 3, None)
    with own_settings(query.device.type):
        return _module(backend).forward(
            query, key, value, rpb, key_mask, _axes(tuple(axes)), scale, **options
        )


#: (query, key, value, rpb, key_mask, axes, scale, backend, tile, deterministic) -> output, lse
neighborhood_attention = torch.library.custom_op(
    "stvision::neighborhood_attention", _forward, mutates_args=()
)


@neighborhood_attention.register_fake
def _(query, key, value, rpb, key_mask, axes, scale, backend, tile, deterministic):
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        query.new_empty(*query.shape[:-1], value.shape[-1]),
        query.new_empty(query.shape[:-1], dtype=dtype),
    )


def _backward_now(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    axes: Sequence[int],
    scale: float,
    backend: str,
    tile: Sequence[int],
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = _options(backend, tile, query.dim() - 3, deterministic)
    with own_settings(query.device.type):
        dq, dk, dv, drpb = _module(backend).backward(
            grad_out,
            grad_lse,
            query,
            key,
            value,
            rpb,
            key_mask,
            out,
            lse,
            _axes(tuple(axes)),
            scale,
            **options,
        )
    return dq, dk, dv, query.new_empty(0) if drpb is None else drpb


neighborhood_attention_backward = torch.library.custom_op(
    "stvision::neighborhood_attention_backward", _backward_now, mutates_args=()
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
    out,
    lse,
    axes,
    scale,
    backend,
    tile,
    deterministic,
):
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        query.new_empty(0) if rpb is None else rpb.new_empty(rpb.shape),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, value, rpb, key_mask, axes, scale, backend, tile, deterministic = inputs
    ctx.save_for_backward(query, key, value, rpb, key_mask, *output)
    ctx.options = (axes, scale, backend, tile, deterministic)


def _gradients(
    run: Callable[..., tuple[torch.Tensor, ...]],
    saved: tuple[torch.Tensor, ...],
    options: tuple,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
) -> tuple:
    query, key, value, rpb, key_mask, out, lse = saved
    dq, dk, dv, drpb = run(grad_out, grad_lse, query, key, value, rpb, key_mask, out, lse, *options)
    return dq, dk, dv, None if rpb is None else drpb, None, None, None, None, None, None


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`neighborhood_attention`, past the dispatcher where nothing watches it."""
    inputs = (query, key, value, rpb, key_mask, axes, scale, backend, tile, deterministic)
    if not torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            _refuse_tangents(query, key, value, rpb)
        if backend == "triton" and torch._C._get_tracing_state() is not None:
            raise NotImplementedError(
                "torch.jit.trace cannot record Triton kernels; use torch.export, or trace with "
                "backend='blocked'"
            )
        if _is_differentiating():
            return _Transformed.apply(*inputs)
    if not _is_plain(query, key, value, rpb, key_mask):
        return neighborhood_attention(*inputs)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, rpb)
    ):
        return _Direct.apply(*inputs)
    return _forward(*inputs)
