"""Checks of arguments that mechanisms share: each refuses in one sentence."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn


def check_volume(x: Tensor, dim: int, name: str = "x") -> None:
    """ValueError unless ``x`` is (B, T, H, W, dim) with tokens in it; B may be 0."""
    if x.ndim != 5 or x.shape[-1] != dim or 0 in x.shape[1:4]:
        raise ValueError(
            f"{name} must be (B, T, H, W, {dim}) with at least one frame, row and column, "
            f"got {tuple(x.shape)}"
        )


def check_whole(least: int, **values: Any) -> None:
    """ValueError naming the first argument that is no whole number of at least ``least``."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """ValueError when ``value`` is neither ``None`` nor one of the names that are allowed."""
    if value is not None and value not in allowed:
        raise ValueError(
            f"{name} must be None or one of {', '.join(map(repr, allowed))}, got {value!r}"
        )


def may_read(x: Tensor) -> bool:
    """Whether a check may look at the numbers of ``x``.

    Not where that waits for a device, nor where there are none yet: in a graph for the compiler, or
    below a transform of ``torch.func``.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and type(x) in (Tensor, nn.Parameter)
        and torch._C._functorch.peek_interpreter_stack() is None
    )
