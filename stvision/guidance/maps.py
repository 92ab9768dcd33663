"""Temporal Self-Guidance and Fourier Motion Enhancement on attention maps over frames.

Bu et al., "ByTheWay: Boost Your Text-to-Video Generation Model to Higher Quality in a Training-free
Way" (CVPR 2025; first version "BroadWay", 2024). A map holds softmaxed weights (..., F, F) of
query frames on key frames, rows summing to 1.

The frequency band is symmetric (k and F - k together) and never holds the constant. So the filter
is a real F x F projection P along the key axis: ``A P`` is the high band, ``A - A P`` the low one,
and by Parseval's theorem their squared sums are the spectrum's band energies. A product with P
replaces a transform there and back; it works for any F on any device.
"""

import math
from typing import Literal

import torch
from torch import Tensor


def _wide(maps: Tensor) -> Tensor:
    return maps.to(torch.promote_types(maps.dtype, torch.float32))


def _check_maps(maps: Tensor, name: str = "maps") -> None:
    if maps.ndim < 2 or maps.shape[-1] != maps.shape[-2] or not maps.is_floating_point():
        raise ValueError(
            f"{name} must be floating point (..., F, F), got shape {tuple(maps.shape)} "
            f"of {maps.dtype}"
        )


def attention_energy(maps: Tensor) -> Tensor:
    """Mean over rows of the sum of squared weights; 1/F for uniform rows, 1 for one-hot ones.

    Args:
        maps: (..., F, F), any floating dtype.

    Returns:
        Scalar, float32 (float64 for float64 input).
    """
    _check_maps(maps)
    return _wide(maps).square().sum(-1).mean()


def high_band(frames: int, tau: float, *, of: int | None = None) -> Tensor:
    """Which bins of a discrete Fourier transform along ``frames`` are the high band.

    Bin k is in the band when ``min(k, n - k) / n >= 1/2 - tau / F`` cycles a frame, the constant
    never is. For even F, n = F and 2 tau + 1 < F these are the paper's 2 tau + 1 bins around F/2.
    For odd F the paper's centre F // 2 makes the band lopsided, which breaks energies and leaves an
    imaginary part; this band holds k and F - k together. A ``tau`` of F/2 or more leaves only
    the constant outside.

    Args:
        frames: n, length of the transform.
        tau: half width in bins of a transform of length F, 0 or more.
        of: F, by which ``tau`` is measured; default ``frames``.

    Returns:
        (n,) bool on the CPU.

    Raises:
        ValueError: fewer than one frame or a negative ``tau``.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    if not tau >= 0:
        raise ValueError(f"tau must be 0 or more, got {tau}")
    length = frames if of is None else of
    k = torch.arange(frames)
    nearest = torch.minimum(k, frames - k).double() / frames
    return (nearest >= 0.5 - tau / length - 1e-9) & (k > 0)


def high_band_projection(frames: int, tau: float, *, of: int | None = None) -> Tensor:
    """The filter of :func:`high_band` as a symmetric (n, n) matrix, float64 on the CPU."""
    band = high_band(frames, tau, of=of)
    # real arithmetic: torch's compiler, below which some callers run, has no complex kernels
    k = torch.arange(frames)
    turns = (k[:, None] * k % frames).double() * (2 * math.pi / frames)
    waves = torch.cat([turns.cos() * band[:, None], turns.sin() * band[:, None]])
    return waves.mT @ waves / frames


def band_energies(maps: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Energy of the high and of the low band along key frames; their sum is the energy.

    Each is ``|DFT|^2`` summed over the band, averaged over all rows, divided by F.

    Args:
        maps: (..., F, F), any floating dtype.
        tau: see :func:`high_band`.

    Returns:
        Two scalars, float32 (float64 for float64 input).
    """
    _check_maps(maps)
    wide = _wide(maps)
    high = wide @ high_band_projection(maps.shape[-1], tau).to(wide)
    return high.square().sum(-1).mean(), (wide - high).square().sum(-1).mean()


def motion_gain(energy: Tensor, high: Tensor, low: Tensor, beta: float) -> Tensor:
    """Gain of the high band: ``max(beta, sqrt((energy - low) / high))``.

    The second term brings a map back to ``energy``. An empty high band (a uniform map) has no
    gain that could; then it is ``beta``, and multiplies nothing.

    Args:
        energy: E1, energy before self-guidance, a scalar.
        high: E_h of the guided map.
        low: E_l of the guided map.
        beta: smallest gain.
    """
    tiny = torch.finfo(high.dtype).tiny
    # rounding leaves some 1e-14 in the band of a uniform map: no part of its energy
    empty = high <= torch.finfo(high.dtype).eps ** 1.5 * (high + low)
    restoring = ((energy - low).clamp_min(0) / high.clamp_min(tiny)).sqrt()
    least = torch.full_like(high, beta)
    return torch.where(empty, least, torch.maximum(restoring, least))


