"""From a user's arguments to a checked problem: the axes, and one clear sentence for bad input."""

from collections.abc import Sequence
from typing import TypeVar

import torch

from stvision.kernels.neighborhood.windows import Axis, QueryMap

PerAxisInt = int | Sequence[int]
PerAxisBool = bool | Sequence[bool]
PerAxisStr = str | Sequence[str]
Item = TypeVar("Item", int, bool, str)

#: what ``None`` stands for, as in NATTEN
DEFAULTS: dict[str, int | bool] = {"stride": 1, "dilation": 1, "is_causal": False}

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AXIS_NAMES = {1: ("length",), 2: ("height", "width"), 3: ("time", "height", "width")}


def per_axis(name: str, value: Item | Sequence[Item] | None, rank: int) -> tuple[Item, ...]:
    """One value for each axis; ``None`` is the default of ``stride``, ``dilation``, ``is_causal``.

    Raises:
        ValueError: a sequence has another length than ``rank``.
        TypeError: a value is not of the kind that ``name`` takes.
    """
    kind = {"is_causal": bool, "border": str}.get(name, int)
    if value is None and name in DEFAULTS:
        value = DEFAULTS[name]  # type: ignore[assignment]
    if isinstance(value, str | int):
        values: tuple = (value,) * rank
    else:
        try:
            values = tuple(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{name} must be {kind.__name__} or a tuple, not {value!r}") from None
    if len(values) != rank:
        raise ValueError(
            f"{name}={values} has {len(values)} values, but the grid has {rank} axes "
            f"({', '.join(AXIS_NAMES[rank])})"
        )
    for one in values:
        if isinstance(one, bool) != (kind is bool) or not isinstance(one, kind):
            raise TypeError(f"{name} takes {kind.__name__} values, not {one!r}")
    return values


def check_are_tensors(**given: object) -> None:
    """Every argument is a dense tensor.

    Raises:
        TypeError: one is not.
    """
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
        if x.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, not one of layout {x.layout}")


def check_tensors(
    rank: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    rpb: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
) -> None:
    """Shapes, dtypes and devices that do not depend on the window.

    Raises:
        ValueError: wrong rank, sizes that do not match, or tensors on different devices.
        TypeError: dtypes that differ or are not floating point.
    """
    names = ", ".join(AXIS_NAMES[rank])
    for label, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != rank + 3:
            raise ValueError(
                f"{label} must be (batch, {names}, heads, head_dim), {rank + 3} axes, "
                f"but has shape {tuple(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise TypeError(f"{label} must be float16, bfloat16, float32 or float64, not {x.dtype}")
        if x.dtype != query.dtype:
            raise TypeError(f"{label} is {x.dtype} but query is {query.dtype}; they must match")
        if x.device != query.device:
            raise ValueError(f"{label} is on {x.device} but query is on {query.device}")
        if x.shape[0] != query.shape[0]:
            raise ValueError(f"{label} has batch {x.shape[0]} but query has {query.shape[0]}")
        if min(x.shape[1:]) < 1:
            raise ValueError(f"{label} has an empty axis: shape {tuple(x.shape)}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} may differ in the last axis "
            "only"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query has head_dim {query.shape[-1]} but key has {key.shape[-1]}; only value may "
            "have another head_dim"
        )
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if heads % kv_heads:
        raise ValueError(f"query has {heads} heads, which is no multiple of key's {kv_heads}")
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values must be given together")
    if additional_keys is not None and additional_values is not None:
        for label, x, size in (
            ("additional_keys", additional_keys, key.shape[-1]),
            ("additional_values", additional_values, value.shape[-1]),
        ):
            if x.dim() != 4 or (x.shape[0], *x.shape[2:]) != (query.shape[0], kv_heads, size):
                raise ValueError(
                    f"{label} must be ({query.shape[0]}, tokens, {kv_heads}, {size}), but has "
                    f"shape {tuple(x.shape)}"
                )
            if x.dtype != query.dtype:
                raise TypeError(f"{label} is {x.dtype} but query is {query.dtype}; they must match")
            if x.device != query.device:
                raise ValueError(f"{label} is on {x.device} but query is on {query.device}")
        if additional_keys.shape[1] != additional_values.shape[1]:
            raise ValueError(
                f"additional_keys has {additional_keys.shape[1]} tokens but additional_values has "
                f"{additional_values.shape[1]}"
            )
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(
                f"key_mask must be bool, True where a key takes part, not {key_mask.dtype}"
            )
        if key_mask.shape != key.shape[:-2]:
            raise ValueError(
                f"key_mask must have shape {tuple(key.shape[:-2])}, not {tuple(key_mask.shape)}"
            )
        if key_mask.device != query.device:
            raise ValueError(f"key_mask is on {key_mask.device} but query is on {query.device}")
    if rpb is not None:
        if rpb.dim() != rank + 1 or rpb.shape[0] != heads:
            raise ValueError(
                f"rpb must be ({heads}, {', '.join(['2 * kernel_size - 1'] * rank)}), but has "
                f"shape {tuple(rpb.shape)}"
            )
        if not rpb.dtype.is_floating_point:
            raise TypeError(f"rpb must be floating point, not {rpb.dtype}")
        if rpb.device != query.device:
            raise ValueError(f"rpb is on {rpb.device} but query is on {query.device}")


def _length(size: int) -> int:
    """A length as a number, except where torch.export leaves it open; torch.jit has tensors."""
    return size if isinstance(size, torch.SymInt) else int(size)


def build_axes(
    query_grid: Sequence[int],
    key_grid: Sequence[int],
    *,
    kernel_size: PerAxisInt,
    stride: PerAxisInt | None = 1,
    dilation: PerAxisInt | None = 1,
    is_causal: PerAxisBool | None = False,
    border: PerAxisStr = "shift",
    pad: bool = False,
    query_map: str | PerAxisInt | None = None,
) -> tuple[tuple[Axis, ...], tuple[slice, ...]]:
    """Check and normalise the window's arguments.

    Returns:
        The axes, and the slice of queries of each axis that have an output (all of them unless
        ``border="valid"``); the axes are those of the queries after slicing.

    Raises:
        ValueError: a window that does not fit, naming the axis and the numbers.
        TypeError: a value of the wrong kind.
    """
    rank = len(key_grid)
    if not isinstance(pad, bool):
        raise TypeError(f"pad must be True or False, not {pad!r}")
    windows = per_axis("kernel_size", kernel_size, rank)
    strides = per_axis("stride", stride, rank)
    dilations = per_axis("dilation", dilation, rank)
    causal = per_axis("is_causal", is_causal, rank)
    borders = per_axis("border", border, rank)
    rule: QueryMap = "index"
    offsets: tuple[int, ...] = (0,) * rank
    if isinstance(query_map, str) and query_map in {"center", "start"}:
        rule = query_map  # type: ignore[assignment]
    elif isinstance(query_map, str):
        raise ValueError(
            f"query_map must be None, 'center', 'start' or an offset per axis, not {query_map!r}"
        )
    elif query_map is not None:
        offsets = per_axis("query_map", query_map, rank)
    axes, kept = [], []
    for a in range(rank):
        name = f"axis {a} ({AXIS_NAMES[rank][a]})"
        queries, keys = _length(query_grid[a]), _length(key_grid[a])
        k, s, d = windows[a], strides[a], dilations[a]
        if k < 1:
            raise ValueError(f"kernel_size on {name} is {k}; it must be at least 1")
        if d < 1:
            raise ValueError(f"dilation on {name} is {d}; it must be at least 1")
        if not 1 <= s <= k:
            raise ValueError(
                f"stride on {name} is {s}; it must be between 1 and kernel_size, which is {k}"
            )
        if k * d > keys and not pad:
            window = f"kernel_size {k}" if d == 1 else f"kernel_size {k} x dilation {d} = {k * d}"
            raise ValueError(
                f"{window} is larger than {name}, which has {keys} tokens; shrink the window or "
                "pass pad=True to let windows end with the grid"
            )
        if query_map is None and queries != keys:
            raise ValueError(
                f"query has {queries} tokens on {name} but key has {keys}; pass query_map to say "
                "where a query stands on the key grid"
            )
        if offsets[a] < 0 or (rule == "index" and offsets[a] + queries > keys):
            raise ValueError(
                f"query_map offset {offsets[a]} on {name} puts {queries} queries outside of the "
                f"{keys} keys"
            )
        if borders[a] not in {"shift", "valid"}:
            raise ValueError(f"border on {name} is {borders[a]!r}; it must be 'shift' or 'valid'")
        inner = slice(0, queries)
        if borders[a] == "valid":
            if s != 1 or query_map is not None:
                raise ValueError(
                    f"border='valid' on {name} needs stride 1 and query_map=None, but stride is "
                    f"{s} and query_map is {query_map!r}"
                )
            if k * d > keys:
                raise ValueError(
                    f"border='valid' on {name} leaves no query: kernel_size {k} x dilation {d} "
                    f"is larger than its {keys} tokens"
                )
            before = (k - 1 if causal[a] else k // 2) * d
            inner = slice(before, before + queries - (k - 1) * d)
        kept.append(inner)
        axes.append(
            Axis(inner.stop - inner.start, keys, k, s, d, causal[a], offsets[a] + inner.start, rule)
        )
    return tuple(axes), tuple(kept)


def check_rpb(rpb: torch.Tensor, axes: Sequence[Axis]) -> None:
    """The bias table must hold every distance of the window.

    Raises:
        ValueError: the table's sizes are not ``2 * kernel_size - 1``.
    """
    expected = (rpb.shape[0], *(2 * axis.window - 1 for axis in axes))
    if tuple(rpb.shape) != expected:
        raise ValueError(
            f"rpb must have shape {expected} for kernel_size "
            f"{tuple(axis.window for axis in axes)}, not {tuple(rpb.shape)}"
        )
