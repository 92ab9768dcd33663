"""Rotary position embedding (Su et al. 2021, RoFormer, section 3.2) on interleaved pairs."""

import torch
from torch import Tensor, nn

#: tables of cosines and sines by (rows, dim, theta, device, dtype); rows are powers of two, an
#: entry is never replaced, so a captured CUDA graph may keep reading it
_TABLES: dict[tuple, Tensor] = {}


def rotary_frequencies(dim: int, theta: float = 1e4) -> Tensor:
    """Angular frequencies ``theta ** (-2 i / dim)`` for ``i = 0 .. dim/2 - 1``, float32, on the CPU."""
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be an even number of at least 2, got {dim}")
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    return (theta**-exponent).float()


def _wide(device: torch.device) -> torch.dtype:
    # float64 angles: at position 16 000 a float32 product is off by a thousandth of a radian
    return torch.float32 if device.type == "mps" else torch.float64


def _turns(position: Tensor, dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """(..., dim / 2, 2) of positions (...), in the precision of the positions until the last."""
    exponent = torch.arange(0, dim, 2, device=position.device, dtype=position.dtype) / dim
    angle = position[..., None] * theta**-exponent
    return torch.stack((angle.cos(), angle.sin()), dim=-1).to(dtype)


def _build_table(rows: int, dim: int, theta: float, device: torch.device, dtype: torch.dtype):
    position = torch.arange(rows, device=device, dtype=_wide(device))
    return _turns(position, dim, theta, dtype)


# Opaque to the compiler on purpose: traced, the trigonometry would be fused into, and repeated
# by, every layer that reads the table.
@torch.library.custom_op("stvision::rotary_table", mutates_args=())
def _table_op(
    rows: int, dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    return _build_table(rows, dim, theta, device, dtype)


@_table_op.register_fake
def _(rows: int, dim: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, dim // 2, 2, device=device, dtype=dtype)


@torch.library.custom_op("stvision::rotary_table_at", mutates_args=())
def _table_at_op(position: Tensor, dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    return _turns(position, dim, theta, dtype)


@_table_at_op.register_fake
def _(position: Tensor, dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    return position.new_empty(*position.shape, dim // 2, 2, dtype=dtype)


def rotary_table_at(
    positions: Tensor, dim: int, theta: float = 1e4, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Cosines and sines of any positions, such as times.

    Args:
        positions: (...), any real dtype; angles are computed in float64. They get no gradient.
        dim: rotated channels, even.
        theta: base of the frequencies.
        dtype: float32, or float64 for float64 queries.

    Returns:
        (..., dim / 2, 2): cosine and sine; of whole numbers those of :func:`rotary_table`.
    """
    positions = positions.detach().to(_wide(positions.device))
    build = _table_at_op if torch.compiler.is_compiling() else _turns
    return build(positions, dim, theta, dtype)


def rotary_table(
    length: int,
    dim: int,
    theta: float = 1e4,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cosines and sines of positions ``0 .. length - 1``.

    Args:
        length: number of positions.
        dim: rotated channels, even.
        theta: base of the frequencies.
        device: where the table lies.
        dtype: float32, or float64 for float64 queries.

    Returns:
        (length, dim / 2, 2): cosine and sine. In eager mode a view of a shared table: do not write.
    """
    device = torch.device(device)
    if torch.compiler.is_compiling():
        return _table_op(length, dim, theta, device, dtype)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    rows = max(16, 1 << (length - 1).bit_length())
    key = (rows, dim, theta, device, dtype)
    table = _TABLES.get(key)
    if table is None:
        # inference tensors cannot be saved for a later backward, so build outside of that mode
        with torch.inference_mode(False), torch.no_grad():
            table = _build_table(rows, dim, theta, device, dtype)
        # what a graph capture allocates belongs to the graph, and a fake tensor to its mode
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if type(table) is Tensor and not capturing:
            _TABLES[key] = table
    return table[:length]


def apply_rotary(x: Tensor, table: Tensor, *, overwrite: bool = False) -> Tensor:
    """Rotate the first channels of ``x`` in interleaved pairs, pass the others through.

    Args:
        x: (..., head_dim), any floating dtype; the rotation is computed in at least float32.
        table: (..., dim / 2, 2) cosine and sine, broadcast against the leading axes of ``x``.
        overwrite: allow the result to be written into ``x``, which happens where gradients are
            off: fewer launches and no traffic for the channels that pass through.

    Returns:
        Tensor like ``x``.

    Raises:
        ValueError: the table is wider than ``x``.
    """
    dim = 2 * table.shape[-2]
    if dim > x.shape[-1]:
        raise ValueError(f"the table rotates {dim} channels, but x has only {x.shape[-1]}")
    pairs = x[..., :dim].to(table.dtype).unflatten(-1, (dim // 2, 2))
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic, not complex
        even, odd = pairs.unbind(-1)
        cos, sin = table.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    else:  # fewer launches
        if x.shape[-1] % 2:
            pairs = pairs.contiguous()
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    turned = turned.flatten(-2)
    if overwrite and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        x[..., :dim].copy_(turned)
        return x
    turned = turned.to(x.dtype)
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), dim=-1)


class RotaryEmbedding(nn.Module):
    """Rotary embedding with the checkpoint key ``freqs`` (dim / 2,).

    The frequencies are fixed; the buffer exists so that published checkpoints load without
    missing or extra keys. Tables are computed from ``theta``, not from the buffer, because the
    buffer is rounded when a model is cast to half precision.

    Args:
        dim: rotated channels, even.
        theta: base of the frequencies.
    """

    freqs: Tensor

    def __init__(self, dim: int, theta: float = 1e4) -> None:
        super().__init__()
        self.dim, self.theta = dim, theta
        self.register_buffer("freqs", rotary_frequencies(dim, theta))

    def table(self, length: int, like: Tensor) -> Tensor:
        """(length, dim / 2, 2) on the device of ``like``, float64 for float64, else float32."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return rotary_table(length, self.dim, self.theta, device=like.device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, theta={self.theta:g}"