def temporal_self_guidance(maps: Tensor, reference: Tensor, alpha: float) -> Tensor:
    """``A + alpha (A_1 - A)``: draw a map towards that of an earlier block.

    Args:
        maps: A, (..., F, F).
        reference: A_1, broadcastable to A, already resized in space (:func:`resize_maps`).
        alpha: 0 keeps A, 1 gives A_1.

    Returns:
        Shape of A, in at least float32; rows sum to 1 as theirs do.
    """
    _check_maps(maps)
    _check_maps(reference, "reference")
    wide = _wide(maps)
    return torch.lerp(wide, reference.to(wide), alpha)


def renormalise(maps: Tensor, clamp: bool) -> Tensor:
    """Rows to sum 1, without negative weights when ``clamp`` (the method's first version)."""
    if clamp:
        maps = maps.clamp_min(0)
    return maps / maps.sum(-1, keepdim=True)


def fourier_motion_enhancement(
    maps: Tensor,
    tau: float,
    beta: float,
    *,
    energy: Tensor | None = None,
    clamp: bool = False,
) -> Tensor:
    """Multiply the high band along key frames by ``max(beta, beta_c)`` and renormalise rows.

    Args:
        maps: A', (..., F, F), any floating dtype.
        tau: see :func:`high_band`.
        beta: smallest gain.
        energy: E1, energy to be kept at least; default that of ``maps``, so that beta_c = 1.
        clamp: set negative weights to zero, as in the method's first version.

    Returns:
        Shape of ``maps``, in at least float32.
    """
    _check_maps(maps)
    wide = _wide(maps)
    high = wide @ high_band_projection(maps.shape[-1], tau).to(wide)
    e_high = high.square().sum(-1).mean()
    e_low = (wide - high).square().sum(-1).mean()
    gain = motion_gain(e_high + e_low if energy is None else energy, e_high, e_low, beta)
    return renormalise(wide + (gain - 1) * high, clamp)


Resizing = Literal["nearest", "bilinear"]


def gather_maps(
    maps: Tensor, pixels: Tensor, size: tuple[int, int], mode: Resizing = "nearest"
) -> Tensor:
    """Some pixels of :func:`resize_maps`, without making the others.

    Args:
        maps: (B, h, w, ...).
        pixels: (N,) indices into the flattened rows x columns of the resized field.
        size: rows and columns of that field.
        mode: as in :func:`resize_maps`.

    Returns:
        (B, N, ...).
    """
    if mode not in ("nearest", "bilinear"):
        raise ValueError(f"mode must be 'nearest' or 'bilinear', got {mode!r}")
    pixels = pixels.to(maps.device)
    row, column = pixels // size[1], pixels % size[1]
    height, width = maps.shape[1:3]
    if (height, width) == tuple(size):
        return maps[:, row, column]
    if mode == "nearest":
        return maps[:, row * height // size[0], column * width // size[1]]
    y = ((row.double() + 0.5) * height / size[0] - 0.5).clamp(0, height - 1)
    x = ((column.double() + 0.5) * width / size[1] - 0.5).clamp(0, width - 1)
    top, left = y.long(), x.long()
    bottom, right = (top + 1).clamp_max(height - 1), (left + 1).clamp_max(width - 1)
    rest = (1, -1, *(1,) * (maps.ndim - 3))
    down, over = (y - top).view(rest).to(maps), (x - left).view(rest).to(maps)
    upper = torch.lerp(maps[:, top, left], maps[:, top, right], over)
    lower = torch.lerp(maps[:, bottom, left], maps[:, bottom, right], over)
    return torch.lerp(upper, lower, down)


def resize_maps(maps: Tensor, size: tuple[int, int], mode: Resizing = "nearest") -> Tensor:
    """Resize maps in space; rows still sum to 1, since every weight is a mean of weights.

    Args:
        maps: (B, h, w, ...), maps of each pixel.
        size: rows and columns wanted.
        mode: the papers name none; "nearest" or "bilinear" (pixel centres aligned).

    Returns:
        (B, rows, columns, ...).
    """
    pixels = torch.arange(size[0] * size[1], device=maps.device)
    return gather_maps(maps, pixels, size, mode).unflatten(1, tuple(size))
