"""Neighborhood attention layers with NATTEN's parameter names (Hassani et al. 2023, 2204.07143)."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.kernels.neighborhood import neighborhood_attention_generic
from stvision.kernels.neighborhood.choice import BACKENDS
from stvision.kernels.neighborhood.problem import per_axis
from stvision.layers.checks import check_choice


def neighborhood_self_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    num_heads: int,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    zero_pad: bool = False,
    **options: Any,
) -> Tensor:
    """Project to queries, keys and values, attend to the neighborhood, project back.

    Args:
        x: (B, *grid, C) with a grid of one to three axes.
        qkv_weight: (3 C, C), rows ordered query, key, value, then head, then channel.
        qkv_bias: (3 C,) or ``None``.
        proj_weight: (C, C).
        proj_bias: (C,) or ``None``.
        num_heads: heads; must divide C.
        kernel_size: per axis, keys that a query sees.
        dilation: per axis, distance between visible keys.
        zero_pad: extend axes shorter than ``kernel_size * dilation`` at their end with zero tokens
            that take part as keys, as NAT and DiNAT were trained.
        options: further arguments of :func:`stvision.kernels.neighborhood.na3d`.

    Returns:
        (B, *grid, C); with ``border="valid"`` the smaller grid.

    Raises:
        ValueError, TypeError: as :func:`stvision.kernels.neighborhood.na3d`.
    """
    grid = x.shape[1:-1]
    rank = len(grid)
    if zero_pad:
        if options.get("key_mask") is not None:
            raise ValueError("zero_pad=True takes no key_mask: its padding takes part as keys")
        windows = per_axis("kernel_size", cast(Any, kernel_size), rank)
        dilations = per_axis("dilation", cast(Any, dilation), rank)
        missing = [max(0, k * d - n) for k, d, n in zip(windows, dilations, grid, strict=True)]
        if any(missing):
            x = F.pad(x, [0, 0, *(n for more in reversed(missing) for n in (0, more))])
    qkv = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
    query, key, value = qkv.unbind(-3)
    out = cast(
        Tensor,
        neighborhood_attention_generic(
            query, key, value, cast(Any, kernel_size), dilation=cast(Any, dilation), **options
        ),
    )
    if zero_pad:
        for axis, length in enumerate(grid, start=1):
            out = out.narrow(axis, 0, min(length, out.shape[axis]))
    return F.linear(out.flatten(-2), proj_weight, proj_bias)


#: arguments of the kernel that the module takes once for all, and with a call
OPTIONS = ("backend", "border", "pad", "deterministic", "q_tile_shape", "kv_tile_shape")
OF_A_CALL = (
    "key_mask",
    "additional_keys",
    "additional_values",
    "attention_kwargs",
    "backend",
    "deterministic",
)


def _check_options(options: dict[str, Any], allowed: Sequence[str], where: str) -> None:
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} cannot be given {where}; {', '.join(allowed)} can")


class _NeighborhoodAttention(nn.Module):
    """Shared body of the three ranks."""

    rank: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        rpb: bool = False,
        zero_pad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide embed_dim={embed_dim}")
        _check_options(options, OPTIONS, "to the module")
        check_choice("backend", options.get("backend"), BACKENDS)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.kernel_size = per_axis("kernel_size", cast(Any, kernel_size), self.rank)
        if min(self.kernel_size) < 1:
            raise ValueError(f"kernel_size must be at least 1 on each axis, got {kernel_size}")
        self.stride = per_axis("stride", cast(Any, stride), self.rank)
        self.dilation = per_axis("dilation", cast(Any, dilation), self.rank)
        self.is_causal = per_axis("is_causal", cast(Any, is_causal), self.rank)
        if any(not 1 <= s <= k for s, k in zip(self.stride, self.kernel_size, strict=True)):
            raise ValueError(
                f"stride must be between 1 and kernel_size on each axis, got {self.stride} for "
                f"{self.kernel_size}"
            )
        if min(self.dilation) < 1:
            raise ValueError(f"dilation must be at least 1 on each axis, got {dilation}")
        self.zero_pad, self.options = zero_pad, options
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpb: nn.Parameter | None = None
        if rpb:
            self.rpb = nn.Parameter(torch.zeros(num_heads, *(2 * k - 1 for k in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """Attend.

        Args:
            x: (B, *grid, C).
            options: further arguments of the kernel for this call: ``key_mask``,
                ``additional_keys``, ``additional_values``, ``attention_kwargs``, ``backend``,
                ``deterministic``.

        Returns:
            (B, *grid, C).

        Raises:
            ValueError: another rank or width, a window that does not fit the grid, or an option that
                belongs to the module.
        """
        _check_options(options, OF_A_CALL, "with a call")
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"{type(self).__name__} takes (batch, {self.rank} grid axes, {self.embed_dim}), "
                f"but x has shape {tuple(x.shape)}"
            )
        out = neighborhood_self_attention(
            x,
            self.qkv.weight,
            self.qkv.bias,
            self.proj.weight,
            self.proj.bias,
            num_heads=self.num_heads,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            zero_pad=self.zero_pad,
            stride=self.stride,
            is_causal=self.is_causal,
            scale=self.scale,
            rpb=self.rpb,
            **(self.options | options),
        )
        return cast(Tensor, self.proj_drop(out))

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"is_causal={self.is_causal}, rpb={self.rpb is not None}"
        )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Self-attention in a neighborhood of a sequence: (B, L, C) to (B, L, C).

    Parameters are named and laid out as NATTEN's: ``qkv.weight`` (3 C, C), ``proj.weight`` (C, C),
    and, of NATTEN before 0.20, ``rpb`` (heads, 2 * kernel_size - 1).

    Args:
        embed_dim: channels C.
        num_heads: heads; must divide C.
        kernel_size, stride, dilation, is_causal: as in :func:`stvision.kernels.neighborhood.na1d`.
        qkv_bias: whether the first projection has a bias.
        qk_scale: factor of the logits, head_dim ** -0.5 when not given.
        proj_drop: dropout after the last projection.
        rpb: learn a relative position bias.
        zero_pad: see :func:`neighborhood_self_attention`.
        options: further arguments of the kernel, such as ``backend``, ``border`` or ``pad``.

    Raises:
        ValueError: ``num_heads`` does not divide ``embed_dim``, a tuple of another rank, or an
            unknown ``backend``.
    """

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Self-attention in a neighborhood of an image: (B, H, W, C) to (B, H, W, C).

    Arguments and parameters are those of :class:`NeighborhoodAttention1D`; ``rpb`` is
    (heads, 2 * kernel height - 1, 2 * kernel width - 1).
    """

    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Self-attention in a neighborhood of a clip: (B, T, H, W, C) to (B, T, H, W, C).

    Arguments and parameters are those of :class:`NeighborhoodAttention1D`.
    """

    rank = 3
